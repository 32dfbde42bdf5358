import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from demo import base_model
from entrypoint import checkpoint
from entrypoint.checkpoint import NotABaseModel, identify, read_header, verify_lora
from entrypoint.failures import BadLora
from kohya.config import KINDS, Kind
from kohya.networks import expected, modules

PLAIN = {"network_module": "networks.lora", "network_dim": 4}
UNET_IN = "model.diffusion_model.input_blocks.0.0.weight"
DATA = Path(__file__).parents[1] / "data"


def names_and_shapes(name: str) -> dict[str, list[int]]:
    content: dict[str, list[int]] = json.loads((DATA / f"{name}.json").read_text())
    return content


def header(shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    return {name: {"dtype": "F16", "shape": shape} for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The tensors of a narrow SD1.5 LoRA that works."""
    rng = np.random.default_rng(0)
    shapes = names_and_shapes("lora_sd15")
    return {
        name: rng.standard_normal([min(size, 8) for size in shape]).astype(np.float16)
        if shape
        else np.float16(1)
        for name, shape in shapes.items()
    }


def saved(tensors: Mapping[str, np.ndarray], path: Path) -> Path:
    save_file({name: np.asarray(tensor) for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_real_base_models_are_told_by_their_key_names(kind: Kind) -> None:
    assert identify(header(names_and_shapes(f"base_{kind}"))) == kind


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_base_models_are_told_too(kind: Kind, tmp_path: Path) -> None:
    path = base_model.write(tmp_path / "m.safetensors", kind)
    with path.open("rb") as file:
        assert identify(read_header(file, path.stat().st_size)) == kind


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ({"lora_unet_mid_block.alpha": []}, "a LoRA"),
        ({"double_blocks.0.img_attn.qkv.weight": [1]}, "a Flux model"),
        ({"model.diffusion_model.joint_blocks.0.x": [1]}, "a Stable Diffusion 3 model"),
        ({UNET_IN: [320, 9, 3, 3], "cond_stage_model.transformer.x": [1]}, "inpainting"),
        ({UNET_IN: [320, 4, 3, 3], "cond_stage_model.model.x": [1]}, "Stable Diffusion 2"),
        ({"conditioner.embedders.0.model.x": [1]}, "refiner"),
        ({"encoder.conv_in.weight": [1]}, "a VAE"),
        ({"text_model.embeddings.x": [1]}, "a text encoder"),
        ({"down_blocks.0.x": [1]}, "diffusers"),
        ({"strange.weight": [1]}, "its first tensor is strange.weight"),
        ({}, "its first tensor is missing"),
    ],
)  # fmt: skip
def test_other_models_are_named(shapes: dict[str, list[int]], named: str) -> None:
    with pytest.raises(NotABaseModel, match=named):
        identify(header(shapes))


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"PK\x03\x04" + b"0" * 100, b"\xff" * 64, (5).to_bytes(8, "little") + b"[1,2]",
     (2).to_bytes(8, "little") + b"{}" + b"more", (13).to_bytes(8, "little") + b'{"a": {"x":1}}'],
)  # fmt: skip
def test_what_is_no_safetensors_file_is_refused(content: bytes) -> None:
    with pytest.raises(NotABaseModel):
        read_header(io.BytesIO(content), len(content))


def test_a_truncated_file_is_refused_from_its_header(tmp_path: Path) -> None:
    path = saved({"a": np.zeros(1000, np.float32)}, tmp_path / "a.safetensors")
    content = path.read_bytes()
    with pytest.raises(NotABaseModel, match="cut off"):
        read_header(io.BytesIO(content), len(content) - 1)


def test_a_lora_that_works_is_told_with_its_facts(lora: dict[str, np.ndarray], tmp_path: Path) -> None:
    found = verify_lora(saved(lora, tmp_path / "x.safetensors"), expected("sd15", PLAIN))
    assert (found.modules, found.rank, found.bytes) == (264, 4, found.path.stat().st_size)


def test_a_lora_of_the_unet_alone_works_where_only_that_was_trained(
    lora: dict[str, np.ndarray], tmp_path: Path
) -> None:
    unet = {name: tensor for name, tensor in lora.items() if name.startswith("lora_unet_")}
    path = saved(unet, tmp_path / "x.safetensors")
    assert verify_lora(path, expected("sd15", {**PLAIN, "network_train_unet_only": True})).modules == 192
    with pytest.raises(BadLora, match="lacks 72 of 264 modules"):
        verify_lora(path, expected("sd15", PLAIN))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_nan_or_inf_is_enough(lora: dict[str, np.ndarray], tmp_path: Path, value: float) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"
    broken = {**lora, name: lora[name].copy()}
    broken[name].flat[-1] = value
    with pytest.raises(BadLora, match="NaN or Inf in 1 of 792"):
        verify_lora(saved(broken, tmp_path / "x.safetensors"), expected("sd15", PLAIN))


def test_an_untrained_lora_is_refused(lora: dict[str, np.ndarray], tmp_path: Path) -> None:
    zero = {name: np.zeros_like(tensor) if "lora_up" in name else tensor for name, tensor in lora.items()}
    with pytest.raises(BadLora, match="all zero"):
        verify_lora(saved(zero, tmp_path / "x.safetensors"), expected("sd15", PLAIN))


def test_a_part_that_was_trained_and_is_zero_is_refused(lora: dict[str, np.ndarray], tmp_path: Path) -> None:
    zero = {name: tensor * (not name.startswith("lora_te_")) for name, tensor in lora.items()}
    path = saved(zero, tmp_path / "x.safetensors")
    with pytest.raises(BadLora, match="every lora_te module is all zero"):
        verify_lora(path, expected("sd15", PLAIN))
    assert verify_lora(path, expected("sd15", {**PLAIN, "text_encoder_lr": [0.0]})).modules == 264


def test_another_rank_than_was_asked_for_is_refused(lora: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = saved(lora, tmp_path / "x.safetensors")
    with pytest.raises(BadLora, match="not of rank 8"):
        verify_lora(path, expected("sd15", {**PLAIN, "network_dim": 8}))


def test_missing_and_foreign_keys_are_named(lora: dict[str, np.ndarray], tmp_path: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    without = {key: tensor for key, tensor in lora.items() if key != f"{name}.alpha"}
    with pytest.raises(BadLora, match=f"{name} has no such set of tensors: lora_down.weight, lora_up.weight"):
        verify_lora(saved(without, tmp_path / "x.safetensors"), expected("sd15", PLAIN))
    with pytest.raises(BadLora, match="has 1 modules that were not to be trained, lora_te1_x first"):
        verify_lora(
            saved({**lora, "lora_te1_x.alpha": np.float16(1)}, tmp_path / "y.safetensors"),
            expected("sd15", PLAIN),
        )


def test_a_truncated_lora_does_not_open(lora: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = saved(lora, tmp_path / "x.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadLora, match="does not open"):
        verify_lora(path, expected("sd15", PLAIN))


@pytest.mark.parametrize(
    ("bits", "broken"), [(0x7F80, True), (0x7FC1, True), (0xFF80, True), (0x3F80, False)]
)
def test_bfloat16_is_read_by_its_bits(bits: int, broken: bool) -> None:
    tensor = {"dtype": "BF16", "shape": [2], "data": np.array([0, bits], np.uint16).tobytes()}
    assert checkpoint._finite(tensor) is not broken
    assert checkpoint._nonzero(tensor)
    assert not checkpoint._nonzero({**tensor, "data": np.array([0, 0x8000], np.uint16).tobytes()})


LYCORIS: dict[str, Any] = {"network_module": "lycoris.kohya", "network_args": ["preset=attn-mlp"]}


def factors(ends: tuple[str, ...]) -> dict[str, np.ndarray]:
    """A LoRA of every module of SD1.5, each with these tensors."""
    return {f"{name}.{end}": np.ones((4, 4), np.float16) for name in modules("sd15") for end in ends}


@pytest.mark.parametrize(
    ("algorithm", "ends"),
    [
        ("locon", ("alpha", "lora_down.weight", "lora_up.weight", "dora_scale")),
        ("loha", ("alpha", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
        ("lokr", ("alpha", "lokr_w1", "lokr_w2_a", "lokr_w2_b")),
        ("lokr", ("alpha", "lokr_w1", "lokr_w2")),
    ],
)
def test_a_lora_by_lycoris(algorithm: str, ends: tuple[str, ...], tmp_path: Path) -> None:
    values = {**LYCORIS, "network_args": [*LYCORIS["network_args"], f"algo={algorithm}"]}
    wanted = expected("sd15", values)
    path = tmp_path / "x.safetensors"
    made = factors(ends)
    extra = {f"lora_unet_time_embedding_linear_1.{end}": np.ones((4, 4), np.float16) for end in ends}
    assert verify_lora(saved({**made, **extra}, path), wanted).modules == 265
    text = {name: tensor for name, tensor in made.items() if name.startswith("lora_te_")}
    with pytest.raises(BadLora, match="lacks 192 of 264 modules"):
        verify_lora(saved(text, path), wanted)
    with pytest.raises(BadLora, match="has no such set of tensors"):
        verify_lora(saved(factors(ends[:-2]), path), wanted)
    zero = {name: tensor * (not name.endswith(ends[2])) for name, tensor in made.items()}
    with pytest.raises(BadLora, match="it is all zero"):
        verify_lora(saved(zero, path), wanted)
    foreign = {f"lora_te1_x.{end}": np.ones((4, 4), np.float16) for end in ends}
    with pytest.raises(BadLora, match="has 1 modules that were not to be trained"):
        verify_lora(saved({**made, **foreign}, path), wanted)
