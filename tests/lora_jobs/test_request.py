"""What SageMaker is asked for, held against botocore's description of CreateTrainingJob."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.session import get_session
from botocore.validate import ParamValidator

from entrypoint.failures import Unfit
from entrypoint.progress import METRIC_DEFINITIONS
from entrypoint.storage import RemoteObject, S3Uri
from lora_jobs import submit
from lora_jobs.aws import Aws
from lora_jobs.job_file import JobFile
from lora_jobs.request import base_name, image_by_digest, training_job
from tests.lora_jobs.account import (
    BUCKET,
    NUMBER,
    REGION,
    REPOSITORY,
    ROLE,
    Account,
    account,
    job_file,
    write,
)

__all__ = ["account", "job_file"]

SHAPE = get_session().get_service_model("sagemaker").operation_model("CreateTrainingJob").input_shape
DIGEST = f"sha256:{'0' * 64}"
CHANNELS = {"model": "s3://models/a.safetensors", "dataset": "s3://pictures/of/mine/"}

# Lines of [sagemaker] that may be chosen, and what the request then has.
CHOICES: dict[str, dict[str, Any]] = {
    "spot = false": {"EnableManagedSpotTraining": False, "StoppingCondition": {"MaxRuntimeInSeconds": 86400}},
    'subnets = ["subnet-1"]\nsecurity_groups = ["sg-1", "sg-2"]': {
        "VpcConfig": {"Subnets": ["subnet-1"], "SecurityGroupIds": ["sg-1", "sg-2"]}
    },
    "network_isolation = true": {"EnableNetworkIsolation": True},
    'output_kms_key = "alias/mine"': {
        "OutputDataConfig": {
            "S3OutputPath": f"s3://{BUCKET}/of/mine",
            "CompressionType": "NONE",
            "KmsKeyId": "alias/mine",
        }
    },
    "price_per_hour = 1.21": {"Environment": {"LORA_PRICE_PER_HOUR": "1.21"}},
    'tags = { project = "loras" }': {
        "Tags": [{"Key": "sagemaker-kohya", "Value": "cat"}, {"Key": "project", "Value": "loras"}]
    },
}


def asked(path: Path, **changed: Any) -> dict[str, Any]:
    """The request of a job file, for inputs that are in S3."""
    told = {"name": "cat-01234567", "base": "cat-01234567", "channels": CHANNELS, "volume_gb": 30}
    image = f"{REPOSITORY}@{DIGEST}"
    return training_job(JobFile.read(path), image=image, **{**told, **changed})


def faults(value: Any, shape: Any, where: str = "") -> Iterator[str]:
    """What breaks the description's limits that botocore itself leaves to the service."""
    limits = shape.metadata
    length = (
        value if shape.type_name in ("integer", "long") else len(value) if hasattr(value, "__len__") else 0
    )
    if not limits.get("min", length) <= length <= limits.get("max", length):
        yield f"{where}: {length} is not from {limits.get('min')} to {limits.get('max')}"
    if enum := limits.get("enum"):
        yield from [] if value in enum else [f"{where}: {value} is none of {enum}"]
    if pattern := limits.get("pattern"):  # as Java reads it
        known = pattern.replace(r"\p{L}\p{Z}\p{N}", r"\w ")
        yield from [] if re.fullmatch(known, value) else [f"{where}: {value!r} is not like {pattern}"]
    if shape.type_name == "structure":
        for name, part in value.items():
            yield from faults(part, shape.members[name], f"{where}.{name}")
    if shape.type_name == "list":
        for part in value:
            yield from faults(part, shape.member, where)
    if shape.type_name == "map":
        for key, part in value.items():
            yield from faults(key, shape.key, f"{where}.{key}")
            yield from faults(part, shape.value, f"{where}.{key}")


def test_every_combination_of_choices_is_a_request(tmp_path: Path) -> None:
    for number in range(len(CHOICES) + 1):
        for lines in itertools.combinations(CHOICES, number):
            request = asked(write(tmp_path / "job.toml", sagemaker="\n".join(lines)))
            report = ParamValidator().validate(request, SHAPE)
            assert not report.has_errors(), report.generate_report()
            assert not list(faults(request, SHAPE)), lines
            for line in lines:
                assert CHOICES[line].items() <= request.items()
            absent = [set(CHOICES[line]) for line in CHOICES if line not in lines]
            for name in set().union(*absent) & {"VpcConfig", "Environment"}:
                assert name not in request


def test_the_largest_and_the_smallest(tmp_path: Path) -> None:
    """A job file's own limits lie within the service's."""
    largest = {
        "name": "c" * 40,
        "sagemaker": "max_runtime_hours = 672\nvolume_gb = 16384\n"
        + "subnets = [" + ", ".join(f'"subnet-{number}"' for number in range(16)) + "]\n"
        + "security_groups = [" + ", ".join(f'"sg-{number}"' for number in range(5)) + "]\n"
        + "tags = {" + ", ".join(f'{"k" * 126}{number} = "{"v" * 256}"' for number in range(10, 59)) + "}",
        "training": "\n".join(f'key{number} = "{"x" * 2500}"' for number in range(95)),
    }  # fmt: skip
    smallest = {"name": "c", "sagemaker": "max_runtime_hours = 0.01\nvolume_gb = 1"}
    for told in (largest, smallest):
        request = asked(write(tmp_path / "job.toml", **told), name=f"{told['name']}-01234567-999")
        assert not ParamValidator().validate(request, SHAPE).has_errors()
        assert not list(faults(request, SHAPE))
    warm = asked(write(tmp_path / "job.toml", sagemaker="spot = false\nkeep_alive_minutes = 60"))
    assert warm["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 3600
    assert not list(faults(warm, SHAPE))


def test_faults_are_found(tmp_path: Path) -> None:
    request = asked(write(tmp_path / "job.toml"), name="-")
    request["ResourceConfig"]["InstanceType"] = "ml.g5.huge"
    request["HyperParameters"]["x"] = "y" * 2501
    found = [one.partition(":")[0] for one in faults(request, SHAPE)]
    assert found == [".TrainingJobName", ".HyperParameters.x", ".ResourceConfig.InstanceType"]


def test_a_plain_job(tmp_path: Path) -> None:
    request = asked(write(tmp_path / "job.toml"))
    assert request["RoleArn"] == ROLE
    assert request["ResourceConfig"] == {
        "InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30
    }  # fmt: skip
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 86400, "MaxWaitTimeInSeconds": 172800}
    assert request["EnableManagedSpotTraining"] is True
    assert request["CheckpointConfig"] == {"S3Uri": f"s3://{BUCKET}/of/mine/checkpoints/cat-01234567"}
    assert request["TensorBoardOutputConfig"] == {"S3OutputPath": f"s3://{BUCKET}/of/mine/tensorboard"}
    assert request["AlgorithmSpecification"]["MetricDefinitions"] == [dict(one) for one in METRIC_DEFINITIONS]
    sources = [one["DataSource"]["S3DataSource"] for one in request["InputDataConfig"]]
    assert [(one["S3DataType"], one["S3Uri"]) for one in sources] == [
        ("S3Prefix", uri) for uri in CHANNELS.values()
    ]
    assert {one["InputMode"] for one in request["InputDataConfig"]} == {"File"}


def test_a_job_that_reaches_nothing_is_not_told_to_publish(tmp_path: Path) -> None:
    assert "output_uri" in asked(write(tmp_path / "job.toml"))["HyperParameters"]
    for line in ("network_isolation = true", 'output_kms_key = "alias/mine"'):  # or it would, without the key
        alone = asked(write(tmp_path / "job.toml", sagemaker=line))
        assert "output_uri" not in alone["HyperParameters"]


def test_a_volume_key_where_there_is_a_volume(tmp_path: Path) -> None:
    lines = 'instance = "ml.p3.2xlarge"\nvolume_kms_key = "alias/mine"'
    request = asked(write(tmp_path / "job.toml", sagemaker=lines))
    assert request["ResourceConfig"]["VolumeKmsKeyId"] == "alias/mine"
    assert not list(faults(request, SHAPE))


@pytest.mark.parametrize(
    ("lines", "same"),
    [
        ({"sagemaker": 'instance = "ml.g6.xlarge"\nspot = false\nprice_per_hour = 2\nvolume_gb = 99'}, True),
        ({"training": "seed = 1"}, False),
        ({"name": "dog"}, False),
        ({"output": "s3://else/where"}, False),
    ],
)
def test_the_name_tells_what_is_learned(tmp_path: Path, lines: dict[str, str], same: bool) -> None:
    plain = JobFile.read(write(tmp_path / "job.toml"))
    other = JobFile.read(write(tmp_path / "job.toml", **lines))
    plan = planned("1", mixed_precision="bf16")
    name = base_name(plain, plan, image=f"a@{DIGEST}", channels=CHANNELS)
    assert re.fullmatch("cat-[0-9a-f]{8}", name)
    assert (base_name(other, plan, image=f"a@{DIGEST}", channels=CHANNELS) == name) == same
    assert base_name(plain, plan, image=f"b@{DIGEST}", channels=CHANNELS) == name  # the same image elsewhere
    assert base_name(plain, plan, image=f"a@{DIGEST[:-1]}1", channels=CHANNELS) != name
    assert base_name(plain, plan, image=f"a@{DIGEST}", channels={**CHANNELS, "vae": "s3://a/b"}) != name


@pytest.mark.parametrize(
    ("etag", "gpus", "values", "same"),
    [
        ("1", 1, {"mixed_precision": "bf16", "max_data_loader_n_workers": 8}, True),
        ("2", 1, {"mixed_precision": "bf16"}, False),
        ("1", 4, {"mixed_precision": "bf16"}, False),
        ("1", 1, {"mixed_precision": "fp16"}, False),
    ],
)
def test_a_job_whose_states_would_be_refused_has_another_name(
    tmp_path: Path, etag: str, gpus: int, values: dict[str, Any], same: bool
) -> None:
    """The data in S3 is another by now, or the instance has more GPUs, or one of another precision."""
    job = JobFile.read(write(tmp_path / "job.toml"))
    first, then = (
        base_name(job, plan, image=f"a@{DIGEST}", channels=CHANNELS)
        for plan in (planned("1", mixed_precision="bf16"), planned(etag, gpus, **values))
    )
    assert (first == then) == same


def planned(etag: str, gpus: int = 1, **values: Any) -> Any:
    """What a plan tells of its values, its GPUs and its files; the data set is in S3."""
    picture = RemoteObject(S3Uri("pictures", "of/mine/1.png"), 1, etag)
    return SimpleNamespace(
        merged=SimpleNamespace(values=values),
        inputs=[Path("model.safetensors"), picture],
        request=SimpleNamespace(trainer="sd-scripts"),
        gpu=SimpleNamespace(count=gpus),
    )


def test_the_image_is_asked_for_by_digest(account: Account, tmp_path: Path) -> None:
    def image(text: str) -> str:
        job = JobFile.read(write(tmp_path / "job.toml", sagemaker=f'image = "{text}"'))
        return image_by_digest(job, Aws(REGION))

    assert image(f"{REPOSITORY}:0.1.0") == f"{REPOSITORY}@{account.digest}"
    (call,) = account.made("DescribeImages")
    assert call == {
        "registryId": NUMBER, "repositoryName": "sagemaker-kohya", "imageIds": [{"imageTag": "0.1.0"}]
    }  # fmt: skip
    assert image(f"{REPOSITORY}@{DIGEST}") == f"{REPOSITORY}@{DIGEST}"
    assert len(account.made("DescribeImages")) == 1
    with pytest.raises(Unfit, match=r"\[sagemaker\] image: 'kohya:1' is no image in ECR, and SageMaker"):
        image("kohya:1")
    with pytest.raises(Unfit, match="the image is in eu-west-1, the job in us-east-1"):
        image(f"{NUMBER}.dkr.ecr.eu-west-1.amazonaws.com/a:1")


def test_an_image_that_is_not_there(
    account: Account, job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_jobs.__main__ import main  # noqa: PLC0415

    write(job_file, sagemaker=f'image = "{REPOSITORY}:0.2.0"')
    assert main(["submit", str(job_file)]) == 1
    assert capsys.readouterr().err.startswith(
        "ERROR: [sagemaker] image: it is not in ECR. AWS says: The image"
    )
    assert not account.keys()


def test_the_volume_holds_the_inputs(account: Account, job_file: Path) -> None:
    """Whether they are here or in S3 already, and what the job makes of them."""

    def volume() -> int:
        size: int = submit(job_file, dry_run=True).request["ResourceConfig"]["VolumeSizeInGB"]
        return size

    assert volume() == 30  # the least
    with (job_file.parent / "pictures" / "2_shape" / "0.png").open("rb") as file:
        picture = file.read()
    (job_file.parent / "pictures").unlink()
    folder = job_file.parent / "pictures" / "2_shape"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(picture)
    (folder / "0.txt").write_text("a shape")
    with (folder / "0.png").open("r+b") as file:
        file.truncate(15_000_000_000)  # no room is taken
    from lora_jobs import uploads  # noqa: PLC0415

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads, "_digest", lambda path: path.name)
        assert volume() == 15 + 1 + 1 + 20  # the pictures, what is made, what is begun of a GB, room
