"""A base model, read from the original single-file layout with no network, and what it makes of captions."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.loaders import single_file_utils
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError  # type: ignore[attr-defined]
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from kohya import tokenizers
from kohya.builtin import BuiltinError
from kohya.config import Kind

Tensors = Mapping[str, torch.Tensor]
_convert: Any = single_file_utils  # untyped

VAE_SCALE = {"sd15": 0.18215, "sdxl": 0.13025}  # train_network.py:58, library/sdxl_model_util.py:18

CLIP = {"sd15": (tokenizers.CLIP_L,), "sdxl": (tokenizers.CLIP_L, tokenizers.BIG_G)}
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_CLIP_L = {"sd15": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
_BIG_G = "conditioner.embedders.1.model."


class BaseModelError(BuiltinError):
    """The file is missing, damaged, or not a base model of the kind that was asked for."""


@dataclass(frozen=True)
class BaseModel:
    """The parts of a base model, frozen and in eval mode, on the CPU."""

    kind: Kind
    tokenizers: tuple[Any, ...]  # transformers' CLIPTokenizer: one for SD1.5, two for SDXL
    text_encoders: tuple[Any, ...]  # CLIPTextModel; for SDXL also CLIPTextModelWithProjection
    vae: Any  # diffusers' AutoencoderKL
    unet: Any  # diffusers' UNet2DConditionModel


def load_base_model(
    path: Path,
    kind: Kind,
    dtype: torch.dtype = torch.float32,
    tokenizer_dir: Path | None = None,
    *,
    vae_dtype: torch.dtype | None = None,
    draw_as_sd_scripts: bool = False,
) -> BaseModel:
    """Load the `.safetensors` checkpoint at `path`, every part in `dtype` (the VAE in `vae_dtype`).

    Widths are read from the tensors' shapes, so narrow test models load too. `tokenizer_dir` is laid out
    as sd-scripts' tokenizer_cache_dir; None means `kohya.tokenizers.folder()`. No network is touched.
    Raises `BaseModelError` where the file is missing, damaged or of another kind, and
    `kohya.tokenizers.MissingTokenizers` where the tokenizers are not there.

    `draw_as_sd_scripts` leaves torch's generator where sd-scripts has it after loading: it first fills all
    of SD1.5 with random numbers (library/model_util.py:1009-1068).
    """
    tensors = _read(path)
    try:
        unet, vae = _empty_unet(tensors, kind), _empty_vae(tensors, kind)
        layers = _CLIP_L[kind] + "text_model.encoder.layers."
        text_encoders = [_empty_text_encoder(tensors, layers, "mlp.fc2.weight", "quick_gelu")]
        if kind == "sdxl":
            layers = _BIG_G + "transformer.resblocks."
            text_encoders.append(_empty_text_encoder(tensors, layers, "mlp.c_proj.weight", "gelu"))
    except (KeyError, IndexError) as error:
        raise BaseModelError(f"{path} is not a base model of kind {kind}: it has no {error}.") from None

    catch_up: Callable[[], None] = lambda: None  # noqa: E731
    if draw_as_sd_scripts and kind == "sd15":  # SDXL is built empty (library/sdxl_model_util.py:199)
        catch_up = _draw_in_background(_draws(unet) + _draws(vae) + _draws(text_encoders[0]))
    try:
        _fill(vae, _convert.convert_ldm_vae_checkpoint(tensors, vae.config), vae_dtype or dtype)
        _fill(unet, _convert.convert_ldm_unet_checkpoint(tensors, unet.config), dtype)
        _fill(text_encoders[0], _convert.convert_ldm_clip_checkpoint(tensors, _CLIP_L[kind]), dtype)
        if kind == "sdxl":
            converted = _convert.convert_open_clip_checkpoint(text_encoders[1], tensors, _BIG_G)
            _fill(text_encoders[1], converted, dtype)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BaseModelError(f"{path} is not a whole base model of kind {kind}: {reason}") from None
    finally:
        catch_up()
    words = tokenizers.load(tokenizer_dir or tokenizers.folder(), CLIP[kind])
    return BaseModel(kind, words, tuple(text_encoders), vae, unet)


def encode(
    base: BaseModel, captions: list[str], max_token_length: int | None, clip_skip: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the U-Net is conditioned on: states (captions, tokens, width); for SDXL pooled (captions, width).

    Sources: library/strategy_sd.py:52-98, library/strategy_sdxl.py:50-157."""
    ids = [
        torch.tensor([tokenizers.chunks(tokenizer, caption, max_token_length) for caption in captions])
        for tokenizer in base.tokenizers
    ]
    device = base.text_encoders[0].device
    if base.kind == "sd15":
        encoder = base.text_encoders[0]
        output = encoder(ids[0].flatten(0, 1).to(device), output_hidden_states=clip_skip is not None)
        if clip_skip is None:
            return _join(output[0], ids[0]), None
        states = encoder.text_model.final_layer_norm(output.hidden_states[-clip_skip])
        return _join(states, ids[0]), None

    outputs = [
        encoder(tokens.flatten(0, 1).to(device), output_hidden_states=True)
        for encoder, tokens in zip(base.text_encoders, ids, strict=True)
    ]
    states = torch.cat(
        [_join(outputs[0].hidden_states[11], ids[0]), _join(outputs[1].hidden_states[-2], ids[1])], dim=2
    )
    # Pooled by hand: transformers pools at the largest id, which is not the end token once words were added.
    end = (ids[1][:, 0] == base.tokenizers[1].eos_token_id).int().argmax(dim=1).to(device)
    last = outputs[1].last_hidden_state[:: ids[1].shape[1]]  # of the first chunk
    picked = last[torch.arange(len(last), device=device), end]
    # The checkpoint's matrix is meant for x @ matrix, and diffusers loads it so. sd-scripts takes it for a
    # linear layer's weight, not transposed (library/sdxl_model_util.py:99-100), and so trains with this:
    matrix = base.text_encoders[1].text_projection.weight.T.contiguous()
    return states, functional.linear(picked.to(matrix.dtype), matrix).to(last.dtype)


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise BaseModelError(f"There is no base model at {path}.")
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except SafetensorError as error:
        raise BaseModelError(f"{path} is not a whole .safetensors file: {error}.") from None
    return tensors


def _empty_unet(tensors: Tensors, kind: Kind) -> Any:
    """The U-Net without weights. Sources: library/original_unet.py:123-137, sdxl_original_unet.py:40-45."""
    width = tensors[_UNET + "input_blocks.0.0.weight"].shape[0]
    first = {"sd15": "input_blocks.1.1", "sdxl": "input_blocks.4.1"}[kind]
    config: dict[str, Any] = {
        "cross_attention_dim": tensors[f"{_UNET}{first}.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "block_out_channels": (width, 2 * width, 4 * width, 4 * width),
        "attention_head_dim": 8,  # diffusers' name for the number of heads
        "sample_size": 64,
    }  # all else of SD1.5 is diffusers' default
    if kind == "sdxl":
        config |= {
            "block_out_channels": (width, 2 * width, 4 * width),
            "attention_head_dim": (max(width // 64, 1), 2 * width // 64, 4 * width // 64),
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": tensors[_UNET + "label_emb.0.0.weight"].shape[1],
        }
    with init_empty_weights():
        return UNet2DConditionModel(**config)


def _empty_vae(tensors: Tensors, kind: Kind) -> Any:
    width = tensors[_VAE + "encoder.conv_in.weight"].shape[0]
    with init_empty_weights():
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            layers_per_block=2,
            scaling_factor=VAE_SCALE[kind],
        )


def _empty_text_encoder(tensors: Tensors, layers: str, last: str, activation: str) -> Any:
    """A text encoder without weights. `layers` begins its layers' keys, `last` ends a layer's last matrix's.

    Sources: library/model_util.py:1046-1065, library/sdxl_model_util.py:212-258. Heads are 64 wide.
    """
    width, inner = tensors[f"{layers}0.{last}"].shape
    numbers = {key[len(layers) :].split(".")[0] for key in tensors if key.startswith(layers)}
    config = CLIPTextConfig(  # type: ignore[no-untyped-call]
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=len(numbers),
        num_attention_heads=width // 64,
        hidden_act=activation,
        projection_dim=width,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,  # makes transformers pool at the largest id, as the checkpoints expect
    )
    with init_empty_weights():
        return (CLIPTextModel if activation == "quick_gelu" else CLIPTextModelWithProjection)(config)


def _fill(model: nn.Module, tensors: Tensors, dtype: torch.dtype) -> None:
    """Put the checkpoint's tensors in place of the empty ones: nothing is initialised or copied twice."""
    wanted = {key: value.to(dtype) for key, value in tensors.items() if not key.endswith("position_ids")}
    model.load_state_dict(wanted, assign=True)
    model.requires_grad_(False).eval()


def _draws(model: nn.Module) -> int:
    """How many 32-bit numbers a default initialisation of `model` takes from torch's generator.

    One an element (true of normal draws only where 16 divides the size, as it does everywhere here). The
    text encoder's weights are drawn twice: by torch, and again by transformers' own initialisation.
    """
    drawn = (nn.Linear, nn.Conv2d, nn.Embedding)
    layers = [module for module in model.modules() if isinstance(module, drawn)]
    total = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    if isinstance(model, CLIPTextModel):
        total += sum(layer.weight.numel() for layer in layers)
    return total


def _draw_in_background(count: int) -> Callable[[], None]:
    """Move torch's CPU generator on by `count` draws while the disk is read; the result waits for it.

    Full-size SD1.5 takes 1.2 billion draws, 2.5 seconds of one core.
    """
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    buffer = torch.empty(1 << 16, dtype=torch.uint8)  # small: it stays in the cache

    def draw() -> None:
        for start in range(0, count, len(buffer)):
            buffer[: count - start].random_(generator=generator)

    def finish() -> None:
        thread.join()
        torch.set_rng_state(generator.get_state())

    thread = threading.Thread(target=draw)
    thread.start()
    return finish


def _join(states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(captions · chunks, 77, width) → (captions, tokens, width), with the outermost begin and end only."""
    parts = states.reshape(*ids.shape[:2], *states.shape[1:])
    middle = parts[:, :, 1:-1].flatten(1, 2)
    return torch.cat([parts[:, 0, :1], middle, parts[:, -1, -1:]], dim=1)
