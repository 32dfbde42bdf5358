"""Fetches what a job has made: LoRAs, each verified, the merged configuration, job.json, the report, samples,
captions. Also of a job that runs, has failed or was stopped: what there is."""

import argparse
import gzip
import json
import shutil
import sys
import tarfile
import tempfile
import tomllib
import zlib
from collections.abc import Container, Iterable, Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrypoint.console import say
from lora_jobs.aws import Aws
from lora_jobs.errors import LoraError
from lora_jobs.jobs import OVER, Status, add_job, describe, find

if TYPE_CHECKING:
    from entrypoint.storage import RemoteObject, Storage
    from kohya.config import Kind

_TARS = ".tars"  # in the folder: kept, so that they are not fetched again
_MARK = ".job"  # in the folder: whose it is


@dataclass(frozen=True)
class Fetched:
    """What there is of a job on this machine."""

    job: str
    status: str
    folder: Path
    loras: tuple[Path, ...]  # verified
    files: tuple[Path, ...]  # everything else
    failure: str | None = None  # why the job failed, if it did

    def as_json(self) -> dict[str, object]:
        told = {"job": self.job, "status": self.status, "failure": self.failure, "folder": str(self.folder)}
        return {**told, "loras": [*map(str, self.loras)], "files": [*map(str, self.files)]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to (a folder of the job's name)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    aws, job = find(arguments.job, arguments.region)
    with redirect_stdout(sys.stderr) if arguments.json else nullcontext():  # progress is no JSON
        fetched = fetch(job, arguments.out, aws=aws)
    if arguments.json:
        print(json.dumps(fetched.as_json(), indent=2))
        return 0
    say(f"{job} ({fetched.status}): in {fetched.folder}")
    for path in fetched.loras:
        say(f"  {path.relative_to(fetched.folder)}, {path.stat().st_size / 1e6:.1f} MB, verified")
    for path in fetched.files:
        if path.parent == fetched.folder:
            say(f"  {path.name}")
    for folder in sorted({path.relative_to(fetched.folder).parts[0] for path in fetched.files if (
        path.parent != fetched.folder)}):  # fmt: skip
        say(f"  {folder}/")
    if not fetched.loras:
        yet = " yet" * (fetched.status not in OVER)
        say(f"  no LoRA{yet}" + (f", for the job failed: {fetched.failure}" if fetched.failure else ""))
    return 0


def fetch(job: str, folder: Path | None = None, *, aws: Aws | None = None) -> Fetched:
    """Fetch what a job has made to `folder`, a folder of the job's name unless said.

    Each file is fetched beside its place and verified by its checksum in S3; what is there and whole stays.
    Raises LoraError where there is no such job, where it has made nothing, where something else lies in the
    folder under a name that is wanted, and for a LoRA that does not work (which is then set aside as
    NAME.bad); StorageError where S3 does not give it.
    """
    from entrypoint.storage import Storage  # noqa: PLC0415 (lora --help needs none)

    aws = aws or Aws()
    told = describe(aws, job)
    status, storage = Status.of(told), Storage()
    folder = Path(job) if folder is None else folder
    wanted = _wanted(status.output, told.get("HyperParameters", {}).get("output_uri"), storage)
    if not wanted:
        raise LoraError(
            f"{job} has made nothing to fetch yet; it is {status.moment}. lora watch {job} follows it"
        )
    _claim(folder, job, wanted)
    paths = {one.path for one in storage.fetch(wanted, folder)}
    tars = {path for path in paths if path.parent.name == _TARS}
    paths = (paths - tars) | {file for tar in tars for file in _unpack(tar, folder, paths)}
    loras = sorted(path for path in paths if path.suffix == ".safetensors" and path.parent == folder)
    _verify(loras, folder, told.get("HyperParameters", {}).get("output_name", "lora"))
    rest = tuple(sorted(paths - set(loras)))
    return Fetched(job, status.status, folder, tuple(loras), rest, status.failure)


def _wanted(output: str, lora: str | None, storage: "Storage") -> dict[str, "RemoteObject"]:
    """Every object of the job, by its path below the folder; where two are of one path, output_uri's,
    which was there first."""
    from entrypoint.storage import S3Uri, safe_relative  # noqa: PLC0415

    wanted: dict[str, RemoteObject] = {}
    place = S3Uri.parse(f"{output}/output")
    for one in storage.list(place):
        path = safe_relative(one.uri, place)
        if path.endswith(".tar.gz") and "/" not in path:
            wanted[f"{_TARS}/{path}"] = one
        else:
            wanted[path.removeprefix("model/").removeprefix("data/")] = one
    if lora and lora.startswith("s3://"):
        place = S3Uri.parse(lora)
        wanted |= {safe_relative(one.uri, place): one for one in storage.list(place)}
    return wanted


def _claim(folder: Path, job: str, wanted: Iterable[str]) -> None:
    """Make the folder the job's. Raises LoraError where it is another's, or would lose something."""
    mark = folder / _MARK
    whose = mark.read_text(encoding="utf-8") if mark.is_file() else ""
    if whose == job:
        return
    other = "Name another folder: lora fetch JOB --out FOLDER"
    if whose:
        raise LoraError(f"{folder}: it holds what {whose} has made. {other}")
    if there := next((name for name in sorted(wanted) if (folder / name).exists()), None):
        raise LoraError(f"{folder / there}: it is there already, and not from {job}. {other}")
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(job, encoding="utf-8")


def _unpack(tar: Path, folder: Path, fetched: Container[Path]) -> Iterator[Path]:
    """Put the files of a tar below `folder`, each beside its place first, but for those that were `fetched`.

    Nothing may lead out of it.
    """
    hidden = Path(tempfile.mkdtemp(prefix="unpacked-", dir=tar.parent))
    try:
        try:
            with tarfile.open(tar) as packed:
                packed.extractall(hidden, filter="data")
        except (tarfile.TarError, zlib.error, gzip.BadGzipFile, EOFError) as error:
            told = f"it is not unpacked, for {error}. What else there is lies in {folder}"
            raise LoraError(f"{tar.name}: {told}") from error
        for path in sorted(path for path in hidden.rglob("*") if path.is_file() and not path.is_symlink()):
            name = path.relative_to(hidden)
            target = folder / (name.relative_to("data") if name.parts[0] == "data" else name)
            if target in fetched:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
            yield target
    finally:
        shutil.rmtree(hidden)


def _verify(loras: list[Path], folder: Path, name: str) -> None:
    """Hold each LoRA to what the job was to train. Raises LoraError for those that do not work.

    Before the job's end it has not said what that is. Then a LoRA must open; the job itself verified it
    before it was sent, and its checksum says that it is the same.
    """
    from entrypoint import checkpoint  # noqa: PLC0415 (numpy)
    from entrypoint.failures import BadLora  # noqa: PLC0415
    from kohya import networks  # noqa: PLC0415

    bad = []
    record = _record(folder, name)
    for path in loras:
        try:
            if record is None:
                with path.open("rb") as file:
                    checkpoint.identify_lora(checkpoint.read_header(file, path.stat().st_size))
            else:
                checkpoint.verify_lora(path, networks.expected(*record))
        except (BadLora, checkpoint.WrongFile) as error:
            bad.append(str(error) if isinstance(error, BadLora) else f"{path.name}: {error}.")
            path.rename(path.with_name(f"{path.name}.bad"))
    if bad:
        raise LoraError(f"{' '.join(bad)} Set aside as .bad in {folder}.")


def _record(folder: Path, name: str) -> "tuple[Kind, dict[str, Any]] | None":
    """The base model's kind and the merged configuration, where the job has left both."""
    try:
        kind = json.loads((folder / "job.json").read_text(encoding="utf-8"))["kind"]
        return kind, tomllib.loads((folder / f"{name}.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError):
        return None
