"""The header of a safetensors file, read from a file that nobody vouches for.

The layout (https://github.com/huggingface/safetensors, "Format"): 8 bytes with the header's length,
little-endian; the header, JSON, tensor name → dtype, shape, data_offsets; the numbers, without a gap.
"""

import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

from entrypoint.failures import JobError

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_COMMAS = 1_000_000  # in a header; SDXL's has 15,000. Parsed, a header may take 60 times its bytes
Header = Mapping[str, Any]

FIX = "Give a Stable Diffusion 1.5 or SDXL checkpoint as one .safetensors file"
_DAMAGED = "it is damaged"
_AGAIN = "Download or upload it again, and compare its size and checksum"

BYTES = {  # of a number, by dtype: all that safetensors 0.4.5 knows
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

_LFS = "it is a pointer of Git LFS, and not the file that it points to"
_PAGE = "it is a web page, and not the file that the page is about"
_DOWNLOAD = "Download it with the token or login that its site asks for"
_BEGINNINGS: Mapping[bytes, tuple[str, str]] = {  # of files that are often taken for safetensors
    b"version https://git-lfs": (_LFS, "Type: git lfs pull"),
    b"<!DOCTYPE": (_PAGE, _DOWNLOAD),
    b"<!doctype": (_PAGE, _DOWNLOAD),
    b"<html": (_PAGE, _DOWNLOAD),
    b"GGUF": ("it is a GGUF file, whose weights are quantized for drawing", FIX),
    b"PK\x03\x04": ("it is a zip, as a .ckpt is, and not a safetensors file", "If it is one, name it .ckpt"),
    b"\x80\x02": ("it is a pickle, as an old .ckpt is, and not a safetensors file", FIX),
}
_COMPRESSED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7z",
}  # fmt: skip


class WrongFile(ValueError):
    """The file is not what it was given as. Its text names what it is instead; `fix` is the way out."""

    def __init__(self, wrong: str, fix: str = FIX) -> None:
        super().__init__(wrong)
        self.fix = fix


class NotABaseModel(WrongFile):
    """The file is not a base model that can be trained."""


def read_header(file: BinaryIO, size: int) -> Header:
    """The tensors that the safetensors file of `size` bytes says it has, name → dtype, shape, data_offsets.

    Reads the header only. Raises NotABaseModel when the file is no safetensors file, or a damaged one.
    """
    return read(file, size)[0]


def read(file: BinaryIO, size: int) -> tuple[Header, Mapping[str, str]]:
    """The same, and the metadata. `file` then stands where the numbers begin."""
    start = file.tell()
    first = file.read(24)
    length = int.from_bytes(first[:8], "little")
    if not 2 <= length <= size - 8 or first[8:9] != b"{":
        raise NotABaseModel(*_other_file(first, length, size))
    if length > MAX_HEADER:
        raise NotABaseModel(f"its header has {length:,} bytes, and the format allows {MAX_HEADER:,}")
    file.seek(start + 8)
    header = _parsed(file.read(length))
    metadata = header.pop("__metadata__", None)
    if metadata is None:  # as JSON's null, too
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise NotABaseModel(f"{_DAMAGED}: its metadata are no table of texts", _AGAIN)
    end = _end_of_numbers(header)
    if end + 8 + length != size:
        wrong = f"its header describes {end + 8 + length:,} bytes and it has {size:,}"
        raise NotABaseModel(f"{wrong}: it is cut off or damaged", _AGAIN)
    return header, metadata


def _other_file(first: bytes, length: int, size: int) -> tuple[str, str]:
    """What a file is that does not begin as safetensors do, and the way out."""
    if size == 0:
        return "it is empty", _AGAIN
    for beginning, told in _BEGINNINGS.items():
        if first.startswith(beginning):
            return told
    if how := compression(first):
        return f"it is compressed with {how}", "Unpack it, and give the model itself"
    if first[8:9] == b"{" and size - 8 < length <= MAX_HEADER:
        return f"its header has {length:,} bytes and the whole file {size:,}: it is cut off", _AGAIN
    return "it is not a safetensors file (its first 8 bytes give no sensible header length)", FIX


def compression(first: bytes) -> str | None:
    """What a file is compressed with that begins so."""
    return next((how for beginning, how in _COMPRESSED.items() if first.startswith(beginning)), None)


def size_of(fact: Mapping[str, Any]) -> int:
    """The bytes of a tensor's numbers, by its dtype and shape."""
    shape: list[int] = fact["shape"]
    return math.prod(shape) * BYTES[fact["dtype"]]


def _parsed(content: bytes) -> dict[str, Any]:
    """The header as JSON. Raises NotABaseModel; takes no more memory than MAX_COMMAS allows."""
    if content.count(b",") > MAX_COMMAS:
        raise NotABaseModel(f"{_DAMAGED}: its header lists more than any model has", _AGAIN)
    try:
        header: dict[str, Any] = json.loads(content.decode(), object_pairs_hook=_once)
    except WrongFile:
        raise
    except (ValueError, RecursionError) as error:  # of UTF-8 as well
        raise NotABaseModel(f"{_DAMAGED}: its header is not JSON ({_why(error)})", _AGAIN) from error
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of the header. A name that stands twice would count as its last."""
    table = dict(pairs)
    if len(table) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise NotABaseModel(f"{_DAMAGED}: its header names {shown(twice)} twice", _AGAIN)
    return table


def _end_of_numbers(header: Header) -> int:
    """How many bytes of numbers the header describes. Raises NotABaseModel where they do not fit together."""
    places = sorted((*_place(name, fact), name) for name, fact in header.items())
    before, last = 0, "the header"
    for begin, end, name in places:
        if begin != before:
            how = "overlaps" if begin < before else "leaves a gap after"
            raise NotABaseModel(f"{_DAMAGED}: {shown(name)} {how} {shown(last)}", _AGAIN)
        before, last = end, name
    return before


def _place(name: str, fact: object) -> tuple[int, int]:
    """Where a tensor's numbers begin and end."""
    match fact:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if (
            type(begin) is int and type(end) is int
        ):
            pass
        case _:
            raise NotABaseModel(f"{_DAMAGED}: {shown(name)} lacks its dtype, shape or data_offsets", _AGAIN)
    if dtype not in BYTES:
        raise NotABaseModel(f"{shown(name)} is of the type {shown(dtype)}, which sd-scripts cannot load")
    if len(shape) > 8 or not all(type(side) is int and 0 <= side < 1 << 48 for side in shape):
        raise NotABaseModel(f"{_DAMAGED}: {shown(name)} has no sensible shape", _AGAIN)
    if size_of({"dtype": dtype, "shape": shape}) != end - begin:
        wrong = f"{shown(name)}, {dtype} {shape}, does not fill its {end - begin:,} bytes"
        raise NotABaseModel(f"{_DAMAGED}: {wrong}", _AGAIN)
    return begin, end


def shown(name: str) -> str:
    """A name out of a file, as it can stand in a message: one short line."""
    plain = name if name.isprintable() else ascii(name)[1:-1]
    return plain if len(plain) <= 80 else f"{plain[:77]}…"


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, json.JSONDecodeError) else type(error).__name__


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Take whatever a library raises over a hostile file for what it is: a damaged one. NotABaseModel.

    zipfile and tarfile document a few errors and raise many more. What the disk or S3 says goes through.
    """
    try:
        yield
    except (WrongFile, OSError, JobError):
        raise
    except Exception as error:
        wrong = f"it is no {what}, or a damaged one ({type(error).__name__}: {shown(str(error))})"
        raise NotABaseModel(wrong, _AGAIN) from error


class Sparing:
    """A file for a library that reads as much as a header tells it to: raises over more than `budget` bytes.

    Without it a few hostile bytes can ask for all memory, or for gigabytes out of S3.
    """

    def __init__(self, file: BinaryIO, size: int, budget: int) -> None:
        self._file, self._size, self._left, self._start = file, size, budget, file.tell()

    def read(self, length: int = -1) -> bytes:
        length = self._size - self.tell() if length < 0 else min(length, self._size - self.tell())
        self._left -= max(0, length)
        if self._left < 0:
            raise NotABaseModel("its directory is larger than that of any model", _AGAIN)
        return self._file.read(max(0, length))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._size}[whence]
        if target < 0:
            raise ValueError("seeks to before its beginning")
        return self._file.seek(self._start + target) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seekable(self) -> bool:
        return True
