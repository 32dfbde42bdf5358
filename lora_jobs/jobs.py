"""What is known of a training job: from DescribeTrainingJob, from ListTrainingJobs, and from its log."""

import argparse
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jobs.aws import Aws
from lora_jobs.errors import LoraError, is_missing

if TYPE_CHECKING:
    from types_boto3_sagemaker.type_defs import DescribeTrainingJobResponseTypeDef as Description

EVERY = 5.0  # seconds between two questions: far from where AWS throttles
GROUP = "/aws/sagemaker/TrainingJobs"  # of CloudWatch Logs; a job's streams begin with its name and "/"
OVER = frozenset({"Completed", "Failed", "Stopped"})
PRICE = "LORA_PRICE_PER_HOUR"  # in the job's environment, where submit puts it: so anybody can tell the cost
_OVERTIME = {
    "MaxRuntimeExceeded": ": max_runtime_hours are over",
    "MaxWaitTimeExceeded": ": max_wait_hours are over",
}
_NUMBER = r"(-\d{1,4})?"  # of an attempt, from the second on
_ATTEMPT = rf"-[0-9a-f]{{8}}{_NUMBER}"  # how a job's name goes on after the job file's
_OURS = re.compile(rf"[a-z0-9][a-z0-9-]*{_ATTEMPT}")
_STAGE = re.compile(r"(check|fetch|prepare|train|verify|publish): ")
_STEP = re.compile(r"step=\d+/\d+ ")
_FIELD = re.compile(r"(\w+)=(\S+)")
_OTHERS = ("WARNING: ", "ERROR: ", "Traceback", " ")  # of every stage


@dataclass(frozen=True)
class Progress:
    """How far a job is, as its log tells. None: it has not been said yet."""

    stage: str | None = None  # check, fetch, prepare, train, verify, publish
    step: int | None = None  # that are done
    steps: int | None = None
    epoch: int | None = None
    epochs: int | None = None
    loss: float | None = None
    avg_loss: float | None = None
    images_per_second: float | None = None
    eta_seconds: int | None = None

    def after(self, line: str) -> "Progress":
        """What is known once this line of the log has been read."""
        if _STEP.match(line):
            return self._at(dict(_FIELD.findall(line)))
        if found := _STAGE.match(line):
            stage = found[1]
            if stage == "publish" and self.stage == "train" and self.step != self.steps:
                return self  # a LoRA or the event log, while the training goes on
        elif line.startswith("done in "):
            stage = "publish"
        elif not line or line.startswith(_OTHERS) or self.stage is None:
            return self
        else:
            stage = "train"  # the trainer's own words have no prefix
        return replace(self, stage=stage)

    def _at(self, told: Mapping[str, str]) -> "Progress":
        step, steps = (int(number) for number in told["step"].split("/"))
        epoch, _, epochs = told.get("epoch", "").partition("/")
        return Progress(
            "train",
            step,
            steps,
            int(epoch) if epoch else None,
            int(epochs) if epochs else None,
            _number(told.get("loss")),
            _number(told.get("avg_loss")),
            _number(told.get("images_per_s")),
            int(told["eta_s"]) if "eta_s" in told else None,
        )


@dataclass(frozen=True)
class Status:
    """A job at one moment."""

    job: str
    status: str  # InProgress, Completed, Failed, Stopping, Stopped
    secondary: str  # Starting, Downloading, Training, Uploading, Interrupted, …
    created: datetime
    instance: str
    spot: bool
    output: str  # s3://…/<job>, below which everything of the job lies
    ended: datetime | None = None
    seconds: int = 0  # since the job was made, until it ended
    billable_seconds: int = 0
    billed: bool = False  # SageMaker has said billable_seconds; until then they are the time since it started
    cost: float | None = None  # in what the job file's price_per_hour is in; None where it gives none
    failure: str | None = None  # why it failed, as its log's last line says
    progress: Progress = field(default_factory=Progress)

    @staticmethod
    def of(told: "Description", progress: Progress | None = None) -> "Status":
        """A job from what DescribeTrainingJob tells."""
        ended = told.get("TrainingEndTime")
        until = ended or datetime.now(UTC)
        billed = told.get("BillableTimeInSeconds")
        started = told.get("TrainingStartTime")
        running = int((until - started).total_seconds()) if started else 0
        price = _number(told.get("Environment", {}).get(PRICE))
        billable = running if billed is None else billed
        name = told["TrainingJobName"]
        resources = told["ResourceConfig"]
        progress = progress or Progress()
        if ended:
            progress = replace(progress, eta_seconds=None)
        return Status(
            job=name,
            status=told["TrainingJobStatus"],
            secondary=told["SecondaryStatus"],
            created=told["CreationTime"],
            instance=resources.get("InstanceType", ""),
            spot=told.get("EnableManagedSpotTraining", False),
            output=f"{told['OutputDataConfig']['S3OutputPath'].rstrip('/')}/{name}",
            ended=ended,
            seconds=int((until - told["CreationTime"]).total_seconds()),
            billable_seconds=billable,
            billed=billed is not None,
            cost=None if price is None else round(price * billable / 3600, 4),
            failure=_cause(told.get("FailureReason")),
            progress=progress,
        )

    @property
    def over(self) -> bool:
        return self.status in OVER

    @property
    def moment(self) -> str:
        """Where it is, in a word or two: "Training: fetch", or how it ended."""
        if self.over:
            return f"{self.status}{_OVERTIME.get(self.secondary, '')}"
        stage = self.progress.stage
        return f"Training: {stage}" if self.secondary == "Training" and stage else self.secondary

    def as_json(self) -> dict[str, Any]:
        """One flat object; times as ISO 8601."""
        told = {**_plain(self), **_plain(self.progress)}
        del told["progress"]
        return {name: _iso(value) if isinstance(value, datetime) else value for name, value in told.items()}


@dataclass(frozen=True)
class Line:
    """A line of a job's log."""

    time: datetime
    text: str


class Log:
    """A job's log, read on from where the last reading ended. Each machine of a spot job has a stream."""

    def __init__(self, aws: Aws, job: str) -> None:
        self._logs, self._job = aws.logs, job
        self._tokens: dict[str, str] = {}

    def read(self) -> list[Line]:
        """The lines that have come since; none before the job's first word."""
        from botocore.exceptions import ClientError  # noqa: PLC0415 (lora --help needs none)

        tokens = dict(self._tokens)
        try:
            lines = [line for stream in self._streams() for line in self._new(stream, tokens)]
        except ClientError as error:
            if error.response["Error"]["Code"] == "ResourceNotFoundException":
                return []
            raise
        self._tokens = tokens  # not sooner: what was read when another stream failed is read again
        return lines

    def _streams(self) -> list[str]:
        pages = self._logs.get_paginator("describe_log_streams").paginate(
            logGroupName=GROUP, logStreamNamePrefix=f"{self._job}/"
        )
        return [stream["logStreamName"] for page in pages for stream in page["logStreams"]]

    def _new(self, stream: str, tokens: dict[str, str]) -> Iterator[Line]:
        """A page may be empty and not the last; at the end the token stays the same (GetLogEvents)."""
        while True:
            token = tokens.get(stream)
            asked: dict[str, Any] = {"nextToken": token} if token else {}
            page = self._logs.get_log_events(
                logGroupName=GROUP, logStreamName=stream, startFromHead=True, **asked
            )
            for event in page["events"]:
                yield Line(datetime.fromtimestamp(event["timestamp"] / 1000, UTC), event["message"].rstrip())
            tokens[stream] = page["nextForwardToken"]
            if token == page["nextForwardToken"]:
                return


def jobs(*, most: int = 20, aws: Aws | None = None) -> list[Status]:
    """The newest jobs that this client made, newest first. Raises LoraError, and boto3's errors."""
    aws = aws or Aws()
    found: list[Status] = []
    for name in _names(aws):
        if _OURS.fullmatch(name) and (told := described(aws, name)):  # None: deleted meanwhile
            found.append(Status.of(told))
            if len(found) == most:
                break
    return found


def described(aws: Aws, job: str) -> "Description | None":
    """What SageMaker tells of a job; None where there is none of that name."""
    from botocore.exceptions import ClientError  # noqa: PLC0415

    try:
        return aws.sagemaker.describe_training_job(TrainingJobName=job)
    except ClientError as error:
        if not is_missing(error):
            raise
        return None


def describe(aws: Aws, job: str) -> "Description":
    """What SageMaker tells of a job. Raises LoraError where there is none of that name."""
    if (told := described(aws, job)) is None:
        raise LoraError(f"{job}: there is no such job in {aws.region}. Type lora list for those that are.")
    return told


def add_job(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """The arguments by which a person says which job is meant."""
    told = "a training job's name, or a job file: then the newest job made from it"
    parser.add_argument("job", metavar="JOB", help=told, nargs="+" if several else None)
    parser.add_argument("--region", help="where it runs, unless the job file or your AWS profile says")


def find(asked: str, region: str | None = None) -> tuple[Aws, str]:
    """The job that is meant by a name or a job file, and the AWS that it is in.

    Raises Unfit where the job file is, LoraError where no job was made from it.
    """
    if not asked.endswith(".toml"):
        return Aws(region), asked
    from lora_jobs.job_file import JobFile  # noqa: PLC0415 (pydantic takes a while)

    file = JobFile.read(Path(asked))
    aws = Aws(region or file.sagemaker.region)
    made = re.compile(re.escape(file.name) + _ATTEMPT)
    for name in _names(aws, file.name):
        if made.fullmatch(name):
            return aws, name
    raise LoraError(f"{asked}: no job was made from it in {aws.region} yet. Type: lora submit {asked}")


def attempts(aws: Aws, base: str) -> list[str]:
    """The names of all jobs of a base name: it, and those with a number after it."""
    pattern = re.compile(re.escape(base) + _NUMBER)
    return [name for name in _names(aws, base) if pattern.fullmatch(name)]


def _names(aws: Aws, contains: str = "") -> Iterator[str]:
    """Names of training jobs, newest first."""
    asked: dict[str, Any] = {"NameContains": contains} if contains else {}
    pages = aws.sagemaker.get_paginator("list_training_jobs").paginate(
        SortBy="CreationTime", SortOrder="Descending", PaginationConfig={"PageSize": 100}, **asked
    )
    for page in pages:
        for summary in page["TrainingJobSummaries"]:
            yield summary["TrainingJobName"]


def span(seconds: float) -> str:
    """A length of time, as people say it: "40 s", "12 min", "3 h 05 min"."""
    minutes = int(seconds) // 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def billable(status: Status) -> str:
    """What is paid for: "up to 40 s" while it runs, then "40 s"; with the cost, if there is a price."""
    cost = "" if status.cost is None else f", cost {status.cost:.2f}"
    return f"{'' if status.billed else 'up to '}{status.billable_seconds} s{cost}"


def _cause(reason: str | None) -> str | None:
    """FailureReason without what SageMaker puts around the failure file."""
    if not reason:
        return None
    found = re.fullmatch(r"AlgorithmError: (.*?),? exit code: \d+", reason, re.DOTALL)
    return (found[1].strip() if found else "") or reason


def _number(text: str | None) -> float | None:
    """The number that a text says; None where it says none, or one that JSON has no word for."""
    try:
        number = math.nan if text is None else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _plain(one: Any) -> dict[str, Any]:
    return {part.name: getattr(one, part.name) for part in fields(one)}


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")
