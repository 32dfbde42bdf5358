"""Lists the jobs that `lora submit` made, newest first."""

import argparse
import json

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
    wide = max(len(one.job) for one in found)
    print(f"{'job':{wide}}  {'status':11}  {'time':>10}  billable")
    for one in found:
        print(f"{one.job:{wide}}  {one.status:11}  {span(one.seconds):>10}  {billable(one)}")
    return 0
