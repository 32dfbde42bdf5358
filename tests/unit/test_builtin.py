"""kohya.builtin held to sd-scripts v0.10.1, number by number, and to itself when it stops and resumes.

tests/data/sd_scripts_run_*.json were recorded from the unmodified scripts on the base model and the data set
that are made here again; tests/data/sd_scripts_pictures.json from its buckets and its resizing.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from demo import base_model
from kohya import metrics, tokenizers
from kohya.builtin import __main__ as command_line
from kohya.builtin import dataset, model, options, state, train
from kohya.builtin.lora import targets
from kohya.config import KINDS, Kind

DATA = Path(__file__).parent.parent / "data"
# What may differ on another processor or torch: the order in which floats are summed.
LOSS, NORM = 1e-5, 1e-3

FOLDERS = {"2_ohwx cat": [(200, 200), (300, 180), (128, 128)], "1_dog": [(150, 330), (100, 90), (256, 256)]}


def write_pictures(root: Path) -> Path:
    """Six smooth pictures with noise, four captions, two repeats of three: the recorded runs' data set."""
    rng = np.random.default_rng(7)
    for folder, sizes in FOLDERS.items():
        (root / folder).mkdir(parents=True)
        for number, (width, height) in enumerate(sizes):
            grid = rng.random((5, 5, 3))
            x, y = np.linspace(0, 4, width), np.linspace(0, 4, height)
            wide = np.stack(
                [[np.interp(x, range(5), row) for row in grid[:, :, c]] for c in range(3)], axis=2
            )
            high = [[np.interp(y, range(5), wide[:, x, c]) for x in range(width)] for c in range(3)]
            image = np.array(high).transpose(2, 1, 0)
            image = np.clip(image + rng.normal(0, 0.05, image.shape), 0, 1)
            Image.fromarray((image * 255).astype(np.uint8)).save(root / folder / f"{number}.png")
            if number != 2:
                caption = f"{folder[2:]}, Tag a{number}, blue sky, on grass, photo of {width}\n"
                (root / folder / f"{number}.txt").write_text(caption)
    return root


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The options that name a place: base models of both kinds, data set, tokenizers."""
    root = tmp_path_factory.mktemp("builtin")
    tokenizers.build(root / "tokenizers")
    for kind in KINDS:
        base_model.write(root / f"{kind}.safetensors", kind)
    write_pictures(root / "data")
    return {
        "root": str(root),
        "train_data_dir": str(root / "data"),
        "tokenizer_cache_dir": str(root / "tokenizers"),
    }


@cache
def recorded(kind: Kind) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DATA / f"sd_scripts_run_{kind}.json").read_text())
    return content


def configuration(
    inputs: Mapping[str, str], kind: Kind, output: Path, run: str, **changes: Any
) -> dict[str, Any]:
    places = {
        "pretrained_model_name_or_path": f"{inputs['root']}/{kind}.safetensors",
        "train_data_dir": inputs["train_data_dir"],
        "tokenizer_cache_dir": inputs["tokenizer_cache_dir"],
        "output_dir": str(output),
        "logging_dir": str(output / "logs"),
    }
    return {**recorded(kind)["runs"][run]["config"], **places, **changes}


def run(config: Mapping[str, Any], kind: Kind, stop: train.Stop | None = None) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(
        train.train(kind, options.read(config, kind), stop or train.Stop())
    )
    return tensors


def events(output: Path) -> dict[str, list[list[float]]]:
    """Every tag's points, of all event files below `output`, in the order of the files."""
    points: dict[str, list[list[float]]] = {}
    for file in sorted(output.glob("logs/*/network_train/events*"), key=lambda path: path.stat().st_mtime_ns):
        accumulator = EventAccumulator(str(file), size_guidance={"scalars": 0})
        accumulator.Reload()
        for tag in accumulator.Tags()["scalars"]:
            points.setdefault(tag, []).extend([s.step, s.value] for s in accumulator.Scalars(tag))
    return points


@pytest.mark.parametrize("name", ["full", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_sd_scripts_own(kind: Kind, name: str, inputs: Mapping[str, str], tmp_path: Path) -> None:
    """full: buckets, repeats, shuffled captions, keep_tokens, clip_skip (SD1.5), long captions, noise_offset,
    min_snr_gamma, cosine with warm-up, accumulation, both parts. plain: U-Net only, nothing cached."""
    expected = recorded(kind)["runs"][name]
    base = Path(inputs["root"], f"{kind}.safetensors").read_bytes()
    assert hashlib.sha256(base).hexdigest() == recorded(kind)["base_model_sha256"], (
        "demo.base_model has changed"
    )

    tensors = run(configuration(inputs, kind, tmp_path, name), kind)

    logged = events(tmp_path)
    assert sorted(logged) == sorted(expected["events"])
    for tag, points in expected["events"].items():
        assert [x for x, _ in logged[tag]] == [x for x, _ in points], tag
        assert [y for _, y in logged[tag]] == pytest.approx([y for _, y in points], rel=LOSS, abs=1e-12), tag
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == expected["files"]
    assert sorted({str(tensor.dtype) for tensor in tensors.values()}) == expected["dtypes"]
    wanted = {**expected["norms"], **expected["down_norm"]}
    assert {key for key in tensors if key.endswith("lora_up.weight")} == set(expected["norms"])
    for key, norm in wanted.items():
        assert tensors[key].double().norm().item() == pytest.approx(norm, rel=NORM, abs=1e-6), key

    with safe_open(next(tmp_path.glob("x.safetensors")), "pt") as file:
        metadata = file.metadata()
    assert sorted(metadata) == sorted(expected["metadata"])
    same = {key: value for key, value in expected["metadata"].items() if value is not None}
    same["ss_sd_model_name"] = f"{kind}.safetensors"
    assert {key: metadata[key] for key in same} == same


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_those_of_the_full_size_model(kind: Kind, inputs: Mapping[str, str]) -> None:
    keys = json.loads((DATA / f"lora_{kind}.json").read_text())
    base = model.load_base_model(
        Path(inputs["root"], f"{kind}.safetensors"), kind, tokenizer_dir=Path(inputs["tokenizer_cache_dir"])
    )
    assert [name for name, _ in targets(base)] == list(dict.fromkeys(key.split(".")[0] for key in keys))


class StopAt(train.Stop):
    """Asks for a stop when the run looks whether it was asked after `step` looks."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def __getattribute__(self, name: str) -> Any:
        if name == "asked":
            object.__setattr__(self, "left", object.__getattribute__(self, "left") - 1)
            return object.__getattribute__(self, "left") <= 0
        return object.__getattribute__(self, name)


TINY = {"resolution": "64", "bucket_no_upscale": False}
SMALL = {"resolution": "64,64", "max_train_epochs": 2, "max_token_length": None, "save_precision": "float"}


@pytest.fixture(scope="session")
def uninterrupted(
    inputs: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, torch.Tensor]]:
    output = tmp_path_factory.mktemp("uninterrupted")
    return output, run(configuration(inputs, "sd15", output, "full", **SMALL), "sd15")


@pytest.mark.parametrize("step", [1, 3, 4])  # an epoch has 5 batches, 2 a step: 3 ends the first
def test_a_stopped_run_resumes_bit_for_bit(
    step: int,
    inputs: Mapping[str, str],
    tmp_path: Path,
    uninterrupted: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    config = configuration(inputs, "sd15", tmp_path, "full", **SMALL)
    with pytest.raises(SystemExit) as stopped:
        run(config, "sd15", StopAt(step))
    assert stopped.value.code == 143
    folder = tmp_path / f"x-step{step:08d}-state"
    written = json.loads((folder / "train_state.json").read_text())
    assert (written["current_step"], written["current_epoch"]) == (step, (step - 1) // 3 + 1)
    time.sleep(1)  # event folders are named by the second

    tensors = run({**config, "resume": str(folder)}, "sd15")

    expected_output, expected = uninterrupted
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert events(tmp_path) == events(expected_output)
    names = {path.name for path in tmp_path.glob("*.safetensors")}
    assert names == {path.name for path in expected_output.glob("*.safetensors")}


def test_an_epochs_state_resumes_bit_for_bit_too(
    inputs: Mapping[str, str], tmp_path: Path, uninterrupted: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    changes = {**SMALL, "save_state": True, "gradient_checkpointing": True}
    whole = run(configuration(inputs, "sd15", tmp_path / "whole", "full", **changes), "sd15")
    states = sorted(path.name for path in (tmp_path / "whole").glob("*-state"))
    assert states == ["x-000001-state", "x-state"]
    assert not list((tmp_path / "whole").glob(".*"))
    resume = str(tmp_path / "whole" / "x-000001-state")
    again = run(configuration(inputs, "sd15", tmp_path / "again", "full", **changes, resume=resume), "sd15")
    assert all(torch.equal(again[key], whole[key]) for key in whole)
    # Checkpointing changes what is kept, not what is computed.
    expected = uninterrupted[1]
    assert all(torch.allclose(whole[key], expected[key], rtol=1e-3, atol=1e-5) for key in expected)


def test_a_state_of_another_run_is_refused(inputs: Mapping[str, str], tmp_path: Path) -> None:
    changes = {"max_train_steps": 1, "save_state_on_train_end": True, **TINY}
    config = configuration(inputs, "sd15", tmp_path, "plain", **changes)
    run(config, "sd15")
    resume = {**config, "max_train_steps": 2, "resume": str(tmp_path / "x-state")}
    with pytest.raises(state.StateError, match="network_dim is 4, and here it is 8"):
        run({**resume, "network_dim": 8}, "sd15")
    with pytest.raises(state.StateError, match="There is no state"):
        run({**resume, "resume": str(tmp_path / "nowhere")}, "sd15")
    (tmp_path / "x-state" / "optimizer.bin").write_bytes(b"cut")
    with pytest.raises(state.StateError, match="cannot be read"):
        run(resume, "sd15")


def start(config: Mapping[str, Any], kind: Kind, folder: Path, **arguments: Any) -> subprocess.Popen[str]:
    (folder / "merged.toml").write_text(tomli_w.dumps(config))
    command = [sys.executable, "-m", "kohya.builtin", kind, f"--config_file={folder / 'merged.toml'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **arguments.pop("environment", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **arguments)


def test_sigterm_ends_the_step_saves_a_state_and_exits_143(inputs: Mapping[str, str], tmp_path: Path) -> None:
    """Also: the metric pipe carries the start and every step."""
    reader, writer = os.pipe()
    config = configuration(inputs, "sd15", tmp_path, "plain", max_train_steps=500)
    config.pop("save_every_n_steps")
    process = start(
        config, "sd15", tmp_path, environment={metrics.VARIABLE: f"/proc/{os.getpid()}/fd/{writer}"}
    )
    with os.fdopen(reader) as stream:
        records = metrics.read(stream)
        assert next(records) == metrics.Start(steps=500, epochs=56, images_per_step=1, pid=process.pid)
        os.close(writer)  # the trainer has opened the pipe, and holds it until its end
        first = next(records)
        process.send_signal(signal.SIGTERM)
        rest = list(records)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    last = [first, *rest][-1]
    assert isinstance(first, metrics.Step) and isinstance(last, metrics.Step)
    assert (first.step, first.epoch, list(first.lr)) == (1, 1, ["unet"])
    assert first.loss == pytest.approx(recorded("sd15")["runs"]["plain"]["losses"][0][2], rel=LOSS)
    assert (tmp_path / f"x-step{last.step:08d}-state" / "train_state.json").is_file()
    assert len(events(tmp_path)["loss/current"]) == last.step
    assert "epoch 1/56" in output and "took" in output


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pretrained_model_name_or_path": "/absent/x.safetensors"}, "There is no base model at /absent/x"),
        ({"train_data_dir": "/absent"}, "There is no data set at /absent"),
        ({"xformers": True}, "xformers: builtin does not have this option"),
        ({"tokenizer_cache_dir": "/absent"}, "python -m kohya.tokenizers /absent"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_a_foreseeable_error_is_one_sentence(
    changes: dict[str, Any],
    sentence: str,
    inputs: Mapping[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "merged.toml"
    file.write_text(tomli_w.dumps(configuration(inputs, "sd15", tmp_path, "plain", **changes)))
    monkeypatch.setattr("sys.argv", ["builtin", "sd15", f"--config_file={file}"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    error = command_line.main()
    assert error is not None and sentence in error and len(error.splitlines()) == 1


def test_a_model_of_the_other_kind_is_refused(inputs: Mapping[str, str], tmp_path: Path) -> None:
    with pytest.raises(model.BaseModelError, match="is not a base model of kind sdxl"):
        model.load_base_model(Path(inputs["root"], "sd15.safetensors"), "sdxl")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(inputs["root"], "sd15.safetensors").read_bytes()[:100_000])
    with pytest.raises(model.BaseModelError, match="not a whole"):
        model.load_base_model(cut, "sd15")


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_trains(kind: Kind, inputs: Mapping[str, str], tmp_path: Path) -> None:
    changes = {"mixed_precision": "bf16", "max_train_steps": 1}
    tensors = run(configuration(inputs, kind, tmp_path, "plain", **changes), kind)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    loss = events(tmp_path)["loss/current"][0][1]
    assert loss == pytest.approx(recorded(kind)["runs"]["plain"]["losses"][0][2], rel=0.05)


def test_fp16_without_a_gpu_is_refused(inputs: Mapping[str, str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and fp16 works on it")
    with pytest.raises(train.TrainingError, match="needs a GPU"):
        run(configuration(inputs, "sd15", tmp_path, "plain", mixed_precision="fp16"), "sd15")


PICTURES = json.loads((DATA / "sd_scripts_pictures.json").read_text())


@pytest.mark.parametrize(
    "case", PICTURES["buckets"], ids=lambda case: f"{case['resolution']}-{case['bucket_no_upscale']}"
)
def test_buckets_are_sd_scripts_own(case: dict[str, Any]) -> None:
    places = {"pretrained_model_name_or_path": "m", "train_data_dir": "d", "output_dir": "o"}
    given = {name: value for name, value in case.items() if name != "rows"}
    config = {**places, **given, "network_module": "networks.lora", "enable_bucket": True}
    chooser = dataset.buckets(options.read(config, "sdxl"))
    for size, bucket, resized, crop in case["rows"]:
        picture = dataset.Picture(Path("x"), "", 1, tuple(size))
        picture.bucket, picture.resized = chooser.choose(picture.size)
        assert [list(picture.bucket), list(picture.resized), list(picture.crop)] == [bucket, resized, crop], (
            size
        )


@pytest.mark.parametrize("case", PICTURES["images"], ids=lambda case: f"{case['size']}-{case['to']}")
def test_resizing_is_opencvs(case: dict[str, Any]) -> None:
    rng = np.random.default_rng(3)
    for other in PICTURES["images"]:  # the recorded pictures come one after the other from one generator
        image = rng.integers(0, 256, (other["size"][1], other["size"][0], 3), dtype=np.uint8)
        if other is case:
            break
    result = dataset._resize(image, tuple(case["to"]))
    assert np.abs(result.astype(int) - np.array(case["result"])).max() <= 1
    assert np.mean(result == np.array(case["result"])) > 0.99


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("1_a/0.txt", b"", "is empty"),
        ("1_a/0.txt", b"\xff\xfe", "is not UTF-8"),
        ("1_a/0.png", b"no picture", "cannot be read"),
    ],
)
def test_a_bad_file_is_named(name: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "1_a").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "1_a" / "0.png")
    (tmp_path / name).write_bytes(content)
    config = {
        "pretrained_model_name_or_path": "m", "train_data_dir": str(tmp_path), "output_dir": "o",
        "resolution": "64", "network_module": "networks.lora", "caption_extension": "txt",
    }  # fmt: skip
    with pytest.raises(dataset.DatasetError, match=f"{name}.* {sentence}"):
        dataset.open_dataset(options.read(config, "sd15"))


def test_folders_without_repeats_or_pictures_are_no_data_set(tmp_path: Path) -> None:
    for name in ("cat", "10cat", "0_cat", "3_empty"):
        (tmp_path / name).mkdir()
        if name != "3_empty":
            Image.new("RGB", (64, 64)).save(tmp_path / name / "0.png")
    config = {
        "pretrained_model_name_or_path": "m", "train_data_dir": str(tmp_path), "output_dir": "o",
        "resolution": "64", "network_module": "networks.lora",
    }  # fmt: skip
    with pytest.raises(dataset.DatasetError, match="holds no picture in a folder named N_name"):
        dataset.open_dataset(options.read(config, "sd15"))
