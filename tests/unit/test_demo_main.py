"""The demo as a command: what it refuses, and that it leaves nothing running."""

import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from demo import __main__ as demo
from demo import base_model
from demo.proof import Proof
from kohya import tokenizers


@pytest.fixture(scope="module", autouse=True)
def _tokenizers(tmp_path_factory: pytest.TempPathFactory) -> None:
    if not (tokenizers.folder() / tokenizers.CLIP_L / tokenizers.FILES[0]).is_file():
        tokenizers.build(tokenizers.folder())


def _refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        demo.main(arguments)
    assert left.value.code == 2
    return capsys.readouterr().err


def test_a_missing_model_or_data_set_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, name in (("--model", "absent.safetensors"), ("--dataset", "absent")):
        told = _refusal([flag, str(tmp_path / name), "--out", str(tmp_path / "out")], capsys)
        assert f"{flag}: {tmp_path / name} is no " in told
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_base_model_of_that_kind_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"lora_unet_x.alpha": np.ones(1, np.float32)}, tmp_path / "lora.safetensors")
    told = _refusal(["--model", str(tmp_path / "lora.safetensors")], capsys)
    assert "lora.safetensors: it is a LoRA" in told
    base_model.write(tmp_path / "base.safetensors", "sd15")
    told = _refusal(["--kind", "sdxl", "--model", str(tmp_path / "base.safetensors")], capsys)
    assert "base.safetensors is of kind sd15; type --kind sd15" in told


def test_a_folder_with_somebody_s_files_is_not_emptied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert f"{tmp_path} holds files that the demo did not make" in _refusal(["--out", str(tmp_path)], capsys)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("with_lora", "modules", "why"),
    [(0.96, 264, "more than 5%: 1.000 → 0.960"), (math.nan, 264, "more than 5%"), (0.5, 192, "192 modules")],
)
def test_a_lora_that_does_too_little_fails_the_demo(with_lora: float, modules: int, why: str) -> None:
    demo.judge(Proof(1.0, 0.94, 264), 0.05, 264)
    with pytest.raises(demo.Failed, match=why):
        demo.judge(Proof(1.0, with_lora, modules), 0.05, 264)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_leaves_nothing_running_when_it_is_stopped(number: int, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "demo", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith("$ python -m entrypoint train"):
                break
        else:
            pytest.fail("it ended before the job")
        children = psutil.Process(running.pid).children(recursive=True)
        assert children  # the S3 server, and by now or soon the job
        running.send_signal(number)
        running.communicate(timeout=100)
    assert running.returncode == code
    base = str(tmp_path)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not [process for process in psutil.process_iter() if base in _environment(process)]


def test_a_signal_that_comes_while_the_job_is_started_waits_until_it_can_be_ended() -> None:
    started = False
    with pytest.raises(KeyboardInterrupt), demo._signals_held():
        signal.raise_signal(signal.SIGINT)
        started = True
    assert started


def _environment(process: psutil.Process) -> str:
    try:
        return str(process.environ().get("SAGEMAKER_BASE_DIR", ""))
    except psutil.Error:
        return ""
