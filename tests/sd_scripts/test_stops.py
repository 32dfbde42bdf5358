"""The job with the real sd-scripts, broken off: by SIGTERM, by a kill, on one device and on several."""

import json
import re
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from entrypoint.checkpoint import verify_lora
from kohya.config import Kind
from kohya.networks import expected
from tests.harness import NARROW, TINY, Job, Result

PROCESSES = Path(__file__).parent / "processes"
STEPS = 24


@pytest.fixture
def ready(job: Job, pictures: Path, base_models: dict[Kind, Path]) -> Job:
    """A job by channels for SD1.5, of six epochs of four steps."""
    job.environment["PYTHONPATH"] = str(NARROW)
    job.mount("dataset", pictures)
    job.mount("model", base_models["sd15"])
    asked = {"trainer": "sd-scripts", "max_train_epochs": "6", "max_data_loader_n_workers": "2"}
    job.configure("hyperparameters", {**TINY, **asked})
    return job


@pytest.fixture
def two_devices(ready: Job) -> Job:
    """The same on a machine whose driver tells of two GPUs; two steps an epoch."""
    ready.environment["PYTHONPATH"] = str(PROCESSES)
    ready.pretend("NVIDIA A10G, 8.6, 580.65.06", "NVIDIA A10G, 8.6, 580.65.06")
    return ready


def state(job: Job) -> Path:
    """The newest of the states that the job has kept."""
    manifests = (job.tree / "checkpoints").glob("*/state.json")
    return max(manifests, key=lambda path: int(json.loads(path.read_text())["step"])).parent


def logged(job: Job) -> list[int]:
    """The steps in the one event log."""
    (log,) = job.events
    events = EventAccumulator(str(log))
    events.Reload()
    return [event.step for event in events.Scalars("loss/current")]


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
    process = job.start("--state_every_minutes=0.001")
    assert process.stdout is not None
    killer = threading.Timer(200, process.kill)
    killer.start()
    seen = []
    for line in process.stdout:
        seen.append(line)
        if after in line:
            subprocess.run(["pkill", "-KILL", "-o", "-f", f"{pattern}.*{job.scratch}"], check=True)
            break
    out, err = process.communicate()
    killer.cancel()
    return Result(process.returncode, "".join(seen) + out, err)


def test_two_stops_cost_no_step(ready: Job) -> None:
    first = stop(ready, 1)
    assert logged(ready) == [*range(1, first + 1)]
    second = stop(ready, 3)
    assert logged(ready) == [*range(1, second + 1)]
    result = ready.run()
    assert result.code == 0, result.out + result.err
    assert logged(ready) == [*range(1, STEPS + 1)]
    assert f"step={STEPS}/{STEPS} epoch=6/6" in result.out
    names = {path.name for path in ready.model.glob("*.safetensors")}
    assert names == {"shape.safetensors", *(f"shape-{epoch:06d}.safetensors" for epoch in range(1, 6))}


def test_a_killed_trainer_leaves_the_newest_state_with_its_lora(ready: Job) -> None:
    result = kill(ready, "kohya.launch", "the state after step 5")
    assert result.code == 1
    assert ready.failure is not None
    assert ready.failure.startswith("The trainer was killed")
    assert processes(ready) == ""
    folder = state(ready)
    step = json.loads((folder / "state.json").read_text())["step"]
    lora = verify_lora(folder / "shape.safetensors", expected("sd15", {"network_module": "networks.lora"}))
    assert lora.rank == 4
    assert not (ready.model / "shape.safetensors").exists()
    result = ready.run()
    assert result.code == 0, result.out + result.err
    assert f"fetch: going on after step {step} from {folder}" in result.out
    assert logged(ready) == [*range(1, STEPS + 1)]


def test_several_devices_stop_together_and_go_on(two_devices: Job) -> None:
    """Each writes its own random numbers into the state, and only the first one anything else."""
    precision = "--mixed_precision=no"  # gloo's processes on a CPU do not mix
    first = stop(two_devices, 1, precision)
    names = {path.name for path in state(two_devices).iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl", "model.safetensors"} <= names
    assert logged(two_devices) == [*range(1, first + 1)]
    result = two_devices.run(precision)
    assert result.code == 0, result.out + result.err
    assert logged(two_devices) == [*range(1, 13)]
    assert processes(two_devices) == ""


def test_a_killed_launcher_leaves_no_process(two_devices: Job) -> None:
    two_devices.configure(
        "hyperparameters",
        {**TINY, "trainer": "sd-scripts", "mixed_precision": "no", "max_train_epochs": "60"},
    )
    result = kill(two_devices, "accelerate.commands.launch", "step=1/")
    assert result.code == 1
    assert processes(two_devices) == ""
