"""Every optimizer that people train a LoRA with: two steps with the real sd-scripts, a LoRA that works."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from kohya import rules, sd_scripts
from kohya.config import Kind
from tests.harness import Job

# All of these run on a CPU: bitsandbytes 0.50 takes the unpaged form of its paged optimizers there.
NAMES = (
    "AdamW", "AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit", "Lion", "Lion8bit", "PagedLion8bit",
    "SGDNesterov",
    "SGDNesterov8bit", "bitsandbytes.optim.AdEMAMix8bit", "DAdaptation", "DAdaptAdam", "DAdaptAdan",
    "DAdaptLion", "DAdaptSGD", "DAdaptAdaGrad", "Prodigy", "prodigyplus.ProdigyPlusScheduleFree", "Adafactor",
    "RAdamScheduleFree", "AdamWScheduleFree", "SGDScheduleFree", "pytorch_optimizer.CAME", "NAdam",
)  # fmt: skip
STEPS = {"RAdamScheduleFree": 8}  # its first five change nothing


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_makes_a_lora_that_works(name: str, narrow: Job, base_models: dict[Kind, Path]) -> None:
    """With the preset's own learning rates and schedule, as a user meets it who sets the optimizer alone."""
    if lacking := sd_scripts.find().lacks(rules.modules({"optimizer_type": name})):
        pytest.skip(f"{lacking[0]} is not installed where sd-scripts runs")
    narrow.mount("model", base_models["sd15"])
    steps = f"--max_train_steps={STEPS.get(name, 2)}"
    result = narrow.run(f"--optimizer_type={name}", steps, "--unet_lr=", "--save_precision=float")
    assert result.code == 0, result.out + result.err


def test_packages_that_are_absent_are_told_before_the_fetch(
    narrow: Job, base_models: dict[Kind, Path]
) -> None:
    """The Python of these tests stands in for one that has what sd-scripts must have, and no more."""
    if present := [name for name in ("prodigyopt", "lycoris") if find_spec(name)]:
        pytest.skip(f"{present[0]} is installed here")
    narrow.mount("model", base_models["sd15"])
    narrow.environment["SD_SCRIPTS_PYTHON"] = sys.executable
    flags = ("--optimizer_type=Prodigy", "--network_module=lycoris.kohya", "--network_args=preset=attn-mlp")
    result = narrow.run(*flags)
    assert result.code == 2, result.out + result.err
    assert "flag --optimizer_type: prodigyopt cannot be imported" in result.err
    assert "pip install prodigyopt." in result.err
    assert "flag --network_module: lycoris cannot be imported" in result.err
    assert "pip install lycoris-lora." in result.err


def test_a_class_that_is_not_there_is_told_before_the_fetch(
    narrow: Job, base_models: dict[Kind, Path]
) -> None:
    narrow.mount("model", base_models["sd15"])
    result = narrow.run("--optimizer_type=torch.optim.AdamX")
    assert result.code == 2, result.out + result.err
    assert "flag --optimizer_type: torch.optim.AdamX cannot be imported" in result.err
