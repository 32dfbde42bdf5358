"""Which of sd-scripts' options the built-in trainer has. Imports no torch, so that a check is quick."""

import ast
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from kohya import rules
from kohya.builtin import BuiltinError
from kohya.config import Kind
from kohya.config import options as pinned

Found = tuple[str, str, str]  # the option, what is wrong with its value, what to do

# Hints about memory, speed and terminals, and values that only count beside an option that builtin does not
# have: the LoRA is the same. What is drawn is what sd-scripts draws with max_data_loader_n_workers = 0.
NO_EFFECT = frozenset(
    {
        "config_file", "console_log_level", "console_log_simple", "disable_mmap_load_safetensors",
        "dynamo_backend", "highvram", "huber_c", "huber_scale", "huber_schedule", "lowram", "zero_stage",
        "lr_scheduler_num_cycles", "lr_scheduler_power", "max_data_loader_n_workers",
        "multires_noise_discount",
        "persistent_data_loader_workers", "sample_sampler", "sdpa", "token_warmup_min",
    }
)  # fmt: skip

_KNOWN: Mapping[str, tuple[object, ...]] = {  # options of which builtin has some values
    "log_with": (None, "tensorboard"),
    "lr_scheduler": ("constant", "constant_with_warmup", "cosine"),
    "max_token_length": (None, 75, 150, 225),
    "mixed_precision": ("no", "fp16", "bf16", None),
    "network_module": ("networks.lora",),
    "optimizer_type": ("AdamW", "adamw", "", None),
    "prior_loss_weight": (1,),  # weighs regularisation pictures, which builtin does not have
    "save_model_as": ("safetensors", None),
    "save_precision": (None, "float", "fp16", "bf16"),
}
_NEEDED = ("output_dir", "pretrained_model_name_or_path", "resolution", "train_data_dir")
_WAY_OUT = "Take it out, or use trainer = sd-scripts"


HAS = frozenset(
    {
        "pretrained_model_name_or_path", "train_data_dir", "output_dir", "output_name", "logging_dir",
        "log_prefix", "tokenizer_cache_dir", "training_comment", "resume", "seed",
        "resolution", "caption_extension", "caption_separator", "shuffle_caption", "keep_tokens",
        "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale",
        "cache_latents", "vae_batch_size", "train_batch_size",
        "network_dim", "network_alpha", "network_train_unet_only", "network_train_text_encoder_only",
        "learning_rate", "unet_lr", "text_encoder_lr", "optimizer_args", "max_grad_norm", "lr_warmup_steps",
        "max_train_steps", "max_train_epochs", "gradient_accumulation_steps", "gradient_checkpointing",
        "no_half_vae", "clip_skip", "noise_offset", "min_snr_gamma",
        "save_every_n_epochs", "save_every_n_steps", "save_state", "save_state_on_train_end",
    }
)  # fmt: skip


class Options(SimpleNamespace):
    """Every option of the pinned parser, set or default, under its own name."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of `resolution`."""
        width, _, height = self.resolution.partition(",")
        return int(width), int(height or width)

    @property
    def bucket_range(self) -> tuple[int, int]:
        """min_bucket_reso and max_bucket_reso, widened to multiples of bucket_reso_steps."""
        steps = self.bucket_reso_steps
        return self.min_bucket_reso // steps * steps, -(-self.max_bucket_reso // steps) * steps

    @property
    def text_lr(self) -> float | None:
        """sd-scripts takes the first of a list, for both of SDXL's text encoders (train_network.py:744)."""
        rates: Any = self.text_encoder_lr
        return [*rates, None][0] if isinstance(rates, list) else rates  # type: ignore[no-any-return]

    @property
    def optimizer_kwargs(self) -> dict[str, Any]:
        pairs = (argument.split("=", 1) for argument in self.optimizer_args or [])
        return {key: ast.literal_eval(value) for key, value in pairs}


def read(options: Mapping[str, object], kind: Kind) -> Options:
    """`options` with sd-scripts' defaults under them. Raises BuiltinError with all that is wrong."""
    if found := problems(options, kind):
        raise BuiltinError("\n".join(f"{name}: {wrong}. {fix}." for name, wrong, fix in found))
    return Options(**_with_defaults(options))


def problems(options: Mapping[str, object], kind: Kind) -> list[Found]:
    """What builtin lacks, and what does not go together, of options that `kohya.config` has read."""
    conflicts = ((one.name, one.wrong, one.fix) for one in rules.conflicts(kind, options))
    return [*lacks(options), *conflicts]


def lacks(options: Mapping[str, object]) -> list[Found]:
    """Every option that builtin does not have, and every value that it does not know; empty when all is well.

    An option that it does not have may be set to the pinned parser's default, or to another way of saying
    that it is off.
    """
    values = _with_defaults(options)
    foreign = [name for name in options if _is_foreign(name, values)]
    found = [(name, "builtin does not have this option", _WAY_OUT) for name in foreign]
    found += [(name, "it is not set", f"Set {name}") for name in _NEEDED if not values[name]]
    for name, known in _KNOWN.items():
        if values[name] not in known:
            shown = ", ".join(str(value) for value in known if value)
            found.append((name, f"builtin knows {shown}, not {values[name]!r}", _WAY_OUT))
    return [*found, *_training_problems(values)]


def _with_defaults(options: Mapping[str, object]) -> dict[str, Any]:
    return {**{name: option.default for name, option in pinned().items()}, **options}


def _is_foreign(name: str, values: Mapping[str, object]) -> bool:
    if name in HAS or name in NO_EFFECT or name in _KNOWN:
        return False
    value, option = values[name], pinned().get(name)
    if option is None:
        return True
    off = (None, False, "", 0) if option.default in (None, False, "", 0) else ()
    return value != [] and value not in (option.default, *off)


def _training_problems(values: Mapping[str, Any]) -> Iterator[Found]:
    for argument in values["optimizer_args"] or []:
        key, _, text = str(argument).partition("=")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = None
        pair, number = isinstance(value, tuple) and len(value) == 2, isinstance(value, int | float)
        if not {"betas": pair, "eps": number, "weight_decay": number}.get(key, False):
            known = 'builtin knows "weight_decay=0.01", "betas=0.9,0.99" and "eps=1e-8"'
            yield "optimizer_args", f"{known}, not {argument!r}", _WAY_OUT

    rates = values["text_encoder_lr"]
    if isinstance(rates, list) and len(set(rates)) > 1:
        yield "text_encoder_lr", f"sd-scripts uses only the first of {rates}", "Give one number"
    sides = str(values["resolution"] or 0).split(",")
    if not values["enable_bucket"] and any(int(side) % 8 for side in sides):
        yield "resolution", f"{values['resolution']} is not a multiple of 8", "Use multiples of 64"
