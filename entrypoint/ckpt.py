"""A .ckpt, in which torch.save keeps a model: its tensors, found and copied without running any of it.

PyTorch 1.6 and later (torch/serialization.py) write a zip: <name>/data.pkl, a pickle in which tensors refer
to storages, and <name>/data/<key>, the storages' numbers, not compressed.
"""

import json
import mmap
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from entrypoint import pickled
from entrypoint.header import BYTES, FIX, NotABaseModel, Sparing, guarded, shown
from entrypoint.pickled import Tensor

MAX_PICKLE = 8_000_000  # bytes of data.pkl; SDXL's has 0.5 million
_DIRECTORY = 32_000_000  # bytes of the zip's directory; SDXL's has 0.2 million
MAX_READ = _DIRECTORY + MAX_PICKLE  # bytes, of the whole file
_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # of torch.save before 1.6
_SAVE_AGAIN = (
    "Take the model's .safetensors; or load it where you trust it, and save its tensors as safetensors"
)


def read_header(file: BinaryIO, size: int) -> Mapping[str, Any]:
    """The tensors of a .ckpt of `size` bytes, name → dtype, shape. Reads its directory and its pickle only.

    Raises NotABaseModel where it is none, is damaged, or would run code, naming what it would call.
    """
    tensors, _ = _read(file, size)
    return {name: {"dtype": one.storage.dtype, "shape": list(one.shape)} for name, one in tensors.items()}


def convert(source: Path, target: Path) -> None:
    """Write the tensors of a .ckpt as safetensors. Raises NotABaseModel as `read_header` does, and OSError.

    The numbers are copied as they are, one tensor at a time; the source is mapped, not read into memory.
    """
    size = source.stat().st_size
    with source.open("rb") as file, target.open("wb") as out:
        tensors, entries = _read(file, size)
        header, begin = dict[str, Any](), 0
        for name, one in sorted(tensors.items(), key=lambda item: -BYTES[item[1].storage.dtype]):  # aligned
            place = begin, begin + one.bytes
            header[name] = {"dtype": one.storage.dtype, "shape": one.shape, "data_offsets": place}
            begin += one.bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        out.write(len(text).to_bytes(8, "little") + text)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with guarded(".ckpt"):
            for name in header:
                one = tensors[name]
                out.write(np.ascontiguousarray(_numbers(mapped, entries[one.storage.key], one)).data)


def _numbers(mapped: mmap.mmap, entry: zipfile.ZipInfo, tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor, as bytes of their width. Raises NotABaseModel and ValueError."""
    # an entry has a header of its own, whose length the directory does not say
    local = mapped[entry.header_offset : entry.header_offset + 30]
    begin = entry.header_offset + 30 + sum(int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
    if local[:4] != b"PK\x03\x04" or begin + entry.file_size > len(mapped):
        raise NotABaseModel(f"its {shown(entry.filename)} is not where its directory says", _SAVE_AGAIN)
    width = BYTES[tensor.storage.dtype]
    flat = np.frombuffer(mapped, f"V{width}", tensor.storage.numbers, begin)[tensor.offset :]
    steps = [stride * width for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, steps, writeable=False)


def _read(file: BinaryIO, size: int) -> tuple[dict[str, Tensor], dict[str, zipfile.ZipInfo]]:
    """The tensors by name, and the storages' places in the zip by key. Every tensor lies in its storage."""
    start = file.tell()
    first = file.read(16)
    file.seek(start)
    if not first:
        raise NotABaseModel("it is empty", _SAVE_AGAIN)
    if first.startswith(_MAGIC):
        raise NotABaseModel("it is a .ckpt as PyTorch wrote it before 1.6", _SAVE_AGAIN)
    if first[8:9] == b"{":
        raise NotABaseModel("it is a safetensors file by its content", "Name it .safetensors")
    if not first.startswith(b"PK\x03\x04"):
        raise NotABaseModel("it is no .ckpt as PyTorch writes it since 1.6, a zip", FIX)
    with guarded(".ckpt"), zipfile.ZipFile(cast(Any, Sparing(file, size, MAX_READ))) as archive:
        found = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
        if len(found) != 1:
            raise NotABaseModel("it is a zip without a data.pkl, and no .ckpt", FIX)
        if found[0].file_size > MAX_PICKLE or found[0].compress_type != zipfile.ZIP_STORED:
            raise NotABaseModel("its data.pkl is larger than that of any model, or compressed", FIX)
        root = found[0].filename.removesuffix("data.pkl")
        entries = {
            info.filename.removeprefix(f"{root}data/"): info
            for info in archive.infolist() if info.filename.startswith(f"{root}data/")
        }  # fmt: skip
        tensors = _tensors(pickled.build(archive.read(found[0])))
        order = next((info for info in archive.infolist() if info.filename == f"{root}byteorder"), None)
        if order is not None and archive.open(order).read(16) != b"little":
            raise NotABaseModel("its numbers have their bytes in another order", _SAVE_AGAIN)
    for name, one in tensors.items():
        entry, width = entries.get(one.storage.key), BYTES[one.storage.dtype]
        if entry is None:
            raise NotABaseModel(f"the numbers of {shown(name)} are not in it: it is damaged", _SAVE_AGAIN)
        stored = entry.compress_type == zipfile.ZIP_STORED and entry.header_offset + entry.file_size <= size
        if not stored or one.end > one.storage.numbers or one.storage.numbers * width > entry.file_size:
            raise NotABaseModel(f"the numbers of {shown(name)} do not lie in it: it is damaged", _SAVE_AGAIN)
    if sum(one.bytes for one in tensors.values()) > 2 * size:
        raise NotABaseModel("its tensors show the same numbers again and again", _SAVE_AGAIN)
    return tensors, entries


def _tensors(built: object) -> dict[str, Tensor]:
    """The tensors of what a pickle builds: of its "state_dict", if that is one. Anything else is left out."""
    inner = built.get("state_dict") or built if isinstance(built, dict) else None
    if not isinstance(inner, dict):
        raise NotABaseModel("it holds no table of tensors", FIX)
    tensors = {name: one for name, one in inner.items() if isinstance(one, Tensor) and name != "__metadata__"}
    if not tensors:
        raise NotABaseModel("it holds no tensors", FIX)
    return tensors
