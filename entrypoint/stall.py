"""A trainer that hangs: it prints nothing, and uses neither the CPU nor the GPU."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import psutil

from entrypoint import gpu

SAMPLES = 30  # in the time after which a silence counts as a hang
IDLE = 0.02  # of one core, which threads that only wait use together


class Stall:
    """Whether a trainer hangs. Never where `seconds` is 0."""

    def __init__(
        self,
        seconds: float,
        processes: Callable[[], Sequence[psutil.Process]],
        *,
        gpu_works: Callable[[], bool] = gpu.works,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`processes`: those of the trainer."""
        self._seconds = seconds or math.inf
        self._processes, self._gpu_works, self._clock = processes, gpu_works, clock
        self._active = self._sampled = clock()
        self._used = 0.0

    def hangs(self, heard: float) -> bool:
        """Whether it has hung for as long as it may. `heard`: when it last printed, on the same clock."""
        now = self._clock()
        passed = now - self._sampled
        if passed < self._seconds / SAMPLES:
            return False
        used = sum(map(_cpu_seconds, self._processes()))
        # less than before: a process ended, and that is life too
        if abs(used - self._used) > IDLE * passed or heard > self._sampled or self._gpu_works():
            self._active = now
        self._sampled, self._used = now, used
        return now - self._active >= self._seconds

    def cause(self, last_line: str) -> str:
        """What is said of the end of a trainer that hung."""
        last = f" Its last line was: {last_line}." if last_line else ""
        return (
            f"The trainer hung: for {self._seconds / 60:g} minutes it printed nothing and used neither CPU "
            f"nor GPU.{last} Start the job again: it goes on from its newest state. (stall_minutes=0 never "
            "ends a trainer that hangs.)"
        )


def _cpu_seconds(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0
