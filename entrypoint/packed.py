"""Many paths, and what belongs to each of them, in little more than their letters.

A bucket may have 100,000 pictures, and an object of Python for each path, size and ETag takes several times
the room of what is in it. So they are made when they are asked for, and not kept.
"""

from array import array
from bisect import bisect_left
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView
from itertools import pairwise
from typing import Protocol, TypeVar

T = TypeVar("T")
U = TypeVar("U")
T_co = TypeVar("T_co", covariant=True)


class Indexed(Protocol[T_co]):
    """What has a value at each place."""

    def __getitem__(self, place: int, /) -> T_co: ...


class Rows:
    """Bytes, a row after the other."""

    def __init__(self, rows: Iterable[bytes] = ()) -> None:
        self._content, self._ends = bytearray(), array("I", [0])  # 4 GiB at most: S3 lists that in hours
        for row in rows:
            self.append(row)

    def append(self, row: bytes) -> None:
        self._content += row
        self._ends.append(len(self._content))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, place: int) -> bytes:
        return bytes(self._content[self._ends[place] : self._ends[place + 1]])


class Packed(Mapping[str, T]):
    """Values by path, in the order of the paths.

    `paths` and `held` have each path and its value at one place. `places`: those that belong to the mapping,
    in the order of their paths; all of them, the last of each path, unless they are given.
    """

    def __init__(self, paths: Rows, held: Indexed[T], places: Sequence[int] | None = None) -> None:
        self._paths, self._held = paths, held
        self.places = _ordered(paths) if places is None else places

    def of(self, held: Indexed[U]) -> "Packed[U]":
        """Other values for the same paths."""
        return Packed(self._paths, held, self.places)

    def only(self, places: Sequence[int]) -> "Packed[T]":
        """A part. `places`: in the order of their paths."""
        return Packed(self._paths, self._held, places)

    def path(self, place: int) -> str:
        return decoded(self._paths[place])

    def value(self, place: int) -> T:
        return self._held[place]

    def find(self, path: str) -> int | None:
        """The place of a path."""
        row = encoded(path)
        at = bisect_left(self.places, row, key=self._paths.__getitem__)
        there = at < len(self.places) and self._paths[self.places[at]] == row
        return self.places[at] if there else None

    def __getitem__(self, path: str) -> T:
        place = self.find(path)
        if place is None:
            raise KeyError(path)
        return self.value(place)

    def __iter__(self) -> Iterator[str]:
        return map(self.path, self.places)

    def __len__(self) -> int:
        return len(self.places)

    def values(self) -> ValuesView[T]:
        return _Values(self)

    def items(self) -> ItemsView[str, T]:
        return _Items(self)


class _Values(ValuesView[T]):  # Mapping's own would look each path up
    _mapping: Packed[T]

    def __iter__(self) -> Iterator[T]:
        return map(self._mapping.value, self._mapping.places)


class _Items(ItemsView[str, T]):
    _mapping: Packed[T]

    def __iter__(self) -> Iterator[tuple[str, T]]:
        return zip(self._mapping, self._mapping.values(), strict=True)


def numbers(of: Mapping[str, int]) -> Packed[int]:
    """A mapping to numbers from 0 on, packed if it is not yet."""
    return of if isinstance(of, Packed) else Packed(Rows(map(encoded, of)), array("Q", of.values()))


def encoded(path: str) -> bytes:
    """A path as it is kept: the order of these bytes is that of the text, and S3's."""
    return path.encode("utf-8", "surrogatepass")  # a surrogate stands for a byte that is no text


def decoded(row: bytes) -> str:
    return row.decode("utf-8", "surrogatepass")


def _ordered(paths: Rows) -> Sequence[int]:
    every = range(len(paths))
    if all(one < after for one, after in pairwise(map(paths.__getitem__, every))):  # as S3 lists them
        return every
    last = {paths[place]: place for place in every}
    return array("I", (last[path] for path in sorted(last)))
