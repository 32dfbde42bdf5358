"""A job that is broken off and started again goes on by itself, and loses nothing."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from entrypoint.storage import S3Uri
from kohya.config import Kind
from tests.contract.test_job import keys
from tests.harness import TINY, Job, Result
from tests.s3 import S3Server

STEPS = 40
ASKED = {**TINY, "max_train_epochs": "10", "seed": "1", "state_every_minutes": "0.0001"}


@pytest.fixture(scope="session")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, base_models: dict[Kind, Path], pictures: Path
) -> dict[str, bytes]:
    """The LoRAs of the job that nothing breaks off, by name."""
    made = Job(tmp_path_factory.mktemp("uninterrupted"))
    made.mount("model", base_models["sd15"])
    made.mount("dataset", pictures)
    made.configure("hyperparameters", ASKED)
    result = made.run()
    assert result.code == 0, result.out + result.err
    made.end()
    return made.loras


@pytest.fixture
def ready(ready: Job) -> Job:
    ready.configure("hyperparameters", ASKED)
    return ready


def kill(job: Job, text: str) -> Result:
    """Run until a line holds `text`, and kill all of the job without notice."""
    job.prefix = ("setsid",)
    result = job.run_and(text, lambda process: os.killpg(process.pid, signal.SIGKILL))
    job.prefix = ()
    return result


def test_a_job_that_is_stopped_and_killed_ends_as_if_it_was_not(
    ready: Job, uninterrupted: dict[str, bytes]
) -> None:
    assert ready.run_until("epoch=2/10", signal.SIGTERM).code == 143
    assert kill(ready, "epoch=4/10").code == -signal.SIGKILL
    for path in ready.model.iterdir():  # of a new machine, where only the checkpoints are put back
        path.unlink()
    result = ready.run()
    assert result.code == 0, result.out + result.err
    assert "fetch: going on after step" in result.out
    assert ready.loras == uninterrupted
    assert ready.steps == list(range(1, STEPS + 1))
    left = sorted(
        path.relative_to(ready.tree / "checkpoints").parts for path in ready.tree.glob("checkpoints/*/*")
    )
    assert {name for _, name in left} == {"state.json"}  # nothing goes on from a job that is done
    again = ready.run()
    assert again.code == 0
    assert "going on" not in again.out


def test_a_job_goes_on_on_another_machine(
    ready: Job, s3: S3Server, bucket: S3Uri, uninterrupted: dict[str, bytes]
) -> None:
    """With checkpoint_uri nothing of the first machine is needed."""
    ready.environment |= s3.environment
    flags = (f"--checkpoint_uri={bucket / 'states'}", f"--logs_uri={bucket / 'logs'}")
    assert ready.run_until("epoch=3/10", signal.SIGTERM, *flags).code == 143
    there = keys(s3, bucket / "states")
    assert "loras/shape-000001.safetensors" in there
    for name in ("checkpoints", "model", "output"):
        (ready.tree / name).rename(ready.tree / f"other-{name}")
    result = ready.run(*flags)
    assert result.code == 0, result.out + result.err
    assert "fetch: going on after step" in result.out
    assert ready.loras == uninterrupted
    assert ready.steps == list(range(1, STEPS + 1))
    assert len(keys(s3, bucket / "logs")) == 1
    manifests = [key for key in keys(s3, bucket / "states") if key.endswith("/state.json")]
    for key in manifests:
        body = s3.client().get_object(Bucket=bucket.bucket, Key=f"states/{key}")["Body"].read()
        assert json.loads(body)["finished"]


def test_a_job_that_is_killed_before_its_first_state_begins_its_event_log_anew(ready: Job) -> None:
    """On SageMaker, where each attempt of a job has its name."""
    ready.environment["TRAINING_JOB_NAME"] = "squares-1"
    ready.prefix = ("setsid",)

    def kill_once_it_is_logged(process: "subprocess.Popen[str]") -> None:
        while not ready.events and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)

    killed = ready.run_and("step=1/", kill_once_it_is_logged, "--state_every_minutes=60")
    assert killed.code == -signal.SIGKILL
    assert not ready.states
    result = ready.run()
    assert result.code == 0, result.out + result.err
    assert "going on" not in result.out
    assert ready.steps == list(range(1, STEPS + 1))


def test_a_broken_state_is_passed_over_and_another_runs_is_refused(ready: Job) -> None:
    assert ready.run_until("epoch=3/10", signal.SIGTERM).code == 143
    result = ready.run("--network_alpha=2", "--unet_lr=2e-3", "--seed=1")
    assert result.code == 2
    assert "network_alpha was 4.0 and is 2.0; unet_lr was 0.001 and is 0.002. Ask for the same" in result.err
    newest = ready.newest_state
    damaged = newest / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    result = ready.run()
    assert result.code == 0, result.out + result.err
    assert (
        f"WARNING: {newest} is broken and passed over: model.safetensors is not what was written"
        in result.err
    )
    assert ready.steps == list(range(1, STEPS + 1))
