"""Stops a job. Its LoRAs so far and a state are kept; submitting it again goes on from there."""

import argparse
import json

from lora_jobs.aws import Aws
from lora_jobs.jobs import Status, add_job, describe, find


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    aws, job = find(arguments.job, arguments.region)
    status = stop(job, aws=aws)
    if arguments.json:
        print(json.dumps(status.as_json(), indent=2))
    elif status.over:
        print(f"{job} has ended already: {status.moment}.")
    else:
        again = arguments.job if arguments.job.endswith(".toml") else "JOB.toml"
        print(f"{job} is being stopped: it saves a state and publishes its LoRAs, within two minutes.")
        wide = max(len(f"fetch {arguments.job}"), len(f"submit {again}"))
        print(f"  lora {f'fetch {arguments.job}':{wide}}    fetches what there is then")
        print(f"  lora {f'submit {again}':{wide}}    goes on from its state, once it has ended")
    return 0


def stop(job: str, *, aws: Aws | None = None) -> Status:
    """Stop a job, if it still runs; what is known of it then. Raises LoraError where there is none."""
    from botocore.exceptions import ClientError  # noqa: PLC0415 (lora --help needs none)

    aws = aws or Aws()
    status = Status.of(describe(aws, job))
    if status.over or status.status == "Stopping":
        return status
    try:
        aws.sagemaker.stop_training_job(TrainingJobName=job)
    except ClientError as error:
        status = Status.of(describe(aws, job))
        if not status.over:  # else it has ended meanwhile
            raise error from None
        return status
    return Status.of(describe(aws, job))
