"""The networks that a LoRA can be trained with, their network_args, and what each must leave.

Facts: networks/lora.py, lora_fa.py and dylora.py of sd-scripts v0.10.1; lycoris/kohya.py of lycoris-lora
4.1.3, which sd-scripts does not pin. sd-scripts hands every network_args to the network, and what the network
does not know it drops without a word (train_network.py:659-663).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kohya.config import Kind

LYCORIS = "lycoris.kohya"
_RATIOS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
_BLOCKS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")  # one number a block
_WEIGHTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
_CONV = ("conv_dim", "conv_alpha", "rank_dropout", "module_dropout")
_FLAGS = ("use_conv_cp", "use_cp", "use_tucker", "use_scalar", "train_norm", "rescaled", "dora_wd",
          "wd_on_output", "full_matrix", "bypass_mode", "rs_lora", "unbalanced_factorization",
          "warn_on_unmatched")  # fmt: skip
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "networks.lora": (*_CONV, *_BLOCKS, *_WEIGHTS, "block_lr_zero_threshold", *_RATIOS),  # lora.py:389-500
    "networks.lora_fa": _CONV,
    "networks.dylora": ("conv_dim", "conv_alpha", "unit", *_RATIOS),  # dylora.py:191-220
    LYCORIS: (*_CONV, "algo", "preset", "dropout", "block_size", "constraint", "constrain", "decompose_both",
              "factor", *_FLAGS, *_RATIOS),  # lycoris/kohya.py:46-99
}  # fmt: skip
_LARGEST_RANK = 4096
_WHOLE = ("conv_dim", "unit", "block_size", "factor")
_SHAPES = ("cosine", "sine", "linear", "reverse_linear", "zeros")  # of block weights (lora.py:606-624)
# blocks in all, down and up, in the middle (lora.py:863-866)
_COUNTS = {"sd15": (25, 12, 1), "sdxl": (23, 9, 3)}

# What each preset of lycoris-lora trains of the modules that networks.lora trains; more is up to its version.
# Its preset ia3 finds no module in either kind.
_PRESETS = {
    "full": "", "full-lin": "", "attn-mlp": "", "attn-only": r"_attn[12]?_",
    "unet-only": "^lora_unet_", "unet-transformer-only": "^lora_unet_", "unet-convblock-only": "^$",
}  # fmt: skip
_LORA = ({"alpha", "lora_down.weight", "lora_up.weight"}, {"lora_mid.weight", "dora_scale"})
_Forms = tuple[tuple[set[str], set[str]], ...]  # the tensors that a module consists of: needed, and more
_FORMS: Mapping[str, _Forms] = {
    **dict.fromkeys(("lora", "locon", "dylora"), (_LORA,)),
    "loha": (
        (
            {"alpha", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
            {"hada_t1", "hada_t2", "dora_scale"},
        ),
    ),
    "lokr": tuple(
        ({"alpha", *one, *two}, {"lokr_t2", "dora_scale"})
        for one in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
        for two in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})
    ),
}
_NORM = ({"w_norm", "b_norm"}, set[str]())

Wrong = tuple[str, str]  # what is wrong, the way out


@dataclass(frozen=True)
class Expected:
    """What a LoRA must hold."""

    modules: Mapping[str, int | None]  # name → rank; None where the rank does not show in the shapes
    more: bool  # whether there may be modules besides
    forms: _Forms
    parts: frozenset[str]  # what was trained: lora_unet, lora_te, lora_te1, lora_te2


def arguments(values: Mapping[str, Any]) -> dict[str, str]:
    """network_args by name."""
    return dict(str(pair).split("=", 1) for pair in values.get("network_args") or () if "=" in str(pair))


def rates(values: Mapping[str, Any]) -> tuple[float, float]:
    """The learning rates of the U-Net and of the text encoders; 0 for what is not trained.

    sd-scripts takes the first of several text_encoder_lr (train_network.py:737-744).
    """
    usual = values.get("learning_rate", 2e-6)
    listed: Any = values.get("text_encoder_lr")
    text = listed[0] if isinstance(listed, list) and listed else listed
    unet_rate = 0 if values.get("network_train_text_encoder_only") else values.get("unet_lr", usual)
    text_rate = 0 if values.get("network_train_unet_only") else usual if text is None else text
    return float(unet_rate), float(text_rate)


def problems(kind: Kind, values: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What keeps a network from being trained as it is asked for: the option, what is wrong, the way out."""
    module = str(values.get("network_module", ""))
    if module not in ARGUMENTS:
        told = f"network_module = {module} is not one of" if module else "it is not set; there are"
        fix = "Write network_module = networks.lora"
        yield "network_module", f"{told} {', '.join(ARGUMENTS)}", fix
        return
    if module != LYCORIS and int(values.get("network_dim", 4)) > _LARGEST_RANK:
        wrong = f"network_dim is above {_LARGEST_RANK}, more than any layer has"
        yield "network_dim", wrong, "Write network_dim = 32"
    if module == "networks.dylora" and kind == "sdxl" and not values.get("network_train_unet_only"):
        # dylora.py:326: both text encoders are lora_te there, and the second overwrites the first
        wrong = "networks.dylora gives both text encoders of SDXL the same key names, and loses one of them"
        yield "network_module", wrong, "Write network_train_unet_only = true, or take networks.lora"
    found = arguments(values)
    for pair in values.get("network_args") or ():
        name, equals, value = str(pair).partition("=")
        if not equals:
            yield "network_args", f"{pair!r} is not name=value", "Write for example conv_dim=8"
        elif name not in ARGUMENTS[module]:
            known = ", ".join(ARGUMENTS[module])
            wrong = f"{module} does not know {name}, and would ignore it; it knows {known}"
            fix = "Write network_dropout instead" if name == "dropout" else "Remove it, or correct its name"
            yield "network_args", wrong, fix
        elif fault := _value(kind, name, value):
            yield "network_args", f"{name}={value}: {fault[0]}", fault[1]
    yield from _together(kind, module, found, values)


def expected(kind: Kind, values: Mapping[str, Any]) -> Expected:
    """What a LoRA trained with these options must hold."""
    module, found = values["network_module"], arguments(values)
    unet, text = not values.get("network_train_text_encoder_only"), not values.get("network_train_unet_only")
    names = modules(kind, unet=unet, text_encoders=text)
    parts = {part(name) for name, rate in _with_rates(names, values) if rate}
    if module == LYCORIS:
        preset = found.get("preset", "full")
        inside = [name for name in names if re.search(_PRESETS[preset], name)]
        if "convblock" in preset and unet:
            inside, parts = convolutions(kind), {"lora_unet"}
        algo, norm = found.get("algo", "lora").lower(), found.get("train_norm", "false").lower() == "true"
        forms = (*_FORMS[algo], *((_NORM,) if norm else ()))
        return Expected(
            dict.fromkeys(inside), True, forms, frozenset(parts & {part(name) for name in inside})
        )
    ranks = {name: rank for name in names if (rank := _rank(kind, name, found, values))}
    if unet and ("conv_dim" in found or "conv_block_dims" in found):
        ranks |= {name: rank for name in convolutions(kind) if (rank := _rank(kind, name, found, values))}
    # dim_from_weights takes modules and ranks from its file. base_weights make sd-scripts train the resnets'
    # modules as well: it extends its class's own list of targets in place (lora.py:1046-1048).
    from_file = values.get("dim_from_weights")
    known = {name: None if from_file else rank for name, rank in ranks.items()}
    more = bool(from_file or values.get("base_weights"))
    return Expected(known, more, ((_LORA[0], set()),), frozenset(parts & {part(name) for name in ranks}))


def modules(kind: Kind, *, unet: bool = True, text_encoders: bool = True) -> list[str]:
    """The modules of a LoRA by networks.lora: 264 for SD1.5, 986 for SDXL.

    tests/data/lora_<kind>.json holds the same names as sd-scripts itself makes them.
    """
    names = []
    if text_encoders:
        for prefix, layers in (("te", 12),) if kind == "sd15" else (("te1", 12), ("te2", 32)):
            blocks = [f"lora_{prefix}_text_model_encoder_layers_{layer}" for layer in range(layers)]
            names += [f"{block}_{part}" for block in blocks for part in _TEXT_PARTS]
    if unet:
        depths = _SD15_ATTENTIONS if kind == "sd15" else _SDXL_ATTENTIONS
        names += [
            f"lora_unet_{name}_{part}" for name, depth in depths.items() for part in _attention_parts(depth)
        ]
    return names


def convolutions(kind: Kind) -> list[str]:
    """The modules that conv_dim adds: 86 for SD1.5, 66 for SDXL (lora.py:870, 1055).

    tests/data/locon_<kind>.json holds the same names as sd-scripts itself makes them.
    """
    if kind == "sd15":
        resnets = {f"down_blocks_{block}_resnets_{layer}": block in (1, 2) and layer == 0
                   for block in range(4) for layer in range(2)}  # fmt: skip
        resnets |= {f"mid_block_resnets_{layer}": False for layer in range(2)}
        resnets |= {f"up_blocks_{block}_resnets_{layer}": True for block in range(4) for layer in range(3)}
        inner, shortcut = ("conv1", "time_emb_proj", "conv2"), "conv_shortcut"
        others = [f"{way}_blocks_{block}_{way}samplers_0_conv"
                  for way, blocks in (("down", range(3)), ("up", range(3))) for block in blocks]  # fmt: skip
    else:
        resnets = {f"input_blocks_{block}_0": block in (4, 7) for block in (1, 2, 4, 5, 7, 8)}
        resnets |= {f"middle_block_{layer}": False for layer in (0, 2)}
        resnets |= {f"output_blocks_{block}_0": True for block in range(9)}
        inner, shortcut = ("in_layers_2", "emb_layers_1", "out_layers_3"), "skip_connection"
        others = [
            "input_blocks_3_0_op", "input_blocks_6_0_op", "output_blocks_2_2_conv", "output_blocks_5_2_conv"
        ]  # fmt: skip
    names = [f"{name}_{part}" for name, widens in resnets.items()
             for part in (*inner, *((shortcut,) if widens else ()))]  # fmt: skip
    return [f"lora_unet_{name}" for name in (*names, *others)]


_TEXT_PARTS = (*(f"self_attn_{which}_proj" for which in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2")
_SD15_ATTENTIONS = {  # block → transformer blocks in it
    **{f"down_blocks_{block}_attentions_{layer}": 1 for block in range(3) for layer in range(2)},
    "mid_block_attentions_0": 1,
    **{f"up_blocks_{block}_attentions_{layer}": 1 for block in range(1, 4) for layer in range(3)},
}
_SDXL_ATTENTIONS = {
    "input_blocks_4_1": 2, "input_blocks_5_1": 2, "input_blocks_7_1": 10, "input_blocks_8_1": 10,
    "middle_block_1": 10,
    "output_blocks_0_1": 10, "output_blocks_1_1": 10, "output_blocks_2_1": 10,
    "output_blocks_3_1": 2, "output_blocks_4_1": 2, "output_blocks_5_1": 2,
}  # fmt: skip


def _attention_parts(depth: int) -> list[str]:
    """The LoRA modules of one attention block with `depth` transformer blocks."""
    attention = [f"attn{number}_to_{which}" for number in (1, 2) for which in ("q", "k", "v", "out_0")]
    inner = [f"transformer_blocks_{block}_{part}" for block in range(depth)
             for part in (*attention, "ff_net_0_proj", "ff_net_2")]  # fmt: skip
    return ["proj_in", "proj_out", *inner]


def block_of(kind: Kind, module: str) -> int:
    """The number of a U-Net module's block, as block_dims counts (lora.py:719-755)."""
    if kind == "sdxl":
        place, number = re.findall(r"_(input|middle|output)_blocks?_(\d+)", module)[0]
        return {"input": 1, "middle": 10, "output": 13}[place] + int(number)
    if "_mid_block_" in module:
        return 12
    way, block, part, layer = re.findall(r"_(down|up)_blocks_(\d+)_([a-z]+)_(\d+)", module)[0]
    within = 2 if part.endswith("samplers") else int(layer)
    return {"down": 1, "up": 13}[way] + 3 * int(block) + within


_CONV_3X3 = re.compile(r"_(conv1|conv2|samplers_0_conv|downsamplers_0_conv|upsamplers_0_conv|in_layers_2"
                       r"|out_layers_3|op|2_conv)$")  # fmt: skip


def _rank(kind: Kind, module: str, found: Mapping[str, str], values: Mapping[str, Any]) -> int | None:
    """The rank of a module of sd-scripts' own networks; 0 or None where there is none (lora.py:975-1003)."""
    usual, conv = int(values.get("network_dim", 4)), int(found.get("conv_dim", 0))
    is_conv = bool(_CONV_3X3.search(module))
    if not module.startswith("lora_unet_") or not found.keys() & {"block_dims", *_WEIGHTS}:
        return conv if is_conv else usual
    number = block_of(kind, module)
    if _weight(kind, number, found) == 0:
        return 0
    listed = found.get("conv_block_dims" if is_conv else "block_dims")
    return int(listed.split(",")[number]) if listed else conv if is_conv else usual


def _weight(kind: Kind, number: int, found: Mapping[str, str]) -> float:
    """What a block's learning rate is multiplied with (lora.py:578-700): 0 leaves the block out."""
    _, ends, middle = _COUNTS[kind]
    first = 0 if kind == "sd15" else 1  # SDXL's lists leave its first and last block out, which have no LoRA
    place = number - first
    for name, count in zip(_WEIGHTS, (ends, middle, ends), strict=True):
        if 0 <= place < count:
            least = float(found.get("block_lr_zero_threshold", 0))
            weight = _weights(found.get(name), count)[place]
            return weight if weight > least or name not in found else 0
        place -= count
    return 1


def _weights(text: str | None, count: int) -> list[float]:
    """The weights of `count` blocks: numbers, of which missing ones are 1, or the name of a curve."""
    if text is None:
        return [1.0] * count
    name, _, base = text.partition("+")
    if name not in _SHAPES:
        return [*(float(number or 0) for number in text.split(",")), *[1.0] * count][:count]
    rising = [place / max(count - 1, 1) for place in range(count)]
    if name in ("cosine", "reverse_linear"):
        rising.reverse()
    return [(0 if name == "zeros" else weight) + float(base or 0) for weight in rising]  # only 0 matters here


def _with_rates(names: Sequence[str], values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    unet, text = rates(values)
    yield from ((name, unet if name.startswith("lora_unet_") else text) for name in names)


def part(module: str) -> str:
    """The part of the model that a module belongs to: lora_unet, lora_te, lora_te1, lora_te2."""
    return "_".join(module.split("_")[:2])


def _value(kind: Kind, name: str, value: str) -> Wrong | None:  # noqa: PLR0911 (one answer a kind of value)
    """What is wrong with one value of network_args, if anything is."""
    blocks, ends, middle = _COUNTS[kind]
    if name in _FLAGS:
        # lycoris/utils: str_bool takes everything but "false" for true
        fits = value.lower() in ("true", "false")
        return None if fits else ("it is neither True nor False", f"Write {name}=True")
    if name == "decompose_both":  # lycoris/kohya.py:164 takes the text itself: False would be true
        return None if value == "True" else ("any text counts as true", "Write True, or remove it")
    if name == "algo":
        fits = value.lower() in _FORMS
        return None if fits else (f"it is not one of {', '.join(_FORMS)}", "Write algo=locon")
    if name == "preset":
        fits = value in _PRESETS
        return None if fits else (f"it is not one of {', '.join(_PRESETS)}", "Write preset=attn-mlp")
    if name in _BLOCKS:
        fits = _numbers(value, whole="dims" in name) == blocks
        return None if fits else (f"{kind} has {blocks} blocks", f"Write {blocks} numbers with commas")
    if name in _WEIGHTS:
        count = middle if name == "mid_lr_weight" else ends
        if name != "mid_lr_weight" and re.fullmatch(rf"({'|'.join(_SHAPES)})(\+\d*\.?\d+)?", value):
            return None
        fits = 0 < _numbers(value) <= count and (name == "mid_lr_weight" or "," in value)
        return None if fits else (f"{kind} has {count} such blocks", f"Write {count} numbers with commas")
    whole = name in _WHOLE
    least = -1 if name == "factor" else 0
    fits = _numbers(value, whole=whole) == 1 and "," not in value and float(value) >= least
    return None if fits else (f"it is not a {'whole ' if whole else ''}number", f"Write for example {name}=1")


def _numbers(text: str, *, whole: bool = False) -> int:
    """How many numbers a text lists; 0 where it holds something else."""
    try:
        return len([(int if whole else float)(number) for number in text.split(",")])
    except ValueError:
        return 0


def _together(
    kind: Kind, module: str, found: Mapping[str, str], values: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """Arguments that do not go together."""
    dim = values.get("network_dim", 4)
    lonely = [name for name in _BLOCKS[1:] if name in found]
    if lonely and not found.keys() & {"block_dims", *_WEIGHTS}:
        wrong = f"{lonely[0]} counts only beside block_dims, and would be ignored"
        yield "network_args", wrong, "Add block_dims, or remove it"
    if module == "networks.dylora":
        unit = found.get("unit", "1")
        if unit.isdecimal() and (int(unit) < 1 or dim % int(unit)):
            yield (
                "network_args",
                f"network_dim = {dim} is no multiple of unit={unit}",
                "Change one of the two",
            )
        if "conv_dim" in found and found["conv_dim"] != str(dim):
            wrong = f"conv_dim={found['conv_dim']} is not network_dim = {dim}: networks.dylora has one rank"
            yield "network_args", wrong, f"Write conv_dim={dim}"
    if module == LYCORIS and found.get("preset", "full") in _PRESETS:
        preset = found.get("preset", "full")
        if kind == "sd15" and preset in ("full", "full-lin", "unet-only"):
            # measured with 4.1.3: its preset names the time embedding twice, as TimestepEmbedding too
            wrong = f"LyCORIS' preset {preset} names two layers of SD1.5 twice, and ends in an error"
            yield "network_args", wrong, "Write preset=attn-mlp, attn-only or unet-transformer-only"
        if preset.startswith("unet-") and values.get("network_train_text_encoder_only"):
            yield (
                "network_args",
                f"preset={preset} holds no text encoder, and only that is trained",
                "Change it",
            )
