"""What a file of weights is that is no base model for this job, by the names of its tensors.

The names are those of sd-scripts v0.10.1 (library/, networks/), of diffusers, and of ComfyUI
(comfy/supported_models.py).
"""

import re

from entrypoint.header import FIX, Header, shown

DIFFUSERS = (
    "Make one file of the folder: of SD1.5 with sd-scripts' tools/convert_diffusers20_original_sd.py FOLDER "
    "model.safetensors, of SDXL with diffusers' scripts/convert_diffusers_to_original_sdxl.py --half "
    "--use_safetensors --model_path FOLDER --checkpoint_path model.safetensors"
)
WHOLE = "Give a full checkpoint: U-Net, text encoder and VAE in one .safetensors file"
PRECISE = "Give the same model in fp16, bf16 or fp32"
UNET_IN = "model.diffusion_model.input_blocks.0.0.weight"  # (width, channels of the latents, 3, 3)

_BASE = "Give the Stable Diffusion 1.5 or SDXL base model"
_PLAIN = "Give the plain model that it was made from: a LoRA for that one works with this one too"
_BY_CHANNELS = {  # of the U-Net's input, where a plain model has the latents' 4
    9: ("an inpainting model (its U-Net takes 9 channels)", _PLAIN),
    8: ("a model that changes pictures, as instruct-pix2pix does (its U-Net takes 8 channels)", FIX),
    7: ("an upscaler (its U-Net takes 7 channels)", FIX),
    5: ("a model that wants a depth map (its U-Net takes 5 channels)", FIX),
}
_BY_NAME = tuple(
    (re.compile(pattern), what, fix)
    for pattern, what, fix in (  # how one of the names begins; the first that fits counts
        (r"unet\..*lora", "a LoRA in diffusers' format", f"{_BASE} that it was made for"),
        (r"lora_|.*\.(lora_(down|up|A|B)|hada_w1_a|lokr_w1|lokr_w1_a|oft_blocks)(\.|$)",
         "a LoRA", f"{_BASE} that it was made for; a LoRA to go on from belongs in the channel weights"),
        (r"(emb_params|clip_[gl]|string_to_param)$", "a textual inversion embedding", FIX),
        (r"control_model\.|controlnet_|input_hint_block\.|lllite_",
         "a ControlNet", f"{_BASE} that it steers"),
        (r"(image_proj|ip_adapter)\.", "an IP-Adapter", f"{_BASE} that it steers"),
        (r"(model\.diffusion_model\.)?double_blocks\.", "a Flux model", FIX),
        (r"(model\.diffusion_model\.)?joint_blocks\.", "a Stable Diffusion 3 model", FIX),
        (r"cond_stage_model\.model\.", "a Stable Diffusion 2 model", FIX),
        (r"conditioner\.embedders\.0\.model\.", "the SDXL refiner", "Give the SDXL base model"),
        (r"edm_(mean|std|vpred)", "an SDXL model with EDM's noise, which sd-scripts does not make", FIX),
        (r".*\.(absmax|quant_map|qweight|scale_weight)$|scaled_fp8$", "a quantized model", PRECISE),
    )
)  # fmt: skip
_PARTS = tuple(
    (re.compile(pattern), what, fix)
    for pattern, what, fix in (
        (r"model\.diffusion_model\.|input_blocks\.0\.0\.", "a U-Net without a text encoder", WHOLE),
        (r"down_blocks\.", "a U-Net in diffusers' format", DIFFUSERS),
        (r"(cond_stage_model|conditioner|text_model|transformer\.resblocks|encoder\.block|shared)\.",
         "a text encoder", WHOLE),
        (r"(first_stage_model|encoder|decoder)\.", "a VAE", f"{_BASE}; a VAE belongs in the channel vae"),
    )
)  # fmt: skip


def model(header: Header) -> tuple[str, str] | None:
    """What other model it is, and the way out; None where it looks like a base model for this job."""
    if told := _BY_CHANNELS.get(channels(header)):
        return told
    for pattern, what, fix in _BY_NAME:
        if any(map(pattern.match, header)):
            return what, fix
    return None


def part(header: Header) -> tuple[str, str]:
    """What part of a model it is, if any, and the way out."""
    for pattern, what, fix in _PARTS:
        if any(map(pattern.match, header)):
            return what, fix
    return f"something else (its first tensor is {shown(next(iter(header), 'missing'))})", FIX


def named(header: Header) -> tuple[str, str]:
    """What it is, in any case, and the way out."""
    return model(header) or part(header)


def channels(header: Header) -> int:
    """Those that the U-Net takes; 0 where there is none in the original layout."""
    match header.get(UNET_IN):
        case {"shape": [_, int(taken), _, _]}:
            return taken
    return 0
