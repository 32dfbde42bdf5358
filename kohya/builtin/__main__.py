"""python -m kohya.builtin sd15|sdxl --config_file=merged.toml"""

import argparse
import signal
import sys
from pathlib import Path

from kohya import config
from kohya.builtin import BuiltinError, options
from kohya.tokenizers import MissingTokenizers


def main() -> str | None:
    """None when all went well, else what goes to stderr: `sys.exit` makes it the exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m kohya.builtin", description="Train a LoRA.")
    parser.add_argument("kind", choices=config.KINDS)
    parser.add_argument("--config_file", type=Path, required=True, help="a TOML file of sd-scripts options")
    arguments = parser.parse_args()
    try:
        text = arguments.config_file.read_text(encoding="utf-8")
    except OSError as error:
        return f"{arguments.config_file} cannot be read: {error.strerror}."
    settings, unread = config.read(text, str(arguments.config_file))
    merged = config.merge(arguments.kind, [settings])
    values = merged.values
    wrong = [str(problem) for problem in (*unread, *merged.problems)] or [
        f"{name}: {what}. {fix}." for name, what, fix in options.problems(values, arguments.kind)
    ]
    if wrong:
        return "\n".join(wrong)

    from kohya.builtin import train  # imports torch, which takes seconds  # noqa: PLC0415

    stop = train.Stop()
    signal.signal(signal.SIGTERM, stop)
    try:
        train.train(arguments.kind, options.read(values, arguments.kind), stop)
    except (BuiltinError, MissingTokenizers) as error:
        return str(error)
    except train.OutOfMemoryError:
        return "The GPU has too little memory; set gradient_checkpointing = true or a smaller batch."
    except OSError as error:
        return f"{error.filename or 'The disk'}: {error.strerror or error}."
    return None


if __name__ == "__main__":
    sys.exit(main())
