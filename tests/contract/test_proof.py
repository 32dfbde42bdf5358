"""A LoRA of the job does something: in diffusers it lowers the denoising loss at fixed noise."""

import json
from pathlib import Path

import pytest

from demo import pictures
from demo.proof import Proof, measure
from demo.settings import NAME, choose
from kohya.config import KINDS, Kind
from tests.harness import Job

DROP = 0.05


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.write(tmp_path_factory.mktemp("photographs"))


def trained(job: Job, kind: Kind, base_model: Path, photographs: Path, **more: str) -> Proof:
    """Run the demo's job on a narrow model, and measure what its LoRA does."""
    job.mount("model", base_model)
    job.mount("dataset", photographs)
    chosen = choose(base_model, kind)
    job.configure("hyperparameters", {"trainer": "builtin", **chosen.hyperparameters, **more})
    result = job.run()
    assert result.code == 0, result.out + result.err
    lora = job.model / f"{NAME}.safetensors"
    return measure(base_model, kind, lora, photographs, resolution=chosen.resolution)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_lora_lowers_the_loss(
    kind: Kind, seed: int, job: Job, base_models: dict[Kind, Path], photographs: Path
) -> None:
    proof = trained(job, kind, base_models[kind], photographs, seed=str(seed), max_train_steps="28")
    assert proof.change <= -DROP, proof
    names = json.loads((Path(__file__).parents[1] / "data" / f"lora_{kind}.json").read_text())
    assert proof.modules == len({name.split(".")[0] for name in names})


def test_a_lora_that_hardly_learned_does_not(
    job: Job, base_models: dict[Kind, Path], photographs: Path
) -> None:
    """The same at a learning rate of all but 0 (at 0 itself the job fails): the measure can fail."""
    still = dict.fromkeys(("learning_rate", "unet_lr", "text_encoder_lr"), "1e-9")
    still |= {"save_precision": "float", "max_train_steps": "28"}
    proof = trained(job, "sd15", base_models["sd15"], photographs, **still)
    assert abs(proof.change) < DROP / 10, proof
