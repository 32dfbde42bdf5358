"""A dataset_config of sd-scripts: its keys checked, its folders told and replaced.

sd-scripts' own check (ConfigSanitizer in library/config_util.py of v0.10.1) ends the job after its imports
and names one key. The tables are its schema; an image_dir is here a folder below the data set.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from kohya.config import nearest, parse
from kohya.problem import Problem


def _is(*types: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, types)


def _pair(kind: type) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, list) and len(value) == 2 and all(isinstance(item, kind) for item in value)
    )


_TRUTH, _WHOLE, _TEXT = (_is(bool), "true or false"), (_is(int), "a whole number"), (_is(str), "a text")
_FLOAT, _NUMBER = (_is(float), "a number with a point, such as 0.5"), (_is(int, float), "a number")
_Types = dict[str, tuple[Callable[[object], bool], str]]

_SUBSET: _Types = {  # in every table; a subset's own value counts first, then its data set's, then general's
    **dict.fromkeys(
        ("color_aug", "flip_aug", "random_crop", "shuffle_caption", "enable_wildcard", "cache_info"), _TRUTH
    ),
    **dict.fromkeys(
        ("num_repeats", "keep_tokens", "token_warmup_min", "caption_dropout_every_n_epochs"), _WHOLE
    ),
    **dict.fromkeys(
        (
            "keep_tokens_separator", "secondary_separator", "caption_separator", "caption_prefix",
            "caption_suffix", "resize_interpolation", "caption_extension", "class_tokens",
        ),
        _TEXT,
    ),
    **dict.fromkeys(
        ("token_warmup_step", "caption_dropout_rate", "caption_tag_dropout_rate"), _NUMBER
    ),
    "face_crop_aug_range": (_pair(float), "two numbers with a point, such as [1.0, 2.0]"),
    "custom_attributes": (_is(dict), "a table"),
}  # fmt: skip
_DATASET: _Types = {
    **_SUBSET,
    **dict.fromkeys(("bucket_no_upscale", "enable_bucket"), _TRUTH),
    **dict.fromkeys(
        ("batch_size", "bucket_reso_steps", "max_bucket_reso", "min_bucket_reso", "validation_seed"), _WHOLE
    ),
    **dict.fromkeys(("validation_split", "network_multiplier"), _FLOAT),
    "resolution": (lambda value: _is(int)(value) or _pair(int)(value), "pixels, such as 512 or [512, 768]"),
}
_OWN: _Types = {**_SUBSET, "image_dir": _TEXT, "is_reg": _TRUTH, "alpha_mask": _TRUTH}
_PATHS = ("metadata_file", "conditioning_data_dir")
# sd-scripts leaves out what is repeated 0 times, without an error
_AT_LEAST_1 = ("num_repeats", "batch_size")


@dataclass(frozen=True)
class Folder:
    """One subset's folder, below the data set's root or the regularisation pictures'."""

    image_dir: str  # "." for the root
    where: str
    is_reg: bool
    repeats: int
    caption_extension: str
    has_class: bool  # class_tokens stand in for a missing caption
    dataset: int = 0  # which of the [[datasets]] it is in
    values: Mapping[str, Any] = field(default_factory=dict)  # what the tables say for it, the innermost first


@dataclass(frozen=True)
class DatasetConfig:
    """A dataset_config that sd-scripts accepts, but for its folders."""

    content: Mapping[str, Any]
    folders: tuple[Folder, ...]

    def placed(self, places: Sequence[str]) -> dict[str, Any]:
        """Its content with the folders, in their order, at these places."""
        content, left = deepcopy(dict(self.content)), iter(places)
        for dataset in content["datasets"]:
            for subset in dataset["subsets"]:
                subset["image_dir"] = next(left)
        return content


def read(text: str, where: str, options: Mapping[str, Any]) -> tuple[DatasetConfig, list[Problem]]:
    """The dataset_config in a TOML text, and all that is wrong with it.

    `options`: sd-scripts' options of the job, whose values count where the tables say nothing.
    """
    try:
        content = parse(text)
    except ValueError as error:
        return DatasetConfig({}, ()), [Problem(where, str(error), "Mend that line")]
    if problems := _shape_problems(content, where):
        return DatasetConfig({}, ()), problems
    general = content.get("general", {})
    problems += _key_problems(general, _DATASET, f"{where}: [general]")
    folders = []
    for number, dataset in enumerate(content["datasets"], 1):
        at = f"{where}: [[datasets]] {number}"
        own = {name: value for name, value in dataset.items() if name != "subsets"}
        problems += _key_problems(own, _DATASET, at)
        if all(subset.get("is_reg") for subset in dataset["subsets"]):
            wrong = "it has regularisation pictures alone, and nothing to train on"
            problems.append(Problem(at, wrong, "Add a subset without is_reg"))
        for place, subset in enumerate(dataset["subsets"], 1):
            at = f"{where}: [[datasets]] {number}, subset {place}"
            wrongs = _key_problems(subset, _OWN, at)
            if not lies_below(subset.get("image_dir")):
                wrong = f"image_dir = {subset.get('image_dir')!r} names no folder inside the data set"
                fix = 'Write image_dir = "cat" for its folder cat, or image_dir = "." for its root'
                wrongs.append(Problem(at, wrong, fix))
            problems += wrongs
            if not wrongs:
                folders.append(_folder(subset, at, number - 1, [subset, own, general, options]))
    return DatasetConfig(content, tuple(folders)), problems


def _folder(
    subset: Mapping[str, Any], where: str, dataset: int, layers: Sequence[Mapping[str, Any]]
) -> Folder:
    """What counts for a subset; `layers`: its own keys first, sd-scripts' options last."""

    def first(name: str, otherwise: Any) -> Any:
        return next((layer[name] for layer in layers if layer.get(name) is not None), otherwise)

    return Folder(
        image_dir=str(PurePosixPath(subset["image_dir"])),
        where=where,
        is_reg=subset.get("is_reg", False),
        repeats=first("num_repeats", layers[-1].get("dataset_repeats", 1)),
        caption_extension=first("caption_extension", ".caption"),
        has_class=bool(first("class_tokens", "")),
        dataset=dataset,
        values={name: value for layer in layers[2::-1] for name, value in layer.items()},
    )


def _shape_problems(content: Mapping[str, Any], where: str) -> list[Problem]:
    """Whether it has the tables that the rest is read from."""
    unknown = [name for name in content if name not in ("general", "datasets")]
    problems = [
        Problem(where, f"{name} stands outside of its tables", "Put it into [general]") for name in unknown
    ]
    datasets = content.get("datasets")
    if not _is_tables(datasets) or not all(_is_tables(one.get("subsets")) for one in datasets or []):
        wrong = "it lists no [[datasets]] with [[datasets.subsets]]"
        problems.append(Problem(where, wrong, 'Write [[datasets]], [[datasets.subsets]], image_dir = "."'))
    if not isinstance(content.get("general", {}), dict):
        problems.append(Problem(where, "general is no table", "Write [general]"))
    return problems


def _is_tables(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _key_problems(table: Mapping[str, Any], known: _Types, where: str) -> list[Problem]:
    """The keys of a table that sd-scripts would refuse, or leave out."""
    problems = []
    for name, value in table.items():
        if name in _PATHS:
            wrong = f"{name} names a file or folder, and there is no channel for it"
            problems.append(Problem(where, wrong, "Remove it"))
        elif name not in known:
            problems.append(Problem(where, f"{name} is no key of this table", nearest(name, known)))
        elif not known[name][0](value):
            wrong = f"{name} = {value!r} is not {known[name][1]}"
            problems.append(Problem(where, wrong, "Correct it"))
        elif name in _AT_LEAST_1 and value < 1:
            problems.append(Problem(where, f"{name} = {value} is too small", "Write 1 or more"))
    return problems


def lies_below(path: object) -> bool:
    """Whether a path leads to something below a folder of the job's, and not to some other machine."""
    return (
        isinstance(path, str)
        and bool(path)
        and not set(path) & set("\\:")
        and not path.startswith(("/", "~"))
        and ".." not in path.split("/")
    )
