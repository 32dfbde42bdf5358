"""The proof that a LoRA does something, by a program that had no part in making it.

The LoRA is loaded with diffusers' own `load_lora_weights`; every number that then stands in the model is
held against the file; and the denoising loss on the data set is taken at fixed pictures, captions,
timesteps and noise, with and without the LoRA. Of this project only the reading of the base model is used.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from peft.tuners.lora import LoraLayer
from PIL import Image, ImageOps
from safetensors.torch import load_file

from demo.settings import look
from kohya.builtin.model import load_base_model
from kohya.config import Kind

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}  # what sd-scripts takes for a picture
_DRAWS = 4  # of noise and timestep for each picture


class WrongKeys(ValueError):
    """What stands in the model after loading is not what stands in the LoRA."""


@dataclass(frozen=True)
class Proof:
    """Mean squared error of the predicted noise, and the number of LoRA modules found in the model."""

    without: float
    with_lora: float
    modules: int

    @property
    def change(self) -> float:
        """−0.2 where the LoRA lowers the loss by a fifth."""
        return self.with_lora / self.without - 1

    def __str__(self) -> str:
        return f"{self.without:.3f} → {self.with_lora:.3f} ({self.change * 100:+.1f} %)".replace("-", "−")


def measure(
    base_model: Path,
    kind: Kind,
    lora: Path | None,
    dataset: Path,
    *,
    resolution: int = 128,
    tokenizer_dir: Path | None = None,
    seed: int = 0,
) -> Proof:
    """The denoising loss on the pictures below `dataset`, cut to squares of `resolution` pixels.

    None as `lora` measures the base model alone. A full-size SD1.5 in fp32 takes 6.4 GiB; SDXL
    is loaded in bf16. Raises WrongKeys where a module of the LoRA is missing in the model, the model has one
    more, or a number differs, and ValueError where there are no pictures.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    narrow = look(base_model)[1]
    dtype = torch.bfloat16 if kind == "sdxl" and not narrow else torch.float32
    pipeline = _pipeline(base_model, kind, dtype, tokenizer_dir).to(device)
    pictures = list(_pictures(dataset, most=16 if narrow or device == "cuda" else 4))  # else it takes an hour
    if not pictures:
        raise ValueError(f"{dataset} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    latents = [_latents(pipeline, picture, resolution) for picture, _ in pictures]
    captions = [caption for _, caption in pictures]
    without = _loss(pipeline, latents, captions, resolution, seed)
    if lora is None:
        return Proof(without, without, 0)
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    modules = compare(_in_file(load_file(lora)), _in_model(pipeline))
    return Proof(without, _loss(pipeline, latents, captions, resolution, seed), modules)


# -- what stands in the file, what stands in the model ----------------------------------------------

Module = tuple[torch.Tensor, torch.Tensor, float]  # down (r, in), up (out, r), alpha / r


def compare(expected: dict[str, Module], found: dict[str, Module]) -> int:
    """The number of modules; raises WrongKeys unless both hold the same ones with the same numbers."""
    wrong = {
        "missing in the model": expected.keys() - found.keys(),
        "in the model only": found.keys() - expected.keys(),
        "with other numbers": {name for name in expected.keys() & found.keys()
                               if not _same(expected[name], found[name])},
    }  # fmt: skip
    if any(wrong.values()) or not expected:
        told = "; ".join(f"{len(names)} {what}, {min(names)} first" for what, names in wrong.items() if names)
        raise WrongKeys(f"diffusers did not load the {len(expected)} LoRA modules as they are: {told}.")
    return len(expected)


def _same(expected: Module, found: Module) -> bool:
    same = (
        x.shape == y.shape and torch.equal(x.to(y.dtype), y.cpu())
        for x, y in zip(expected[:2], found[:2], strict=True)
    )
    return all(same) and abs(expected[2] - found[2]) < 1e-6


def _in_file(tensors: dict[str, torch.Tensor]) -> dict[str, Module]:
    names = {key.split(".", 1)[0] for key in tensors}
    modules = {}
    for name in names:
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        modules[name] = (down, up, float(tensors[f"{name}.alpha"]) / down.shape[0])
    return modules


def _in_model(pipeline: Any) -> dict[str, Module]:
    """Every LoRA layer that peft made, under the name that sd-scripts gives to its place."""
    xl = hasattr(pipeline, "text_encoder_2")
    parts = {"lora_te1" if xl else "lora_te": pipeline.text_encoder, "lora_unet": pipeline.unet}
    if xl:
        parts["lora_te2"] = pipeline.text_encoder_2
    modules = {}
    for prefix, part in parts.items():
        for name, layer in part.named_modules():
            if isinstance(layer, LoraLayer):
                (adapter,) = layer.lora_A
                place = _block(name) if xl and prefix == "lora_unet" else name
                weights: list[Any] = [half[adapter].weight for half in (layer.lora_A, layer.lora_B)]
                modules[f"{prefix}_{place.replace('.', '_')}"] = (*weights, float(layer.scaling[adapter]))
    return modules


def _block(name: str) -> str:
    """diffusers' name of a place in SDXL's U-Net → the original's: 3 blocks a level, after the first one."""
    level, rest = name.split(".attentions.", 1)
    number, rest = rest.split(".", 1)
    if level == "mid_block":
        return f"middle_block.1.{rest}"
    side, count = level.split("_blocks.")
    if side == "down":
        return f"input_blocks.{1 + 3 * int(count) + int(number)}.1.{rest}"
    return f"output_blocks.{3 * int(count) + int(number)}.1.{rest}"


# -- the loss ---------------------------------------------------------------------------------------


def _pipeline(base_model: Path, kind: Kind, dtype: torch.dtype, tokenizer_dir: Path | None) -> Any:
    parts = load_base_model(base_model, kind, dtype, tokenizer_dir)
    # Stable Diffusion's own noise schedule (v1-inference.yaml, sd_xl_base.yaml)
    scheduler = DDPMScheduler(  # type: ignore[no-untyped-call]
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, steps_offset=1,
    )  # fmt: skip
    common = {"vae": parts.vae, "unet": parts.unet, "scheduler": scheduler}
    if kind == "sdxl":
        (one, two), (first, second) = parts.text_encoders, parts.tokenizers
        return StableDiffusionXLPipeline(  # type: ignore[no-untyped-call]
            text_encoder=one, text_encoder_2=two, tokenizer=first, tokenizer_2=second,
            add_watermarker=False, **common,
        )  # fmt: skip
    return StableDiffusionPipeline(  # type: ignore[no-untyped-call]
        text_encoder=parts.text_encoders[0], tokenizer=parts.tokenizers[0],
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **common,
    )  # fmt: skip


def _pictures(dataset: Path, most: int = 16) -> Iterator[tuple[Path, str]]:
    """Pictures with their captions, of many `most` evenly spaced; the class word where there is no `.txt`."""
    found = sorted(file for file in dataset.rglob("*") if file.suffix.lower() in SUFFIXES)
    for number in np.linspace(0, len(found) - 1, min(len(found), most)).round().astype(int):
        picture, caption = found[number], found[number].with_suffix(".txt")
        word = picture.parent.name.partition("_")[2]
        yield picture, caption.read_text(encoding="utf-8").strip() if caption.is_file() else word


@torch.no_grad()
def _latents(pipeline: Any, picture: Path, resolution: int) -> torch.Tensor:
    with Image.open(picture) as image:
        square = ImageOps.fit(image.convert("RGB"), (resolution, resolution), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None] / 127.5 - 1
    vae = pipeline.vae
    latents: torch.Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    return latents.mul(vae.config.scaling_factor)


@torch.no_grad()
def _loss(
    pipeline: Any, latents: list[torch.Tensor], captions: list[str], resolution: int, seed: int
) -> float:
    """The mean over pictures and draws. The draws depend on `seed` alone; timesteps are spread evenly."""
    draw = torch.Generator().manual_seed(seed)
    losses = []
    for latent, caption in zip(latents, captions, strict=True):
        noise = torch.randn((_DRAWS, *latent.shape[1:]), generator=draw).to(latent)
        timesteps = ((torch.arange(_DRAWS) + torch.rand(_DRAWS, generator=draw)) / _DRAWS * 1000).long()
        timesteps = timesteps.to(latent.device)
        noisy = pipeline.scheduler.add_noise(latent.expand_as(noise), noise, timesteps)
        predicted = pipeline.unet(noisy, timesteps, **_condition(pipeline, caption, resolution)).sample
        losses.append(torch.nn.functional.mse_loss(predicted.float(), noise.float()).item())
    return sum(losses) / len(losses)


def _condition(pipeline: Any, caption: str, resolution: int) -> dict[str, Any]:
    """What the U-Net is told besides the latents, by the pipeline's own encoding of the caption."""
    device = pipeline.unet.device
    words, _, *pooled = pipeline.encode_prompt(
        caption, device=device, num_images_per_prompt=_DRAWS, do_classifier_free_guidance=False
    )
    if not pooled:
        return {"encoder_hidden_states": words}
    size = [resolution, resolution]
    ids = torch.tensor([[*size, 0, 0, *size]] * _DRAWS, dtype=words.dtype, device=device)
    return {"encoder_hidden_states": words, "added_cond_kwargs": {"text_embeds": pooled[0], "time_ids": ids}}
