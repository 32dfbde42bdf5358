"""The job file: what it takes, and what it tells."""

from pathlib import Path
from typing import Any

import pytest

from entrypoint.failures import Unfit
from lora_jobs.job_file import Draft, JobFile
from tests.lora_jobs.account import BUCKET, ROLE, write


def problems(path: Path) -> dict[str, str]:
    """What is wrong, by the key as it is told."""
    with pytest.raises(Unfit) as error:
        JobFile.read(path)
    return {one.where.removeprefix("job.toml: "): f"{one.wrong}. {one.fix}" for one in error.value.problems}


def test_a_fit_one(tmp_path: Path) -> None:
    job = JobFile.read(write(tmp_path / "job.toml", training='network_args = ["a=1", "b"]\nsdpa = true'))
    assert job.inputs == {"model": str(tmp_path / "model.safetensors"), "dataset": str(tmp_path / "pictures")}
    assert (job.file, job.output) == ("job.toml", f"s3://{BUCKET}/of/mine")
    assert job.hyperparameters == {
        "output_name": "cat",
        "trainer": "builtin",
        "resolution": "64,64",
        "min_bucket_reso": "64",
        "network_args": '["a=1", "b"]',
        "sdpa": "true",
    }
    machine = job.sagemaker
    assert (machine.spot, machine.max_runtime_hours, machine.wait_hours) == (True, 24, 48)


def test_a_configuration_is_no_job_file(tmp_path: Path) -> None:
    """Such as lora fetch brings, under the job file's own name."""
    file = tmp_path / "job.toml"
    file.write_text("network_dim = 8\nmax_train_epochs = 2\n")
    ((where, told),) = problems(file).items()
    assert where == str(file)
    assert told.startswith("it is no job file, but a configuration, such as lora fetch brings. Name it")


def test_a_path_is_one_from_the_job_file_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    job = JobFile.read(write(tmp_path / "job.toml", dataset="/pictures", base_model="s3://models/a.ckpt"))
    assert (job.dataset, job.base_model) == ("/pictures", "s3://models/a.ckpt")


def test_all_is_told_at_once_with_the_place_of_each(tmp_path: Path) -> None:
    path = write(
        tmp_path / "job.toml",
        name="Cat",
        top='seed = 1\ninstance = "x"\nbase_modle = "x"',
        sagemaker='spto = true\nmax_runtime_hours = 1000\nvae = "x"',
        training='lr = {a = 1}\nhuggingface_token = "hf_123"',
    )
    assert problems(path) == {
        "name": "'Cat' is not 1 to 40 lower-case letters, digits and hyphens, a hyphen not first."
        ' Write name = "cat"',
        "seed": "there is no such key. Move it below [training]",
        "instance": "there is no such key. Move it below [sagemaker]",
        "base_modle": "there is no such key. Did you mean base_model?",
        "[sagemaker] spto": "there is no such key. Did you mean spot?",
        "[sagemaker] vae": "there is no such key. Move it to the top, above [sagemaker]",
        "[sagemaker] max_runtime_hours": "expected less than or equal to 672, found '1000'. Correct it",
        "[training] lr": "it is neither a number, true or false, a text, nor a list of these."
        " sd-scripts' options are no tables; write its value alone",
        "[training] huggingface_token": "it is a secret, and everybody who may call DescribeTrainingJob reads"
        " hyperparameters. Remove it: the job needs none for what it trains",
    }


def test_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('name = "cat"')
    missing = "it is missing. Write it; lora init shows an example"
    assert problems(tmp_path / "job.toml") == dict.fromkeys(
        ("base_model", "dataset", "output", "[sagemaker]"), missing
    )


@pytest.mark.parametrize(
    ("top", "sagemaker", "where", "told"),
    [
        (
            {"output": "s3://BUCKET/a"},
            "",
            "output",
            "s3://BUCKET/a still holds the placeholder BUCKET. Fill it in",
        ),
        (
            {"dataset": "s3://BUCKET/a"},
            "",
            "dataset",
            "s3://BUCKET still holds the placeholder BUCKET. Fill it in",
        ),
        ({"output": "s3://bucket"}, "", "output", "it names a bucket and no folder in it."),
        ({"output": "loras"}, "", "output", "'loras' is no S3 URI; expected s3://bucket/key."),
        ({"output": "s3://Bucket/a"}, "", "output", "'Bucket' is no name of a bucket."),
        ({"output": "s3://bucket/a b"}, "", "output", "it holds characters that SageMaker or an IAM policy"),
        ({"dataset": "gs://bucket/a"}, "", "dataset", "'gs://bucket/a' is no S3 URI;"),
        ({"name": "-cat"}, "", "name", "'-cat' is not 1 to 40"),
        ({"name": "c" * 41}, "", "name", f"'{'c' * 41}' is not 1 to 40"),
        ({}, 'role = "training"', "[sagemaker] role", "'training' is no role's ARN."),
        ({}, 'image = "ACCOUNT.x"', "[sagemaker] image", "ACCOUNT.x still holds the placeholder ACCOUNT."),
        ({}, 'instance = "g5.xlarge"', "[sagemaker] instance", "'g5.xlarge' is no instance type."),
        ({}, 'region = "Frankfurt"', "[sagemaker] region", "'Frankfurt' is no region."),
        ({}, "keep_alive_minutes = 30", "[sagemaker] keep_alive_minutes", "a warm pool keeps an on-demand"),
        (
            {},
            "spot = false\nkeep_alive_minutes = 61",
            "[sagemaker] keep_alive_minutes",
            "expected less than or equal to 60, found '61'.",
        ),
        (
            {},
            "spot = false\nmax_wait_hours = 30",
            "[sagemaker] max_wait_hours",
            "it is for spot, and spot is",
        ),
        ({}, "max_wait_hours = 23", "[sagemaker] max_wait_hours", "it is less than max_runtime_hours = 24,"),
        ({}, 'subnets = ["subnet-1"]', "[sagemaker] subnets", "a VPC takes subnets and security_groups,"),
        ({}, 'security_groups = ["sg-1"]', "[sagemaker] subnets", "a VPC takes subnets and security_groups,"),
        ({}, 'subnets = ["x"]', "[sagemaker] subnets", "'x' is no subnet."),
        (
            {},
            'volume_kms_key = "alias/a"',
            "[sagemaker] volume_kms_key",
            "ml.g5.xlarge has a disk of its own,",
        ),
        ({}, "price_per_hour = 0", "[sagemaker] price_per_hour", "expected greater than 0, found '0'."),
        ({}, 'tags = {"aws:x" = "y"}', "[sagemaker] tags", "'aws:x' is no name of a tag."),
        ({}, 'spot = "yes"', "[sagemaker] spot", "expected a valid boolean, found 'yes'."),
    ],
)
def test_values_that_do_not_do(
    tmp_path: Path, top: dict[str, Any], sagemaker: str, where: str, told: str
) -> None:
    found = problems(write(tmp_path / "job.toml", sagemaker=sagemaker, **top))
    assert list(found) == [where]
    assert found[where].startswith(told)


@pytest.mark.parametrize("sagemaker", ["max_wait_hours = 24", "max_runtime_hours = 672", f'role = "{ROLE}"'])
def test_values_that_just_do(tmp_path: Path, sagemaker: str) -> None:
    assert JobFile.read(write(tmp_path / "job.toml", sagemaker=sagemaker)).sagemaker.wait_hours <= 672


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('output_name = "x"', "the LoRA's name is the job file's. Remove it, and write name at the top"),
        ('model_uri = "x"', "the job file says where things lie. Write base_model at the top"),
        ('output_uri = "x"', "the job file says where things lie. Write output at the top"),
        ('s3_location = "x"', "the job file says where things lie. Write output at the top"),
        (f'network_args = ["{"x" * 2500}"]', "it has 2,504 characters, and a hyperparameter at most 2,500."),
        ('metadata_title = "a\\nb"', "it holds a line break or another control character."),
        (
            'metadata_title = "https://s3/x?X-Amz-Signature=abc"',
            "it holds a credential, and everybody who may call DescribeTrainingJob reads hyperparameters.",
        ),
    ],
)
def test_what_is_no_hyperparameter(tmp_path: Path, line: str, told: str) -> None:
    found = problems(write(tmp_path / "job.toml", training=line))
    assert found[f"[training] {line.split(maxsplit=1)[0]}"].startswith(told)


@pytest.mark.parametrize("value", ["{a = 1}", "2020-01-01", "[[1]]"])
def test_what_no_option_is(tmp_path: Path, value: str) -> None:
    found = problems(write(tmp_path / "job.toml", training=f"seed = {value}"))
    assert found["[training] seed"].startswith("it is neither a number, true or false, a text, nor a list of")


@pytest.mark.parametrize(("number", "fits"), [(98, True), (99, False)])
def test_there_is_room_for_100_hyperparameters(tmp_path: Path, number: int, fits: bool) -> None:
    lines = "\n".join(f"key{one} = 1" for one in range(number - 3))  # write has three
    draft = Draft.read(write(tmp_path / "job.toml", training=lines))
    assert (draft.job is not None) == fits
    if not fits:
        assert [key for key, _ in draft.problems] == ["training"]


def test_no_toml(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("name = ")
    with pytest.raises(Unfit, match=r"job.toml: it is no TOML: "):
        JobFile.read(tmp_path / "job.toml")
    with pytest.raises(Unfit, match=r"there is no such job file. Type lora init "):
        JobFile.read(tmp_path / "absent.toml")
