"""Values that fit alone and not together: what sd-scripts v0.10.1 ends in an error over, or silently ignores.

Each rule names the place in sd-scripts that it is taken from. A value of a preset gives way to the user's:
then the rule says what to write instead.
"""

import ast
import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kohya import networks
from kohya.buckets import resolution
from kohya.config import Kind, Merged, change
from kohya.problem import Problem

# Names that sd-scripts knows, in any case of letters (train_util.py:4881-5121), and the module each needs.
OPTIMIZERS: Mapping[str, str | None] = {
    "adamw": None, "adafactor": None, "sgdnesterov": None, "lion": "lion_pytorch", "prodigy": "prodigyopt",
    **dict.fromkeys(("adamw8bit", "pagedadamw", "pagedadamw8bit", "pagedadamw32bit", "lion8bit",
                     "pagedlion8bit", "sgdnesterov8bit"), "bitsandbytes"),
    **dict.fromkeys(("dadaptation", "dadaptadampreprint", "dadaptadagrad", "dadaptadam", "dadaptadan",
                     "dadaptadanip", "dadaptlion", "dadaptsgd"), "dadaptation"),
    **dict.fromkeys(("radamschedulefree", "adamwschedulefree", "sgdschedulefree"), "schedulefree"),
}  # fmt: skip
# Any other name is a class of torch.optim in its own spelling; those that train a LoRA (torch 2.9 to 2.14).
TORCH_OPTIMIZERS = (
    "ASGD", "Adadelta", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
)  # fmt: skip
# train_util.py:5305-5393, without reduce_lr_on_plateau, whose step wants a loss, and piecewise_constant,
# whose rules no option gives
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay",
)  # fmt: skip
_MODULES = {  # what pip calls the package of a module, where that differs
    "lycoris": "lycoris-lora", "prodigyplus": "prodigy-plus-schedule-free",
    "pytorch_optimizer": "pytorch-optimizer", "lion_pytorch": "lion-pytorch",
}  # fmt: skip
_ONE_RATE = ("dadaptation", "dadaptadampreprint", "dadaptadam", "dadaptlion", "dadaptsgd", "prodigy")
_LOW = 0.1  # train_util.py:4990


@dataclass(frozen=True)
class Conflict:
    """What is wrong at an option, the way out, and the values that a preset's give way to."""

    name: str
    wrong: str
    fix: str
    instead: Mapping[str, object] = field(default_factory=dict)


def settle(kind: Kind, merged: Merged) -> tuple[Merged, list[Problem]]:
    """`merged` without the conflicts that only a preset's values make, and the others as problems."""
    problems = []
    told = tuple(_notes(kind, merged))
    for conflict in conflicts(kind, merged.values, _usual(merged)):
        asked = conflict.instead.keys() - _usual(merged)
        if conflict.instead and all(
            merged.values[name] == instead for name, instead in conflict.instead.items()
        ):
            continue  # another conflict has settled it
        if conflict.instead and not asked & merged.settings.keys():
            merged = change(merged, conflict.instead, conflict.wrong)
        else:
            setting = merged.settings.get(conflict.name)
            where = setting.where if setting else f"option {conflict.name}"
            problems.append(Problem(where, conflict.wrong, conflict.fix))
    return replace(merged, notes=(*merged.notes, *told)), problems


def modules(values: Mapping[str, Any]) -> dict[str, str]:
    """The modules that the trainer must be able to import, and the option that asks for each."""
    wanted = {}
    if values.get("network_module") == networks.LYCORIS:
        wanted["lycoris"] = "network_module"
    for name in ("optimizer_type", "lr_scheduler_type"):
        named = str(values.get(name, ""))
        module = named.partition(".")[0] if "." in named else OPTIMIZERS.get(named.lower())
        if module:
            wanted[module] = name
    if values.get("log_with") in ("wandb", "all"):
        wanted["wandb"] = "log_with"
    if values.get("deepspeed"):
        wanted["deepspeed"] = "deepspeed"
    return wanted


def classes(values: Mapping[str, Any]) -> dict[str, str]:
    """The classes that are named by their path, by the option that names them (train_util.py:5127, 5284)."""
    named = {name: str(values.get(name, "")) for name in ("optimizer_type", "lr_scheduler_type")}
    if "." not in named["lr_scheduler_type"] and named["lr_scheduler_type"]:
        named["lr_scheduler_type"] = f"torch.optim.lr_scheduler.{named['lr_scheduler_type']}"
    return {name: path for name, path in named.items() if "." in path}


def package(module: str) -> str:
    """What pip calls the package that holds a module."""
    return _MODULES.get(module, module)


def conflicts(kind: Kind, values: Mapping[str, Any], usual: Collection[str] = ()) -> Iterator[Conflict]:
    """Everything that does not fit together. `usual`: the options whose values are a preset's."""
    for name, wrong, fix in networks.problems(kind, values):
        yield Conflict(name, wrong, fix)
    yield from _pairs(values)
    yield from _optimizer(values)
    yield from _rates(values, usual)
    yield from _schedule(values)
    yield from _sizes(kind, values)
    yield from _caches(values)
    yield from _needs(values)
    yield from _nothing_trained(values)


def _pairs(values: Mapping[str, Any]) -> Iterator[Conflict]:
    """name=value, the value a Python literal (train_util.py:4859-4861, 5263-5265)."""
    for name in ("optimizer_args", "lr_scheduler_args"):
        for pair in values.get(name) or ():
            key, _, value = str(pair).partition("=")
            try:
                ast.literal_eval(value)
                fits = key.isidentifier() and "=" not in value
            except (ValueError, SyntaxError):
                fits = False
            if not fits:
                wrong = f"{name} = {pair!r} is not name=value, with a number, True or a quoted text as value"
                yield Conflict(name, wrong, "Write for example weight_decay=0.1")


def _optimizer(values: Mapping[str, Any]) -> Iterator[Conflict]:
    named = str(values.get("optimizer_type") or "AdamW")
    for old, new in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
        if values.get(old):  # :4829-4841: it must stand alone, and the presets set optimizer_type
            yield Conflict(old, f"{old} is an old name", f"Write optimizer_type = {new}")
    if named.isidentifier() and named.lower() not in OPTIMIZERS and named not in TORCH_OPTIMIZERS:
        wrong = f"optimizer_type = {named[:80]} is none that trains a LoRA"
        known = (*OPTIMIZERS, *TORCH_OPTIMIZERS)
        same = [name for name in TORCH_OPTIMIZERS if name.lower() == named.lower()]
        near = difflib.get_close_matches(named.lower(), known, n=3)
        told = f"Write one of {', '.join(near or known)}, or package.Class"
        fix = f"Write {same[0]}" if same else told
        yield Conflict("optimizer_type", wrong, fix)
    for name in ("optimizer_type", "lr_scheduler_type"):
        if not all(part.isidentifier() for part in str(values.get(name) or "x").split(".")):
            wrong = f"{name} = {str(values[name])[:80]!r} is no package.Class"
            yield Conflict(name, wrong, "Write for example torch.optim.AdamW")
    if values.get("fused_backward_pass"):  # asserted at :4848, and train_network.py never does it
        yield Conflict("fused_backward_pass", "no LoRA is trained with a fused backward pass", "Remove it")


def _rates(values: Mapping[str, Any], usual: Collection[str]) -> Iterator[Conflict]:
    """Optimizers that find the rate themselves, to which a learning rate is a factor."""
    unet, text = networks.rates(values)
    if not unet and not text:  # torch: "optimizer got an empty parameter list"
        zero = [
            name for name in ("unet_lr", "text_encoder_lr", "learning_rate") if values.get(name) in (0, [0])
        ]
        if zero:
            wrong = "every learning rate is 0, and nothing would be trained"
            yield Conflict(zero[0], wrong, f"Write for example {zero[0]} = 1e-4")
        return
    named = str(values.get("optimizer_type", "")).lower()
    if not named.startswith(("dadapt", "prodigy")):
        return
    asked = [values[name] for name in ("learning_rate", "unet_lr", "text_encoder_lr")
             if name in values and name not in usual]  # fmt: skip
    rate = (asked[0][0] if isinstance(asked[0], list) else asked[0]) if asked else 1.0
    factors = {"learning_rate": rate, "unet_lr": rate, "text_encoder_lr": [rate]}
    instead = {name: factor for name, factor in factors.items() if values.get(name, factor) != factor}
    fix = "Write learning_rate = 1, unet_lr = 1 and text_encoder_lr = 1"
    if 0 < max(unet, text) <= _LOW:  # a warning at :4990; then next to nothing is learned
        wrong = f"{named} finds the learning rate itself, and wants factors near 1"
        if asked and rate <= _LOW:
            yield Conflict("optimizer_type", wrong, fix)
            return
        yield Conflict("optimizer_type", wrong, fix, instead)
    elif unet and text and unet != text and named in _ONE_RATE:
        yield Conflict("optimizer_type", f"{named} takes one learning rate for all parts", fix, instead)


def _schedule(values: Mapping[str, Any]) -> Iterator[Conflict]:
    """train_util.py:5232-5399."""
    named = str(values.get("optimizer_type", "")).lower()
    if named.endswith("schedulefree"):  # no schedule is made
        return
    relative = _is_relative(values)
    schedule = values.get("lr_scheduler_type") or values.get("lr_scheduler", "constant")
    known = bool(values.get("lr_scheduler_type")) or relative or schedule in SCHEDULERS
    if not known:
        wrong = f"lr_scheduler = {schedule} is not one of {', '.join(SCHEDULERS)}"
        yield Conflict("lr_scheduler", wrong, "Write lr_scheduler = cosine")
    warmup = values.get("lr_warmup_steps")
    if warmup and (relative or values.get("lr_scheduler_type") or schedule == "constant"):
        which = "Adafactor with relative_step" if relative else f"the schedule {schedule}"
        wrong = f"{which} has no warmup, and sd-scripts ends in an error over lr_warmup_steps"
        yield Conflict("lr_warmup_steps", wrong, "Write lr_warmup_steps = 0", {"lr_warmup_steps": 0})
    if schedule == "cosine_with_min_lr" and values.get("lr_scheduler_min_lr_ratio") is None:
        wrong = "cosine_with_min_lr wants lr_scheduler_min_lr_ratio"
        yield Conflict("lr_scheduler", wrong, "Write lr_scheduler_min_lr_ratio = 0.1")


def _sizes(kind: Kind, values: Mapping[str, Any]) -> Iterator[Conflict]:
    """train_util.py:747-772, 1094; the steps of train_network.py:175, sdxl_train_network.py:43."""
    if not values.get("resolution"):
        yield Conflict("resolution", "resolution is not set", 'Write resolution = "512,512"')
        return
    width, _, height = str(values["resolution"]).partition(",")
    sides = int(width), int(height or width)
    if min(sides) < 64:
        yield Conflict("resolution", "a side is shorter than 64 pixels", 'Write resolution = "512,512"')
    if not values.get("enable_bucket"):
        return
    steps, unit = values.get("bucket_reso_steps", 64), 64 if kind == "sd15" else 32
    if steps < 1 or steps % unit:
        wrong = f"bucket_reso_steps = {steps} is no multiple of {unit}, as {kind} needs"
        yield Conflict("bucket_reso_steps", wrong, "Write bucket_reso_steps = 64")
        return
    smallest, largest = values.get("min_bucket_reso", 256), values.get("max_bucket_reso", 1024)
    if min(sides) < smallest // steps * steps:
        wrong = f"min_bucket_reso = {smallest} is above resolution = {values['resolution']}"
        fix = f"Write min_bucket_reso = {min(sides)}"
        yield Conflict("min_bucket_reso", wrong, fix, {"min_bucket_reso": min(sides)})
    if max(sides) > -(-largest // steps) * steps:
        wrong = f"max_bucket_reso = {largest} is below resolution = {values['resolution']}"
        fix = f"Write max_bucket_reso = {max(sides)}"
        yield Conflict("max_bucket_reso", wrong, fix, {"max_bucket_reso": max(sides)})


def of_folder(kind: Kind, values: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[Conflict]:
    """What does not go together in a dataset_config's folder. `own`: its values, over the job's."""
    values = {**values, **own}
    if not isinstance(values.get("resolution"), str):  # as a dataset_config writes it
        sides = resolution(512 if values.get("resolution") is None else values["resolution"])
        values["resolution"] = ",".join(map(str, sides))
    yield from _sizes(kind, values)
    yield from _caches_of_pictures(values)


def _caches_of_pictures(values: Mapping[str, Any]) -> Iterator[Conflict]:
    """train_network.py:582: a cache holds each picture as it was at first."""
    for name in ("color_aug", "random_crop"):
        if values.get(name) and values.get("cache_latents_to_disk"):
            yield Conflict(
                name, f"{name} changes pictures, and cache_latents_to_disk keeps them", "Remove one"
            )
        elif values.get(name) and values.get("cache_latents"):
            wrong = f"{name} changes pictures, and cache_latents keeps them as they are"
            yield Conflict(name, wrong, "Write cache_latents = false", {"cache_latents": False})


def _caches(values: Mapping[str, Any]) -> Iterator[Conflict]:
    """train_network.py:582; sdxl_train_network.py:35-41; train_util.py:1099-1113."""
    yield from _caches_of_pictures(values)
    if values.get("cache_text_encoder_outputs") or values.get("cache_text_encoder_outputs_to_disk"):
        cached = "cache_text_encoder_outputs"
        if not values.get("network_train_unet_only"):
            wrong = f"{cached} keeps what the text encoders say, and they are to be trained"
            yield Conflict(cached, wrong, "Write network_train_unet_only = true")
        for name, off in (("shuffle_caption", False), ("caption_dropout_rate", 0.0),
                          ("token_warmup_step", 0.0), ("caption_tag_dropout_rate", 0.0)):  # fmt: skip
            if values.get(name):
                wrong = f"{name} changes captions, and {cached} keeps them as they are"
                yield Conflict(name, wrong, f"Write {name} = {str(off).lower()}", {name: off})


_NEEDS = (  # an option that is on; another; the value that it must have (None: any that is on)
    ("full_fp16", "mixed_precision", "fp16"),  # train_network.py:815
    ("full_bf16", "mixed_precision", "bf16"),  # :821
    ("dim_from_weights", "network_weights", None),  # train_network.py:671: they are opened
    ("adaptive_noise_scale", "noise_offset", None),  # train_util.py:4444
    ("scale_v_pred_loss_like_noise_pred", "v_parameterization", None),  # :4446
    ("zero_terminal_snr", "v_parameterization", None),  # :4457, a warning: what is learned is wrong
)
_EXCLUDES = (
    ("v_pred_like_loss", "v_parameterization"),  # train_util.py:4451
    ("full_fp16", "full_bf16"),
    ("initial_epoch", "resume"),  # the state says where its run was
    ("initial_step", "resume"),
)
_NEVER = {  # options that no LoRA job here can be run with, and why
    "v2": "it is for Stable Diffusion 2, and the base model is none",
    "debug_dataset": "it shows pictures and trains nothing",
    "output_config": "it writes a configuration and trains nothing",
    "dataset_class": "it loads a data set by code of its own",
    "huggingface_repo_id": "the job does not reach the hub: name output_uri instead",
    "resume_from_huggingface": "the job does not reach the hub",
    "save_state_to_huggingface": "the job does not reach the hub",
}


def _needs(values: Mapping[str, Any]) -> Iterator[Conflict]:
    for name, other, needed in _NEEDS:
        given = values.get(other)
        if values.get(name) and (given != needed if needed else not given):
            told = f"{other} = {needed}" if needed else other
            yield Conflict(name, f"{name} needs {told}", f"Set {told}, or remove {name}")
    # :6240: without a mask it does nothing; a dataset_config has alpha_mask in its own tables
    if values.get("masked_loss") and not (values.get("alpha_mask") or values.get("dataset_config")):
        yield Conflict("masked_loss", "masked_loss needs alpha_mask", "Set alpha_mask, or remove masked_loss")
    if values.get("scale_weight_norms") and values.get("network_module") == "networks.dylora":
        wrong = "networks.dylora has no scale_weight_norms, and would train without"  # train_network.py:699
        yield Conflict("scale_weight_norms", wrong, "Remove it")
    for name, other in _EXCLUDES:
        if values.get(name) and values.get(other):
            yield Conflict(name, f"{name} and {other} exclude each other", "Remove one of the two")
    for name in ("fp8_base", "fp8_base_unet"):  # train_network.py:831
        if values.get(name) and values.get("mixed_precision", "no") == "no":
            yield Conflict(name, f"{name} needs mixed_precision = fp16 or bf16", "Remove it")
    for name, why in _NEVER.items():
        if values.get(name):
            yield Conflict(name, f"{name} cannot be used: {why}", "Remove it")
    crop = values.get("face_crop_aug_range")
    try:
        ends = [float(end) for end in str(crop or "1,1").split(",")]
        fits = len(ends) == 2 and ends[0] <= ends[1]
    except ValueError:
        fits = False
    if not fits:  # train_util.py:5418
        wrong = f"face_crop_aug_range = {crop} is not a range"
        yield Conflict("face_crop_aug_range", wrong, 'Write face_crop_aug_range = "1.0,2.0"')


def _nothing_trained(values: Mapping[str, Any]) -> Iterator[Conflict]:
    unet_only, text_only = "network_train_unet_only", "network_train_text_encoder_only"
    if values.get(unet_only) and values.get(text_only):
        wrong = f"{unet_only} and {text_only} together leave nothing to train"
        yield Conflict(text_only, wrong, "Remove one of the two", {unet_only: False})
    if values.get("network_alpha") == 0:  # networks/lora.py:60: 0 is taken for the rank
        fix = f"Write network_alpha = {values.get('network_dim', 4)} if you want that"
        yield Conflict("network_alpha", "network_alpha = 0 would become network_dim", fix)


def _notes(kind: Kind, merged: Merged) -> Iterator[str]:
    """What sd-scripts only warns of: values of the user's that do nothing, or become others."""
    values, usual = merged.values, _usual(merged)

    def idle(name: str, why: str) -> Iterator[str]:
        if values.get(name) is not None and name not in usual:
            yield f"{merged.settings[name].where}: {name} has no effect: {why}"

    if kind == "sdxl":
        yield from idle("clip_skip", "SDXL is trained without it")  # sdxl_train_util.py:352
    rates = values.get("text_encoder_lr")
    if isinstance(rates, list) and len(set(rates)) > 1:  # train_network.py:741
        told = f"sd-scripts takes {rates[0]:g} for every text encoder, the first"
        yield f"{merged.settings['text_encoder_lr'].where}: text_encoder_lr has {len(rates)} rates: {told}"
    named, steps = str(values.get("optimizer_type", "")).lower(), values.get("bucket_reso_steps", 64)
    for name, up in (("min_bucket_reso", 0), ("max_bucket_reso", steps - 1)):
        if not values.get("enable_bucket") or steps < 1 or name not in values:
            continue
        if values.get("bucket_no_upscale"):  # train_util.py:1032
            yield from idle(name, "with bucket_no_upscale each picture's size says its bucket")
        elif name not in usual and values[name] % steps:  # :753, :760
            rounded = (values[name] + up) // steps * steps
            yield f"{merged.settings[name].where}: {name} = {values[name]} is read as {rounded}"
    if _is_relative(values):  # :5061, :5073
        for name in ("unet_lr", "text_encoder_lr"):
            yield from idle(name, "Adafactor with relative_step finds the rates itself")
    if named.startswith("sgdnesterov") and "momentum" not in str(values.get("optimizer_args")):  # :4904
        yield f"{merged.settings['optimizer_type'].where}: {named} is used with momentum=0.9"


def _is_relative(values: Mapping[str, Any]) -> bool:
    """Whether the optimizer is Adafactor with a schedule of its own (train_util.py:5047-5079)."""
    arguments = [str(pair).replace(" ", "") for pair in values.get("optimizer_args") or ()]
    named = str(values.get("optimizer_type", "")).lower()
    return named == "adafactor" and "relative_step=False" not in arguments


def _usual(merged: Merged) -> set[str]:
    """The options whose values are a preset's."""
    return {name for name, setting in merged.settings.items() if setting.of_preset}
