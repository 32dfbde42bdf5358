"""entrypoint.check: what follows from the GPU, and what sd-scripts would fail on."""

from pathlib import Path

import pytest

from entrypoint import check
from entrypoint.gpu import Gpu
from kohya import config, rules
from kohya.config import Setting
from kohya.sd_scripts import SdScripts


def precision(gpu: Gpu | None) -> tuple[object, str]:
    setting = config.merge("sd15", [config.preset("sd15"), check._machine(gpu)]).settings["mixed_precision"]
    return setting.value, setting.where


def test_the_precision_comes_from_the_gpus_preset() -> None:
    value, where = precision(Gpu("Tesla T4", 7.5, 1))
    assert value == "fp16"
    assert where.startswith("configs/gpu/t4.toml line ")
    assert precision(Gpu("NVIDIA L40S", 8.9, 1))[0] == "bf16"


def test_a_gpu_without_a_preset_gets_what_its_capability_allows() -> None:
    assert precision(Gpu("NVIDIA A10", 8.6, 1)) == ("bf16", "NVIDIA A10, compute capability 8.6")
    assert precision(Gpu("Tesla V100-SXM2-16GB", 7.0, 1))[0] == "fp16"
    assert precision(Gpu("Tesla V100-SXM2-16GB", None, 1)) == (
        "fp16",
        "Tesla V100-SXM2-16GB, compute capability unknown",
    )
    assert precision(None) == ("no", "this machine has no GPU")


@pytest.mark.parametrize("kind", config.KINDS)
def test_the_users_layers_lie_above_the_gpus_preset(kind: config.Kind) -> None:
    gpu = check._machine(Gpu("NVIDIA H100 80GB HBM3", 9.0, 1))
    assert config.merge(kind, [config.preset(kind), gpu]).values["gradient_checkpointing"] is False
    asked = [Setting("gradient_checkpointing", True, "flag"), Setting("mixed_precision", "fp16", "flag")]
    values = config.merge(kind, [config.preset(kind), gpu, asked]).values
    assert (values["gradient_checkpointing"], values["mixed_precision"]) == (True, "fp16")


def adapted(kind: config.Kind, python: Path, **values: object) -> config.Merged:
    """What becomes of `values` on top of the presets, for a Python that lacks nothing."""
    layer = [Setting(name, value, f"flag --{name}") for name, value in values.items()]
    merged = config.merge(kind, [config.preset(kind), check._machine(None), layer])
    merged, _ = rules.settle(kind, merged)
    return check._sd_scripts(SdScripts(python.parent, python), kind, merged, None)[0]


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A Python that finds every module."""
    file = tmp_path / "python"
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    return file


def test_cached_text_takes_the_presets_shuffling_away(python: Path) -> None:
    merged = adapted("sdxl", python, cache_text_encoder_outputs=True)
    assert merged.values["shuffle_caption"] is False
    assert any("shuffle_caption = true becomes false" in note for note in merged.notes)
    assert adapted("sdxl", python).values["shuffle_caption"] is True


def test_persistent_workers_need_workers(python: Path) -> None:
    options = {"persistent_data_loader_workers": True, "max_data_loader_n_workers": 0}
    assert adapted("sd15", python, **options).values["persistent_data_loader_workers"] is False
    options["max_data_loader_n_workers"] = 2
    assert adapted("sd15", python, **options).values["persistent_data_loader_workers"] is True


def test_wandb_alone_would_leave_the_job_without_steps(python: Path) -> None:
    assert adapted("sd15", python, log_with="wandb").values["log_with"] == "all"
