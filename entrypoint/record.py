"""What each stage hands to the next, and what is known of a job at any time: job.json."""

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from entrypoint import __version__, contract, stops
from entrypoint.check import Plan
from entrypoint.checkpoint import Lora
from entrypoint.contract import Tree
from entrypoint.dataset import DataSet
from entrypoint.facts import Facts
from entrypoint.failures import Stopped
from entrypoint.pictures import Seen
from entrypoint.request import JobRequest
from entrypoint.states import Taken
from entrypoint.storage import Fetched
from kohya.config import Merged

_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")


@dataclass(frozen=True)
class Inputs:
    """Everything on disk. `fetched` tells of each object how it was verified."""

    plan: Plan
    model: Path
    dataset: Mapping[str, Path]  # by path below the data set's root
    reg: Mapping[str, Path]
    weights: Mapping[str, Sequence[Path]]  # by option: vae, network_weights, base_weights
    tagger: Path | None
    fetched: Sequence[Fetched]


@dataclass(frozen=True)
class Looked:
    """What was seen in the pictures and captions."""

    dataset: Seen
    reg: Seen | None
    facts: Facts


@dataclass(frozen=True)
class Prepared:
    """The trainer's own tree, and its configuration."""

    plan: Plan
    merged: Merged
    config_file: Path
    output: Path  # scratch, never SageMaker's model folder: what is half written is not published
    states: Path  # where the trainer saves states unasked
    logs: Path  # and its event log
    taken: Taken | None  # the state that it goes on from
    log: Path
    origins: Mapping[str, str]  # of the files in the trainer's tree: the path or URI that the user gave

    @property
    def output_name(self) -> str:
        return str(self.merged.values["output_name"])


@dataclass
class Job:
    """What is known so far. Publishing tells of it, whatever stage the job ended in."""

    tree: Tree
    work: Path  # this job's own scratch
    started: float = field(default_factory=time.time)  # seconds of the epoch
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    stop_seconds: dict[str, float] = field(default_factory=dict)  # of these, after a stop came
    request: JobRequest | None = None
    plan: Plan | None = None
    inputs: Inputs | None = None
    looked: Looked | None = None
    captions: dict[str, Path] = field(default_factory=dict)  # written until now, by path below the data set
    prepared: Prepared | None = None
    loras: Sequence[Lora] = ()
    broke: str | None = None  # the stage that ended in an error, the first one of them

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, whether it ends well or not."""
        begun = time.monotonic()
        try:
            yield
        except BaseException:
            self.broke = self.broke or name
            raise
        finally:
            ended = time.monotonic()
            self.seconds[name] = round(ended - begun, 2)
            if (stopped := stops.since()) is not None:
                self.stop_seconds[name] = round(ended - max(begun, stopped), 2)

    @cached_property
    def versions(self) -> dict[str, str]:
        """Of Python, of this project, and of the trainer's libraries."""
        scripts = self.plan.sd_scripts if self.plan else None
        found = scripts.versions(_LIBRARIES) if scripts else _versions()
        return {"python": platform.python_version(), "sagemaker-kohya": __version__, **found}

    def as_json(self, exit_code: int, cause: str) -> dict[str, Any]:
        """The content of job.json: what came of what, with what, and how long each stage took."""
        result = {0: "completed", Stopped.exit_code: "stopped"}.get(exit_code, "failed")
        told: dict[str, Any] = {"result": result, "exit_code": exit_code, "cause": cause or None}
        if name := contract.job_name():
            told["job"] = name
        if self.plan is not None:
            told |= {
                "kind": self.plan.kind,
                "trainer": self.plan.request.trainer,
                "gpu": self.plan.gpu.name if self.plan.gpu else None,
                "dataset": _pictures(self.plan.dataset),
            }
            if self.plan.reg is not None:
                told["reg"] = _pictures(self.plan.reg)
        if self.looked is not None:
            told["facts"] = self.looked.facts.as_json()
        if self.inputs is not None:
            told["inputs"] = _inputs(self.inputs)
        if self.captions:
            told["captions_written"] = len(self.captions)
        told["loras"] = [
            {"name": lora.path.name, "bytes": lora.bytes, "rank": lora.rank, "modules": lora.modules}
            for lora in self.loras
        ]
        told["seconds"] = self.seconds
        if self.stop_seconds:
            told["stop_seconds"] = self.stop_seconds
        told["versions"] = self.versions
        return told


def _pictures(data_set: DataSet) -> dict[str, int]:
    return {"pictures": data_set.pictures, "with_repeats": data_set.repeated}


def _inputs(inputs: Inputs) -> list[dict[str, Any]]:
    """Every input with its size; with its checksum where it was fetched."""
    fetched = [
        {
            "uri": str(item.source.uri),
            "bytes": item.source.size,
            "verified": item.verified,
            "checksum": item.checksum,
        }
        for item in inputs.fetched
    ]
    mounted = [path for path in inputs.plan.inputs if isinstance(path, Path)]
    return [*fetched, *({"path": str(path), "bytes": path.stat().st_size} for path in mounted)]


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
