"""What networks must leave, against key names and blocks that sd-scripts itself made of full-size models."""

import json
from pathlib import Path
from typing import Any

import pytest

from kohya.config import KINDS, Kind
from kohya.networks import ARGUMENTS, block_of, convolutions, expected, modules, problems

DATA = Path(__file__).parents[1] / "data"
LORA = {"network_module": "networks.lora", "network_dim": 8}
TEXT = {"sd15": 72, "sdxl": 264}  # modules in the text encoders


def facts(name: str, kind: Kind) -> Any:
    return json.loads((DATA / f"{name}_{kind}.json").read_text())


def told(kind: Kind, *arguments: str, **values: object) -> str:
    found = problems(kind, {**LORA, "network_args": list(arguments), **values})
    return " ".join(f"{name}: {wrong}. {fix}" for name, wrong, fix in found)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_are_those_that_sd_scripts_makes(kind: Kind) -> None:
    assert set(modules(kind)) == {name.split(".")[0] for name in facts("lora", kind)}
    assert set(convolutions(kind)) == {name.split(".")[0] for name in facts("locon", kind)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_halves_of_a_lora_make_the_whole(kind: Kind) -> None:
    unet, text = modules(kind, text_encoders=False), modules(kind, unet=False)
    assert all(name.startswith("lora_unet_") for name in unet)
    assert sorted(unet + text) == sorted(modules(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_counted_as_sd_scripts_counts_them(kind: Kind) -> None:
    blocks = facts("blocks", kind)
    assert {name: block_of(kind, name) for name in blocks} == blocks


@pytest.mark.parametrize("kind", KINDS)
def test_conv_dim_is_the_rank_of_3x3_convolutions_alone(kind: Kind) -> None:
    made = expected(kind, {**LORA, "network_args": ["conv_dim=2"]}).modules
    shapes = {
        name.split(".")[0]: shape
        for name, shape in facts("locon", kind).items()
        if name.endswith(".lora_down.weight")
    }
    assert {name: made[name] for name in shapes} == {
        name: 2 if shape[2:] == [3, 3] else 8 for name, shape in shapes.items()
    }
    assert len(made) == len(modules(kind)) + len(shapes)


@pytest.mark.parametrize(
    ("kind", "arguments", "left", "rank"),
    [
        # counted in networks that sd-scripts made of full-size models
        ("sd15", [f"block_dims={','.join(['8'] * 20 + ['0'] * 5)}"], 204, 8),
        ("sdxl", [f"block_dims={','.join(['8'] * 20 + ['0'] * 3)}"], 986, 8),
        ("sd15", [f"block_dims={','.join(['8'] * 20 + ['0'] * 5)}", "conv_dim=8"], 280, 8),
        ("sdxl", [f"block_dims={','.join(['8'] * 20 + ['0'] * 3)}", "conv_dim=8"], 1048, 8),
        ("sd15", ["down_lr_weight=0,0,0,1"], 240, 8),
        ("sd15", ["mid_lr_weight=0"], 252, 8),
        ("sd15", ["up_lr_weight=zeros"], 156, 8),
        ("sdxl", ["up_lr_weight=zeros"], 614, 8),
        ("sd15", ["up_lr_weight=zeros+.5"], 264, 8),
        ("sdxl", ["mid_lr_weight=1,0,1"], 884, 8),
        ("sd15", ["up_lr_weight=sine"], 264, 8),
        ("sdxl", ["up_lr_weight=sine"], 884, 8),
        ("sdxl", ["up_lr_weight=linear"], 884, 8),
        ("sdxl", ["down_lr_weight=cosine"], 884, 8),
        ("sdxl", ["down_lr_weight=reverse_linear"], 884, 8),
        ("sdxl", ["down_lr_weight=.1,.1,.1,.1,.1,.1,1", "block_lr_zero_threshold=.5"], 942, 8),
        ("sd15", ["down_lr_weight=.1,.1,.1,.1,.1,.1,1", "block_lr_zero_threshold=.5"], 216, 8),
    ],
)
def test_blocks_without_a_rank_or_rate_are_left_out(
    kind: Kind, arguments: list[str], left: int, rank: int
) -> None:
    made = expected(kind, {**LORA, "network_args": arguments}).modules
    assert len(made) == left
    assert {made[name] for name in made if name.startswith("lora_unet_")} == {rank}


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({}, {"lora_unet", "lora_te"}),
        ({"network_train_unet_only": True}, {"lora_unet"}),
        ({"network_train_text_encoder_only": True}, {"lora_te"}),
        ({"text_encoder_lr": [0.0]}, {"lora_unet"}),
        ({"learning_rate": 0.0, "unet_lr": 1e-4}, {"lora_unet"}),
        ({"unet_lr": 0.0}, {"lora_te"}),
    ],
)
def test_what_was_trained_follows_the_learning_rates(values: dict[str, Any], parts: set[str]) -> None:
    assert expected("sd15", {**LORA, **values}).parts == parts


@pytest.mark.parametrize(
    ("preset", "left"),
    [
        ("attn-mlp", 264), ("attn-only", 176), ("unet-transformer-only", 192), ("unet-convblock-only", 86),
    ],
)  # fmt: skip
def test_a_preset_of_lycoris_says_what_is_trained_at_least(preset: str, left: int) -> None:
    values = {"network_module": "lycoris.kohya", "network_args": [f"preset={preset}"]}
    made = expected("sd15", values)
    assert (len(made.modules), made.more) == (left, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["conv_dmi=4"], "networks.lora does not know conv_dmi, and would ignore it"),
        (["conv_dim"], "'conv_dim' is not name=value"),
        (["conv_dim=four"], "conv_dim=four: it is not a whole number"),
        (["conv_dim=4.5"], "it is not a whole number"),
        (["rank_dropout=x"], "it is not a number"),
        (["conv_alpha=1,2"], "conv_alpha=1,2: it is not a number"),
        (["dropout=0.1"], "Write network_dropout instead"),
        (["block_dims=1,2"], "sd15 has 25 blocks"),
        (["up_lr_weight=1"], "sd15 has 12 such blocks"),
        (["up_lr_weight=sinus"], "sd15 has 12 such blocks"),
        (["block_alphas=" + ",".join(["1"] * 25)], "counts only beside block_dims"),
    ],
)
def test_arguments_that_the_network_does_not_know_are_refused(arguments: list[str], said: str) -> None:
    assert said in told("sd15", *arguments)


def test_a_rank_above_that_of_any_layer() -> None:
    assert told("sd15", network_dim=4096) == ""
    assert "network_dim: network_dim is above 4096, more than any layer has" in told("sd15", network_dim=4097)


def test_networks_that_make_no_lora_are_refused() -> None:
    assert "networks.lora_flux is not one of networks.lora" in told(
        "sd15", network_module="networks.lora_flux"
    )
    assert "it is not set" in told("sd15", network_module="")


def test_dylora() -> None:
    dylora = {"network_module": "networks.dylora"}
    assert told("sd15", "unit=4", "conv_dim=8", **dylora) == ""
    assert "no multiple of unit=3" in told("sd15", "unit=3", **dylora)
    assert "unit=2.5: it is not a whole number" in told("sd15", "unit=2.5", **dylora)
    assert "networks.dylora has one rank" in told("sd15", "conv_dim=4", **dylora)
    assert "loses one of them" in told("sdxl", **dylora)
    assert told("sdxl", network_train_unet_only=True, **dylora) == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["algo=lokr", "preset=attn-mlp", "factor=-1", "use_tucker=True"], ""),
        (["algo=ia3", "preset=attn-mlp"], "algo=ia3: it is not one of lora, locon, dylora, loha, lokr"),
        (["preset=attn-mpl"], "preset=attn-mpl: it is not one of"),
        (["preset=attn-mlp", "use_tucker=0"], "it is neither True nor False"),
        (["preset=attn-mlp", "decompose_both=False"], "any text counts as true"),
        (["preset=attn-mlp", "factor=8.5"], "factor=8.5: it is not a whole number"),
        (["preset=attn-mlp", "block_size=4.5"], "block_size=4.5: it is not a whole number"),
        ([], "names two layers of SD1.5 twice"),
    ],
)
def test_lycoris(arguments: list[str], said: str) -> None:
    found = told("sd15", *arguments, network_module="lycoris.kohya")
    assert said in found
    assert bool(said) == bool(found)


def test_every_known_argument_has_a_value_that_is_taken() -> None:
    for module, names in ARGUMENTS.items():
        for name in names:
            assert "does not know" not in told("sd15", f"{name}=1", network_module=module)


def test_the_arguments_that_each_network_knows() -> None:
    """lora.py:389-500, dylora.py:191-220 of v0.10.1; lycoris/kohya.py:46-99 of 4.1.3."""
    ratios = "loraplus_lr_ratio loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio "
    conv = "conv_dim conv_alpha rank_dropout module_dropout "
    blocks = """block_dims block_alphas conv_block_dims conv_block_alphas down_lr_weight mid_lr_weight
        up_lr_weight block_lr_zero_threshold """
    lycoris = """algo preset dropout block_size constraint constrain decompose_both factor use_conv_cp use_cp
        use_tucker use_scalar train_norm rescaled dora_wd wd_on_output full_matrix bypass_mode rs_lora
        unbalanced_factorization warn_on_unmatched """
    known = {
        "networks.lora": conv + blocks + ratios,
        "networks.lora_fa": conv,
        "networks.dylora": "conv_dim conv_alpha unit " + ratios,
        "lycoris.kohya": conv + lycoris + ratios,
    }
    assert {module: sorted(names) for module, names in ARGUMENTS.items()} == {
        module: sorted(names.split()) for module, names in known.items()
    }


@pytest.mark.parametrize(
    "name",
    [
        "use_conv_cp", "use_cp", "use_tucker", "use_scalar", "train_norm", "rescaled", "dora_wd",
        "wd_on_output", "full_matrix", "bypass_mode", "rs_lora", "unbalanced_factorization",
        "warn_on_unmatched",
    ],
)  # fmt: skip
def test_a_flag_of_lycoris_is_true_or_false(name: str) -> None:
    lycoris = {"network_module": "lycoris.kohya"}
    assert f"{name}=1: it is neither True nor False" in told("sdxl", f"{name}=1", **lycoris)
    assert told("sdxl", f"{name}=True", **lycoris) == ""


@pytest.mark.parametrize("name", ["block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"])
def test_a_number_for_each_block(name: str) -> None:
    dims = [] if name == "block_dims" else ["block_dims=" + ",".join(["1"] * 23)]
    assert told("sdxl", *dims, f"{name}=" + ",".join(["1"] * 23)) == ""
    assert f"{name}=1,1: sdxl has 23 blocks" in told("sdxl", *dims, f"{name}=1,1")
    assert ("dims" in name) == ("sdxl has 23 blocks" in told("sdxl", *dims, f"{name}=.5" + ",1" * 22))


@pytest.mark.parametrize("name", ["block_alphas", "conv_block_dims", "conv_block_alphas"])
def test_what_counts_only_beside_block_dims(name: str) -> None:
    assert f"{name} counts only beside block_dims" in told("sdxl", f"{name}=" + ",".join(["1"] * 23))


@pytest.mark.parametrize(("preset", "left"), [("full", 986), ("full-lin", 986), ("unet-only", 722)])
def test_presets_of_lycoris_that_sdxl_can_be_trained_with(preset: str, left: int) -> None:
    values = {"network_module": "lycoris.kohya", "network_args": [f"preset={preset}"]}
    assert list(problems("sdxl", values)) == []
    assert len(expected("sdxl", values).modules) == left
    assert f"LyCORIS' preset {preset} names two layers of SD1.5 twice" in str(list(problems("sd15", values)))


def test_a_preset_without_what_alone_is_trained() -> None:
    only = {"network_module": "lycoris.kohya", "network_train_text_encoder_only": True}
    said = told("sdxl", "preset=unet-transformer-only", **only)
    assert "preset=unet-transformer-only holds no text encoder, and only that is trained" in said


def test_the_tensors_of_a_module() -> None:
    """lycoris/modules/locon.py, loha.py, lokr.py, norms.py: what is always there, and what may be."""
    lora = ("alpha lora_down.weight lora_up.weight", "lora_mid.weight dora_scale")
    left, right = ("lokr_w1", "lokr_w1_a lokr_w1_b"), ("lokr_w2", "lokr_w2_a lokr_w2_b")
    forms = {
        "lora": [lora],
        "locon": [lora],
        "dylora": [lora],
        "loha": [("alpha hada_w1_a hada_w1_b hada_w2_a hada_w2_b", "hada_t1 hada_t2 dora_scale")],
        "lokr": [(f"alpha {one} {two}", "lokr_t2 dora_scale") for one in left for two in right],
    }
    for algo, made in forms.items():
        args = [f"algo={algo}", "train_norm=True"]
        found = expected("sdxl", {"network_module": "lycoris.kohya", "network_args": args}).forms
        spelled = [
            (set(needed.split()), set(more.split())) for needed, more in [*made, ("w_norm b_norm", "")]
        ]
        assert list(found) == spelled
    assert expected("sd15", LORA).forms == (({"alpha", "lora_down.weight", "lora_up.weight"}, set()),)
