"""`lora run`: the same job on this machine, in the image, on its GPUs.

What comes out lies in --out, which is the job's /opt/ml: the LoRA in its folder model. A job that was broken
off goes on from its states when the same is typed again. Of [sagemaker] only the image counts.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path, PurePosixPath

from entrypoint import console
from entrypoint.failures import Unfit
from kohya.problem import Problem
from lora_jobs.check import hyperparameters, look
from lora_jobs.errors import LoraError
from lora_jobs.job_file import CHANNELS, Draft, where
from lora_jobs.uploads import configuration

_SCRIPT = Path(__file__).with_name("docker-run")  # the one that make run calls
_MARK = ".lora-run"  # in the folder that becomes /opt/ml: its configuration is ours to replace
_ELSEWHERE = ("sagemaker", "output")  # what a job on this machine has no use for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job_file", type=Path, metavar="JOB.toml")
    parser.add_argument("--image", help="an image of this machine; the job file's unless set")
    parser.add_argument("--gpus", default="all", help="for docker run --gpus: all, device=1; none: no GPU")
    parser.add_argument("--out", type=Path, help="the job's /opt/ml; NAME-ml unless set")
    parser.add_argument("--dry-run", action="store_true", help="print the command line, and run nothing")


def run(arguments: argparse.Namespace) -> int:
    draft = _of_this_machine(Draft.read(arguments.job_file))
    image = arguments.image or _image(draft)
    with redirect_stdout(sys.stderr):
        problems = [*look(draft).problems]
    if not image:
        wrong, fix = "no image is named", "Type --image NAME: docker images shows those of this machine"
        problems.append(Problem(where(draft.file, "sagemaker.image"), wrong, fix))
    if problems:
        raise Unfit(problems)
    out = arguments.out or Path(f"{draft.values['name']}-ml")
    _check_apart(draft, out)
    script, words = ["bash", str(_SCRIPT)], ["train", *_flags(draft)]
    told = {"IMAGE": image, "ML": str(out), "GPUS": "" if arguments.gpus == "none" else arguments.gpus}
    if arguments.dry_run:
        print(shlex.join(["env", *(f"{name}={value}" for name, value in told.items()), *script, *words]))
        return 0
    environment = {**os.environ, **told}
    if code := subprocess.run([*script, "--check", *words], env=environment, check=False).returncode:
        return code
    _set_up(draft, out)
    console.say(f"{draft.values['name']}: runs in {image}; what comes out lies in {out}")
    # In its place: signals reach the job, and its exit code is ours.
    return os.execvpe(script[0], [*script, "--checked", *words], environment)


def _of_this_machine(draft: Draft) -> Draft:
    """Without the problems of what a job here has no use for."""
    return replace(
        draft,
        problems=tuple(one for one in draft.problems if one[0].partition(".")[0] not in _ELSEWHERE),
        values={**draft.values, "sagemaker": {"image": _image(draft)}},
    )


def _image(draft: Draft) -> str:
    """The job file's image; "" where a placeholder, or nothing, stands for it."""
    unfit = {key for key, _ in draft.problems}
    table = draft.values.get("sagemaker")
    usable = isinstance(table, dict) and "sagemaker.image" not in unfit
    return str(table.get("image", "")) if usable and isinstance(table, dict) else ""


def _flags(draft: Draft) -> list[str]:
    """The job's flags. A configuration that lies here is a channel, for what lies beside it comes along."""
    asked = hyperparameters(draft)
    if "://" not in asked.get("config_uri", ""):
        asked.pop("config_uri", None)
    return [f"--{name}={value}" for name, value in asked.items()]


def _check_apart(draft: Draft, out: Path) -> None:
    """Raise LoraError where what comes out would lie among the inputs."""
    for key in CHANNELS:
        given = str(draft.values.get(key, ""))
        if not given or "://" in given:
            continue
        path, whole = Path(given).resolve(), out.resolve()
        if path.is_dir() and (whole.is_relative_to(path) or path.is_relative_to(whole)):
            raise LoraError(Problem(str(out), f"it would mix with {key}, {given}", "Type --out FOLDER"))


def _set_up(draft: Draft, out: Path) -> None:
    """The folder that becomes /opt/ml, with the configuration in it as SageMaker would mount it."""
    channel, mark = out / "input" / "data" / "config", out / _MARK
    if channel.exists() and not mark.exists():
        fix = "Type --out with another folder, or move it away"
        raise LoraError(Problem(str(channel), "it is there, and not from lora run", fix))
    shutil.rmtree(channel, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()
    given = str(draft.values.get("config", ""))
    if given and "://" not in given:
        for name, file in configuration(Path(given), draft.values.get("training", {})).items():
            target = channel / PurePosixPath(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
