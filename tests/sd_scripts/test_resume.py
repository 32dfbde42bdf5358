"""Going on from a state with the real sd-scripts: as if the run had never been broken off."""

import json
import math
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from safetensors.numpy import load_file as lora
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kohya import config, sd_scripts, tokenizers
from kohya.config import Kind, Setting
from tests.harness import NARROW, TINY

BATCHES = 4  # of an epoch


@dataclass(frozen=True)
class Run:
    """A run of the trainer that has ended."""

    code: int
    out: str
    output: Path
    losses: list[tuple[int, float]]  # of each batch, with its step, from the event log


def train(folder: Path, model: Path, pictures: Path, **options: object) -> Run:
    """Run sd-scripts in its launcher, with all that is random repeatable."""
    fixed = {"shuffle_caption": False, "max_data_loader_n_workers": 0, "mixed_precision": "no"}
    asked = {**TINY, **fixed, **options}
    del asked["trainer"]
    layer = [Setting(name, value, "the test", as_text=True) for name, value in asked.items()]
    merged = config.merge("sd15", [config.preset("sd15"), layer])
    assert not merged.problems
    owned = {
        "pretrained_model_name_or_path": str(model),
        "train_data_dir": str(pictures),
        "output_dir": str(folder / "output"),
        "logging_dir": str(folder / "logs"),
        "tokenizer_cache_dir": str(tokenizers.folder()),
        "console_log_simple": True,
        "skip_until_initial_step": "resume" in options,
    }
    folder.mkdir()
    toml = folder / "config.toml"
    toml.write_text(config.dump({**merged.values, **owned}))
    found = sd_scripts.find()
    environment = {**os.environ, **found.environment(), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(NARROW), environment["PYTHONPATH"]])
    told = subprocess.run(
        found.command("sd15", toml), env=environment, capture_output=True, text=True, check=False
    )
    losses = []
    for log in (folder / "logs").rglob("events.*"):
        events = EventAccumulator(str(log))
        events.Reload()
        if "loss/current" in events.Tags()["scalars"]:
            losses += [(event.step, event.value) for event in events.Scalars("loss/current")]
    return Run(told.returncode, told.stdout + told.stderr, folder / "output", losses)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, base_models: dict[Kind, Path], pictures: Path
) -> Callable[[int], Run]:
    """Three epochs of four batches without a break, a state after each step, by gradient accumulation."""

    @cache
    def made(accumulation: int) -> Run:
        folder = tmp_path_factory.mktemp("whole") / "run"
        options = {"gradient_accumulation_steps": accumulation, "save_every_n_steps": 1, "save_state": True}
        run = train(folder, base_models["sd15"], pictures, max_train_epochs=3, **options)
        assert run.code == 0, run.out
        return run

    return made


@pytest.mark.parametrize(
    ("accumulation", "at"), [(1, 1), (1, 3), (1, 4), (1, 7), (1, 12), (3, 1), (3, 2), (3, 3), (3, 6)]
)
def test_a_run_goes_on_where_it_was(
    whole: Callable[[int], Run],
    accumulation: int,
    at: int,
    tmp_path: Path,
    base_models: dict[Kind, Path],
    pictures: Path,
) -> None:
    """After the first step, in an epoch, at its end, and after the last step of all: number by number."""
    before = whole(accumulation)
    run = train(
        tmp_path / "run",
        base_models["sd15"],
        pictures,
        max_train_epochs=3,
        gradient_accumulation_steps=accumulation,
        resume=str(before.output / f"shape-step{at:08d}-state"),
        save_state=True,
    )
    assert run.code == 0, run.out
    for number in (1, 2):
        if (file := run.output / f"shape-{number:06d}-state" / "train_state.json").exists():
            per_epoch = math.ceil(BATCHES / accumulation)
            assert json.loads(file.read_text())["current_step"] == number * per_epoch
    epoch, steps = divmod(at - 1, math.ceil(BATCHES / accumulation))
    made = BATCHES * epoch + min(BATCHES, accumulation * (steps + 1))
    assert run.losses == before.losses[made:]
    assert {file.name for file in run.output.glob("*.safetensors")} == {
        "shape.safetensors",
        *(f"shape-{number:06d}.safetensors" for number in (1, 2) if number > epoch),
    }
    for file in run.output.glob("*.safetensors"):
        for key, value in lora(before.output / file.name).items():
            assert (value == lora(file)[key]).all(), (file.name, key)


def test_a_state_beyond_the_run_is_told(
    whole: Callable[[int], Run], tmp_path: Path, base_models: dict[Kind, Path], pictures: Path
) -> None:
    state = whole(1).output / "shape-step00000007-state"
    run = train(tmp_path / "run", base_models["sd15"], pictures, max_train_epochs=1, resume=str(state))
    assert run.code == 1
    assert "The state is at step 7, and this run has 4 steps only" in run.out
