"""kohya.builtin.options: what builtin does not have is refused by name, never ignored."""

import subprocess
import sys
from typing import Any

import pytest

from kohya import config
from kohya.builtin import options

NEEDED = {
    "pretrained_model_name_or_path": "m.safetensors",
    "train_data_dir": "d",
    "output_dir": "o",
    "resolution": "512,512",
    "network_module": "networks.lora",
}


def refused(kind: config.Kind = "sd15", **values: Any) -> list[str]:
    return [name for name, _, _ in options.problems({**NEEDED, **values}, kind)]


@pytest.mark.parametrize("kind", config.KINDS)
@pytest.mark.parametrize("gpu", ["", "Tesla T4", "NVIDIA A10G", "NVIDIA L4", "NVIDIA L40S", "A100", "H100"])
def test_our_presets_are_accepted(kind: config.Kind, gpu: str) -> None:
    values = config.merge(kind, [config.preset(kind), config.gpu_preset(gpu)]).values
    assert options.problems({**NEEDED, **values}, kind) == []


def test_every_option_is_had_known_without_effect_or_refused() -> None:
    other = {"str": "x", "int": 17, "float": 0.17, "bool": True, "int_or_float": 17, "Path": "x"}
    for name, option in config.options().items():
        if name in options.HAS | options.NO_EFFECT:
            continue
        value = other[option.type] if option.default != other[option.type] else "y"
        assert name in refused(**{name: value}), name


@pytest.mark.parametrize("off", [None, False, "", [], 0])
def test_an_option_that_is_off_is_no_problem(off: object) -> None:
    assert refused(xformers=off, network_dropout=off, network_args=off, caption_dropout_rate=off) == []


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer_type": "AdamW8bit"},
        {"lr_scheduler": "cosine_with_restarts"},
        {"network_module": "networks.dylora"},
        {"network_args": ["conv_dim=4"]},
        {"optimizer_args": ["amsgrad=True"]},
        {"optimizer_args": ["betas=0.9"]},
        {"prior_loss_weight": 0.5},
        {"save_model_as": "pt"},
        {"text_encoder_lr": [1e-4, 1e-5]},
        {"lr_warmup_steps": 10},
        {"resolution": "512,500"},
        {"enable_bucket": True, "bucket_reso_steps": 32},
        {"enable_bucket": True, "min_bucket_reso": 576},
        {"enable_bucket": True, "max_bucket_reso": 448},
        {"not_an_option": 1},
    ],
    ids=str,
)
def test_a_value_that_builtin_does_not_know_is_refused(values: dict[str, Any]) -> None:
    assert refused(**values) == [list(values)[-1]]


def test_nothing_to_train_is_refused() -> None:
    neither = {"network_train_unet_only": True, "network_train_text_encoder_only": True}
    assert refused(**neither) == ["network_train_text_encoder_only"]
    assert refused(learning_rate=0) == ["learning_rate"]
    assert refused(learning_rate=0, text_encoder_lr=[1e-5]) == []


def test_sdxl_has_its_own_rules() -> None:
    assert refused("sdxl", clip_skip=2) == []  # which sd-scripts accepts and does not use
    assert refused("sdxl", enable_bucket=True, bucket_reso_steps=32) == []


def test_several_problems_come_at_once_and_read_raises_them() -> None:
    values = {**NEEDED, "xformers": True, "optimizer_type": "Lion", "learning_rate": 0}
    with pytest.raises(ValueError, match=r"(?s)xformers.*optimizer_type.*every learning rate is 0"):
        options.read(values, "sd15")


def test_defaults_are_sd_scripts_own() -> None:
    read = options.read(NEEDED, "sd15")
    assert (read.learning_rate, read.max_train_steps, read.caption_extension) == (2e-6, 1600, ".caption")
    assert read.size == (512, 512)


def test_importing_it_does_not_import_torch() -> None:
    code = "import kohya.builtin.options, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
