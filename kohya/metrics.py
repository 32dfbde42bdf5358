"""The pipe on which a trainer tells the job how it goes: one JSON object a line.

The job makes a named pipe and tells its path in KOHYA_METRICS: a name reaches a trainer that is started by
another program too. Without that variable nothing is written.

    {"event":"start","steps":64,"epochs":2,"images_per_step":4,"step":0,"pid":17}
    {"event":"step","step":1,"epoch":1,"loss":0.12,"avg_loss":0.13,"lr":{"unet":0.0001}}

`steps` and `step` count optimizer steps, `epoch` begins at 1, `loss` is the step's own and `avg_loss` the
mean over the last epoch. A `start` with a `step` above 0 is a run that goes on from a state. `pid` is the
process to send SIGTERM to. A loss that is not a number is null.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any

VARIABLE = "KOHYA_METRICS"


@dataclass(frozen=True)
class Start:
    """Training begins after `step` of `steps` optimizer steps."""

    steps: int
    epochs: int
    images_per_step: int
    step: int = 0
    pid: int = 0


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
    """Writes records to the pipe that KOHYA_METRICS names; does nothing without it.

    A pipe that is not there, or that nobody reads any more, ends the writing, never the training.
    """

    def __init__(self) -> None:
        self._pipe: int | None = None
        if path := os.environ.get(VARIABLE):
            try:
                self._pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)  # fails where there is no reader
                os.set_blocking(self._pipe, True)
            except OSError:
                self.close()

    def write(self, record: Record) -> None:
        if self._pipe is None:
            return
        event = {"event": type(record).__name__.lower()}
        values = {key: _finite(value) for key, value in asdict(record).items()}
        line = json.dumps({**event, **values}, separators=(",", ":")) + "\n"
        try:
            os.write(self._pipe, line.encode())  # one write below PIPE_BUF is never torn apart
        except OSError:  # Python ignores SIGPIPE, so a closed pipe arrives here
            self.close()

    def close(self) -> None:
        """Write no more."""
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None


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
