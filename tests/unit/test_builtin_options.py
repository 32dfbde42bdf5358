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


HAS = """pretrained_model_name_or_path train_data_dir output_dir output_name logging_dir log_prefix
    tokenizer_cache_dir training_comment resume seed resolution caption_extension caption_separator
    shuffle_caption keep_tokens enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps
    bucket_no_upscale cache_latents vae_batch_size train_batch_size network_dim network_alpha
    network_train_unet_only network_train_text_encoder_only learning_rate unet_lr text_encoder_lr
    max_grad_norm lr_warmup_steps max_train_steps max_train_epochs gradient_accumulation_steps
    gradient_checkpointing no_half_vae clip_skip noise_offset min_snr_gamma save_every_n_epochs
    save_every_n_steps save_state save_state_on_train_end"""
NO_EFFECT = """config_file console_log_level console_log_simple disable_mmap_load_safetensors dynamo_backend
    highvram huber_c huber_scale huber_schedule lowram zero_stage lr_scheduler_num_cycles lr_scheduler_power
    max_data_loader_n_workers multires_noise_discount persistent_data_loader_workers sample_sampler sdpa
    token_warmup_min"""


@pytest.mark.parametrize("name", [*HAS.split(), *NO_EFFECT.split()])
def test_options_that_builtin_has_or_that_change_nothing(name: str) -> None:
    other = {"str": "512,448", "int": 17, "float": 0.17, "bool": True, "int_or_float": 17, "Path": "x"}
    value = other[config.options()[name].type]
    assert name not in [one for one, _, _ in options.lacks({**NEEDED, "enable_bucket": True, name: value})]


def test_the_arguments_of_adamw_that_builtin_has() -> None:
    asked = ["weight_decay=0.01", "betas=0.9,0.99", "eps=1e-8"]
    assert options.lacks({**NEEDED, "optimizer_args": asked}) == []


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("log_with", (None, "tensorboard")),
        ("lr_scheduler", ("constant", "constant_with_warmup", "cosine")),
        ("max_token_length", (None, 75, 150, 225)),
        ("mixed_precision", ("no", "fp16", "bf16", None)),
        ("network_module", ("networks.lora",)),
        ("optimizer_type", ("AdamW", "adamw", "", None)),
        ("prior_loss_weight", (1, 1.0)),
        ("save_model_as", ("safetensors", None)),
        ("save_precision", (None, "float", "fp16", "bf16")),
    ],
)
def test_options_of_which_builtin_knows_some_values(name: str, known: tuple[object, ...]) -> None:
    for value in known:
        assert options.lacks({**NEEDED, name: value}) == []
    (found,) = options.lacks({**NEEDED, name: "another"})
    assert (found[0], found[1].endswith(", not 'another'")) == (name, True)
    assert found[1].startswith("builtin knows ")
    assert found[2] == "Take it out, or use trainer = sd-scripts"


@pytest.mark.parametrize(
    "name", ["output_dir", "pretrained_model_name_or_path", "resolution", "train_data_dir"]
)
def test_options_that_builtin_cannot_do_without(name: str) -> None:
    assert (name, "it is not set", f"Set {name}") in options.lacks({**NEEDED, name: ""})


def test_what_is_wrong_with_each_is_said() -> None:
    def said(**values: object) -> str:
        return " ".join(
            f"{name}: {wrong}. {fix}." for name, wrong, fix in options.lacks({**NEEDED, **values})
        )

    assert "xformers: builtin does not have this option. Take it out" in said(xformers=True)
    assert "text_encoder_lr: sd-scripts uses only the first of [0.1, 0.2]. Give one number." in said(
        text_encoder_lr=[0.1, 0.2]
    )
    assert "resolution: 512,500 is not a multiple of 8. Use multiples of 64." in said(resolution="512,500")
    assert """"eps=1e-8", not 'amsgrad=True'""" in said(optimizer_args=["amsgrad=True"])
