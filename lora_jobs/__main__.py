"""`lora`: a LoRA trained on SageMaker, from a laptop and back."""

import argparse
import importlib
import sys
from typing import TYPE_CHECKING

from entrypoint import console
from entrypoint.failures import StorageError, Unfit
from lora_jobs.errors import LoraError, said, to_person

if TYPE_CHECKING:
    from types import ModuleType

# A subcommand's module has add_arguments(parser) and run(arguments), which returns the exit code.
COMMANDS = {
    "init": ("lora_jobs.init", "write a job file to fill in"),
    "check": ("lora_jobs.check", "tell whether a job is fit, before anything is paid for"),
    "submit": ("lora_jobs.submit", "send the inputs to S3 and start the training job"),
    "run": ("lora_jobs.local", "run the same job in the image on this machine"),
    "policy": ("lora_jobs.policy", "print the IAM policy that the job's role needs"),
    "list": ("lora_jobs.listing", "list the jobs, newest first"),
    "watch": ("lora_jobs.watch", "follow a job until it ends"),
    "logs": ("lora_jobs.logs", "print a job's log"),
    "stop": ("lora_jobs.stop", "stop a job; its LoRAs and a state are kept"),
    "fetch": ("lora_jobs.fetch", "fetch a job's LoRA and its report"),
    "board": ("lora_jobs.board", "show jobs' curves in TensorBoard"),
}


def main(words: list[str] | None = None) -> int:
    """Run the subcommand that the words name; returns the exit code.

    0 good, 1 it failed, 2 the request is unfit, 130 Ctrl-C.
    """
    console.speak_any_language()
    words = sys.argv[1:] if words is None else words
    if not words or words[0] not in COMMANDS:
        return _usage(words)
    name, *rest = words
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(
        prog=f"lora {name}", description=(module.__doc__ or "").strip(), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    module.add_arguments(parser)
    return _run(module, parser.parse_args(rest))


def _usage(words: list[str]) -> int:
    """What there is; 0 for who asked."""
    lines = (f"  {name:8}{told}" for name, (_, told) in COMMANDS.items())
    usage = "\n".join(["usage: lora COMMAND …", "", *lines, "", "lora COMMAND --help tells more."])
    if words and words[0] in ("--help", "-h"):
        print(usage)
        return 0
    if words:
        console.fail(f"{words[0]}: there is no such command.")
    print(usage, file=sys.stderr)
    return 2


def _run(module: "ModuleType", arguments: argparse.Namespace) -> int:
    """Run a subcommand, with its errors as sentences on stderr."""
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 (lora --help needs none)

    try:
        code: int = module.run(arguments)
    except Unfit as error:
        for problem in error.problems:
            console.fail(str(problem))
        return 2
    except (LoraError, StorageError) as error:
        console.fail(to_person(str(error)))
    except (BotoCoreError, ClientError) as error:
        console.fail(str(said(error)))
    except BrokenPipeError:  # of `| head`
        return 0
    except OSError as error:  # of a path that was given
        console.fail(f"{error.filename or 'this machine'}: {error.strerror or error}.")
    except KeyboardInterrupt:
        return 130
    else:
        return code
    return 1


if __name__ == "__main__":
    sys.exit(main())
