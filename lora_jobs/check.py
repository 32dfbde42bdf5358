"""`lora check`: whether a job is fit, told before anything is paid for.

The job file's own problems and what the job itself would look at, in one report, from listings and headers.
With --pictures the pictures are read as well. Ends with 0 for fit, 2 for unfit, 1 where S3 does not answer.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path

from botocore.loaders import create_loader

from entrypoint import checked
from entrypoint.checked import Report
from entrypoint.contract import Tree
from entrypoint.gpu import NAMED, UNNAMED, Gpu
from kohya import config
from kohya.problem import Problem
from lora_jobs.errors import to_person
from lora_jobs.job_file import CHANNELS, Draft, as_text, where

# The GPU of an instance's family, and how many a size has, if not one:
# https://aws.amazon.com/sagemaker/ai/pricing/, "Accelerated computing". For one without a preset, and for a
# family that is not here, the values suit a GPU with bf16.
_G = {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8}
_P = {"24xlarge": 8, "48xlarge": 8}
_V100 = Gpu("Tesla V100", 7.0, 1)
_GPUS: Mapping[str, tuple[Gpu, Mapping[str, int]]] = {
    "g4dn": (NAMED["t4"], _G),
    "g5": (NAMED["a10g"], _G),
    "g6": (NAMED["l4"], _G),
    "g6e": (NAMED["l40s"], _G),
    **dict.fromkeys(("g7", "g7e"), (UNNAMED, {"12xlarge": 2, "24xlarge": 4, "48xlarge": 8})),
    "p2": (Gpu("Tesla K80", 3.7, 1), {"8xlarge": 8, "16xlarge": 16}),
    "p3": (_V100, {"8xlarge": 4, "16xlarge": 8}),
    "p3dn": (_V100, _P),
    "p4d": (NAMED["a100"], _P),
    "p4de": (replace(NAMED["a100"], memory=81920 << 20), _P),
    "p5": (NAMED["h100"], _P),
    "p6e-gb200": (UNNAMED, {"36xlarge": 4}),
    **dict.fromkeys(("p5e", "p5en", "p6-b200", "p6-b300"), (UNNAMED, _P)),
}
_WITHOUT_GPU = re.compile(r"ml\.([cmrt]\d|trn|inf)")


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
        place = Path(folder, "input", "config")
        place.mkdir(parents=True)
        (place / "hyperparameters.json").write_text(json.dumps(asked))
        gpu = gpu_of(draft)
        report = checked.look([], gpu=gpu, pictures=pictures, tree=Tree(Path(folder)))
    report = replace(report, notes=(*report.notes, *_notes(_instance(draft), gpu)))
    absent = {channel for key, channel in CHANNELS.items() if key in unfit or key not in draft.values}
    found = [one for one in report.problems if one.where not in absent]  # the job file's own say why
    return _named(replace(report, problems=tuple(found)), draft, asked)


def gpu_of(draft: Draft) -> Gpu | str | None:
    """The GPUs of the job file's instance, or "none"; None where no instance is named, as for `lora run`."""
    instance = _instance(draft)
    if not instance or _WITHOUT_GPU.match(instance):
        return "none" if instance else None
    _, family, size = [*instance.split("."), "", ""][:3]
    gpu, counts = _GPUS.get(family, (UNNAMED, {}))
    return replace(gpu, count=counts.get(size, 1))


def _notes(instance: str, gpu: Gpu | str | None) -> Iterator[str]:
    """What is not known of an instance."""
    if not instance:
        return
    described = create_loader().load_service_model("sagemaker", "service-2")
    types: list[str] = described["shapes"]["TrainingInstanceType"]["enum"]
    if instance not in types:
        meant = config.nearest(instance, types)
        yield f"instance = {instance} is not among the types that boto3 knows. {meant}"
    elif gpu == "none":
        yield f"{instance} has no GPU: a base model of full size takes minutes a step there"
    elif isinstance(gpu, Gpu) and gpu.name not in {one.name for one in NAMED.values()}:
        yield f"{instance}: there is no preset for its GPU, only for {', '.join(NAMED)}"


def _instance(draft: Draft) -> str:
    table = draft.values.get("sagemaker")
    return str(table.get("instance", "")) if isinstance(table, dict) else ""


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
        channel, text = f"({'|'.join(self._keys)})", to_person(text)
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
