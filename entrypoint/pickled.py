"""What a pickle of torch.save's would build, found out without running it.

A pickle is a program (https://docs.python.org/3/library/pickletools.html). Here nothing that it names is
imported or called: its opcodes are read one by one, and what they would build is kept as plain data.

pickle.Unpickler with a restricted find_class would not do: a few bytes make it reserve gigabytes, or end the
process (a memo's index, a byte array's length, the hash of a deep tuple). torch.load(weights_only=True)
refuses checkpoints that many people have, with a ModelCheckpoint of Lightning's in them, and needs torch,
which only the trainer's Python may have.
"""

import math
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from entrypoint import foreign
from entrypoint.header import BYTES, FIX, NotABaseModel, shown

MAX_OPCODES = 1_000_000  # SDXL's has 0.1 million
_DTYPES = {  # of torch's storages
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip
_TABLE, _TENSOR, _PARAMETER = (
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
)
_UNUSUAL = "torch._utils._rebuild_tensor_v3"  # of types without a storage of their own, float8 above all
_HARMLESS = {  # what checkpoints hold besides tensors; it is left out
    *(f"{module}.{name}" for module in ("__builtin__", "builtins")
      for name in ("dict", "list", "set", "frozenset", "bytes", "bytearray", "complex")),
    *(f"{module}.{name}" for module in ("numpy.core", "numpy._core")  # before and since NumPy 2
      for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")),
    *(f"torch.{name}" for name in (
      "Size", "device", "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64",
      "float16", "bfloat16", "float32", "float64", "complex64", "complex128", "float8_e4m3fn",
      "float8_e5m2")),
    "_codecs.encode", "collections.defaultdict", "numpy.dtype", "numpy.ndarray",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
}  # fmt: skip


@dataclass(frozen=True)
class Storage:
    """A storage that a pickle refers to."""

    dtype: str
    key: str  # the file is <name>/data/<key>
    numbers: int


@dataclass(frozen=True)
class Tensor:
    """A tensor, as a view into a storage: offset and strides count numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.storage.dtype]

    @property
    def end(self) -> int:
        """The number of the storage after the last one that it shows."""
        if 0 in self.shape:
            return self.offset
        steps = ((side - 1) * stride for side, stride in zip(self.shape, self.strides, strict=True))
        return self.offset + sum(steps) + 1


def build(content: bytes) -> Any:
    """What a pickle would build, of dict, list, tuple, Tensor and constants; None for every other object.

    A set is built as a list, for its items' hashes may not end.
    Raises NotABaseModel where it names what tensors do not need, or does what torch.save does not write, and
    AttributeError, IndexError, KeyError, TypeError and ValueError where it is nonsense.
    """
    machine = _Machine()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if number == MAX_OPCODES:
            raise NotABaseModel("its pickle does more than that of any model", FIX)
        if opcode.name == "STOP":
            return machine.stack.pop()
        if opcode.name not in _DO:
            raise NotABaseModel(f"its pickle does {opcode.name}, which torch.save does not write", FIX)
        _DO[opcode.name](machine, argument)
    raise AssertionError("unreachable")  # genops raises ValueError where there is no STOP


@dataclass(frozen=True)
class _Global:
    """A name that the pickle would import."""

    name: str


class _Mark:
    """Where the items of a list, tuple or table begin on the stack."""


class _Machine:
    """The stack and the memo that the opcodes work on."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def push(self, item: Any) -> None:
        self.stack.append(item)

    def items(self) -> list[Any]:
        """Everything above the last mark, which goes as well."""
        items = []
        while not isinstance(item := self.stack.pop(), _Mark):
            items.append(item)
        return items[::-1]

    def top(self, number: int) -> tuple[Any, ...]:
        return tuple([self.stack.pop() for _ in range(number)][::-1])

    def keep(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def extend(self, items: list[Any]) -> None:
        self.stack[-1].extend(items)

    def set(self, items: list[Any]) -> None:
        """Keys and values, in turn. A key that is no text names no tensor, and its hash may not end."""
        if isinstance(self.stack[-1], dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            self.stack[-1].update((key, value) for key, value in pairs if isinstance(key, str))


def _name(text: str) -> _Global:
    """Raises NotABaseModel for a name that no tensor of a base model needs."""
    if text == _UNUSUAL:
        wrong = "it is a .ckpt with weights of 8 bits (float8), too coarse to train on"
        raise NotABaseModel(wrong, foreign.PRECISE)
    storage = text.startswith("torch.") and text.removeprefix("torch.") in _DTYPES
    if not storage and text not in (_TABLE, _TENSOR, _PARAMETER, *_HARMLESS):
        wrong = f"it is a pickle that calls {shown(text)} when it is loaded, which weights do not need"
        raise NotABaseModel(wrong, "Take the model's .safetensors, from a source that you trust")
    return _Global(text)


def _storage(reference: object) -> Storage:
    match reference:
        case ("storage", _Global(name), str(key), _, int(numbers)):
            return Storage(_DTYPES[name.removeprefix("torch.")], key, numbers)
    raise ValueError("a storage that is none")


def _call(called: object, arguments: object) -> Any:
    """What would come of a call."""
    match called, arguments:
        case _Global(name), _ if name == _TABLE:
            return {}
        case _Global(name), (tensor, *_) if name == _PARAMETER:
            return tensor
        case _Global(name), (Storage() as storage, int(offset), tuple(shape), tuple(strides), *_) if (
            name == _TENSOR
            and len(shape) == len(strides) <= 8
            and _sensible(offset, *shape, *strides)
            and math.prod(shape) <= storage.numbers  # with a stride of 0 little would show as much
        ):
            return Tensor(storage, offset, shape, strides)
        case _Global(name), _ if name in _HARMLESS:
            return None
    raise ValueError("a call that makes no tensor")


def _sensible(*numbers: object) -> bool:
    return all(type(number) is int and 0 <= number < 1 << 48 for number in numbers)


_DO: Mapping[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES",
         "SHORT_BINBYTES", "BYTEARRAY8", "BINSTRING", "SHORT_BINSTRING"),
        lambda machine, constant: machine.push(constant),
    ),
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, _: None),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, index: machine.keep(index)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, index: machine.push(machine.memo[index])),
    "MEMOIZE": lambda machine, _: machine.keep(len(machine.memo)),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda machine, _: machine.push([])),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "MARK": lambda machine, _: machine.push(_Mark()),
    **dict.fromkeys(("TUPLE", "FROZENSET"), lambda machine, _: machine.push(tuple(machine.items()))),
    "TUPLE1": lambda machine, _: machine.push(machine.top(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.top(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.top(3)),
    "APPEND": lambda machine, _: machine.extend(list(machine.top(1))),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda machine, _: machine.extend(machine.items())),
    "SETITEM": lambda machine, _: machine.set(list(machine.top(2))),
    "SETITEMS": lambda machine, _: machine.set(machine.items()),
    "GLOBAL": lambda machine, name: machine.push(_name(name.replace(" ", ".", 1))),
    "STACK_GLOBAL": lambda machine, _: machine.push(_name(".".join(machine.top(2)))),
    "BINPERSID": lambda machine, _: machine.push(_storage(machine.stack.pop())),
    "REDUCE": lambda machine, _: machine.push(_call(*machine.top(2))),
    "NEWOBJ": lambda machine, _: machine.push(_call(*machine.top(2))),
    "BUILD": lambda machine, _: machine.top(1),  # the attributes of an object
}  # fmt: skip
