"""lora list, logs and stop: what is said, and what is asked of AWS."""

import importlib
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

import lora_jobs
from lora_jobs.__main__ import main
from lora_jobs.errors import LoraError
from lora_jobs.jobs import Line
from tests.lora_jobs.test_jobs import NOW, status
from tests.lora_jobs.test_watch import FakeAws

listing, logs, stop = (importlib.import_module(f"lora_jobs.{name}") for name in ("listing", "logs", "stop"))
JOB = "cat-01234567"
OVER = {"TrainingJobStatus": "Completed", "SecondaryStatus": "Completed", "TrainingEndTime": NOW}


class Stoppable(FakeAws):
    """A job that may be stopped; `ends` before it could be."""

    def __init__(self, *looks: dict[str, Any], ends: bool = False) -> None:
        super().__init__(*looks)
        self.ends, self.stopped = ends, list[str]()

    def stop_training_job(self, TrainingJobName: str) -> None:
        self.stopped.append(TrainingJobName)
        if self.ends:
            told = "The request was rejected because the training job is in status Completed."
            raise ClientError({"Error": {"Code": "ValidationException", "Message": told}}, "StopTrainingJob")


def test_jobs_are_listed_in_a_table(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    price = {"Environment": {"LORA_PRICE_PER_HOUR": "3600"}}
    found = [
        status(TrainingJobName="a-very-long-name-for-a-cat-01234567-2", TrainingStartTime=None),
        status(**OVER, BillableTimeInSeconds=30, **price),
    ]
    monkeypatch.setattr(listing, "jobs", lambda most, aws: found[:most])
    assert main(["list"]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["job", "status", "time", "billable"]
    assert first.split()[:2] == ["a-very-long-name-for-a-cat-01234567-2", "InProgress"]
    assert second.split() == [JOB, "Completed", "5", "min", "30", "s,", "cost", "30.00"]
    assert head.index("status") == first.index("InProgress") == second.index("Completed")
    assert max(map(len, (head, first, second))) <= 80
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    found[0] = status(TrainingJobName=f"{'a' * 40}-01234567-2", **price)
    for columns, lines in ((200, 3), (80, 6)):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(["list"]) == 0
        told = capsys.readouterr().out.splitlines()
        assert len(told) == lines
        assert max(map(len, told)) <= columns
        assert any(f"{'a' * 40}-01234567-2" in line for line in told)
    assert main(["list", "--json", "--last", "1"]) == 0
    assert [one["job"] for one in json.loads(capsys.readouterr().out)] == [found[0].job]
    monkeypatch.setattr(listing, "jobs", lambda most, aws: [])
    assert main(["list"]) == 0
    assert "There are no jobs yet" in capsys.readouterr().out


def test_the_log_is_followed_to_its_end(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Also what was said between the last look at the job and its end."""
    aws: Any = FakeAws({}, {}, OVER, lines=[["one"], [], ["two"]])
    assert [line.text for line in lora_jobs.logs(JOB, follow=True, every=0, aws=aws)] == ["one", "two"]
    outage = EndpointConnectionError(endpoint_url="https://api.sagemaker")
    aws = FakeAws({}, outage, OVER, lines=[["one"], ["two"]])
    assert [line.text for line in lora_jobs.logs(JOB, follow=True, every=0, aws=aws)] == ["one", "two"]
    assert "AWS cannot be reached, and is asked again" in capsys.readouterr().err
    aws = FakeAws({}, lines=[["one"]])
    assert [line.text for line in lora_jobs.logs(JOB, aws=aws)] == ["one"]

    at = datetime(2026, 11, 22, tzinfo=UTC)
    monkeypatch.setattr(logs, "find", lambda *_: (aws, JOB))
    monkeypatch.setattr(logs, "logs", lambda *_, **__: iter([Line(at, "größer")]))
    assert main(["logs", JOB, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"time": "2026-11-22T00:00:00.000+00:00", "line": "größer"}


def test_a_job_that_has_said_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(logs, "find", lambda *_: (FakeAws({}), JOB))
    assert main(["logs", JOB]) == 0
    out, err = capsys.readouterr()
    assert (out, err[:9]) == ("", "WARNING: ")
    assert "has said nothing yet" in err


def test_a_job_is_stopped_once(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    stopping = {"TrainingJobStatus": "Stopping", "SecondaryStatus": "Stopping"}
    aws = Stoppable({}, stopping, stopping)
    monkeypatch.setattr(stop, "find", lambda *_: (aws, JOB))
    assert main(["stop", "cat.toml"]) == 0
    assert aws.stopped == [JOB]
    out = capsys.readouterr().out
    assert "saves a state and publishes its LoRAs" in out
    assert "lora submit cat.toml" in out
    assert main(["stop", JOB, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "Stopping"
    assert aws.stopped == [JOB]


def test_a_job_that_has_ended_is_not_stopped(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    aws = Stoppable(OVER)
    monkeypatch.setattr(stop, "find", lambda *_: (aws, JOB))
    assert main(["stop", JOB]) == 0
    assert aws.stopped == []
    assert f"{JOB} has ended already: Completed." in capsys.readouterr().out


def test_a_job_that_ends_while_it_is_stopped(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    aws = Stoppable({}, OVER, ends=True)
    monkeypatch.setattr(stop, "find", lambda *_: (aws, JOB))
    assert main(["stop", JOB]) == 0
    assert aws.stopped == [JOB]
    assert f"{JOB} has ended already: Completed." in capsys.readouterr().out
    with pytest.raises(ClientError):  # of another kind
        lora_jobs.stop(JOB, aws=Stoppable({}, {}, ends=True))  # type: ignore[arg-type]


def test_there_is_no_such_job() -> None:
    class Nothing:
        region = "eu-west-1"

        @property
        def sagemaker(self) -> Any:
            return self

        def describe_training_job(self, **_: str) -> None:
            told = {"Code": "ValidationException", "Message": "Requested resource not found."}
            raise ClientError({"Error": told}, "DescribeTrainingJob")

    nothing: Any = Nothing()
    with pytest.raises(LoraError, match=rf"{JOB}: there is no such job in eu-west-1. Type lora list"):
        lora_jobs.stop(JOB, aws=nothing)
