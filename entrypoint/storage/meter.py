"""How far a transfer is: in lines, and on a terminal in one that is drawn anew."""

import sys
import threading
import time
from collections.abc import Collection

from entrypoint import console
from entrypoint.storage.objects import Fetched

_PROGRESS_SECONDS = 10.0
_DRAWN_SECONDS = 0.25
_CLEAR = "\r\x1b[K"


class Meter:
    """How far a transfer is: a line every ten seconds, and one at its end. A terminal's is drawn anew."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total  # bytes
        self._done = 0
        self._lock = threading.Lock()
        # In another thread something else may be drawn, such as the trainer's steps.
        self._draws = sys.stdout.isatty() and threading.current_thread() is threading.main_thread()
        self._drawn = False
        self._began = self._said = time.monotonic()

    def add(self, count: int) -> None:
        """`count` more bytes; fewer, when something is begun again."""
        with self._lock:
            self._done += count

    def expect(self, count: int) -> None:
        """`count` more bytes are to come than was thought."""
        with self._lock:
            self._total += count

    def tick(self) -> None:
        """Say how far it is, if it is time. Called at least once a second."""
        now = time.monotonic()
        if now - self._said < (_DRAWN_SECONDS if self._draws else _PROGRESS_SECONDS - 1):
            return
        self._said = now
        rate = self._done / (now - self._began)
        left = f"{_duration((self._total - self._done) / rate)} left" if rate > 0 else "waiting for S3"
        done, total = _bytes(self._done, self._total), _bytes(self._total, self._total)
        told = f"{self._what}: {done.split()[0]}/{total}, {rate / 1e6:.0f} MB/s, {left}"
        if self._draws:
            print(f"{_CLEAR}{told}", end="", flush=True)
            self._drawn = True
        else:
            console.say(told)

    def close(self) -> None:
        """Take away what was drawn: other lines come."""
        if self._drawn:
            print(_CLEAR, end="", flush=True)
            self._drawn = False

    def summary(self, count: int, more: str = "") -> str:
        """The line at its end."""
        seconds = time.monotonic() - self._began
        rate = f", {self._done / 1e6 / max(seconds, 1e-3):.0f} MB/s" if self._done >= 1e6 else ""
        files = "1 file" if count == 1 else f"{count:,} files"
        return f"{self._what}: {files}, {_bytes(self._done, self._done)} in {_duration(seconds)}{rate}{more}"


def _bytes(count: int, scale: int) -> str:
    """A number of bytes, in the unit that suits a number of the size of `scale`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if scale >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    return f"{seconds / 60:.0f} min"


def how_verified(fetched: Collection[Fetched]) -> str:
    """How files were verified, and how many were there already: "; 2,000 by md5, 12 already here"."""
    ways = sorted({item.verified for item in fetched})
    told = [f"{sum(item.verified == way for item in fetched):,} verified by {way}" for way in ways]
    reused = sum(item.reused for item in fetched)
    return "".join(f"; {text}" for text in [*told, *([f"{reused:,} already here"] if reused else [])])
