"""SIGTERM and Ctrl-C: raised as Stopped, or held back; and the time that is left after one.

SageMaker kills 120 s after SIGTERM. Of these the job takes SECONDS: the trainer at most TRAINER of them to
save a state, publishing what is left. A second signal hurries: the trainer gets no more time, publishing
HURRIED.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from entrypoint.failures import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SECONDS = 100.0
TRAINER = 60.0
HURRIED = 10.0

_came: list[float] = []  # when each signal came, on the monotonic clock


def raise_them() -> None:
    """From now on the first stop raises Stopped, wherever the job is; more of them hurry."""
    _came.clear()
    for number in SIGNALS:
        signal.signal(number, _stop)


def note_them() -> None:
    """From now on a stop is not raised: it only begins to count the seconds, and the next one hurries."""
    for number in SIGNALS:
        signal.signal(number, _note)


@contextmanager
def held_back() -> Iterator[threading.Event]:
    """Hold a stop back until the end of the block, where it is raised; the event says that it has come.

    An exception out of a signal handler can come between a process's start and the line that takes note of
    it, or inside a lock of the standard library's.
    """
    come = threading.Event()
    raised: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        _note(number, frame)
        raised.append(number)
        come.set()

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield come
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if raised:
            note_them()
            raise Stopped(_sentence(raised[0]))


def since() -> float | None:
    """When the first stop came, on the monotonic clock; None while there was none."""
    return _came[0] if _came else None


def hurried() -> bool:
    """Whether a second stop came."""
    return len(_came) > 1


def seconds_left() -> float:
    """How long the job may still go on; infinity while nothing stops it."""
    if not _came:
        return math.inf
    ends = [_came[0] + SECONDS, *(came + HURRIED for came in _came[1:2])]
    return max(0.0, min(ends) - time.monotonic())


def _note(number: int, frame: FrameType | None) -> None:
    _came.append(time.monotonic())


def _stop(number: int, frame: FrameType | None) -> None:
    note_them()
    _note(number, frame)
    raise Stopped(_sentence(number))


def _sentence(number: int) -> str:
    return f"The job was stopped ({signal.Signals(number).name})."
