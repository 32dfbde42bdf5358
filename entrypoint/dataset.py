"""Looking at a data set, and making the tree that the trainer sees.

sd-scripts reads folders named N_name, N being how often each picture is repeated in an epoch; a picture
x.png has its caption in x.txt. Whatever does not fit it leaves out without an error
(train_network.py:574-579 of v0.10.1: "No data found", exit 0), so it is all told here.
"""

import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from kohya.dataset_config import Folder
from kohya.problem import Problem

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # train_util.py:104
UNREAD = (".avif", ".gif", ".heic", ".heif", ".jfif", ".jxl", ".tif", ".tiff")  # pictures all the same
CAPTIONS = (".txt", ".caption", ".tags", ".cap")  # what tools call their captions
CACHES = ".npz"  # latents that sd-scripts keeps beside a picture, and takes whatever the picture is now
FLAT_REPEATS = 10  # repeats for pictures that stand in no N_name folder
_JUNK = frozenset({"__macosx", "@eadir", "thumbs.db", "desktop.ini"})  # of macOS, Synology and Windows
_LONGEST = 100  # characters of a folder's name that is made up
_NUMBERED = re.compile(r"(\d+)_.*|(\d+)")  # `3` and `3_` are folders for sd-scripts too
_NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)  # there may be 100,000
class Picture:
    """A picture and its caption, by their paths below the data set's root."""

    path: str
    caption: str | None


@dataclass(frozen=True)
class Subset:
    """One folder as the trainer will see it: `N_name`, or any where a dataset_config says the rest."""

    folder: str
    repeats: int
    pictures: tuple[Picture, ...]
    caption_extension: str  # with its dot
    bytes: int = 0  # of its pictures and captions
    dataset: int = 0  # which [[datasets]] of a dataset_config it is in
    values: Mapping[str, Any] = field(default_factory=dict)  # what a dataset_config says for it


@dataclass(frozen=True)
class DataSet:
    """What will be trained on."""

    subsets: tuple[Subset, ...]
    notes: tuple[str, ...]

    @property
    def pictures(self) -> int:
        return sum(len(subset.pictures) for subset in self._once)

    @property
    def bytes(self) -> int:
        """Of its pictures and captions."""
        return sum(subset.bytes for subset in self._once)

    @property
    def repeated(self) -> int:
        """Pictures in one epoch, repeats counted."""
        return sum(len(subset.pictures) * subset.repeats for subset in self.subsets)

    @property
    def _once(self) -> Collection[Subset]:
        """One subset for each folder: a dataset_config may name one twice."""
        by_folder = {posixpath.dirname(one.pictures[0].path): one for one in self.subsets if one.pictures}
        return by_folder.values()

    @property
    def files(self) -> list[str]:
        """Every file that training needs, by its path below the root."""
        named = (name for subset in self.subsets for picture in subset.pictures
                 for name in (picture.path, picture.caption))  # fmt: skip
        return [name for name in named if name is not None]


def inspect(
    sizes: Mapping[str, int],
    where: str,
    *,
    caption_extension: str = ".txt",
    allow_missing_captions: bool = False,
    flat: bool = True,
) -> tuple[DataSet, list[Problem]]:
    """The data set that a listing (path below the root → bytes) shows, and all that is wrong with it.

    Pictures that all stand in the root are taken as one folder `10_<name>`, after the last part of `where`;
    not so unless `flat`: of regularisation pictures the folder's name is the class word.
    """
    folders, hidden = _sorted_out(sizes)
    pictured = {folder: found for folder, files in folders.items() if (found := _pictures(files))}
    problems: list[Problem] = []
    unread = [path for files in folders.values() for path in files if _ending(path) in UNREAD]
    if pictured and unread:
        wrong = f"sd-scripts reads {', '.join(PICTURES)} alone, and would leave out {_some(unread)}"
        problems.append(Problem(where, wrong, "Save them as .png or .jpg, or take them out"))
    notes: list[str] = []
    subsets: list[Subset] = []
    for folder, pictures in pictured.items():
        at = where if folder == "." else f"{where.rstrip('/')}/{folder}"
        trained = folder
        if folder == "." and len(pictured) == 1 and flat:
            name = _plain(PurePosixPath(where).name)
            trained = f"{FLAT_REPEATS}_{name}"
            notes.append(
                f"{_count(pictures)} in no N_name folder, taken as {trained}: each {FLAT_REPEATS} times an "
                f"epoch. To choose, move them to a folder such as 5_{name}"
            )
        elif problem := _misplaced(folder, pictures, where, at):
            problems.append(problem)
            continue
        subset = _subset(trained, _repeats(trained), folders[folder], sizes, caption_extension)
        problems += _picture_problems(subset, sizes, at)
        problems += _caption_problems(subset, folders[folder], sizes, at, allow_missing_captions)
        subsets.append(subset)
    if not pictured:
        files = [path for found in folders.values() for path in found]
        seen = f"among its {_count(files, 'file')}" if files else "in it"
        wrong = f"there is no picture ({', '.join(PICTURES)}) {seen}"
        problems.append(
            Problem(where, wrong, "Put pictures with captions into N_name folders such as 10_photo there")
        )
    notes += _left_out(folders, hidden, subsets)
    return DataSet(tuple(subsets), tuple(notes)), problems


def inspect_folders(
    sizes: Mapping[str, int], where: str, wanted: Sequence[Folder], *, allow_missing_captions: bool = False
) -> tuple[DataSet, list[Problem]]:
    """The data set that a dataset_config makes of a listing, one subset a folder, and all that is wrong.

    sd-scripts takes the pictures right inside each folder, and leaves out a folder that has none.
    """
    folders, hidden = _sorted_out(sizes)
    problems: list[Problem] = []
    subsets: list[Subset] = []
    for number, folder in enumerate(wanted):
        files = folders.get(folder.image_dir, [])
        if not _pictures(files):
            there = ", ".join([name for name, found in folders.items() if _pictures(found)][:5]) or "none"
            wrong = f'no picture is right inside the folder "{folder.image_dir}" of {where}'
            problems.append(Problem(folder.where, wrong, f"Name a folder with pictures; there are: {there}"))
        # A folder that two subsets name is linked twice: their captions may have two endings.
        name = f"{number}/{_plain(PurePosixPath(where, folder.image_dir).name)}"
        subset = _subset(name, folder.repeats, files, sizes, folder.caption_extension)
        subset = replace(subset, dataset=folder.dataset, values=folder.values)
        at = f"{where.rstrip('/')}/{folder.image_dir}"
        may_lack = allow_missing_captions or folder.is_reg or folder.has_class
        problems += _picture_problems(subset, sizes, at)
        problems += _caption_problems(subset, files, sizes, at, may_lack)
        subsets.append(subset)
    return DataSet(tuple(subsets), tuple(_left_out(folders, hidden, subsets))), problems


def link(data_set: DataSet, sources: Mapping[str, Path], root: Path) -> dict[Path, str]:
    """Make the trainer's tree under `root`: one folder a subset, links to the files in `sources`.

    The data set itself is never written to: what the trainer leaves beside its pictures (latent caches)
    lands in `root`. Endings come out in lower case, since sd-scripts does not see x.Jpg. Returns for each
    link the file's path below the data set's root.
    """
    links: dict[Path, str] = {}
    for picture, place, caption in places(data_set, root):
        links[place] = picture.path
        if picture.caption is not None:
            links[caption] = picture.caption
    for subset in data_set.subsets:
        (root / subset.folder).mkdir(parents=True)
    for made, path in links.items():
        made.symlink_to(sources[path])
    return links


def places(data_set: DataSet, root: Path) -> Iterator[tuple[Picture, Path, Path]]:
    """Every picture in order, where it stands in the trainer's tree, and where its caption does or would."""
    for subset in data_set.subsets:
        folder = root / subset.folder
        for picture in subset.pictures:
            name = made_name(picture.path)
            yield picture, folder / name, folder / f"{_stem(name)}{subset.caption_extension}"


def made_name(path: str) -> str:
    """A picture's name in the trainer's tree."""
    stem, ending = posixpath.splitext(posixpath.basename(path))
    return f"{stem}{ending.lower()}"


def as_given(text: str, origins: Mapping[str, str]) -> str:
    """A trainer's message with the paths in its own tree replaced by those that the user gave."""
    for path in sorted(origins, key=len, reverse=True):
        text = text.replace(path, origins[path])
    return text


def _sorted_out(sizes: Mapping[str, int]) -> tuple[dict[str, list[str]], list[str]]:
    """The files of each folder by their paths, and those that are hidden or no person put there."""
    folders: dict[str, list[str]] = defaultdict(list)
    hidden = []
    for path in sorted(sizes):
        if any(part.startswith(".") or part.lower() in _JUNK for part in path.split("/")):
            hidden.append(path)
        else:
            folders[posixpath.dirname(path) or "."].append(path)
    return dict(folders), hidden


def _pictures(files: Iterable[str]) -> list[str]:
    return [path for path in files if _ending(path) in PICTURES]


def _ending(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _subset(
    folder: str,
    repeats: int,
    files: Sequence[str],
    sizes: Mapping[str, int],
    caption_extension: str,
) -> Subset:
    """One folder; `files`: all that lies in it."""
    pictures, extension = _pictures(files), f".{caption_extension.removeprefix('.')}"
    own = {path: path for path in files}  # the listing's own strings: a copy of each would be kept
    captions = [_stem(path) + extension for path in pictures]
    if not all(name in own for name in captions):
        by_lower = {path.lower(): path for path in files}
        own |= {
            name: by_lower[name.lower()] for name in captions if name not in own and name.lower() in by_lower
        }
    found = [own.get(name) for name in captions]
    pairs = tuple(map(Picture, pictures, found))
    total = sum(sizes[path] for path in (*pictures, *filter(None, found)))
    return Subset(folder, repeats, pairs, extension, total)


def _stem(path: str) -> str:
    return posixpath.splitext(path)[0]


def _left_out(
    folders: Mapping[str, Sequence[str]], hidden: list[str], subsets: Sequence[Subset]
) -> Iterator[str]:
    """What lies there and is no part of the data set; what a problem tells of is not told again."""
    used = {name for subset in subsets for picture in subset.pictures
            for name in (picture.path, picture.caption)}  # fmt: skip
    endings = {*CAPTIONS, *(subset.caption_extension for subset in subsets)}
    left: dict[str, list[str]] = {"hidden file": hidden}
    for path in (path for files in folders.values() for path in files if path not in used):
        ending = _ending(path)
        if ending == CACHES:
            kind = "latent cache"
        elif ending in endings:
            kind = "caption without a picture"
        elif ending in PICTURES or ending in UNREAD:
            continue
        else:
            kind = "other file"
        left.setdefault(kind, []).append(path)
    for kind, paths in left.items():
        if paths:
            yield f"left out: {_some(paths, kind)}"


def _misplaced(folder: str, pictures: list[str], where: str, at: str) -> Problem | None:
    """What keeps sd-scripts from seeing a folder's pictures, if anything does."""
    last = folder.rsplit("/", 1)[-1]
    if folder == ".":
        wrong = f"sd-scripts does not look beside the folders, and would leave out {_some(pictures)}"
        return Problem(at, wrong, "Move them into an N_name folder such as 10_photo")
    if "/" in folder:
        wrong = f"sd-scripts does not look this deep, and would leave out {_some(pictures)}"
        fix = f"Move {last} up" if _repeats(last) else "Move them up into an N_name folder such as 10_photo"
        return Problem(at, wrong, f"{fix}, right below {where}")
    if not _NUMBERED.fullmatch(folder):
        wrong = f"the folder's name does not say how often to repeat its {_count(pictures)}"
        stem = re.sub(r"^\d+", "", folder) or folder
        return Problem(at, wrong, f"Rename it to 10_{stem.lstrip('_-')} or another N_name")
    if not _repeats(folder):
        return Problem(at, "its pictures are repeated 0 times", "Rename it to 1_name or more")
    return None


def _repeats(folder: str) -> int:
    """The N of N_name; 0 where there is none."""
    numbered = _NUMBERED.fullmatch(folder)
    return int(numbered[1] or numbered[2]) if numbered else 0


def _picture_problems(subset: Subset, sizes: Mapping[str, int], where: str) -> Iterator[Problem]:
    """What the listing tells of a folder's pictures."""
    if empty := [picture.path for picture in subset.pictures if sizes[picture.path] == 0]:
        yield Problem(where, f"{_some(empty)} with 0 bytes", "Upload them again, or take them out")
    same: dict[str, list[str]] = defaultdict(list)
    for picture in subset.pictures:
        same[_stem(picture.path).lower()].append(picture.path)
    groups = [paths for paths in same.values() if len(paths) > 1]
    one_stem = [len(set(map(_stem, paths))) < len(paths) for paths in groups]
    twins = [path for paths, one in zip(groups, one_stem, strict=True) if one for path in paths]
    if twins:
        wrong = f"{_some(twins)} with the same name, and so the same caption"
        yield Problem(where, wrong, "Rename one of each")
    if alike := [path for paths, one in zip(groups, one_stem, strict=True) if not one for path in paths]:
        wrong = f"{_some(alike)} whose names differ in upper and lower case alone"
        yield Problem(where, wrong, "Rename one of each: many disks would hold one of them only")


def _caption_problems(
    subset: Subset, files: Iterable[str], sizes: Mapping[str, int], where: str, allow_missing: bool
) -> Iterator[Problem]:
    """What the listing tells of a folder's captions. `files`: all that lies in the folder."""
    extension = subset.caption_extension
    missing = [picture.path for picture in subset.pictures if picture.caption is None]
    if missing and not allow_missing:
        wrong = (
            f"of {_count(subset.pictures)}, {len(missing)} without a caption in a {extension} file of the "
            f"same name: {_names(missing)}"
        )
        fix = "Add the captions, or set allow_missing_captions=true to train those on the folder's name"
        if others := _other_endings(missing, {path.lower() for path in files}):
            ending, count = others.most_common(1)[0]
            wrong += f"; {'it has' if count == 1 else f'{count} have'} a {ending} file"
            fix = f"Set caption_extension={ending}, or rename the captions to {extension}"
        yield Problem(where, wrong, fix)
    captions = [picture.caption for picture in subset.pictures if picture.caption is not None]
    if empty := [name for name in captions if sizes[name] == 0]:
        yield Problem(where, _some(empty, "empty caption"), "Write a caption, or delete the file")


def _other_endings(pictures: Iterable[str], there: Container[str]) -> Counter[str]:
    """How many of these pictures have a file beside them that looks like a caption, by its ending."""
    found: Counter[str] = Counter()
    for path in pictures:
        stem, ending = posixpath.splitext(path)
        tried = (*CAPTIONS, *(f"{ending}{caption}" for caption in CAPTIONS))  # a.caption, a.png.txt
        found.update(caption for caption in tried if f"{stem}{caption}".lower() in there)
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)[:_LONGEST].strip("_.") or "dataset"


def _count(names: Sized, noun: str = "picture") -> str:
    first = noun.partition(" without")[0]  # 2 captions without a picture
    return f"{len(names)} {first}{'' if len(names) == 1 else 's'}{noun[len(first) :]}"


def _some(names: Iterable[str], noun: str = "picture") -> str:
    """How many, and the first few by name: "4 pictures (a.png, b.png, c.png, …)"."""
    listed = list(names)
    return f"{_count(listed, noun)} ({_names(listed)})"


def _names(names: list[str]) -> str:
    shown = ", ".join(PurePosixPath(name).name for name in names[:_NAMES_SHOWN])
    return f"{shown}{', …' if len(names) > _NAMES_SHOWN else ''}"
