"""What sd-scripts v0.10.1 makes a wrong LoRA of, or none with exit code 0, or an error that says little.

Here each is refused before anything is fetched or trained. What shows only in a training is in
tests/sd_scripts/test_networks.py, what shows only in the files themselves in tests/unit/test_pictures.py.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from entrypoint import check as looks
from entrypoint import memory, model
from entrypoint.check import Plan, check
from entrypoint.contract import Tree
from entrypoint.failures import Problem, Unfit
from entrypoint.request import resolve
from entrypoint.storage import Storage
from kohya.config import Kind
from tests.harness import TINY, Job, write_dataset

Ask = Callable[..., "Plan | list[str]"]


@pytest.fixture
def ask(tmp_path: Path, base_models: dict[Kind, Path], pictures: Path) -> Ask:
    """Ask for a job in flags, or in a TOML: the plan for it, or every problem with it."""

    def made(
        toml: str = "",
        dataset: Path = pictures,
        kind: Kind = "sd15",
        without: tuple[str, ...] = (),
        **flags: str,
    ) -> Plan | list[str]:
        tiny = {name: value for name, value in TINY.items() if name not in without}
        flags = {"model_uri": str(base_models[kind]), "dataset_uri": str(dataset), **tiny, **flags}
        if toml:
            (tmp_path / "job.toml").write_text(toml)
            flags["config_uri"] = str(tmp_path / "job.toml")
        storage, tree = Storage(), Tree(tmp_path / "ml")
        try:
            request = resolve([f"--{name}={value}" for name, value in flags.items()], tree, storage)
            return check(request, tree, tmp_path / "scratch", storage)
        except Unfit as error:
            return [str(problem) for problem in error.problems]

    return made


def refused(told: "Plan | list[str]", said: str) -> None:
    assert isinstance(told, list), "the job was not refused"
    assert any(said in problem for problem in told), told


def test_the_job_that_all_others_differ_from_is_fit(ask: Ask) -> None:
    assert isinstance(ask(), Plan)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), "there is no picture"),
        (("10_cat/a.gif", "10_cat/a.txt"), "there is no picture"),
        (("a.png", "a.txt", "1_dog/b.png", "1_dog/b.txt"), "sd-scripts does not look beside the folders"),
        (("cat/a.png", "cat/a.txt"), "does not say how often to repeat its 1 picture"),
        (("10cat/a.png", "10cat/a.txt"), "Rename it to 10_cat"),
        (("0_cat/a.png", "0_cat/a.txt"), "its pictures are repeated 0 times"),
        (("-1_cat/a.png", "-1_cat/a.txt"), "does not say how often to repeat"),
        (("more/10_cat/a.png", "more/10_cat/a.txt"), "sd-scripts does not look this deep"),
        (("10_cat/a.png",), "1 without a caption in a .txt file"),
        (("10_cat/a.png", "10_cat/a.caption"), "1 without a caption in a .txt file"),
    ],
)
def test_pictures_that_would_be_left_out(files: tuple[str, ...], said: str, ask: Ask, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("a cat")
    (tmp_path / "data").mkdir(exist_ok=True)
    refused(ask(dataset=tmp_path / "data"), said)


def test_an_empty_caption(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "data" / "1_cat").mkdir(parents=True)
    (tmp_path / "data" / "1_cat" / "a.png").write_bytes(b"x")
    (tmp_path / "data" / "1_cat" / "a.txt").write_bytes(b"")
    refused(ask(dataset=tmp_path / "data"), "1 empty caption (a.txt)")


def test_no_data_set_at_all(ask: Ask, tmp_path: Path) -> None:
    refused(ask(dataset_uri=""), "there is neither a channel dataset nor a hyperparameter dataset_uri")
    refused(ask(dataset=tmp_path / "nowhere"), "it is not a folder")


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("netwrok_dim = 8", "netwrok_dim is no option of sd-scripts, which would ignore it"),
        ("[a]\nseed = 1\n[b]\nseed = 2", "seed is set twice, and only one of the values can count"),
        ("[a.b]\nseed = 1", "the table b stands inside another, and sd-scripts would ignore all of it"),
        ("foo = [1,", "it is not TOML"),
        ('enable_bucket = "maybe"', 'enable_bucket = "maybe" is neither true nor false'),
    ],
)
def test_a_toml_that_means_something_else(toml: str, said: str, ask: Ask) -> None:
    refused(ask(toml), said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"network_args": "conv_dmi=4"}, "networks.lora does not know conv_dmi, and would ignore it"),
        ({"network_module": ""}, "option network_module: it is not set"),
        ({"network_module": "networks.loha"}, "network_module = networks.loha is not one of networks.lora"),
        ({"network_alpha": "0"}, "network_alpha = 0 would become network_dim"),
        ({"optimizer_args": "decay"}, "optimizer_args = 'decay' is not name=value"),
        ({"lr_scheduler_args": "power:2"}, "lr_scheduler_args = 'power:2' is not name=value"),
        ({"optimizer_type": "AdamX"}, "optimizer_type = AdamX is none that trains a LoRA"),
        ({"save_model_as": "foo"}, 'save_model_as = "foo" is not one of ckpt, pt, safetensors'),
        ({"save_precision": "bfloat16"}, 'save_precision = "bfloat16" is not one of float, fp16, bf16'),
        ({"mixed_precision": "bfloat16"}, 'mixed_precision = "bfloat16" is not one of no, fp16, bf16'),
        ({"mixed_precision": "fp16"}, "fp16 does not run on a CPU"),
        ({"max_train_steps": "0"}, "max_train_steps = 0 is too small"),
        ({"train_batch_size": "0"}, "train_batch_size = 0 is too small"),
        ({"initial_epoch": "2", "resume": "/nowhere"}, "initial_epoch and resume exclude each other"),
        ({"caption_dropout_rate": "1.5"}, "caption_dropout_rate = 1.5 is too large"),
        ({"unet_lr": "0", "text_encoder_lr": "0"}, "every learning rate is 0"),
        ({"bucket_reso_steps": "1", "enable_bucket": "true"}, "is no multiple of 64"),
        ({"min_bucket_reso": "256", "enable_bucket": "true"}, "min_bucket_reso = 256 is above resolution"),
        ({"resolution": ""}, "resolution is not set"),
        ({"dynamo_backend": "maybe"}, "Remove it: it counts beside torch_compile only"),
        ({"color_aug": "true", "cache_latents": "true"}, "Write cache_latents = false"),
        ({"full_fp16": "true"}, "full_fp16 needs mixed_precision = fp16"),
        ({"masked_loss": "true"}, "masked_loss needs alpha_mask"),
        ({"sample_every_n_epochs": "1"}, "sample_every_n_epochs asks for pictures"),
        ({"output_name": "a/b"}, "cannot be part of a file name"),
    ],
)
def test_options_that_end_badly(flags: dict[str, str], said: str, ask: Ask) -> None:
    refused(ask(**flags), said)


def test_options_of_sdxl_that_end_badly(ask: Ask) -> None:
    flags = {"cache_text_encoder_outputs": "true", "network_train_unet_only": "false"}
    refused(ask(kind="sdxl", **flags), "Write network_train_unet_only = true")


def test_numbers_and_switches_as_text_are_read_as_what_they_are(ask: Ask) -> None:
    meant = {
        "network_dim": 4,
        "unet_lr": 1e-4,
        "train_batch_size": 1,
        "enable_bucket": False,
        "resolution": "128",
        "caption_dropout_every_n_epochs": 0,
    }
    toml = """network_dim = "4"
        unet_lr = "1e-4"
        train_batch_size = "1"
        enable_bucket = "false"
        resolution = 128
        caption_dropout_every_n_epochs = 0.0
        """
    plan = ask(toml, without=tuple(meant), trainer="sd-scripts")
    if isinstance(plan, list):  # where sd-scripts is not installed, that alone is wrong
        assert len(plan) == 1
        assert "trainer sd-scripts" in plan[0]
    else:
        assert {name: plan.merged.values[name] for name in meant} == meant


def test_what_every_look_finds_is_in_the_report(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finds(where: str) -> Callable[..., list[Problem]]:
        return lambda *_: [Problem(where, "it is wrong", "Mend it")]

    monkeypatch.setattr(memory, "problems", finds("memory"))
    monkeypatch.setattr(looks, "_disk", finds("disk"))
    monkeypatch.setattr(looks, "_outputs", finds("outputs"))
    monkeypatch.setattr(model, "settle", lambda found, where, merged: (merged, finds("model")()))
    (tmp_path / "reg").mkdir()
    told = ask(reg_uri=str(tmp_path / "reg"), resize="512", alpha_mask="true")
    for where in ("memory", "disk", "outputs", "model"):
        refused(told, f"{where}: it is wrong. Mend it.")
    refused(told, f"{tmp_path / 'reg'}: there is no picture")
    refused(told, "alpha_mask trains where a picture is opaque, and resize lays pictures onto white")


def test_files_that_cannot_be_used_are_told_together_before_the_training(
    job: Job, base_models: dict[Kind, Path], tmp_path: Path
) -> None:
    folder = write_dataset(tmp_path / "data") / "2_shape"
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:5000])
    (folder / "1.png").write_bytes(b"no picture")
    (folder / "2.txt").write_bytes(b"caf\xe9")
    (folder / "3.txt").write_bytes(b" \n")
    job.mount("model", base_models["sd15"])
    job.mount("dataset", tmp_path / "data")
    job.configure("hyperparameters", TINY)
    result = job.run()
    assert result.code == 2, result.out + result.err
    assert "step=" not in result.out
    assert "Traceback" not in result.err
    assert job.failure is not None
    shown = f"{job.tree}/input/data/dataset/2_shape"
    for said in (
        f"{shown}/0.png: the picture cannot be read (",
        f"{shown}/1.png: the picture cannot be read (cannot identify image file)",
        f"{shown}/2.txt: the caption is not UTF-8 (byte 3)",
        f"{shown}/3.txt: the caption is blank",
    ):
        assert said in result.err
        assert said in job.failure
