"""What is known of a job: from its log, and from what SageMaker tells."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import lora_jobs
from lora_jobs.aws import Aws
from lora_jobs.errors import LoraError
from lora_jobs.jobs import Log, Progress, Status, find, span

NOW = datetime.now(UTC)
TOLD: Mapping[str, Any] = {
    "TrainingJobName": "cat-01234567",
    "TrainingJobStatus": "InProgress",
    "SecondaryStatus": "Training",
    "CreationTime": NOW - timedelta(seconds=300),
    "TrainingStartTime": NOW - timedelta(seconds=100),
    "ResourceConfig": {"InstanceType": "ml.g5.xlarge"},
    "OutputDataConfig": {"S3OutputPath": "s3://bucket/loras/"},
    "EnableManagedSpotTraining": True,
}


def status(**changed: Any) -> Status:
    told: Any = {**TOLD, **changed}
    return Status.of(told)


class FakeLogs:
    """CloudWatch Logs, as GetLogEvents is documented: at the end the token stays the same."""

    def __init__(self, streams: dict[str, list[str]], page: int = 2) -> None:
        self.streams, self.page = streams, page
        self.asked = 0

    def get_paginator(self, _: str) -> "FakeLogs":
        return self

    def paginate(self, *, logStreamNamePrefix: str, **_: str) -> Sequence[Any]:
        names = sorted(name for name in self.streams if name.startswith(logStreamNamePrefix))
        return [{"logStreams": [{"logStreamName": name} for name in names]}]

    def get_log_events(self, *, logStreamName: str, nextToken: str = "0", **_: Any) -> Any:
        self.asked += 1
        start, lines = int(nextToken), self.streams[logStreamName]
        page = lines[start : start + self.page]
        return {
            "events": [{"timestamp": 0, "message": f"{line}\n"} for line in page],
            "nextForwardToken": str(start + len(page)),
        }


class FakeSageMaker:
    """ListTrainingJobs, newest first."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def get_paginator(self, _: str) -> "FakeSageMaker":
        return self

    def paginate(self, *, NameContains: str = "", **asked: Any) -> Sequence[Any]:
        assert (asked["SortBy"], asked["SortOrder"]) == ("CreationTime", "Descending")
        found = [{"TrainingJobName": name} for name in self.names if NameContains in name]
        return [{"TrainingJobSummaries": found[:1]}, {"TrainingJobSummaries": found[1:]}]


@pytest.mark.parametrize(
    ("lines", "stage"),
    [
        ([], None),
        (["WARNING: early"], None),
        (["check: sd15 base model"], "check"),
        (["check: x", "fetch: 4 pictures"], "fetch"),
        (["check: x", "fetch: x", "loading the base model"], "train"),
        (["check: x", "fetch: x", "WARNING: 2 pictures are grey", "  indented", ""], "fetch"),
        (["check: x", "epoch 1/2", "done in 16.8 s: a.safetensors in /opt/ml/model"], "publish"),
        (["check: x", "step=1/4 epoch=1/2", "publish: 1 file, 557.8 kB in 0.0 s"], "train"),
        (["check: x", "step=4/4 epoch=2/2", "publish: 1 file, 557.8 kB in 0.0 s"], "publish"),
    ],
)
def test_the_stage_is_told_by_the_log(lines: list[str], stage: str | None) -> None:
    progress = Progress()
    for line in lines:
        progress = progress.after(line)
    assert progress.stage == stage


def test_a_metric_line_tells_how_far_it_is() -> None:
    line = "step=12/64 epoch=1/2 loss=0.1234 avg_loss=0.1301 lr=1.0e-04 images_per_s=1.53 eta_s=34"
    assert asdict(Progress().after(line)) == {
        "stage": "train", "step": 12, "steps": 64, "epoch": 1, "epochs": 2, "loss": 0.1234,
        "avg_loss": 0.1301, "images_per_second": 1.53, "eta_seconds": 34,
    }  # fmt: skip
    first = Progress().after("step=1/64 epoch=1/2 loss=nan avg_loss=0.5000 lr=1.0e-04")
    assert (first.step, first.eta_seconds) == (1, None)
    assert Progress().after(line).after("saving cat.safetensors").step == 12


def test_until_sagemaker_bills_the_time_since_the_start_is_the_most() -> None:
    running = status(Environment={"LORA_PRICE_PER_HOUR": "36"})
    assert running.billable_seconds >= 100
    assert not running.billed
    assert running.cost == pytest.approx(running.billable_seconds / 100)
    ended = status(
        TrainingJobStatus="Completed", TrainingEndTime=NOW, BillableTimeInSeconds=30,
        Environment={"LORA_PRICE_PER_HOUR": "36"},
    )  # fmt: skip
    assert (ended.billable_seconds, ended.billed, ended.cost, ended.seconds) == (30, True, 0.3, 300)
    assert status().cost is None
    assert status(TrainingStartTime=None).billable_seconds == 0


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        (None, None),
        ("AlgorithmError: The disk is full., exit code: 1", "The disk is full."),
        ("AlgorithmError: , exit code: 137", "AlgorithmError: , exit code: 137"),
        ("ClientError: Data download failed", "ClientError: Data download failed"),
    ],
)
def test_the_cause_is_the_failure_files(reason: str | None, cause: str | None) -> None:
    assert status(FailureReason=reason).failure == cause


def test_nothing_is_left_of_a_job_that_is_over() -> None:
    progress = Progress("train", 12, 64, eta_seconds=34)
    told: Any = {**TOLD, "TrainingJobStatus": "Stopped"}
    assert Status.of(told, progress).progress.eta_seconds == 34  # Stopping still
    over = Status.of({**told, "TrainingEndTime": NOW}, progress).progress
    assert (over.step, over.eta_seconds) == (12, None)


def test_json_is_flat() -> None:
    told = status().as_json()
    assert told["job"] == "cat-01234567"
    assert told["output"] == "s3://bucket/loras/cat-01234567"
    assert "progress" not in told
    assert told["step"] is None
    assert told["created"].endswith("+00:00")


def test_the_log_is_read_on_from_where_it_was() -> None:
    streams = {"cat-1/algo-1-1": ["a", "b", "c"], "cat-12/algo-1-1": ["another job's"]}
    logs = FakeLogs(streams)
    aws: Any = type("Aws", (), {"logs": logs})()
    log = Log(aws, "cat-1")
    assert [line.text for line in log.read()] == ["a", "b", "c"]
    asked = logs.asked
    assert log.read() == []
    assert logs.asked == asked + 1  # not from the beginning
    streams["cat-1/algo-1-1"].append("d")
    streams["cat-1/algo-1-2"] = ["the next machine's"]
    assert [line.text for line in log.read()] == ["d", "the next machine's"]


def test_no_line_is_lost_when_aws_fails_meanwhile() -> None:
    logs = FakeLogs({"cat-1/algo-1-1": ["a", "b", "c"], "cat-1/algo-1-2": ["d"]})
    aws: Any = type("Aws", (), {"logs": logs})()
    log, answer = Log(aws, "cat-1"), logs.get_log_events

    def fail(*, logStreamName: str, **asked: Any) -> Any:
        if logStreamName.endswith("2"):
            raise ConnectionError
        return answer(logStreamName=logStreamName, **asked)

    logs.get_log_events = fail  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        log.read()
    logs.get_log_events = answer  # type: ignore[method-assign]
    assert [line.text for line in log.read()] == ["a", "b", "c", "d"]


def test_a_job_file_means_its_newest_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cat.toml"
    file.write_text(
        'name = "cat"\nbase_model = "s3://b/m.safetensors"\ndataset = "s3://b/d"\noutput = "s3://bucket/o"\n'
        '[sagemaker]\nimage = "i"\nrole = "arn:aws:iam::123456789012:role/r"\ninstance = "ml.g5.xlarge"\n'
        'region = "eu-west-1"\n'
    )
    names = ("wild-cat-01234567", "cat-food", "cat-0123456z", "cat-89abcdef-2", "cat-89abcdef")
    monkeypatch.setattr(Aws, "sagemaker", FakeSageMaker(*names))
    aws, job = find(str(file))
    assert (aws.region, job) == ("eu-west-1", "cat-89abcdef-2")
    assert find("cat-89abcdef", "eu-west-1")[1] == "cat-89abcdef"

    monkeypatch.setattr(Aws, "sagemaker", FakeSageMaker("wild-cat-01234567"))
    with pytest.raises(LoraError, match=r"no job was made from it in eu-west-1 yet. Type: lora submit"):
        find(str(file))


def test_others_jobs_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("cat-01234567", "xgboost-2026-11-22-12-00-00", "dog-01234567-2", "cat-1", "cow-01234567",
             "owl-01234567")  # fmt: skip
    aws: Any = type("Aws", (), {"sagemaker": FakeSageMaker(*names)})()
    monkeypatch.setattr(
        importlib.import_module("lora_jobs.jobs"),
        "described",
        lambda _, job: None if job == "cow-01234567" else {**TOLD, "TrainingJobName": job},
    )
    assert [one.job for one in lora_jobs.jobs(aws=aws)] == ["cat-01234567", "dog-01234567-2", "owl-01234567"]
    assert [one.job for one in lora_jobs.jobs(most=1, aws=aws)] == ["cat-01234567"]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "119 min"), (7500, "2 h 05 min")]
)
def test_a_length_of_time(seconds: int, said: str) -> None:
    assert span(seconds) == said
