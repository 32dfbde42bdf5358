"""lora run, with a docker that notes its words."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.lora_jobs.account import job_file, write
from tests.unit.programs import ROOT, Programs
from tests.unit.test_run import DOCKER, after, bound

__all__ = ["job_file"]

IMAGE = "sagemaker-kohya:0.1.0-cpu"


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    """A machine with a GPU, and the image."""
    folder = tmp_path / "machine"
    folder.mkdir()
    made = Programs(folder)
    made.add("docker", DOCKER)
    made.add("id", "echo 1234\n")
    made.know(engine="", image="", gpu="", code="0\n")
    made.environment["PYTHONPATH"] = str(ROOT)
    return made


def lora(programs: Programs, *words: str, cwd: Path) -> "tuple[int, str, str]":
    ended = programs.run(sys.executable, "-m", "lora_jobs", "run", *words, cwd=cwd)
    return ended.returncode, ended.stdout, ended.stderr


def test_the_same_job_on_this_machine(programs: Programs, job_file: Path) -> None:
    folder = job_file.parent
    (folder / "training.toml").write_text('sample_prompts = "prompts.txt"\nsample_every_n_epochs = 1')
    (folder / "prompts.txt").write_text("a cat")
    (folder / "other.toml").write_text("seed = 1")
    write(
        job_file,
        config="training.toml",
        sagemaker='role = "arn:aws:iam::ACCOUNT:role/ROLE"',  # which a job here has no use for
        output="s3://BUCKET/loras",
        training='trainer = "sd-scripts"\nnetwork_args = ["rank_dropout=0.1"]',
    )
    code, out, err = lora(programs, "job.toml", "--image", IMAGE, "--out", "made", cwd=folder)
    assert code == 0, err
    assert out.startswith(f"cat: runs in {IMAGE}; what comes out lies in made\n")
    words = programs.calls()[-1]
    assert words[words.index(IMAGE) :] == [
        IMAGE,
        "train",
        f"--model_uri={folder / 'model.safetensors'}",
        f"--dataset_uri={folder / 'pictures'}",
        "--output_name=cat",
        "--resolution=64,64",
        "--min_bucket_reso=64",
        "--trainer=sd-scripts",
        '--network_args=["rank_dropout=0.1"]',
    ]
    assert after(words, "--gpus") == ["all"]
    mounts = after(words, "--mount")
    assert bound(folder / "made", "/opt/ml") in mounts
    for name in ("model.safetensors", "pictures"):
        assert bound(folder / name, folder / name, ",readonly") in mounts
    channel = folder / "made" / "input" / "data" / "config"
    assert sorted(file.name for file in channel.iterdir()) == ["prompts.txt", "training.toml"]


def test_a_dry_run_prints_what_would_be_run(programs: Programs, job_file: Path) -> None:
    words = ("job.toml", "--image", IMAGE, "--gpus", "none")
    code, out, err = lora(programs, *words, "--dry-run", cwd=job_file.parent)
    assert (code, err, programs.calls()) == (0, "", [])
    assert not (job_file.parent / "cat-ml").exists()
    ended = programs.run(*shlex.split(out), cwd=job_file.parent)
    assert ended.returncode == 0, ended.stderr
    typed = programs.calls()[-1]
    assert lora(programs, *words, cwd=job_file.parent)[0] == 0
    assert programs.calls()[-1] == typed
    assert "--gpus" not in typed


@pytest.mark.parametrize("out", ["pictures", "pictures/made", "."])
def test_what_comes_out_is_not_mixed_with_the_inputs(programs: Programs, job_file: Path, out: str) -> None:
    pictures = job_file.parent / "pictures"
    there = pictures.resolve()
    pictures.unlink()
    shutil.copytree(there, pictures)
    code, _, err = lora(programs, "job.toml", "--image", IMAGE, "--out", out, cwd=job_file.parent)
    assert code == 1
    assert f"{out}: it would mix with dataset" in err
    assert not programs.calls()


def test_a_configuration_that_a_person_has_put_there_stays(programs: Programs, job_file: Path) -> None:
    """In a tree that was made by hand."""
    there = job_file.parent / "ml" / "input" / "data" / "config" / "mine.toml"
    there.parent.mkdir(parents=True)
    there.touch()
    words = ("job.toml", "--image", IMAGE, "--out", "ml")
    code, _, err = lora(programs, *words, cwd=job_file.parent)
    assert code == 1
    assert "it is there, and not from lora run" in err
    assert there.exists()
    there.rename(job_file.parent / "mine.toml")
    there.parent.rmdir()
    write(job_file, config="mine.toml")
    for _ in range(2):
        assert lora(programs, *words, cwd=job_file.parent)[0] == 0
    assert there.exists()


def test_the_jobs_exit_code_is_its_own(programs: Programs, job_file: Path) -> None:
    programs.know(code="143\n")
    assert lora(programs, "job.toml", "--image", IMAGE, "--gpus=none", cwd=job_file.parent)[0] == 143


def test_an_unfit_job_is_not_run(programs: Programs, job_file: Path) -> None:
    write(job_file, training="lerning_rate = 1", sagemaker='image = "ACCOUNT.x/a:TAG"', name="Cat")
    code, out, err = lora(programs, "job.toml", cwd=job_file.parent)
    assert (code, out, programs.calls()) == (2, "", [])
    assert [line.split(": ")[2] for line in err.splitlines()] == [
        "name",
        "[training] lerning_rate",
        "[sagemaker] image",
    ]


def test_a_refusal_of_the_script_is_ours(programs: Programs, job_file: Path) -> None:
    programs.forget("image")
    code, out, err = lora(programs, "job.toml", "--image", IMAGE, cwd=job_file.parent)
    assert code == 1
    assert (out, err.startswith(f"ERROR: image {IMAGE}: it is not here.")) == ("", True)
    assert not (job_file.parent / "cat-ml").exists()


def test_the_script_is_the_one_of_make_run() -> None:
    assert (ROOT / "lora_jobs" / "docker-run").resolve() == ROOT / "docker" / "run"
