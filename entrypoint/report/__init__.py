"""report.html: what happened in a job, as one file that a browser opens anywhere, whatever became of the job.

Nothing in it comes from elsewhere, no script runs in it, and it stays below 3 MB for any data set.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from entrypoint import console, contract, files, stops
from entrypoint.console import hidden, redact, warn
from entrypoint.failures import Problem, Stopped, Unfit
from entrypoint.outbox import Outbox, whole
from entrypoint.record import Job
from entrypoint.report import thumbnails
from entrypoint.report.thumbnails import Thumbnail
from kohya.config import Merged
from kohya.problem import counted

NAME = "report.html"
_ROWS = 100  # of any list of problems, warnings or notes
_LAST_LINES = 20  # of the trainer's, where it failed
_DRAWING_SECONDS = 20.0  # that must be left after a stop for curves and pictures
_WRITING_SECONDS = 3.0  # and for a report at all
_READ_BYTES = 250_000  # of an event log a second, on a busy machine

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Ending:
    """How a job ended."""

    exit_code: int
    cause: str
    problems: Sequence[Problem] = ()  # that the cause is made of, where it is made of some
    merged: Merged | None = None  # the configuration that they are of

    @classmethod
    def of(cls, exit_code: int, cause: str, error: BaseException | None) -> "Ending":
        """That of a job which `error` ended."""
        unfit = (error.problems, error.merged) if isinstance(error, Unfit) else ()
        return cls(exit_code, cause, *unfit)


@dataclass(frozen=True)
class Drawn:
    """What takes time, and is left out where there is none."""

    loss: str | None = None  # SVG
    rates: str | None = None
    last_step: int | None = None
    pictures: Sequence[Thumbnail] = ()
    samples: Mapping[str, Sequence[Thumbnail]] = field(default_factory=dict)  # by epoch or step
    more_samples: int = 0


def publish(job: Job, ending: Ending, event_log: Path | None, outbox: Outbox) -> None:
    """Write the report, the last of all, and send it where the results are asked for.

    Whatever goes wrong with it is a warning: no job ends otherwise because of it.
    """
    target = job.tree.data / NAME
    with suppress(OSError):
        target.unlink()  # an earlier job's in the same tree
    left = stops.seconds_left()
    if left < _WRITING_SECONDS:
        return
    try:
        with job.stage("report"):
            text = page(job, ending, draw(job, event_log) if left > _DRAWING_SECONDS else Drawn())
            with whole(target) as part:
                part.write_text(text, encoding="utf-8", errors="backslashreplace")
            request = job.request
            if request is None or request.output is None or request.flat:
                return
            if outbox.has_any("job.json", request.output):  # else nobody answers there, and that took minutes
                outbox.send({NAME: target}, request.output)
    except Exception as fault:
        warn(f"{NAME} could not be made or published, and the job's results are not touched: {fault}")


def draw(job: Job, event_log: Path | None) -> Drawn:
    """Curves and pictures, as far as the job has come; with a warning for what has a fault."""
    drawn = Drawn()
    parts: Mapping[str, Callable[[Job, Path | None], Mapping[str, Any]]] = {
        "curves": _curves,
        "sample pictures": _samples,
        "pictures of the data set": lambda job, _: {"pictures": thumbnails.of_data_set(job)},
    }
    for what, make in parts.items():
        try:
            drawn = replace(drawn, **make(job, event_log))
        except Exception as fault:  # an event log or a picture may be anything
            warn(f"{NAME} has no {what}: {fault}")
    return drawn


def page(job: Job, ending: Ending, drawn: Drawn) -> str:
    """The report as HTML. Every text in it is redacted, then escaped."""
    from jinja2 import Environment  # noqa: PLC0415 — the job before it needs none

    environment = Environment(
        autoescape=True, finalize=_without_secrets, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cut": _cut, "duration": _duration, "size": _size}
    template = environment.from_string(
        resources.files("entrypoint.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    plan, merged = job.plan, _merged(job) or ending.merged
    facts = job.looked.facts if job.looked else None
    seconds = {name: took for name, took in job.seconds.items() if name != "report"}
    return template.render(
        name=_name(job, merged),
        job_name=contract.job_name(),
        result=_result(ending),
        sentence=_sentence(job, ending, drawn.last_step),
        about=_about(job, drawn.last_step),
        cause=ending.cause if ending.exit_code else "",
        problems=ending.problems[:_ROWS],
        more_problems=max(0, len(ending.problems) - _ROWS),
        last_lines=_last_lines(job) if ending.exit_code == 1 else "",
        warnings=_first(console.warned()),
        notes=_first(_notes(job, merged)),
        loras=job.loras,
        seconds=seconds,
        longest=max(seconds.values(), default=0) or 1,
        facts_rows=facts.rows(12, 8) if facts else None,
        data_set=plan.dataset if plan else None,
        reg=plan.reg if plan else None,
        captions_written=len(job.captions),
        drawn=drawn,
        configuration=_configuration(merged) if merged else [],
        inputs=_inputs(job),
        versions=job.versions,
    )


def _without_secrets(value: object) -> object:
    """What a template's expression says, redacted before it is escaped; markup is ours, and stays."""
    return redact(value) if type(value) is str else value


def _cut(text: str, most: int) -> str:
    """The beginning of a text: redacted first, or the half of a secret would not be known for one."""
    text = redact(text)
    return text if len(text) <= most else f"{text[:most]}…"


def _first(texts: list[str]) -> list[str]:
    left = len(texts) - _ROWS
    return [*texts[:_ROWS], f"and {left:,} more, which are in the log"] if left > 0 else texts


# -- in words ---------------------------------------------------------------------------------------


def _merged(job: Job) -> Merged | None:
    return job.prepared.merged if job.prepared else job.plan.merged if job.plan else None


def _name(job: Job, merged: Merged | None) -> str:
    layers = job.request.layers if job.request else ()
    asked = [one.value for layer in layers for one in layer if one.name == "output_name"]
    output_name = merged.values.get("output_name") if merged else asked[-1] if asked else None
    return str(output_name or contract.job_name() or "LoRA training")


def _result(ending: Ending) -> str:
    return {0: "completed", 2: "unfit", Stopped.exit_code: "stopped"}.get(ending.exit_code, "failed")


def _sentence(job: Job, ending: Ending, last_step: int | None) -> str:
    """The result in one sentence."""
    took = _duration(sum(job.seconds.values()))
    steps = job.looked.facts.steps if job.looked else None
    at = f", at step {last_step:,} of {steps:,}" if last_step and steps else ""
    match _result(ending):
        case "completed":
            made = counted(len(job.loras), "LoRA")
            has = "has" if len(job.loras) == 1 else "have each"
            return f"Completed in {took}: {made} {has} been opened and checked."
        case "stopped":
            return f"Stopped after {took}{at}."
        case "unfit":
            problems = counted(len(ending.problems) or 1, "problem")
            return f"Unfit: {problems}, and nothing was trained."
        case _:
            stage = f" in the stage {job.broke}" if job.broke else ""
            return f"Failed after {took}{stage}{at}."


def _about(job: Job, last_step: int | None) -> Rows:
    """Title and text of each thing that tells jobs apart."""
    rows: Rows = []
    if job.plan is not None:
        gpu = job.plan.gpu
        many = f"{gpu.count} × " if gpu and gpu.count > 1 else ""
        rows.append(("kind", {"sd15": "SD1.5", "sdxl": "SDXL"}[job.plan.kind]))
        rows.append(("GPU", f"{many}{gpu.name}" if gpu else "none"))
    if job.request is not None:
        rows.insert(1, ("trainer", job.request.trainer))
    if job.looked is not None:
        facts = job.looked.facts
        done = f"{last_step:,} of " if last_step is not None else ""
        rows += [("steps", f"{done}{facts.steps:,}"), ("epochs", f"{facts.epochs:,}")]
    rows.append(("begun", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(job.started))))
    return rows


def _last_lines(job: Job) -> str:
    """The trainer's last lines, where it is the trainer that failed."""
    if job.prepared is None or job.broke not in ("train", "verify") or not job.prepared.log.is_file():
        return ""
    with job.prepared.log.open(encoding="utf-8", errors="replace") as log:
        last = deque(log, maxlen=_LAST_LINES)
    return "\n".join(_cut(line.rstrip("\n"), 500) for line in last)


def _notes(job: Job, merged: Merged | None) -> list[str]:
    """What was mended, chosen or left out."""
    found = job.plan.notes if job.plan is not None else []
    if job.looked is not None:
        found += [*job.looked.dataset.notes, *(job.looked.reg.notes if job.looked.reg else ())]
    return [*found, *(merged.notes if merged else ())]


def _configuration(merged: Merged) -> Rows:
    """Each option with its value and where that came from, as `check` prints them."""
    return [
        (name, hidden(name, json.dumps(setting.value, ensure_ascii=False, default=str)), setting.where)
        for name, setting in sorted(merged.settings.items())
    ]


def _inputs(job: Job) -> Rows:
    """What it is, where it lies, how many files and how large, as far as that is known."""
    request, plan = job.request, job.plan
    if request is None:
        return []
    sizes: dict[str, tuple[str, str]] = {}
    if plan is not None:
        sizes["base model"] = "1 file", _size(plan.model.size)
        for name, found in (("data set", plan.dataset), ("regularisation pictures", plan.reg)):
            if found is not None:
                sizes[name] = counted(found.pictures, "picture"), _size(found.bytes)
        weights = plan.extras.weights
        for name, singles in (
            ("VAE", weights.get("vae", ())),
            ("weights", [one for option, found in weights.items() if option != "vae" for one in found]),
            ("tagger", [plan.tagger.model] if plan.tagger else ()),
        ):
            size = sum(files.size(one.file) for one in singles)
            sizes[name] = counted(len(singles), "file"), _size(size)
    sources = {
        "base model": request.model,
        "data set": request.dataset,
        "regularisation pictures": request.reg,
        "configuration": request.config,
        "VAE": request.vae,
        "weights": request.weights,
        "tagger": request.tagger,
    }
    precise = {"base model": files.name_of(plan.model.file)} if plan else {}
    return [
        (name, precise.get(name, str(source.location)), *sizes.get(name, ("", "")))
        for name, source in sources.items()
        if source is not None
    ]


def _size(count: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return counted(count, "byte")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


# -- in curves and pictures: parts of Drawn, by their names -----------------------------------------


def _curves(_: Job, event_log: Path | None) -> Mapping[str, Any]:
    """Loss and learning rates as SVG, and the last step that was logged."""
    from entrypoint.report import curves  # noqa: PLC0415 — with numpy and more, and few jobs end without

    if event_log is None or not event_log.is_file():
        return {}
    if event_log.stat().st_size / _READ_BYTES > stops.seconds_left() - thumbnails.LAST_SECONDS:
        return {}
    loss, rates = curves.read(event_log)
    if loss is None or not len(loss.steps):
        return {}
    try:
        drawn = {"loss": curves.of_loss(loss), "rates": curves.of_rates(rates) if rates else None}
    except ImportError as absent:
        raise ValueError(f"{absent}. Type: pip install 'sagemaker-kohya[train]'") from absent
    return {**drawn, "last_step": int(loss.steps.max())}


def _samples(job: Job, _: Path | None) -> Mapping[str, Any]:
    shown, more = thumbnails.of_samples(job)
    return {"samples": shown, "more_samples": more}
