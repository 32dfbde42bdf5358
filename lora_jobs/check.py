"""`lora check`: whether a job is fit, told before anything is paid for.

The job file's own problems and what the job itself would look at, in one report, from listings and headers.
With --pictures the pictures are read as well. Ends with 0 for fit, 2 for unfit, 1 where S3 does not answer.
"""

import argparse
import json
import re
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path

from entrypoint import checked
from entrypoint.checked import Report
from entrypoint.contract import Tree
from kohya.problem import Problem
from lora_jobs.job_file import CHANNELS, Draft, as_text, where

# The GPU of an instance's family: https://aws.amazon.com/sagemaker/ai/pricing/, "Accelerated computing". What
# is not here has a GPU for which there is no preset; the values then suit one with bf16.
_GPUS = {
    "g4dn": "t4", "g5": "a10g", "g6": "l4", "gr6": "l4", "g6e": "l40s", "p4d": "a100", "p4de": "a100",
    "p5": "h100",
}  # fmt: skip
_WITHOUT_GPU = re.compile(r"ml\.[cmrt]\d")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job_file", type=Path, metavar="JOB.toml")
    parser.add_argument("--pictures", action="store_true", help="read the pictures too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    with redirect_stdout(sys.stderr):  # where a fetch tells how far it is
        report = look(Draft.read(arguments.job_file), pictures=arguments.pictures)
    checked.show(report, as_json=arguments.json)
    return report.exit_code


def look(draft: Draft, *, pictures: bool = False) -> Report:
    """Find out all about a job: what the job file has wrong, and what the job itself would find.

    The job is given its inputs as URIs; that they become channels changes nothing of what is found.
    """
    unfit = {key for key, _ in draft.problems}
    asked = hyperparameters(draft)
    with tempfile.TemporaryDirectory(prefix="lora-") as folder:
        config = Path(folder, "input", "config")
        config.mkdir(parents=True)
        (config / "hyperparameters.json").write_text(json.dumps(asked))
        report = checked.look([], gpu=gpu_of(draft), pictures=pictures, tree=Tree(Path(folder)))
    absent = {channel for key, channel in CHANNELS.items() if key in unfit or key not in draft.values}
    found = [one for one in report.problems if one.where not in absent]  # the job file's own say why
    return _named(replace(report, problems=tuple(found)), draft, asked)


def gpu_of(draft: Draft) -> str | None:
    """The name of the GPU of the job file's instance, "none", or "unknown"; None where none is named."""
    table = draft.values.get("sagemaker")
    instance = str(table.get("instance", "")) if isinstance(table, dict) else ""
    if _WITHOUT_GPU.match(instance):
        return "none"
    family = instance.split(".")[1] if instance.count(".") == 2 else ""
    return _GPUS.get(family, "unknown") if instance else None


def hyperparameters(draft: Draft) -> dict[str, str]:
    """What the job is given, its inputs as URIs, but for what has a problem of the job file's own."""
    values, training = draft.values, draft.values.get("training")
    unfit = {key for key, _ in draft.problems}
    asked = {
        f"{channel}_uri": str(values[key])
        for key, channel in CHANNELS.items()
        if key in values and key not in unfit
    }
    if "name" in values and "name" not in unfit:
        asked["output_name"] = str(values["name"])
    return asked | {
        name: as_text(value)
        for name, value in (training.items() if isinstance(training, dict) else ())
        if f"training.{name}" not in unfit
    }


def _named(report: Report, draft: Draft, asked: dict[str, str]) -> Report:
    """The report in the words of the job file, with the job file's own problems first."""
    words = _Words(draft.file, asked)
    found = report.found
    if found is not None:
        settings = {
            name: replace(setting, where=words(setting.where))
            for name, setting in found.merged.settings.items()
        }
        found = replace(found, merged=replace(found.merged, settings=settings))
    own = [problem for _, problem in draft.problems]
    problems = [*own, *(words.of(problem) for problem in report.problems)]
    return replace(report, problems=tuple(problems), notes=tuple(map(words, report.notes)), found=found)


class _Words:
    """Texts of the job's, in the words of the one who wrote the job file."""

    def __init__(self, file: str, asked: dict[str, str]) -> None:
        keys = {f"{channel}_uri": key for key, channel in CHANNELS.items()} | {"output_name": "name"}
        self._where = {name: where(file, keys.get(name, f"training.{name}")) for name in asked}
        self._keys = {channel: key for key, channel in CHANNELS.items()}

    def __call__(self, text: str) -> str:
        channel = f"({'|'.join(self._keys)})"
        text = re.sub(r"hyperparameter (\w+)", lambda found: self._where.get(found[1], found[0]), text)
        text = re.sub(rf"Add a channel {channel}, or type --\1_uri=\S+/\1", self._written, text)
        text = re.sub(rf"\btype --{channel}_uri=\S+/\1", self._written, text)
        text = re.sub(rf"\bchannel {channel}\b", lambda found: self._keys[found[1]], text)
        return re.sub(rf"\b{channel}_uri=(\S+)", lambda found: f'{self._keys[found[1]]} = "{found[2]}"', text)

    def of(self, problem: Problem) -> Problem:
        told = {name: self(text) for name, text in asdict(problem).items()}
        return type(problem)(**told)

    def _written(self, found: re.Match[str]) -> str:
        start = "Write" if found[0][0] == "A" else "write"
        return f'{start} {self._keys[found[1]]} = "…" at the top'
