"""Lists the jobs that `lora submit` made, newest first."""

import argparse
import json
import shutil
import sys

from lora_jobs.aws import Aws
from lora_jobs.jobs import billable, jobs, span


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--last", type=int, default=20, metavar="N", help="how many (%(default)s)")
    parser.add_argument("--region", help="where they run, unless your AWS profile says")
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def run(arguments: argparse.Namespace) -> int:
    found = jobs(most=arguments.last, aws=Aws(arguments.region))
    if arguments.json:
        print(json.dumps([one.as_json() for one in found], indent=2))
        return 0
    if not found:
        print("There are no jobs yet. lora submit JOB.toml makes one.")
        return 0
    rows = [("job", "status", "time", "billable")]
    rows += [(one.job, one.status, span(one.seconds), billable(one)) for one in found]
    wide = max(len(job) for job, *_ in rows)
    lines = [f"{status:11}  {time:>10}  {paid}" for _, status, time, paid in rows]
    # On a terminal that is too narrow a job takes two lines; its name is to be copied, and stays whole.
    narrow = sys.stdout.isatty() and wide + 2 + max(map(len, lines)) > shutil.get_terminal_size().columns
    for (job, *_), line in zip(rows, lines, strict=True):
        print(f"{job}\n    {line}" if narrow else f"{job:{wide}}  {line}")
    return 0
