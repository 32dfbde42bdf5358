"""How far a long work on pictures is, and how fast: a line every few seconds."""

import time

from entrypoint.console import say

_SECONDS = 5  # between two lines


class Rate:
    """Counts pictures. `doing` begins each line: "prepare: resizing"."""

    def __init__(self, doing: str, total: int) -> None:
        self._doing, self._total, self._done = doing, total, 0
        self._begun = self._told = time.monotonic()

    def add(self, pictures: int) -> None:
        """Count pictures that are done, and say so when it is time."""
        self._done += pictures
        now = time.monotonic()
        if now - self._told >= _SECONDS and self._done < self._total:
            self._told = now
            left = (self._total - self._done) * (now - self._begun) / self._done
            say(f"{self._doing}: {self._done} of {self._total} pictures, {self}, eta_s={left:.0f}")

    def __str__(self) -> str:
        """The rate until now: "3.41 pictures/s"."""
        return f"{self._done / max(time.monotonic() - self._begun, 1e-3):.2f} pictures/s"
