"""Every network that a LoRA can be trained with: two steps with the real sd-scripts, a LoRA that works."""

from pathlib import Path

import pytest
from safetensors import safe_open

from kohya import sd_scripts
from kohya.config import Kind
from tests.harness import Job

ENDS = {
    "lora": {"alpha", "lora_down.weight", "lora_up.weight"},
    "loha": {"alpha", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    "lokr": {"alpha", "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"},
}
DROPS = "down_lr_weight=0,0,0,1,1,1,1,1,1,1,1,1"  # leaves out down_blocks_0 with its two attention blocks


@pytest.mark.parametrize(
    ("kind", "module", "arguments", "algorithm", "modules"),
    [
        ("sd15", "networks.lora", "conv_dim=2 conv_alpha=1", "lora", 264 + 86),
        ("sd15", "networks.lora", f"rank_dropout=0.1 {DROPS}", "lora", 264 - 24),
        ("sd15", "networks.lora_fa", "", "lora", 264),
        ("sd15", "networks.dylora", "unit=2", "lora", 264),
        ("sd15", "lycoris.kohya", "algo=locon preset=attn-mlp", "lora", 264),
        ("sd15", "lycoris.kohya", "algo=loha preset=attn-mlp", "loha", 264),
        ("sd15", "lycoris.kohya", "algo=lokr preset=attn-mlp factor=4", "lokr", 264),
        ("sdxl", "networks.lora", "conv_dim=2", "lora", 722 + 66),
        ("sdxl", "lycoris.kohya", "algo=locon dora_wd=True train_norm=True", "lora", 722 + 66),
    ],
)
def test_a_network_makes_a_lora_that_works(
    narrow: Job,
    base_models: dict[Kind, Path],
    kind: Kind,
    module: str,
    arguments: str,
    algorithm: str,
    modules: int,
) -> None:
    package = module.split(".", maxsplit=1)[0]
    if package != "networks" and sd_scripts.find().lacks([package]):
        pytest.skip(f"{package} is not installed where sd-scripts runs")
    narrow.mount("model", base_models[kind])
    result = narrow.run(f"--network_module={module}", "--unet_lr=1e-2", f"--network_args={arguments}")
    assert result.code == 0, result.out + result.err
    with safe_open(narrow.model / "shape.safetensors", "np") as lora:
        names = list(lora.keys())
    found = len({name.split(".")[0] for name in names})
    assert found == modules if package == "networks" else found >= modules
    ends = {name.partition(".")[2] for name in names}
    assert ends <= ENDS[algorithm] | {"dora_scale", "w_norm", "b_norm"}
    assert ("dora_scale" in ends, "w_norm" in ends) == ("dora_wd" in arguments, "train_norm" in arguments)


def test_a_part_that_is_not_trained_may_stay_zero(narrow: Job, base_models: dict[Kind, Path]) -> None:
    narrow.mount("model", base_models["sd15"])
    result = narrow.run("--text_encoder_lr=0")
    assert result.code == 0, result.out + result.err
    with safe_open(narrow.model / "shape.safetensors", "np") as lora:
        text = [name for name in lora.keys() if name.startswith("lora_te_") and "lora_up" in name]  # noqa: SIM118
        assert len(text) == 72
        assert not any(lora.get_tensor(name).any() for name in text)


def test_a_learning_rate_that_breaks_the_lora_fails_the_job(
    narrow: Job, base_models: dict[Kind, Path]
) -> None:
    """Two steps are too few for the alarm of a diverging loss: the LoRA itself is looked at."""
    narrow.mount("model", base_models["sd15"])
    result = narrow.run("--unet_lr=1e18", "--text_encoder_lr=1e18")
    assert result.code == 1, result.out + result.err
    assert narrow.failure is not None
    assert "holds NaN or Inf in" in narrow.failure


def test_latents_that_lie_beside_the_pictures_are_not_used(
    narrow: Job, base_models: dict[Kind, Path], pictures: Path, tmp_path: Path
) -> None:
    """sd-scripts would take 0_0096x0096_sd.npz for the picture's latents; the job's tree has no such file."""
    copy = tmp_path / "copy" / "2_shape"
    copy.mkdir(parents=True)
    for file in (pictures / "2_shape").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
        if file.suffix == ".png":
            (copy / f"{file.stem}_0096x0096_sd.npz").write_bytes(b"of another picture")
    (narrow.tree / "input" / "data" / "dataset").unlink()
    narrow.mount("dataset", copy.parent)
    narrow.mount("model", base_models["sd15"])
    result = narrow.run("--cache_latents_to_disk=true")
    assert result.code == 0, result.out + result.err
    assert {path.read_bytes() for path in copy.glob("*.npz")} == {b"of another picture"}
