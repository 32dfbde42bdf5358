"""Writes options.json: the facts about every option of the pinned sd-scripts' two parsers.

    python -m kohya.options SD_SCRIPTS_FOLDER >kohya/options.json

Runs in the Python that has sd-scripts' requirements. No help texts are taken.
"""

import argparse
import importlib
import json
import sys
from contextlib import redirect_stdout
from typing import Any

from kohya.sd_scripts import SCRIPTS


def facts(folder: str) -> dict[str, dict[str, Any]]:
    """Every option by name: its type, nargs, default and choices, and the kinds that have it."""
    sys.path.insert(0, folder)
    found: dict[str, dict[str, Any]] = {}
    kinds: dict[str, list[str]] = {}
    for kind, script in SCRIPTS.items():
        with redirect_stdout(sys.stderr):  # they say things while they are imported
            parser = importlib.import_module(script.removesuffix(".py")).setup_parser()
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            kinds.setdefault(action.dest, []).append(kind)
            found[action.dest] = {
                "type": _type(action),
                "nargs": action.nargs if action.nargs != 0 else None,
                "default": action.default,
                "choices": list(action.choices) if action.choices is not None else None,
                "kinds": kinds[action.dest],
            }
    return found


def _type(action: argparse.Action) -> str:
    if isinstance(action, argparse._StoreTrueAction):
        return "bool"
    return "str" if action.type is None else str(getattr(action.type, "__name__", action.type))


def main() -> None:
    lines = (f"{json.dumps(name)}: {json.dumps(fact)}" for name, fact in facts(sys.argv[1]).items())
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main()
