"""docker/run, with a stand-in for docker."""

import os
import pty
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from entrypoint import __version__
from tests.unit.programs import ROOT, Programs

IMAGE = "sagemaker-kohya:0.1.0-cuda13"

# What it knows: engine, image, gpu, rootless.
DOCKER = """
case "$1 $2" in
  version*) [ -e engine ] || { echo "Cannot connect to the Docker daemon" >&2; exit 1; } ;;
  "image inspect") [ -e image ] || exit 1 ;;
  info*) if [ -e rootless ]; then echo "[name=seccomp name=rootless]"; else echo "[name=seccomp]"; fi ;;
  run*)
    case " $* " in *" --gpus "*)
      if [ ! -e gpu ]; then
        echo "docker: Error response from daemon: could not select device driver" >&2
        echo "Run 'docker run --help' for more information" >&2
        exit 125
      fi
    esac
    [ ! -e slow ] || trap "echo stopped; exit 143" TERM
    echo "process $$"
    case " $* " in *" --interactive "*) cat >typed; esac
    while [ -e slow ]; do sleep 0.05; done
    exit "$(cat code)" ;;
esac
"""


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    """A machine with a GPU, and a folder ml with an input."""
    made = Programs(tmp_path)
    made.add("docker", DOCKER)
    made.add("id", "echo 1234\n")
    made.know(engine="", image="", gpu="", code="0\n")
    (tmp_path / "ml" / "input").mkdir(parents=True)
    made.environment |= {"IMAGE": IMAGE, "ML": str(tmp_path / "ml")}
    return made


def started(programs: Programs, *words: str, **environment: str) -> list[str]:
    """The words of the docker run that `docker/run words` ends in."""
    ended = programs.run(str(ROOT / "docker" / "run"), *words, cwd=programs.home, **environment)
    assert ended.returncode == 0, ended.stderr
    return programs.calls()[-1][2:]


def after(words: list[str], flag: str) -> list[str]:
    """The values of a flag."""
    return [value for word, value in pairwise(words) if word == flag]


def bound(source: object, target: object, mode: str = "") -> str:
    return f'type=bind,"source={source}","target={target}"{mode}'


def test_a_job(programs: Programs, tmp_path: Path) -> None:
    words = started(programs, "train", "--network_dim=8", "--sample_prompts=a b")
    assert words[-4:] == [IMAGE, "train", "--network_dim=8", "--sample_prompts=a b"]
    assert after(words, "--user") == ["1234:1234"]
    assert after(words, "--gpus") == ["all"]
    assert after(words, "--stop-timeout") == ["120"]
    assert after(words, "--shm-size") == ["2g"]
    kept = "sagemaker-kohya-1234"
    assert after(words, "--mount") == [
        bound(tmp_path / "ml", "/opt/ml"),
        bound(programs.temporary / kept, f"/tmp/{kept}"),
    ]
    assert (programs.temporary / kept).is_dir()
    assert {"--rm"} == {"--rm", "--tty", "--interactive", "--entrypoint", "--init"} & set(words)


def test_a_gpu_is_asked_for_before_the_job_is_started(programs: Programs) -> None:
    started(programs, "train")
    probe = ["run", "--rm", "--gpus", "all", "--network", "none", "--entrypoint", "true", IMAGE]
    assert [call[1:] for call in programs.calls() if call[1] == "run"][:-1] == [probe]


def test_docker_takes_the_place_of_the_script(programs: Programs) -> None:
    """So signals reach it, and its exit code is the job's."""
    programs.know(code="143\n")
    command = [str(ROOT / "docker" / "run"), "train"]
    process = subprocess.Popen(
        command,
        env={**programs.environment, "GPUS": ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == (f"process {process.pid}\n", 143)


def test_on_a_terminal(programs: Programs) -> None:
    ours, theirs = pty.openpty()
    command = [str(ROOT / "docker" / "run"), "train"]
    for stdin, tty in ((theirs, True), (subprocess.DEVNULL, False)):
        subprocess.run(command, env=programs.environment, stdin=stdin, stdout=theirs, timeout=60, check=True)
        assert ("--tty" in programs.calls()[-1]) == tty
    os.close(theirs)
    os.close(ours)


def test_a_shell_has_what_a_job_has(programs: Programs) -> None:
    job = started(programs, "train")
    shell = started(programs, "bash")
    assert shell[-4:] == ["--interactive", "--entrypoint", "bash", IMAGE]
    assert shell[:-4] == job[:-2]
    ended = programs.run("docker/run", "bash", stdin="ls\n")
    assert (ended.returncode, (programs.state / "typed").read_text()) == (0, "ls\n")


def test_a_folder_for_the_results_is_made(programs: Programs, tmp_path: Path) -> None:
    words = started(programs, "train", "--model_uri=s3://b/m", ML="new/ml")
    assert after(words, "--mount")[0] == bound(programs.home / "new/ml", "/opt/ml")
    assert (programs.home / "new/ml").is_dir()


def test_a_rootless_engine_calls_the_user_root(programs: Programs) -> None:
    programs.know(rootless="")
    words = started(programs, "train")
    assert after(words, "--user") == ["0:0"]
    kept = programs.temporary / "sagemaker-kohya-1234"
    assert after(words, "--mount")[1] == bound(kept, "/tmp/sagemaker-kohya-0")


def test_credentials_are_passed_by_name(programs: Programs) -> None:
    (programs.home / ".aws").mkdir()
    settings = programs.home / "a,b:settings"
    settings.touch()
    given = {
        "AWS_SECRET_ACCESS_KEY": "a-secret",
        "AWS_SESSION_TOKEN": "",
        "AWS_CONFIG_FILE": str(settings),
        "AWS_PROFILE": "/nowhere",
        "HF_TOKEN": "a-secret",
        "SAGEMAKER_BASE_DIR": "/elsewhere",
    }
    words = started(programs, "train", **given)
    names = {"AWS_CONFIG_FILE", "AWS_PROFILE", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"}
    assert set(after(words, "--env")) == names
    assert "a-secret" not in " ".join(words)
    assert after(words, "--mount")[2:] == [
        bound(settings, settings, ",readonly"),
        bound(programs.home / ".aws", "/tmp/.aws", ",readonly"),
    ]


def test_paths_of_this_machine_are_shared_under_their_own_names(programs: Programs, tmp_path: Path) -> None:
    model, pictures = tmp_path / "a, b:c.safetensors", programs.home / "pictures=1"
    model.touch()
    pictures.mkdir()
    (programs.home / "8").touch()
    words = started(
        programs,
        "train",
        f"--model_uri={model}",
        "--dataset-uri",
        "pictures=1",
        "--output_uri=out=1",
        f"--logs_uri={programs.home}/out=1",
        "--reg_uri=s3://bucket/reg",
        "--vae_uri=/opt/ml/vae.safetensors",
        "--output_uri=/opt/ml/loras",
        "--weights_uri=",
        "--config_uri=absent.toml",
        "--network_dim=8",
    )
    assert after(words, "--mount")[2:] == [
        bound(model, model, ",readonly"),
        bound(pictures, pictures, ",readonly"),
        bound(programs.home / "out=1", programs.home / "out=1"),
    ]
    assert (programs.home / "out=1").is_dir()
    assert words[words.index("train") + 1 :] == [
        f"--model_uri={model}",
        "--dataset-uri",
        str(pictures),
        f"--output_uri={programs.home}/out=1",
        f"--logs_uri={programs.home}/out=1",
        "--reg_uri=s3://bucket/reg",
        "--vae_uri=/opt/ml/vae.safetensors",
        "--output_uri=/opt/ml/loras",
        "--weights_uri=",
        f"--config_uri={programs.home}/absent.toml",
        "--network_dim=8",
    ]


@pytest.mark.parametrize(
    ("environment", "flags"),
    [
        ({"GPUS": "device=1"}, ["--gpus", "device=1"]),
        ({"GPUS": ""}, []),
        ({"RUN_FLAGS": "--device nvidia.com/gpu=0"}, ["--device", "nvidia.com/gpu=0"]),
        ({"RUN_FLAGS": "--gpus 1"}, ["--gpus", "1"]),
        ({"RUN_FLAGS": "--runtime=nvidia"}, ["--runtime=nvidia"]),
        ({"RUN_FLAGS": "--memory 8g"}, ["--gpus", "all", "--memory", "8g"]),
    ],
)
def test_gpus_and_more_flags(programs: Programs, environment: dict[str, str], flags: list[str]) -> None:
    plain = started(programs, "train", GPUS="")
    words = started(programs, "train", **environment)
    assert [word for word in words if word not in plain] == flags
    asked = [call for call in programs.calls() if "--entrypoint" in call]
    assert len(asked) == (flags == ["--gpus", environment.get("GPUS", "all"), *flags[2:]])


def refused(programs: Programs, *words: str, **environment: str) -> str:
    """What is told where nothing is run, and no folder made."""
    ended = programs.run("docker/run", *words, **environment)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert not list(programs.temporary.iterdir())
    return ended.stderr


def test_no_engine(programs: Programs) -> None:
    programs.forget("engine")
    assert refused(programs, "train") == (
        "ERROR: docker: no engine answers (Cannot connect to the Docker daemon)."
        " Install or start Docker, until docker version names a server.\n"
    )


def test_no_image(programs: Programs) -> None:
    programs.forget("image")
    told = f"ERROR: image {IMAGE}: it is not here. Type make image, make image CUDA=12 or make image-cpu.\n"
    assert refused(programs, "train") == told


def test_nothing_to_train(programs: Programs, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert refused(programs, "train", ML=str(absent)) == (
        f"ERROR: {absent}/input: it is not there and ARGS is empty, so there is nothing to train."
        " Make it as README.md, \"Try it by hand\", shows, or type make run ARGS='--model_uri=s3://… --dataset_uri=s3://…'.\n"
    )
    assert not absent.exists()


@pytest.mark.parametrize("word", ["train", "bash"])
def test_no_gpu(programs: Programs, word: str) -> None:
    programs.forget("gpu")
    assert refused(programs, word) == (
        "ERROR: docker gives the container no GPU"
        " (docker: Error response from daemon: could not select device driver)."
        " Where there is an NVIDIA GPU, install its driver and the NVIDIA Container Toolkit,"
        " and restart Docker. Where there is none, type make image-cpu,"
        " and then make run VARIANT=cpu ARGS=--trainer=builtin.\n"
    )


def test_make_run_and_make_shell(programs: Programs, tmp_path: Path) -> None:
    del programs.environment["IMAGE"]
    folder = tmp_path / "my ml"
    variables = (f"ML={folder}", "RUN_FLAGS=--memory 8g", "CUDA=12")
    ended = programs.run("make", "run", *variables, "ARGS=--output_name='a b' --seed=1")
    assert ended.returncode == 0, ended.stderr
    words, image = programs.calls()[-1], f"sagemaker-kohya:{__version__}-cuda12"
    assert words[-5:] == ["8g", image, "train", "--output_name=a b", "--seed=1"]
    assert bound(folder, "/opt/ml") in words
    assert after(words, "--gpus") == ["all"]
    assert programs.run("make", "shell", *variables).returncode == 0
    assert programs.calls()[-1][-5:] == ["--entrypoint", "bash", "--memory", "8g", image]


def test_the_cpu_image_asks_for_no_gpu(programs: Programs) -> None:
    del programs.environment["IMAGE"]
    assert programs.run("make", "run", "VARIANT=cpu").returncode == 0
    words = programs.calls()[-1]
    assert words[-2:] == [f"sagemaker-kohya:{__version__}-cpu", "train"]
    assert "--gpus" not in words


def test_a_stop_of_make_reaches_docker(programs: Programs, tmp_path: Path) -> None:
    programs.know(slow="")
    del programs.environment["IMAGE"]
    command = ["make", "run", f"ML={tmp_path / 'ml'}", "VARIANT=cpu"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=programs.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("process")
    process.terminate()
    assert process.communicate(timeout=60)[0] == "stopped\n"
