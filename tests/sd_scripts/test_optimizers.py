"""Every optimizer that people train a LoRA with: two steps with the real sd-scripts, a LoRA that works."""

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
