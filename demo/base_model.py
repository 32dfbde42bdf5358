"""A small base model in the original single-file layout, made on the spot.

It has every key and every layer of the real checkpoint (tests/data/base_<kind>.json, taken from
sd-scripts v0.10.1); only the widths are small, so that a training step takes a fraction of a second on
a CPU. The weights are random, drawn by numpy from a seed: the same file on every machine.

Plain random weights make a poor test: the U-Net's output has nothing to do with the noise, its loss lies
above 1, and a LoRA that merely silences it looks like one that has learnt. So a few weights are set such
that the model behaves as a trained one does, roughly (`_rough_denoiser`, `_vae_scale`): scaled latents of
variance about 1 and a narrow posterior; and a U-Net that takes its noisy input for the noise, which is
right where there is much noise and wrong where the picture shows. The rest is left to learn.
"""

import json
import math
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import save_file

Kind = Literal["sd15", "sdxl"]
SHAPES = Path(__file__).parent.parent / "tests" / "data"

_UNET_DIVISOR = 10  # 320, 640, 1280 → 32, 64, 128: group norms want multiples of 32
_VAE_DIVISOR = 4  # 128, 256, 512 → 32, 64, 128
_TEXT_WIDTH = 64  # one attention head of CLIP
_CONTEXT = {768: 64, 2048: 128}  # what the text encoders hand to the U-Net; SDXL joins both
_SCALING = {"sd15": 0.18215, "sdxl": 0.13025}  # the VAE's scaling_factor
_BRANCH = 0.3  # of what a residual branch would add; the original starts these at 0 (ldm's zero_module)
_LAST_RESNET = {"sd15": "output_blocks.11.0", "sdxl": "output_blocks.8.0"}
_ADM = 1280 + 6 * 256  # SDXL's label_emb: pooled text, six size embeddings of 256


def write(path: Path, kind: Kind, seed: int = 0) -> Path:
    """Write a narrow base model of `kind` (fp16, 35 or 77 MB) to `path` and return it."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, list[int]] = json.loads((SHAPES / f"base_{kind}.json").read_text())
    tensors = {key: draw(key, tuple(_narrow(key, shape)), rng) for key, shape in shapes.items()}
    _vae_scale(tensors, kind)
    _rough_denoiser(tensors, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def _narrow(key: str, shape: list[int]) -> list[int]:
    """The shape of `key` in the narrow model."""
    if key.startswith("model.diffusion_model."):
        if key.endswith("label_emb.0.0.weight"):
            return [shape[0] // _UNET_DIVISOR, shape[1] - _ADM + _TEXT_WIDTH + 6 * 256]
        if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            return [shape[0] // _UNET_DIVISOR, _CONTEXT[shape[1]]]
        return [size // _UNET_DIVISOR if size >= 320 else size for size in shape]
    if key.startswith("first_stage_model."):
        return [size // _VAE_DIVISOR if size >= 128 else size for size in shape]
    width = 1280 if key.startswith("conditioner.embedders.1.") else 768
    return [size * _TEXT_WIDTH // width if width <= size < 49408 else size for size in shape]


def draw(key: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random weights for `key`, fp16, that keep values of about 1 at any width: norms are 1, biases 0."""
    if key.endswith("logit_scale"):
        return np.full(shape, math.log(100), np.float16)
    if key.endswith(("bias", "in_proj_bias")):
        return np.zeros(shape, np.float16)
    if len(shape) == 1:
        return np.ones(shape, np.float16)  # a norm's weight
    fan_in = math.prod(shape[1:])
    scale = 0.5 if "embedding" in key else 1 / math.sqrt(fan_in)
    if key.startswith("model.diffusion_model.") and key.endswith(("out_layers.3.weight", "proj_out.weight")):
        scale *= _BRANCH
    return (rng.standard_normal(shape, np.float32) * scale).astype(np.float16)


def _vae_scale(tensors: dict[str, np.ndarray], kind: Kind) -> None:
    """Scaled latents of variance about 1, and a posterior as narrow as a trained VAE's (log-variance −10)."""
    weight, bias = (tensors[f"first_stage_model.quant_conv.{part}"] for part in ("weight", "bias"))
    weight[:4] *= 2 / _SCALING[kind]  # the random encoder's means have a deviation of about 0.5
    weight[4:] *= 0.1
    bias[4:] = -10


def _rough_denoiser(tensors: dict[str, np.ndarray], kind: Kind) -> None:
    """A U-Net whose output is its noisy input, normalised, with the random features added.

    Each latent channel travels as a pair (x, −x) in channels 2i and 2i+1: through the first convolution,
    the last skip connection, and silu in the output, for silu(x) − silu(−x) = x. The output's group norm
    has one channel a group at this width, so that x is divided by its own deviation.
    """
    unet = "model.diffusion_model."
    first, last = tensors[unet + "input_blocks.0.0.weight"], tensors[unet + "out.2.weight"]
    skip = tensors[unet + _LAST_RESNET[kind] + ".skip_connection.weight"]  # (32, 32 from below + 32 skipped)
    width = first.shape[0]
    last *= 0.3
    skip[:8, :width] *= 0.3
    skip[:8, width:] = 0
    for latent in range(4):
        for channel, sign in ((2 * latent, 1), (2 * latent + 1, -1)):
            first[channel] = 0
            first[channel, latent, 1, 1] = sign
            skip[channel, width + channel] = 1
            last[:, channel] = 0
            last[latent, channel, 1, 1] = sign
