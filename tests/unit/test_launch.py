import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w
from safetensors import safe_open

from kohya import metrics, states

LOOP = Path(__file__).with_name("loop.py")


def run(folder: Path, **options: Any) -> tuple[int, list[metrics.Record]]:
    """Run the loop in the launcher; its exit code, and the records that it wrote."""
    folder.mkdir(exist_ok=True)
    asked = {"output_dir": str(folder), "output_name": "cat", "gradient_accumulation_steps": 1, "stop_in": 0}
    toml = folder / "config.toml"
    toml.write_text(tomli_w.dumps({**asked, **options}))
    reader, writer = os.pipe()
    environment = {**os.environ, metrics.VARIABLE: f"/proc/{os.getpid()}/fd/{writer}"}
    command = [sys.executable, "-m", "kohya.launch", str(LOOP), f"--config_file={toml}"]
    ended = subprocess.run(command, env=environment, check=False)
    os.close(writer)
    with os.fdopen(reader) as stream:
        return ended.returncode, list(metrics.read(stream))


def seen(*folders: Path) -> list[str]:
    return list(chain(*((folder / "seen").read_text().splitlines() for folder in folders)))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_two_breaks_change_nothing(accumulation: int, tmp_path: Path) -> None:
    """A stop in an epoch, and one at its end: every picture and every random number as without them."""
    stops = {1: (3, 7), 3: (2, 3)}[accumulation]
    whole, *parts = (tmp_path / name for name in "abcd")
    assert run(whole, gradient_accumulation_steps=accumulation)[0] == 0
    resume: dict[str, str] = {}
    before = 0
    for part, stop in zip(parts, (*stops, 0), strict=True):
        code, records = run(part, gradient_accumulation_steps=accumulation, stop_in=stop, **resume)
        assert code == (143 if stop else 0)
        start, *steps = records
        assert isinstance(start, metrics.Start)
        assert start.step == before
        assert [one.step for one in steps] == list(range(before + 1, (stop or start.steps) + 1))
        if stop:
            state = part / f"cat-step{stop:08d}-state"
            assert json.loads((state / "train_state.json").read_text())["current_step"] == stop
            resume, before = {"resume": str(state)}, stop
    assert seen(*parts) == seen(whole)
    assert (parts[-1] / "end").read_text() == (whole / "end").read_text()


def test_records_follow_optimizer_steps_not_batches(tmp_path: Path) -> None:
    _, (start, *steps) = run(tmp_path, gradient_accumulation_steps=3)
    assert isinstance(start, metrics.Start)
    assert (start.steps, start.epochs, start.images_per_step, start.step) == (9, 3, 3, 0)
    assert [(one.step, one.epoch) for one in steps if isinstance(one, metrics.Step)] == [
        (number, 1 + (number - 1) // 3) for number in range(1, 10)
    ]
    losses = [float(line.split()[1]) for line in seen(tmp_path)]
    assert isinstance(steps[0], metrics.Step)
    assert steps[0].loss == pytest.approx(sum(losses[:3]) / 3)


def test_a_state_holds_the_lora_so_far(tmp_path: Path) -> None:
    run(tmp_path, stop_in=4, save_precision="fp16", network_module="networks.lora", network_args=["a=1"])
    assert not list(tmp_path.glob("*.safetensors"))
    with safe_open(tmp_path / "cat-step00000004-state" / "cat.safetensors", "np") as lora:
        assert lora.get_tensor("weight").dtype == "float16"
        told = lora.metadata()
    assert (told["ss_steps"], told["ss_epoch"], told["ss_network_args"]) == ("4", "1", '{"a": "1"}')


def test_a_timer_keeps_the_newest_state_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(states.VARIABLE, "1e-9")
    assert run(tmp_path)[0] == 0
    assert [path.name for path in tmp_path.glob("*-state")] == ["cat-step00000020-state"]


def test_a_finished_run_has_nothing_left_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(states.VARIABLE, "1e-9")
    run(tmp_path / "a", stop_in=20)
    state = tmp_path / "a" / "cat-step00000020-state"
    (state / "train_state.json").write_text('{"current_step": 21}')
    assert run(tmp_path / "b", resume=str(state))[0] == 0
    assert (tmp_path / "b" / "end").exists()
    assert not (tmp_path / "b" / "seen").exists()
    (state / "train_state.json").write_text('{"current_step": 22}')
    assert run(tmp_path / "c", resume=str(state))[0] == 1


def test_a_stop_before_the_first_step_ends_at_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGTERM); open('late', 'w')")
    (tmp_path / "config.toml").write_text("")
    command = [sys.executable, "-m", "kohya.launch", str(script), f"--config_file={tmp_path / 'config.toml'}"]
    assert subprocess.run(command, check=False).returncode == 143
    assert not Path("late").exists()


def test_the_trainer_stops_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import time; open({str(tmp_path / 'ready')!r}, 'w').close(); time.sleep(600)")
    (tmp_path / "config.toml").write_text("")
    command = [sys.executable, "-m", "kohya.launch", str(script), f"--config_file={tmp_path / 'config.toml'}"]
    code = f"import subprocess; p = subprocess.Popen({command!r}); print(p.pid, flush=True); p.wait()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    wait_until((tmp_path / "ready").exists)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie")


def wait_until(happened: Callable[[], bool]) -> None:
    """Wait for what happens in seconds, and in minutes on a busy machine."""
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)
