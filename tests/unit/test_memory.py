"""What a training needs of memory: refused only where it cannot be, told where it may not."""

import json
import math
from pathlib import Path

import pytest

from entrypoint import check, memory
from entrypoint.gpu import NAMED, Gpu, find_gpu
from kohya import config
from kohya.config import Kind, Merged, Setting
from tests.harness import write_nvidia_smi

DATA = Path(__file__).parents[1] / "data"
FULL = {"sd15": 2_000_000_000, "sdxl": 7_000_000_000}  # bytes of a base model
GB = 1e9


def merged(kind: Kind, **values: object) -> Merged:
    layer = [Setting(name, value, f"flag --{name}") for name, value in values.items()]
    return config.merge(kind, [config.preset(kind), check._machine(NAMED["a10g"]), layer])


def need(kind: Kind, **values: object) -> memory.Need:
    return memory.need(kind, merged(kind, **values).values)


@pytest.mark.parametrize("kind", config.KINDS)
def test_the_facts_are_counted_over_sd_scripts_own_shapes(kind: Kind) -> None:
    facts = memory._FACTS[kind]
    for file, begins, told in (
        ("base", ("model.diffusion_model.",), facts.unet),
        ("base", ("cond_stage_model.", "conditioner."), facts.text),
        ("base", ("first_stage_model.",), facts.vae),
        ("lora", ("lora_unet_",), facts.lora_unet * 4),
        ("lora", ("lora_te",), facts.lora_text * 4),
    ):
        shapes = json.loads((DATA / f"{file}_{kind}.json").read_text())
        counted = sum(math.prod(shape) for name, shape in shapes.items()
                      if name.startswith(begins) and not name.endswith(".alpha"))  # fmt: skip
        assert told == pytest.approx(counted, rel=5e-3)


def test_the_presets_need_what_their_files_say() -> None:
    """configs/sd15.toml: 4.8 GB; configs/sdxl.toml: 16 GB, and with checkpointing 8.2 GB."""
    assert need("sd15").estimate == pytest.approx(4.8 * GB, rel=0.02)
    assert need("sdxl", gradient_checkpointing=False).estimate == pytest.approx(16 * GB, rel=0.02)
    assert need("sdxl").estimate == pytest.approx(8.2 * GB, rel=0.02)


@pytest.mark.parametrize(
    ("values", "grows"),
    [
        ({"mixed_precision": "no"}, 6.77),  # the weights twice
        ({"fp8_base": True}, -3.385),
        ({"fp8_base_unet": True}, -2.567),
        ({"cache_text_encoder_outputs": True}, -1.635),
        ({"cache_latents": False}, 0.167),
        ({"network_dim": 32}, 0.681),  # 16 more of 2.66 M at 16 bytes
        ({"network_train_unet_only": False}, 0.231),
        ({"network_train_unet_only": False, "network_train_text_encoder_only": True}, -0.45),
        ({"optimizer_type": "AdamW8bit"}, -0.255),
        ({"full_bf16": True}, -0.34),  # the states too
        ({"full_bf16": True, "optimizer_type": "AdamW8bit"}, -0.425),
        ({"network_args": ["conv_dim=4"]}, -0.681),  # not counted
        ({"network_module": "lycoris.kohya"}, -0.681),
    ],
)
def test_each_choice_counts(values: dict[str, object], grows: float) -> None:
    assert (need("sdxl", **values).least - need("sdxl").least) / GB == pytest.approx(grows, abs=0.01)


@pytest.mark.parametrize(
    ("optimizer", "bytes_"),
    [("AdamW", 8), ("Adam", 8), ("NAdam", 8), ("RAdam", 8), ("AdamW8bit", 2), ("PagedAdamW8bit", 2),
     ("Lion", 4), ("Lion8bit", 1), ("Prodigy", 16), ("SGD", 0), ("some.Class", 0)],
)  # fmt: skip
def test_an_optimizers_states_count(optimizer: str, bytes_: int) -> None:
    told = need("sdxl", optimizer_type=optimizer).least - need("sdxl", optimizer_type="SGD").least
    assert told == pytest.approx(2.6598e6 * 16 * bytes_, rel=1e-4)


def test_pictures_count_where_their_size_is_known() -> None:
    assert need("sdxl", train_batch_size=8).least == need("sdxl").least  # they may be small
    assert need("sdxl", train_batch_size=8).estimate - need("sdxl").estimate == pytest.approx(7 * 0.7 * GB)
    known = {"bucket_no_upscale": False, "train_batch_size": 8}
    assert need("sdxl", **known).least - need("sdxl").least == pytest.approx(8 * 0.7 * GB)
    assert need("sdxl", **known, dataset_config="x").least == need("sdxl").least
    assert need("sdxl", **known, resolution="512").least - need("sdxl").least == pytest.approx(2 * 0.7 * GB)
    grown = need("sd15", bucket_no_upscale=False, resolution="512,1024", gradient_checkpointing=True)
    assert grown.least - need("sd15").least == pytest.approx(4 * 0.1 * GB)


def told(
    kind: Kind, gpu: Gpu | None, host: int | None = None, size: int | None = None, **values: object
) -> tuple[list[str], list[str]]:
    at = kind, size or FULL[kind], merged(kind, **values), gpu
    return [str(one) for one in memory.problems(*at, host)], list(memory.notes(*at))


def test_what_cannot_fit_is_refused_and_what_may_not_is_said() -> None:
    assert told("sdxl", NAMED["a10g"]) == ([], [])
    problems, notes = told("sdxl", NAMED["t4"], gradient_checkpointing=False, train_batch_size=2)
    assert problems == []
    assert notes[0].startswith("Tesla T4: the training may need 24.3 GB of its 16.1 GB (an estimate)")
    problems, notes = told("sdxl", NAMED["a10g"], train_batch_size=32, bucket_no_upscale=False)
    assert notes == []
    assert problems == [
        "NVIDIA A10G: it has 24.1 GB of memory, and the training needs at least 29.9 GB: 22.4 GB for 32 "
        "pictures at a time, 6.8 GB for the base model's weights, 0.7 GB for the LoRA, its gradient and "
        "AdamW. Write a smaller train_batch_size than 32, or take a GPU with more."
    ]
    for gpu in (None, Gpu("NVIDIA A10G", 8.6, 1)):  # nothing is known of it
        assert told("sdxl", gpu, train_batch_size=32, bucket_no_upscale=False) == ([], [])


@pytest.mark.parametrize(
    ("gpu", "values", "large", "fix"),
    [
        (
            "t4",
            {"mixed_precision": "no", "network_dim": 64},
            "13.5 GB for the base",
            "mixed_precision = fp16",
        ),
        (
            "t4",
            {"network_dim": 512},
            "21.8 GB for the LoRA",
            "a smaller network_dim than 512, or optimizer_t",
        ),
        (
            "t4",
            {"network_dim": 1024, "optimizer_type": "Lion8bit"},
            "24.5 GB for the LoRA, its gradient and Lion8bit",
            "Write a smaller network_dim than 1024, or take",
        ),
        (
            "a10g",
            {"resolution": "6000,6000", "bucket_no_upscale": False},
            "24.0 GB for 1 picture at a time",
            "a smaller resolution than 6000,6000",
        ),
        ("small", {}, "6.8 GB for the base", "Write fp8_base = true, or take a GPU with more"),
        ("small", {"fp8_base": True, "network_dim": 8}, "3.4 GB for the base", "Give a smaller base model"),
    ],
)
def test_the_largest_part_is_told_first_and_is_what_to_change(
    gpu: str, values: dict[str, object], large: str, fix: str
) -> None:
    meant = {**NAMED, "small": Gpu("small", 8.0, 1, memory=3_000_000_000)}[gpu]
    (problem,) = told("sdxl", meant, **values)[0]
    assert f"GB: {large}" in problem
    assert fix in problem


def test_a_narrow_base_model_needs_little() -> None:
    huge = {"train_batch_size": 999, "bucket_no_upscale": False}
    assert told("sdxl", NAMED["t4"], 1, 80_000_000, **huge) == ([], [])


def test_the_machines_memory_must_hold_sdxl_while_it_is_loaded() -> None:
    (problem,) = told("sdxl", None, 13_000_000_000)[0]
    assert problem.startswith(
        "this machine: it has 13.0 GB of memory, and loading the base model needs at least 13.5"
    )
    assert told("sdxl", None, 14_000_000_000) == ([], [])
    assert told("sdxl", None, 9_000_000_000, full_bf16=True) == ([], [])
    assert told("sdxl", None, 13_000_000_000, lowram=True) == ([], [])
    assert told("sd15", None, 1_000_000_000) == ([], [])


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.of_this_machine()
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroup v2 and v1
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("1000000\n")
        assert memory.of_this_machine() == 1_000_000
        file.write_text("max\n")
    assert memory.of_this_machine() >= whole


def test_a_need_is_told_with_what_it_rests_on() -> None:
    assert str(memory.Need(1e9, 0.4e9, 0.1e9, 12e9)) == "at least 1.5 GB, 12.0 GB by an estimate"


def test_a_gpus_memory_is_what_nvidia_smi_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "a"))
    assert find_gpu() is None
    for folder, told_, bytes_ in (("b", "15360 MiB", 15360 << 20), ("c", "[N/A]", None)):
        write_nvidia_smi(tmp_path / folder, "Tesla T4, 7.5, 580.65.06", memory=told_)
        monkeypatch.setenv("PATH", f"{tmp_path / folder}:/bin")
        gpu = find_gpu()
        assert gpu is not None
        assert gpu.memory == bytes_
