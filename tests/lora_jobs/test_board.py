"""lora board: event logs, as they grow in S3."""

import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import boto3
import pytest

from entrypoint.storage import S3Uri
from lora_jobs import board
from lora_jobs.board import Run
from lora_jobs.errors import LoraError
from tests.lora_jobs.client import shown_steps
from tests.lora_jobs.test_jobs import TOLD
from tests.reports import write_log

JOB = "cat-01234567"


class Logged:
    """A job that keeps its event logs in a bucket."""

    region = "us-east-1"

    def __init__(self, bucket: S3Uri) -> None:
        self.bucket = bucket.bucket
        self.sagemaker, self.asked = self, list[str]()
        self.s3 = boto3.client("s3")
        self.s3.meta.events.register("before-call.s3.GetObject", self._note)

    def _note(self, params: Any, **_: Any) -> None:
        self.asked.append(params["headers"]["Range"])

    def describe_training_job(self, **_: str) -> dict[str, Any]:
        return {**TOLD, "TensorBoardOutputConfig": {"S3OutputPath": f"s3://{self.bucket}/loras/tensorboard"}}

    def log(self, content: bytes, name: str = "cat/events.out.tfevents.cat") -> None:
        key = f"loras/tensorboard/{JOB}/tensorboard-output/{name}"
        self.s3.put_object(Bucket=self.bucket, Key=key, Body=content)


@pytest.fixture
def logged(bucket: S3Uri) -> Logged:
    return Logged(bucket)


@pytest.fixture
def run(logged: Logged, tmp_path: Path) -> Run:
    aws: Any = logged
    return Run(aws, JOB, tmp_path)


def contents(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / JOB).iterdir())]


def test_what_was_added_is_added_to_the_same_file(logged: Logged, run: Run, tmp_path: Path) -> None:
    """Which TensorBoard holds open: a new one in its place it would not see."""
    run.look()
    assert contents(tmp_path) == []
    logged.log(b"a" * 5000)
    logged.log(b"not an event log", "notes.txt")
    run.look()
    (path,) = (tmp_path / JOB).iterdir()
    assert "tfevents" in path.name
    with path.open("rb") as held:
        assert held.read() == b"a" * 5000
        logged.log(b"a" * 5000 + b"b" * 10)
        run.look()
        assert held.read() == b"b" * 10
    run.look()  # nothing new: nothing is asked for
    assert logged.asked == ["bytes=0-", "bytes=3976-"]


@pytest.mark.parametrize("content", [b"a" * 3000, b"a" * 4500 + b"c" * 1000])
def test_a_log_that_was_cut_becomes_another_file(
    content: bytes, logged: Logged, run: Run, tmp_path: Path
) -> None:
    """That of a job that went on from a state: shorter, or with another end."""
    logged.log(b"a" * 5000)
    run.look()
    (before,) = (tmp_path / JOB).iterdir()
    logged.log(content)
    run.look()
    (after,) = (tmp_path / JOB).iterdir()
    assert after.name > before.name
    assert after.read_bytes() == content


def test_logs_of_one_job_are_one_run(logged: Logged, run: Run, tmp_path: Path) -> None:
    logged.log(b"one", "a/events.out.tfevents.1")
    logged.log(b"two", "b/events.out.tfevents.1")
    run.look()
    assert contents(tmp_path) == [b"one", b"two"]


def test_it_lasts_as_long_as_the_block(logged: Logged, tmp_path: Path) -> None:
    """And shows what is logged meanwhile."""
    aws: Any = logged
    with board(JOB, port=0, every=0.1, aws=aws) as address:
        logged.log(write_log(tmp_path / "log", 3).read_bytes())
        assert shown_steps(address, JOB, 3) == [1, 2, 3]
    with pytest.raises(OSError):
        urllib.request.urlopen(address, timeout=5)


@pytest.mark.parametrize("port", [70000, -1])
def test_a_port_that_is_none(logged: Logged, port: int) -> None:
    aws: Any = logged
    with (
        pytest.raises(LoraError, match=f"--port {port}: it cannot be listened on"),
        board(JOB, port=port, aws=aws),
    ):
        pass


def test_it_ends_at_once_where_the_network_is_gone(
    logged: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A look that fails is told, and one that hangs is not waited for."""
    aws: Any = logged
    looks, hung = iter(range(10)), threading.Event()

    def look(_: Run) -> None:
        number = next(looks)
        if number == 1:
            raise OSError(28, "No space left on device")
        if number == 2:
            hung.set()
            threading.Event().wait(60)

    monkeypatch.setattr(Run, "look", look)
    with board(JOB, port=0, every=0.01, aws=aws):
        assert hung.wait(60)
        begun = time.monotonic()
    assert time.monotonic() - begun < 30
    assert "could not be fetched, and is tried again: [Errno 28]" in capsys.readouterr().err


def test_a_tensorboard_that_ends_is_told(
    logged: Logged, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    aws: Any = logged
    with (
        pytest.raises(LoraError, match=r"TensorBoard did not start on port \d+. It said: nothing"),
        board(JOB, aws=aws),
    ):
        pass
    assert f"{JOB} has logged nothing yet" in capsys.readouterr().err


def test_a_job_without_a_place_for_them_is_told(tmp_path: Path) -> None:
    described = type("SageMaker", (), {"describe_training_job": lambda *_, **__: TOLD})()
    aws: Any = type("Aws", (), {"sagemaker": described, "s3": None})()
    with pytest.raises(LoraError, match="was made without a TensorBoardOutputConfig"):
        Run(aws, JOB, tmp_path)
