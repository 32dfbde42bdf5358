"""`python -m entrypoint train|check|format`: the job as SageMaker runs it, and two commands for a laptop."""

import signal
import sys

from entrypoint.console import speak_any_language

USAGE = """usage: python -m entrypoint train [--name=value …]
       python -m entrypoint check [--name=value …] [--gpu=NAME] [--pictures] [--json]
       python -m entrypoint format FILE [--write] [--json]

train   Trains a LoRA as one SageMaker training job: inputs from channels under /opt/ml/input/data
        (SAGEMAKER_BASE_DIR moves /opt/ml), or from --model_uri=… and --dataset_uri=…
        Flags are the job's hyperparameters and sd-scripts' options; the README lists them.
check   Tells whether such a job is fit, from listings and headers, and trains nothing. Needs no GPU:
        --gpu=t4|a10g|l4|l40s|a100|h100|none names the one that it is for. --pictures reads the
        pictures too. Ends with 0 for fit, 2 for unfit, 1 where storage does not answer.
format  Prints a TOML corrected where that is safe, and says what it changed; --write replaces the file."""


def main() -> int:
    """Run the command that the arguments name; returns the exit code."""
    speak_any_language()
    command, arguments = (sys.argv[1], sys.argv[2:]) if sys.argv[1:] else ("", [])
    if command in ("--help", "-h") or {"--help", "-h"} & set(arguments):
        print(USAGE)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # while the job is being imported
    match command:
        case "train":
            from entrypoint import job  # noqa: PLC0415

            return job.run(arguments)
        case "check" | "format":
            return _on_a_laptop(command, arguments)
        case _:
            print(USAGE, file=sys.stderr)
            return 2


def _on_a_laptop(command: str, arguments: list[str]) -> int:
    from entrypoint import checked, formatting  # noqa: PLC0415

    try:
        return checked.run(arguments) if command == "check" else formatting.run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # of `| head`
        return 0


if __name__ == "__main__":
    sys.exit(main())
