"""What is asked for: one JobRequest, and the three ways to get one.

1. SageMaker channels with hyperparameters;
2. the single hyperparameter s3_location, a parameter JSON of stable-diffusion-aws-extension (ESD);
3. URIs as hyperparameters, or as flags on the command line.

After this no code asks where a value came from, but to name it in a message.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, Field, ValidationError

from entrypoint import console
from entrypoint.contract import CHANNELS, Channel, Tree
from entrypoint.failures import Problem, Unfit, collecting
from entrypoint.hyperparameters import (
    CHARACTER_THRESHOLD,
    GENERAL_THRESHOLD,
    HYPERPARAMETERS,
    PIXELS,
    STALL_MINUTES,
    STATE_EVERY_MINUTES,
    TRAINERS,
    Trainer,
)
from entrypoint.storage import S3Uri
from kohya import config
from kohya.config import Kind, Setting

Location = S3Uri | Path
_Choice = TypeVar("_Choice", bound=str)

ESD_TAGGER = "enable_wd14_tagger"  # ESD's flag, in its parameters and, left by its WebUI, in the TOML
_SMALL = 1 << 20  # bytes; larger than any parameter JSON or TOML that a person writes
_REQUIRED = ("model", "dataset")
_OUTPUTS = ("output_uri", "logs_uri", "checkpoint_uri")
_URIS = (*(f"{channel}_uri" for channel in CHANNELS), *_OUTPUTS)
_THRESHOLDS = {"caption_general_threshold": "general", "caption_character_threshold": "character"}
_OPTIONS = frozenset({*config.options(), *config.ALIASES})


@dataclass(frozen=True)
class Source:
    """One input, and who named it. `streamed`: on disk, but cheap to read only once and in order."""

    location: Location
    where: str
    streamed: bool = False


@dataclass(frozen=True)
class Captioning:
    """Who asked for captions, and the confidence (0 to 1) from which a tag becomes part of one."""

    where: str
    general: float = GENERAL_THRESHOLD
    character: float = CHARACTER_THRESHOLD
    note: str = ""  # on how it was understood


@dataclass(frozen=True)
class JobRequest:
    """Everything that a job was asked to do."""

    kind: Kind | None  # None: whatever the base model is
    trainer: Trainer
    model: Source
    dataset: Source
    config: Source | None
    vae: Source | None
    reg: Source | None  # regularisation pictures
    weights: Source | None  # LoRAs to go on from, or to merge into the base model
    tagger: Source | None
    output: Location | None  # besides SageMaker's folders
    logs: Location | None
    checkpoints: Location | None  # states, which a job that is started again goes on from
    flat: bool  # ESD reads `output` and `logs`: nothing but flat LoRAs, and one flat event file
    allow_missing_captions: bool
    caption: Captioning | None  # None: pictures without a caption get none
    resize: int | None  # pixels, to which a picture's shorter side is brought down
    resize_crop: bool  # and the picture to a square
    state_every_minutes: float  # 0: a state is saved only when the job is stopped
    stall_minutes: float  # after which a trainer that hangs is ended; 0: never
    layers: tuple[tuple[Setting, ...], ...]  # sd-scripts options above the TOML: hyperparameters, flags
    problems: tuple[Problem, ...]  # told together with those that `check` finds

    @property
    def may_lack_captions(self) -> bool:
        """Whether the data set may come without captions: they are written, or not wanted."""
        return self.allow_missing_captions or self.caption is not None


class Reader(Protocol):
    """What resolving needs of the storage."""

    def read(self, uri: S3Uri, *, limit: int) -> bytes: ...


def resolve(arguments: Sequence[str], tree: Tree, storage: Reader) -> JobRequest:
    """Find out what is asked. `arguments` are the flags: --name=value, --name value, or --name for true.

    Raises Unfit where it does not become clear what the inputs are; other problems go with the request.
    """
    problems: list[Problem] = []
    hyperparameters, wrong = tree.hyperparameters()
    problems += wrong
    channels, wrong = tree.channels()
    problems += wrong
    problems += tree.hosts()[1]
    flags, wrong = _flags(arguments)
    problems += wrong
    named = [
        *(
            Setting(name, value, f"hyperparameter {name}", as_text=True)
            for name, value in hyperparameters.items()
        ),
        *(Setting(name, value, f"flag --{name}", as_text=True) for name, value in flags.items()),
    ]
    console.hide(str(setting.value) for setting in named if setting.name in console.SECRET_OPTIONS)
    asked = {
        setting.name: setting for setting in named if setting.name in HYPERPARAMETERS and setting.value != ""
    }
    problems += _unknown(named)

    kind = _choice(asked["kind"], config.KINDS, config.KINDS[0], problems) if "kind" in asked else None
    trainer = _choice(asked.get("trainer"), TRAINERS, TRAINERS[0], problems)
    allow_missing = _choice(asked.get("allow_missing_captions"), ("true", "false"), "false", problems)
    places = None
    tagger = _source("tagger", asked, channels, problems)
    with collecting(problems):
        if "s3_location" in asked:  # which leads to everything but a tagger
            others = [asked[name].where for name in _URIS if name in asked and name != "tagger_uri"]
            others += [f"channel {name}" for name in channels if name != "tagger"]
            told, fix = "s3_location says where everything is", "Remove one of the two"
            problems += [Problem(where, told, fix) for where in others]
            places = _from_esd(asked["s3_location"], kind, storage)
        else:
            places = _from_uris(asked, channels, problems)
    layers = tuple(
        tuple(one for one in named if one.name in _OPTIONS and one.where.startswith(origin))
        for origin in ("hyperparameter", "flag")
    )
    resize, resize_crop = _pixels(asked.get("resize"), problems), _crop(asked, problems)
    minutes = _minutes(asked.get("state_every_minutes"), STATE_EVERY_MINUTES, problems)
    stall = _minutes(asked.get("stall_minutes"), STALL_MINUTES, problems)
    if places is None:  # and nobody looks any further
        raise Unfit([*problems, *config.merge(kind or "sdxl", layers).problems])
    return JobRequest(
        kind=places.kind or kind,
        trainer=trainer,
        model=places.model,
        dataset=places.dataset,
        config=places.config,
        vae=places.vae,
        reg=places.reg,
        weights=places.weights,
        tagger=tagger,
        output=places.output,
        logs=places.logs,
        checkpoints=places.checkpoints,
        flat=places.flat,
        allow_missing_captions=allow_missing == "true",
        caption=_captioning(asked, places.caption, problems),
        resize=resize,
        resize_crop=resize_crop,
        state_every_minutes=minutes,
        stall_minutes=stall,
        layers=layers,
        problems=tuple(problems),
    )


@dataclass(frozen=True)
class _Places:
    """Where a job's inputs lie and its outputs go."""

    kind: Kind | None
    model: Source
    dataset: Source
    config: Source | None
    output: Location | None
    logs: Location | None
    flat: bool
    checkpoints: Location | None = None
    vae: Source | None = None
    reg: Source | None = None
    weights: Source | None = None
    caption: Captioning | None = None


def _from_uris(
    asked: Mapping[str, Setting], channels: Mapping[str, Channel], problems: list[Problem]
) -> _Places | None:
    """Inputs from channels and `<channel>_uri`, outputs from _OUTPUTS.

    None where there is no base model or no data set.
    """
    sources: dict[str, Source] = {}
    outputs: dict[str, Location] = {}
    for name in CHANNELS:
        if name == "tagger":  # the same with s3_location
            continue
        if (source := _source(name, asked, channels, problems)) is not None:
            sources[name] = source
        elif name in _REQUIRED and f"{name}_uri" not in asked:
            wrong = f"there is neither a channel {name} nor a hyperparameter {name}_uri"
            fix = f"Add a channel named {name}, or type --{name}_uri=s3://BUCKET/{name}"
            problems.append(Problem(name, wrong, fix))
    for name in _OUTPUTS:
        if name in asked:
            with collecting(problems):
                outputs[name] = _location(asked[name])
    if not sources.keys() >= set(_REQUIRED):
        return None
    return _Places(
        kind=None,
        model=sources["model"],
        dataset=sources["dataset"],
        config=sources.get("config"),
        output=outputs.get("output_uri"),
        logs=outputs.get("logs_uri"),
        checkpoints=outputs.get("checkpoint_uri"),
        flat=False,
        vae=sources.get("vae"),
        reg=sources.get("reg"),
        weights=sources.get("weights"),
    )


def _source(
    name: str, asked: Mapping[str, Setting], channels: Mapping[str, Channel], problems: list[Problem]
) -> Source | None:
    """One input, from its channel or its URI."""
    uri, channel = asked.get(f"{name}_uri"), channels.get(name)
    if uri is not None and channel is not None:
        wrong = f"there is also a channel {name}, and only one of the two can count"
        problems.append(Problem(uri.where, wrong, "Remove one of them"))
    elif uri is not None:
        with collecting(problems):
            return Source(_location(uri), uri.where)
    elif channel is not None:
        return Source(channel.path, f"channel {name}", channel.streamed)
    return None


class _Thresholds(BaseModel):
    general_threshold: float | str | None = None
    character_threshold: float | str | None = None


class _Tagger(BaseModel):
    enable_wd14_tagger: bool | None = None
    wd14_tagger_params: _Thresholds | None = None


class _TrainingParameters(BaseModel):
    fm_type: Literal["sd_1_5", "sd_xl"]
    s3_model_path: str
    s3_data_path: str
    s3_toml_path: str


class _Parameters(_Tagger):
    training_params: _TrainingParameters
    config_params: _Tagger | None = None  # the WebUI puts the captioning flag here, the API one level up


class EsdJob(BaseModel):
    """The parameter JSON that ESD writes for a training job; keys that are not used are ignored.

    Source: stable-diffusion-aws-extension 969a192c, middleware_api/trainings/create_training_job.py.
    """

    id: str = Field(pattern=r"^[\w-]+$")
    training_type: str = Field(alias="training-type")
    output: str = Field(alias="s3-output-path")
    params: _Parameters


def _from_esd(s3_location: Setting, kind: Kind | None, storage: Reader) -> _Places:
    """Inputs and outputs from the parameter JSON at `s3_location`. Raises Unfit, StorageError."""
    location = _location(s3_location)
    where = f"{s3_location.where} → {location}"
    job = _esd_job(location, where, storage)
    parameters = job.params.training_params
    told: Kind = "sd15" if parameters.fm_type == "sd_1_5" else "sdxl"
    problems: list[Problem] = []
    if job.training_type != "kohya":
        wrong = f"training-type is {job.training_type!r}, and only kohya is trained here"
        problems.append(Problem(where, wrong, 'Write "training-type": "kohya"'))
    if kind not in (None, told):
        wrong = f"fm_type is {parameters.fm_type}, and kind is {kind}"
        problems.append(Problem(where, wrong, "Remove kind"))

    caption = _esd_captioning(job.params, where, problems)
    found = {}
    for key, uri in (
        ("s3_model_path", parameters.s3_model_path),
        ("s3_data_path", parameters.s3_data_path),
        ("s3_toml_path", parameters.s3_toml_path),
        ("s3-output-path", job.output),
    ):
        with collecting(problems):
            found[key] = Source(_location(Setting(key, uri, f"{where}: {key}")), f"{where}: {key}")
    if problems:
        raise Unfit(problems)
    toml = found["s3_toml_path"]
    return _Places(
        kind=told,
        model=found["s3_model_path"],
        dataset=found["s3_data_path"],
        config=toml,
        output=found["s3-output-path"].location,
        logs=_esd_logs(toml.location, job.id),
        flat=True,
        caption=caption,
    )


def _esd_job(location: Location, where: str, storage: Reader) -> EsdJob:
    try:
        text = location.read_bytes() if isinstance(location, Path) else storage.read(location, limit=_SMALL)
        return EsdJob.model_validate(json.loads(text))
    except OSError as error:
        raise Unfit([Problem(where, f"it cannot be read ({error.strerror})", "Correct the path")]) from error
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].lower()}" for fault in error.errors()]
        raise Unfit([Problem(where, fault, "Correct the parameter JSON") for fault in faults]) from error
    except (ValueError, RecursionError) as error:
        raise Unfit([Problem(where, f"it is not JSON ({error})", "Correct the parameter JSON")]) from error


def _esd_logs(toml: Location, identity: str) -> Location:
    """kohya/train/<id>/logs in the bucket of the TOML, which is kohya/train/<id>/input/….toml."""
    if isinstance(toml, S3Uri):
        return S3Uri(toml.bucket, f"kohya/train/{identity}/logs")
    return toml.parent.parent / "logs"


def _esd_captioning(parameters: _Parameters, where: str, problems: list[Problem]) -> Captioning | None:
    """ESD's flag, and its thresholds: texts, of which its default "0" stands for the tagger's own."""
    for place, path in ((parameters, "params"), (parameters.config_params, "params.config_params")):
        if place is None or not place.enable_wd14_tagger:
            continue
        told, thresholds = place.wd14_tagger_params or _Thresholds(), dict[str, Any]()
        for name, value in told.model_dump().items():
            setting = Setting(name, value, f"{where}: {path}.wd14_tagger_params.{name}")
            if value is None or str(value).strip() in ("", "0", "0.0"):
                thresholds["note"] = "ESD's threshold 0 stands for the default"
                continue
            if (threshold := _threshold(setting, problems)) is not None:
                thresholds[name.removesuffix("_threshold")] = threshold
        return Captioning(f"{where}: {path}.{ESD_TAGGER}", **thresholds)
    return None


def _flags(arguments: Sequence[str]) -> tuple[dict[str, str], list[Problem]]:
    """Flags by name. Words that follow a flag are its value; several become a list."""
    words: dict[str, list[str]] = {}
    problems: list[Problem] = []
    name = ""
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            words[name] = [value] if equals else []
        elif not name:
            problems.append(Problem(f"argument {argument}", "it follows no flag", "Write --name=value"))
        else:
            words[name].append(argument)
    for name, values in words.items():
        option = config.options().get(name)
        if len(values) > 1 and (option is None or option.nargs != "*"):
            problems.append(Problem(f"argument {values[1]}", "it follows no flag", "Write --name=value"))
            del values[1:]
    return {
        name: "true" if not values else values[0] if len(values) == 1 else json.dumps(values)
        for name, values in words.items()
    }, problems


def _unknown(named: Sequence[Setting]) -> list[Problem]:
    """Names that are neither the job's own nor sd-scripts'."""
    known = {*HYPERPARAMETERS, *_OPTIONS}
    return [
        Problem(
            setting.where,
            "there is no such hyperparameter or sd-scripts option",
            config.nearest(setting.name, known),
        )
        for setting in named
        if setting.name not in known
    ]


def _choice(
    setting: Setting | None, choices: Sequence[_Choice], default: _Choice, problems: list[Problem]
) -> _Choice:
    """The choice that a setting names, in lower case."""
    if setting is None:
        return default
    for choice in choices:
        if str(setting.value).lower() == choice:
            return choice
    wrong = f"{str(setting.value)[:80]!r} is not one of {', '.join(choices)}"
    problems.append(Problem(setting.where, wrong, f"Write {setting.name}={choices[0]}"))
    return default


def _minutes(setting: Setting | None, default: float, problems: list[Problem]) -> float:
    """The number of minutes that a setting gives, 0 or more."""
    if setting is None:
        return default
    try:
        minutes = float(str(setting.value))
    except ValueError:
        minutes = math.nan
    if 0 <= minutes < math.inf:
        return minutes
    wrong = f"{str(setting.value)[:80]!r} is no number of minutes"
    problems.append(Problem(setting.where, wrong, f"Write {setting.name}={default:g}, or 0 for never"))
    return default


def _captioning(
    asked: Mapping[str, Setting], esd: Captioning | None, problems: list[Problem]
) -> Captioning | None:
    """Whether captions are to be written, and with which thresholds; `esd`: as its parameters have it."""
    caption, thresholds = esd, dict[str, Any]()
    if "caption" in asked:
        _choice(asked["caption"], ("wd14",), "wd14", problems)
        caption = caption or Captioning(asked["caption"].where)
    for name, which in _THRESHOLDS.items():
        if name not in asked:
            continue
        if caption is None:
            wrong = "nothing asks for captions to be written"
            problems.append(Problem(asked[name].where, wrong, "Add caption=wd14, or remove it"))
        elif (threshold := _threshold(asked[name], problems)) is not None:
            thresholds[which] = threshold
    return replace(caption, **thresholds) if caption else None


def _threshold(setting: Setting, problems: list[Problem]) -> float | None:
    """The confidence that a setting gives; at 0 each of some ten thousand tags would be in each caption."""
    try:
        threshold = float(str(setting.value))
    except ValueError:
        threshold = math.nan
    if 0 < threshold <= 1:
        return threshold
    wrong = f"{str(setting.value)[:80]!r} is no confidence above 0 and up to 1"
    problems.append(Problem(setting.where, wrong, f"Write {setting.name}=0.35, or remove it"))
    return None


def _pixels(setting: Setting | None, problems: list[Problem]) -> int | None:
    """The pixels that a setting gives, in the range of PIXELS."""
    if setting is None:
        return None
    text, (least, most) = str(setting.value).strip(), PIXELS
    if re.fullmatch("[0-9]{1,4}", text) and least <= int(text) <= most:
        return int(text)
    wrong = f"{text[:80]!r} is no whole number of pixels from {least} to {most}"
    problems.append(Problem(setting.where, wrong, f"Write {setting.name}=512, or remove it"))
    return None


def _crop(asked: Mapping[str, Setting], problems: list[Problem]) -> bool:
    """Whether pictures are cropped to squares, which without a size nothing would do."""
    crop = _choice(asked.get("resize_crop"), ("true", "false"), "false", problems) == "true"
    if crop and "resize" not in asked:
        wrong = "it crops what is resized, and resize is not set"
        problems.append(Problem(asked["resize_crop"].where, wrong, "Add resize=512, or remove it"))
    return crop


def _location(setting: Setting) -> Location:
    """An S3 URI or a path. Raises Unfit for another scheme."""
    text = str(setting.value)
    try:
        if not text.isprintable():
            raise ValueError(f"{text!r} holds characters that no path has")
        is_uri = "://" in text or text.lower().startswith("s3:")  # s3:/bucket is no folder that anyone has
        return S3Uri.parse(text) if is_uri else Path(text).expanduser().absolute()
    except (ValueError, RuntimeError) as error:
        raise Unfit([Problem(setting.where, str(error), f"Write {setting.name}=s3://BUCKET/KEY")]) from error
