"""The trainer's configuration: TOML read, merged, checked, formatted.

Every key is an option of the pinned sd-scripts under its own name; options.json holds the facts about
them. sd-scripts itself takes a TOML file as it is (no conversion, no choices, unknown keys without a
word: train_util.py:4748-4765 of v0.10.1), so all of that is done here.
"""

import difflib
import json
import math
import re
import shlex
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any, Literal

import tomli_w

from kohya.problem import Problem

Kind = Literal["sd15", "sdxl"]
KINDS: tuple[Kind, ...] = ("sd15", "sdxl")

ALIASES = {
    "lr_restart_cycles": "lr_scheduler_num_cycles",  # in both of ESD's templates
    "caption_extention": "caption_extension",  # it would win over the right spelling (train_util.py:5404)
}

# A rate for each of SDXL's text encoders: in sd-scripts' docs/sdxl_train_network.md, and not in its parser.
# Both are trained at one rate (train_network.py:737-744).
TEXT_ENCODER_LRS = ("text_encoder_lr1", "text_encoder_lr2")

# Options whose value is a folder or file that the job itself provides; a user's value is replaced.
OWNED = frozenset(
    {"pretrained_model_name_or_path", "train_data_dir", "output_dir", "logging_dir", "tokenizer_cache_dir"}
)

# Options that name a file or folder for which there is no channel.
UNREACHABLE = frozenset(
    {
        "conditioning_data_dir", "config_file", "console_log_file", "in_json", "log_tracker_config",
        "offload_optimizer_nvme_path", "offload_param_nvme_path",
    }
)  # fmt: skip

# The smallest value that does not end in an error, or in nothing trained, after the model is loaded.
MINIMUM = {
    "gradient_accumulation_steps": 1, "max_train_epochs": 1, "max_train_steps": 1, "network_dim": 1,
    "save_every_n_epochs": 1, "save_every_n_steps": 1, "train_batch_size": 1, "vae_batch_size": 1,
    "bucket_reso_steps": 1, "clip_skip": 1, "seed": 0, "keep_tokens": 0, "max_data_loader_n_workers": 0,
    "learning_rate": 0, "unet_lr": 0, "text_encoder_lr": 0, "lr_warmup_steps": 0, "max_grad_norm": 0,
    "caption_dropout_rate": 0, "noise_offset": 0, "min_snr_gamma": 0, "network_alpha": 0,
    "caption_tag_dropout_rate": 0, "network_dropout": 0, "validation_split": 0, "save_n_epoch_ratio": 0,
    "caption_dropout_every_n_epochs": 0, "min_timestep": 0, "max_timestep": 1, "min_bucket_reso": 64,
    "sample_every_n_epochs": 1, "sample_every_n_steps": 1,
}  # fmt: skip

# Where both are set sd-scripts lets epochs win (train_network.py:810): a layer that sets one drops the other.
_LENGTHS = ("max_train_steps", "max_train_epochs")

# The largest value that makes sense; any other whole number must fit into 64 bits.
MAXIMUM = {
    "clip_skip": 12, "caption_dropout_rate": 1, "caption_tag_dropout_rate": 1,
    "network_dropout": 1, "validation_split": 0.99, "min_timestep": 999, "max_timestep": 1000,
}  # fmt: skip
_64_BITS = 2**63 - 1

# Values by which people mean that an option is off, and that sd-scripts fails over or its parser lacks.
_MEAN_UNSET = {
    **dict.fromkeys(("save_every_n_epochs", "save_every_n_steps", "save_last_n_epochs", "save_last_n_steps",
                     "validate_every_n_epochs", "validate_every_n_steps", "vae_batch_size",
                     "sample_every_n_epochs", "sample_every_n_steps"), ("0",)),
    "dynamo_backend": ("no", "NO"),
    "max_token_length": ("75",),  # strategy_sd.py: what it is when it is unset
}  # fmt: skip
_OF_A_DATASET_CONFIG = frozenset({"general", "datasets"})
_OF_A_GUI = frozenset({"epoch", "noise_offset_type"})  # kohya_ss writes them into its TOML files

_FILE_NAMES = ("output_name", "log_prefix", "log_tracker_name")
_MOST_KEYS = 1000  # in one file: more is a mistake, or an attack
# A key of 100 parts. Like _HEADER it never goes back over what it has read: a line may be a million letters.
_DEEP = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){100}""")
_KEY = re.compile(r"""\s*(["']?)([^"'=\s]+)\1\s*=""")
_HEADER = re.compile(r"\s*\[([^\[\]]++)\]\s*(?:#.*)?$")
_ENDING = re.compile(r"[\w.-]{1,32}")
_RESOLUTION = re.compile(r"\d+(,\d+)?")
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


@dataclass(frozen=True)
class Option:
    """One option of the pinned parsers. `default` is None where the parser has none."""

    name: str
    type: Literal["str", "int", "float", "bool", "int_or_float", "Path"]
    nargs: str | None
    default: object
    choices: list[object] | None
    kinds: tuple[Kind, ...]


@dataclass(frozen=True)
class Setting:
    """A value, and where it was set: "job.toml line 12", "hyperparameter network_dim"."""

    name: str
    value: object
    where: str
    as_text: bool = False  # came from a place that knows strings only, such as a hyperparameter

    @property
    def of_preset(self) -> bool:
        """Whether it is one of our own, which gives way to the user's."""
        return self.where.startswith("configs/")


@dataclass(frozen=True)
class Merged:
    """The configuration that results from all layers, what was mended on the way, and what is wrong."""

    settings: Mapping[str, Setting]
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]

    @property
    def values(self) -> dict[str, Any]:
        return {name: setting.value for name, setting in self.settings.items()}


@cache
def options() -> Mapping[str, Option]:
    """Every option of train_network.py and sdxl_train_network.py v0.10.1, by name."""
    facts = json.loads(resources.files("kohya").joinpath("options.json").read_text(encoding="utf-8"))
    return {
        name: Option(name=name, **{**fact, "kinds": tuple(fact["kinds"])}) for name, fact in facts.items()
    }


def preset(name: str) -> tuple[Setting, ...]:
    """The values of configs/<name>.toml: that of a kind is the lowest layer of every job."""
    name = f"{name}.toml"
    settings, problems = read(
        resources.files("configs").joinpath(name).read_text(encoding="utf-8"), f"configs/{name}"
    )
    if problems:
        raise AssertionError(f"configs/{name} is damaged: {problems}")
    return settings


def gpu_preset(name: str) -> tuple[Setting, ...]:
    """The values of configs/gpu/<word>.toml for a GPU whose name, as nvidia-smi prints it, has that word.

    "NVIDIA A100-SXM4-40GB" has a100. Empty where there is no such file: an A10 is no A10G.
    """
    files = resources.files("configs").joinpath("gpu")
    for word in re.findall(r"\w+", name.lower()):
        if files.joinpath(f"{word}.toml").is_file():
            return preset(f"gpu/{word}")
    return ()


def read(text: str, where: str, *, any_depth: bool = False) -> tuple[tuple[Setting, ...], list[Problem]]:
    """The settings of a TOML text; section names mean nothing, as in sd-scripts.

    One level of sections is flattened. Deeper ones are a problem, unless `any_depth`: ESD writes tables
    into its [training] section, which sd-scripts would drop without a word.
    """
    content, problems = _parse(text, where)
    found: dict[str, Setting] = {}
    lines = _lines(text)

    def collect(table: Mapping[str, object], depth: int) -> None:
        for name, value in table.items():
            numbers = lines.get(name)
            at = f"{where} line {' and '.join(map(str, numbers))}" if numbers else f"{where}: {name[:80]}"
            if isinstance(value, dict):
                if depth > 0 and not any_depth:
                    wrong = (
                        f"the table {name[:80]} stands inside another, and sd-scripts would ignore all of it"
                    )
                    problems.append(Problem(where, wrong, "Move its keys one level up"))
                else:
                    collect(value, depth + 1)
            elif name in found and not (depth > 1 and any_depth):  # ESD's API lays its tables over a template
                wrong = f"{name} is set twice, and only one of the values can count"
                problems.append(Problem(at, wrong, "Keep one of the two lines"))
            else:
                found[name] = Setting(name, value, at)

    collect(content, 0)
    if len(found) > _MOST_KEYS:
        wrong = f"it sets {len(found)} keys, and sd-scripts has {len(options())} options"
        return (), [Problem(where, wrong, "Give a configuration that sets options")]
    return tuple(found.values()), problems


def merge(kind: Kind, layers: Iterable[Sequence[Setting]]) -> Merged:
    """Lay the layers over each other, lowest first, and check every value against the pinned parsers."""
    settings: dict[str, Setting] = {}
    notes: list[str] = []
    problems: list[Problem] = []
    for layer in layers:
        names = {setting.name for setting in layer if setting.value not in ("", None, [])}
        for asked, other in (_LENGTHS, _LENGTHS[::-1]):
            if asked in names and other not in names:
                settings.pop(other, None)
        for setting in layer:
            try:
                checked = _check(kind, setting, notes)
            except _Wrong as error:
                problems.append(Problem(setting.where, error.wrong, error.fix))
                continue
            if checked is None:  # an empty value unsets a lower layer's
                settings.pop(ALIASES.get(setting.name, setting.name), None)
            else:
                settings[checked.name] = checked
    unet_only, rate = settings.get("network_train_unet_only"), settings.get("text_encoder_lr")
    if unet_only and unet_only.value and rate and not rate.of_preset:
        notes.append(
            f"{rate.where}: text_encoder_lr has no effect: network_train_unet_only ({unet_only.where})"
        )
    if all(name in settings for name in _LENGTHS):
        notes.append(f"{settings[_LENGTHS[0]].where}: max_train_epochs is set too, and counts")
    return Merged(settings, tuple(notes), tuple(problems))


def own(merged: Merged, values: Mapping[str, object]) -> Merged:
    """`merged` with the job's own values on top, and a note for each value of the user's that gives way."""
    notes = [
        f"{merged.settings[name].where}: {name} is the job's to choose, and was replaced"
        for name in values
        if name in OWNED and name in merged.settings
    ]
    owned = {name: Setting(name, value, "the job") for name, value in values.items()}
    return replace(merged, settings={**merged.settings, **owned}, notes=(*merged.notes, *notes))


def change(merged: Merged, values: Mapping[str, object], where: str) -> Merged:
    """`merged` with other values, because of `where`; a note for each value of the user's that gives way."""
    notes = [
        f"{merged.settings[name].where}: {name} = {_show(merged.settings[name].value)} becomes "
        f"{_show(value)}: {where}"
        for name, value in values.items()
        if name in merged.settings and merged.settings[name].value != value
    ]
    changed = {name: Setting(name, value, where) for name, value in values.items()}
    return replace(merged, settings={**merged.settings, **changed}, notes=(*merged.notes, *notes))


def dump(values: Mapping[str, object]) -> str:
    """`values` as TOML, one key a line, sorted by name."""
    return tomli_w.dumps(dict(sorted(values.items())))


def nearest(name: str, known: Iterable[str]) -> str:
    """Advice for a name that is not known: the nearest ones that are."""
    known = list(known)
    if name in TEXT_ENCODER_LRS and "text_encoder_lr" in known:
        return "Write text_encoder_lr = 1e-5: sd-scripts trains both text encoders at one rate"
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(close)}?" if close else "Remove it, or correct its name"


def _is_file_name(text: str) -> bool:
    """Whether it leaves room for -step00000000.safetensors and the like in a name of 255 bytes."""
    return text.isprintable() and not set(text) & set("/\\") and len(text.encode()) <= 200


class _Wrong(Exception):
    """What is wrong with a value, and the way out."""

    def __init__(self, wrong: str, fix: str) -> None:
        self.wrong, self.fix = wrong, fix
        super().__init__(wrong)


def _check(kind: Kind, setting: Setting, notes: list[str]) -> Setting | None:
    """`setting` under its option's name and in its option's type; None for an empty value. Raises _Wrong."""
    name = ALIASES.get(setting.name, setting.name)
    if name != setting.name:
        notes.append(f"{setting.where}: {setting.name} is read as {name}")
    if name in _OF_A_GUI:
        notes.append(f"{setting.where}: {name} belongs to a user interface, and is left out")
        return None
    option = options().get(name)
    if name in _OF_A_DATASET_CONFIG:
        fix = 'Give it beside a configuration that says dataset_config = "NAME.toml"'
        raise _Wrong(f"{name} belongs to a dataset_config, and this file is read as the configuration", fix)
    if option is None:
        wrong = f"{name[:80]} is no option of sd-scripts, which would ignore it"
        raise _Wrong(wrong, nearest(name, options()))
    if _is_huge(setting.value):
        raise _Wrong(f"{name} is too large: it has more than 64 bits", "Correct it")
    if kind not in option.kinds:
        raise _Wrong(f"{name} is an option of {option.kinds[0]} only, and this job is {kind}", "Remove it")
    if setting.value in ("", None, []):
        return None
    if str(setting.value) in _MEAN_UNSET.get(name, ()):
        notes.append(f"{setting.where}: {name} = {_show(setting.value)} is read as unset")
        return None
    if name in UNREACHABLE:
        raise _Wrong(f"{name} names a file or folder, and there is no channel for it", "Remove it")
    if name == "resolution":
        setting = replace(setting, value=_pixels(setting.value))
    value = (
        _as_list(option, setting.value) if option.nargs == "*" else _READERS[option.type](name, setting.value)
    )
    if value == []:  # written as text
        return None
    _check_value(option, value)
    if isinstance(setting.value, str) and not (isinstance(value, str) or setting.as_text):
        notes.append(f"{setting.where}: {name} = {_show(setting.value)} is read as {_show(value)}")
    return Setting(name, value, setting.where)


def _is_huge(value: object) -> bool:
    """Whether it holds a number that not even Python writes down as text."""
    if isinstance(value, list | dict):
        return any(map(_is_huge, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and value.bit_length() > 64


def _pixels(value: object) -> object:
    """A resolution as sd-scripts writes it: "512,768" for a list and for one with spaces, too."""
    parts = value if isinstance(value, list) else str(value).split(",")
    return ",".join(str(part).strip() for part in parts)


def _check_value(option: Option, value: object) -> None:
    """What sd-scripts would accept and then fail on, or do nothing with. Raises _Wrong."""
    name, shown = option.name, _show(value)
    if option.choices is not None and value not in option.choices:
        choices = [str(choice) for choice in option.choices if choice is not None]
        close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
        fit = close[0] if close else option.default or choices[0]
        way_out = (
            "Remove it: it counts beside torch_compile only" if name == "dynamo_backend" else f"Write {fit}"
        )
        raise _Wrong(f"{name} = {shown} is not one of {', '.join(choices)}", way_out)
    smallest, largest = MINIMUM.get(name, -_64_BITS), MAXIMUM.get(name, _64_BITS)
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float) and number < smallest:
            raise _Wrong(f"{name} = {shown} is too small", f"Write {smallest} or more")
        if isinstance(number, int | float) and number > largest:
            raise _Wrong(f"{name} = {shown} is too large", f"Write {largest} or less")
    if name == "resolution" and not _RESOLUTION.fullmatch(str(value)):
        raise _Wrong(f"resolution = {shown} is not pixels", 'Write resolution = "512,512"')
    if name == "save_model_as" and value != "safetensors":
        raise _Wrong(f"save_model_as = {shown} makes a pickle", 'Write save_model_as = "safetensors"')
    if name in _FILE_NAMES and not _is_file_name(str(value)):
        raise _Wrong(f"{name} = {shown} cannot be part of a file name", f'Write {name} = "my_lora"')
    if name == "caption_extension" and not _ENDING.fullmatch(str(value)):
        raise _Wrong(f"{name} = {shown} is no ending of a file name", f'Write {name} = ".txt"')


def _as_list(option: Option, value: object) -> list[object]:
    """A list option's value: a list, a scalar, JSON text, or words as on a command line."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            try:
                value = shlex.split(str(value))
            except ValueError as error:
                raise _Wrong(
                    f"{option.name} = {_show(value)} is no list of words ({error})", "Mend it"
                ) from error
    items = value if isinstance(value, list) else [value]
    return [_READERS[option.type](option.name, item) for item in items]


def _as_str(name: str, value: object) -> object:
    if isinstance(value, bool | list | dict):
        raise _Wrong(f"{name} = {_show(value)} is not text", f'Write {name} = "text"')
    return str(value)


def _as_bool(name: str, value: object) -> object:
    text = str(value).strip().lower()
    if text not in _TRUE + _FALSE:
        raise _Wrong(f"{name} = {_show(value)} is neither true nor false", f"Write {name} = true")
    return text in _TRUE


def _as_float(name: str, value: object) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(str(value))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _Wrong(f"{name} = {_show(value)} is not a number", _example(name, 0.1))
    return number


def _as_int(name: str, value: object) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    try:
        return int(str(value))
    except ValueError as error:
        raise _Wrong(f"{name} = {_show(value)} is not a whole number", _example(name, 1)) from error


def _as_int_or_float(name: str, value: object) -> int | float:
    """1 or more counts steps, less is a share of all steps, 5% too (train_util.py, int_or_float)."""
    if isinstance(value, str) and value.endswith("%"):
        return _as_float(name, value[:-1]) / 100
    number = _as_float(name, value)
    return int(number) if number >= 1 else number


_READERS: Mapping[str, Callable[[str, object], object]] = {
    "str": _as_str,
    "Path": _as_str,
    "bool": _as_bool,
    "int": _as_int,
    "float": _as_float,
    "int_or_float": _as_int_or_float,
}


def _example(name: str, otherwise: float) -> str:
    """What to write, after the preset's own value where it has one."""
    usual = {setting.name: setting.value for setting in preset("sd15")}
    # which the presets leave out, so that a user's learning_rate counts
    usual["unet_lr"] = usual["learning_rate"]
    return f"Write for example {name} = {_show(usual.get(name, otherwise))}"


def _show(value: object) -> str:
    """A value as it is written in TOML, cut to a readable length."""
    told = isinstance(value, str | bool | list)
    text = json.dumps(value, ensure_ascii=False, default=str) if told else str(value)
    return text if len(text) <= 80 else text[:77] + "…"


def parse(text: str) -> dict[str, Any]:
    """The content of a TOML text that nobody vouches for. Raises ValueError, with what is wrong."""
    if _DEEP.search(text):  # over such keys tomllib would sit for hours
        raise ValueError("it has a key with 100 parts")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also of a number of 5,000 digits, and of 1,000 brackets
        raise ValueError(f"it is not TOML: {error}") from error


def _parse(text: str, where: str) -> tuple[dict[str, Any], list[Problem]]:
    """The content of a TOML text, and what is set twice in one table, as TOML forbids, with both lines."""
    try:
        return parse(text), []
    except ValueError as error:
        wrong, twice = str(error), _twice(text)
    problems = [
        Problem(
            f"{where} line {' and '.join(map(str, numbers))}",
            f"{name} {'opens' if name.startswith('[') else 'is set'} twice, and only one of them can count",
            "Keep one of the lines",
        )
        for name, numbers in twice
    ]
    again = {number for _, numbers in twice for number in numbers[1:]}
    kept = ["" if number in again else line for number, line in enumerate(text.split("\n"), 1)]
    try:  # without them, so that all else is told as well
        return parse("\n".join(kept)), problems
    except ValueError as error:
        wrong = str(error)
    return {}, [*problems, Problem(where, wrong, "Mend that line")]


def _lines(text: str) -> dict[str, list[int]]:
    """The numbers of the lines on which each key is set."""
    found = defaultdict(list)
    for number, line in enumerate(text.split("\n"), 1):
        if key := _KEY.match(line):
            found[key[2]].append(number)
    return found


def _twice(text: str) -> list[tuple[str, list[int]]]:
    """The tables that are opened twice, and the keys that are set twice in one of them, with their lines."""
    found = defaultdict(list)
    table = ""
    for number, line in enumerate(text.split("\n"), 1):
        if header := _HEADER.match(line):
            table = f"[{header[1].strip()}]"
            found[table, table].append(number)
        elif key := _KEY.match(line):
            found[table, key[2]].append(number)
    return [(name, numbers) for (_, name), numbers in found.items() if len(numbers) > 1]
