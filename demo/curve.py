"""The loss curve of a job, from its event log to a PNG."""

from pathlib import Path

import matplotlib as mpl
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

mpl.use("Agg")  # no display is asked for
from matplotlib import pyplot as plt

from entrypoint.report.curves import smoothed

TAG = "loss/current"  # the step's own loss; sd-scripts v0.10.1 also writes loss/average
_SMOOTHING = 0.9


def draw(event_logs: Path, picture: Path, title: str) -> int:
    """Draw the loss of every step below `event_logs`, raw and smoothed, to `picture`.

    Returns the number of steps. Raises LookupError where no event log holds a loss.
    """
    steps, losses = _read(event_logs)
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
    axes.plot(
        steps, smoothed(losses, _SMOOTHING), color="tab:blue", linewidth=2, label=f"smoothed ({_SMOOTHING})"
    )
    axes.set(title=title, xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture)
    plt.close(figure)
    return len(steps)


def _read(event_logs: Path) -> tuple[list[int], list[float]]:
    for folder in sorted({file.parent for file in event_logs.rglob("events.out.tfevents.*")}):
        log = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: keep all
        log.Reload()
        if TAG in log.Tags()["scalars"]:
            events = log.Scalars(TAG)
            return [event.step for event in events], [event.value for event in events]
    raise LookupError(f"no event log below {event_logs} holds {TAG}")
