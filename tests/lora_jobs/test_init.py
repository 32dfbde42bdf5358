"""lora init: a job file that is fit once it is filled in."""

from pathlib import Path

import pytest

from kohya.config import KINDS, Kind
from lora_jobs.__main__ import main
from lora_jobs.job_file import Draft, JobFile
from tests.lora_jobs.account import REPOSITORY, ROLE, Account, account, write_model

__all__ = ["account"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_placeholders_is_wrong(here: Path, kind: Kind) -> None:
    assert main(["init", "--kind", kind]) == 0
    told = {problem.where: problem.wrong for _, problem in Draft.read(here / "job.toml").problems}
    role, image = "arn:aws:iam::ACCOUNT:role/ROLE", "ACCOUNT.dkr.ecr.REGION.amazonaws.com/sagemaker-kohya:TAG"
    assert told == {
        "job.toml: base_model": "s3://BUCKET still holds the placeholder BUCKET",
        "job.toml: dataset": "s3://BUCKET still holds the placeholder BUCKET",
        "job.toml: output": "s3://BUCKET/loras still holds the placeholder BUCKET",
        "job.toml: [sagemaker] image": f"{image} still holds the placeholder ACCOUNT",
        "job.toml: [sagemaker] role": f"{role} still holds the placeholder ACCOUNT",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_filled_in_by_flags_it_is_fit(
    account: Account, here: Path, pictures: Path, kind: Kind, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(here / "model.safetensors", kind)
    (here / "jobs").mkdir()
    words = [
        *("--kind", kind, "--name", "dog", "--base-model", "model.safetensors", "--dataset", str(pictures)),
        *("--output", "s3://loras/of/mine", "--role", ROLE, "--image", f"{REPOSITORY}:0.1.0"),
        *("--region", "eu-west-1", "--trainer", "builtin", "jobs/a.toml"),
    ]
    assert main(["init", *words]) == 0
    assert capsys.readouterr().out == "wrote jobs/a.toml\nnext: lora check jobs/a.toml\n"
    job = JobFile.read(here / "jobs" / "a.toml")
    assert job.inputs == {"model": str(here / "model.safetensors"), "dataset": str(pictures)}
    assert (job.name, job.output, job.sagemaker.role) == ("dog", "s3://loras/of/mine", ROLE)
    assert (job.sagemaker.image, job.sagemaker.region) == (f"{REPOSITORY}:0.1.0", "eu-west-1")
    assert job.sagemaker.instance == {"sd15": "ml.g5.xlarge", "sdxl": "ml.g5.2xlarge"}[kind]
    assert job.training["trainer"] == "builtin"
    assert job.training["resolution"] == {"sd15": "512,512", "sdxl": "1024,1024"}[kind]
    assert main(["check", "jobs/a.toml"]) == 0
    assert capsys.readouterr().out.startswith("fit\n")


def test_lines_of_training_may_be_set(here: Path) -> None:
    words = (
        "resolution=128,128",
        "max_train_epochs=2",
        "allow_missing_captions=true",
        'network_args=["a=1"]',
    )
    main(["init", *(word for each in words for word in ("--set", each))])
    training = Draft.read(here / "job.toml").values["training"]
    assert training == {
        "resolution": "128,128", "max_train_epochs": 2, "allow_missing_captions": True,
        "network_args": ["a=1"], "network_dim": 32, "network_alpha": 16,
    }  # fmt: skip
    assert (here / "job.toml").read_text().count("allow_missing_captions") == 1


def test_odd_lines_of_training(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "init",
            "--set",
            "network_dim =8",
            "--set",
            "training_comment=2026-11-22",
            "--set",
            f"x={'[' * 5000}",
        ]
    )
    training = Draft.read(here / "job.toml").values["training"]
    assert (training["network_dim"], training["training_comment"]) == (8, "2026-11-22")
    assert training["x"] == "[" * 5000
    for given in ("max_train_epochs", "a b=1", "=1"):
        with pytest.raises(SystemExit):
            main(["init", "--set", given, "other.toml"])
        assert f"{given!r} is not OPTION=VALUE" in capsys.readouterr().err
    assert not (here / "other.toml").exists()


def test_what_is_commented_out_may_be_used(here: Path) -> None:
    """Each line that is only a comment's sign away is one that a job file takes."""
    main(
        [
            "init",
            "--base-model",
            "a",
            "--dataset",
            "b",
            "--output",
            "s3://loras/a",
            "--role",
            ROLE,
            "--image",
            "x",
        ]
    )
    text = (here / "job.toml").read_text()
    for line in [line for line in text.splitlines() if line.startswith("# ") and " = " in line]:
        tried = text.replace(line, line.removeprefix("# "))
        if "region" in line:
            tried = tried.replace(" # instead", "# instead")
        (here / "tried.toml").write_text(tried)
        fails = [problem.wrong for _, problem in Draft.read(here / "tried.toml").problems]
        together = ("a VPC takes subnets", "a warm pool keeps", "ml.g5.xlarge has a disk")
        assert all(wrong.startswith(together) for wrong in fails), (line, fails)


def test_nothing_is_written_over(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "job.toml").write_text("mine")
    assert main(["init"]) == 1
    assert (here / "job.toml").read_text() == "mine"
    assert (
        capsys.readouterr().err == "ERROR: job.toml: it is there already. Name another file, or remove it.\n"
    )


@pytest.mark.parametrize(
    ("file", "name"), [("Blue Hat.toml", "blue-hat"), ("é.toml", "lora"), (f"{'x' * 50}.toml", "x" * 40)]
)
def test_the_name_is_the_files(here: Path, file: str, name: str) -> None:
    main(["init", file])
    draft = Draft.read(here / file)
    assert draft.values["name"] == name
    assert "name" not in [key for key, _ in draft.problems]
