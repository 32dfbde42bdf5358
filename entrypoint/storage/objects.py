"""Objects in S3 by their names, and the paths on disk that keys map to."""

import re
from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from entrypoint import console
from entrypoint.failures import Problem, StorageError
from entrypoint.packed import Rows, decoded, encoded

FETCH_FOLDER = ".fetch"  # in the folder that is fetched to: unfinished files, and the record of finished ones


@dataclass(frozen=True, slots=True)
class S3Uri:
    """s3://bucket/key; a folder is a key too, with or without a slash at its end."""

    bucket: str
    key: str = ""

    @classmethod
    def parse(cls, text: str) -> "S3Uri":
        """Raises ValueError, with a sentence, for anything else than s3://bucket or s3://bucket/key."""
        scheme, separator, rest = text.partition("://")
        bucket, _, key = rest.partition("/")
        if scheme != "s3" or not separator or not bucket or bucket != bucket.strip():
            raise ValueError(f"{console.redact(text)!r} is no S3 URI; expected s3://bucket/key")
        return cls(bucket, key)

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    def __truediv__(self, name: str) -> "S3Uri":
        return S3Uri(self.bucket, f"{self.prefix}{name}")

    @property
    def name(self) -> str:
        """The last segment of the key."""
        return self.key.rstrip("/").rpartition("/")[2]

    @property
    def prefix(self) -> str:
        """What the keys in this folder begin with. "cats/", so that "cats" is not "cats_512x512" as well."""
        return self.key.rstrip("/") + "/" if self.key.strip("/") else ""


@dataclass(frozen=True, slots=True)
class RemoteObject:
    """An object as S3 lists it."""

    uri: S3Uri
    size: int  # bytes
    etag: str  # without quotes; changes whenever the object does


class RemoteObjects:
    """The objects below a folder, each made when it is asked for."""

    def __init__(self, folder: S3Uri) -> None:
        self._bucket, self._prefix = folder.bucket, folder.prefix
        self.paths = Rows()  # below the folder
        self.sizes = array("Q")
        self._etags = Rows()

    def append(self, path: str, item: RemoteObject) -> None:
        self.paths.append(encoded(path))
        self.sizes.append(item.size)
        self._etags.append(_packed(item.etag))

    def __getitem__(self, place: int) -> RemoteObject:
        uri = S3Uri(self._bucket, self._prefix + decoded(self.paths[place]))
        return RemoteObject(uri, self.sizes[place], _unpacked(self._etags[place]))


def _packed(etag: str) -> bytes:
    """An ETag as few bytes. Most are an MD5 in hexadecimal."""
    if re.fullmatch("[0-9a-f]{32}", etag):
        return b"\1" + bytes.fromhex(etag)
    return b"\0" + encoded(etag)


def _unpacked(row: bytes) -> str:
    return row[1:].hex() if row[0] else decoded(row[1:])


@dataclass(frozen=True)
class Fetched:
    """An object that is on disk, whole and verified."""

    source: RemoteObject  # as fetched: newer than asked for, if it was replaced meanwhile
    path: Path
    verified: str  # crc64nvme, crc32c, crc32, sha256, sha1, md5; or size, where S3 holds no checksum
    checksum: str  # as S3 states it: base64, hexadecimal for md5, "" for size
    seconds: float
    reused: bool = False  # it was there already


def safe_relative(uri: S3Uri, folder: S3Uri) -> str:
    """The path below a folder that one of its objects maps to. Raises StorageError for one that leaves it."""
    if uri.bucket != folder.bucket or not uri.key.startswith(folder.prefix):
        raise ValueError(f"{uri} is not below {folder}")
    relative = uri.key[len(folder.prefix) :]
    if reason := unsafe(relative):
        raise refused(uri, reason)
    return relative


_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_DRIVE = re.compile("[A-Za-z]:")
_ENDS = re.compile(r"[. ](/|\Z)")
_DEVICES = frozenset(
    {"con", "prn", "aux", "nul", *(f"{name}{n}" for name in ("com", "lpt") for n in range(10))}
)


def unsafe(relative: str) -> str | None:
    """Why a path must not be made below a folder; None for one that may be."""
    return next(_reasons(relative), None)


def _reasons(relative: str) -> Iterator[str]:  # asked for each of 100,000 keys
    names = relative.split("/")
    if _CONTROL.search(relative):
        yield "holds a control character"
    if "\\" in relative:
        yield "holds a backslash, which some systems read as a folder"
    if "" in names:
        yield "holds an empty name between slashes"
    if ".." in names or "." in names:
        yield "leads out of its folder"
    if _DRIVE.match(relative):
        yield "begins with a drive"
    if _ENDS.search(relative):
        yield "ends a name with a dot or a space"
    if any(name.partition(".")[0].lower() in _DEVICES for name in names):
        yield "is the name of a device on Windows"
    if len(relative) > 63 and any(len(encoded(name)) > 255 for name in names):
        yield "holds a name of more than 255 bytes"
    if names[0] == FETCH_FOLDER:
        yield f"begins with {FETCH_FOLDER}, which this job needs itself"


def refused(uri: S3Uri, reason: str) -> StorageError:
    where = repr(str(uri))[1:-1]  # shows a control character as what it is
    return StorageError(
        Problem(where, f"the key {reason}", "Rename the object, or take it out of the folder")
    )


def clashes(paths: Collection[str]) -> Iterator[str]:
    """The paths that are a file by one key and a folder by another."""
    folders = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
    return (path for path in paths if path in folders)
