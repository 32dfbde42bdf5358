"""The job file: one small TOML that says what is trained, on which machine, and where it all lies.

name = "cat"
base_model = "model.safetensors"    # a path from the job file on, or s3://…
dataset = "pictures"
output = "s3://BUCKET/loras"

[sagemaker]
image = "….dkr.ecr.REGION.amazonaws.com/sagemaker-kohya:TAG"
role = "arn:aws:iam::ACCOUNT:role/ROLE"
instance = "ml.g5.xlarge"

[training]                          # the job's hyperparameters and sd-scripts' options
max_train_epochs = 10
"""

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from entrypoint import console
from entrypoint.failures import Unfit
from entrypoint.storage import S3Uri
from kohya import config
from kohya.problem import Problem

# The job file's inputs, and the channels that they become.
CHANNELS = {
    "base_model": "model", "dataset": "dataset", "config": "config", "vae": "vae", "reg": "reg",
    "weights": "weights", "tagger": "tagger",
}  # fmt: skip
LONGEST_HOURS = 28 * 24  # CreateTrainingJob: "the maximum value is 28 days"
_PLACEHOLDERS = re.compile(r"\b(BUCKET|ACCOUNT|REGION|ROLE|TAG|DIGEST|IMAGE_URI|ROLE_ARN)\b")
_NAME = re.compile("[a-z0-9][a-z0-9-]{0,39}")
_MOST_HYPERPARAMETERS, _LONGEST_VALUE = 100, 2500  # of CreateTrainingJob, by botocore's service description
_OURS = 2  # hyperparameters that `lora` adds: output_name, output_uri
_MOST_TAGS = 49  # of 50; one is ours
_PLACES = frozenset({"s3_location", "output_uri", "logs_uri", "checkpoint_uri"})

# Instances with a disk of their own, which takes the place of the volume: ResourceConfig in SageMaker's API
# reference ("local instance storage"). EC2 marks them by a d; the GPU instances listed here have one without.
_OWN_DISK = re.compile(r"ml\.(?:g4dn|g5|g6|g6e|g7|g7e|gr6|p4de?|p5\w*|p6\S*|trn1n?|trn2|[cmr]\d\w*d|p3dn)\.")


class _Wrong(ValueError):
    """What is wrong with a value, and the way out."""

    def __init__(self, wrong: str, fix: str, key: str = "") -> None:
        self.wrong, self.fix, self.key = wrong, fix, key
        super().__init__(wrong)


def _filled(text: str) -> str:
    if found := _PLACEHOLDERS.search(text):
        raise _Wrong(f"{text} still holds the placeholder {found[0]}", "Fill it in")
    return text


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        wrong = f"{text!r} is not 1 to 40 lower-case letters, digits and hyphens, a hyphen not first"
        raise _Wrong(wrong, 'Write name = "cat"')
    return text


def _output(text: str) -> str:
    try:
        uri = S3Uri.parse(_filled(text))
    except _Wrong:
        raise
    except ValueError as error:
        raise _Wrong(str(error), 'Write output = "s3://BUCKET/loras"') from error
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", uri.bucket):
        raise _Wrong(f"{uri.bucket!r} is no name of a bucket", "Correct it")
    if not uri.key.strip("/"):
        raise _Wrong("it names a bucket and no folder in it", f'Write output = "s3://{uri.bucket}/loras"')
    if not text.isascii() or re.search(r"[\s*?\\]|//", uri.key):
        wrong = "it holds characters that SageMaker or an IAM policy would take for something else"
        raise _Wrong(wrong, "Use letters, digits, hyphens and single slashes")
    return str(uri).rstrip("/")


def _input(text: str) -> str:
    """An S3 URI or a path; a placeholder stands only where the bucket would."""
    if "://" not in text:
        return text
    try:
        uri = S3Uri.parse(text)
    except ValueError as error:
        raise _Wrong(str(error), "Write s3://BUCKET/KEY, or a path of this machine") from error
    _filled(f"s3://{uri.bucket}")
    return text


def _matches(pattern: str, what: str, example: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, _filled(text)):
            raise _Wrong(f"{text!r} is no {what}", f"Write it as {example}")
        return text

    return check


_Filled = Annotated[StrictStr, AfterValidator(_filled), Field(min_length=1)]
_Input = Annotated[StrictStr, AfterValidator(_input), Field(min_length=1)]
_Name = Annotated[StrictStr, AfterValidator(_name)]
_Output = Annotated[StrictStr, AfterValidator(_output)]
_Role = Annotated[
    StrictStr,
    AfterValidator(
        _matches(
            r"arn:aws[a-z\-]*:iam::\d{12}:role/[\w+=,.@/-]+",
            "role's ARN",
            "arn:aws:iam::123456789012:role/NAME",
        )
    ),
]
_Instance = Annotated[
    StrictStr, AfterValidator(_matches(r"ml\.[a-z0-9-]+\.[a-z0-9]+", "instance type", "ml.g5.xlarge"))
]
_Region = Annotated[StrictStr, AfterValidator(_matches(r"[a-z]{2,}(-[a-z]+)+-\d+", "region", "eu-central-1"))]
_Key = Annotated[
    StrictStr,
    AfterValidator(_matches(r"[a-zA-Z0-9:/_-]+", "KMS key", "its id, its ARN or alias/NAME")),
]
_Subnet = Annotated[StrictStr, AfterValidator(_matches(r"subnet-[0-9a-f]+", "subnet", "subnet-0123abcd"))]
_Group = Annotated[StrictStr, AfterValidator(_matches(r"sg-[0-9a-f]+", "security group", "sg-0123abcd"))]
_TagKey = Annotated[
    StrictStr,
    AfterValidator(_matches(r"(?!(?i:aws):)[\w .:/=+@-]{1,128}", "name of a tag", "project")),
]
_TagValue = Annotated[
    StrictStr, AfterValidator(_matches(r"[\w .:/=+@-]{0,256}", "value of a tag", "letters and digits"))
]
_Hours = Annotated[float, Field(ge=1 / 3600, le=LONGEST_HOURS)]
_Scalar = StrictBool | StrictInt | StrictFloat | StrictStr


class SageMaker(BaseModel):
    """The table [sagemaker]: the machine, and who may do what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: _Filled  # in ECR, by tag or by digest
    role: _Role  # that the job runs as
    instance: _Instance
    region: _Region | None = None  # None: that of the environment or profile
    spot: StrictBool = True
    max_runtime_hours: _Hours = 24
    max_wait_hours: _Hours | None = None  # with spot, for the wait and the run; None: 24 more than the run's
    volume_gb: Annotated[StrictInt, Field(ge=1, le=16384)] | None = None  # None: sized from the inputs
    price_per_hour: Annotated[float, Field(gt=0)] | None = None  # of the instance, in what it is paid in
    subnets: Annotated[tuple[_Subnet, ...], Field(max_length=16)] = ()
    security_groups: Annotated[tuple[_Group, ...], Field(max_length=5)] = ()
    volume_kms_key: _Key | None = None
    output_kms_key: _Key | None = None
    network_isolation: StrictBool = False
    keep_alive_minutes: Annotated[StrictInt, Field(ge=1, le=60)] | None = None  # of a warm pool
    tags: Annotated[dict[_TagKey, _TagValue], Field(max_length=_MOST_TAGS)] = {}

    @property
    def wait_hours(self) -> float:
        """For how long a spot job may wait and run together."""
        return self.max_wait_hours or min(self.max_runtime_hours + 24, LONGEST_HOURS)

    @model_validator(mode="after")
    def _go_together(self) -> "SageMaker":
        if self.spot and self.keep_alive_minutes:
            wrong = "a warm pool keeps an on-demand instance, and spot is true"
            raise _Wrong(wrong, "Write spot = false, or remove keep_alive_minutes", "keep_alive_minutes")
        if self.max_wait_hours and not self.spot:
            raise _Wrong("it is for spot, and spot is false", "Remove it", "max_wait_hours")
        if self.spot and self.wait_hours < self.max_runtime_hours:
            wrong = f"it is less than max_runtime_hours = {self.max_runtime_hours:g}, which it includes"
            raise _Wrong(wrong, "Write more", "max_wait_hours")
        if bool(self.subnets) != bool(self.security_groups):
            wrong = "a VPC takes subnets and security_groups, and one of the two is empty"
            raise _Wrong(wrong, "Write both, or neither", "subnets")
        if self.volume_kms_key and _OWN_DISK.match(self.instance):
            wrong = f"{self.instance} has a disk of its own, encrypted by its hardware, and takes no key"
            raise _Wrong(wrong, "Remove it", "volume_kms_key")
        return self


class JobFile(BaseModel):
    """A job, as a person writes it down. Local paths are absolute once it was read from a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: _Name  # also the LoRA's
    base_model: _Input
    dataset: _Input
    output: _Output  # without a slash at its end
    sagemaker: SageMaker
    config: _Input | None = None
    vae: _Input | None = None
    reg: _Input | None = None
    weights: _Input | None = None
    tagger: _Input | None = None
    training: dict[StrictStr, _Scalar | list[_Scalar]] = {}

    _file: str = PrivateAttr("the job file")  # as reports call it

    @staticmethod
    def read(path: Path) -> "JobFile":
        """The job file at `path`. Raises Unfit with every problem that it has by itself."""
        draft = Draft.read(path)
        if draft.job is None:
            raise Unfit([problem for _, problem in draft.problems])
        return draft.job

    @property
    def file(self) -> str:
        """What reports call it."""
        return self._file

    @property
    def inputs(self) -> dict[str, str]:
        """What was given of CHANNELS, by the channel's name: paths and S3 URIs."""
        given = {channel: getattr(self, key) for key, channel in CHANNELS.items()}
        return {channel: value for channel, value in given.items() if value}

    @property
    def local(self) -> dict[str, Path]:
        """Those that lie on this machine."""
        return {channel: Path(given) for channel, given in self.inputs.items() if "://" not in given}

    @property
    def remote(self) -> dict[str, str]:
        """Those that lie in S3."""
        return {channel: given for channel, given in self.inputs.items() if "://" in given}

    @property
    def hyperparameters(self) -> dict[str, str]:
        """[training] as CreateTrainingJob takes it, and the LoRA's name."""
        return {"output_name": self.name, **{name: as_text(value) for name, value in self.training.items()}}


@dataclass(frozen=True)
class Draft:
    """A job file as far as it can be understood: what `lora check` looks at."""

    file: str  # as reports call it
    values: Mapping[str, Any]
    problems: tuple[tuple[str, Problem], ...]  # by the key: "output", "sagemaker.role", "training.lr"
    job: JobFile | None  # where there is no problem

    @staticmethod
    def read(path: Path) -> "Draft":
        """Raises Unfit where it is no TOML, OSError where it cannot be read."""
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError as error:
            fix = f"Type lora init {path}"
            raise Unfit([Problem(str(path), "there is no such job file", fix)]) from error
        except (ValueError, RecursionError) as error:
            raise Unfit([Problem(str(path), f"it is no TOML: {error}".rstrip("."), "Mend it")]) from error
        if values and not values.keys() & {"name", "base_model", "dataset", "output", "sagemaker"}:
            wrong = "it is no job file, but a configuration, such as lora fetch brings"
            fix = f'Name it in a job file: config = "{path.name}". lora init writes one'
            raise Unfit([Problem(str(path), wrong, fix)])
        folder = path.absolute().parent
        for key in CHANNELS:  # a path is one from the job file on
            if isinstance(value := values.get(key), str) and value and "://" not in value:
                values[key] = str(folder / Path(value).expanduser())
        problems = list(_training_problems(values.get("training"), path.name))
        job = None
        try:
            job = JobFile.model_validate(values)
            job._file = path.name
        except ValidationError as error:
            problems = [*_shape_problems(error, path.name), *problems]
        return Draft(path.name, values, tuple(problems), None if problems else job)

    @staticmethod
    def of(job: JobFile) -> "Draft":
        """Of a job file that was made in Python, or read before."""
        values = job.model_dump(exclude_none=True)
        problems = tuple(_training_problems(values["training"], job.file))
        return Draft(job.file, values, problems, None if problems else job)


def where(file: str, key: str) -> str:
    """A key as the one who wrote it knows it: "job.toml: [training] seed" for "training.seed"."""
    table, _, name = key.partition(".")
    shown = f"[{table}] {name}".rstrip() if table in ("sagemaker", "training") else key
    return f"{file}: {shown}" if key else file


def as_text(value: object) -> str:
    """A value of the TOML as a hyperparameter, which is a string."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _shape_problems(error: ValidationError, file: str) -> Iterator[tuple[str, Problem]]:
    """pydantic's findings, one a key."""
    seen = set()
    for fault in error.errors(include_url=False):
        places = [str(place) for place in fault["loc"]]
        if places[:1] == ["training"]:
            places = places[:2]  # after it stand the types that were tried
        own = fault.get("ctx", {}).get("error")
        if isinstance(own, _Wrong) and own.key:
            places.append(own.key)
        key = ".".join([places[0], places[1]] if len(places) > 1 else places)
        if key in seen:
            continue
        seen.add(key)
        wrong, fix = (own.wrong, own.fix) if isinstance(own, _Wrong) else _explained(dict(fault), places)
        yield key, Problem(where(file, key), wrong, fix)


def _explained(fault: Mapping[str, Any], places: list[str]) -> tuple[str, str]:
    kind, value = fault["type"], fault.get("input")
    fields = SageMaker.model_fields if places[0] == "sagemaker" and len(places) > 1 else JobFile.model_fields
    if kind == "missing":
        return "it is missing", "Write it; lora init shows an example"
    if kind == "extra_forbidden":
        return "there is no such key", _meant(places[-1], fields)
    if places[0] == "training":
        told = "it is neither a number, true or false, a text, nor a list of these"
        return told, "sd-scripts' options are no tables; write its value alone"
    told = str(fault["msg"]).removeprefix("Input should be ").rstrip(".")
    return f"expected {told}, found {str(value)[:80]!r}", "Correct it"


def _meant(name: str, known: Mapping[str, Any]) -> str:
    """Where a key belongs that stands elsewhere, else the nearest of those that belong there."""
    if name in SageMaker.model_fields and known is not SageMaker.model_fields:
        return "Move it below [sagemaker]"
    if name in JobFile.model_fields and known is not JobFile.model_fields:
        return "Move it to the top, above [sagemaker]"
    if name in config.options():
        return "Move it below [training]"
    return config.nearest(name, known)


def _training_problems(training: object, file: str) -> Iterator[tuple[str, Problem]]:
    """What keeps [training] from becoming hyperparameters; whether the trainer takes them is check's."""
    if not isinstance(training, dict):
        return
    for name, value in training.items():
        key, text = f"training.{name}", as_text(value) if not isinstance(value, dict) else ""
        if told := _refused(name, text):
            yield key, Problem(where(file, key), *told)
    if len(training) > _MOST_HYPERPARAMETERS - _OURS:
        wrong = (
            f"it has {len(training)} keys, and a training job has room for {_MOST_HYPERPARAMETERS - _OURS}"
        )
        fix = 'Put them into a TOML of their own, and write config = "NAME.toml"'
        yield "training", Problem(where(file, "training"), wrong, fix)


def _refused(name: str, text: str) -> tuple[str, str] | None:  # noqa: PLR0911 (one a rule)
    """What is wrong with one of [training], and the way out."""
    seen = "everybody who may call DescribeTrainingJob reads hyperparameters"
    if name in console.SECRET_OPTIONS:
        return f"it is a secret, and {seen}", "Remove it: the job needs none for what it trains"
    if console.redact(text) != text:
        return f"it holds a credential, and {seen}", "Remove it"
    if name == "output_name":
        return "the LoRA's name is the job file's", "Remove it, and write name at the top"
    channel = name.removesuffix("_uri")
    if name in _PLACES or (channel in CHANNELS.values() and name.endswith("_uri")):
        keys = {channel: key for key, channel in CHANNELS.items()}
        return "the job file says where things lie", f"Write {keys.get(channel, 'output')} at the top"
    if len(name) > 256 or len(text) > _LONGEST_VALUE:
        wrong = f"it has {len(text):,} characters, and a hyperparameter at most {_LONGEST_VALUE:,}"
        return wrong, 'Put it into a TOML of its own, and write config = "NAME.toml"'
    if not text.isprintable():
        return "it holds a line break or another control character", "Write it in one line"
    return None
