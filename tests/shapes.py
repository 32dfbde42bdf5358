"""Writes tests/data: key names and shapes that the pinned sd-scripts gives to full-size models and LoRAs.

    python -m tests.shapes SD_SCRIPTS_FOLDER DATA_FOLDER

Runs in the Python that has sd-scripts' requirements; the models have no weights. `base_<kind>` is a
checkpoint, `lora_<kind>` a LoRA of rank 4, `locon_<kind>` what conv_dim adds to it, `blocks_<kind>` the
numbers of blocks by which block_dims and the like count.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

Shapes = dict[str, list[int]]


def text_encoder(made: Any, width: int, layers: int, heads: int, activation: str) -> Any:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=activation,
        projection_dim=width,
    )
    return made(config)


def shapes(tensors: Any) -> Shapes:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def saved(module: Any, save: Any) -> Shapes:
    """The tensors that `save` would write by its module's save_file."""
    found: Shapes = {}
    module.save_file = lambda tensors, *_, **__: found.update(shapes(tensors))
    save()
    return found


def added(lora: Any, text: Any, unet: Any, **arguments: str) -> Shapes:
    """The tensors of a LoRA by networks.lora."""
    with torch.device("meta"):
        network = lora.create_network(1.0, 4, 1.0, None, text, unet, **arguments)
        network.apply_to(text, unet, True, True)
    return shapes(network.state_dict())


def facts(folder: str) -> dict[str, dict[str, Any]]:
    """The content of each file, by its name."""
    sys.path.insert(0, folder)
    sd15, sdxl, lora = map(
        importlib.import_module, ("library.model_util", "library.sdxl_model_util", "networks.lora")
    )
    small, large = (importlib.import_module(f"library.{name}original_unet") for name in ("", "sdxl_"))
    with init_empty_weights():
        unets = {
            "sd15": small.UNet2DConditionModel(**sd15.create_unet_diffusers_config(False, False)),
            "sdxl": large.SdxlUNet2DConditionModel(),
        }
        vae = AutoencoderKL(**sd15.create_vae_diffusers_config())
        first = text_encoder(CLIPTextModel, 768, 12, 12, "quick_gelu")
        second = text_encoder(CLIPTextModelWithProjection, 1280, 32, 20, "gelu")
    file, scale = "x.safetensors", torch.empty((), device="meta")
    found: dict[str, dict[str, Any]] = {
        "base_sd15": saved(
            sd15,
            lambda: sd15.save_stable_diffusion_checkpoint(
                False, file, first, unets["sd15"], None, 0, 0, None, vae=vae
            ),
        ),
        "base_sdxl": saved(
            sdxl,
            lambda: sdxl.save_stable_diffusion_checkpoint(
                file, first, second, unets["sdxl"], 0, 0, None, vae, scale, None
            ),
        ),
    }
    texts = {"sd15": first, "sdxl": [first, second]}
    for kind, text in texts.items():
        found[f"lora_{kind}"] = added(lora, text, unets[kind])
    for kind, text in texts.items():  # after it: conv_dim extends sd-scripts' own list of targets, for good
        plain = found[f"lora_{kind}"]
        more = added(lora, text, unets[kind], conv_dim="4")
        locon = {name: shape for name, shape in more.items() if name not in plain}
        counted = [*(name for name in plain if name.endswith("_proj_in.alpha")), *locon]
        modules = dict.fromkeys(name.split(".")[0] for name in counted)
        found[f"locon_{kind}"] = locon
        found[f"blocks_{kind}"] = {name: lora.get_block_index(name, kind == "sdxl") for name in modules}
    return found


def text(content: dict[str, Any]) -> str:
    return (
        "{\n"
        + ",\n".join(f"{json.dumps(name)}: {json.dumps(fact)}" for name, fact in content.items())
        + "\n}\n"
    )


def main() -> None:
    source, target = sys.argv[1:]
    for name, content in facts(source).items():
        Path(target, f"{name}.json").write_text(text(content))


if __name__ == "__main__":
    main()
