"""`format`: a TOML printed back, corrected where that is safe; what is not safe is told, and left."""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from entrypoint import console
from entrypoint.failures import Problem, Unfit
from entrypoint.files import text_of
from entrypoint.storage import Storage
from kohya.format import Formatted, formatted


def run(arguments: Sequence[str]) -> int:
    """Format a file, and return the exit code: 0 all is well, 2 something is left to mend, 1 not written.

    The text goes to stdout, and what was changed to stderr; with --write the text goes into the file, whole
    or not at all. --json prints one object:

    text      as it should be
    changes   list of texts
    problems  list of {where, wrong, fix}
    """
    parser = argparse.ArgumentParser(prog="python -m entrypoint format", allow_abbrev=False)
    parser.add_argument("file", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    try:
        text = text_of(asked.file, str(asked.file), Storage())
        result = formatted(text, str(asked.file))
    except Unfit as error:
        text, result = "", Formatted("", (), error.problems)
    if asked.json:
        told = {
            "text": result.text,
            "changes": result.changes,
            "problems": list(map(asdict, result.problems)),
        }
        print(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        for change in result.changes:
            print(console.redact(change), file=sys.stderr)
        for problem in result.problems:
            console.fail(str(problem))
        if not asked.write:
            print(result.text, end="")
    if asked.write and result.text != text:
        try:
            _replace(asked.file.resolve(), result.text)  # a link goes on to lead to it
        except OSError as error:
            wrong = f"it cannot be written ({error.strerror})"
            console.fail(str(Problem(str(asked.file), wrong, "Check its folder's permissions")))
            return 1
    return 2 if result.problems else 0


def _replace(file: Path, text: str) -> None:
    """Write a file in one step, with the permissions that it had."""
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as out:
            out.write(text)
        shutil.copymode(file, name)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink()
        raise
