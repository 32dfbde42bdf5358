"""Prints a job's log. With --follow it goes on until the job has ended."""

import argparse
import json
from collections.abc import Iterator

from entrypoint.console import say, warn
from lora_jobs.aws import Aws
from lora_jobs.jobs import EVERY, Line, Log, add_job, describe, find
from lora_jobs.watch import follow as looks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    parser.add_argument("--follow", "-f", action="store_true", help="go on until the job has ended")
    parser.add_argument("--every", type=float, default=EVERY, metavar="SECONDS", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print an object a line")


def run(arguments: argparse.Namespace) -> int:
    aws, job = find(arguments.job, arguments.region)
    empty = True
    for line in logs(job, follow=arguments.follow, every=arguments.every, aws=aws):
        empty = False
        told = {"time": line.time.isoformat(timespec="milliseconds"), "line": line.text}
        say(json.dumps(told, ensure_ascii=False) if arguments.json else line.text)
    if empty:
        warn(f"{job} has said nothing yet: a machine is being found for it, or its inputs are on their way.")
    return 0


def logs(job: str, *, follow: bool = False, every: float = EVERY, aws: Aws | None = None) -> Iterator[Line]:
    """The lines of a job's log; with `follow` those to come as well, until the job has ended.

    `every`: seconds between two questions. Raises LoraError where there is no such job.
    """
    aws = aws or Aws()
    if follow:
        for _, lines in looks(job, every=every, aws=aws):
            yield from lines
    else:
        describe(aws, job)
        yield from Log(aws, job).read()
