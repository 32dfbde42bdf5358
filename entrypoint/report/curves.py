"""The curves of a run, loss and learning rates: from its event log to SVG in the colours of a page's theme.

Tags: sd-scripts v0.10.1, train_network.py:76-126, and kohya/builtin/train.py, which has the same.
"""

import io
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

LOSS, RATE = "loss/current", "lr/"  # the step's own loss; rates follow under several names
POINTS = 600  # of one line: more are not seen
_SIZE = (4.8, 3.0)  # inches, of 96 pixels: near what it is shown at, and so is its text
_WEIGHT = 0.9  # of smoothing, at least
_GROUP = re.compile(r"\bgroup\d+$")

# matplotlib writes colours, and the page has two themes: these stand for what the page says.
_THEME = {
    "#010101": "currentColor",
    "#020202": "var(--line)",
    "#030303": "var(--faint)",
    "#040404": "var(--curve-1)",
    "#050505": "var(--curve-2)",
    "#060606": "var(--curve-3)",
}
_INK, _GRID, _RAW, *_LINES = _THEME
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": _GRID,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.solid_joinstyle": "round",
    "path.simplify": False,
    "svg.fonttype": "none",  # text stays text
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}

Numbers = npt.NDArray[np.float64]  # (points,)


@dataclass(frozen=True)
class Curve:
    """One value over the optimizer steps; NaN where it was not finite."""

    steps: Numbers
    values: Numbers


def read(event_log: Path) -> tuple[Curve | None, Mapping[str, Curve]]:
    """The loss of every step, and the learning rates by name. Raises ImportError without tensorboard."""
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # noqa: PLC0415
        EventAccumulator,
    )

    log = EventAccumulator(str(event_log), size_guidance={"scalars": 0})  # 0: keep all
    log.Reload()
    tags = log.Tags()["scalars"]
    rates: dict[str, Curve] = {}
    for tag, older in _rates(tags):
        found = _curve(log.Scalars(tag))
        if not (older and any(np.array_equal(found.values, other.values) for other in rates.values())):
            rates[tag.removeprefix(RATE)] = found
    return _curve(log.Scalars(LOSS)) if LOSS in tags else None, rates


def _rates(tags: Sequence[str]) -> list[tuple[str, bool]]:
    """The tags of learning rates, and whether each may be an older name of another; those come last.

    A rate is logged once more as group1 and so on, the first one as textencoder (train_network.py:114-120).
    Where an optimizer finds the rate itself, d*lr is what it trains at.
    """
    every = [tag for tag in tags if tag.startswith(RATE)]
    own = [tag for tag in every if "d*lr" in tag] or every
    groups = [tag for tag in own if _GROUP.search(tag)]
    older = {*groups, *([] if groups else [f"{RATE}textencoder"])}
    return [(tag, tag in older) for tag in sorted(own, key=older.__contains__)]


def of_loss(loss: Curve) -> str:
    """The loss of each step, and smoothed, as one SVG element."""
    weight = max(_WEIGHT, 1 - 50 / max(1, len(loss.values)))
    smooth = Curve(loss.steps, np.array(smoothed(loss.values.tolist(), weight)))
    lines = {"each step": (loss, _RAW, 1.0), "smoothed": (smooth, _LINES[0], 2.0)}
    return _drawn("loss", lines, "loss")


def of_rates(rates: Mapping[str, Curve]) -> str:
    """The learning rates as one SVG element."""
    shown = list(rates.items())[: len(_LINES)]
    lines = {name: (rate, colour, 2.0) for (name, rate), colour in zip(shown, _LINES, strict=False)}
    left = f" ({len(shown)} of {len(rates)})" if len(rates) > len(shown) else ""
    return _drawn("rate", lines, f"learning rate{left}")


def smoothed(values: Sequence[float], weight: float = _WEIGHT) -> list[float]:
    """The exponential moving average that TensorBoard draws: without the pull of a start at 0.

    What is not finite stays as it is, and counts for nothing.
    """
    average, count, result = 0.0, 0, []
    for value in values:
        if not math.isfinite(value):
            result.append(value)
            continue
        count += 1
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**count))
    return result


def thinned(curve: Curve, most: int = POINTS) -> Curve:
    """At most about `most` points: the least and the greatest of each stretch, so that no peak is lost."""
    count = len(curve.values)
    if count <= most:
        return curve
    low, high = np.nan_to_num(curve.values, nan=np.inf), np.nan_to_num(curve.values, nan=-np.inf)
    kept = {0, count - 1}
    for stretch in np.array_split(np.arange(count), most // 2):
        kept |= {int(stretch[low[stretch].argmin()]), int(stretch[high[stretch].argmax()])}
    order = sorted(kept)
    return Curve(curve.steps[order], curve.values[order])


def _curve(events: Sequence[Any]) -> Curve:
    values = np.array([event.value for event in events], np.float64)
    values[~np.isfinite(values)] = np.nan
    return Curve(np.array([event.step for event in events], np.float64), values)


def _drawn(name: str, lines: Mapping[str, tuple[Curve, str, float]], what: str) -> str:
    """Each line with its colour and width in points. Raises ImportError without matplotlib."""
    import matplotlib as mpl  # noqa: PLC0415 — it takes a second, and a job that is unfit has no curve
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import FuncFormatter, MaxNLocator  # noqa: PLC0415

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells where it keeps its list of fonts
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        for label, (curve, colour, width) in lines.items():
            few = thinned(curve)
            mark = "o" if len(few.values) == 1 else ""  # one point is no line
            (line,) = axes.plot(few.steps, few.values, color=colour, linewidth=width, marker=mark)
            line.set_label(label)
            line.set_gid(label.replace(" ", "-"))
        axes.set_xlabel("step")
        axes.set_ylabel(what)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        figure.legend(loc="outside upper right", ncols=len(lines), labelcolor=_INK)
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return _themed(out.getvalue(), name, f"The {what} of each step")


def _themed(svg: str, name: str, told: str) -> str:
    """matplotlib's file as an element of a page: in its colours, font and width, with ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', f' role="img" aria-label="{told}"', svg, count=1)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    for colour, said in _THEME.items():
        svg = svg.replace(colour, said)
    return re.sub(r"\s*\n\s*", "\n", svg)
