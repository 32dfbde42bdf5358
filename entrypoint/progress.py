"""A trainer's steps, turned into metric lines; on a terminal, into a progress bar."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

from entrypoint.console import say
from kohya.metrics import Start, Step

NAN_STEPS = 10  # in a row, after which nothing good can come
SILENCE_SECONDS = 60.0  # after which a line says what is waited for; then after twice as long, and so on
SECONDS_BETWEEN_LINES = 1.0  # a fast trainer makes more steps than anyone reads, and CloudWatch bills lines

# What SageMaker reads in the metric lines (MetricDefinitions of CreateTrainingJob); the first group is the
# number. A loss that is not a number gives no point, for CloudWatch takes none (MetricDatum, "Value").
_SO_FAR = r"step=\d+/\d+ epoch=\d+/\d+ loss=\S+"  # of a metric line, and of no other
METRIC_DEFINITIONS: tuple[Mapping[str, str], ...] = (
    {"Name": "train:step", "Regex": r"step=(\d+)/\d+ epoch=\d+/\d+ loss="},
    {"Name": "train:epoch", "Regex": r"step=\d+/\d+ epoch=(\d+)/\d+ loss="},
    {"Name": "train:loss", "Regex": r"step=\d+/\d+ epoch=\d+/\d+ loss=(\d+\.\d+)"},
    {"Name": "train:avg_loss", "Regex": rf"{_SO_FAR} avg_loss=(\d+\.\d+)"},
    {"Name": "train:lr", "Regex": rf"{_SO_FAR} avg_loss=\S+ lr=(\d\.\de[-+]\d+)"},
    {"Name": "train:images_per_s", "Regex": rf"{_SO_FAR} avg_loss=\S+ lr=\S+ images_per_s=(\d+\.\d+)"},
    {"Name": "train:eta_s", "Regex": rf"{_SO_FAR} avg_loss=\S+ lr=\S+ images_per_s=\S+ eta_s=(\d+)"},
)


class Progress:
    """Takes the trainer's records as they come. One object a job; not thread-safe."""

    def __init__(self, *, terminal: bool | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._terminal = sys.stdout.isatty() if terminal is None else terminal
        self._clock = clock
        self._start: Start | None = None
        self._bar: tqdm[Any] | None = None
        self._first: tuple[float, int] | None = None  # when this run's first step was done, and its number
        self._told = -SECONDS_BETWEEN_LINES
        self._nan_steps = 0
        self.heard = clock()  # when the trainer was last heard of, on `clock`
        self._patience = SILENCE_SECONDS
        self.last_line = ""
        self._step: int | None = None

    @property
    def pid(self) -> int:
        """The process to send SIGTERM to; 0 until the trainer has told."""
        return self._start.pid if self._start else 0

    @property
    def alarm(self) -> str | None:
        """Why the training should be ended now, if it should."""
        if self._nan_steps < NAN_STEPS:
            return None
        return (
            f"The loss was not a number for {NAN_STEPS} steps in a row. Try a lower learning rate, "
            "mixed_precision=bf16, or no_half_vae=true where the VAE makes NaN in fp16."
        )

    def take(self, record: Start | Step) -> None:
        """Tell what a record says."""
        self._hear()
        self._step = record.step
        if isinstance(record, Start):
            self._start = record
            if self._terminal:
                self._bar = tqdm(total=record.steps, initial=record.step, unit="step", file=sys.stdout)
            return
        self._nan_steps = 0 if math.isfinite(record.loss) else self._nan_steps + 1
        if self._first is None:
            self._first = (self._clock(), record.step)
        if self._start is None:
            return
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{record.avg_loss:.4f}", refresh=False)
            self._bar.update(record.step - self._bar.n)
        elif self._clock() - self._told >= SECONDS_BETWEEN_LINES or record.step == self._start.steps:
            self._told = self._clock()
            say(self._line(self._start, record))

    def close(self) -> None:
        """End the progress bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def listen(self) -> None:
        """Where nothing was heard for long, say so, and what is waited for."""
        silent = self._clock() - self.heard
        if silent < self._patience:
            return
        self._patience *= 2
        awaited = f"step {self._step + 1}" if self._step is not None else "the first step"
        last = f"; its last line was: {self.last_line}" if self.last_line else ""
        self._print(f"train: nothing from the trainer for {silent:.0f} s, waiting for {awaited}{last}")

    def write(self, text: str) -> None:
        """Print a line that is no record, above the progress bar if there is one."""
        self._hear()
        self.last_line = text
        self._print(text)

    def redrawn(self, text: str) -> None:
        """Take note of a progress bar's line that is drawn over."""
        self._hear()
        self.last_line = text or self.last_line

    def _hear(self) -> None:
        self.heard, self._patience = self._clock(), SILENCE_SECONDS

    def _print(self, text: str) -> None:
        if self._bar is None:
            say(text)
        else:
            self._bar.clear()
            say(text)
            self._bar.refresh()

    def _line(self, start: Start, step: Step) -> str:
        rate = self._steps_per_second(step)
        fields = {
            "step": f"{step.step}/{start.steps}",
            "epoch": f"{step.epoch}/{start.epochs}",
            "loss": f"{step.loss:.4f}",
            "avg_loss": f"{step.avg_loss:.4f}",
            "lr": f"{step.lr.get('unet', next(iter(step.lr.values()), 0.0)):.1e}",
            "images_per_s": f"{rate * start.images_per_step:.2f}" if rate is not None else None,
            "eta_s": f"{(start.steps - step.step) / rate:.0f}" if rate is not None else None,
        }
        return " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)

    def _steps_per_second(self, step: Step) -> float | None:
        """The mean speed since the first step, which itself is slower than the others; None until then."""
        if self._first is None or step.step == self._first[1]:
            return None
        return (step.step - self._first[1]) / max(self._clock() - self._first[0], 1e-9)
