"""States that are saved unasked, so that a run that is broken off loses minutes: when, and which are kept."""

import os
import shutil
import time
from pathlib import Path

VARIABLE = "KOHYA_STATE_EVERY_MINUTES"


class Timer:
    """Says when the next state is due. Without KOHYA_STATE_EVERY_MINUTES, or at 0, none ever is."""

    def __init__(self) -> None:
        self._seconds = 60 * float(os.environ.get(VARIABLE, "0"))
        self._since = time.monotonic()
        self._last: Path | None = None

    @property
    def due(self) -> bool:
        return 0 < self._seconds <= time.monotonic() - self._since

    def restart(self) -> None:
        """The time begins anew."""
        self._since = time.monotonic()

    def saved(self, folder: Path) -> None:
        """A state is whole: the one before it is not needed any more, and the time begins anew."""
        if self._last is not None and self._last != folder:
            # without its name first: what is half removed must not look like a state
            shutil.rmtree(self._last.rename(self._last.with_name(f".{self._last.name}.partial")))
        self._last = folder
        self.restart()
