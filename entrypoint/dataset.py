"""Looking at a data set, and making the tree that the trainer sees.

sd-scripts reads folders named N_name, N being how often each picture is repeated in an epoch; a picture
x.png has its caption in x.txt. Whatever does not fit it leaves out without an error
(train_network.py:574-579 of v0.10.1: "No data found", exit 0), so it is all told here.
"""

import posixpath
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import compress, pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from entrypoint.packed import Packed, numbers
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


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture and its caption, by their paths below the data set's root."""

    path: str
    caption: str | None


class Pictures(Sequence[Picture]):
    """Pictures of a listing, each made when it is asked for: there may be 100,000.

    `own` has their places in the listing, `captions` one more than their captions' places, 0 for none.
    """

    def __init__(self, listed: Packed[int], own: "array[int]", captions: "array[int]") -> None:
        self.listed, self.own, self.captions = listed, own, captions

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return Pictures(self.listed, self.own[number], self.captions[number])
        path, caption = self.listed.path(self.own[number]), self.captions[number]
        return Picture(path, self.listed.path(caption - 1) if caption else None)

    @property
    def places(self) -> Iterator[int]:
        """Of the pictures, then of their captions."""
        yield from self.own
        yield from (caption - 1 for caption in self.captions if caption)

    @property
    def bytes(self) -> int:
        return sum(map(self.listed.value, self.places))


@dataclass(frozen=True)
class Subset:
    """One folder as the trainer will see it: `N_name`, or any where a dataset_config says the rest."""

    folder: str
    repeats: int
    pictures: Sequence[Picture]
    caption_extension: str  # with its dot
    bytes: int = 0  # of its pictures and captions
    dataset: int = 0  # which [[datasets]] of a dataset_config it is in
    values: Mapping[str, Any] = field(default_factory=dict)  # what a dataset_config says for it


@dataclass(frozen=True)
class DataSet:
    """What will be trained on."""

    subsets: tuple[Subset, ...]
    notes: tuple[str, ...]
    places: Sequence[int] = ()  # in the listing, of every file that training needs

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
    listed = numbers(sizes)
    folders, hidden = _sorted_out(listed)
    pictured = {name: files for name, files in folders.items() if files.pictures}
    problems: list[Problem] = []
    unread = [place for files in folders.values() for place in files.unread]
    if pictured and unread:
        wrong = f"sd-scripts reads {', '.join(PICTURES)} alone, and would leave out {_some(listed, unread)}"
        problems.append(Problem(where, wrong, "Save them as .png or .jpg, or take them out"))
    notes: list[str] = []
    subsets: list[Subset] = []
    taken: list[Pictures] = []
    extension = f".{caption_extension.removeprefix('.')}"
    for folder, files in pictured.items():
        at = where if folder == "." else f"{where.rstrip('/')}/{folder}"
        trained = folder
        if folder == "." and len(pictured) == 1 and flat:
            name = _plain(PurePosixPath(where).name)
            trained = f"{FLAT_REPEATS}_{name}"
            notes.append(
                f"{_count(len(files.pictures))} in no N_name folder, taken as {trained}: each {FLAT_REPEATS} "
                f"times an epoch. To choose, move them to a folder such as 5_{name}"
            )
        elif problem := _misplaced(folder, listed, files.pictures, where, at):
            problems.append(problem)
            continue
        pictures = _pictures(listed, files, extension)
        problems += _picture_problems(pictures, at)
        problems += _caption_problems(pictures, files, extension, at, allow_missing_captions)
        subsets.append(Subset(trained, _repeats(trained), pictures, extension, pictures.bytes))
        taken.append(pictures)
    if not pictured:
        count = sum(len(files.every) for files in folders.values())
        seen = f"among its {_count(count, 'file')}" if count else "in it"
        wrong = f"there is no picture ({', '.join(PICTURES)}) {seen}"
        problems.append(
            Problem(where, wrong, "Put pictures with captions into N_name folders such as 10_photo there")
        )
    used = _used(listed, taken)
    notes += _left_out(listed, folders, hidden, used, {extension})
    return DataSet(tuple(subsets), tuple(notes), _places(listed, used)), problems


def inspect_folders(
    sizes: Mapping[str, int], where: str, wanted: Sequence[Folder], *, allow_missing_captions: bool = False
) -> tuple[DataSet, list[Problem]]:
    """The data set that a dataset_config makes of a listing, one subset a folder, and all that is wrong.

    sd-scripts takes the pictures right inside each folder, and leaves out a folder that has none.
    """
    listed = numbers(sizes)
    folders, hidden = _sorted_out(listed)
    problems: list[Problem] = []
    subsets: list[Subset] = []
    taken: list[Pictures] = []
    for number, folder in enumerate(wanted):
        files = folders.get(folder.image_dir, _Files())
        if not files.pictures:
            there = ", ".join([name for name, found in folders.items() if found.pictures][:5]) or "none"
            wrong = f'no picture is right inside the folder "{folder.image_dir}" of {where}'
            problems.append(Problem(folder.where, wrong, f"Name a folder with pictures; there are: {there}"))
        # A folder that two subsets name is linked twice: their captions may have two endings.
        name = f"{number}/{_plain(PurePosixPath(where, folder.image_dir).name)}"
        extension = f".{folder.caption_extension.removeprefix('.')}"
        at = f"{where.rstrip('/')}/{folder.image_dir}"
        may_lack = allow_missing_captions or folder.is_reg or folder.has_class
        pictures = _pictures(listed, files, extension)
        problems += _picture_problems(pictures, at)
        problems += _caption_problems(pictures, files, extension, at, may_lack)
        subsets.append(
            Subset(name, folder.repeats, pictures, extension, pictures.bytes, folder.dataset, folder.values)
        )
        taken.append(pictures)
    used = _used(listed, taken)
    notes = _left_out(listed, folders, hidden, used, {subset.caption_extension for subset in subsets})
    return DataSet(tuple(subsets), tuple(notes), _places(listed, used)), problems


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


@dataclass(frozen=True)
class _Files:
    """What lies right inside a folder, by its places in the listing, in the order of the paths."""

    every: "array[int]" = field(default_factory=lambda: array("I"))
    pictures: "array[int]" = field(default_factory=lambda: array("I"))
    unread: "array[int]" = field(default_factory=lambda: array("I"))


def _sorted_out(listed: Packed[int]) -> tuple[dict[str, _Files], Sequence[int]]:
    """The files of each folder, and those that are hidden or no person put there."""
    folders: dict[str, _Files] = defaultdict(_Files)
    hidden, hides = array("I"), dict[str, bool]()
    for place in listed.places:
        folder, _, name = listed.path(place).rpartition("/")
        if folder not in hides:
            hides[folder] = any(map(_is_hidden, folder.split("/")))
        if hides[folder] or _is_hidden(name):
            hidden.append(place)
            continue
        files, lower = folders[folder or "."], name.lower()
        files.every.append(place)
        if lower.endswith(PICTURES):
            files.pictures.append(place)
        elif lower.endswith(UNREAD):
            files.unread.append(place)
    return dict(folders), hidden


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK


def _ending(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _pictures(listed: Packed[int], files: _Files, extension: str) -> Pictures:
    """The pictures of a folder with their captions."""
    there, captions = listed.only(files.every), array("I")
    for place in files.pictures:
        found = there.find(_stem(listed.path(place)) + extension)
        captions.append(0 if found is None else found + 1)
    if 0 in captions:
        ending = extension.lower()
        alike = ((listed.path(place).lower(), place) for place in files.every)
        by_lower = {path: place + 1 for path, place in alike if path.endswith(ending)}
        for number in (number for number, caption in enumerate(captions) if not caption):
            name = _stem(listed.path(files.pictures[number])) + extension
            captions[number] = by_lower.get(name.lower(), 0)
    return Pictures(listed, files.pictures, captions)


def _stem(path: str) -> str:
    return posixpath.splitext(path)[0]


def _used(listed: Packed[int], taken: Iterable[Pictures]) -> bytearray:
    """1 at each place of the listing that training needs."""
    used = bytearray(max(listed.places, default=-1) + 1)
    for pictures in taken:
        for place in pictures.places:
            used[place] = 1
    return used


def _places(listed: Packed[int], used: bytearray) -> "array[int]":
    return array("I", (place for place in listed.places if used[place]))


def _left_out(
    listed: Packed[int],
    folders: Mapping[str, _Files],
    hidden: Sequence[int],
    used: bytearray,
    captions: Set[str],
) -> Iterator[str]:
    """What lies there and is no part of the data set; what a problem tells of is not told again."""
    left: dict[str, list[int]] = {"hidden file": [*hidden]}
    for place in (place for files in folders.values() for place in files.every if not used[place]):
        ending = _ending(listed.path(place))
        if ending == CACHES:
            kind = "latent cache"
        elif ending in CAPTIONS or ending in captions:
            kind = "caption without a picture"
        elif ending in PICTURES or ending in UNREAD:
            continue
        else:
            kind = "other file"
        left.setdefault(kind, []).append(place)
    for kind, places in left.items():
        if places:
            yield f"left out: {_some(listed, places, kind)}"


def _misplaced(
    folder: str, listed: Packed[int], pictures: Sequence[int], where: str, at: str
) -> Problem | None:
    """What keeps sd-scripts from seeing a folder's pictures, if anything does."""
    last = folder.rsplit("/", 1)[-1]
    if folder == ".":
        wrong = f"sd-scripts does not look beside the folders, and would leave out {_some(listed, pictures)}"
        return Problem(at, wrong, "Move them into an N_name folder such as 10_photo")
    if "/" in folder:
        wrong = f"sd-scripts does not look this deep, and would leave out {_some(listed, pictures)}"
        fix = f"Move {last} up" if _repeats(last) else "Move them up into an N_name folder such as 10_photo"
        return Problem(at, wrong, f"{fix}, right below {where}")
    if not _NUMBERED.fullmatch(folder):
        wrong = f"the folder's name does not say how often to repeat its {_count(len(pictures))}"
        stem = re.sub(r"^\d+", "", folder) or folder
        return Problem(at, wrong, f"Rename it to 10_{stem.lstrip('_-')} or another N_name")
    if not _repeats(folder):
        return Problem(at, "its pictures are repeated 0 times", "Rename it to 1_name or more")
    return None


def _repeats(folder: str) -> int:
    """The N of N_name; 0 where there is none."""
    numbered = _NUMBERED.fullmatch(folder)
    return int(numbered[1] or numbered[2]) if numbered else 0


def _picture_problems(pictures: Pictures, where: str) -> Iterator[Problem]:
    """What the listing tells of a folder's pictures."""
    listed = pictures.listed
    if empty := [place for place in pictures.own if listed.value(place) == 0]:
        yield Problem(where, f"{_some(listed, empty)} with 0 bytes", "Upload them again, or take them out")
    marks = [hash(_stem(listed.path(place)).lower()) for place in pictures.own]  # smaller than the texts
    marks.sort()
    twice = {one for one, after in pairwise(marks) if one == after}
    same: dict[str, list[int]] = defaultdict(list)
    for place in pictures.own if twice else ():
        stem = _stem(listed.path(place)).lower()
        if hash(stem) in twice:
            same[stem].append(place)
    groups = [places for places in same.values() if len(places) > 1]
    one_stem = [len({_stem(listed.path(place)) for place in places}) < len(places) for places in groups]
    if twins := [place for places in compress(groups, one_stem) for place in places]:
        wrong = f"{_some(listed, twins)} with the same name, and so the same caption"
        yield Problem(where, wrong, "Rename one of each")
    if alike := [place for places, one in zip(groups, one_stem, strict=True) if not one for place in places]:
        wrong = f"{_some(listed, alike)} whose names differ in upper and lower case alone"
        yield Problem(where, wrong, "Rename one of each: many disks would hold one of them only")


def _caption_problems(
    pictures: Pictures, files: _Files, extension: str, where: str, allow_missing: bool
) -> Iterator[Problem]:
    """What the listing tells of a folder's captions. `files`: all that lies in the folder."""
    listed = pictures.listed
    missing = [place for place, caption in zip(pictures.own, pictures.captions, strict=True) if not caption]
    if missing and not allow_missing:
        wrong = (
            f"of {_count(len(pictures))}, {len(missing)} without a caption in a {extension} file of the "
            f"same name: {_names(listed, missing)}"
        )
        fix = (
            "Add the captions, or set allow_missing_captions=true to train those on the folder's name, or "
            "caption=wd14 to have them written"
        )
        there = {listed.path(place).lower() for place in files.every}
        if others := _other_endings(map(listed.path, missing), there):
            ending, count = others.most_common(1)[0]
            wrong += f"; {'it has' if count == 1 else f'{count} have'} a {ending} file"
            fix = f"Set caption_extension={ending}, or rename the captions to {extension}"
        yield Problem(where, wrong, fix)
    if empty := [one - 1 for one in pictures.captions if one and listed.value(one - 1) == 0]:
        yield Problem(where, _some(listed, empty, "empty caption"), "Write a caption, or delete the file")


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


def _count(number: int, noun: str = "picture") -> str:
    first = noun.partition(" without")[0]  # 2 captions without a picture
    return f"{number} {first}{'' if number == 1 else 's'}{noun[len(first) :]}"


def _some(listed: Packed[int], places: Sequence[int], noun: str = "picture") -> str:
    """How many, and the first few by name: "4 pictures (a.png, b.png, c.png, …)"."""
    return f"{_count(len(places), noun)} ({_names(listed, places)})"


def _names(listed: Packed[int], places: Sequence[int]) -> str:
    shown = ", ".join(PurePosixPath(listed.path(place)).name for place in places[:_NAMES_SHOWN])
    return f"{shown}{', …' if len(places) > _NAMES_SHOWN else ''}"
