"""Texts that nobody wrote on purpose: whoever reads TOML refuses them, in time and without a traceback.

Property-based: https://hypothesis.readthedocs.io. A failure prints the text that made it.
"""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from entrypoint import inputs
from kohya import config, dataset_config
from kohya.format import formatted
from tests.unit.test_property_header import quick as of_headers

quick = settings(of_headers, max_examples=50)
PIECES = st.sampled_from(
    [
        "a", "seed", "image_dir", "1", "0x", "1e9", "true", ".", " . ", "=", " = ", ",", "[", "]", "[[",
        "]]", "{", "}", '"', "'", '"""', "'''", "\\", "\\u", "#", " ", "\t", "\n", "\r", "\0", "é", "\ud800",
        "2020-01-01", "[general]\n", "[[datasets]]\n", "[[datasets.subsets]]\n", "[prompt]\n",
        "[[prompt.subset]]\n",
    ]
)  # fmt: skip
texts = st.lists(st.tuples(PIECES, st.sampled_from([1, 1, 1, 1, 2, 200, 5_000])), max_size=12).map(
    lambda parts: "".join(piece * times for piece, times in parts)
)


def prompts(text: str) -> Any:
    try:
        return inputs.read_prompts("p.toml", text)
    except (ValueError, TypeError, KeyError):  # which inputs._prompts tells
        return None


READERS: dict[str, Callable[[str], Any]] = {
    "configuration": lambda text: config.merge("sdxl", [config.read(text, "job.toml")[0]]),
    "dataset_config": lambda text: dataset_config.read(text, "data.toml", {}),
    "prompts": prompts,
    "format": lambda text: formatted(text, "job.toml"),
}


@pytest.mark.parametrize("reader", READERS)
@quick
@given(text=texts)
@example(text="a" * 60_000)
@example(text="[" + " " * 60_000)
@example(text="a = " + "[" * 200_000)
@example(text="a = " + "{a=" * 50_000)
@example(text="a = [\n" + "1,\n" * 50_000)
@example(text="a = [\n" + "[1],\n" * 10_000 + "]")
@example(text='a = """\n' + "x\n" * 50_000)
@example(text="a." * 50_000 + "a = 1")
@example(text='"\\"".' * 30_000 + "a = 1")
@example(text="seed = 1" + "0" * 200_000)
def test_any_text_is_read_or_refused(text: str, reader: str) -> None:
    READERS[reader](text)
