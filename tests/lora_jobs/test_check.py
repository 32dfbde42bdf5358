"""lora check: one report, in the words of the job file."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError

from entrypoint.checked import plain
from entrypoint.gpu import UNNAMED, Gpu
from entrypoint.storage import retries
from lora_jobs.__main__ import main
from lora_jobs.check import gpu_of, look
from lora_jobs.job_file import Draft
from tests.lora_jobs.account import BUCKET, Account, account, job_file, write
from tests.s3 import free_port

__all__ = ["account", "job_file"]


def told(path: Path) -> dict[str, str]:
    return {one.where: one.wrong for one in look(Draft.read(path)).problems}


def test_a_fit_job(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(job_file)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("fit\n")
    assert "  GPU  NVIDIA A10G\n" in out
    assert '  resolution = "64,64"  job.toml: [training] resolution\n' in out
    assert '  output_name = "cat"  job.toml: name\n' in out
    for word in ("hyperparameter", "--", "channel"):
        assert word not in out.replace("--pictures", ""), word


def test_problems_of_the_file_and_of_the_job_come_together(
    job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(job_file, sagemaker='role = "x"', training='lerning_rate = 1\nvae = "a.safetensors"')
    assert main(["check", str(job_file)]) == 2
    out = capsys.readouterr().out.split("\n\n")
    assert out[0] == "unfit: 4 problems"
    assert out[1].splitlines() == [
        "problems",
        "  job.toml: [sagemaker] role: 'x' is no role's ARN. Write it as arn:aws:iam::123456789012:role/NAME",
        "  job.toml: [training] lerning_rate: there is no such hyperparameter or sd-scripts option."
        " Did you mean learning_rate?",
        "  job.toml: [training] vae: vae names a file or folder, and there is no vae."
        ' Write vae = "…" at the top, or remove it',
        "  job.toml: [training] vae: builtin does not have this option."
        " Take it out, or use trainer = sd-scripts",
    ]


def test_an_input_that_is_not_there_is_told_by_its_key(job_file: Path) -> None:
    write(job_file, base_model="absent.safetensors", dataset="absent")
    assert list(told(job_file)) == [
        f"job.toml: base_model: {job_file.parent / 'absent.safetensors'}",
        f"job.toml: dataset: {job_file.parent / 'absent'}",
    ]


def test_what_is_missing_is_told_once(job_file: Path) -> None:
    job_file.write_text('dataset = "s3://BUCKET/x"\n[training]\nmax_train_epochs = 0')
    keys = ["name", "base_model", "dataset", "output", "[sagemaker]", "[training] max_train_epochs"]
    assert sorted(told(job_file)) == sorted(f"job.toml: {key}" for key in keys)


def test_a_toml_of_its_own(job_file: Path) -> None:
    (job_file.parent / "training.toml").write_text("max_train_epochs = 0\nnetwork_dim = 8")
    write(job_file, config="training.toml", training="network_dim = 4")
    assert list(told(job_file)) == [f"{job_file.parent / 'training.toml'} line 1"]
    report = look(Draft.read(job_file))
    assert report.found
    setting = report.found.merged.settings["network_dim"]
    assert (setting.value, setting.where) == (4, "job.toml: [training] network_dim")


def test_json(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(job_file, name="Cat")
    assert main(["check", str(job_file), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert [problem["where"] for problem in report["problems"]] == ["job.toml: name"]
    assert report["kind"] == "sd15"
    assert report["configuration"]["resolution"]["where"] == "job.toml: [training] resolution"


def test_pictures_are_read_where_that_is_asked_for(
    job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(job_file), "--pictures", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["exact"] is True


def test_a_folder_that_this_machine_has_plays_no_part(
    job_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """SAGEMAKER_BASE_DIR is where a job in a checkout finds its channels, which are not this job's."""
    (tmp_path / "ml" / "input" / "data" / "model").mkdir(parents=True)
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path / "ml"))
    assert not told(job_file)


def test_a_bucket_that_is_not_there(account: Account, job_file: Path) -> None:
    write(job_file, dataset="s3://no-such-bucket-of-mine/pictures")
    (where, wrong), *more = told(job_file).items()
    assert (where, more) == ("s3://no-such-bucket-of-mine/pictures", [])
    assert wrong.startswith("there is no such bucket")


def test_a_right_that_is_missing_is_the_persons(
    account: Account, job_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who types lora, not the job's role, is who was refused."""

    def refuse(*_: object) -> None:
        told: Any = {"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
        raise ClientError(told, "ListObjectsV2")

    write(job_file, dataset=f"s3://{BUCKET}/pictures")
    monkeypatch.setattr(BaseClient, "_make_api_call", refuse)
    fix = (
        f"Allow s3:ListBucket on arn:aws:s3:::{BUCKET} to yourself (lora policy JOB.toml --person prints all)"
    )
    assert fix in str(look(Draft.read(job_file)).problems[0])
    write(job_file)
    monkeypatch.setattr("lora_jobs.request.check_buckets", lambda *_: None)
    monkeypatch.setattr("lora_jobs.request.image_by_digest", lambda *_: f"a@sha256:{'0' * 64}")
    module = importlib.import_module("lora_jobs.submit")
    monkeypatch.setattr(module, "_attempts", lambda *_: (None, "cat-01234567"))
    assert main(["submit", str(job_file)]) == 1
    assert "to yourself (lora policy" in capsys.readouterr().err


def test_storage_that_does_not_answer(
    job_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{free_port()}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retries, "BRIEF", 0.0)
    write(job_file, dataset="s3://bucket/pictures")
    assert main(["check", str(job_file)]) == 1
    assert capsys.readouterr().out.startswith("not known: storage did not answer; 1 problem\n")
    assert main(["submit", str(job_file)]) == 1


@pytest.mark.parametrize(
    ("instance", "name", "count", "gib"),
    [
        ("ml.g4dn.xlarge", "Tesla T4", 1, 15),
        ("ml.g4dn.12xlarge", "Tesla T4", 4, 15),
        ("ml.g5.16xlarge", "NVIDIA A10G", 1, 22),
        ("ml.g5.24xlarge", "NVIDIA A10G", 4, 22),
        ("ml.g5.48xlarge", "NVIDIA A10G", 8, 22),
        ("ml.g6.xlarge", "NVIDIA L4", 1, 22),
        ("ml.g6e.xlarge", "NVIDIA L40S", 1, 44),
        ("ml.p4d.24xlarge", "NVIDIA A100", 8, 40),
        ("ml.p4de.24xlarge", "NVIDIA A100", 8, 80),
        ("ml.p5.4xlarge", "NVIDIA H100", 1, 79),
        ("ml.p5.48xlarge", "NVIDIA H100", 8, 79),
        ("ml.p3.8xlarge", "Tesla V100", 4, None),
        ("ml.p3dn.24xlarge", "Tesla V100", 8, None),
        ("ml.p5en.48xlarge", UNNAMED.name, 8, None),
        ("ml.g7e.12xlarge", UNNAMED.name, 2, None),
        ("ml.g7.2xlarge", UNNAMED.name, 1, None),
        ("g5", UNNAMED.name, 1, None),
    ],
)
def test_the_gpus_of_an_instance(
    tmp_path: Path, instance: str, name: str, count: int, gib: int | None
) -> None:
    gpu = gpu_of(Draft.read(write(tmp_path / "job.toml", sagemaker=f'instance = "{instance}"')))
    assert isinstance(gpu, Gpu)
    assert (gpu.name, gpu.count, gpu.memory and gpu.memory >> 30) == (name, count, gib)


@pytest.mark.parametrize("instance", ["ml.m5.large", "ml.c6i.xlarge", "ml.trn1.2xlarge"])
def test_an_instance_without_a_gpu(tmp_path: Path, instance: str) -> None:
    assert gpu_of(Draft.read(write(tmp_path / "job.toml", sagemaker=f'instance = "{instance}"'))) == "none"


def test_an_instance_whose_gpu_has_no_preset_is_told(job_file: Path) -> None:
    for instance in ("ml.g7.2xlarge", "ml.p5en.48xlarge", "ml.p3.2xlarge"):
        report = look(Draft.read(write(job_file, sagemaker=f'instance = "{instance}"')))
        told = f"{instance}: there is no preset for its GPU, only for t4, a10g, l4, l40s, a100, h100"
        assert report.notes[-1:] == (told,)
    assert not any("--gpu" in note for note in report.notes)


def test_what_an_old_gpu_cannot_is_told(job_file: Path) -> None:
    lines = {"sagemaker": 'instance = "ml.p3.2xlarge"', "training": 'mixed_precision = "bf16"'}
    assert (
        "bf16 does not run on a Tesla V100"
        in told(write(job_file, **lines))["job.toml: [training] mixed_precision"]
    )


def test_an_instance_type_that_is_not_known_is_told(job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SageMaker may have it since boto3 was made. No account is asked."""
    monkeypatch.setenv("AWS_PROFILE", "nobodys")
    report = look(Draft.read(write(job_file, sagemaker='instance = "ml.g5.xxlarge"')))
    assert report.exit_code == 0
    assert report.notes[-1].startswith(
        "instance = ml.g5.xxlarge is not among the types that boto3 knows. Did you mean ml.g5.xlarge or"
    )
    assert not any("boto3" in note for note in look(Draft.read(write(job_file))).notes)


def test_several_gpus_share_the_steps(job_file: Path) -> None:
    """Each trains on batches of its own; the built-in trainer takes one of them."""
    steps = {}
    for trainer in ("builtin", "sd-scripts"):
        for size in ("xlarge", "12xlarge"):
            lines = f'trainer = "{trainer}"\nmax_train_epochs = 4'
            machine = f'instance = "ml.g5.{size}"'
            report = look(Draft.read(write(job_file, sagemaker=machine, training=lines)))
            assert report.facts, report.problems
            steps[trainer, size] = report.facts.steps
    assert steps["builtin", "xlarge"] == steps["builtin", "12xlarge"] == steps["sd-scripts", "xlarge"]
    assert steps["sd-scripts", "12xlarge"] < steps["sd-scripts", "xlarge"]


def test_a_machine_without_a_gpu_is_not_called_this_one(job_file: Path) -> None:
    report = look(Draft.read(write(job_file, sagemaker='instance = "ml.c5.xlarge"')))
    assert report.found
    assert report.found.merged.settings["mixed_precision"].where == "a machine without a GPU"
    assert "ml.c5.xlarge has no GPU: a base model of full size takes minutes a step there" in report.notes
    assert "GPU memory" not in "\n".join(plain(report))


def test_the_instance_decides_the_precision(job_file: Path) -> None:
    for instance, precision in (("ml.g4dn.xlarge", "fp16"), ("ml.g5.xlarge", "bf16"), ("ml.m5.large", "no")):
        report = look(Draft.read(write(job_file, sagemaker=f'instance = "{instance}"')))
        assert report.found
        assert report.found.merged.values["mixed_precision"] == precision
