"""The CLIP tokenizers, rebuilt with no network from the vocabulary inside the open_clip_torch wheel.

    python -m kohya.tokenizers [DIR]

writes one folder a tokenizer, laid out as sd-scripts' `tokenizer_cache_dir` wants it (v0.10.1,
library/strategy_base.py:57-71). DIR is `<sys.prefix>/share/sagemaker-kohya/tokenizers` unless given.
"""

import gzip
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CLIP_L = "openai_clip-vit-large-patch14"
BIG_G = "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"
FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")

_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 49152 - 256 - 2  # CLIP reads this many merges of the file (openai/CLIP, simple_tokenizer.py)
_SPECIAL = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}


class MissingTokenizers(RuntimeError):
    """The tokenizers, or the vocabulary that they are made from, are not on this machine."""


def folder() -> Path:
    """Where the tokenizers are: $TOKENIZERS_DIR, else `<sys.prefix>/share/sagemaker-kohya/tokenizers`."""
    default = Path(sys.prefix, "share", "sagemaker-kohya", "tokenizers")
    return Path(os.environ.get("TOKENIZERS_DIR") or default)


def build(target: Path) -> None:
    """Write both tokenizers, four files each, below `target`. Raises MissingTokenizers without the wheel."""
    merges = _merges()
    alphabet = list(_byte_symbols())
    words = [*alphabet, *(symbol + "</w>" for symbol in alphabet)]
    words += ["".join(merge.split()) for merge in merges]
    words += [_SPECIAL["bos_token"], _SPECIAL["eos_token"]]
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **_SPECIAL}
    texts = (
        json.dumps({word: number for number, word in enumerate(words)}, ensure_ascii=False),
        "\n".join(["#version: 0.2", *merges]) + "\n",
        json.dumps(config, indent=2),
        json.dumps(_SPECIAL, indent=2),
    )
    for name in (CLIP_L, BIG_G):
        (target / name).mkdir(parents=True, exist_ok=True)
        for file, text in zip(FILES, texts, strict=True):
            (target / name / file).write_text(text, encoding="utf-8")


def load(target: Path, names: Sequence[str]) -> tuple[Any, ...]:
    """transformers' CLIPTokenizer of each name. Raises MissingTokenizers where a file of it is not there."""
    for name in names:
        if missing := [file for file in FILES if not (target / name / file).is_file()]:
            raise MissingTokenizers(
                f"The tokenizer {name} is not whole in {target}: {', '.join(missing)} not found. "
                f"Type: python -m kohya.tokenizers {target}"
            )
    from transformers import CLIPTokenizer  # takes seconds, and building needs none of it  # noqa: PLC0415

    loaded = {name: CLIPTokenizer.from_pretrained(target / name) for name in names}
    if BIG_G in loaded:
        loaded[
            BIG_G
        ].pad_token = "!"  # id 0, what OpenCLIP pads with; sd-scripts, library/strategy_sdxl.py:26
    return tuple(loaded.values())


def count(captions: Sequence[str], target: Path) -> list[int] | None:
    """How many tokens each caption has, without the two at its ends; None where that cannot be told.

    Source: transformers 4.54.1, convert_slow_tokenizer.py, CLIPConverter. Its own package takes seconds to
    import, and tokenizers, which it stands on, a tenth of one.
    """
    vocabulary, merges = (target / CLIP_L / name for name in FILES[:2])
    if importlib.util.find_spec("tokenizers") is None or not (vocabulary.is_file() and merges.is_file()):
        return None
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers  # noqa: PLC0415

    model = models.BPE.from_file(str(vocabulary), str(merges), end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return [len(found.ids) for found in tokenizer.encode_batch_fast(list(captions))]


def chunks(tokenizer: Any, caption: str, max_token_length: int | None) -> list[list[int]]:
    """The ids of a caption in chunks of 77, each with both ends: one for 75 tokens, three for 225.

    Source: sd-scripts v0.10.1, library/strategy_base.py:234-290. Where padding is the end token that is all;
    bigG pads with 0, and there a chunk that is cut ends in the end token, an empty one begins with it.
    """
    length = (max_token_length or 75) + 2
    first, *middle, last = tokenizer(
        caption, padding="max_length", truncation=True, max_length=length
    ).input_ids
    parts = [[first, *middle[start : start + 75], last] for start in range(0, len(middle), 75)]
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if len(parts) > 1 and pad != end:
        for part in parts:
            part[-1] = part[-1] if part[-2] in (end, pad) else end
            part[1] = end if part[1] == pad else part[1]
    return parts


def _merges() -> list[str]:
    # find_spec, not an import: open_clip imports torchvision and timm, which nothing here needs
    spec = importlib.util.find_spec("open_clip")
    file = Path(spec.origin).parent / _VOCABULARY if spec and spec.origin else None
    if file is None or not file.is_file():
        raise MissingTokenizers(
            f"The CLIP vocabulary ({_VOCABULARY}) was looked for in the package open_clip_torch, and is "
            "not there. Type: pip install --no-deps open_clip_torch==3.3.0"
        )
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    return lines[1 : _MERGES + 1]


def _byte_symbols() -> Iterator[str]:
    """The 256 printable characters that stand for bytes, in CLIP's order: printable bytes come first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    yield from map(chr, printable)
    rest = 256 - len(printable)
    yield from (chr(256 + number) for number in range(rest))


def main() -> int:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else folder()
    try:
        build(target)
    except MissingTokenizers as error:
        print(error, file=sys.stderr)
        return 1
    print(f"tokenizers written to {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
