"""Options that fit alone and not together. The presets lie below, as in every job."""

import pytest

from kohya import config, rules
from kohya.config import Kind, Merged, Setting
from kohya.problem import Problem

UNET_ONLY = {"network_train_unet_only": "true"}


def settle(kind: Kind, **values: str) -> tuple[Merged, list[Problem]]:
    layer = [Setting(name, value, f"flag --{name}", as_text=True) for name, value in values.items()]
    machine = [Setting("mixed_precision", "no", "this machine")]
    merged = config.merge(kind, [config.preset(kind), machine, layer])
    assert merged.problems == ()
    return rules.settle(kind, merged)


@pytest.mark.parametrize("kind", config.KINDS)
def test_the_presets_fit(kind: Kind) -> None:
    merged, problems = settle(kind)
    assert (problems, merged.notes) == ([], ())


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("sd15", {"network_module": ""}, "option network_module: it is not set"),
        ("sd15", {"network_args": "foo=1"}, "flag --network_args: networks.lora does not know foo"),
        ("sd15", {"network_alpha": "0"}, "would become network_dim. Write network_alpha = 32"),
        ("sd15", {"optimizer_type": "AdamX"}, "optimizer_type = AdamX is none that trains a LoRA"),
        ("sd15", {"optimizer_type": "adam"}, "Write Adam"),
        ("sd15", {"optimizer_type": "LBFGS"}, "none that trains a LoRA"),
        ("sd15", {"use_8bit_adam": "true"}, "Write optimizer_type = AdamW8bit"),
        ("sd15", {"use_lion_optimizer": "true"}, "Write optimizer_type = Lion"),
        ("sd15", {"fused_backward_pass": "true"}, "no LoRA is trained with a fused backward pass"),
        ("sd15", {"optimizer_args": "weight_decay:0.1"}, "'weight_decay:0.1' is not name=value"),
        ("sd15", {"optimizer_args": "a=b=c"}, "is not name=value"),
        ("sd15", {"lr_scheduler_args": "step_rules=1:0.1"}, "lr_scheduler_args = 'step_rules=1:0.1'"),
        ("sd15", {"unet_lr": "0", "text_encoder_lr": "0"}, "flag --unet_lr: every learning rate is 0"),
        ("sd15", {"learning_rate": "0", "unet_lr": "", "text_encoder_lr": ""}, "every learning rate is 0"),
        ("sd15", {"unet_lr": "0", **UNET_ONLY}, "every learning rate is 0"),
        ("sd15", {"optimizer_type": "Prodigy", "unet_lr": "1e-4"}, "wants factors near 1"),
        (
            "sd15",
            {"optimizer_type": "DAdaptAdam", "unet_lr": "1", "text_encoder_lr": ".5"},
            "one learning rate",
        ),
        ("sd15", {"lr_scheduler": "cosin"}, "lr_scheduler = cosin is not one of linear, cosine"),
        ("sd15", {"lr_scheduler": "reduce_lr_on_plateau"}, "is not one of linear"),
        ("sd15", {"lr_scheduler": "constant", "lr_warmup_steps": "10"}, "Write lr_warmup_steps = 0"),
        ("sd15", {"lr_scheduler": "cosine_with_min_lr"}, "wants lr_scheduler_min_lr_ratio"),
        ("sd15", {"resolution": ""}, "resolution is not set"),
        ("sd15", {"resolution": "0"}, "a side is shorter than 64 pixels"),
        ("sd15", {"bucket_reso_steps": "1"}, "bucket_reso_steps = 1 is no multiple of 64, as sd15 needs"),
        ("sdxl", {"bucket_reso_steps": "16"}, "is no multiple of 32, as sdxl needs"),
        ("sd15", {"resolution": "128", "min_bucket_reso": "256"}, "Write min_bucket_reso = 128"),
        ("sd15", {"resolution": "2048", "max_bucket_reso": "1024"}, "Write max_bucket_reso = 2048"),
        ("sd15", {"color_aug": "true", "cache_latents": "true"}, "Write cache_latents = false"),
        (
            "sd15",
            {"random_crop": "true", "cache_latents_to_disk": "true"},
            "cache_latents_to_disk keeps them",
        ),
        (
            "sdxl",
            {"cache_text_encoder_outputs": "true", "network_train_unet_only": "false"},
            "Write network_train_unet_only = true",
        ),
        (
            "sdxl",
            {"cache_text_encoder_outputs": "true", "shuffle_caption": "true"},
            "shuffle_caption changes captions",
        ),
        ("sd15", {"full_fp16": "true"}, "full_fp16 needs mixed_precision = fp16"),
        ("sd15", {"full_bf16": "true"}, "full_bf16 needs mixed_precision = bf16"),
        ("sd15", {"fp8_base": "true"}, "fp8_base needs mixed_precision = fp16 or bf16"),
        ("sd15", {"adaptive_noise_scale": "0.1", "noise_offset": "0"}, "needs noise_offset"),
        ("sd15", {"scale_v_pred_loss_like_noise_pred": "true"}, "needs v_parameterization"),
        ("sd15", {"v_pred_like_loss": "1", "v_parameterization": "true"}, "exclude each other"),
        ("sd15", {"masked_loss": "true"}, "masked_loss needs alpha_mask"),
        ("sd15", {"v2": "true"}, "it is for Stable Diffusion 2"),
        ("sd15", {"debug_dataset": "true"}, "trains nothing"),
        ("sd15", {"huggingface_repo_id": "a/b"}, "does not reach the hub"),
        ("sd15", {"face_crop_aug_range": "2"}, "is not a range"),
        ("sd15", {**UNET_ONLY, "network_train_text_encoder_only": "true"}, "leave nothing to train"),
    ],
)
def test_what_does_not_fit_together_is_a_problem(kind: Kind, values: dict[str, str], said: str) -> None:
    told = [str(problem) for problem in settle(kind, **values)[1]]
    assert len(told) == 1
    assert said in told[0]


@pytest.mark.parametrize(
    ("kind", "values", "become"),
    [
        ("sd15", {"optimizer_type": "Prodigy"}, {"text_encoder_lr": [1], "learning_rate": 1}),
        ("sd15", {"optimizer_type": "DAdaptSGD", "learning_rate": "0.5"}, {"text_encoder_lr": [0.5]}),
        ("sd15", {"optimizer_type": "Adafactor"}, {"lr_warmup_steps": 0}),
        ("sd15", {"lr_scheduler": "constant"}, {"lr_warmup_steps": 0}),
        ("sd15", {"resolution": "128"}, {"min_bucket_reso": 128}),
        ("sdxl", {"resolution": "4096"}, {"max_bucket_reso": 4096}),
        ("sd15", {"color_aug": "true"}, {"cache_latents": False}),
        ("sdxl", {"cache_text_encoder_outputs": "true"}, {"shuffle_caption": False}),
        ("sdxl", {"network_train_text_encoder_only": "true"}, {"network_train_unet_only": False}),
    ],
)
def test_a_value_of_the_preset_gives_way_and_that_is_said(
    kind: Kind, values: dict[str, str], become: dict[str, object]
) -> None:
    merged, problems = settle(kind, **values)
    assert problems == []
    assert {name: merged.values[name] for name in become} == become
    for name in become:
        assert any(f"{name} = " in note and " becomes " in note for note in merged.notes)


def test_schedules_and_rates_of_other_optimizers_are_left_alone() -> None:
    for name in ("RAdamScheduleFree", "AdamW8bit", "pytorch_optimizer.CAME", "NAdam"):
        merged, problems = settle("sd15", optimizer_type=name)
        assert (problems, merged.notes) == ([], ())
    merged, problems = settle("sd15", optimizer_type="Adafactor", optimizer_args="relative_step=False")
    assert (problems, merged.notes) == ([], ())


def test_the_modules_that_options_ask_for() -> None:
    assert rules.modules({"optimizer_type": "AdamW", "log_with": "tensorboard"}) == {}
    assert rules.modules({"optimizer_type": "PRODIGY", "network_module": "lycoris.kohya"}) == {
        "lycoris": "network_module",
        "prodigyopt": "optimizer_type",
    }
    assert rules.modules({"optimizer_type": "prodigyplus.ProdigyPlusScheduleFree", "log_with": "all"}) == {
        "prodigyplus": "optimizer_type",
        "wandb": "log_with",
    }
    assert rules.package("lycoris") == "lycoris-lora"
    assert rules.package("wandb") == "wandb"


def test_classes_are_named_by_their_path() -> None:
    values = {"optimizer_type": "pytorch_optimizer.CAME", "lr_scheduler_type": "CosineAnnealingLR"}
    assert rules.classes(values) == {
        "optimizer_type": "pytorch_optimizer.CAME",
        "lr_scheduler_type": "torch.optim.lr_scheduler.CosineAnnealingLR",
    }
    assert rules.classes({"optimizer_type": "AdamW"}) == {}


def test_the_old_spelling_of_caption_extension_counts() -> None:
    """sd-scripts lets it win over the right one, and the data set is looked at with the right one."""
    assert settle("sd15", caption_extention=".cap")[0].values["caption_extension"] == ".cap"
