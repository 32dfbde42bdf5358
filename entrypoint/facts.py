"""What training on a data set will come to: pictures, buckets, batches, steps, epochs, bytes.

As sd-scripts counts (kohya/buckets.py has the sources). Kept in job.json, and told by the log and by `check`.
"""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from entrypoint.dataset import DataSet, Subset, made_name
from kohya.buckets import Buckets, Size, reg_repeats, steps
from kohya.problem import counted

_FOLDERS_SHOWN, _BUCKETS_SHOWN = 4, 6  # in a log
Row = tuple[str, ...]


@dataclass(frozen=True)
class FolderFacts:
    """One folder of pictures."""

    folder: str  # as the trainer sees it
    pictures: int
    repeats: int  # of each picture in an epoch
    captions: int
    bytes: int  # of pictures and captions
    is_reg: bool

    @property
    def row(self) -> Row:
        """Its name, and what is in it."""
        return (
            f"{self.folder}{' (regularisation)' if self.is_reg else ''}",
            f"{counted(self.pictures, 'picture')} × {self.repeats}",
            counted(self.captions, "caption"),
            _megabytes(self.bytes),
        )


@dataclass(frozen=True)
class BucketFacts:
    """Pictures that are trained at one size."""

    width: int
    height: int
    pictures: int  # in an epoch, repeats and regularisation pictures counted

    @property
    def size(self) -> str:
        return f"{self.width}×{self.height}"


@dataclass(frozen=True)
class Facts:
    """A data set under a configuration. Without the pictures' sizes there are no buckets."""

    folders: tuple[FolderFacts, ...]
    buckets: tuple[BucketFacts, ...]  # the smallest width first
    pictures: int  # without regularisation pictures; where a folder is named twice, each counts once
    with_repeats: int  # in an epoch, without regularisation pictures
    bytes: int  # of all folders, each counted once
    batches: int  # in an epoch, of all GPUs together
    steps: int  # optimizer steps of the whole run
    epochs: int
    in_epochs: bool  # whether max_train_epochs says how long it takes; if not, max_train_steps
    exact: bool  # if not, batches are the least that there can be, and steps in_epochs; else epochs the most

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self, folders: int, buckets: int) -> tuple[list[Row], list[Row], Row]:
        """What to tell of the folders, the buckets and the run; at most so many folders and buckets."""
        shown = [one.row for one in self.folders[:folders]]
        if left := self.folders[folders:]:
            pictures = counted(sum(one.pictures for one in left), "picture")
            shown.append((f"and {counted(len(left), 'more folder')}", pictures))
        largest = sorted(self.buckets, key=lambda one: -one.pictures)
        sizes: list[Row] = [(one.size, f"{one.pictures:,}") for one in largest[:buckets]]
        if left_over := largest[buckets:]:
            sizes.append((f"and {len(left_over):,} more", f"{sum(one.pictures for one in left_over):,}"))
        least, most = ("", "") if self.exact else ("at least ", "at most ")
        run = (
            f"{least}{counted(self.batches, 'batch', 'batches')} an epoch",
            f"{'' if self.in_epochs else most}{counted(self.epochs, 'epoch')}",
            f"{least if self.in_epochs else ''}{counted(self.steps, 'step')}",
        )
        return shown, sizes, run

    def lines(self) -> list[str]:
        """At most seven lines for a log."""
        folders, buckets, run = self.rows(_FOLDERS_SHOWN, _BUCKETS_SHOWN)
        told = [f"{name}: {', '.join(rest)}" for name, *rest in folders]
        if buckets:
            told.append(f"buckets {', '.join(map(': '.join, buckets))}")
        return [*told, ", ".join(run)]


def facts(
    data_set: DataSet,
    reg: DataSet | None,
    values: Mapping[str, Any],
    sizes: tuple[Sequence[Size], Sequence[Size]] | None = None,
    processes: int = 1,
) -> Facts:
    """What a data set comes to with these options of sd-scripts.

    `sizes`: of every picture in order, then of the regularisation pictures; None where they are not known.
    `processes`: GPUs that train together. With validation_split and no validation_seed sd-scripts draws the
    pictures that it leaves out, and with several folders of regularisation pictures takes these in the order
    of its disk: then the buckets are those of one order among several.
    """
    placed = [*_placed(data_set, sizes and sizes[0]), *(_placed(reg, sizes and sizes[1]) if reg else ())]
    kinds = [False] * len(data_set.subsets) + [True] * (len(reg.subsets) if reg else 0)
    counted: Counter[Size] = Counter()
    batches, exact = 0, True
    for number in sorted({subset.dataset for subset, _ in placed}):
        inside = [(*one, kind) for one, kind in zip(placed, kinds, strict=True) if one[0].dataset == number]
        own = {**values, **inside[0][0].values}
        found, sure = _epoch(inside, own)
        size = int(own.get("batch_size") or own.get("train_batch_size") or 1)
        batches += sum(math.ceil(count / size) for count in found.values())
        counted += found
        exact = exact and sure
    count, epochs = steps(batches, values, processes)
    folders = tuple(_folder(subset, kind) for (subset, _), kind in zip(placed, kinds, strict=True))
    return Facts(
        folders,
        tuple(BucketFacts(*size, pictures) for size, pictures in sorted(counted.items())) if sizes else (),
        data_set.pictures,
        data_set.repeated,
        data_set.bytes + (reg.bytes if reg else 0),
        batches,
        count,
        epochs,
        values.get("max_train_epochs") is not None,
        exact,
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


_Placed = tuple[Subset, Sequence[Size] | None]


def _placed(data_set: DataSet, sizes: Sequence[Size] | None) -> list[_Placed]:
    """Each folder with its pictures' sizes."""
    found, start = [], 0
    for subset in data_set.subsets:
        end = start + len(subset.pictures)
        found.append((subset, sizes[start:end] if sizes is not None else None))
        start = end
    return found


def _folder(subset: Subset, is_reg: bool) -> FolderFacts:
    captions = sum(picture.caption is not None for picture in subset.pictures)
    return FolderFacts(subset.folder, len(subset.pictures), subset.repeats, captions, subset.bytes, is_reg)


def _epoch(
    inside: Sequence[tuple[Subset, Sequence[Size] | None, bool]], values: Mapping[str, Any]
) -> tuple[Counter[Size], bool]:
    """Pictures of one of the trainer's data sets by bucket, and whether that is certain."""
    buckets = Buckets.of(values)
    split = float(values.get("validation_split") or 0)
    trained = Counter(
        (size, subset.repeats)
        for subset, sizes, is_reg in inside
        if not is_reg
        for size in _kept(subset, sizes, split, values.get("validation_seed"))
    )
    reg = [
        (size, subset.repeats)
        for subset, sizes, is_reg in inside
        if is_reg
        for size in (sizes if sizes is not None else [None] * len(subset.pictures))
    ]
    each = [(size, repeat * alike) for (size, repeat), alike in trained.items()]
    repeats = reg_repeats(sum(count for _, count in each), [repeat for _, repeat in reg])
    found: Counter[Size] = Counter()
    for size, count in (*each, *((size, count) for (size, _), count in zip(reg, repeats, strict=True))):
        found[buckets.choose(size)[0] if size is not None else buckets.resolution] += count
    known = not buckets.enabled or all(sizes is not None for _, sizes, _ in inside)
    drawn = split > 0 and values.get("validation_seed") is None and buckets.enabled
    return +found, known and not drawn


def _kept(
    subset: Subset, sizes: Sequence[Size] | None, split: float, seed: int | None
) -> Sequence[Size | None]:
    """The pictures that are trained on, those for validation left out; train_util.py:142-178."""
    every: list[Size | None] = list(sizes) if sizes is not None else [None] * len(subset.pictures)
    if not 0 < split <= 1:
        return every
    if seed is not None:
        order = sorted(range(len(every)), key=lambda number: made_name(subset.pictures[number].path))
        every = [every[number] for number in order]
        random.Random(seed).shuffle(every)
    return every[: math.ceil(len(every) * (1 - split))]
