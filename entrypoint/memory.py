"""Whether a job fits into a GPU's memory and the machine's: what it needs at least, and an estimate.

What it needs at least is a sum of things that must be there at once, whatever else is. Only below that a job
is refused; the estimate is said to be one. Neither has been held against a GPU yet.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from entrypoint.failures import Problem
from entrypoint.gpu import Gpu
from kohya.config import Kind, Merged
from kohya.problem import counted

_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # of cgroup v2 and v1


@dataclass(frozen=True)
class _Facts:
    """Of a kind of base model. Counted over tests/data/base_<kind>.json and lora_<kind>.json."""

    unet: float  # parameters
    text: float  # of the text encoders
    vae: float
    lora_unet: float  # parameters of networks.lora for each of its ranks
    lora_text: float
    pixels: int  # of one picture in the next two
    kept: float  # bytes that the U-Net keeps of one picture for its backward pass, in half precision
    checkpointed: float  # the same with gradient checkpointing: what goes into each block


# The last two numbers are those of configs/sd15.toml and configs/sdxl.toml.
_FACTS: Mapping[Kind, _Facts] = {
    "sd15": _Facts(860e6, 123e6, 84e6, 0.4239e6, 0.1659e6, 512**2, 1.25e9, 0.1e9),
    "sdxl": _Facts(2567e6, 818e6, 84e6, 2.6598e6, 0.9032e6, 1024**2, 8.4e9, 0.7e9),
}
# Bytes of an optimizer's states for each trained parameter: two moments of 4 or of 1. Others: 0, at least.
_STATES = {"adamw": 8, "adam": 8, "nadam": 8, "radam": 8, "adamw8bit": 2, "pagedadamw8bit": 2, "lion": 4,
           "lion8bit": 1, "prodigy": 16}  # fmt: skip


@dataclass(frozen=True)
class Need:
    """Bytes of GPU memory."""

    weights: float  # of the base model
    lora: float  # with its gradient and the optimizer's states
    pictures: float  # what one step keeps of them at least
    estimate: float  # of all together

    @property
    def least(self) -> float:
        return self.weights + self.lora + self.pictures

    def __str__(self) -> str:
        return f"at least {_gb(self.least)}, {_gb(self.estimate)} by an estimate"


def need(kind: Kind, values: Mapping[str, Any]) -> Need:
    """The GPU memory that training takes, on each GPU.

    The least: the base model's weights in the precision that is trained in, the LoRA, and the pictures if
    their size is known. It is not with bucket_no_upscale, where they may be small, nor with a dataset_config.
    """
    facts = _FACTS[kind]
    whole = 4.0 if values.get("mixed_precision", "no") == "no" else 2.0
    unet = 1.0 if values.get("fp8_base") or values.get("fp8_base_unet") else whole
    text = 0.0 if values.get("cache_text_encoder_outputs") else 1.0 if values.get("fp8_base") else whole
    weights = facts.unet * unet + facts.text * text
    weights += 0 if values.get("cache_latents") or values.get("cache_latents_to_disk") else facts.vae * 2
    trained = 0.0
    if values.get("network_module") == "networks.lora" and not values.get("network_args"):
        trained += 0 if values.get("network_train_text_encoder_only") else facts.lora_unet
        trained += 0 if values.get("network_train_unet_only") else facts.lora_text
        trained *= values.get("network_dim", 4)
    optimizer, half = str(values.get("optimizer_type", "AdamW")).lower(), _is_half(values)
    each = 4 if half else 8  # itself and its gradient
    states = _STATES.get(optimizer, 0)
    if half and "8bit" not in optimizer:
        states //= 2  # as precise as what is trained: train_network.py:815-826
    width, _, height = str(values.get("resolution", "512")).partition(",")
    pictures = int(width) * int(height or width) / facts.pixels * values.get("train_batch_size", 1)
    pictures *= whole / 2
    known = not (values.get("bucket_no_upscale") or values.get("dataset_config"))
    lora = trained * (each + states)
    kept = facts.checkpointed if values.get("gradient_checkpointing") else facts.kept
    estimate = weights + lora + pictures * kept
    return Need(weights, lora, pictures * facts.checkpointed if known else 0.0, estimate)


def problems(kind: Kind, size: int, merged: Merged, gpu: Gpu | None, host: int | None) -> Iterator[Problem]:
    """What cannot fit. `size`: the base model's bytes; `host`: the machine's memory, None: not asked."""
    if not _is_full(kind, size):
        return
    told = need(kind, merged.values)
    if gpu is not None and gpu.memory is not None and told.least > gpu.memory:
        wrong = f"it has {_gb(gpu.memory)} of memory, and the training needs at least {_gb(told.least)}"
        parts = sorted(_parts(told, merged.values), reverse=True)
        shown = ", ".join(f"{_gb(part)} for {name}" for part, name, _ in parts if part)
        yield Problem(gpu.name, f"{wrong}: {shown}", f"{parts[0][2]}, or take a GPU with more")
    facts, values = _FACTS[kind], merged.values
    # sdxl_train_util.py:131-179, sdxl_model_util.py:148-156: the U-Net as fp32 unless full_…, the text
    # encoders always; with lowram the GPU takes them
    loading = facts.unet * (2 if _is_half(values) else 4) + facts.text * 4
    if kind == "sdxl" and host is not None and loading > host and not values.get("lowram"):
        wrong = f"it has {_gb(host)} of memory, and loading the base model needs at least {_gb(loading)}"
        yield Problem("this machine", wrong, "Take a larger one, such as ml.g5.2xlarge for ml.g5.xlarge")


def _parts(told: Need, values: Mapping[str, Any]) -> Iterator[tuple[float, str, str]]:
    """The bytes of each part, what it is, and how it becomes smaller."""
    fix = "Write fp8_base = true"
    if values.get("mixed_precision", "no") == "no":
        fix = "Write mixed_precision = fp16 or bf16"
    elif values.get("fp8_base"):
        fix = "Give a smaller base model"
    yield told.weights, "the base model's weights", fix
    named = values.get("optimizer_type", "AdamW")
    optimizer = "" if "8bit" in str(named) else ", or optimizer_type = AdamW8bit"
    fix = f"Write a smaller network_dim than {values.get('network_dim', 4)}{optimizer}"
    yield told.lora, f"the LoRA, its gradient and {named}", fix
    batch, resolution = values.get("train_batch_size", 1), values.get("resolution", "512")
    smaller = f"train_batch_size than {batch}" if batch > 1 else f"resolution than {resolution}"
    yield told.pictures, f"{counted(batch, 'picture')} at a time", f"Write a smaller {smaller}"


def notes(kind: Kind, size: int, merged: Merged, gpu: Gpu | None) -> Iterator[str]:
    """What may not fit."""
    if gpu is None or gpu.memory is None or not _is_full(kind, size):
        return
    told = need(kind, merged.values)
    if told.least <= gpu.memory < told.estimate:
        yield (
            f"{gpu.name}: the training may need {_gb(told.estimate)} of its {_gb(gpu.memory)} (an estimate). "
            "If it runs out of memory: gradient_checkpointing = true, or a smaller train_batch_size"
        )


def of_this_machine() -> int:
    """Bytes of main memory that this process may use: the machine's, or its container's limit."""
    limits = [psutil.virtual_memory().total]
    for name in _LIMITS:
        file = _CGROUP / name
        if file.is_file() and (told := file.read_text().strip()).isdecimal():
            limits.append(int(told))
    return min(limits)


def _is_half(values: Mapping[str, Any]) -> bool:
    """Whether all that is trained is in half precision."""
    return bool(values.get("full_fp16") or values.get("full_bf16"))


def _is_full(kind: Kind, size: int) -> bool:
    """Whether a base model can have all its parameters, at a byte each; the tests' are narrow."""
    return size >= _FACTS[kind].unet + _FACTS[kind].text


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
