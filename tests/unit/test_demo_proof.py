"""The proof: it must notice a LoRA that is not loaded whole, and it must be the same each time."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo import base_model, pictures, proof
from kohya.config import Kind

NAMES = Path(__file__).parent.parent / "data"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pictures.write(tmp_path_factory.mktemp("dataset"))
    for file in sorted((folder / "2_photo").iterdir())[8:]:
        file.unlink()  # four pictures are enough here
    return folder


@pytest.mark.parametrize(("kind", "modules"), [("sd15", 264), ("sdxl", 986)])
def test_every_module_that_sd_scripts_names_is_found_in_the_model(
    kind: Kind, modules: int, dataset: Path, tmp_path: Path
) -> None:
    base = base_model.write(tmp_path / "base.safetensors", kind)
    found = proof.measure(base, kind, _lora(kind, tmp_path / "lora.safetensors", 0.2), dataset, resolution=64)
    assert found.modules == modules
    assert 0.2 < found.without < 1  # better than predicting nothing, which is 1
    assert abs(found.change) > 1e-3


def test_a_lora_of_zeros_changes_nothing(dataset: Path, tmp_path: Path) -> None:
    base = base_model.write(tmp_path / "base.safetensors", "sd15")
    lora = _lora("sd15", tmp_path / "lora.safetensors", 0.0)
    assert proof.measure(base, "sd15", lora, dataset, resolution=64).change == 0
    unknown = load_file(lora) | {
        f"lora_unet_no_such_block_attn1_to_q.{key}": tensor
        for key, tensor in (("alpha", torch.tensor(4.0)),
                            ("lora_down.weight", torch.ones(4, 32)), ("lora_up.weight", torch.ones(32, 4)))
    }  # fmt: skip
    save_file(unknown, lora)
    with pytest.raises(proof.WrongKeys, match="1 missing in the model, lora_unet_no_such_block"):
        proof.measure(base, "sd15", lora, dataset, resolution=64)


def test_a_module_that_differs_in_any_way_is_named() -> None:
    def module(scale: float = 1.0) -> proof.Module:
        return torch.full((2, 3), scale), torch.ones(3, 2), 1.0

    assert proof.compare({"a": module(), "b": module()}, {"b": module(), "a": module()}) == 2
    for found, word in (
        ({"a": module()}, "1 missing in the model, b first"),
        ({"a": module(), "b": module(), "c": module()}, "1 in the model only, c first"),
        ({"a": module(), "b": module(1.1)}, "1 with other numbers, b first"),
        ({"a": module(), "b": (*module()[:2], 0.5)}, "1 with other numbers, b first"),
    ):
        with pytest.raises(proof.WrongKeys, match=word):
            proof.compare({"a": module(), "b": module()}, found)
    with pytest.raises(proof.WrongKeys):
        proof.compare({}, {})


def test_it_says_how_much_in_words() -> None:
    assert str(proof.Proof(without=0.912, with_lora=0.731, modules=264)) == "0.912 → 0.731 (−19.8 %)"


def test_pictures_without_captions_take_the_class_word(tmp_path: Path) -> None:
    pictures.write(tmp_path)
    (tmp_path / "2_photo" / "coffee.txt").unlink()
    captions = {picture.name: caption for picture, caption in proof._pictures(tmp_path)}
    assert len(captions) == 14
    assert captions["coffee.png"] == "photo"
    assert captions["chelsea.png"] == "photo of a tabby cat, close-up of its face"


def test_a_folder_without_pictures_is_named(tmp_path: Path) -> None:
    base = base_model.write(tmp_path / "base.safetensors", "sd15")
    with pytest.raises(ValueError, match="holds no pictures"):
        proof.measure(base, "sd15", None, tmp_path)


def _lora(kind: Kind, path: Path, scale: float) -> Path:
    """A LoRA with the names that sd-scripts gives, in the narrow model's widths, `scale` times random."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for key, shape in json.loads((NAMES / f"lora_{kind}.json").read_text()).items():
        narrow = [size if size <= 4 else _narrow(key, size) for size in shape]
        random = torch.randn(narrow, generator=draw) * scale
        tensors[key] = torch.tensor(2.0) if key.endswith(".alpha") else random
    save_file(tensors, path)
    return path


def _narrow(key: str, size: int) -> int:
    if key.startswith("lora_te"):
        return size * 64 // (1280 if key.startswith("lora_te2") else 768)
    if key.endswith(("attn2_to_k.lora_down.weight", "attn2_to_v.lora_down.weight")):
        return {768: 64, 2048: 128}[size]
    return size // 10
