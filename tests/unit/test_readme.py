import ast
import re

import pytest

from entrypoint.hyperparameters import HYPERPARAMETERS
from tests import readme

TEXT = readme.FILE.read_text(encoding="utf-8")
SHOOTING = TEXT.partition("\n## Troubleshooting")[2].partition("\n## ")[0]
MESSAGES = re.findall(r"(?m)^\| `(.+?)` \|", SHOOTING)


def test_what_is_made_from_the_code_is_up_to_date() -> None:
    assert readme.renewed(TEXT) == TEXT, "type make readme"
    assert f"`{next(iter(HYPERPARAMETERS))}`" in TEXT


@pytest.fixture(scope="module")
def said() -> list[str]:
    """Every text in the code of the job and of the client."""
    root = readme.FILE.parent
    files = [file for room in ("entrypoint", "kohya", "lora_jobs") for file in (root / room).rglob("*.py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@pytest.mark.parametrize("message", MESSAGES or ["no table"])
def test_a_message_that_is_explained_is_one_that_is_said(message: str, said: list[str]) -> None:
    assert any(message in text for text in said)


def test_the_files_that_are_named_are_there() -> None:
    for link in re.findall(r"\]\((?!http|#)([^)]+)\)", TEXT):
        assert (readme.FILE.parent / link).exists(), link
    headings = {
        re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in re.findall(r"(?m)^#+ (.+)$", TEXT)
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", TEXT):
        assert anchor in headings, anchor


def test_every_target_that_is_named_is_one_of_make() -> None:
    targets = re.findall(r"(?m)^([a-z0-9-]+):", (readme.FILE.parent / "Makefile").read_text())
    for target in re.findall(r"(?m)(?:^|`)make ([a-z][a-z0-9-]*)", TEXT):
        assert target in targets, target
