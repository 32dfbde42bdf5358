"""Looking at a data set, and making the tree that the trainer sees.

sd-scripts reads folders named N_name, N being how often each picture is repeated in an epoch; a picture
x.png has its caption in x.txt. Whatever does not fit it leaves out without an error
(train_network.py:574-579 of v0.10.1: "No data found", exit 0), so it is all told here.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kohya.dataset_config import Folder
from kohya.problem import Problem

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # train_util.py:104
UNREAD = (".avif", ".gif", ".heic", ".heif", ".jfif", ".jxl", ".tif", ".tiff")  # pictures all the same
FLAT_REPEATS = 10  # repeats for pictures that stand in no N_name folder
_NUMBERED = re.compile(r"(\d+)_.*|(\d+)")  # `3` and `3_` are folders for sd-scripts too
_NAMES_SHOWN = 3


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class DataSet:
    """What will be trained on."""

    subsets: tuple[Subset, ...]
    notes: tuple[str, ...]

    @property
    def pictures(self) -> int:
        return sum(len(subset.pictures) for subset in self.subsets)

    @property
    def repeated(self) -> int:
        """Pictures in one epoch, repeats counted."""
        return sum(len(subset.pictures) * subset.repeats for subset in self.subsets)

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
    visible, folders = _folders(sizes)
    problems: list[Problem] = []
    if folders and (unread := [path for path in visible if PurePosixPath(path).suffix.lower() in UNREAD]):
        wrong = f"sd-scripts reads {', '.join(PICTURES)} alone, and would leave out {_some(unread)}"
        problems.append(Problem(where, wrong, "Save them as .png or .jpg, or take them out"))
    notes: list[str] = []
    subsets: list[Subset] = []
    for folder, pictures in folders.items():
        at = where if folder == "." else f"{where.rstrip('/')}/{folder}"
        trained = folder
        if folder == "." and len(folders) == 1 and flat:
            name = _plain(PurePosixPath(where).name)
            trained = f"{FLAT_REPEATS}_{name}"
            notes.append(
                f"{_count(pictures)} in no N_name folder, taken as {trained}: each {FLAT_REPEATS} times an "
                f"epoch. To choose, move them to a folder such as 5_{name}"
            )
        elif problem := _misplaced(folder, pictures, where, at):
            problems.append(problem)
            continue
        subset = _subset(trained, _repeats(trained), pictures, visible, caption_extension)
        problems += _caption_problems(subset, visible, at, allow_missing_captions)
        subsets.append(subset)
    if not folders:
        seen = f"among its {_count(list(visible), 'file')}" if visible else "in it"
        wrong = f"there is no picture ({', '.join(PICTURES)}) {seen}"
        problems.append(
            Problem(where, wrong, "Put pictures with captions into N_name folders such as 10_photo there")
        )
    return DataSet(tuple(subsets), tuple(notes)), problems


def inspect_folders(
    sizes: Mapping[str, int], where: str, wanted: Sequence[Folder], *, allow_missing_captions: bool = False
) -> tuple[DataSet, list[Problem]]:
    """The data set that a dataset_config makes of a listing, one subset a folder, and all that is wrong.

    sd-scripts takes the pictures right inside each folder, and leaves out a folder that has none.
    """
    visible, folders = _folders(sizes)
    problems: list[Problem] = []
    subsets: list[Subset] = []
    for number, folder in enumerate(wanted):
        pictures = folders.get(folder.image_dir, [])
        if not pictures:
            there = ", ".join(sorted(folders)[:5]) or "none"
            wrong = f'no picture is right inside the folder "{folder.image_dir}" of {where}'
            problems.append(Problem(folder.where, wrong, f"Name a folder with pictures; there are: {there}"))
        # A folder that two subsets name is linked twice: their captions may have two endings.
        name = f"{number}/{_plain(PurePosixPath(where, folder.image_dir).name)}"
        subset = _subset(name, folder.repeats, pictures, visible, folder.caption_extension)
        at = f"{where.rstrip('/')}/{folder.image_dir}"
        may_lack = allow_missing_captions or folder.is_reg or folder.has_class
        problems += _caption_problems(subset, visible, at, may_lack)
        subsets.append(subset)
    return DataSet(tuple(subsets), ()), problems


def link(data_set: DataSet, sources: Mapping[str, Path], root: Path) -> dict[Path, str]:
    """Make the trainer's tree under `root`: one folder a subset, links to the files in `sources`.

    The data set itself is never written to: what the trainer leaves beside its pictures (latent caches)
    lands in `root`. Endings come out in lower case, since sd-scripts does not see x.Jpg. Returns for each
    link the file's path below the data set's root.
    """
    links: dict[Path, str] = {}
    for subset in data_set.subsets:
        folder = root / subset.folder
        folder.mkdir(parents=True)
        for picture in subset.pictures:
            name = PurePosixPath(picture.path)
            links[folder / f"{name.stem}{name.suffix.lower()}"] = picture.path
            if picture.caption is not None:
                links[folder / f"{name.stem}{subset.caption_extension}"] = picture.caption
    for made, path in links.items():
        made.symlink_to(sources[path])
    return links


def as_given(text: str, origins: Mapping[str, str]) -> str:
    """A trainer's message with the paths in its own tree replaced by those that the user gave."""
    for path in sorted(origins, key=len, reverse=True):
        text = text.replace(path, origins[path])
    return text


def _folders(sizes: Mapping[str, int]) -> tuple[dict[str, int], dict[str, list[str]]]:
    """The files that are not hidden, and the pictures among them by their folder."""
    visible = {
        path: size
        for path, size in sizes.items()
        if not any(part.startswith(".") for part in path.split("/"))
    }
    folders: dict[str, list[str]] = defaultdict(list)
    for path in sorted(visible):
        if PurePosixPath(path).suffix.lower() in PICTURES:
            folders[str(PurePosixPath(path).parent)].append(path)
    return visible, folders


def _subset(
    folder: str, repeats: int, pictures: list[str], sizes: Mapping[str, int], caption_extension: str
) -> Subset:
    extension = f".{caption_extension.removeprefix('.')}"
    by_lower = {path.lower(): path for path in sizes}
    found = tuple(Picture(path, _caption(path, sizes, by_lower, extension)) for path in pictures)
    return Subset(folder, repeats, found, extension)


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


def _caption_problems(
    subset: Subset, sizes: Mapping[str, int], where: str, allow_missing: bool
) -> list[Problem]:
    """What is wrong with the captions of a folder."""
    found, extension = subset.pictures, subset.caption_extension
    pictures = [picture.path for picture in found]
    problems = []
    missing = [picture.path for picture in found if picture.caption is None]
    if missing and not allow_missing:
        wrong = (
            f"of {_count(pictures)}, {len(missing)} without a caption in a {extension} file of the same name"
        )
        wrong += f": {_names(missing)}"
        fix = "Add the captions, or set allow_missing_captions=true to train those on the folder's name"
        problems.append(Problem(where, wrong, fix))
    empty = [
        picture.caption for picture in found if picture.caption is not None and sizes[picture.caption] == 0
    ]
    if empty:
        wrong = _some(empty, "empty caption")
        problems.append(Problem(where, wrong, "Write a caption, or delete the file"))
    stems = defaultdict(list)
    for path in pictures:
        stems[str(PurePosixPath(path).with_suffix("")).lower()].append(path)
    if twins := [path for paths in stems.values() if len(paths) > 1 for path in paths]:
        wrong = f"{_some(twins)} with the same name, and so the same caption"
        problems.append(Problem(where, wrong, "Rename one of each"))
    return problems


def _caption(path: str, sizes: Mapping[str, int], by_lower: Mapping[str, str], extension: str) -> str | None:
    name = f"{PurePosixPath(path).with_suffix('')}{extension}"
    return name if name in sizes else by_lower.get(name.lower())


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("_.") or "dataset"


def _count(names: list[str], noun: str = "picture") -> str:
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'}"


def _some(names: Iterable[str], noun: str = "picture") -> str:
    """How many, and the first few by name: "4 pictures (a.png, b.png, c.png, …)"."""
    listed = list(names)
    return f"{_count(listed, noun)} ({_names(listed)})"


def _names(names: list[str]) -> str:
    shown = ", ".join(PurePosixPath(name).name for name in names[:_NAMES_SHOWN])
    return f"{shown}{', …' if len(names) > _NAMES_SHOWN else ''}"
