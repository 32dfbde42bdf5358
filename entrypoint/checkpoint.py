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
from kohya.config import KINDS, Kind

_ENDS = (".alpha", ".lora_down.weight", ".lora_up.weight")
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
        if not found.isdisjoint(modules(kind)):
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


def verify_lora(
    path: Path, kind: Kind, *, unet: bool = True, text_encoders: bool = True, plain: bool = True
) -> Lora:
    """Read the whole LoRA and return its facts.

    It counts when it opens, has the keys that it must have, holds no NaN or Inf, and is not all zero.
    `plain`: made by networks.lora without network_args, which decides all its keys; of another network only
    the beginnings of the names are known. Raises BadLora with the reason.
    """
    try:
        tensors = dict(safetensors.deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]
    except (OSError, safetensors.SafetensorError) as error:  # type: ignore[attr-defined]
        raise BadLora(f"{path.name} does not open as safetensors: {error}.") from error
    expected = set(modules(kind, unet=unet, text_encoders=text_encoders))
    found = {name.split(".")[0] for name in tensors}
    if plain:
        _compare(path.name, kind, set(tensors), expected)
    elif missing := {name.split("_")[1] for name in expected} - {
        name.split("_")[1] for name in found if "_" in name
    }:
        raise BadLora(f"{path.name} has no key that begins with lora_{min(missing)}_.")
    if odd := sorted({tensor["dtype"] for tensor in tensors.values()} - {*_DTYPES, "BF16"}):
        raise BadLora(f"{path.name} holds numbers of type {odd[0]}, which no program loads as a LoRA.")
    broken = [name for name, tensor in tensors.items() if not _finite(tensor)]
    if broken:
        raise BadLora(
            f"{path.name} holds NaN or Inf in {len(broken)} of {len(tensors)} tensors. "
            "The training diverged: try a lower learning rate, mixed_precision=bf16 or no_half_vae=true."
        )
    # What starts at zero, whatever the network: lora_up, LoHa's w2_b and LoKr's w2.
    trained = [name for name in tensors if re.search(r"lora_up|hada_w2_b|lokr_w2|\.diff$", name)]
    if trained and not any(_nonzero(tensors[name]) for name in trained):
        raise BadLora(f"{path.name} is all zero: nothing was learned. Is the learning rate 0?")
    ranks = [tensor["shape"][0] for name, tensor in tensors.items() if name.endswith(".lora_down.weight")]
    return Lora(path, len(found), max(ranks, default=0), path.stat().st_size)


def _compare(name: str, kind: Kind, tensors: set[str], expected: set[str]) -> None:
    """Hold the keys of a LoRA by networks.lora against those that it must have. Raises BadLora."""
    found = {tensor.removesuffix(end) for tensor in tensors for end in _ENDS if tensor.endswith(end)}
    if missing := sorted(expected - found):
        raise BadLora(f"{name} lacks {len(missing)} of {len(expected)} modules, {missing[0]} first.")
    if unknown := sorted(found - expected) or sorted(tensors - _tensors(expected)):
        raise BadLora(f"{name} has {len(unknown)} keys that a {kind} LoRA does not have, {unknown[0]} first.")
    if absent := sorted(_tensors(expected) - tensors):
        raise BadLora(f"{name} lacks {len(absent)} tensors, {absent[0]} first.")


def part(module: str) -> str:
    """The part of the model that a module belongs to: lora_unet, lora_te, lora_te1, lora_te2."""
    return "_".join(module.split("_")[:2])


def modules(kind: Kind, *, unet: bool = True, text_encoders: bool = True) -> list[str]:
    """The modules of a LoRA by networks.lora of sd-scripts v0.10.1: 264 for SD1.5, 986 for SDXL.

    tests/data/lora_<kind>.json holds the same names as sd-scripts itself makes them.
    """
    names = []
    if text_encoders:
        for prefix, layers in (("te", 12),) if kind == "sd15" else (("te1", 12), ("te2", 32)):
            blocks = [f"lora_{prefix}_text_model_encoder_layers_{layer}" for layer in range(layers)]
            names += [f"{block}_{part}" for block in blocks for part in _TEXT_PARTS]
    if unet:
        depths = _SD15_ATTENTIONS if kind == "sd15" else _SDXL_ATTENTIONS
        names += [
            f"lora_unet_{name}_{part}" for name, depth in depths.items() for part in _attention_parts(depth)
        ]
    return names


_TEXT_PARTS = (*(f"self_attn_{which}_proj" for which in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2")
_SD15_ATTENTIONS = {  # block → transformer blocks in it
    **{f"down_blocks_{block}_attentions_{layer}": 1 for block in range(3) for layer in range(2)},
    "mid_block_attentions_0": 1,
    **{f"up_blocks_{block}_attentions_{layer}": 1 for block in range(1, 4) for layer in range(3)},
}
_SDXL_ATTENTIONS = {
    "input_blocks_4_1": 2, "input_blocks_5_1": 2, "input_blocks_7_1": 10, "input_blocks_8_1": 10,
    "middle_block_1": 10,
    "output_blocks_0_1": 10, "output_blocks_1_1": 10, "output_blocks_2_1": 10,
    "output_blocks_3_1": 2, "output_blocks_4_1": 2, "output_blocks_5_1": 2,
}  # fmt: skip


def _attention_parts(depth: int) -> list[str]:
    """The LoRA modules of one attention block with `depth` transformer blocks."""
    attention = [f"attn{number}_to_{which}" for number in (1, 2) for which in ("q", "k", "v", "out_0")]
    inner = [f"transformer_blocks_{block}_{part}" for block in range(depth)
             for part in (*attention, "ff_net_0_proj", "ff_net_2")]  # fmt: skip
    return ["proj_in", "proj_out", *inner]


def _tensors(names: set[str]) -> set[str]:
    return {f"{name}{end}" for name in names for end in _ENDS}


def _finite(tensor: Mapping[str, Any]) -> bool:
    if tensor["dtype"] == "BF16":  # numpy has no bfloat16: NaN and Inf are those with all exponent bits set
        return not bool(np.any(np.frombuffer(tensor["data"], np.uint16) & 0x7F80 == 0x7F80))
    return bool(np.isfinite(np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]])).all())


def _nonzero(tensor: Mapping[str, Any]) -> bool:
    if tensor["dtype"] == "BF16":
        return bool(np.any(np.frombuffer(tensor["data"], np.uint16) & 0x7FFF))
    return bool(np.any(np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]])))


_DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
