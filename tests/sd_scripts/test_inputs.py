"""The optional inputs, read by the real sd-scripts: what came of them shows in the LoRA."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from demo import base_model
from entrypoint.storage import S3Uri
from kohya import dataset_config, sd_scripts
from kohya.config import Kind
from tests.contract.test_job import put
from tests.harness import NARROW, TINY, Job
from tests.s3 import S3Server

CONFIG_UTIL = """
import json, sys
sys.path.insert(0, sys.argv[1])
from library.config_util import ConfigSanitizer
from voluptuous import Schema
found = ConfigSanitizer(True, True, False, True)
schemas = {
    "_DATASET": found.general_schema, "_OWN": found.db_subset_schema, "datasets": found.db_dataset_schema
}
def takes(check, value):
    try:
        return bool([Schema(check)(value)])
    except Exception:
        return False
values = json.loads(sys.argv[2])
print(json.dumps({
    table: {str(key): [takes(check, value) for value in values] for key, check in schema.items()}
    for table, schema in schemas.items()
}))
"""

STILL = ("--unet_lr=1e-12", "--text_encoder_lr=1e-12")  # whatever was loaded is saved as it was


SHORT = {**TINY, "trainer": "sd-scripts", "max_train_epochs": "1"}


@pytest.fixture
def ready(job: Job, base_models: dict[Kind, Path]) -> Job:
    """A job by channels that lacks its data set."""
    job.environment["PYTHONPATH"] = str(NARROW)
    job.mount("model", base_models["sd15"])
    job.configure("hyperparameters", SHORT)
    return job


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, base_models: dict[Kind, Path], pictures: Path
) -> Iterator[Path]:
    """A LoRA that sd-scripts made, of rank 4."""
    job = Job(tmp_path_factory.mktemp("trained"))
    job.environment["PYTHONPATH"] = str(NARROW)
    job.mount("model", base_models["sd15"])
    job.mount("dataset", pictures)
    job.configure("hyperparameters", SHORT)
    result = job.run()
    assert result.code == 0, result.out + result.err
    yield job.model / "shape.safetensors"
    job.end()


def write_vae(path: Path) -> Path:
    """Another VAE than the base model's."""
    tensors = load_file(base_model.write(path, "sd15", seed=1))
    vae = {name.removeprefix("first_stage_model."): tensor for name, tensor in tensors.items()
           if name.startswith("first_stage_model.")}  # fmt: skip
    save_file(vae, path)
    return path


def write_lora(path: Path, like: Path, *, rank: int = 4, alpha: float = 4) -> dict[str, np.ndarray]:
    """A LoRA of random numbers with the modules of another one."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, tensor in load_file(like).items():
        shape = tuple(rank if size == 4 and "lora" in name.split(".")[1] else size for size in tensor.shape)
        random = rng.normal(0, 1e-2, shape) if shape else np.array(alpha)
        tensors[name] = random.astype(tensor.dtype)
    save_file(tensors, path)
    return tensors


def metadata(lora: Path) -> dict[str, str]:
    with safe_open(lora, "np") as opened:
        found: dict[str, str] = opened.metadata()
    return found


def test_vae_reg_weights_and_sample_prompts(
    ready: Job, pictures: Path, trained: Path, tmp_path: Path
) -> None:
    ready.mount("dataset", pictures)
    given = write_lora(tmp_path / "given.safetensors", trained)
    write_lora(tmp_path / "merged.safetensors", trained)
    ready.mount("vae", write_vae(tmp_path / "other-vae.safetensors"))
    (tmp_path / "reg").mkdir()
    shutil.copytree(pictures / "2_shape", tmp_path / "reg" / "1_square", ignore=lambda *_: ["0.txt", "1.txt"])
    ready.mount("reg", tmp_path / "reg")
    weights = ready.mount("weights", tmp_path / "given.safetensors")
    (weights / "merged.safetensors").symlink_to(tmp_path / "merged.safetensors")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "prompts.txt").write_text(
        "# two\na red square --w 64 --h 64 --s 2 --d 1\n\na blue one --w 64 --h 64 --s 2\n"
    )
    (tmp_path / "config" / "job.toml").write_text(
        "sample_prompts = 'prompts.txt'\nsample_every_n_epochs = 1\nsample_sampler = 'euler'\n"
        "network_weights = 'given.safetensors'\nbase_weights = ['merged.safetensors']\n"
        "reg_data_dir = 'C:\\\\mine\\\\reg'\n"
    )
    ready.mount("config", tmp_path / "config")
    ready.configure(
        "inputdataconfig", {name: {"TrainingInputMode": "FastFile"} for name in ("vae", "weights")}
    )
    result = ready.run(*STILL, f"--output_uri={tmp_path / 'out'}")

    assert result.code == 0, result.out + result.err
    assert result.err == ""
    for name in ("vae/other-vae", "weights/given", "weights/merged"):
        path = ready.tree / "input" / "data" / f"{name}.safetensors"
        assert f"fetch: reading {path} once, in order" in result.out
    lora = ready.model / "shape.safetensors"
    told = metadata(lora)
    assert told["ss_vae_name"] == "other-vae.safetensors"
    assert (told["ss_num_train_images"], told["ss_num_reg_images"]) == ("8", "4")
    assert json.loads(told["ss_reg_dataset_dirs"]) == {"1_square": {"n_repeats": 1, "img_count": 4}}
    saved = load_file(lora)
    assert any("resnets" in name for name in saved.keys() - given.keys())  # which base_weights brings about
    for name, tensor in given.items():
        np.testing.assert_allclose(saved[name], tensor, atol=1e-4)
    for folder in (ready.tree / "output" / "data", tmp_path / "out"):
        names = sorted(path.name for path in (folder / "sample").iterdir())
        assert len(names) == 2
        assert names[0].startswith("shape_e000001_00_")
        assert ">epoch 1</th>" in (folder / "report.html").read_text()
    inputs = {Path(item["path"]).name for item in ready.record["inputs"]}
    assert {"other-vae.safetensors", "given.safetensors", "merged.safetensors"} < inputs
    assert ready.record["reg"] == {"pictures": 4, "with_repeats": 4}
    kept = (ready.model / "shape.toml").read_text()
    assert 'network_weights = "given.safetensors"' in kept
    assert 'sample_prompts = "prompts.txt"' in kept
    assert "vae" not in kept.replace("vae_batch_size", "")
    assert "reg_data_dir" not in kept


def test_dim_from_weights(ready: Job, pictures: Path, trained: Path, tmp_path: Path) -> None:
    given = write_lora(tmp_path / "given.safetensors", trained, rank=8, alpha=2)
    ready.mount("dataset", pictures)
    ready.mount("weights", tmp_path / "given.safetensors")
    result = ready.run(*STILL, "--dim_from_weights")
    assert result.code == 0, result.out + result.err
    assert "network_dim = 4 becomes 8: dim_from_weights" in result.out
    lora = ready.model / "shape.safetensors"
    saved = load_file(lora)
    assert saved.keys() == given.keys()
    for name, tensor in given.items():
        np.testing.assert_allclose(saved[name], tensor, atol=1e-4)
    told = metadata(lora)
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("8", "2.0")


def test_dataset_config(ready: Job, pictures: Path, tmp_path: Path, s3: S3Server, bucket: S3Uri) -> None:
    """From S3: the configuration names it, and it lies beside."""
    ready.environment |= s3.environment
    put(s3, bucket / "data/squares", pictures / "2_shape")
    put(s3, bucket / "data/more/squares", pictures / "2_shape")
    shutil.copytree(pictures / "2_shape", tmp_path / "reg", ignore=lambda *_: ["0.txt"])
    put(s3, bucket / "reg", tmp_path / "reg")
    put(s3, bucket / "config/job.toml", "dataset_config = 'data.toml'\n")
    described = (
        "[general]\ncaption_extension = '.txt'\n"
        "[[datasets]]\nresolution = 64\nbatch_size = 2\n"
        "[[datasets.subsets]]\nimage_dir = 'squares'\nnum_repeats = 3\n"
        "[[datasets.subsets]]\nimage_dir = '.'\nis_reg = true\nclass_tokens = 'square'\n"
        "[[datasets]]\nresolution = [128, 64]\nbatch_size = 1\n"
        "[[datasets.subsets]]\nimage_dir = 'more/squares'\ncaption_prefix = 'a, b, '\n"
    )
    put(s3, bucket / "config/data.toml", described)
    flags = [f"--{name}_uri={bucket / folder}"
             for name, folder in (("dataset", "data"), ("reg", "reg"), ("config", "config"))]  # fmt: skip
    result = ready.run(*flags)

    assert result.code == 0, result.out + result.err
    assert result.err == ""
    sets = json.loads(metadata(ready.model / "shape.safetensors")["ss_datasets"])
    assert [tuple(one["resolution"]) for one in sets] == [(64, 64), (128, 64)]
    assert [(one["num_train_images"], one["num_reg_images"]) for one in sets] == [(12, 4), (4, 0)]
    assert [one["batch_size_per_device"] for one in sets] == [2, 1]
    assert [subset["num_repeats"] for subset in sets[0]["subsets"]] == [3, 1]
    assert sets[1]["subsets"][0]["image_dir"] == "squares"
    assert ready.record["dataset"] == {"pictures": 8, "with_repeats": 16}
    assert len(ready.record["inputs"]) == 1 + 16 + 7
    assert 'dataset_config = "data.toml"' in (ready.model / "shape.toml").read_text()


def test_keys_of_a_dataset_config_are_those_that_sd_scripts_takes() -> None:
    """The tables against ConfigSanitizer itself: the same keys, the same types."""
    values = [True, 1, 0.5, "x", {"a": 1}, [1, 2], [1.5, 2.5], ["x", "y"], [1]]
    found = sd_scripts.find()
    told = subprocess.run(
        [found.python, "-c", CONFIG_UTIL, str(found.folder), json.dumps(values)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    theirs = json.loads(told.splitlines()[-1])
    for table, ours in (("_DATASET", dataset_config._DATASET), ("_OWN", dataset_config._OWN)):
        assert {key: [check(value) for value in values] for key, (check, _) in ours.items()} == theirs[table]
    assert theirs["datasets"].keys() == {*dataset_config._DATASET, "subsets"}
