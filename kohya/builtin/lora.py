"""The LoRA: sd-scripts' targets, key names, initialisation, order of creation and file format.

Source: networks/lora.py:25-122 (the module), 861-1040 (targets, names and order), 1255-1281 (the file).
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
from torch import nn

from kohya.builtin.model import BaseModel

_UNET_BLOCK = (  # of one transformer block, in sd-scripts' order; diffusers has ff last
    *(f"attn1.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
    *(f"attn2.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")),
)

Layer = nn.Linear | nn.Conv2d


class LoRAModule(nn.Module):
    """Adds `up(down(x)) · alpha / dim` to the output of one linear layer or 1×1 convolution.

    Keys: alpha (scalar), lora_down.weight (dim, in[, 1, 1]), lora_up.weight (out, dim[, 1, 1]).
    """

    def __init__(self, original: Layer, dim: int, alpha: float) -> None:
        super().__init__()
        size_out, size_in = original.weight.shape[:2]
        if isinstance(original, nn.Conv2d):
            self.lora_down: nn.Module = nn.Conv2d(size_in, dim, 1, bias=False)
            self.lora_up: nn.Module = nn.Conv2d(dim, size_out, 1, bias=False)
        else:
            self.lora_down = nn.Linear(size_in, dim, bias=False)
            self.lora_up = nn.Linear(dim, size_out, bias=False)
        alpha = alpha or dim
        self.scale = alpha / dim
        self.register_buffer("alpha", torch.tensor(alpha))
        # Drawn a second time after the constructors drew once: both take their numbers from the generator.
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)
        self._forward = original.forward

    def attach(self, original: Layer) -> None:
        """From now on a call of the original layer passes through this module."""
        original.forward = self.forward  # type: ignore[assignment,method-assign]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base: torch.Tensor = self._forward(x)
        change: torch.Tensor = self.lora_up(self.lora_down(x))
        return base + change * self.scale


class LoRA(nn.Module):
    """The LoRA of a base model. `text` and `unet`: whether a part is trained, and then its modules."""

    def __init__(self, base: BaseModel, dim: int, alpha: float, *, text: bool, unet: bool) -> None:
        super().__init__()
        self.text: list[LoRAModule] = []
        self.unet: list[LoRAModule] = []
        for name, original in targets(base):
            module = LoRAModule(original, dim, alpha)  # made even where it is not trained: it draws
            of_unet = name.startswith("lora_unet_")
            if unet if of_unet else text:
                (self.unet if of_unet else self.text).append(module)
                self.add_module(name, module)
                module.attach(original)

    def save(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype | None) -> None:
        """Write the LoRA to `path`, whole or not at all; `dtype` None keeps float32.

        Adds the two hashes by which web interfaces know a LoRA (library/train_util.py:3259-3300).
        """
        tensors = {key: value.to("cpu", dtype or value.dtype) for key, value in self.state_dict().items()}
        training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
        content = safetensors.torch.save(tensors, training)
        header = 8 + int.from_bytes(content[:8], "little")
        hashes = {
            "sshs_model_hash": hashlib.sha256(memoryview(content)[header:]).hexdigest(),
            "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        safetensors.torch.save_file(tensors, partial, {**metadata, **hashes})
        partial.replace(path)


def targets(base: BaseModel) -> Iterator[tuple[str, Layer]]:
    """Every layer that gets a LoRA, with the LoRA's name, in the order in which sd-scripts makes them."""
    prefixes = ["lora_te"] if base.kind == "sd15" else ["lora_te1", "lora_te2"]
    for prefix, encoder in zip(prefixes, base.text_encoders, strict=True):
        for name, module in encoder.named_modules():
            if isinstance(module, nn.Linear) and re.search(r"\.(self_attn|mlp)\.", name):
                yield f"{prefix}_{name.replace('.', '_')}", module

    # sd-scripts' SD1.5 has down, up, middle, as diffusers has; its SDXL has the middle before up.
    order = ("down", "up", "mid") if base.kind == "sd15" else ("down", "mid", "up")
    found = [item for item in base.unet.named_modules() if hasattr(item[1], "transformer_blocks")]
    for name, module in sorted(found, key=lambda item: order.index(item[0].split("_")[0])):
        path = _original_name(name) if base.kind == "sdxl" else name
        blocks = len(module.transformer_blocks)
        inner = (f"transformer_blocks.{block}.{part}" for block in range(blocks) for part in _UNET_BLOCK)
        for part in ("proj_in", *inner, "proj_out"):
            layer = cast(Layer, module.get_submodule(part))
            yield f"lora_unet_{path}_{part}".replace(".", "_"), layer


def _original_name(name: str) -> str:
    """`down_blocks.1.attentions.0` → `input_blocks.4.1`, as the SDXL checkpoint calls it."""
    if name.startswith("mid"):
        return "middle_block.1"
    side, block, _, attention = name.split(".")
    number = 3 * int(block) + int(attention)
    return f"input_blocks.{number + 1}.1" if side == "down_blocks" else f"output_blocks.{number}.1"
