"""kohya.tokenizers: the ids are CLIP's own, known from outside this project."""

import json
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from kohya import tokenizers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tokenizers")
    tokenizers.build(target)
    return target


@pytest.mark.parametrize("name", [tokenizers.CLIP_L, tokenizers.BIG_G])
def test_ids_are_clips(folder: Path, name: str) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / name)
    assert sorted(file.name for file in (folder / name).iterdir()) == sorted(tokenizers.FILES)
    # openai/clip-vit-large-patch14, as its model card and sd-scripts use it
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A Photo, of a CAT").input_ids == [49406, 320, 1125, 267, 539, 320, 2368, 49407]
    assert len(tokenizer) == 49408
    assert (tokenizer.model_max_length, tokenizer.pad_token_id) == (77, 49407)


def test_vocabulary_has_every_byte_and_the_last_merge(folder: Path) -> None:
    vocabulary = json.loads((folder / tokenizers.CLIP_L / "vocab.json").read_text())
    assert len(vocabulary) == 49408
    assert (vocabulary["!"], vocabulary["a</w>"], vocabulary["<|startoftext|>"]) == (0, 320, 49406)


def test_without_the_wheel_the_error_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setattr("sys.argv", ["tokenizers", str(tmp_path)])
    assert tokenizers.main() == 1
    assert "pip install --no-deps open_clip_torch==3.3.0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_DIR", raising=False)
    assert tokenizers.folder().parts[-3:] == ("share", "sagemaker-kohya", "tokenizers")
    monkeypatch.setenv("TOKENIZERS_DIR", "/elsewhere")
    assert tokenizers.folder() == Path("/elsewhere")


@pytest.mark.parametrize(
    "file", ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_a_tokenizer_that_is_not_whole_says_what_to_type(folder: Path, file: str, tmp_path: Path) -> None:
    (tmp_path / tokenizers.CLIP_L).mkdir()
    for path in (folder / tokenizers.CLIP_L).iterdir():
        if path.name != file:
            (tmp_path / tokenizers.CLIP_L / path.name).write_bytes(path.read_bytes())
    with pytest.raises(tokenizers.MissingTokenizers) as told:
        tokenizers.load(tmp_path, [tokenizers.CLIP_L])
    assert str(told.value) == (
        f"The tokenizer {tokenizers.CLIP_L} is not whole in {tmp_path}: {file} not found. "
        f"Type: python -m kohya.tokenizers {tmp_path}"
    )


def test_the_special_tokens_are_clips(folder: Path) -> None:
    """openai/clip-vit-large-patch14, special_tokens_map.json."""
    told = json.loads((folder / tokenizers.CLIP_L / "special_tokens_map.json").read_text())
    end = "<|endoftext|>"
    assert told == {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end}
