"""`python -m entrypoint train`: the command that SageMaker runs."""

import io
import signal
import sys

USAGE = """usage: python -m entrypoint train [--name=value …]

Trains a LoRA as one SageMaker training job: inputs from channels under /opt/ml/input/data
(SAGEMAKER_BASE_DIR moves /opt/ml), or from --model_uri=… and --dataset_uri=…
Flags are the job's hyperparameters and sd-scripts' options; the README lists them."""


def main() -> int:
    """Run the command that the arguments name; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name need not be text
    match sys.argv[1:]:
        case ["train", *arguments] if not {"--help", "-h"} & set(arguments):
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # while the job is being imported
            from entrypoint import job  # noqa: PLC0415

            return job.run(arguments)
        case ["--help" | "-h"] | ["train", *_]:
            print(USAGE)
            return 0
        case _:
            print(USAGE, file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
