"""lora watch: what is said, and when."""

import importlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError

from lora_jobs import watch as follow_it
from lora_jobs.__main__ import main
from lora_jobs.jobs import Progress, Status
from tests.lora_jobs.test_jobs import NOW, TOLD, FakeLogs, status

watch = importlib.import_module("lora_jobs.watch")  # the package's own watch is the function

METRIC = "step={}/200 epoch=1/2 loss=0.5000 avg_loss=0.4000 lr=1.0e-04 images_per_s=1.53 eta_s=90"
OVER = {"TrainingEndTime": NOW, "BillableTimeInSeconds": 30}


class FakeAws:
    """A job that is told anew at each look, and its log. An exception is raised."""

    region = "us-east-1"

    def __init__(self, *looks: dict[str, Any] | Exception, lines: list[list[str]] | None = None) -> None:
        self._looks = iter(looks)
        self._lines = iter(lines or [])
        self._said: list[str] = []
        self.sagemaker = self
        self.logs = FakeLogs({"cat-01234567/algo-1": self._said}, page=100)

    def describe_training_job(self, **_: str) -> dict[str, Any]:
        look = next(self._looks)
        if isinstance(look, Exception):
            raise look
        self._said += next(self._lines, [])
        return {**TOLD, **look}


@pytest.fixture
def type_watch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Types `lora watch` for such a job; returns the exit code."""

    def type_it(aws: FakeAws, *flags: str) -> int:
        monkeypatch.setattr(watch, "find", lambda *_: (aws, "cat-01234567"))
        return main(["watch", "cat-01234567", "--every", "0", *flags])

    return type_it


@contextmanager
def clock(seconds: Iterable[float]) -> Iterator[None]:
    """Let `lora watch` look at a clock that shows these seconds, one after the other."""
    shown = iter(seconds)
    fake = type("Time", (), {"monotonic": lambda: next(shown), "sleep": lambda _: None,
                             "strftime": lambda _: "12:00:00"})  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "time", fake)
        yield


def test_a_line_for_each_change_and_no_other(type_watch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    starting = {"SecondaryStatus": "Starting", "TrainingStartTime": None}
    aws = FakeAws(
        starting, starting, {}, {}, {"SecondaryStatus": "Interrupted"},
        {"TrainingJobStatus": "Completed", "SecondaryStatus": "Completed", **OVER},
        lines=[[], [], ["check: fit"]],
    )  # fmt: skip
    assert type_watch(aws) == 0
    out, err = capsys.readouterr()
    assert [line.partition(" ")[2] for line in out.splitlines()[:-1]] == [
        "cat-01234567: Starting", "cat-01234567: Training: check", "cat-01234567: Interrupted",
    ]  # fmt: skip
    assert out.splitlines()[-1] == (
        "cat-01234567: Completed after 5 min, billable 30 s. Its LoRA and report: lora fetch cat-01234567"
    )
    assert err == ""


def test_steps_are_told_at_each_twentieth(type_watch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [1, 9, 10, 11, 19, 20, 21]
    end = {"TrainingJobStatus": "Stopped", "SecondaryStatus": "Stopped", **OVER}
    aws = FakeAws(*({} for _ in steps), end, lines=[[METRIC.format(step)] for step in steps])
    with clock(0.1 * number for number in range(100)):  # less than 30 s in all
        assert type_watch(aws) == 143
    told = [line for line in capsys.readouterr().out.splitlines() if " step " in line]
    assert [line.split(" step ")[1].partition("/")[0] for line in told] == ["10", "20"]
    said = "12:00:00 cat-01234567: step 10/200, epoch 1/2, loss 0.4000, 90 s left, billable up to "
    assert told[0].startswith(said)
    assert told[0].endswith(" s")


def test_a_slow_job_is_told_every_half_minute(type_watch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    end = {"TrainingJobStatus": "Stopped", "SecondaryStatus": "Stopped", **OVER}
    aws = FakeAws({}, {}, {}, {}, end, lines=[[METRIC.format(step)] for step in (1, 2, 3, 4)])
    with clock([31, 45, 62, 75, 80]):
        assert type_watch(aws) == 143
    told = [line for line in capsys.readouterr().out.splitlines() if " step " in line]
    assert [line.split(" step ")[1].partition("/")[0] for line in told] == ["1", "3"]


def test_a_failure_is_the_last_line(type_watch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    reason = "AlgorithmError: dataset/1.png: it is cut off. Replace it, exit code: 2"
    failed = {"TrainingJobStatus": "Failed", "SecondaryStatus": "Failed", "FailureReason": reason, **OVER}
    assert type_watch(FakeAws(failed)) == 1
    out, err = capsys.readouterr()
    assert err == "ERROR: dataset/1.png: it is cut off. Replace it\n"
    assert out.splitlines()[-1].startswith("cat-01234567: Failed after ")


@pytest.mark.parametrize("what", ["Runtime", "WaitTime"])
def test_too_long_a_run_is_told(what: str, type_watch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    over = {"TrainingJobStatus": "Stopped", "SecondaryStatus": f"Max{what}Exceeded", **OVER}
    assert type_watch(FakeAws(over)) == 143
    key = {"Runtime": "max_runtime_hours", "WaitTime": "max_wait_hours"}[what]
    assert f"Stopped: {key} are over" in capsys.readouterr().out


def test_as_json_there_is_an_object_a_change(type_watch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    end = {"TrainingJobStatus": "Completed", "SecondaryStatus": "Completed", **OVER}
    aws = FakeAws({}, {}, {}, end, lines=[["check: fit"], [], [METRIC.format(1)]])
    assert type_watch(aws, "--json") == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["status"], one["stage"], one["step"]) for one in told] == [
        ("InProgress", "check", None), ("InProgress", "train", 1), ("Completed", "train", 1),
    ]  # fmt: skip


def test_an_outage_is_waited_for(type_watch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """But not at the first look: then something is set wrongly."""
    outage = EndpointConnectionError(endpoint_url="https://api.sagemaker")
    end = {"TrainingJobStatus": "Completed", "SecondaryStatus": "Completed", **OVER}
    assert type_watch(FakeAws({}, outage, outage, {}, outage, end)) == 0
    told = capsys.readouterr().err.splitlines()
    assert ["cannot be reached" in line for line in told] == [True, False, True, False]  # once an outage
    assert "is asked again until Ctrl-C, which leaves the job alone" in told[0]
    assert told[1] == "WARNING: AWS answers again."
    assert type_watch(FakeAws(outage)) == 1


def test_ctrl_c_leaves_the_job_alone(
    type_watch: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupted)
    assert type_watch(FakeAws({}, {})) == 130
    assert "The job goes on. To see it again, type: lora watch cat-01234567" in capsys.readouterr().err


def test_in_python_it_is_an_iterator_of_changes() -> None:
    end = {"TrainingJobStatus": "Completed", "SecondaryStatus": "Completed", **OVER}
    aws: Any = FakeAws({}, {}, end)
    found: Iterator[Status] = follow_it("cat-01234567", every=0, aws=aws)
    assert [one.status for one in found] == ["InProgress", "Completed"]


@pytest.mark.parametrize("columns", [80, 40])
def test_the_picture_fits(columns: int) -> None:
    from rich.console import Console  # noqa: PLC0415

    name = f"{'a-very-long-name-' * 3}-01234567"
    drawn = watch._drawn(
        replace(status(), job=name, progress=Progress("train", 12, 64, 1, 2, 0.1, 0.2, 1.5, 90)),
        ["step=12/64 " * 20, "[bold]no markup[/bold]"],
    )
    console = Console(width=columns, record=True, file=None, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(drawn)
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= columns
    assert any("step 12/64" in line for line in lines)
    assert sum("step=12/64" in line for line in lines) == 1  # cut off, not folded
    assert any("[bold]no markup[/bold]"[:columns] in line for line in lines)
    assert len(lines) < 24
