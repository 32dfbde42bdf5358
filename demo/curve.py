"""The loss curve of a job, from its event log to a PNG."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no display is asked for
from matplotlib import pyplot as plt

from entrypoint.report.curves import LOSS, Curve, read, smoothed

_SMOOTHING = 0.9


def draw(event_logs: Path, picture: Path, title: str) -> int:
    """Draw the loss of every step below `event_logs`, raw and smoothed, to `picture`.

    Returns the number of steps. Raises LookupError where no event log holds a loss.
    """
    loss = _read(event_logs)
    smooth = smoothed(loss.values.tolist(), _SMOOTHING)
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes.plot(loss.steps, loss.values, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
    axes.plot(loss.steps, smooth, color="tab:blue", linewidth=2, label=f"smoothed ({_SMOOTHING})")
    axes.set(title=title, xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture)
    plt.close(figure)
    return len(loss.steps)


def _read(event_logs: Path) -> Curve:
    for folder in sorted({file.parent for file in event_logs.rglob("events.out.tfevents.*")}):
        loss, _ = read(folder)
        if loss is not None:
            return loss
    raise LookupError(f"no event log below {event_logs} holds {LOSS}")
