"""`lora policy`: the least that IAM must allow, with buckets, folders, keys and the role filled in.

    lora policy JOB.toml >role.json
    aws iam create-role --role-name NAME --assume-role-policy-document "$(lora policy JOB.toml --trust)"
    aws iam put-role-policy --role-name NAME --policy-name loras --policy-document file://role.json

Without a flag it is for the job's role; with --person for the one who types lora; --trust is the role's trust
policy. They allow all jobs of the job file's name.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from entrypoint.storage import S3Uri
from lora_jobs.aws import Aws
from lora_jobs.job_file import JobFile
from lora_jobs.jobs import GROUP
from lora_jobs.request import ecr_repository
from lora_jobs.uploads import remote

_SERVICE = "sagemaker.amazonaws.com"
_DIGEST = "?" * 8  # of what was asked, in a job's name

# What SageMaker itself does as the role. Source: "CreateTrainingJob API: Execution Role Permissions" in
# https://docs.aws.amazon.com/sagemaker/latest/dg/sagemaker-roles.html, for the image, logs, metrics and VPC;
# for the keys OutputDataConfig and ResourceConfig in SageMaker's API reference, and "Protecting data with
# SSE-KMS" in S3's user guide (GenerateDataKey to write, Decrypt to write in parts).
_PULL = ("ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer")
_LOG = ("logs:CreateLogGroup", "logs:CreateLogStream", "logs:DescribeLogStreams", "logs:PutLogEvents")
_NETWORK = (
    "ec2:CreateNetworkInterface",
    "ec2:CreateNetworkInterfacePermission",
    "ec2:DeleteNetworkInterface",
    "ec2:DeleteNetworkInterfacePermission",
    "ec2:DescribeDhcpOptions",
    "ec2:DescribeNetworkInterfaces",
    "ec2:DescribeSecurityGroups",
    "ec2:DescribeSubnets",
    "ec2:DescribeVpcs",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job_file", type=Path, metavar="JOB.toml")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--person", action="store_true", help="of the one who types lora")
    which.add_argument("--trust", action="store_true", help="the role's trust policy")


def run(arguments: argparse.Namespace) -> int:
    job = JobFile.read(arguments.job_file)
    region = Aws(job.sagemaker.region).region
    policy = (
        trust(job)
        if arguments.trust
        else of_person(job, region)
        if arguments.person
        else of_role(job, region)
    )
    print(json.dumps(policy, indent=2))
    return 0


def of_role(job: JobFile, region: str) -> dict[str, Any]:
    """What the job's role must be allowed: what the job does, and what SageMaker does as the role."""
    places = _Places(job, region)
    read, written = [*places.inputs, *places.states], [*places.jobs, *places.states, *places.curves]
    machine = job.sagemaker
    statements = [
        _allow("ReadInputsAndStates", ["s3:GetObject"], read),
        _allow("WriteOutputs", ["s3:PutObject"], written),
        *places.listing("List", ["s3:ListBucket"], [*places.given, *places.own]),
        _allow("SignInToEcr", ["ecr:GetAuthorizationToken"], ["*"]),
        _allow("PullTheImage", _PULL, [places.repository]),
        _allow("Log", _LOG, [places.logs, f"{places.logs}:*"]),
        {
            **_allow("Metrics", ["cloudwatch:PutMetricData"], ["*"]),
            "Condition": {"StringEquals": {"cloudwatch:namespace": GROUP}},
        },
    ]
    if machine.subnets:
        statements.append(_allow("Network", _NETWORK, ["*"]))
    if machine.volume_kms_key:
        statements.append(places.key("VolumeKey", ["kms:CreateGrant"], machine.volume_kms_key))
    if machine.output_kms_key:
        actions = ["kms:Decrypt", "kms:Encrypt", "kms:GenerateDataKey"]
        statements.append(places.key("OutputKey", actions, machine.output_kms_key))
    return _policy(statements)


def of_person(job: JobFile, region: str) -> dict[str, Any]:
    """What the one who types lora must be allowed, for all of its commands."""
    places = _Places(job, region)
    sent = [f"{places.root}/inputs/*"]
    statements = [
        _allow("LookAtInputsAndOutputs", ["s3:GetObject"], [*places.inputs, *places.jobs, *places.curves]),
        _allow(
            "SendInputs", ["s3:AbortMultipartUpload", "s3:ListMultipartUploadParts", "s3:PutObject"], sent
        ),
        *places.listing("List", ["s3:ListBucket"], [*places.given, *places.own]),
        _allow("FindUploadsThatWereCutOff", ["s3:ListBucketMultipartUploads"], [places.bucket]),
        _allow("FindTheImage", ["ecr:DescribeImages"], [places.repository]),
        _allow(
            "Jobs",
            [
                "sagemaker:AddTags",
                "sagemaker:CreateTrainingJob",
                "sagemaker:StopTrainingJob",
            ],
            places.training_jobs,
        ),
        _allow("ListJobs", ["sagemaker:DescribeTrainingJob", "sagemaker:ListTrainingJobs"], ["*"]),
        {
            **_allow("PassTheRole", ["iam:PassRole"], [job.sagemaker.role]),
            "Condition": {"StringEquals": {"iam:PassedToService": _SERVICE}},
        },
        _allow(
            "ReadLogs", ["logs:DescribeLogStreams", "logs:GetLogEvents"], [places.logs, f"{places.logs}:*"]
        ),
    ]
    if job.sagemaker.output_kms_key:
        statements.append(places.key("OutputKey", ["kms:Decrypt"], job.sagemaker.output_kms_key))
    return _policy(statements)


def trust(job: JobFile) -> dict[str, Any]:
    """The role's trust policy: SageMaker may assume it, for jobs of its own account."""
    account = job.sagemaker.role.split(":")[4]
    statement = {
        "Effect": "Allow",
        "Principal": {"Service": _SERVICE},
        "Action": "sts:AssumeRole",
        "Condition": {"StringEquals": {"aws:SourceAccount": account}},
    }
    return _policy([statement])


class _Places:
    """What a job touches, as ARNs; `*` at their ends stands for what the jobs of this name have below."""

    def __init__(self, job: JobFile, region: str) -> None:
        _, self._partition, _, _, account, _ = job.sagemaker.role.split(":", 5)
        self._region, self._account = region, account
        output, name = S3Uri.parse(job.output), job.name
        self.bucket = self._s3(output.bucket)
        self.root = self._s3(f"{output.bucket}/{output.key}")
        names = [f"{name}-{_DIGEST}", f"{name}-{_DIGEST}-*"]  # an attempt's: of cat, and not of cat-2
        self.jobs = [f"{self.root}/{one}/*" for one in names]
        self.states = [f"{self.root}/checkpoints/{one}/*" for one in names[:1]]
        self.curves = [f"{self.root}/tensorboard/{one}/*" for one in names]
        self.given = [S3Uri.parse(uri) for uri in job.remote.values()]
        self.own = [S3Uri(output.bucket, output.key.rstrip("/") + "/")]
        there = [remote(channel, given) for channel, given in job.remote.items()]
        self.inputs = [self._s3(uri.removeprefix("s3://") + "*" * uri.endswith("/")) for uri in there]
        self.inputs += [f"{self.root}/inputs/*"] if job.local else []
        self.repository = self._of_image(job)
        self.logs = self._arn("logs", f"log-group:{GROUP}")
        self.training_jobs = [self._arn("sagemaker", f"training-job/{one}") for one in names]

    def listing(
        self, name: str, actions: Sequence[str], folders: Sequence[S3Uri]
    ) -> Iterator[dict[str, Any]]:
        """A statement a bucket: what may be listed of it."""
        for number, bucket in enumerate(sorted({uri.bucket for uri in folders}), 1):
            prefixes = sorted({f"{uri.key}*" for uri in folders if uri.bucket == bucket})
            yield {
                **_allow(f"{name}{number}", actions, [self._s3(bucket)]),
                "Condition": {"StringLike": {"s3:prefix": prefixes}},
            }

    def key(self, name: str, actions: Sequence[str], key: str) -> dict[str, Any]:
        """A statement on a KMS key, by its id, its ARN or an alias, which IAM knows as a condition only."""
        *_, last = key.split(":")
        if not last.startswith("alias/"):
            return _allow(name, actions, [key if key.startswith("arn:") else self._arn("kms", f"key/{key}")])
        condition = {"ForAnyValue:StringEquals": {"kms:ResourceAliases": last}}
        return {**_allow(name, actions, [self._arn("kms", "key/*")]), "Condition": condition}

    def _of_image(self, job: JobFile) -> str:
        region, account, name = ecr_repository(job)
        return f"arn:{self._partition}:ecr:{region}:{account}:repository/{name}"

    def _s3(self, path: str) -> str:
        return f"arn:{self._partition}:s3:::{path}"

    def _arn(self, service: str, resource: str) -> str:
        return f"arn:{self._partition}:{service}:{self._region}:{self._account}:{resource}"


def _allow(name: str, actions: Sequence[str], resources: Sequence[str]) -> dict[str, Any]:
    return {"Sid": name, "Effect": "Allow", "Action": list(actions), "Resource": list(resources)}


def _policy(statements: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": list(statements)}
