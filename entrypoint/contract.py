"""SageMaker's training contract: its paths, files, variables and limits. Nobody else spells /opt/ml.

Source: "How Amazon SageMaker runs your training image" and "Using the training toolkit" in the SageMaker
developer guide; botocore's service description of CreateTrainingJob.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrypoint.console import redact, warn
from kohya.problem import Problem

CHANNELS = ("model", "dataset", "config", "vae", "reg", "weights", "tagger")
FAILURE_BYTES = 980  # SageMaker keeps 1,024 characters of the failure file and adds words of its own
_ROOM_BYTES = 1 << 16  # more than a file and its folder take
_PLATFORM = ("sagemaker_", "_tuning_")  # hyperparameters that the SDK and tuning jobs add for themselves
_MANIFEST = "-manifest"  # SageMaker puts a file <channel>-manifest beside some channels


@dataclass(frozen=True)
class Channel:
    """One input that SageMaker has mounted."""

    name: str
    path: Path
    streamed: bool  # FastFile: read-only, cheap to read once in order, dear to read again


@dataclass(frozen=True)
class Tree:
    """The folders that SageMaker and the container share. SAGEMAKER_BASE_DIR moves them."""

    base: Path

    @classmethod
    def from_environment(cls) -> "Tree":
        return cls(Path(os.environ.get("SAGEMAKER_BASE_DIR", "/opt/ml")).resolve())

    @property
    def model(self) -> Path:
        """Becomes model.tar.gz, also when the job fails or is stopped."""
        return self.base / "model"

    @property
    def tensorboard(self) -> Path:
        """Event logs, copied to S3 while the job runs if it has a TensorBoardOutputConfig."""
        return self.base / "output" / "tensorboard"

    @property
    def data(self) -> Path:
        """Becomes output.tar.gz, together with the failure file."""
        return self.base / "output" / "data"

    @property
    def checkpoints(self) -> Path:
        """States, copied to S3 while the job runs if it has a CheckpointConfig."""
        return self.base / "checkpoints"

    @property
    def failure(self) -> Path:
        """Its first 1,024 characters become the job's FailureReason."""
        return self.base / "output" / "failure"

    def hyperparameters(self) -> tuple[dict[str, str], list[Problem]]:
        """The job's hyperparameters. Values are strings; those that the SDK JSON-quoted are unquoted."""
        content, problems = self._read("hyperparameters.json")
        values = {name: _unquote(value) for name, value in content.items() if not name.startswith(_PLATFORM)}
        return {name: value for name, value in values.items() if value is not None}, problems

    def channels(self) -> tuple[dict[str, Channel], list[Problem]]:
        """The channels that are mounted under input/data, by name."""
        content, problems = self._read("inputdataconfig.json")
        data = self.base / "input" / "data"
        folders = {path.name for path in data.iterdir() if path.is_dir()} if data.is_dir() else set()
        names = sorted(folders | set(content))
        found = {}
        for name in names:
            if name.endswith(_MANIFEST) and name.removesuffix(_MANIFEST) in names:
                continue
            mode = _mode(content.get(name))
            where = f"channel {name}"
            if name not in CHANNELS:
                known = ", ".join(CHANNELS)
                problems.append(
                    Problem(where, f"there is no such channel; the channels are {known}", "Rename it")
                )
            elif mode == "Pipe":
                wrong = "Pipe mode gives a stream, and the trainer needs files"
                problems.append(Problem(where, wrong, "Set its TrainingInputMode to File or FastFile"))
            elif name not in folders:
                wrong = f"inputdataconfig.json names it, but {data / name} is no folder"
                problems.append(Problem(where, wrong, "Mount the channel there"))
            else:
                found[name] = Channel(name, data / name, streamed=mode == "FastFile")
        return found, problems

    def hosts(self) -> tuple[list[str], list[Problem]]:
        """The machines of this job. More than one is a problem."""
        content, problems = self._read("resourceconfig.json")
        hosts = content.get("hosts") or ["algo-1"]
        if not isinstance(hosts, list):
            problems.append(
                Problem("resourceconfig.json: hosts", "it is not a list", "Write a JSON list of names")
            )
            return [], problems
        if len(hosts) > 1:
            wrong = f"the job has {len(hosts)} hosts, and training runs on one"
            problems.append(Problem("resourceconfig.json: hosts", wrong, "Set InstanceCount to 1"))
        return hosts, problems

    @property
    def _room(self) -> Path:
        """Holds free what the failure file takes, for where the disk is full by then."""
        return self.failure.with_name(".room")

    def write_failure(self, text: str) -> None:
        """Write the failure file: the cause first, whole characters, at most FAILURE_BYTES bytes.

        Where it cannot be written that is said, for the cause itself must not be lost over it.
        """
        kept = redact(text).encode(errors="backslashreplace")[:FAILURE_BYTES].decode(errors="ignore")
        self.give_room()
        try:
            self.failure.parent.mkdir(parents=True, exist_ok=True)
            self.failure.write_text(kept, encoding="utf-8")
        except OSError as error:
            warn(f"{self.failure} cannot be written: {error.strerror}. Set SAGEMAKER_BASE_DIR.")

    def forget_failure(self) -> None:
        """Remove the failure file of an earlier job in the same tree, and hold room free for one of this."""
        with suppress(OSError):
            self.failure.unlink()
        with suppress(OSError):
            self._room.parent.mkdir(parents=True, exist_ok=True)
            self._room.write_bytes(bytes(_ROOM_BYTES))

    def give_room(self) -> None:
        """Remove what was held free: the job ends."""
        with suppress(OSError):
            self._room.unlink()

    def _read(self, name: str) -> tuple[dict[str, Any], list[Problem]]:
        """One of SageMaker's JSON files; all of them are optional."""
        path = self.base / "input" / "config" / name
        if not path.exists():
            return {}, []
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            return {}, [Problem(str(path), f"it cannot be read as JSON ({error})", "Write a JSON object")]
        if not isinstance(content, dict):
            return {}, [Problem(str(path), "it is not a JSON object", 'Write {"name": "value", …}')]
        return content, []


def job_name(environ: Mapping[str, str] = os.environ) -> str | None:
    """SageMaker's name for this job, where it runs there."""
    return environ.get("TRAINING_JOB_NAME") or None


def _mode(channel: object) -> str:
    mode = channel.get("TrainingInputMode") if isinstance(channel, dict) else None
    return mode if isinstance(mode, str) else "File"


def _unquote(value: object) -> str | None:
    """A hyperparameter as the text that its sender meant; None for null.

    CreateTrainingJob allows strings only; the Python SDK's Framework estimators send each value as JSON
    text, so that fp16 arrives as "fp16" with its quotation marks.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        return json.dumps(value)
    if value.startswith('"') and value.endswith('"') and len(value) > 1:
        try:
            inner = json.loads(value)
        except ValueError:
            return value
        return inner if isinstance(inner, str) else value
    return None if value == "null" else value
