import subprocess
import sys

import pytest

from benchmarks import checks


def test_a_server_that_ends_before_it_answers_is_not_waited_for() -> None:
    program = "from benchmarks import checks\nwith checks.bucket(None): pass"  # None cannot be counted to
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.returncode == 1
    told = "the benchmark's S3 server ended before it answered, with code 1; see what it says above"
    assert ended.stderr.splitlines()[-1] == told
    assert "TypeError" in ended.stderr


def test_what_cannot_be_compared_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        checks.main([f"--pictures={checks.PAGE}"])
    assert "--pictures=1000: the memory is compared with that of 1000" in capsys.readouterr().err
