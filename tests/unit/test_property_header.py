"""Files that nobody made on purpose: whoever reads their headers refuses them, in time and in little memory.

Property-based: https://hypothesis.readthedocs.io. A failure prints the bytes that made it.
"""

import io
import pickle
import pickletools
import tarfile
import tracemalloc
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from entrypoint import checkpoint, ckpt, header, model
from entrypoint.checkpoint import identify, identify_lora, identify_vae
from entrypoint.header import NotABaseModel, WrongFile
from entrypoint.pickled import Tensor
from tests.unit.test_checkpoint import names_and_shapes
from tests.unit.test_ckpt import rewritten, saved, with_pickle
from tests.unit.test_header import file
from tests.unit.test_model import as_tar

BASES = {kind: names_and_shapes(f"base_{kind}") for kind in ("sd15", "sdxl")}
NAMES = sorted({name for base in BASES.values() for name in base} | {"v_pred", "lora_unet_x.alpha", "a", ""})
quick = settings(
    max_examples=100,
    deadline=20_000,  # ms: a hang is a failure
    derandomize=True,  # the same on every machine
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner, max_size=5),
    max_leaves=12,
)
facts = st.tuples(st.sampled_from(sorted(header.BYTES)), st.lists(st.integers(0, 3), max_size=3))
changes = st.tuples(
    st.sampled_from(["dtype", "shape", "data_offsets", "more"]),
    st.sampled_from([*header.BYTES, "F7", [0, 1], [0, 4], [4, 8], [True], [1, 1, 1.0], [], None]) | anything,
)


def refused_or(function: Any, *arguments: Any) -> Any:
    """What comes of it; None where it is refused in one readable line. Any other error is a defect."""
    try:
        return function(*arguments)
    except WrongFile as error:
        assert str(error).isprintable()
        assert len(str(error)) < 500
        assert error.fix
        return None


def read(content: bytes, reader: Any = header.read_header) -> Any:
    return refused_or(reader, io.BytesIO(content), len(content))


@quick
@given(st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    assert read(content, ckpt.read_header) is None
    assert read(content, model._member) is None
    found = read(content)
    assert found is None or found == {}


@quick
@given(st.integers(0, 1 << 64), st.binary(max_size=64))
def test_any_length_takes_no_memory(length: int, content: bytes) -> None:
    opened = io.BytesIO((length % (1 << 64)).to_bytes(8, "little") + b"{" + content)
    tracemalloc.start()
    try:
        refused_or(header.read_header, opened, 1 << 50)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@quick
@given(
    st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=9), facts, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), changes), max_size=2),
    st.none() | st.dictionaries(st.text(max_size=9), st.text(max_size=9)) | anything,
    st.sampled_from([0, 0, 0, -1, 1]),
)
def test_any_table(
    tensors: dict[str, tuple[str, list[int]]],
    changed: list[tuple[int, tuple[str, Any]]],
    metadata: Any,
    more: int,
) -> None:
    """What is not refused, the safetensors library reads as well."""
    table, end = dict[str, Any](), 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + header.size_of({"dtype": dtype, "shape": shape})
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    for number, (field, value) in changed:
        if table:
            table[sorted(table)[number % len(table)]][field] = value
    content = file({"__metadata__": metadata, **table}, max(0, end + more))
    found = read(content)
    assert found is not None or changed or more or metadata is not None or "__metadata__" in tensors
    if found is not None:
        assert dict(safetensors.deserialize(content)).keys() == found.keys()
        for function in (identify, identify_vae, identify_lora):
            refused_or(function, found)


@quick
@given(st.sampled_from(sorted(BASES)), st.data())
def test_a_base_model_with_something_changed(kind: str, data: st.DataObject) -> None:
    """It is told as what it is, or refused, and never told as the other kind."""
    changed: dict[str, Any] = {name: {"dtype": "F16", "shape": shape} for name, shape in BASES[kind].items()}
    for name in data.draw(st.lists(st.sampled_from(NAMES), max_size=5)):
        changed[name] = {
            "dtype": data.draw(st.sampled_from([*header.BYTES])),
            "shape": data.draw(st.lists(st.integers(0, 9), max_size=4)),
        }
    for name in data.draw(st.lists(st.sampled_from(sorted(changed)), max_size=5)):
        changed.pop(name, None)
    found = refused_or(identify, changed)
    assert found in (None, kind)
    refused_or(identify_vae, changed)
    refused_or(identify_lora, changed)
    refused_or(checkpoint.ranks, changed, [name.split(".")[0] for name in changed])


CODES = [code.code.encode("latin-1") for code in pickletools.opcodes]
ARGUMENTS = [
    b"", b"\x00", b"\x01", b"\xff\xff\xff\xff", b"\xff" * 8, b"a\nb\n", b"1\n", b"ctorch\nFloatStorage\n",
    b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"X\x01\x00\x00\x00a",
    b"X\x07\x00\x00\x00storage", b"K\x02", b"(", b")", b"}", b"]", b"R", b"Q", b"s", b"u", b"a", b"e", b"t",
]  # fmt: skip


@quick
@given(st.lists(st.sampled_from(CODES + ARGUMENTS), max_size=60))
@example([b"X\x01\x00\x00\x00a", b"]", b"q\x00", b"h\x00", b"a"])
def test_any_opcodes(codes: list[bytes]) -> None:
    content = with_pickle(b"\x80\x02" + b"".join(codes) + b".")
    tracemalloc.start()
    try:
        read(content, ckpt.read_header)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@quick
@given(anything, st.integers(0, 5))
def test_any_pickle_of_data(content: Any, protocol: int) -> None:
    """There is no tensor in it, so nothing is found, whatever it is."""
    assert read(with_pickle(pickle.dumps({"state_dict": content}, protocol)), ckpt.read_header) is None


WHOLE_CKPT = saved({"state_dict": {"a": torch.ones(4), "b": torch.ones(2, 3)}})
WHOLE_TAR = as_tar({"a.txt": b"x", "m.safetensors": file({}, 0)})


@quick
@given(st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_ckpt_with_damaged_bytes(changes: list[tuple[int, int]]) -> None:
    """A tensor that is found all the same lies within the file."""
    content = bytearray(WHOLE_CKPT)
    for place, value in changes:
        content[place % len(content)] = value
    found = refused_or(ckpt._read, io.BytesIO(bytes(content)), len(content))
    for one in found[0].values() if found else ():
        assert isinstance(one, Tensor)
        assert one.bytes <= len(content)


@quick
@given(
    st.lists(st.tuples(st.integers(0, 2047), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, 512),
)
def test_a_tar_with_damaged_bytes(changes: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(WHOLE_TAR[: len(WHOLE_TAR) - cut])
    for place, value in changes:
        content[place % len(content)] = value
    found = read(bytes(content), model._member)
    if found is not None:
        assert 0 <= found.offset <= found.offset + found.size <= len(content)


@pytest.mark.parametrize("field", [12, 16])  # the directory's size and place, in the zip's last record
def test_a_zip_that_claims_a_huge_directory(field: int) -> None:
    content = bytearray(rewritten(WHOLE_CKPT, lambda _, inside: inside))
    at = content.rindex(b"PK\x05\x06") + field
    content[at : at + 4] = b"\xfe\xff\xff\xff"
    assert read(bytes(content), ckpt.read_header) is None


def test_a_zip_gets_no_more_than_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ckpt, "MAX_READ", 1000)
    with pytest.raises(NotABaseModel, match="larger than that of any model"):
        ckpt.read_header(io.BytesIO(WHOLE_CKPT), len(WHOLE_CKPT))


def test_a_chain_of_tar_headers_ends() -> None:
    """Each is read by a call within the last one's."""
    info = tarfile.TarInfo("x")
    info.type = tarfile.XHDTYPE
    with pytest.raises(NotABaseModel):
        content = info.tobuf() * 1500
        model._member(io.BytesIO(content), len(content))
