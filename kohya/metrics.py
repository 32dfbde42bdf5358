"""The pipe on which a trainer tells the job how it goes: one JSON object a line.

The job opens a pipe, hands its write end to the trainer, and names it in KOHYA_METRICS_FD. Without that
variable nothing is written.

    {"event":"start","steps":64,"epochs":2,"images_per_step":4,"step":0}
    {"event":"step","step":1,"epoch":1,"loss":0.12,"avg_loss":0.13,"lr":{"unet":0.0001}}

`steps` and `step` count optimizer steps, `epoch` begins at 1, `loss` is the step's own and `avg_loss` the
mean over the last epoch. A `start` with a `step` above 0 is a run that goes on from a state. A loss that is
not a number is null.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any

VARIABLE = "KOHYA_METRICS_FD"


@dataclass(frozen=True)
class Start:
    """Training begins after `step` of `steps` optimizer steps."""

    steps: int
    epochs: int
    images_per_step: int
    step: int = 0


@dataclass(frozen=True)
class Step:
    """Optimizer step `step` is done. `loss` and `avg_loss` are NaN where they were not finite."""

    step: int
    epoch: int
    loss: float
    avg_loss: float
    lr: Mapping[str, float]


Record = Start | Step


class Writer:
    """Writes records to the pipe that KOHYA_METRICS_FD names; does nothing without it.

    A reader that has gone away, or a number that names no open file, ends the writing, never the training.
    """

    def __init__(self) -> None:
        name = os.environ.get(VARIABLE, "")
        self._descriptor = int(name) if name.isdecimal() else None

    def write(self, record: Record) -> None:
        if self._descriptor is None:
            return
        event = {"event": type(record).__name__.lower()}
        values = {key: _finite(value) for key, value in asdict(record).items()}
        line = json.dumps({**event, **values}, separators=(",", ":")) + "\n"
        try:
            os.write(self._descriptor, line.encode())  # one write below PIPE_BUF is never torn apart
        except OSError:  # Python ignores SIGPIPE, so a closed pipe arrives here
            self._descriptor = None


def read(stream: IO[str]) -> Iterator[Record]:
    """Every record of a pipe's read end, as it comes, until all writers have closed it."""
    for line in stream:
        if record := parse(line):
            yield record


def parse(line: str) -> Record | None:
    """The record of one line; None where it is none, as after a trainer was killed in the middle of it."""
    try:
        values: dict[str, Any] = json.loads(line)
        event = values.pop("event")
        if event == "start":
            return Start(**values)
        if event == "step":
            losses = {key: math.nan if values[key] is None else values[key] for key in ("loss", "avg_loss")}
            return Step(**{**values, **losses})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
