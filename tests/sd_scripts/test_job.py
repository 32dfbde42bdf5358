"""The job with the real sd-scripts, unmodified, on narrow base models. `make test-sd-scripts` runs these."""

import json
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest

from entrypoint.gpu import find_gpu
from kohya import config, sd_scripts
from kohya.config import KINDS, Kind
from tests.contract.test_job import assert_completed, assert_lora
from tests.harness import NARROW, TINY, Job, write_compat


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


def test_an_older_driver_is_met_with_nvidias_libraries(
    narrow: Job, base_models: dict[Kind, Path], tmp_path: Path
) -> None:
    compat = write_compat(tmp_path / "compat", "580.65.06")
    narrow.pretend("NVIDIA A10G, 8.6, 550.90.07")
    narrow.environment["CUDA_COMPAT_DIR"] = str(compat)
    narrow.mount("model", base_models["sd15"])
    result = narrow.run()
    assert result.code == 0, result.out + result.err
    assert f"torch finds libraries in {compat}" in result.out


def test_facts_are_those_of_the_pinned_scripts(tmp_path: Path) -> None:
    """What `make options` writes: names, types, defaults, choices; key names and shapes."""
    found, root = sd_scripts.find(), Path(__file__).parents[2]
    python = partial(subprocess.run, cwd=root, capture_output=True, text=True, check=True)
    told = python([found.python, "-m", "kohya.options", found.folder]).stdout
    assert told == Path(config.__file__).with_name("options.json").read_text()
    python([found.python, "-m", "tests.shapes", found.folder, tmp_path])
    written = sorted(tmp_path.iterdir())
    assert len(written) == 8
    for file in written:
        assert file.read_text() == (root / "tests" / "data" / file.name).read_text(), file.name


READ_PRESETS = """
import argparse, importlib, json, sys
folder, script, *files = sys.argv[1:]
sys.path.insert(0, folder)
from library import train_util
parser = importlib.import_module(script.removesuffix(".py")).setup_parser()
found = []
for file in files:
    sys.argv = [script, f"--config_file={file}"]
    from_file = vars(train_util.read_config_from_file(parser.parse_args(), parser))
    typed = []
    for name, value in json.loads(open(file + ".json").read()).items():
        if value is not False:
            values = value if isinstance(value, list) else [] if value is True else [value]
            typed += ["--" + name, *map(str, values)]
    found.append([from_file, vars(parser.parse_args(typed))])
print(json.dumps(found))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_the_pinned_parsers_read_every_preset_as_it_is_meant(kind: Kind, tmp_path: Path) -> None:
    """Each kind alone and with each GPU: as a file, which sd-scripts does not check, and as typed flags."""
    found = sd_scripts.find()
    gpus = sorted((Path(config.__file__).parents[1] / "configs" / "gpu").glob("*.toml"))
    assert len(gpus) == 6
    meant, files = [], []
    for gpu in (None, *gpus):
        values = config.merge(
            kind, [config.preset(kind), config.preset(f"gpu/{gpu.stem}") if gpu else ()]
        ).values
        file = tmp_path / f"{gpu.stem if gpu else kind}.toml"
        file.write_text(config.dump(values))
        file.with_name(f"{file.name}.json").write_text(json.dumps(values))
        meant.append(values)
        files.append(str(file))
    told = subprocess.run(
        [found.python, "-c", READ_PRESETS, str(found.folder), sd_scripts.SCRIPTS[kind], *files],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for values, namespaces in zip(meant, json.loads(told.splitlines()[-1]), strict=True):
        for read in namespaces:
            for name, value in values.items():
                assert read[name] == value, name
                assert type(read[name]) is type(value), name


def test_the_preset_trains_in_bf16_without_a_gpu(ready: Job, base_models: dict[Kind, Path]) -> None:
    """With clip_skip = 1, which asks for nothing else, sd-scripts would fail at the first step."""
    ready.mount("model", base_models["sd15"])
    result = ready.run("--mixed_precision=bf16", "--max_train_epochs=1")
    assert result.code == 0, result.out + result.err


def test_cached_text_trains_on_top_of_the_preset(ready: Job, base_models: dict[Kind, Path]) -> None:
    """sd-scripts asserts that captions are not shuffled, which the preset asks for."""
    ready.mount("model", base_models["sdxl"])
    result = ready.run("--cache_text_encoder_outputs", "--max_train_epochs=1")
    assert result.code == 0, result.out + result.err
    assert "shuffle_caption = true becomes false" in result.out


def test_persistent_workers_without_workers(ready: Job, base_models: dict[Kind, Path]) -> None:
    """torch refuses them after the model is loaded; this machine's /dev/shm may be why there are none."""
    ready.mount("model", base_models["sd15"])
    flags = ("--persistent_data_loader_workers", "--max_data_loader_n_workers=0", "--max_train_epochs=1")
    result = ready.run(*flags)
    assert result.code == 0, result.out + result.err
    assert "persistent_data_loader_workers = true becomes false: max_data_loader_n_workers is 0" in result.out
