"""The hyperparameters of the demo's job: configs/<kind>.toml, changed for this machine."""

from dataclasses import dataclass
from pathlib import Path

from entrypoint import checkpoint
from entrypoint.gpu import find_gpu
from kohya.config import Kind

NAME = "photos"
_FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"

_ALWAYS = {"output_name": NAME, "seed": "1"}
# A narrow model learns from small pictures in seconds; random weights want larger steps than trained ones.
_NARROW = {
    "resolution": "128,128",
    "min_bucket_reso": "64",
    "max_bucket_reso": "256",
    "network_dim": "8",
    "network_alpha": "8",
    "network_train_unet_only": "false",
    "unet_lr": "4e-3",
    "text_encoder_lr": "1e-3",
    "learning_rate": "4e-3",
    "train_batch_size": "2",
    "gradient_checkpointing": "false",
    "max_train_steps": "70",
    "save_every_n_epochs": "2",
}
# A real model on a CPU takes 2 to 20 s a step: enough steps to see it work, not to make a good LoRA.
_CPU = {
    "resolution": "256,256",
    "min_bucket_reso": "128",
    "max_bucket_reso": "512",
    "unet_lr": "5e-4",
    "learning_rate": "5e-4",
    "train_batch_size": "1",
    "max_train_steps": "40",
}


@dataclass(frozen=True)
class Chosen:
    """Hyperparameters, the resolution in them, and by which share the LoRA must lower the loss."""

    hyperparameters: dict[str, str]
    why: str
    resolution: int
    narrow: bool
    drop: float


def choose(model: Path, kind: Kind) -> Chosen:
    """What suits the base model at `model` on this machine."""
    if look(model)[1]:
        return Chosen(_ALWAYS | _NARROW, "128 pixels and 70 steps, for a narrow model", 128, True, 0.05)
    if find_gpu():
        resolution = 512 if kind == "sd15" else 1024
        return Chosen(_ALWAYS, f"everything as configs/{kind}.toml has it", resolution, False, 0.0)
    precision = {"mixed_precision": "bf16"} if kind == "sdxl" else {}  # halves SDXL's 20 GB
    why = "no GPU, so 256 pixels and 40 steps: which takes minutes and is too little for a good LoRA"
    return Chosen(_ALWAYS | _CPU | precision, why, 256, False, 0.0)


def look(model: Path) -> tuple[Kind, bool]:
    """The kind of a base model, and whether its U-Net is narrower than the real one, which starts with 320.

    Raises NotABaseModel, naming what the file is instead, and OSError.
    """
    with model.open("rb") as file:
        header = checkpoint.read_header(file, model.stat().st_size)
    return checkpoint.identify(header), header[_FIRST_CONVOLUTION]["shape"][0] < 320
