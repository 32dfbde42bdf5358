"""Jobs that are fit, usual and unusual: what sd-scripts' documentation of a LoRA describes, what ESD sends.

Each is checked as it would be for a GPU, and nothing is trained. The documents, in docs/ of sd-scripts
v0.10.1: train_network.md and train_network_README-ja.md (network), sdxl_train_network.md (sdxl),
train_network_advanced.md (advanced), masked_loss_README.md, validation.md, config_README-en.md. Not here is
what they describe and v0.10.1 itself refuses (text_encoder_lr1, a fused backward pass, validation_split of a
subset, a resolution as text in a dataset_config), and what no job here can reach: the hub, and mask images.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from safetensors.numpy import save_file

from demo import base_model
from entrypoint import checked
from entrypoint.checked import Report
from kohya import networks
from kohya.config import Kind
from tests.harness import esd_parameters, write_dataset

Ask = Callable[..., Report]

# What both of the documents' examples have in common, and each its own.
BASIC = """
output_name = "my_lora"
save_model_as = "safetensors"
network_module = "networks.lora"
network_dim = 16
network_alpha = 1
learning_rate = 1e-4
optimizer_type = "AdamW8bit"
lr_scheduler = "constant"
max_train_epochs = 10
save_every_n_epochs = 1
gradient_checkpointing = true
"""
BLOCKS = {"sd15": 25, "sdxl": 23}

JOBS: dict[str, tuple[Kind, str]] = {
    "network 3: the basic command": ("sd15", f'{BASIC}\nsdpa = true\nmixed_precision = "fp16"'),
    # its text_encoder_lr1 and text_encoder_lr2 are no options of v0.10.1, and with its cache it asserts
    "sdxl 3: the basic command": (
        "sdxl",
        f"""{BASIC}\nunet_lr = 1e-4\ntext_encoder_lr = [1e-5, 1e-5]\nmixed_precision = "bf16"
        cache_latents = true\nnetwork_train_unet_only = false""",
    ),
    "sdxl 3: with cached text encoders": (
        "sdxl",
        f'{BASIC}\nmixed_precision = "bf16"\ncache_text_encoder_outputs = true\ncache_latents = true',
    ),
    "sdxl 3.1: caches on disk": (
        "sdxl",
        "cache_text_encoder_outputs_to_disk = true\ncache_latents_to_disk = true\nskip_cache_check = true",
    ),
    "sdxl 3.1: no_half_vae": ("sdxl", 'no_half_vae = true\nmixed_precision = "fp16"'),
    "network 3.1: LoCon": ("sd15", 'network_args = ["conv_dim=4", "conv_alpha=1"]'),
    "network 3.1: LoCon, alpha omitted": ("sdxl", 'network_args = ["conv_dim=4"]'),
    "network 3.1: steps and warm-up": (
        "sd15",
        "max_train_steps = 10000\nlr_warmup_steps = 500\nsave_every_n_steps = 1000",
    ),
    "network 3.1: a rate for each part": ("sd15", "unet_lr = 1e-4\ntext_encoder_lr = 1e-5\nclip_skip = 1"),
    "network 3.1: gradient accumulation": ("sd15", "gradient_accumulation_steps = 4\nseed = 42"),
    **{
        f"advanced 1.4: dims by block, {kind}": (
            kind,
            f"""network_args = [
            "block_dims={",".join(["4"] * count)}", "block_alphas={",".join(["1"] * count)}",
            "conv_block_dims={",".join(["2"] * count)}", "conv_block_alphas={",".join(["1"] * count)}"]""",
        )
        for kind, count in BLOCKS.items()
    },
    "network: rates by block": (
        "sd15",
        """network_args = ["down_lr_weight=0,0,0,0,0,0,1,1,1,1,1,1", "mid_lr_weight=0.5",
        "up_lr_weight=sine+.5", "block_lr_zero_threshold=0.1"]""",
    ),
    "network: rates by block, curves": (
        "sd15",
        """network_args = ["block_lr_zero_threshold=0.1", "down_lr_weight=sine+.5", "mid_lr_weight=1.5",
        "up_lr_weight=cosine+.5"]""",
    ),
    "network: rates by block, SDXL": (
        "sdxl",
        """network_args = ["down_lr_weight=0,0,0,.5,.5,1,1,1,1", "mid_lr_weight=1,1,0.5",
        "up_lr_weight=reverse_linear"]""",
    ),
    "network: dims by block, SD1.5's list": (
        "sd15",
        'network_args = ["block_dims=2,4,4,4,8,8,8,8,12,12,12,12,16,12,12,12,12,8,8,8,8,4,4,4,2"]',
    ),
    "advanced 1.2: SDXL's buckets": ("sdxl", "enable_bucket = true\nbucket_reso_steps = 32"),
    "advanced 1.4: LoRA+": ("sdxl", 'network_args = ["loraplus_lr_ratio=16"]'),
    "advanced 1.4: LoRA+ by part": (
        "sd15",
        'network_args = ["loraplus_unet_lr_ratio=16", "loraplus_text_encoder_lr_ratio=4"]',
    ),
    "advanced 1.4: dropouts": (
        "sd15",
        'network_dropout = 0.1\nnetwork_args = ["rank_dropout=0.1", "module_dropout=0.1"]',
    ),
    "advanced 1.4: the text encoder alone": ("sd15", "network_train_text_encoder_only = true"),
    "advanced 1.5: Adafactor, its own schedule": ("sdxl", 'optimizer_type = "Adafactor"'),
    "advanced 1.5: Adafactor, a fixed rate": (
        "sdxl",
        """optimizer_type = "Adafactor"\nlr_scheduler = "constant_with_warmup"\nlr_warmup_steps = 100
        optimizer_args = ["relative_step=False", "scale_parameter=False", "warmup_init=False"]
        learning_rate = 4e-7\nmax_grad_norm = 0.0""",
    ),
    "advanced 1.5: Prodigy": (
        "sd15",
        """optimizer_type = "prodigy"\nlearning_rate = 1.0\nunet_lr = 1.0\ntext_encoder_lr = 1.0
        optimizer_args = ["weight_decay=0.01", "betas=0.9,0.99", "decouple=True"]""",
    ),
    "advanced 1.5: Adafactor, its scheduler named": (
        "sdxl",
        """optimizer_type = "Adafactor"\nlr_scheduler = "adafactor"\nlearning_rate = 1e-3
        optimizer_args = ["relative_step=True", "scale_parameter=True", "warmup_init=True"]""",
    ),
    "advanced 1.5: 8 bits, paged": (
        "sd15",
        'optimizer_type = "PagedAdamW8bit"\noptimizer_args = ["weight_decay=0.01", "betas=0.9,0.999"]',
    ),
    "advanced 1.5: linear decay": (
        "sd15",
        'lr_scheduler = "linear"\nlr_warmup_steps = 0.05\nmax_grad_norm = 0',
    ),
    "advanced 1.5: D-Adaptation": ("sd15", 'optimizer_type = "DAdaptAdam"\nlearning_rate = 1.0'),
    "advanced 1.5: Lion": ("sd15", 'optimizer_type = "Lion"\nlearning_rate = 3e-5'),
    "advanced 1.5: a class by its path": ("sd15", 'optimizer_type = "bitsandbytes.optim.AdEMAMix8bit"'),
    "advanced 1.5: schedule-free": ("sd15", 'optimizer_type = "AdamWScheduleFree"\nlr_warmup_steps = 0.1'),
    "advanced 1.5: restarts": (
        "sd15",
        'lr_scheduler = "cosine_with_restarts"\nlr_scheduler_num_cycles = 4\nlr_warmup_steps = "5%"',
    ),
    "advanced 1.5: a polynomial": ("sdxl", 'lr_scheduler = "polynomial"\nlr_scheduler_power = 2.0'),
    "advanced 1.14: a schedule of torch": (
        "sd15",
        """lr_scheduler_type = "CosineAnnealingLR"\nlr_scheduler_args = ["T_max=100"]
        lr_warmup_steps = 0""",
    ),
    "advanced 1.14: min_lr": (
        "sd15",
        'lr_scheduler = "cosine_with_min_lr"\nlr_scheduler_min_lr_ratio = 0.1\nlr_decay_steps = 0.2',
    ),
    "advanced 1.14: inverse square root": (
        "sd15",
        'lr_scheduler = "inverse_sqrt"\nlr_warmup_steps = 100\nlr_scheduler_timescale = 1000',
    ),
    "advanced 1.14: warm-up, stable, decay": (
        "sd15",
        """lr_scheduler = "warmup_stable_decay"\nlr_warmup_steps = 0.1\nlr_decay_steps = 0.2
        lr_scheduler_num_cycles = 1\nlr_scheduler_min_lr_ratio = 0.1""",
    ),
    "advanced 1.5: full_bf16": ("sdxl", 'full_bf16 = true\nmixed_precision = "bf16"'),
    "advanced 1.5: full_fp16": ("sdxl", 'full_fp16 = true\nmixed_precision = "fp16"'),
    "advanced 1.1: fp8": ("sdxl", 'fp8_base = true\nmixed_precision = "bf16"'),
    "advanced 1.1: fp8 of the U-Net": ("sdxl", 'fp8_base_unet = true\nmixed_precision = "bf16"'),
    "advanced 1.3: states and metadata": (
        "sd15",
        """save_state = true\nsave_state_on_train_end = true\nsave_last_n_epochs = 3
        save_last_n_epochs_state = 1\nno_metadata = true\nsave_precision = "bf16" """,
    ),
    "advanced 1.3: states by steps": (
        "sd15",
        """save_every_n_steps = 500\nsave_last_n_steps = 1000\nsave_state = true
        save_last_n_steps_state = 500\nsave_precision = "float" """,
    ),
    "advanced 1.3: a share of the epochs": ("sd15", "save_n_epoch_ratio = 5"),
    "advanced 1.8: wandb": (
        "sd15",
        'log_with = "all"\nwandb_run_name = "a b"\nlog_prefix = "cat_"\nlog_tracker_name = "cats"',
    ),
    "advanced 1.9: noises": (
        "sd15",
        """noise_offset = 0.1\nnoise_offset_random_strength = true\nadaptive_noise_scale = 0.01
        multires_noise_iterations = 6\nmultires_noise_discount = 0.3
        ip_noise_gamma = 0.1\nip_noise_gamma_random_strength = true""",
    ),
    "advanced 1.9: losses": (
        "sd15",
        """loss_type = "huber"\nhuber_schedule = "snr"\nhuber_c = 0.1\nhuber_scale = 1.0
        debiased_estimation_loss = true\nmin_snr_gamma = 0""",
    ),
    "advanced 1.9: v-like loss": ("sd15", "v_pred_like_loss = 0.5"),
    **{
        f"advanced 1.9: v-prediction, {kind}": (
            kind,
            """v_parameterization = true\nzero_terminal_snr = true
            scale_v_pred_loss_like_noise_pred = true\nmin_snr_gamma = 5""",
        )
        for kind in BLOCKS
    },
    **{
        f"advanced 1.9: {loss}": ("sd15", f'loss_type = "{loss}"\nhuber_schedule = "exponential"')
        for loss in ("l1", "l2", "smooth_l1")
    },
    "advanced 1.9: SDXL's noise offset": ("sdxl", "noise_offset = 0.0357"),
    "advanced 1.10: long captions, memory and processes": (
        "sdxl",
        """max_token_length = 225\nhighvram = true\npersistent_data_loader_workers = true
        max_data_loader_n_workers = 2\nddp_timeout = 60\nddp_gradient_as_bucket_view = true""",
    ),
    "advanced 1.10: from a later epoch": (
        "sd15",
        "initial_epoch = 3\nskip_until_initial_step = true\nmax_train_epochs = 10\nlowram = true",
    ),
    "advanced 1.11: the console": ("sd15", 'console_log_level = "DEBUG"\nconsole_log_simple = true'),
    "advanced 1.13: attention of old": ("sd15", "mem_eff_attn = true\nsdpa = false"),
    "advanced 1.16: norms": ("sdxl", "scale_weight_norms = 1.0\ndisable_mmap_load_safetensors = true"),
    "masked_loss: the mask in the pictures": ("sd15", "masked_loss = true\nalpha_mask = true"),
    "validation: a share of the pictures": (
        "sd15",
        "validation_split = 0.25\nvalidation_seed = 1\nvalidate_every_n_epochs = 1\nmax_validation_steps = 2",
    ),
    "network: DyLoRA": (
        "sd15",
        'network_module = "networks.dylora"\nnetwork_dim = 16\nnetwork_args = ["unit=4"]',
    ),
    "validation: by steps": ("sdxl", "validation_split = 0.1\nvalidate_every_n_steps = 200"),
    "network: DyLoRA of convolutions": (
        "sd15",
        """network_module = "networks.dylora"\nnetwork_dim = 32\nnetwork_alpha = 16
        network_args = ["conv_dim=32", "conv_alpha=16", "unit=8"]""",
    ),
    "network: LoRA-FA": ("sdxl", 'network_module = "networks.lora_fa"'),
    "LyCORIS: LoHa": (
        "sd15",
        'network_module = "lycoris.kohya"\nnetwork_args = ["algo=loha", "preset=attn-mlp", "conv_dim=4"]',
    ),
    "LyCORIS: LoKr": ("sdxl", 'network_module = "lycoris.kohya"\nnetwork_args = ["algo=lokr", "factor=8"]'),
    "captions: wildcards, weights, dropout": (
        "sd15",
        """enable_wildcard = true\nweighted_captions = true\ncaption_dropout_rate = 0.1
        caption_tag_dropout_rate = 0.1\nkeep_tokens_separator = "|||"\nsecondary_separator = ";;;" """,
    ),
    "pictures: random crops without a cache": (
        "sd15",
        "random_crop = true\ncolor_aug = true\nflip_aug = true\nface_crop_aug_range = '1.0,2.0'",
    ),
    "pictures: no buckets, one side": ("sd15", "enable_bucket = false\nresolution = 512"),
    "text: sections and strings": (
        "sd15",
        """[model]\nv2 = "false"\n[train]\nlr_restart_cycles = "1"\nnetwork_dim = "32"\nreg_data_dir = ""
        xformers = "True"\nmax_token_length = 75\nsave_every_n_epochs = 0\ndynamo_backend = "no" """,
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    folder = tmp_path_factory.mktemp("fit")
    return {kind: base_model.write(folder / f"{kind}.safetensors", kind) for kind in BLOCKS}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("fit"))


@pytest.fixture
def ask(tmp_path: Path, models: dict[Kind, Path], pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Check a job with this TOML, for an A10G."""
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path / "ml"))

    def made(kind: Kind, toml: str, *flags: str) -> Report:
        (tmp_path / "job.toml").write_text(toml)
        uris = {"model": models[kind], "dataset": pictures, "config": tmp_path / "job.toml"}
        return checked.look([*(f"--{name}_uri={path}" for name, path in uris.items()), *flags], gpu="a10g")

    return made


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_is_fit(name: str, ask: Ask) -> None:
    report = ask(*JOBS[name])
    assert report.problems == ()
    assert report.exit_code == 0


def test_there_are_many_of_them() -> None:
    assert len(JOBS) >= 65


@pytest.mark.parametrize("masked", [True, False])
def test_a_dataset_config_as_the_documents_write_it(masked: bool, ask: Ask, tmp_path: Path) -> None:
    """config_README-en.md and masked_loss_README.md; their image_dir is here a folder of the data set."""
    (tmp_path / "data.toml").write_text(
        f"""
        [general]
        enable_bucket = true
        shuffle_caption = true
        caption_extension = ".txt"
        [[datasets]]
        resolution = 512
        batch_size = 4
        keep_tokens = 2
          [[datasets.subsets]]
          image_dir = "2_shape"
          num_repeats = 8
          class_tokens = "hoge girl"
          alpha_mask = {str(masked).lower()}
        [[datasets]]
        resolution = [768, 768]
        batch_size = 2
          [[datasets.subsets]]
          image_dir = "2_shape"
          caption_extension = ".txt"
        """
    )
    report = ask("sd15", f'dataset_config = "data.toml"\nmasked_loss = {str(masked).lower()}')
    assert report.problems == ()
    report = ask("sd15", 'dataset_config = "data.toml"\nmasked_loss = true')
    assert (report.exit_code == 0) == masked


def test_a_dataset_config_with_regularisation_pictures(ask: Ask, tmp_path: Path) -> None:
    """config_README-en.md's first example, in its DreamBooth half; validation.md's split of a data set."""
    write_dataset(tmp_path / "reg")
    (tmp_path / "data.toml").write_text(
        """
        [general]
        shuffle_caption = true
        caption_extension = '.txt'
        keep_tokens = 1
        [[datasets]]
        resolution = 512
        batch_size = 4
        keep_tokens = 2
        validation_split = 0.1
        validation_seed = 1
          [[datasets.subsets]]
          image_dir = '2_shape'
          class_tokens = 'hoge girl'
          keep_tokens = 3
          [[datasets.subsets]]
          is_reg = true
          image_dir = '2_shape'
          class_tokens = 'human'
          keep_tokens = 1
        """
    )
    report = ask(
        "sd15", 'dataset_config = "data.toml"\nprior_loss_weight = 0.5', f"--reg_uri={tmp_path / 'reg'}"
    )
    assert report.problems == ()


def test_a_dataset_config_with_separators_and_wildcards(ask: Ask, tmp_path: Path) -> None:
    """config_README-en.md's last example."""
    (tmp_path / "data.toml").write_text(
        """
        [general]
        flip_aug = true
        color_aug = false
        resolution = [1024, 1024]
        [[datasets]]
        batch_size = 6
        enable_bucket = true
        bucket_no_upscale = true
        caption_extension = ".txt"
        keep_tokens_separator= "|||"
        shuffle_caption = true
        caption_tag_dropout_rate = 0.1
        secondary_separator = ";;;"
        enable_wildcard = true
          [[datasets.subsets]]
          image_dir = "2_shape"
          num_repeats = 1
          caption_prefix = "1girl, hatsune miku, vocaloid |||"
          caption_suffix = ", anime screencap ||| masterpiece, rating: general"
        """
    )
    assert ask("sdxl", 'dataset_config = "data.toml"').problems == ()


def test_regularisation_pictures(ask: Ask, tmp_path: Path) -> None:
    write_dataset(tmp_path / "reg")
    assert ask("sd15", "prior_loss_weight = 1.0", f"--reg_uri={tmp_path / 'reg'}").problems == ()


def test_captions_by_a_tagger_and_smaller_pictures(ask: Ask) -> None:
    """wd14_tagger_README-en.md: its thresholds are the job's own hyperparameters."""
    flags = ("--caption=wd14", "--caption_general_threshold=0.35", "--caption_character_threshold=0.85")
    assert ask("sdxl", "", *flags, "--resize=512", "--resize_crop=true").problems == ()


def test_network_weights_and_base_weights(ask: Ask, tmp_path: Path) -> None:
    tensors = {}
    for name in networks.modules("sd15"):
        tensors[f"{name}.lora_down.weight"] = np.zeros((4, 2), np.float16)
        tensors[f"{name}.lora_up.weight"] = np.zeros((2, 4), np.float16)
        tensors[f"{name}.alpha"] = np.array(4, np.float16)
    (tmp_path / "w").mkdir()
    save_file(tensors, tmp_path / "w" / "style.safetensors")
    weights = f"--weights_uri={tmp_path / 'w'}"
    assert ask("sd15", "dim_from_weights = true", weights).problems == ()
    assert ask("sd15", "network_dim = 4\nnetwork_alpha = 4", weights).problems == ()
    merged = 'base_weights = ["style.safetensors"]\nbase_weights_multiplier = [0.7]'
    assert ask("sd15", merged, weights).problems == ()


def test_sample_prompts(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# prompt 1\na cat --n bad --w 768 --h 768 --d 1 --l 7.5 --s 28\n")
    toml = 'sample_prompts = "prompts.txt"\nsample_every_n_epochs = 1\nsample_at_first = true'
    assert ask("sd15", toml + '\nsample_sampler = "euler_a"').problems == ()


# ESD's two templates (middleware_api/common/template/kohya_config_cloud.toml and its _xl): one section, in
# which all keys but lr_restart_cycles are sd-scripts' own, and the paths are the job's to choose.
ESD: dict[str, object] = {
    "pretrained_model_name_or_path": "./sd-models/base.safetensors", "train_data_dir": "./train/input",
    "reg_data_dir": "", "output_dir": "output", "output_name": "lora", "logging_dir": "./logs",
    "log_prefix": "output_name", "v2": False, "prior_loss_weight": 1, "resolution": "512,512",
    "enable_bucket": True, "min_bucket_reso": 256, "max_bucket_reso": 1024, "caption_extension": ".txt",
    "shuffle_caption": True, "keep_tokens": 0, "max_token_length": 225, "save_model_as": "safetensors",
    "save_precision": "fp16", "save_every_n_epochs": 2, "save_last_n_epochs": 499, "max_train_epochs": 10,
    "train_batch_size": 1, "mixed_precision": "fp16", "clip_skip": 2, "xformers": True, "lowram": False,
    "cache_latents": True, "seed": 1337, "noise_offset": 0.0, "optimizer_type": "AdamW8bit",
    "learning_rate": 1e-4, "unet_lr": 1e-4, "text_encoder_lr": 1e-5, "lr_scheduler": "cosine_with_restarts",
    "lr_warmup_steps": 0, "lr_restart_cycles": 1, "network_module": "networks.lora", "network_dim": 32,
    "network_alpha": 32, "network_train_unet_only": False, "network_train_text_encoder_only": False,
}  # fmt: skip
PAYLOADS: dict[str, dict[str, object]] = {  # what its tests and its WebUI put into it
    "none": {},
    "API: numbers as strings": {"max_train_epochs": "100", "save_every_n_epochs": "5"},
    "WebUI: its captioning flag": {"enable_wd14_tagger": False},
    "old tests: nested tables": {"saving_arguments": {"save_every_n_epochs": 1}, "more": {"clip_skip": 1}},
}


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_esds_template_and_payload(
    kind: Kind, payload: str, models: dict[Kind, Path], pictures: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path / "ml"))
    template = {**ESD, **({"no_half_vae": True} if kind == "sdxl" else {}), **PAYLOADS[payload]}
    (tmp_path / "input").mkdir()
    toml = tmp_path / "input" / "kohya_config_cloud.toml"
    toml.write_text(tomli_w.dumps({"training": template}))
    parameters = esd_parameters(
        tmp_path / "out",
        models[kind],
        pictures,
        toml,
        kind,
        enable_wd14_tagger=False,
        wd14_tagger_params={"general_threshold": "0", "character_threshold": "0"},
    )
    (tmp_path / "param.json").write_text(parameters)
    for gpu in ("a10g", "t4"):  # what ESD offers
        report = checked.look([f"--s3_location={tmp_path / 'param.json'}"], gpu=gpu)
        assert report.problems == ()
