"""The job with the real sd-scripts, broken off: by SIGTERM, by a kill, on one device and on several."""

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest

from entrypoint.checkpoint import verify_lora
from kohya.networks import expected
from tests.harness import NARROW, TINY, Job, Result

PROCESSES = Path(__file__).parent / "processes"
STEPS = 24


@pytest.fixture
def ready(ready: Job) -> Job:
    """With the real sd-scripts, six epochs of four steps."""
    ready.environment["PYTHONPATH"] = str(NARROW)
    asked = {"trainer": "sd-scripts", "max_train_epochs": "6", "max_data_loader_n_workers": "2"}
    ready.configure("hyperparameters", {**TINY, **asked})
    return ready


@pytest.fixture
def two_devices(ready: Job) -> Job:
    """The same on a machine whose driver tells of two GPUs; two steps an epoch."""
    ready.environment["PYTHONPATH"] = str(PROCESSES)
    ready.pretend("NVIDIA A10G, 8.6, 580.65.06", "NVIDIA A10G, 8.6, 580.65.06")
    return ready


def processes(job: Job) -> str:
    """What of the job still runs."""
    return subprocess.run(
        ["pgrep", "-af", str(job.scratch)], capture_output=True, text=True, check=False
    ).stdout


def stop(job: Job, epoch: int, *flags: str) -> int:
    """Run until an epoch's LoRA is saved and stop then; the step after which it stopped."""
    result = job.run_until(f"shape-{epoch:06d}.safetensors", signal.SIGTERM, *flags)
    assert result.code == 143, result.out + result.err
    assert processes(job) == ""
    assert job.failure is None
    found = re.search(r"stopped after step (\d+)", result.out)
    assert found is not None, result.out
    return int(found[1])


def kill(job: Job, pattern: str, after: str) -> Result:
    """Run, kill with SIGKILL the oldest process that fits when a line holds `after`; how the job ended."""
    oldest = ["pkill", "-KILL", "-o", "-f", f"{pattern}.*{job.scratch}"]
    return job.run_and(after, lambda _: subprocess.run(oldest, check=True), "--state_every_minutes=0.001")


def test_two_stops_cost_no_step(ready: Job) -> None:
    first = stop(ready, 1)
    assert ready.steps == [*range(1, first + 1)]
    second = stop(ready, 3)
    assert ready.steps == [*range(1, second + 1)]
    result = ready.run()
    assert result.code == 0, result.out + result.err
    assert ready.steps == [*range(1, STEPS + 1)]
    assert f"step={STEPS}/{STEPS} epoch=6/6" in result.out
    names = {path.name for path in ready.model.glob("*.safetensors")}
    assert names == {"shape.safetensors", *(f"shape-{epoch:06d}.safetensors" for epoch in range(1, 6))}


def test_a_killed_trainer_leaves_the_newest_state_with_its_lora(ready: Job) -> None:
    result = kill(ready, "kohya.launch", "the state after step 5")
    assert result.code == 1
    assert ready.failure is not None
    assert ready.failure.startswith("The trainer was killed")
    assert processes(ready) == ""
    folder = ready.newest_state
    step = json.loads((folder / "state.json").read_text())["step"]
    lora = verify_lora(folder / "shape.safetensors", expected("sd15", {"network_module": "networks.lora"}))
    assert lora.rank == 4
    assert not (ready.model / "shape.safetensors").exists()
    result = ready.run()
    assert result.code == 0, result.out + result.err
    assert f"fetch: going on after step {step} from {folder}" in result.out
    assert ready.steps == [*range(1, STEPS + 1)]


def test_several_devices_stop_together_and_go_on(two_devices: Job) -> None:
    """Each writes its own random numbers into the state, and only the first one anything else."""
    precision = "--mixed_precision=no"  # gloo's processes on a CPU do not mix
    first = stop(two_devices, 1, precision)
    names = {path.name for path in two_devices.newest_state.iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl", "model.safetensors"} <= names
    assert two_devices.steps == [*range(1, first + 1)]
    result = two_devices.run(precision)
    assert result.code == 0, result.out + result.err
    assert two_devices.steps == [*range(1, 13)]
    assert processes(two_devices) == ""


def test_a_killed_launcher_leaves_no_process(two_devices: Job) -> None:
    two_devices.configure(
        "hyperparameters",
        {**TINY, "trainer": "sd-scripts", "mixed_precision": "no", "max_train_epochs": "60"},
    )
    result = kill(two_devices, "accelerate.commands.launch", "step=1/")
    assert result.code == 1
    assert processes(two_devices) == ""
