"""The job with the real sd-scripts, unmodified, on narrow base models. `make test-sd-scripts` runs these."""

import signal
import subprocess
from pathlib import Path

import pytest

from entrypoint.check import find_gpu
from kohya import config, sd_scripts
from kohya.config import KINDS, Kind
from tests.contract.test_job import assert_completed, assert_lora
from tests.harness import TINY, Job

NARROW = Path(__file__).parents[2] / "demo" / "narrow"


@pytest.fixture
def ready(job: Job, pictures: Path) -> Job:
    """A job by channels that lacks its base model."""
    job.environment["PYTHONPATH"] = str(NARROW)
    job.mount("dataset", pictures)
    job.configure("hyperparameters", {**TINY, "trainer": "sd-scripts"})
    return job


@pytest.mark.parametrize("kind", KINDS)
def test_both_kinds_train_without_a_network(ready: Job, kind: Kind, base_models: dict[Kind, Path]) -> None:
    ready.mount("model", base_models[kind])
    ready.prefix = ("unshare", "--net")
    result = ready.run()
    assert_completed(result, ready, kind)
    assert ready.record["trainer"] == "sd-scripts"
    assert ready.record["versions"]["sd-scripts"].startswith("v0.10.1")
    assert ready.record["versions"]["diffusers"] == "0.32.1"


def test_a_stop_saves_a_state_and_publishes(ready: Job, base_models: dict[Kind, Path]) -> None:
    ready.mount("model", base_models["sd15"])
    result = ready.run_until("epoch=2/300", signal.SIGTERM, "--max_train_epochs=300")
    assert result.code == 143, result.out + result.err
    assert ready.failure is None
    assert "stopped after step" in result.out
    assert_lora(ready.model / "shape-000001.safetensors", "sd15")
    assert len(ready.events) == 1
    left = subprocess.run(["pgrep", "-f", str(ready.scratch)], capture_output=True, text=True, check=False)
    assert left.stdout == ""


def test_a_training_that_diverges_is_ended(ready: Job, base_models: dict[Kind, Path]) -> None:
    ready.mount("model", base_models["sd15"])
    result = ready.run("--unet_lr=1e10", "--text_encoder_lr=1e10", "--max_train_epochs=300")
    assert result.code == 1
    assert ready.failure is not None
    assert ready.failure.startswith("The loss was not a number for 10 steps in a row")
    assert "shape.safetensors" not in {path.name for path in ready.model.iterdir()}


def test_xformers_that_cannot_run_becomes_sdpa(ready: Job, base_models: dict[Kind, Path]) -> None:
    if find_gpu() and not sd_scripts.find().lacks(["xformers"]):
        pytest.skip("xformers runs here")
    ready.mount("model", base_models["sd15"])
    result = ready.run("--xformers=true", "--max_train_epochs=1")
    assert result.code == 0, result.out + result.err
    assert "flag --xformers: xformers = true becomes false: xformers " in result.out


def test_options_are_those_of_the_pinned_parsers() -> None:
    """kohya/options.json against the parsers themselves: names, types, defaults, choices."""
    found = sd_scripts.find()
    told = subprocess.run(
        [found.python, "-m", "kohya.options", str(found.folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert told == Path(config.__file__).with_name("options.json").read_text()
