"""Follows a job until it ends. Ctrl-C leaves the job alone.

Ends with 0 for Completed, 1 for Failed, 143 for Stopped.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from entrypoint.console import fail, redact, say, warn
from lora_jobs.aws import Aws
from lora_jobs.jobs import EVERY, Line, Log, Progress, Status, add_job, billable, describe, find, span

if TYPE_CHECKING:
    from rich.console import RenderableType

_STEP_SECONDS = 30.0  # between two lines that tell of steps, without a terminal
_STEP_SHARE = 0.05  # of all steps, after which there is such a line sooner
_SHOWN = 8  # lines of the log in the live picture
_ENDS = {"Completed": 0, "Failed": 1, "Stopped": 143}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    parser.add_argument(
        "--every", type=float, default=EVERY, metavar="SECONDS", help="between two looks (%(default)g)"
    )
    parser.add_argument("--json", action="store_true", help="print an object a line, one a change")


def run(arguments: argparse.Namespace) -> int:
    aws, job = find(arguments.job, arguments.region)
    looks = follow(job, every=arguments.every, aws=aws)
    try:
        if arguments.json:
            status = _as_json(looks)
        elif sys.stdout.isatty():
            status = _picture(looks)
        else:
            status = _lines(looks)
    except KeyboardInterrupt:
        warn(f"The job goes on. To see it again, type: lora watch {arguments.job}")
        return 130
    if not arguments.json:
        say(_ended(status, arguments.job))
    if status.status == "Failed":
        fail(status.failure or "SageMaker does not say why it failed.")
    return _ENDS[status.status]


def watch(job: str, *, every: float = EVERY, aws: Aws | None = None) -> Iterator[Status]:
    """A job's status, whenever it has changed, until it ends. `every`: seconds between two looks.

    Raises LoraError where there is no such job, and boto3's errors.
    """
    before = None
    for status, _ in follow(job, every=every, aws=aws):
        now = _lasting(status)
        if now != before:
            before = now
            yield status


def follow(job: str, *, every: float = EVERY, aws: Aws | None = None) -> Iterator[tuple[Status, list[Line]]]:
    """The status and the new lines of the log at every look, until the job has ended.

    Where AWS cannot be reached later on, it is asked again for as long as anybody waits.
    """
    from botocore.exceptions import ConnectionError as Unconnected  # noqa: PLC0415 (lora --help needs none)
    from botocore.exceptions import HTTPClientError  # noqa: PLC0415

    aws = aws or Aws()
    log, progress, status, reached = Log(aws, job), Progress(), None, True
    while status is None or not status.over:
        try:
            told = describe(aws, job)  # before the log is read: what it said last is not missed
            lines = log.read()
        except (HTTPClientError, Unconnected) as error:
            if status is None:
                raise
            if reached:  # once an outage
                until = "and is asked again until Ctrl-C, which leaves the job alone"
                warn(f"AWS cannot be reached, {until}: {redact(str(error))}")
            reached = False
            time.sleep(every)
            continue
        if not reached:
            warn("AWS answers again.")
        reached = True
        for line in lines:
            progress = progress.after(line.text)
        status = Status.of(told, progress)
        yield status, lines
        if not status.over:
            time.sleep(every)


def _lasting(status: Status) -> Status:
    """Without what grows by itself."""
    return replace(status, seconds=0, billable_seconds=0, cost=None)


def _as_json(looks: Iterator[tuple[Status, list[Line]]]) -> Status:
    before = None
    for status, _ in looks:
        if (now := _lasting(status)) != before:
            before = now
            say(json.dumps(status.as_json(), ensure_ascii=False))
    return status


def _lines(looks: Iterator[tuple[Status, list[Line]]]) -> Status:
    """One plain line a change; steps now and then."""
    moment, said, step = "", 0.0, 0
    for status, _ in looks:
        progress, now = status.progress, time.monotonic()
        if status.moment != moment and not status.over:
            moment = status.moment
            say(f"{time.strftime('%H:%M:%S')} {status.job}: {moment}")
        if progress.step is None or progress.steps is None or progress.step == step:
            continue
        if now - said >= _STEP_SECONDS or progress.step - step >= _STEP_SHARE * progress.steps:
            said, step = now, progress.step
            say(f"{time.strftime('%H:%M:%S')} {status.job}: {_steps(progress)}, billable {billable(status)}")
    return status


def _picture(looks: Iterator[tuple[Status, list[Line]]]) -> Status:
    """One picture that is drawn anew at every look."""
    from rich.console import Console  # noqa: PLC0415 (only a terminal needs it)
    from rich.live import Live  # noqa: PLC0415

    last: list[str] = []
    with Live(console=Console(), auto_refresh=False, transient=True) as live:
        for status, lines in looks:
            last = [*last, *(line.text for line in lines)][-_SHOWN:]
            live.update(_drawn(status, last), refresh=True)
    return status


def _drawn(status: Status, last: list[str]) -> "RenderableType":
    from rich.console import Group  # noqa: PLC0415
    from rich.progress_bar import ProgressBar  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    progress = status.progress
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="ellipsis", no_wrap=True)
    facts.add_row("job", Text(status.job, style="bold"))
    facts.add_row("status", Text(status.moment, style="green" if status.secondary == "Training" else ""))
    facts.add_row("machine", f"{status.instance}{', spot' if status.spot else ''}, {span(status.seconds)}")
    if progress.step is not None and progress.steps:
        facts.add_row("", ProgressBar(total=progress.steps, completed=progress.step, width=40))
        facts.add_row("training", _steps(progress))
    facts.add_row("billable", billable(status))
    log = Text("\n".join(redact(line) for line in last), style="dim", no_wrap=True, overflow="ellipsis")
    return Group(facts, Text(), log, Text("Ctrl-C leaves the job alone.", style="dim"))


def _steps(progress: Progress) -> str:
    """How far the training is: "step 12/64, epoch 1/2, loss 0.1301, 34 s left"."""
    told = [f"step {progress.step}/{progress.steps}"]
    if progress.epoch is not None:
        told.append(f"epoch {progress.epoch}/{progress.epochs}")
    if progress.avg_loss is not None:
        told.append(f"loss {progress.avg_loss:.4f}")
    if progress.eta_seconds is not None:
        told.append(f"{span(progress.eta_seconds)} left")
    return ", ".join(told)


def _ended(status: Status, asked: str) -> str:
    """The last line but for a failure's cause: how it ended, and what to type."""
    told = f"{status.job}: {status.moment} after {span(status.seconds)}, billable {billable(status)}."
    return f"{told} Its LoRA and report: lora fetch {asked}" if status.status == "Completed" else (
        f"{told} What there is: lora fetch {asked}"
    )  # fmt: skip
