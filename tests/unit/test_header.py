"""entrypoint.header: what every damage to a safetensors file is told as."""

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from entrypoint import header
from entrypoint.checkpoint import identify
from entrypoint.header import NotABaseModel, Sparing, guarded, read, read_header

DATA = Path(__file__).parents[1] / "data"
A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file(content: Any, numbers: int = 8) -> bytes:
    """A safetensors file with this header."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + bytes(numbers)


def told(content: bytes, size: int | None = None) -> tuple[str, str]:
    with pytest.raises(NotABaseModel) as error:
        read_header(io.BytesIO(content), len(content) if size is None else size)
    return str(error.value), error.value.fix


def test_a_header_is_read_with_its_metadata_and_up_to_the_numbers() -> None:
    content = save({"a": np.arange(2, dtype=np.float32), "b": np.zeros(0)}, {"modelspec.title": "x"})
    opened = io.BytesIO(content)
    tensors, metadata = read(opened, len(content))
    assert {name: (fact["dtype"], fact["shape"]) for name, fact in tensors.items()} == {
        "a": ("F32", [2]),
        "b": ("F64", [0]),
    }
    assert metadata == {"modelspec.title": "x"}
    assert opened.read() == np.arange(2, dtype=np.float32).tobytes()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"x", "no sensible header length"),
        (b"words " * 100, "no sensible header length"),
        (b"\xff" * 64, "no sensible header length"),
        (b"GGUF\x03\0\0\0" + bytes(64), "it is a GGUF file"),
        (b"PK\x03\x04" + bytes(64), "name it .ckpt"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + bytes(64), "a pickle, as an old .ckpt is"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html></html>" * 4, "it is a web page"),
        (b"<!doctype html><html></html>" * 4, "it is a web page"),
        (b"<html><head></head></html>" * 4, "it is a web page"),
        (b"\x1f\x8b\x08" + bytes(64), "compressed with gzip"),
        (b"BZh9" + bytes(64), "compressed with bzip2"),
        (b"\xfd7zXZ\0" + bytes(64), "compressed with xz"),
        (b"\x28\xb5\x2f\xfd" + bytes(64), "compressed with zstd"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(64), "compressed with 7z"),
        (file([1, 2]), "no sensible header length"),
        (file({"a": A})[:40], "the whole file 40: it is cut off"),
        (file({"a": A})[:-1], "it has 76: it is cut off or damaged"),
        (file({"a": A}, 9), "it has 78: it is cut off or damaged"),
        (file({}, 4), "cut off or damaged"),
        (file(b'{"a": '), "is not JSON (Expecting value"),
        (file(b'{"\xff": 1}'), "is not JSON (UnicodeDecodeError)"),
        (file(b'{"a":' * 5000), "is not JSON (RecursionError)"),
        (file(b'{"a":' + b"9" * 5000 + b"}"), "is not JSON (ValueError)"),
        (file(b'{"a":{},"b":{},"a":{}}'), "names a twice"),
        (file(b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}'), "names dtype twice"),
        (file({"__metadata__": 1, "a": A}), "its metadata are no table"),
        (file({"__metadata__": {"a": 1}, "a": A}), "its metadata are no table of texts"),
        (file({"a": {**A, "data_offsets": [False, 8]}}), "a lacks its dtype"),
        (file({"a": 1}), "a lacks its dtype"),
        (file({"a": {**A, "data_offsets": [0]}}), "a lacks its dtype"),
        (file({"a": {**A, "dtype": None}}), "a lacks its dtype"),
        (file({"a": {**A, "dtype": "F7"}}), "a is of the type F7"),
        (file({"a": {**A, "shape": [-2]}}), "no sensible shape"),
        (file({"a": {**A, "shape": ["2"]}}), "no sensible shape"),
        (file({"a": {**A, "shape": [True]}}), "no sensible shape"),
        (file({"a": {**A, "shape": [1 << 60]}}), "no sensible shape"),
        (file({"a": {**A, "shape": [1] * 9}}), "no sensible shape"),
        (file({"a": {**A, "shape": [3]}}), "a, F32 [3], does not fill its 8 bytes"),
        (file({"a": A, "b": {**A, "data_offsets": [4, 12]}}, 12), "b overlaps a"),
        (file({"a": A, "b": {**A, "data_offsets": [12, 20]}}, 20), "b leaves a gap after a"),
        (file({"a": {**A, "data_offsets": [8, 16]}}, 16), "a leaves a gap after the header"),
        (file({"a": {**A, "data_offsets": [-8, 0]}}, 0), "a overlaps the header"),
    ],
)  # fmt: skip
def test_every_damage_has_its_sentence(content: bytes, said: str) -> None:
    wrong, fix = told(content)
    assert said in f"{wrong}. {fix}"


def test_a_header_that_would_fill_the_memory() -> None:
    assert "lists more than any model has" in told(file(b"{" + b'"a":0,' * 1_000_001 + b'"b":0}'))[0]


def test_a_header_beyond_the_formats_limit_is_not_read() -> None:
    length = header.MAX_HEADER + 1
    opened = io.BytesIO(length.to_bytes(8, "little") + b'{"a": 1}' + bytes(16))
    with pytest.raises(NotABaseModel, match="100,000,001 bytes, and the format allows 100,000,000"):
        read_header(opened, length + 8)
    assert opened.tell() == 24


def test_a_name_out_of_a_file_is_one_short_line() -> None:
    wrong, _ = told(file({"\n\x1b[31m" + "x" * 1000: 1}))
    assert wrong.isprintable()
    assert len(wrong) < 200


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_header_of_real_size_is_told_at_once(kind: str) -> None:
    facts, end = {}, 0
    for name, shape in json.loads((DATA / f"base_{kind}.json").read_text()).items():
        size = 2 * int(np.prod(shape))
        facts[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    content = file(facts, 0)
    seconds = []
    for _ in range(5):
        begun = time.process_time()  # whatever else the machine does
        assert identify(read_header(io.BytesIO(content), len(content) + end)) == kind
        seconds.append(time.process_time() - begun)
    assert min(seconds) < 0.05


def test_a_library_gets_no_more_than_its_budget() -> None:
    sparing = Sparing(io.BytesIO(b"x" * 100), 100, 60)
    sparing.seek(-50, io.SEEK_END)
    assert len(sparing.read()) == 50
    sparing.seek(0)
    with pytest.raises(NotABaseModel, match="larger than that of any model"):
        sparing.read(11)
    with pytest.raises(ValueError, match="before its beginning"):
        sparing.seek(-1)


def test_a_part_of_a_file_begins_where_it_was_and_ends_where_it_ends() -> None:
    opened = io.BytesIO(b"0123456789")
    opened.seek(3)
    part = Sparing(opened, 4, 100)
    assert (part.read(), part.read(), part.tell()) == (b"3456", b"", 4)
    assert (part.seek(1), part.read(2)) == (1, b"45")


def test_what_a_library_raises_over_a_file_is_damage_and_what_the_disk_says_is_not() -> None:
    with (
        pytest.raises(NotABaseModel, match=r"it is no tar, or a damaged one \(IndexError: x\)"),
        guarded("tar"),
    ):
        raise IndexError("x")
    with pytest.raises(PermissionError), guarded("tar"):
        raise PermissionError


@pytest.mark.parametrize(
    ("dtypes", "size"),
    [
        ("BOOL U8 I8 F8_E4M3 F8_E5M2", 1),
        ("U16 I16 F16 BF16", 2),
        ("U32 I32 F32", 4),
        ("U64 I64 F64", 8),
    ],
)
def test_every_type_of_the_format(dtypes: str, size: int) -> None:
    """safetensors 0.4.5, safetensors/src/tensor.rs, enum Dtype."""
    for dtype in dtypes.split():
        content = file({"a": {"dtype": dtype, "shape": [3], "data_offsets": [0, 3 * size]}}, 3 * size)
        assert read_header(io.BytesIO(content), len(content))["a"]["dtype"] == dtype
