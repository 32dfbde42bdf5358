"""lora policy: enough for the calls that are really made, and no more."""

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from entrypoint.storage import S3Uri
from lora_jobs import policy, submit
from lora_jobs.__main__ import main
from lora_jobs.job_file import JobFile
from tests.faults.proxy import Proxy
from tests.harness import Job
from tests.lora_jobs.account import BUCKET, NUMBER, REGION, ROLE, Account, account, job_file, write
from tests.lora_jobs.test_submit import copy
from tests.s3 import S3Server

__all__ = ["account", "job_file"]

Action = tuple[str, str, Mapping[str, str]]  # its name, the resource's ARN, the context

# Operations of boto3 that need a permission of another name, or of more: the service authorization reference.
_S3 = {
    "HeadObject": ["GetObject"], "GetObject": ["GetObject"], "ListObjectsV2": ["ListBucket"],
    "PutObject": ["PutObject"], "CreateMultipartUpload": ["PutObject"], "UploadPart": ["PutObject"],
    "CompleteMultipartUpload": ["PutObject"], "CopyObject": ["PutObject"],
    "ListParts": ["ListMultipartUploadParts"], "ListMultipartUploads": ["ListBucketMultipartUploads"],
    "AbortMultipartUpload": ["AbortMultipartUpload"],
    "HeadBucket": [],  # refused, it says the region all the same
}  # fmt: skip

# What the commands of the other half ask for (list, watch, logs, stop, fetch, board), and what happens only
# when an upload is given up.
ELSEWHERE = {
    "sagemaker:StopTrainingJob", "logs:DescribeLogStreams", "logs:GetLogEvents", "s3:AbortMultipartUpload",
}  # fmt: skip

# What SageMaker does as the role: "CreateTrainingJob API: Execution Role Permissions" in
# https://docs.aws.amazon.com/sagemaker/latest/dg/sagemaker-roles.html
BY_SAGEMAKER = {
    "ecr:GetAuthorizationToken", "ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage",
    "ecr:GetDownloadUrlForLayer", "logs:CreateLogGroup", "logs:CreateLogStream", "logs:DescribeLogStreams",
    "logs:PutLogEvents", "cloudwatch:PutMetricData", "s3:GetObject", "s3:PutObject", "s3:ListBucket",
}  # fmt: skip
BY_SAGEMAKER_IN_A_VPC = {
    "ec2:CreateNetworkInterface", "ec2:CreateNetworkInterfacePermission", "ec2:DeleteNetworkInterface",
    "ec2:DeleteNetworkInterfacePermission", "ec2:DescribeNetworkInterfaces", "ec2:DescribeVpcs",
    "ec2:DescribeDhcpOptions", "ec2:DescribeSubnets", "ec2:DescribeSecurityGroups",
}  # fmt: skip


def allowed(told: dict[str, Any], action: Action) -> bool:
    """Whether a policy of ours allows an action: IAM's rule for statements that only allow."""
    name, resource, context = action
    return any(
        name in one["Action"]
        and any(fnmatchcase(resource, pattern) for pattern in one["Resource"])
        and all(
            any(fnmatchcase(context.get(key, ""), pattern) for pattern in _list(patterns))
            for test in one.get("Condition", {}).values()
            for key, patterns in test.items()
        )
        for one in told["Statement"]
    )


def actions(told: dict[str, Any]) -> set[str]:
    return {action for one in told["Statement"] for action in one["Action"]}


def made(account: Account) -> Iterator[Action]:
    """The permissions that the calls of a client needed."""
    for service, operation, told in account.calls:
        if service == "s3":
            bucket = f"arn:aws:s3:::{told['Bucket']}"
            context = {"s3:prefix": told.get("Prefix", "")}
            place = f"{bucket}/{told['Key']}" if "Key" in told else bucket
            yield from ((f"s3:{name}", place, context) for name in _S3[operation])
            if operation == "CopyObject":
                source = unquote(told["CopySource"]).lstrip("/")  # boto3 has made a text of it
                yield "s3:GetObject", f"arn:aws:s3:::{source}", {}
        elif service == "ecr":
            place = f"arn:aws:ecr:{REGION}:{NUMBER}:repository/{told['repositoryName']}"
            yield f"ecr:{operation}", place, {}
        else:
            name = told.get("TrainingJobName")
            place = f"arn:aws:sagemaker:{REGION}:{NUMBER}:training-job/{name}" if name else "*"
            yield f"sagemaker:{operation}", place, {}
            if operation == "CreateTrainingJob":
                yield "sagemaker:AddTags", place, {}
                yield "iam:PassRole", told["RoleArn"], {"iam:PassedToService": "sagemaker.amazonaws.com"}


def test_the_person_may_do_what_lora_does_and_no_more(
    account: Account, job_file: Path, pictures: Path
) -> None:
    """Local inputs and one in S3; a second version; an upload that was cut off."""
    account.client("s3").create_bucket(Bucket="models-of-mine")
    account.client("s3").upload_file(
        str(job_file.parent / "model.safetensors"), "models-of-mine", "base/model.safetensors"
    )
    (job_file.parent / "pictures").unlink()
    copy(pictures, job_file.parent / "pictures")
    (job_file.parent / "pictures" / "2_shape" / "0.png").write_bytes(
        (pictures / "2_shape" / "0.png").read_bytes() + bytes(9 << 20)  # comes in parts
    )
    write(job_file, base_model="s3://models-of-mine/base/model.safetensors")
    job = JobFile.read(job_file)
    account.calls.clear()
    account.end(submit(job_file).name, "Failed")
    (upload,) = account.made("CreateMultipartUpload")
    place = {"Bucket": BUCKET, "Key": upload["Key"]}
    calls = list(account.calls)
    account.client("s3").delete_object(**place)  # as if the upload had been cut off
    account.client("s3").create_multipart_upload(**place)
    account.calls[:] = calls
    submit(job_file)
    (job_file.parent / "pictures" / "2_shape" / "0.txt").write_text("another caption")
    submit(job_file)
    told = policy.of_person(job, REGION)
    needed = list(made(account))
    assert [one for one in needed if not allowed(told, one)] == []
    used = {name for name, _, _ in needed}
    assert actions(told) - used == ELSEWHERE
    # None of it on other places.
    assert not allowed(told, ("s3:PutObject", f"arn:aws:s3:::{BUCKET}/of/others/a", {}))
    assert not allowed(told, ("s3:PutObject", "arn:aws:s3:::models-of-mine/base/model.safetensors", {}))
    assert not allowed(told, ("s3:ListBucket", f"arn:aws:s3:::{BUCKET}", {"s3:prefix": "of/others/"}))
    assert not allowed(told, ("iam:PassRole", ROLE, {"iam:PassedToService": "ec2.amazonaws.com"}))
    others = f"arn:aws:sagemaker:{REGION}:{NUMBER}:training-job/dog-01234567"
    assert not allowed(told, ("sagemaker:CreateTrainingJob", others, {}))


def test_the_role_may_do_what_the_job_does(ready: Job, s3: S3Server, bucket: S3Uri, tmp_path: Path) -> None:
    """A real job, with the outputs that a request of ours gives it, seen through a proxy."""
    job = JobFile.read(write(tmp_path / "job.toml", output=f"{bucket}of/mine"))
    with Proxy(s3.endpoint) as proxy:
        ready.environment |= {**s3.environment, "AWS_ENDPOINT_URL_S3": proxy.address}
        ended = ready.run(f"--output_uri={bucket}of/mine/cat-01234567/lora")
    assert ended.code == 0, ended.err
    needed = list(asked_over(proxy, bucket))
    assert needed
    told = policy.of_role(job, REGION)
    assert {one[0] for one in needed if not allowed(told, one)} <= {
        "s3:AbortMultipartUpload"
    }  # it may be refused
    assert actions(told) == BY_SAGEMAKER
    assert {name for name, _, _ in needed} - {"s3:AbortMultipartUpload"} <= actions(told)
    assert not allowed(
        told, ("s3:PutObject", f"arn:aws:s3:::{bucket.bucket}/of/mine/dog-01234567/lora/a", {})
    )
    assert not allowed(told, ("s3:PutObject", f"arn:aws:s3:::{bucket.bucket}/of/mine/inputs/a", {}))
    assert not allowed(told, ("s3:GetObject", f"arn:aws:s3:::{bucket.bucket}/of/others/a", {}))


def asked_over(proxy: Proxy, bucket: S3Uri) -> Iterator[Action]:
    """The permissions that the requests which came through a proxy needed."""
    for asked in proxy.asked:
        parts = urlsplit(asked.path)
        query, key = parse_qs(parts.query, keep_blank_values=True), unquote(parts.path).lstrip("/")
        arn = f"arn:aws:s3:::{bucket.bucket}"
        name = {"GET": "GetObject", "HEAD": "GetObject", "DELETE": "AbortMultipartUpload"}.get(
            asked.method, "PutObject"
        )
        if asked.method == "GET" and not key:
            yield "s3:ListBucket", arn, {"s3:prefix": query.get("prefix", [""])[0]}
        else:
            yield f"s3:{name}", f"{arn}/{key}", {}


def test_the_role_may_do_what_sagemaker_does_as_it(tmp_path: Path) -> None:
    lines = (
        'instance = "ml.p3.2xlarge"\nsubnets = ["subnet-1"]\nsecurity_groups = ["sg-1"]\n'
        'volume_kms_key = "1234abcd"\noutput_kms_key = "alias/mine"'
    )
    plain = policy.of_role(JobFile.read(write(tmp_path / "job.toml")), REGION)
    assert actions(plain) == BY_SAGEMAKER
    full = policy.of_role(JobFile.read(write(tmp_path / "job.toml", sagemaker=lines)), REGION)
    keys = {"kms:CreateGrant", "kms:Decrypt", "kms:Encrypt", "kms:GenerateDataKey"}
    assert actions(full) == BY_SAGEMAKER | BY_SAGEMAKER_IN_A_VPC | keys
    root = f"arn:aws:s3:::{BUCKET}/of/mine"
    key = f"arn:aws:kms:{REGION}:{NUMBER}:key"
    group = f"arn:aws:logs:{REGION}:{NUMBER}:log-group:/aws/sagemaker/TrainingJobs"
    of_mine = {"kms:ResourceAliases": "alias/mine"}
    for action in (
        ("s3:GetObject", f"{root}/inputs/dataset-0/1_a/1.png", {}),
        ("s3:GetObject", f"{root}/checkpoints/cat-01234567/state-a/x", {}),
        ("s3:PutObject", f"{root}/checkpoints/cat-01234567/state-a/x", {}),
        ("s3:PutObject", f"{root}/cat-01234567/output/model/cat.safetensors", {}),
        ("s3:PutObject", f"{root}/tensorboard/cat-01234567/tensorboard-output/e", {}),
        ("s3:ListBucket", f"arn:aws:s3:::{BUCKET}", {"s3:prefix": "of/mine/inputs/dataset-0/"}),
        ("logs:CreateLogStream", f"{group}:log-stream:cat-01234567/algo-1", {}),
        ("cloudwatch:PutMetricData", "*", {"cloudwatch:namespace": "/aws/sagemaker/TrainingJobs"}),
        ("kms:CreateGrant", f"{key}/1234abcd", {}),
        ("kms:GenerateDataKey", f"{key}/5678", of_mine),
    ):
        assert allowed(full, action), action
    assert not allowed(full, ("kms:GenerateDataKey", f"{key}/5678", {}))
    assert not allowed(full, ("cloudwatch:PutMetricData", "*", {"cloudwatch:namespace": "else"}))


def test_an_input_in_s3_is_the_only_one_that_may_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "job.toml", base_model="s3://a/b.safetensors", dataset="s3://a/cat")
    told = policy.of_role(JobFile.read(path), REGION)
    assert allowed(told, ("s3:GetObject", "arn:aws:s3:::a/cat/1.png", {}))
    assert allowed(told, ("s3:ListBucket", "arn:aws:s3:::a", {"s3:prefix": "cat/"}))
    assert allowed(told, ("s3:GetObject", "arn:aws:s3:::a/b.safetensors", {}))
    for other in ("dog/1.png", "cat2/1.png", "b.safetensors.old"):
        assert not allowed(told, ("s3:GetObject", f"arn:aws:s3:::a/{other}", {}))
    assert not allowed(told, ("s3:PutObject", "arn:aws:s3:::a/cat/1.png", {}))
    assert not allowed(told, ("s3:GetObject", f"arn:aws:s3:::{BUCKET}/of/mine/inputs/a", {}))


def test_the_jobs_of_another_name_are_not_touched(tmp_path: Path) -> None:
    """Of cat-2, by cat."""
    job = JobFile.read(write(tmp_path / "job.toml"))
    put = f"arn:aws:s3:::{BUCKET}/of/mine/{{}}/lora/cat.safetensors"
    stop = f"arn:aws:sagemaker:{REGION}:{NUMBER}:training-job/{{}}"
    for name, mine in (("cat-01234567", True), ("cat-01234567-2", True), ("cat-2-01234567", False)):
        assert allowed(policy.of_role(job, REGION), ("s3:PutObject", put.format(name), {})) == mine
        stopping = ("sagemaker:StopTrainingJob", stop.format(name), {})
        assert allowed(policy.of_person(job, REGION), stopping) == mine


def test_what_is_printed(account: Account, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "job.toml")
    job = JobFile.read(path)
    for flags, told in (
        ([], policy.of_role(job, REGION)),
        (["--person"], policy.of_person(job, REGION)),
        (["--trust"], policy.trust(job)),
    ):
        assert main(["policy", str(path), *flags]) == 0
        assert json.loads(capsys.readouterr().out) == told
    (statement,) = policy.trust(job)["Statement"]
    assert statement["Principal"] == {"Service": "sagemaker.amazonaws.com"}
    assert statement["Action"] == "sts:AssumeRole"
    assert statement["Condition"] == {"StringEquals": {"aws:SourceAccount": NUMBER}}


def test_iam_takes_it(account: Account, tmp_path: Path) -> None:
    """moto reads policies by IAM's grammar, and holds them against its limits."""
    job = JobFile.read(write(tmp_path / "job.toml", sagemaker='output_kms_key = "alias/mine"'))
    iam = account.client("iam")
    iam.create_role(RoleName="training", AssumeRolePolicyDocument=json.dumps(policy.trust(job)))
    for name, told in (("role", policy.of_role(job, REGION)), ("person", policy.of_person(job, REGION))):
        iam.create_policy(PolicyName=name, PolicyDocument=json.dumps(told))
        names = [one["Sid"] for one in told["Statement"]]
        assert len(names) == len(set(names))
        assert all(one.isalnum() for one in names)
        assert len(json.dumps(told, separators=(",", ":"))) <= 6144  # of a managed policy


def _list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
