"""The metadata of a LoRA file: every key that sd-scripts writes, all values text.

Source: train_network.py:1001-1226, library/sai_model_spec.py:340-500, library/train_util.py:3223-3257.
"""

import hashlib
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from kohya.builtin.dataset import Dataset
from kohya.builtin.options import Options
from kohya.config import Kind

_AS_GIVEN = (  # options that stand under ss_<name> as they are
    "adaptive_noise_scale", "cache_latents", "caption_dropout_every_n_epochs", "caption_dropout_rate",
    "caption_tag_dropout_rate", "clip_skip", "color_aug", "face_crop_aug_range", "flip_aug", "fp8_base",
    "fp8_base_unet", "full_fp16", "gradient_accumulation_steps", "gradient_checkpointing", "huber_c",
    "huber_scale", "huber_schedule", "ip_noise_gamma", "ip_noise_gamma_random_strength", "keep_tokens",
    "learning_rate", "loss_type", "lowram", "lr_scheduler", "lr_warmup_steps", "max_grad_norm",
    "max_token_length", "max_train_steps", "max_validation_steps", "min_snr_gamma", "mixed_precision",
    "multires_noise_discount", "multires_noise_iterations", "network_alpha", "network_dim", "network_dropout",
    "network_module", "noise_offset", "noise_offset_random_strength", "output_name", "prior_loss_weight",
    "random_crop", "resize_interpolation", "scale_weight_norms", "shuffle_caption", "training_comment",
    "unet_lr", "v2", "validate_every_n_epochs", "validate_every_n_steps", "validation_seed",
    "validation_split", "zero_terminal_snr",
)  # fmt: skip
_ARCHITECTURE = {"sd15": "stable-diffusion-v1/lora", "sdxl": "stable-diffusion-xl-v1-base/lora"}
_IMPLEMENTATION = {"sd15": "diffusers", "sdxl": "https://github.com/Stability-AI/generative-models"}
_VERSION = {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0"}


def of_training(
    kind: Kind, options: Options, dataset: Dataset, *, seed: int, session: int, steps: int, epochs: int
) -> dict[str, str]:
    """What stays the same for the whole run of `steps` and `epochs`. Reads the base model, for its hash."""
    given = vars(options)
    model = Path(options.pretrained_model_name_or_path)
    present_hash, old_hash = _hashes(model)
    arguments = ",".join(f"{key}={value}" for key, value in options.optimizer_kwargs.items())
    values: dict[str, Any] = {f"ss_{name}": given[name] for name in _AS_GIVEN}
    values |= {
        "ss_base_model_version": _VERSION[kind],
        "ss_batch_size_per_device": options.train_batch_size,
        "ss_debiased_estimation": bool(given["debiased_estimation_loss"]),
        "ss_max_train_steps": steps,
        "ss_new_sd_model_hash": present_hash,
        "ss_num_batches_per_epoch": len(dataset),
        "ss_num_epochs": epochs,
        "ss_num_reg_images": 0,
        "ss_num_train_images": sum(picture.repeats for picture in dataset.pictures),
        "ss_num_validation_images": 0,
        "ss_optimizer": "torch.optim.adamw.AdamW" + (f"({arguments})" if arguments else ""),
        "ss_resolution": options.size,
        "ss_sd_model_hash": old_hash,
        "ss_sd_model_name": model.name,
        "ss_sd_scripts_commit_hash": "(unknown)",
        "ss_seed": seed,
        "ss_session_id": session,
        "ss_text_encoder_lr": options.text_lr,
        "ss_total_batch_size": options.train_batch_size * options.gradient_accumulation_steps,
        "ss_training_started_at": time.time(),
    }
    return {name: str(value) for name, value in (values | _of_dataset(options, dataset)).items()}


def of_file(kind: Kind, options: Options, steps: int, epoch: int) -> dict[str, str]:
    """What differs from file to file: how far training had come, and the model specification."""
    now = time.time()
    values = {
        "ss_epoch": str(epoch),
        "ss_steps": str(steps),
        "ss_training_finished_at": str(now),
        "modelspec.architecture": _ARCHITECTURE[kind],
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now)),
        "modelspec.implementation": _IMPLEMENTATION[kind],
        "modelspec.implementation_version": "sagemaker-kohya/builtin",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": f"{options.size[0]}x{options.size[1]}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": options.output_name or f"LoRA@{now}",
    }
    if options.clip_skip is not None:
        values["modelspec.encoder_layer"] = str(options.clip_skip)
    return values


def _of_dataset(options: Options, dataset: Dataset) -> dict[str, Any]:
    bucketed = bool(options.enable_bucket)
    folders: dict[str, dict[str, int]] = {}
    tags: dict[str, Counter[str]] = {}
    for picture in dataset.pictures:
        name = picture.path.parent.name
        folders.setdefault(name, {"n_repeats": picture.repeats, "img_count": 0})["img_count"] += 1
        found = [tag.strip().lower() for tag in picture.caption.split(",")]
        tags.setdefault(name, Counter()).update(filter(None, found))
    counts = {
        number: {"resolution": size, "count": len(bucket)}
        for number, (size, bucket) in enumerate(zip(dataset.resolutions, dataset.buckets, strict=True))
    }
    errors = [abs(p.bucket[0] / p.bucket[1] - p.size[0] / p.size[1]) for p in dataset.pictures]
    mean = sum(errors) / len(errors)
    return {
        "ss_bucket_info": json.dumps({"buckets": counts, "mean_img_ar_error": mean} if bucketed else None),
        "ss_bucket_no_upscale": bucketed and options.bucket_no_upscale,
        "ss_dataset_dirs": json.dumps(folders),
        "ss_enable_bucket": bucketed,
        "ss_max_bucket_reso": options.bucket_range[1] if bucketed else None,
        "ss_min_bucket_reso": options.bucket_range[0] if bucketed else None,
        "ss_reg_dataset_dirs": "{}",
        "ss_tag_frequency": json.dumps(tags),
    }


def _hashes(path: Path) -> tuple[str, str]:  # by which web interfaces know a model: the present, the old
    with path.open("rb") as file:
        present = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0x100000)
        return present, hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
