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
        ("sd15", {"optimizer_type": "adam8bit"}, "Write one of adamw8bit, pagedadamw8bit, adamw, or"),
        ("sd15", {"optimizer_type": "xyz"}, "Write one of adamw, adafactor, sgdnesterov, lion, prodigy"),
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
        ("sd15", {"dim_from_weights": "true"}, "dim_from_weights needs network_weights"),
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
        ("sd15", {"color_aug": "true", "random_crop": "true"}, {"cache_latents": False}),
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


def test_a_second_rate_of_text_encoders_is_not_used_and_that_is_said() -> None:
    notes = settle("sd15", text_encoder_lr="5e-5 1e-5")[0].notes
    told = "text_encoder_lr has 2 rates: sd-scripts takes 5e-05 for every text encoder, the first"
    assert notes == (f"flag --text_encoder_lr: {told}",)
    assert settle("sd15", text_encoder_lr="5e-5 5e-5")[0].notes == ()


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


# Every place where sd-scripts v0.10.1 only warns (logger.warning), in the files that a LoRA is trained with.
# Either options that show what is told here, as a problem or as a note; or why nothing needs to be told.
NESTEROV = {"optimizer_type": "SGDNesterov8bit", "unet_lr": "1e-3"}
PLAIN_BUCKETS = {"bucket_no_upscale": "false"}
RELATIVE = {"optimizer_type": "Adafactor", "unet_lr": "1e-3"}
WARNINGS: dict[str, tuple[dict[str, str], str] | str] = {
    "train_network.py:523": "the job sets no train_data_dir beside a dataset_config",
    "train_network.py:699": (
        {"scale_weight_norms": "1", "network_module": "networks.dylora", "network_args": "unit=4"},
        "networks.dylora has no scale_weight_norms",
    ),
    "train_network.py:1236": (
        {"initial_step": "5", "resume": "/state"},
        "initial_step and resume exclude each other",
    ),
    "library/train_util.py:753": (
        {"min_bucket_reso": "300", **PLAIN_BUCKETS},
        "min_bucket_reso = 300 is read as 256",
    ),
    "library/train_util.py:760": (
        {"max_bucket_reso": "1000", **PLAIN_BUCKETS},
        "max_bucket_reso = 1000 is read as 1024",
    ),
    "library/train_util.py:791": "the data set's count of epochs, which no option touches",
    "library/train_util.py:1032": ({"max_bucket_reso": "768"}, "max_bucket_reso has no effect: with"),
    "library/train_util.py:1489": "entrypoint.pictures opens every picture",
    "library/train_util.py:1974": "entrypoint.dataset names a folder that is not there",
    "library/train_util.py:1984": "cache_info: there is no such file at first, and it is made",
    "library/train_util.py:2071": "entrypoint.dataset refuses a picture without a caption",
    "library/train_util.py:2090": "the same",
    "library/train_util.py:2095": "the same",
    "library/train_util.py:2097": "the same",
    "library/train_util.py:2119": "entrypoint.dataset and kohya.dataset_config refuse repeats below 1",
    "library/train_util.py:2125": "each subset has a folder of its own in the trainer's tree",
    "library/train_util.py:2132": "entrypoint.dataset refuses a folder without pictures",
    "library/train_util.py:2164": "the job tells how many regularisation pictures an epoch uses",
    "library/train_util.py:2167": "there are none in most jobs",
    "library/train_util.py:2230": "in_json and metadata_file are refused",
    "library/train_util.py:2236": "the same",
    "library/train_util.py:2266": "the same",
    "library/train_util.py:2467": "conditioning_data_dir is refused",
    "library/train_util.py:4380": "the job writes options into a TOML, and none into a command line",
    "library/train_util.py:4422": ({"v2": "true", "clip_skip": "2"}, "it is for Stable Diffusion 2"),
    "library/train_util.py:4426": "cache_latents_to_disk stands for both, and nothing is lost",
    "library/train_util.py:4457": (
        {"zero_terminal_snr": "true"},
        "zero_terminal_snr needs v_parameterization",
    ),
    "library/train_util.py:4463": ({"sample_every_n_epochs": "0"}, "\"0\" is read as unset"),
    "library/train_util.py:4469": ({"sample_every_n_steps": "0"}, "\"0\" is read as unset"),
    "library/train_util.py:4904": (NESTEROV, "sgdnesterov8bit is used with momentum=0.9"),
    "library/train_util.py:4991": ({"optimizer_type": "Prodigy", "unet_lr": "1e-4"}, "wants factors near 1"),
    "library/train_util.py:4994": "the same",
    "library/train_util.py:4996": (
        {"optimizer_type": "Prodigy", "unet_lr": "1", "text_encoder_lr": "0.5"},
        "prodigy takes one learning rate",
    ),
    "library/train_util.py:5061": "learning_rate is Adafactor's first rate, as it is meant",
    "library/train_util.py:5073": (RELATIVE, "unet_lr has no effect: Adafactor with relative_step"),
    "library/train_util.py:5084": "advice: the LoRA is trained as asked",
    "library/train_util.py:5088": "the same",
    "library/train_util.py:5090": "the same",
    "library/train_util.py:5427": "in_json is refused",
    "library/sdxl_train_util.py:352": ({"clip_skip": "2"}, "clip_skip has no effect: SDXL"),
    "library/sdxl_train_util.py:374": "cache_text_encoder_outputs_to_disk stands for both",
    "library/config_util.py:613": "entrypoint.dataset refuses a folder whose name has no number",
    "networks/lora.py:538": "block_dims is network_dim where it is not given: as it is documented",
    "networks/lora.py:549": "the same of block_alphas",
    "networks/lora.py:569": "the same of conv_block_alphas",
    "networks/lora.py:575": "conv_dim counts for all blocks, as it is meant",
    "networks/lora.py:642": (
        {"network_args": "down_lr_weight=1,1,1,1,1,1,1,1,1,1,1,1,1"},
        "sd15 has 12 such blocks",
    ),
    "networks/lora.py:643": "the same",
    "networks/lora.py:648": ({"network_args": "mid_lr_weight=1,1"}, "sd15 has 1 such blocks"),
    "networks/lora.py:649": "the same",
    "networks/lora.py:655": "weights that are not given are 1: as it is documented",
    "networks/lora.py:656": "the same",
    "networks/lora.py:666": "the same",
    "networks/lora.py:667": "the same",
    "networks/lora.py:801": "a key that sd-scripts' own U-Net does not have",
    "networks/lora.py:1047": "a rank or weight of 0 leaves a block out, as it is meant",
}  # fmt: skip


@pytest.mark.parametrize(
    ("place", "values", "said"),
    [(place, *told) for place, told in WARNINGS.items() if not isinstance(told, str)],
)
def test_what_sd_scripts_only_warns_of_is_told(place: str, values: dict[str, str], said: str) -> None:
    kind: Kind = "sdxl" if "sdxl" in place else "sd15"
    merged, problems = settle(kind, **values)
    assert any(said in told for told in (*map(str, problems), *merged.notes)), (problems, merged.notes)


def test_a_users_value_that_counts_is_not_said_to_do_nothing() -> None:
    for kind, values in (
        ("sd15", {"clip_skip": "2"}),
        ("sd15", {"min_bucket_reso": "320", **PLAIN_BUCKETS}),
        ("sd15", {"min_bucket_reso": "300", "enable_bucket": "false"}),
        ("sd15", {"optimizer_type": "SGDNesterov", "optimizer_args": "momentum=0.8", "unet_lr": "1e-3"}),
        ("sd15", {**RELATIVE, "optimizer_args": "relative_step=False"}),
    ):
        merged, problems = settle(kind, **values)
        assert (merged.notes, problems) == ((), [])


@pytest.mark.parametrize("name", ["optimizer_type", "lr_scheduler_type"])
@pytest.mark.parametrize("value", ["a; rm -rf /", "a\0b.C", "a.b.", "$(x).y", "a\nb.C"])
def test_a_name_that_is_no_class_goes_nowhere(name: str, value: str) -> None:
    """It is handed to a process, and imported there."""
    told = settle("sd15", **{name: value})[1]
    assert any("is no package.Class" in problem.wrong for problem in told)


def test_a_masked_loss_takes_its_mask_from_a_dataset_config() -> None:
    assert settle("sd15", masked_loss="true", dataset_config="data.toml")[1] == []
    assert settle("sd15", masked_loss="true", alpha_mask="true")[1] == []


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (None, "AdamW AdaFactor SGDNesterov"),
        ("bitsandbytes", "AdamW8bit PagedAdamW PagedAdamW8bit PagedAdamW32bit Lion8bit PagedLion8bit"),
        ("bitsandbytes", "SGDNesterov8bit"),
        ("dadaptation", "DAdaptation DAdaptAdamPreprint DAdaptAdaGrad DAdaptAdam DAdaptAdan DAdaptAdanIP"),
        ("dadaptation", "DAdaptLion DAdaptSGD"),
        ("schedulefree", "RAdamScheduleFree AdamWScheduleFree SGDScheduleFree"),
        ("lion_pytorch", "Lion"),
        ("prodigyopt", "Prodigy"),
        (None, "ASGD Adadelta Adagrad Adam Adamax NAdam RAdam RMSprop Rprop SGD"),
    ],
)
def test_every_optimizer_that_sd_scripts_knows_is_fit(module: str | None, names: str) -> None:
    """Its names: train_util.py:3680-3690; torch's in their own spelling."""
    for name in names.split():
        assert settle("sd15", optimizer_type=name)[1] == []
        assert rules.modules({"optimizer_type": name}) == ({module: "optimizer_type"} if module else {})


def test_every_schedule_is_fit() -> None:
    for name in (
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
        "inverse_sqrt", "warmup_stable_decay",
    ):  # fmt: skip
        assert settle("sd15", lr_scheduler=name)[1] == []
    assert settle("sd15", lr_scheduler="cosine_with_min_lr", lr_scheduler_min_lr_ratio="0.1")[1] == []


def test_modules_whose_package_has_another_name() -> None:
    """Names on PyPI."""
    told = {module: rules.package(module) for module in
            ("lycoris", "prodigyplus", "pytorch_optimizer", "lion_pytorch", "prodigyopt")}  # fmt: skip
    assert told == {
        "lycoris": "lycoris-lora",
        "prodigyplus": "prodigy-plus-schedule-free",
        "pytorch_optimizer": "pytorch-optimizer",
        "lion_pytorch": "lion-pytorch",
        "prodigyopt": "prodigyopt",
    }


@pytest.mark.parametrize(
    "name", ["DAdaptation", "DAdaptAdamPreprint", "DAdaptAdam", "DAdaptLion", "DAdaptSGD", "Prodigy"]
)
def test_optimizers_that_take_one_rate(name: str) -> None:
    problems = settle("sd15", optimizer_type=name, unet_lr="1", text_encoder_lr=".5")[1]
    assert [problem.wrong for problem in problems] == [
        f"{name.lower()} takes one learning rate for all parts"
    ]
    assert settle("sd15", optimizer_type="DAdaptAdaGrad", unet_lr="1", text_encoder_lr=".5")[1] == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"full_fp16": "true", "full_bf16": "true", "mixed_precision": "fp16"}, "exclude each other"),
        ({"initial_epoch": "2", "resume": "/state"}, "initial_epoch and resume exclude each other"),
        ({"output_config": "true"}, "it writes a configuration and trains nothing"),
        ({"dataset_class": "a.B"}, "it loads a data set by code of its own"),
        ({"resume_from_huggingface": "true"}, "the job does not reach the hub"),
        ({"save_state_to_huggingface": "true"}, "the job does not reach the hub"),
    ],
)
def test_what_can_never_be_used_or_not_together(values: dict[str, str], said: str) -> None:
    assert any(said in problem.wrong for problem in settle("sd15", **values)[1])
