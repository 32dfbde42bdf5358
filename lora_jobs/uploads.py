"""Local inputs on their way to S3: each folder under the digest of what is in it.

    OUTPUT/inputs/dataset-1f…/10_cat/1.png      the files
    OUTPUT/inputs/manifests/dataset-1f….json    written last: the folder is whole, and what its files hold

A key below inputs/ never gets another content, so what is there need not be sent again: not after an upload
that was cut off, and not for another job. Files that a former version of the folder had are copied in S3.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

from entrypoint import console, files
from entrypoint.check import Plan
from entrypoint.failures import Outage, Problem, StorageError, Unfit
from entrypoint.inputs import BESIDE
from entrypoint.request import Source
from entrypoint.storage import S3Uri, Storage
from entrypoint.storage.sending import Place
from kohya import config
from kohya.problem import counted
from lora_jobs.errors import LoraError
from lora_jobs.job_file import JobFile, where

T = TypeVar("T")

_FORMER = 3  # versions whose files are looked at for a copy
_LARGEST_COPY = 5 << 30  # bytes: CopyObject in S3's API reference
_AT_ONCE = 16
_TOLD = 1 << 30  # bytes, from which on reading them is worth a line

# What of a folder is sent; of the pictures' folders it is what the check found.
_ENDINGS = {
    "model": (".safetensors", ".ckpt"),
    "config": (".toml", ".txt", ".json"),
    "vae": (".safetensors",),
    "weights": (".safetensors",),
    "tagger": (".onnx", ".csv"),
}


@dataclass(frozen=True)
class Upload:
    """A local input, and the folder in S3 that it becomes."""

    channel: str
    files: Mapping[str, Path]  # by path below the folder
    digests: Mapping[str, str]  # SHA-256 of each, by the same
    states: Mapping[str, tuple[int, int]]  # size in bytes and time of change in ns, as it was read
    folder: S3Uri
    manifest: S3Uri

    @property
    def size(self) -> int:
        return sum(size for size, _ in self.states.values())


def places(job: JobFile, uploads: Sequence[Upload]) -> dict[str, str]:
    """The S3 URI of each channel. A folder's ends in a slash: S3Prefix "cat" would take cat2/ as well."""
    found = {upload.channel: f"{upload.folder}/" for upload in uploads}
    found |= {channel: remote(channel, given) for channel, given in job.remote.items()}
    return {channel: found[channel] for channel in job.inputs}


def remote(channel: str, given: str) -> str:
    """The S3 URI of a channel whose input is in S3: that of a file, or of a folder with its slash."""
    uri = S3Uri.parse(given)
    is_file = uri.key.endswith(_ENDINGS.get(channel, ()))
    return given if is_file else str(S3Uri(uri.bucket, uri.prefix))


def find(job: JobFile, plan: Plan) -> list[Upload]:
    """Every local input, read once for its digest. Nothing is sent. Raises Unfit."""
    given, named = job.config or "", [name for name in BESIDE if name in plan.merged.values]
    if "://" in given and given.endswith(_ENDINGS["config"]) and named:
        wrong = f"{named[0]} names a file beside it, and a channel of one file holds nothing else"
        fix = f'Write the folder: config = "{given.rpartition("/")[0]}"'
        raise Unfit([Problem(where(job.file, "config"), wrong, fix)])
    return [_upload(job, channel, _files(job, channel, path, plan)) for channel, path in job.local.items()]


def send(upload: Upload, storage: Storage) -> None:
    """Bring a folder to S3, but for what is there. Raises StorageError, and LoraError for a changed file."""
    former = _manifests(upload, storage)
    whole = upload.manifest.name in former
    missing = _missing(upload, storage, trusting=whole)
    if whole and not missing:
        console.say(f"{upload.channel}: in S3 already, {counted(len(upload.files), 'file')}")
        return
    if missing:
        copied = _copy(upload, missing, former, storage)
        rest = [path for path in missing if path not in copied]
        if copied:
            console.say(f"{upload.channel}: {counted(len(copied), 'file')} as before, copied in S3")
        if rest:
            wanted = {upload.files[path]: upload.folder / path for path in rest}
            storage.upload(wanted, what=upload.channel, go_on=True)
    _unchanged(upload)
    content = json.dumps({"files": dict(upload.digests)}).encode()
    place: Place = {"Bucket": upload.manifest.bucket, "Key": upload.manifest.key}
    with storage.explained("s3:PutObject", upload.manifest):
        storage.ask(lambda client: client.put_object(**place, Body=content, ContentType="application/json"))


def _missing(upload: Upload, storage: Storage, *, trusting: bool) -> list[str]:
    """The paths whose object is not there, or is another's. With `trusting` one of the same size is theirs.

    In a folder that was not finished it may not be: a file may have been changed while it was sent.
    """
    there = {item.uri.key: item for item in storage.list(upload.folder)}

    def is_missing(path: str) -> bool:
        found = there.get((upload.folder / path).key)
        if found is None or found.size != upload.states[path][0]:
            return True
        return not trusting and not _readable(partial(storage.holds, found, upload.files[path]))

    with ThreadPoolExecutor(_AT_ONCE) as crew:
        return [
            path
            for path, absent in zip(upload.files, crew.map(is_missing, upload.files), strict=True)
            if absent
        ]


def _readable(ask: Callable[[], T]) -> T | None:
    """What is asked of an object; None where it may not be read, as with a key that only encrypts."""
    try:
        return ask()
    except StorageError as error:
        if isinstance(error.problem, Outage):
            raise
        return None


def _files(job: JobFile, channel: str, path: Path, plan: Plan) -> Mapping[str, Path]:
    """The files that a channel is to hold, by their paths in it."""
    pictures = {"dataset": plan.dataset_files, "reg": plan.reg_files}
    if channel in pictures:
        below = _flat(plan) if channel == "dataset" else ""
        return {below + name: file for name, file in pictures[channel].items() if isinstance(file, Path)}
    if channel == "config":
        return configuration(path, job.training)
    return {path.name: path} if path.is_file() else _below(path, _ENDINGS[channel])


def _flat(plan: Plan) -> str:
    """The folder that pictures in none are taken as, named after theirs: a channel has no such name."""
    if "dataset_config" in plan.merged.values or any("/" in name for name in plan.dataset_files):
        return ""
    return f"{plan.dataset.subsets[0].folder}/"


def configuration(path: Path, training: Mapping[str, object]) -> Mapping[str, Path]:
    """The files of the channel config: of a folder all that may count, of a TOML those that are named."""
    if path.is_dir():
        found = _below(path, _ENDINGS["config"])
        return {name: file for name, file in found.items() if not name.startswith(".") and "/." not in name}
    settings, _ = config.read(path.read_text(encoding="utf-8-sig"), path.name)
    told = {setting.name: setting.value for setting in settings} | dict(training)
    beside = [str(PurePosixPath(str(told[name]))) for name in BESIDE if told.get(name)]
    return {path.name: path, **{name: path.parent / name for name in beside}}


def _below(folder: Path, endings: tuple[str, ...]) -> Mapping[str, Path]:
    found = files.listing(Source(folder, str(folder)), Storage())
    return {name: file for name, file in found.items() if isinstance(file, Path) and name.endswith(endings)}


def _upload(job: JobFile, channel: str, found: Mapping[str, Path]) -> Upload:
    names = sorted(found)
    states = {name: _state(found[name]) for name in names}
    size = sum(bytes_ for bytes_, _ in states.values())
    if size >= _TOLD:
        console.say(f"{channel}: reading {size / 1e9:.1f} GB, to see what of it is new")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as crew:
        digests = dict(zip(names, crew.map(_digest, (found[name] for name in names)), strict=True))
    digest = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]
    inputs = S3Uri.parse(job.output) / "inputs"
    return Upload(
        channel=channel,
        files=found,
        digests=digests,
        states=states,
        folder=inputs / f"{channel}-{digest}",
        manifest=inputs / f"manifests/{channel}-{digest}.json",
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _unchanged(upload: Upload) -> None:
    """Raise LoraError where a file is no longer the one whose digest was taken."""
    for name, path in upload.files.items():
        if _state(path) != upload.states[name]:
            wrong = "it was changed while it was sent"
            raise LoraError(Problem(str(path), wrong, "Type the same again when it is finished"))


def _manifests(upload: Upload, storage: Storage) -> Mapping[str, S3Uri]:
    """The manifests of this channel's folders by their names, the newest first."""
    uri = upload.manifest
    prefix = f"{uri.key.removesuffix(uri.name)}{upload.channel}-"
    with storage.explained("s3:ListBucket", uri):
        found = storage.ask(
            lambda client: [
                item
                for page in client.get_paginator("list_objects_v2").paginate(Bucket=uri.bucket, Prefix=prefix)
                for item in page.get("Contents", ())
            ]
        )
    newest = sorted(found, key=lambda item: item["LastModified"], reverse=True)
    uris = [S3Uri(uri.bucket, item["Key"]) for item in newest]
    return {one.name: one for one in uris}


def _copy(
    upload: Upload, missing: Sequence[str], manifests: Mapping[str, S3Uri], storage: Storage
) -> set[str]:
    """Copy what former versions of the folder have; returns the paths that are there now."""
    there: dict[str, S3Uri] = {}  # by digest
    for name, uri in list(manifests.items())[:_FORMER]:
        if uri == upload.manifest:
            continue
        text = _readable(partial(storage.read, uri, limit=1 << 26))
        if text is None:
            continue
        content = json.loads(text)
        folder = S3Uri(upload.folder.bucket, upload.folder.key.rpartition("/")[0]) / name.removesuffix(
            ".json"
        )
        there |= {digest: folder / path for path, digest in content["files"].items()}

    def copy(path: str) -> str | None:
        source = there.get(upload.digests[path])
        if source is None or upload.states[path][0] > _LARGEST_COPY:
            return None
        target = upload.folder / path
        return path if _copied(source, target, storage) else None

    with ThreadPoolExecutor(_AT_ONCE) as crew:
        return {path for path in crew.map(copy, missing) if path is not None}


def _copied(source: S3Uri, target: S3Uri, storage: Storage) -> bool:
    """Copy an object; False where it is gone, as after somebody tidied up."""
    from botocore.exceptions import ClientError  # noqa: PLC0415

    place: Place = {"Bucket": target.bucket, "Key": target.key}
    with storage.explained("s3:PutObject", target):
        try:
            storage.ask(
                lambda client: client.copy_object(
                    **place, CopySource={"Bucket": source.bucket, "Key": source.key}
                )
            )
        except ClientError as error:
            if error.response["Error"].get("Code") in ("NoSuchKey", "404"):
                return False
            raise
    return True
