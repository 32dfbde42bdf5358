"""Inputs as files, wherever they lie: on disk or in S3. Nothing is read but what is asked for."""

import io
import os
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from entrypoint.failures import Problem, StorageError, Unfit
from entrypoint.packed import Indexed, Packed, Rows, decoded, encoded
from entrypoint.request import Location, Source
from entrypoint.storage import RemoteObject, S3Uri, Storage, safe_relative
from entrypoint.storage.objects import RemoteObjects

TEXT_BYTES = 1 << 20  # larger than any TOML or list of prompts that a person writes
_KEYS_SHOWN = 20  # in one report

File = RemoteObject | Path


@dataclass(frozen=True)
class Single:
    """One file, and whether its channel is streamed: cheap to read only once and in order."""

    file: File
    streamed: bool


class Listing(Packed[File]):
    """The files of a folder by their paths below it, and their sizes in bytes."""

    def __init__(self, paths: Rows, files: Indexed[File], sizes: Indexed[int]) -> None:
        super().__init__(paths, files)
        self.sizes = self.of(sizes)


def listing(source: Source, storage: Storage) -> Listing:
    """Every file of a folder, by its path below it."""
    location = source.location
    if isinstance(location, S3Uri):
        return _below(location, storage)
    if not location.is_dir():
        raise Unfit([Problem(f"{source.where}: {location}", "it is not a folder", "Correct the path")])
    paths, sizes = Rows(), array("Q")
    for path in _walk(location):
        paths.append(encoded(path.relative_to(location).as_posix()))
        sizes.append(size(path))
    return Listing(paths, _Paths(location, paths), sizes)


class _Paths:
    """The files below a folder on disk, each made when it is asked for."""

    def __init__(self, root: Path, paths: Rows) -> None:
        self._root, self._paths = root, paths

    def __getitem__(self, place: int) -> Path:
        return self._root / decoded(self._paths[place])


def _below(folder: S3Uri, storage: Storage) -> Listing:
    """Every object of a folder. Raises Unfit with every key that no file may be named after."""
    found = RemoteObjects(folder)
    problems: list[Problem] = []
    for item in storage.list(folder):
        try:
            found.append(safe_relative(item.uri, folder), item)
        except StorageError as error:
            problems.append(error.problem)
    if len(problems) > _KEYS_SHOWN:
        left = Problem(
            str(folder), f"{len(problems) - _KEYS_SHOWN} more keys are unfit", "Rename these first"
        )
        problems = [*problems[:_KEYS_SHOWN], left]
    if problems:
        raise Unfit(problems)
    return Listing(found.paths, found, found.sizes)


def _walk(root: Path) -> Iterator[Path]:
    """Every file below a folder, through links to folders too, but never twice into the same one."""
    seen: set[Path] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if (real := Path(folder).resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (path for name in files if (path := Path(folder, name)).is_file())


def matching(
    source: Source, endings: tuple[str, ...], what: str, storage: Storage, *, others: tuple[str, ...] = ()
) -> dict[str, File]:
    """The file that `source` names, or those with such an ending in the folder that it names, by name.

    `others` are endings that count too, and that a refusal does not ask for.
    There is at least one: raises Unfit where there is none, StorageError where S3 says no.
    """
    location = source.location
    where = f"{source.where}: {location}"
    if isinstance(location, S3Uri) and location.key.endswith((*endings, *others)):
        return {location.name: storage.head(location)}
    if isinstance(location, Path) and location.is_file():
        return {location.name: location}
    if isinstance(location, Path) and not location.is_dir():
        raise Unfit([Problem(where, "there is no such file or folder", "Correct the path")])
    files = listing(source, storage)
    found = {name: file for name, file in sorted(files.items()) if name.endswith((*endings, *others))}
    if not found:
        wrong = f"there is no {what} ({', '.join(endings)})"
        raise Unfit([Problem(where, wrong, "Put the file there, or name it")])
    return found


def only(source: Source, endings: tuple[str, ...], what: str, storage: Storage) -> File:
    """The one file that `matching` finds. Raises Unfit where there are more."""
    return sole(matching(source, endings, what, storage), source, f"Leave one, or name the {what} itself")


def sole(found: Mapping[str, File], source: Source, fix: str) -> File:
    """The one file that was found. Raises Unfit where there are more, with the way out."""
    if len(found) == 1:
        return next(iter(found.values()))
    wrong = f"there are {len(found)} files ({', '.join(list(found)[:5])})"
    raise Unfit([Problem(f"{source.where}: {source.location}", wrong, fix)])


def beside(folder: Location, name: str, storage: Storage) -> File:
    """A file by its path below a folder. Raises Unfit and StorageError where there is none."""
    if isinstance(folder, S3Uri):
        return storage.head(folder / name)
    if (file := folder / name).is_file():
        return file
    there = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    wrong = f"there is no such file; in its folder there are {', '.join(there[:5]) or 'none'}"
    raise Unfit([Problem(str(file), wrong, "Put it there, or correct the name")])


def text_of(file: File, where: str, storage: Storage) -> str:
    """The content of a small text file. Raises Unfit where it is no UTF-8, or larger than TEXT_BYTES."""
    try:
        with opened(file, storage) as source:
            content = source.read(TEXT_BYTES + 1)
        if len(content) > TEXT_BYTES:
            raise Unfit([Problem(where, "it has more than 1 MiB", "Give a file that holds nothing else")])
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise Unfit([Problem(where, f"it cannot be read ({error})", "Save it as UTF-8")]) from error


def size(file: File) -> int:
    return file.size if isinstance(file, RemoteObject) else file.stat().st_size


def name_of(file: File) -> str:
    return str(file) if isinstance(file, Path) else str(file.uri)


def folder_of(file: File) -> Location:
    """The folder that a file lies in."""
    return file.parent if isinstance(file, Path) else S3Uri(file.uri.bucket, file.uri.key.rpartition("/")[0])


@contextmanager
def opened(file: File, storage: Storage) -> Iterator[BinaryIO]:
    """The file for reading, wherever it is."""
    if isinstance(file, Path):
        with file.open("rb") as source:
            yield source
    else:
        yield cast(BinaryIO, io.BufferedReader(_Ranges(file, storage), 1 << 16))


class _Ranges(io.RawIOBase):
    """An object in S3 as a file that is read by ranges: a header of it costs the header's bytes."""

    def __init__(self, file: RemoteObject, storage: Storage) -> None:
        self._file, self._storage, self._position = file, storage, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        length = min(len(buffer), self._file.size - self._position)
        if length <= 0:
            return 0
        content = self._storage.read_range(self._file.uri, self._position, length)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
