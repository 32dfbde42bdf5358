"""SIGTERM and Ctrl-C: raised as Stopped, or held back where that would leave a process behind."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from entrypoint.failures import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def raise_them() -> None:
    """From now on the first stop raises Stopped, wherever the job is; more of them change nothing."""
    for number in SIGNALS:
        signal.signal(number, _stop)


def ignore_them() -> None:
    """From now on a stop changes nothing."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def held_back() -> Iterator[threading.Event]:
    """Hold a stop back until the end of the block, where it is raised; the event says that it has come.

    An exception out of a signal handler can come between a process's start and the line that takes note of
    it, or inside a lock of the standard library's.
    """
    come = threading.Event()
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        come.set()

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield come
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _stop(number: int, frame: FrameType | None) -> None:
    ignore_them()
    raise Stopped(f"The job was stopped ({signal.Signals(number).name}).")
