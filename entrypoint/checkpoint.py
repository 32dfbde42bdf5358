"""Safetensors files, told by their headers: which base model it is, and whether the LoRA works."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors

from entrypoint import foreign
from entrypoint.failures import BadLora
from entrypoint.header import BYTES, Header, NotABaseModel, WrongFile, read_header
from kohya import networks
from kohya.config import KINDS, Kind
from kohya.networks import Expected

__all__ = ["Header", "NotABaseModel", "WrongFile", "read_header"]

_UNET, _VAE, _TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
_TEXT_1, _TEXT_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
_PARTS = {
    _UNET: "U-Net",
    _VAE: "VAE",
    _TEXT: "text encoder",
    _TEXT_1: "text encoder",
    _TEXT_2: "text encoder",
}
# Of each part what lies at its ends and deepest. sd-scripts ends in an error over one that is missing
# (model_util.py:420 the VAE, :1010 the U-Net; sdxl_model_util.py:150).
_ENDS: Mapping[Kind, tuple[str, ...]] = {
    "sd15": (
        f"{_UNET}middle_block.1.proj_in.weight",
        f"{_UNET}output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight",
        f"{_UNET}out.2.weight",
        f"{_TEXT}text_model.embeddings.token_embedding.weight",
        f"{_TEXT}text_model.encoder.layers.11.mlp.fc2.weight",
        f"{_VAE}encoder.conv_in.weight",
        f"{_VAE}decoder.conv_out.weight",
    ),
    "sdxl": (
        f"{_UNET}input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight",
        f"{_UNET}middle_block.1.transformer_blocks.9.attn2.to_k.weight",
        f"{_UNET}output_blocks.5.1.transformer_blocks.1.attn2.to_k.weight",
        f"{_UNET}out.2.weight",
        f"{_TEXT_1}text_model.embeddings.token_embedding.weight",
        f"{_TEXT_1}text_model.encoder.layers.11.mlp.fc2.weight",
        f"{_TEXT_2}token_embedding.weight",
        f"{_TEXT_2}transformer.resblocks.31.mlp.c_proj.weight",
        f"{_VAE}encoder.conv_in.weight",
        f"{_VAE}decoder.conv_out.weight",
    ),
}
_PRECISE = {"F16", "BF16", "F32", "F64"}


def identify(header: Header) -> Kind:
    """SD1.5 or SDXL, by the names, shapes and types of the tensors. Raises NotABaseModel: what it is."""
    if other := foreign.model(header):
        raise _not_one(*other)
    text = [prefix for prefix in (_TEXT, _TEXT_1, _TEXT_2) if _has(header, prefix)]
    if foreign.channels(header) != 4 or not (text or _has(header, _VAE)):
        raise _not_one(*foreign.part(header))
    kind: Kind = "sdxl" if f"{_UNET}label_emb.0.0.weight" in header else "sd15"
    for name in _ENDS[kind]:
        # sd-scripts reads an older form of SD1.5's text encoder as well (model_util.py:968)
        if name not in header and name.replace(f"{_TEXT}text_model.", _TEXT) not in header:
            part = next(part for prefix, part in _PARTS.items() if name.startswith(prefix))
            wrong = f"it is an {kind} model whose {part} lacks {name}, and perhaps more"
            raise NotABaseModel(wrong, foreign.WHOLE)
    if rounded := {fact.get("dtype") for name, fact in header.items() if name.startswith(_UNET)} - _PRECISE:
        wrong = f"it is an {kind} model with weights of the type {min(map(str, rounded))}"
        raise NotABaseModel(f"{wrong}, too coarse to train on", foreign.PRECISE)
    return kind


def _not_one(what: str, fix: str) -> NotABaseModel:
    return NotABaseModel(f"it is {what}, and not an SD1.5 or SDXL base model in one file", fix)


@dataclass(frozen=True)
class Prediction:
    """What the U-Net predicts, as far as its file says."""

    v: bool | None  # the velocity; False: the noise; None: it does not say
    zero_snr: bool  # trained down to no signal at all


def prediction(header: Header, metadata: Mapping[str, str]) -> Prediction:
    """By the empty tensors v_pred and ztsnr, with which SDXL's v-prediction models are marked (ComfyUI's
    comfy/supported_models.py), else by the metadata that sd-scripts writes (sai_model_spec.py:436)."""
    told = {"v": True, "epsilon": False}.get(metadata.get("modelspec.prediction_type", ""))
    return Prediction(True if "v_pred" in header else told, "ztsnr" in header)


def identify_vae(header: Header) -> None:
    """Raises WrongFile unless it is a VAE as load_vae of sd-scripts reads it (model_util.py:1269-1310).

    SD1.5's and SDXL's have the same tensors: which of them it is does not show.
    """
    names = {name.removeprefix("first_stage_model."): fact for name, fact in header.items()}
    if _has(names, "encoder.down_blocks."):
        raise WrongFile("it is a VAE in diffusers' layout, and sd-scripts reads a file in the original one")
    if "encoder.down.0.block.0.norm1.weight" not in names or _has(header, "model.diffusion_model."):
        raise WrongFile(f"it is {foreign.named(header)[0]}, and not a VAE")
    channels = (names.get("encoder.conv_out.weight", {}).get("shape") or [0])[0] // 2  # mean and variance
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
    raise WrongFile(f"it is {foreign.named(header)[0]}, and not an SD1.5 or SDXL LoRA with kohya's names")


def modules_of(header: Header) -> set[str]:
    """The modules of a LoRA, by its tensors' names."""
    return {name.split(".")[0] for name in header}


def ranks(header: Header, names: Iterable[str]) -> set[int]:
    """The ranks that these modules of a LoRA have."""
    down = (header.get(f"{name}.lora_down.weight") for name in names)
    return {int((fact.get("shape") or [0])[0]) for fact in down if fact is not None}


def alpha(file: BinaryIO, start: int, header: Header) -> float | None:
    """The first alpha of a LoRA whose numbers begin at byte `start`; None where it has none."""
    fact: Header = next((fact for name, fact in header.items() if name.endswith(".alpha")), {})
    if fact.get("dtype") not in (*_DTYPES, "BF16"):
        return None
    begin, end = fact["data_offsets"]
    if end - begin != BYTES[fact["dtype"]]:  # it is one number
        return None
    file.seek(start + begin)
    content = file.read(end - begin)
    if fact["dtype"] == "BF16":  # the upper half of a float32
        return float(np.frombuffer(b"\0\0" + content, np.float32)[0])
    return float(np.frombuffer(content, _DTYPES[fact["dtype"]])[0])


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
