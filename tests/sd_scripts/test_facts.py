"""What the log says of a data set, beside what sd-scripts itself makes of random ones. New ones each day."""

import datetime
import json
import subprocess

from kohya import sd_scripts
from tests.unit.test_facts import choices_differ, epochs_differ


def test_buckets_batches_and_pictures_of_an_epoch_are_sd_scripts_own() -> None:
    found = sd_scripts.find()
    seed = datetime.date.today().toordinal()
    command = [str(found.python), "-m", "tests.buckets", str(found.folder), str(seed), "60"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    recorded = json.loads(done.stdout.splitlines()[-1])
    assert choices_differ(recorded) == []
    assert epochs_differ(recorded) == []
