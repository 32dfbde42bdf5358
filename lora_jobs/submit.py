"""`lora submit`: checks a job, sends its local inputs to S3, and starts it on SageMaker.

What is in S3 already is not sent again, and the same job is not started twice: typed again after it was cut
off, it goes on where it was. A job that failed or was stopped is started again under the next number, and
goes on from its states.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrypoint import console
from kohya.problem import Problem
from lora_jobs.errors import LoraError
from lora_jobs.jobs import OVER, attempts, described

if TYPE_CHECKING:
    from collections.abc import Iterator

    from types_boto3_sagemaker.type_defs import DescribeTrainingJobResponseTypeDef as Description

    from lora_jobs.aws import Aws
    from lora_jobs.job_file import Draft, JobFile


@dataclass(frozen=True)
class Submitted:
    """A job that SageMaker has, or with dry_run one that it would get."""

    name: str
    arn: str  # "" with dry_run
    status: str  # TrainingJobStatus, as of now: InProgress, Stopping, Completed; "" with dry_run
    output: str  # the folder in S3 with its LoRAs
    request: Mapping[str, Any]  # the arguments of CreateTrainingJob; empty where nothing was to be started
    started: bool
    after: str = ""  # the attempt before it that came to nothing, whose states it finds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job_file", type=Path, metavar="JOB.toml")
    parser.add_argument("--dry-run", action="store_true", help="print the request, and change nothing")
    parser.add_argument("--again", action="store_true", help="start another, if this one is completed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    with redirect_stdout(sys.stderr if arguments.json or arguments.dry_run else sys.stdout):
        found = submit(arguments.job_file, again=arguments.again, dry_run=arguments.dry_run)
    if arguments.json:
        print(json.dumps(asdict(found), indent=2, ensure_ascii=False))
    elif arguments.dry_run and found.request:
        print(json.dumps(found.request, indent=2, ensure_ascii=False))
    else:
        for line in _told(found, arguments.job_file):
            console.say(line)
    return 1 if found.status == "Stopping" else 0  # nothing was started, and nothing will be made


def submit(job_file: "JobFile | Path", *, again: bool = False, dry_run: bool = False) -> Submitted:
    """Start a job, unless SageMaker has it.

    `again`: also where it is completed. `dry_run`: nothing in AWS is changed, and the inputs are not sent.
    Raises Unfit with all that is wrong with the request; StorageError, LoraError and boto3's ClientError and
    BotoCoreError (lora_jobs.errors.said makes sentences of them) where AWS says no.
    """
    from botocore.exceptions import ClientError  # noqa: PLC0415

    from entrypoint.failures import StorageError, Unfit  # noqa: PLC0415
    from entrypoint.storage import Storage  # noqa: PLC0415
    from lora_jobs import request, uploads  # noqa: PLC0415
    from lora_jobs.aws import Aws  # noqa: PLC0415
    from lora_jobs.check import look  # noqa: PLC0415

    draft = _draft(job_file)
    report = look(draft)
    if report.exit_code == 1:
        raise StorageError(report.problems[0])
    if draft.job is None or report.problems or report.found is None or report.found.plan is None:
        raise Unfit(report.problems)
    job, plan = draft.job, report.found.plan

    aws = Aws(job.sagemaker.region)
    request.check_buckets(job, aws)
    image = request.image_by_digest(job, aws)
    local = uploads.find(job, plan)
    channels = uploads.places(job, local)
    base = request.base_name(job, plan, image=image, channels=channels)
    found, name = _attempts(base, aws)
    status = found["TrainingJobStatus"] if found is not None else None
    if found is not None and (status not in OVER or (status == "Completed" and not again)):
        newest = found["TrainingJobName"]
        if again:
            wrong = f"it is still going ({status}), and another would share its states"
            raise LoraError(Problem(newest, wrong, f"Type lora stop {newest}, or wait for its end"))
        return _having(found, request.loras(job, newest))

    for note in report.notes:
        console.say(f"note: {note}")
    asked = request.training_job(
        job, name=name, base=base, image=image, channels=channels, volume_gb=request.volume_gb(plan)
    )
    output = request.loras(job, name)
    before = found["TrainingJobName"] if found is not None and status != "Completed" else ""
    if dry_run:
        return Submitted(name, "", "", output, asked, started=False, after=before)
    storage = Storage()
    for upload in local:
        uploads.send(upload, storage)
    try:
        arn = aws.sagemaker.create_training_job(**asked)["TrainingJobArn"]
    except ClientError as error:
        if error.response["Error"].get("Code") != "ResourceInUse":
            raise
        there = described(aws, name)  # the same was submitted meanwhile
        if there is None:
            raise
        if there["TrainingJobStatus"] in OVER and there["TrainingJobStatus"] != "Completed":
            wrong = f"it was started elsewhere meanwhile, and has ended: {there['TrainingJobStatus']}"
            raise LoraError(Problem(name, wrong, "Type the same again for another attempt")) from error
        return _having(there, output)
    return Submitted(name, arn, "InProgress", output, asked, started=True, after=before)


def _draft(job_file: "JobFile | Path") -> "Draft":
    from lora_jobs.job_file import Draft  # noqa: PLC0415

    return Draft.read(job_file) if isinstance(job_file, Path) else Draft.of(job_file)


def _attempts(base: str, aws: "Aws") -> tuple["Description | None", str]:
    """The newest attempt at a job, and the name of the next one: NAME, NAME-2, NAME-3, …

    Listed, not asked for one by one: a job may be deleted, and then a row of attempts has a gap. The list may
    still have what was just deleted.
    """
    numbers = {
        1 if name == base else int(name.removeprefix(f"{base}-")): name for name in attempts(aws, base)
    }
    newest_first = (
        found for number in sorted(numbers, reverse=True) if (found := described(aws, numbers[number]))
    )
    return next(newest_first, None), f"{base}-{max(numbers) + 1}" if numbers else base


def _having(found: "Description", output: str) -> Submitted:
    name, arn, status = (found["TrainingJobName"], found["TrainingJobArn"], found["TrainingJobStatus"])
    return Submitted(name, arn, status, output, {}, started=False)


def _told(found: Submitted, file: Path) -> "Iterator[str]":
    """What is said at the end."""
    if found.started:
        more = f"; it goes on from the newest state, if {found.after} has left one" if found.after else ""
        yield f"{found.name}: started{more}"
    elif found.status == "Completed":
        yield f"{found.name}: completed already; lora submit {file} --again starts another"
    elif found.status == "Stopping":
        yield f"{found.name}: is being stopped, and nothing was started; type the same once it has ended"
    else:
        yield f"{found.name}: is going already ({found.status}); nothing was started"
    yield f"LoRAs: {found.output}"
    if found.status == "Completed":
        yield f"next: lora fetch {file}"
    elif found.status == "Stopping":
        yield f"next: lora watch {file}, then lora submit {file}"
    else:  # by the job file, which knows the region
        yield f"next: lora watch {file}, lora board {file}, lora fetch {file}"
