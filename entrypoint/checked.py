"""`check`: whether a job is fit, told on a laptop or in CI, without a GPU and without training anything.

It looks at what the job's own stages resolve and check look at, from listings and headers. The machine that
it runs on is not judged: not its disk, its driver or its trainer. Nothing is written, but with --pictures
what lies in S3 is fetched to where a job would look for it. Whether the job may write to its outputs is not
tried: a person's credentials are not the job's.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any

from entrypoint import console, files, job, memory
from entrypoint.check import OUTPUT_BYTES, Findings, examine, processes, to_fetch
from entrypoint.contract import Tree
from entrypoint.facts import Facts, Row, facts
from entrypoint.failures import Outage, Problem, StorageError, Unfit, collecting
from entrypoint.gpu import NAMED, UNNAMED, Gpu, find_gpu
from entrypoint.request import JobRequest, resolve
from entrypoint.storage import Storage
from kohya import config
from kohya.problem import counted

WIDTH = 80  # columns on a terminal
_FOLDERS, _BUCKETS = 12, 12  # shown; the JSON has all


@dataclass(frozen=True)
class Report:
    """What `check` found."""

    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    request: JobRequest | None  # None where it does not become clear what the inputs are
    found: Findings | None
    facts: Facts | None = None  # None where there is no picture

    @property
    def exit_code(self) -> int:
        """0 fit, 2 unfit, 1 where storage gave no answer."""
        return 1 if any(isinstance(one, Outage) for one in self.problems) else 2 if self.problems else 0

    @property
    def result(self) -> str:
        """The first line."""
        count = counted(len(self.problems), "problem")
        return {0: "fit", 1: f"not known: storage did not answer; {count}", 2: f"unfit: {count}"}[
            self.exit_code
        ]

    def as_json(self) -> dict[str, Any]:
        """The object that --json prints.

        fit            true or false
        exit_code      0, 1 or 2
        problems       list of {where, wrong, fix}
        notes          list of texts: what was mended or chosen, and is no problem
        trainer, gpu   names; null where they are not known
        kind           sd15 or sdxl; null where the base model could not be told
        model          {file, bytes}; null where it could not be told
        facts          {folders: [{folder, pictures, repeats, captions, bytes, is_reg}],
                       buckets: [{width, height, pictures}], pictures, with_repeats, bytes, batches, steps,
                       epochs, in_epochs, exact}: what training comes to, as entrypoint/facts.py tells it.
                       Without --pictures there are no buckets, and batches are the least. null where there is
                       no picture, or no kind and so no preset
        fetch_bytes    what the job puts on disk before it trains; null where that is not known
        disk_bytes     that, and the room for what the trainer makes
        gpu_memory     {least_bytes, estimated_bytes}; null where the base model could not be told
        configuration  {option: {value, where}}, as the trainer gets it; a secret's value is "***". Without a
                       kind there are no presets in it
        """
        found, plan = self.found, self.found.plan if self.found else None
        model, need = found.model if found else None, self._need()
        settings = {name: {"value": value, "where": where} for name, value, where in self._values()}
        return {
            "fit": self.exit_code == 0,
            "exit_code": self.exit_code,
            "problems": [asdict(problem) for problem in self.problems],
            "notes": list(self.notes),
            "trainer": self.request.trainer if self.request else None,
            "gpu": found.gpu.name if found and found.gpu else None,
            "kind": found.kind if found else None,
            "model": {"file": files.name_of(model.file), "bytes": model.size} if model else None,
            "facts": self.facts.as_json() if self.facts and found and found.kind else None,
            "fetch_bytes": to_fetch(plan) if plan else None,
            "disk_bytes": to_fetch(plan) + OUTPUT_BYTES if plan else None,
            "gpu_memory": {"least_bytes": int(need.least), "estimated_bytes": int(need.estimate)}
            if need
            else None,
            "configuration": settings,
        }

    def sections(self) -> Iterator[tuple[str, Sequence[tuple[str, ...]]]]:
        """What is printed: titles, and below each rows of columns."""
        yield "problems", [(problem.where, f"{problem.wrong}. {problem.fix}") for problem in self.problems]
        yield "notes", [(note,) for note in self.notes]
        found = self.found
        if found is None or self.request is None:
            return
        if found.model:
            size = f"{found.kind}, {found.model.size / 1e9:.2f} GB"
            yield "base model", [(size, files.name_of(found.model.file))]
        if self.facts:
            yield from self._training(self.facts, found)
        rows = [("trainer", self.request.trainer), ("GPU", found.gpu.name if found.gpu else "none")]
        if found.gpu and (need := self._need()):
            rows.append(("GPU memory", str(need)))
        if found.plan:
            room = f"{(to_fetch(found.plan) + OUTPUT_BYTES) / 1e9:.1f} GB"
            rows.append(("disk", f"{room}, of which {OUTPUT_BYTES / 1e9:.1f} GB are for what is made"))
        yield "job", rows
        yield (
            "configuration",
            [
                (f"{name} = {json.dumps(value, ensure_ascii=False)}", where)
                for name, value, where in self._values()
            ],
        )

    def _training(self, facts: Facts, found: Findings) -> Iterator[tuple[str, Sequence[Row]]]:
        """What is trained on, and what training comes to: not where its length is that of some preset."""
        folders, buckets, (batches, *run) = facts.rows(_FOLDERS, _BUCKETS)
        besides = f", and {found.reg.pictures:,} for regularisation" if found.reg else ""
        if len(facts.folders) > 1:
            folders.append(("together", counted(facts.pictures, "picture") + besides))
        yield "data set", folders
        if found.kind is None:
            return
        yield "buckets, and how many pictures an epoch has in each", buckets
        besides = " and as many for regularisation" if found.reg else ""
        epoch = f"{batches}, of {counted(facts.with_repeats, 'picture')} with repeats{besides}"
        yield "training", [(epoch,), (", ".join(run),)]

    def _need(self) -> memory.Need | None:
        kind = self.found.kind if self.found else None
        return memory.need(kind, self.found.merged.values) if kind and self.found else None

    def _values(self) -> Iterator[tuple[str, Any, str]]:
        """The merged configuration, by name, with the place that each value came from."""
        for name, setting in sorted(self.found.merged.settings.items() if self.found else ()):
            if setting.of_preset and self.found and self.found.kind is None:
                continue  # of which preset is not known
            yield name, console.hidden(name, setting.value), setting.where


def run(arguments: Sequence[str]) -> int:
    """Check a job, print the report, and return the exit code: 0 fit, 2 unfit, 1 for a failure of storage.

    `arguments`: those of a job, and --gpu=NAME, --pictures and --json.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--json", "--pictures"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--gpu")
    own, rest = parser.parse_known_args(arguments)
    with redirect_stdout(sys.stderr):  # where a fetch tells how far it is
        report = look(rest, gpu=own.gpu, pictures=own.pictures)
    show(report, as_json=own.json)
    return report.exit_code


def show(report: Report, *, as_json: bool) -> None:
    """Print the report: as one JSON object, for a terminal, or in plain lines."""
    if as_json:
        print(console.redact(json.dumps(report.as_json(), indent=2, ensure_ascii=False)))
    elif sys.stdout.isatty():
        _print_on_terminal(report)
    else:
        print("\n".join(plain(report)))


def look(
    arguments: Sequence[str],
    *,
    gpu: str | Gpu | None = None,
    pictures: bool = False,
    tree: Tree | None = None,
) -> Report:
    """Find out all about a job that is asked for by these flags, and by what is in `tree`.

    `tree`: None for the one that a job would find here.
    `gpu`: the one to check for, itself or by a name of configs/gpu, or none; None: this machine's. Where it
    has none, the job is taken to be for some GPU that has bf16, and nothing is refused for want of a GPU.
    """
    storage, problems = Storage(), list[Problem]()
    meant = gpu if isinstance(gpu, Gpu) else _gpu(gpu, problems)
    try:
        request = resolve(arguments, tree or Tree.from_environment(), storage)
    except Unfit as error:
        return Report((*problems, *error.problems), (), None, None)
    found = examine(request, meant, storage, None)
    problems += found.problems
    unread = "dataset_config" in found.merged.values  # and so nothing is left out that another would not be
    data_sets = [one for one in (found.dataset, found.reg) if one is not None and (one.subsets or not unread)]
    notes = [note for data_set in data_sets for note in data_set.notes] + list(found.merged.notes)
    if gpu is None and meant is UNNAMED:
        notes.append(f"the values suit a GPU with bf16; for another one type --gpu={'|'.join(NAMED)}|none")
    told = None
    if found.dataset is not None and found.dataset.pictures:
        told = facts(found.dataset, found.reg, found.merged.values, processes=processes(request, found.gpu))
    if pictures and found.plan is None:
        notes.append("the pictures were not read: there is no base model or no data set to train")
    elif pictures and found.plan is not None:
        with collecting(problems):
            try:
                inputs = job.fetch(found.plan, storage, pictures_only=True)
                with redirect_stdout(io.StringIO()):  # the report tells it all
                    looked = job.look(inputs)
                told = looked.facts
                notes += [*looked.dataset.notes, *(looked.reg.notes if looked.reg else ())]
            except StorageError as error:
                problems.append(Outage(**asdict(error.problem)))
    elif found.plan is not None and told is not None and not told.exact:
        notes.append("buckets, and the exact number of batches, show with check --pictures")
    return Report(tuple(problems), tuple(notes), request, found, told)


def plain(report: Report) -> Iterator[str]:
    """The report in lines, for where there is no terminal."""
    yield report.result
    for title, rows in report.sections():
        if rows:
            yield f"\n{title}"
            between = ": " if title == "problems" else "  "
            yield from ("  " + between.join(map(_shown, row)) for row in rows)


def _print_on_terminal(report: Report) -> None:
    from rich.console import Console  # noqa: PLC0415 (it takes a while, and CI needs none)
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    screen = Console(width=WIDTH, highlight=False)
    colour = {0: "bold green", 1: "bold yellow", 2: "bold red"}[report.exit_code]
    screen.print(Text(report.result, colour))
    for title, rows in report.sections():
        if not rows:
            continue
        screen.print(Text(f"\n{title}", "bold"))
        if title == "problems":  # a column would leave too little room for where it is
            for where, told in rows:
                screen.print(Text(_shown(where), "red"), Text(f"  {_shown(told)}"), sep="\n")
            continue
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for row in rows:
            table.add_row(*(Text(_shown(cell), overflow="fold") for cell in row))
        screen.print(table)


def _gpu(name: str | None, problems: list[Problem]) -> Gpu | None:
    """The GPU that is meant by --gpu."""
    if name is None:
        return find_gpu() or UNNAMED
    if name.lower() == "none":
        return None
    if name.lower() not in NAMED:
        wrong = f"{name!r} is not one of {', '.join(NAMED)}, none"
        problems.append(Problem("flag --gpu", wrong, config.nearest(name.lower(), NAMED)))
    return NAMED.get(name.lower(), UNNAMED)


def _shown(text: str) -> str:
    """`text` without secrets, and without what would move the cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in console.redact(text))
