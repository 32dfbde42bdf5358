import json
import re
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


OTHERS = [  # what is added to nothing, what it is told as, and what to give instead
    ({"lora_unet_mid_block.alpha": []}, "a LoRA", "belongs in the channel weights"),
    ({"lora_transformer_x.lora_A.weight": [1]}, "a LoRA", "base model"),
    ({"base_model.model.x.lora_B.weight": [1]}, "a LoRA", "base model"),
    ({"lycoris_x.lokr_w1": [1]}, "a LoRA", "base model"),
    ({"unet.x.to_k.lora_A.weight": [1]}, "a LoRA in diffusers' format", "base model"),
    ({"emb_params": [8, 768]}, "a textual inversion embedding", "base model|checkpoint"),
    ({"control_model.input_blocks.0.0.weight": [1]}, "a ControlNet", "that it steers"),
    ({"controlnet_cond_embedding.conv_in.weight": [1], "down_blocks.0.x": [1]}, "a ControlNet", "steers"),
    ({"image_proj.proj.weight": [1]}, "an IP-Adapter", "that it steers"),
    ({"double_blocks.0.img_attn.qkv.weight": [1]}, "a Flux model", "Stable Diffusion 1.5 or SDXL"),
    ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": [1]}, "a Flux model", "SDXL"),
    ({"model.diffusion_model.joint_blocks.0.x": [1]}, "a Stable Diffusion 3 model", "SDXL"),
    ({UNET_IN: [320, 4, 3, 3], "cond_stage_model.model.x": [1]}, "a Stable Diffusion 2 model", "SDXL"),
    ({UNET_IN: [384, 4, 3, 3], "conditioner.embedders.0.model.x": [1]}, "the SDXL refiner", "SDXL base"),
    ({UNET_IN: [320, 9, 3, 3], "cond_stage_model.transformer.x": [1]}, "an inpainting model", "plain model"),
    ({UNET_IN: [320, 9, 3, 3], "conditioner.embedders.1.model.x": [1]}, "an inpainting model", "plain"),
    ({UNET_IN: [320, 8, 3, 3]}, "a model that changes pictures", "SDXL"),
    ({UNET_IN: [256, 7, 3, 3]}, "an upscaler", "SDXL"),
    ({UNET_IN: [320, 5, 3, 3]}, "a model that wants a depth map", "SDXL"),
    ({UNET_IN: [320, 4, 3, 3], "edm_mean": [4]}, "an SDXL model with EDM's noise", "SDXL"),
    ({UNET_IN: [320, 4, 3, 3], "scaled_fp8": [0]}, "a quantized model", "fp16"),
    ({UNET_IN: [320, 4, 3, 3]}, "a U-Net without a text encoder", "U-Net, text encoder and VAE"),
    ({"input_blocks.0.0.weight": [320, 4, 3, 3]}, "a U-Net without a text encoder", "U-Net, text encoder"),
    ({"down_blocks.0.x": [1]}, "a U-Net in diffusers' format", "convert_diffusers"),
    ({"text_model.embeddings.x": [1]}, "a text encoder", "full checkpoint"),
    ({"cond_stage_model.transformer.text_model.x": [1]}, "a text encoder", "full checkpoint"),
    ({"encoder.block.0.layer.0.x": [1]}, "a text encoder", "full checkpoint"),
    ({"encoder.conv_in.weight": [1]}, "a VAE", "channel vae"),
    ({"first_stage_model.encoder.conv_in.weight": [1]}, "a VAE", "channel vae"),
    ({"strange.weight": [1]}, "something else .its first tensor is strange.weight", "SDXL"),
    ({}, "something else .its first tensor is missing", "SDXL"),
]  # fmt: skip


@pytest.mark.parametrize(("shapes", "named", "fix"), OTHERS)
def test_other_models_are_named(shapes: dict[str, list[int]], named: str, fix: str) -> None:
    with pytest.raises(NotABaseModel, match=f"it is {named}") as told:
        identify(header(shapes))
    assert re.search(fix, told.value.fix)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("added", "named"),
    [
        ({UNET_IN: [320, 9, 3, 3]}, "an inpainting model"),
        ({"lora_unet_x.alpha": []}, "a LoRA"),
        ({"control_model.x": [1]}, "a ControlNet"),
        ({"edm_vpred.sigma_max": []}, "EDM's noise"),
    ],
)
def test_a_whole_base_model_with_something_else_in_it(
    kind: Kind, added: dict[str, list[int]], named: str
) -> None:
    with pytest.raises(NotABaseModel, match=named):
        identify(header({**names_and_shapes(f"base_{kind}"), **added}))


@pytest.mark.parametrize(
    ("kind", "gone", "part"),
    [
        ("sd15", "first_stage_model.decoder.", "VAE"),
        ("sd15", "first_stage_model.encoder.", "VAE"),
        ("sd15", "first_stage_model.", "VAE"),
        ("sd15", "cond_stage_model.", "text encoder"),
        ("sd15", "cond_stage_model.transformer.text_model.encoder.layers.11.", "text encoder"),
        ("sd15", "model.diffusion_model.middle_block.1.", "U-Net"),
        ("sd15", "model.diffusion_model.output_blocks.11.", "U-Net"),
        ("sd15", "model.diffusion_model.out.", "U-Net"),
        ("sdxl", "first_stage_model.", "VAE"),
        ("sdxl", "conditioner.embedders.0.", "text encoder"),
        ("sdxl", "conditioner.embedders.1.", "text encoder"),
        ("sdxl", "conditioner.embedders.1.model.transformer.resblocks.31.", "text encoder"),
        ("sdxl", "model.diffusion_model.middle_block.1.", "U-Net"),  # SSD-1B
        ("sdxl", "model.diffusion_model.output_blocks.5.", "U-Net"),
        ("sdxl", "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.", "U-Net"),
        ("sdxl", "model.diffusion_model.out.", "U-Net"),
    ],
)
def test_a_model_without_one_of_its_parts(kind: Kind, gone: str, part: str) -> None:
    shapes = names_and_shapes(f"base_{kind}")
    left = {name: shape for name, shape in shapes.items() if not name.startswith(gone)}
    with pytest.raises(NotABaseModel, match=f"it is an {kind} model whose {part} lacks {re.escape(gone)}"):
        identify(header(left))


U, V = "model.diffusion_model.", "first_stage_model."
L, G = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
CLIP = "cond_stage_model.transformer.text_model."


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("sd15", name) for name in (
            f"{U}middle_block.1.proj_in.weight",
            f"{U}output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight", f"{U}out.2.weight",
            f"{CLIP}embeddings.token_embedding.weight", f"{CLIP}encoder.layers.11.mlp.fc2.weight",
            f"{V}encoder.conv_in.weight", f"{V}decoder.conv_out.weight",
        )),
        *(("sdxl", name) for name in (
            f"{U}input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight",
            f"{U}middle_block.1.transformer_blocks.9.attn2.to_k.weight",
            f"{U}output_blocks.5.1.transformer_blocks.1.attn2.to_k.weight", f"{U}out.2.weight",
            f"{L}embeddings.token_embedding.weight", f"{L}encoder.layers.11.mlp.fc2.weight",
            f"{G}token_embedding.weight", f"{G}transformer.resblocks.31.mlp.c_proj.weight",
            f"{V}encoder.conv_in.weight", f"{V}decoder.conv_out.weight",
        )),
    ],
)  # fmt: skip
def test_a_model_without_a_tensor_at_one_of_its_ends(kind: Kind, name: str) -> None:
    shapes = names_and_shapes(f"base_{kind}")
    del shapes[name]
    with pytest.raises(NotABaseModel, match=f"lacks {re.escape(name)}, and perhaps more"):
        identify(header(shapes))


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_weights_that_are_precise_enough(dtype: str) -> None:
    facts = header(names_and_shapes("base_sd15"))
    assert identify({name: {**fact, "dtype": dtype} for name, fact in facts.items()}) == "sd15"


def test_sd15s_text_encoder_in_its_older_form() -> None:
    shapes = names_and_shapes("base_sd15")
    assert (
        identify(header({name.replace("text_model.", ""): shape for name, shape in shapes.items()})) == "sd15"
    )


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8"])
def test_weights_that_are_too_coarse(dtype: str) -> None:
    facts = header(names_and_shapes("base_sdxl"))
    facts["model.diffusion_model.out.2.weight"]["dtype"] = dtype
    with pytest.raises(NotABaseModel, match=f"weights of the type {dtype}"):
        identify(facts)


@pytest.mark.parametrize("kind", KINDS)
def test_what_base_models_hold_besides_is_no_matter(kind: Kind) -> None:
    more = {"model_ema.decay": [], "betas": [1000], "cond_stage_model.logit_scale": [], "v_pred": [0]}
    assert identify(header({**names_and_shapes(f"base_{kind}"), **more})) == kind


@pytest.mark.parametrize(
    ("names", "metadata", "v", "zero_snr"),
    [
        ([], {}, None, False),
        (["v_pred"], {}, True, False),
        (["v_pred", "ztsnr"], {"modelspec.prediction_type": "epsilon"}, True, True),
        ([], {"modelspec.prediction_type": "v"}, True, False),
        ([], {"modelspec.prediction_type": "epsilon"}, False, False),
    ],
)
def test_what_a_model_predicts(
    names: list[str], metadata: dict[str, str], v: bool | None, zero_snr: bool
) -> None:
    assert checkpoint.prediction(dict.fromkeys(names), metadata) == checkpoint.Prediction(v, zero_snr)


def test_a_lora_that_works_is_told_with_its_facts(lora: dict[str, np.ndarray], tmp_path: Path) -> None:
    found = verify_lora(saved(lora, tmp_path / "x.safetensors"), expected("sd15", PLAIN))
    assert (found.modules, found.rank, found.bytes) == (264, 4, found.path.stat().st_size)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_lora_works_in_every_precision_that_programs_load(
    lora: dict[str, np.ndarray], dtype: Any, tmp_path: Path
) -> None:
    path = saved({name: tensor.astype(dtype) for name, tensor in lora.items()}, tmp_path / "x.safetensors")
    assert verify_lora(path, expected("sd15", PLAIN)).rank == 4


def test_a_lora_of_whole_numbers_is_refused(lora: dict[str, np.ndarray], tmp_path: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"
    path = saved({**lora, name: lora[name].astype(np.int8)}, tmp_path / "x.safetensors")
    with pytest.raises(BadLora, match="holds numbers of type I8, which no program loads as a LoRA"):
        verify_lora(path, expected("sd15", PLAIN))


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
