"""Safetensors files, told by their headers: which base model it is, and whether the LoRA works.

The layout (https://github.com/huggingface/safetensors, "Format"): 8 bytes with the header's length,
little-endian; the header, JSON, tensor name → dtype, shape, data_offsets; the numbers.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors

from entrypoint.failures import BadLora
from kohya import networks
from kohya.config import KINDS, Kind
from kohya.networks import Expected

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
Header = Mapping[str, Any]

_SD15_TEXT = "cond_stage_model.transformer."
_SDXL_TEXT = "conditioner.embedders.1.model."
_UNET_IN = "model.diffusion_model.input_blocks.0.0.weight"  # (channels, 4, 3, 3)


class WrongFile(ValueError):
    """The file is not what it was given as. Its text names what it is instead."""


class NotABaseModel(WrongFile):
    """The file is not a base model that can be trained. Its text names what it is instead."""


def read_header(file: BinaryIO, size: int) -> Header:
    """The tensors that the safetensors file of `size` bytes says it has, name → dtype, shape, data_offsets.

    Reads the header only. Raises NotABaseModel when the file is no safetensors file, or is cut off.
    """
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise NotABaseModel("it is not a safetensors file (its first 8 bytes give no sensible header length)")
    try:
        header = json.loads(file.read(length))
        tensors = {name: fact for name, fact in header.items() if name != "__metadata__"}
        end = max((int(fact["data_offsets"][1]) for fact in tensors.values()), default=0)
    except (TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
        raise NotABaseModel("it is not a safetensors file (its header lists no tensors)") from error
    if end + 8 + length != size:
        wrong = (
            f"its header describes {end + 8 + length:,} bytes and it has {size:,}: it is cut off or damaged"
        )
        raise NotABaseModel(wrong)
    return tensors


def identify(header: Header) -> Kind:
    """SD1.5 or SDXL, by the names of the tensors. Raises NotABaseModel, naming what else it is."""
    if _UNET_IN in header and header[_UNET_IN].get("shape", [0, 0])[1:2] == [4]:
        if any(name.startswith(_SDXL_TEXT) for name in header) and _has(
            header, "conditioner.embedders.0.transformer."
        ):
            return "sdxl"
        if _has(header, _SD15_TEXT):
            return "sd15"
    raise NotABaseModel(f"it is {_other(header)}, and not an SD1.5 or SDXL base model in one file")


def identify_vae(header: Header) -> None:
    """Raises WrongFile unless it is a VAE as load_vae of sd-scripts reads it (model_util.py:1269-1310).

    SD1.5's and SDXL's have the same tensors: which of them it is does not show.
    """
    names = {name.removeprefix("first_stage_model."): fact for name, fact in header.items()}
    if _has(names, "encoder.down_blocks."):
        raise WrongFile("it is a VAE in diffusers' layout, and sd-scripts reads a file in the original one")
    if "encoder.down.0.block.0.norm1.weight" not in names or _has(header, "model.diffusion_model."):
        raise WrongFile(f"it is {_other(header)}, and not a VAE")
    channels = names.get("encoder.conv_out.weight", {}).get("shape", [0])[0] // 2  # mean and variance
    if channels != 4:
        raise WrongFile(f"it is a VAE with {channels} latent channels, and not one for SD1.5 or SDXL")


def identify_lora(header: Header) -> Kind:
    """The kind of base model that a LoRA with kohya's names is for. Raises WrongFile.

    sd-scripts leaves out every name that it does not know, without an error (networks/lora.py:1079).
    """
    found = modules_of(header)
    if any(re.match(r"lora_unet_(down|mid|up)_block.*_transformer_blocks_1_", name) for name in found):
        raise WrongFile("it is an SDXL LoRA with diffusers' names of blocks, and not with kohya's")
    for kind in KINDS:
        if not found.isdisjoint(networks.modules(kind)):
            return kind
    raise WrongFile(f"it is {_other(header)}, and not an SD1.5 or SDXL LoRA with kohya's names")


def modules_of(header: Header) -> set[str]:
    """The modules of a LoRA, by its tensors' names."""
    return {name.split(".")[0] for name in header}


def ranks(header: Header, names: Iterable[str]) -> set[int]:
    """The ranks that these modules of a LoRA have."""
    down = (header.get(f"{name}.lora_down.weight") for name in names)
    return {int(fact.get("shape", [0])[0]) for fact in down if fact is not None}


def alpha(file: BinaryIO, start: int, header: Header) -> float | None:
    """The first alpha of a LoRA whose numbers begin at byte `start`; None where it has none."""
    fact: Header = next((fact for name, fact in header.items() if name.endswith(".alpha")), {})
    if fact.get("dtype") not in (*_DTYPES, "BF16"):
        return None
    begin, end = fact["data_offsets"]
    file.seek(start + begin)
    content = file.read(end - begin)
    if fact["dtype"] == "BF16":  # the upper half of a float32
        return float(np.frombuffer(b"\0\0" + content, np.float32)[0])
    return float(np.frombuffer(content, _DTYPES[fact["dtype"]])[0])


_OTHERS = {  # how the tensors' names begin → what it is
    "lora_": "a LoRA",
    "unet.": "a LoRA in diffusers' format",
    "double_blocks.": "a Flux model",
    "model.diffusion_model.double_blocks.": "a Flux model",
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3 model",
    "cond_stage_model.model.": "a Stable Diffusion 2 model",
    "conditioner.embedders.0.model.": "the SDXL refiner",
    "text_model.": "a text encoder",
    "down_blocks.": "a U-Net in diffusers' format",
    "model.diffusion_model.": "a checkpoint with a U-Net",
    "first_stage_model.": "a VAE",
    "encoder.": "a VAE",
}


def _other(header: Header) -> str:
    """What a file that is no base model is instead."""
    channels = header.get(_UNET_IN, {}).get("shape", [0, 0])[1:2]
    if channels == [9]:
        return "an inpainting model"
    for prefix, name in _OTHERS.items():
        if _has(header, prefix):
            return name
    return f"something else (its first tensor is {next(iter(header), 'missing')})"


def _has(header: Header, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in header)


@dataclass(frozen=True)
class Lora:
    """What is known of a LoRA that works."""

    path: Path
    modules: int
    rank: int
    bytes: int


def verify_lora(path: Path, expected: Expected) -> Lora:
    """Read the whole LoRA and return its facts.

    It counts when it opens, has the modules and tensors that it must have, holds no NaN or Inf, and when no
    part that was trained is all zero. Raises BadLora with the reason.
    """
    try:
        tensors = dict(safetensors.deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]
    except (OSError, safetensors.SafetensorError) as error:  # type: ignore[attr-defined]
        raise BadLora(f"{path.name} does not open as safetensors: {error}.") from error
    if odd := sorted({tensor["dtype"] for tensor in tensors.values()} - {*_DTYPES, "BF16"}):
        raise BadLora(f"{path.name} holds numbers of type {odd[0]}, which no program loads as a LoRA.")
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, tensor in tensors.items():
        module, _, end = name.partition(".")
        found.setdefault(module, {})[end] = tensor
    ranks = _compare(path.name, found, expected)
    # LoKr's alpha may be too large for fp16 where it says nothing: both factors are whole
    unused = {f"{module}.alpha" for module, parts in found.items() if {"lokr_w1", "lokr_w2"} <= parts.keys()}
    broken = [name for name, tensor in tensors.items() if name not in unused and not _finite(tensor)]
    if broken:
        raise BadLora(
            f"{path.name} holds NaN or Inf in {len(broken)} of {len(tensors)} tensors. "
            "The training diverged: try a lower learning rate, mixed_precision=bf16 or no_half_vae=true."
        )
    learned = {networks.part(module) for module, parts in found.items() if _does_something(parts)}
    if dead := sorted(expected.parts - learned):
        what = "it" if len(dead) == len(expected.parts) else f"every {dead[0]} module"
        raise BadLora(f"{path.name}: {what} is all zero, nothing was learned. Is the learning rate too low?")
    return Lora(path, len(found), max(ranks, default=0), path.stat().st_size)


def _compare(
    name: str, found: Mapping[str, Mapping[str, Mapping[str, Any]]], expected: Expected
) -> list[int]:
    """Hold the modules of a LoRA against those that it must have; its ranks. Raises BadLora."""
    if missing := sorted(expected.modules.keys() - found.keys()):
        raise BadLora(f"{name} lacks {len(missing)} of {len(expected.modules)} modules, {missing[0]} first.")
    known = {networks.part(module) for module in expected.modules}
    foreign = sorted(
        module for module in found.keys() - expected.modules.keys()
        if not expected.more or networks.part(module) not in known
    )  # fmt: skip
    if foreign:
        raise BadLora(f"{name} has {len(foreign)} modules that were not to be trained, {foreign[0]} first.")
    ranks = []
    for module, tensors in sorted(found.items()):
        if not any(needed <= tensors.keys() <= needed | more for needed, more in expected.forms):
            raise BadLora(f"{name}: {module} has no such set of tensors: {', '.join(sorted(tensors))}.")
        if "lora_down.weight" not in tensors:
            continue
        down, up = tensors["lora_down.weight"]["shape"], tensors["lora_up.weight"]["shape"]
        rank = expected.modules.get(module)
        if len(down) < 2 or len(up) < 2 or down[0] != up[1] or rank not in (None, down[0]):
            raise BadLora(
                f"{name}: lora_down {down} and lora_up {up} of {module} are not of rank {rank or 'r'}."
            )
        ranks.append(down[0])
    return ranks


def _does_something(tensors: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a module changes the model: its weight is a product, and zero when one factor is."""
    factors = [tensor for end, tensor in tensors.items() if end not in ("alpha", "dora_scale")]
    return all(_nonzero(tensor) for tensor in factors)


def _finite(tensor: Mapping[str, Any]) -> bool:
    if tensor["dtype"] == "BF16":  # numpy has no bfloat16: NaN and Inf are those with all exponent bits set
        return not bool(np.any(np.frombuffer(tensor["data"], np.uint16) & 0x7F80 == 0x7F80))
    return bool(np.isfinite(np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]])).all())


def _nonzero(tensor: Mapping[str, Any]) -> bool:
    if tensor["dtype"] == "BF16":
        return bool(np.any(np.frombuffer(tensor["data"], np.uint16) & 0x7FFF))
    return bool(np.any(np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]])))


_DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
