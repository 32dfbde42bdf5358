"""`make full-size`: the job on a base model of real size, beside the same sd-scripts command typed by hand.

    python -m benchmarks.full_size [--kind sd15|sdxl] [--folder FOLDER] [--rounds N]

Random weights in the real shapes: speed, memory and sizes are those of a real model, its loss is not. Each
round runs the job from S3 to S3, then sd-scripts alone with the configuration that the job published, on
the files that it fetched. The same seed must give the same LoRA. On a CPU this takes minutes and, for
SDXL, 17 GiB of free memory.

The S3 server is the one that AWS_ENDPOINT_URL_S3 names, else moto's, which keeps objects in memory.
Exits 0 when every run made its LoRA and all of them are equal, 2 where an argument is unfit, else 1.
"""

import argparse
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import boto3
import numpy as np
import psutil
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from demo import base_model, pictures
from demo.server import environment, s3_server
from entrypoint.report.curves import LOSS
from kohya import sd_scripts, tokenizers
from kohya.config import KINDS, Kind
from kohya.sd_scripts import SdScripts

ROOT = Path(__file__).parent.parent
NAME = "full"
PICTURES = 8
MEMORY = {"sd15": 9 << 30, "sdxl": 17 << 30}  # bytes that must be free: what was measured, and a little more
POLL = 0.5  # seconds between two looks at the memory

# What makes a full-size model train on a CPU in minutes: the rest is configs/<kind>.toml.
OPTIONS = {
    "output_name": NAME,
    "mixed_precision": "bf16",
    "resolution": "128,128",
    "enable_bucket": "false",
    "train_batch_size": "1",
    "gradient_checkpointing": "false",
    "save_every_n_epochs": "100",
    "max_data_loader_n_workers": "0",  # forked workers' RSS would count the trainer's memory again
    "clip_skip": "",  # unset: with 1 sd-scripts puts bf16 into a float32 norm, which a CPU refuses
}
STEPS = {"sd15": "20", "sdxl": "3"}


class Failed(Exception):
    """A run failed, or made another LoRA; the text says which, with its last lines."""


@dataclass
class Run:
    """What was seen of one run."""

    name: str
    load: float  # the machine's load average, before it
    seconds: float = 0.0  # from start to end of the process
    first: float = 0.0  # from the start of the process to the end of the first optimizer step
    step: float = 0.0  # seconds a step, median without the first
    cpu: float = 0.0  # seconds of user and system, of the process and all below it
    memory: int = 0  # bytes; the largest sum of RSS over the process and all below it
    own: int = 0  # the same without mapped files, such as the base model, which the kernel can drop
    stages: dict[str, float] = field(default_factory=dict)  # of the job: seconds, from job.json


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _arguments(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception: what was started is ended
    checkpoint = asked.folder / f"{asked.kind}.safetensors"
    if not checkpoint.exists():
        print(f"writing {checkpoint}", flush=True)
        write_checkpoint(checkpoint, asked.kind)
    try:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder, _bucket() as bucket:
            runs = _rounds(asked, checkpoint, Path(folder), bucket)
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"\n{asked.kind}, {checkpoint.stat().st_size / 1e9:.2f} GB, {STEPS[asked.kind]} steps; "
        f"{os.cpu_count()} cores, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'unset')}; "
        f"{len(runs)} LoRAs, equal bit for bit\n\n{table(runs)}"
    )
    return 0


def write_checkpoint(path: Path, kind: Kind) -> None:
    """Write a base model of `kind` with its real keys and shapes, fp16, 2.13 or 6.94 GB.

    One tensor is in memory at a time. The weights are random, the same on every machine; norms are 1,
    biases 0, the rest so small that nothing overflows in bf16.
    """
    shapes: dict[str, list[int]] = json.loads((base_model.SHAPES / f"base_{kind}.json").read_text())
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin on a multiple of 8 bytes
    rng = np.random.default_rng(0)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, shape in shapes.items():
            file.write(base_model.draw(key, tuple(shape), rng).tobytes())
    part.replace(path)


def _rounds(asked: argparse.Namespace, checkpoint: Path, folder: Path, bucket: str) -> list[Run]:
    """The job and the plain command by turns. Raises Failed, also where two LoRAs differ."""
    s3 = boto3.client("s3")
    s3.upload_file(str(checkpoint), bucket, checkpoint.name)
    dataset = pictures.write(folder / "dataset")
    files = sorted(file for file in dataset.rglob("*") if file.is_file())
    for file in files[2 * PICTURES :]:  # each picture is followed by its caption
        file.unlink()
    for file in files[: 2 * PICTURES]:
        s3.upload_file(str(file), bucket, f"dataset/{file.relative_to(dataset).as_posix()}")
    runs, loras = [], []
    for number in range(1, asked.rounds + 1):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            here = Path(place)
            runs.append(_job(f"job {number}", asked.kind, here, bucket, checkpoint.name))
            runs.append(_by_hand(f"by hand {number}", asked.kind, asked.scripts, here, dataset))
            loras += [load_file(here / made / f"{NAME}.safetensors") for made in ("ml/model", "plain")]
    for lora in loras[1:]:
        if lora.keys() != loras[0].keys() or any((lora[key] != loras[0][key]).any() for key in lora):
            raise Failed("The LoRAs differ, and the same seed should have made the same ones.")
    return runs


def _job(name: str, kind: Kind, folder: Path, bucket: str, model: str) -> Run:
    """The job, from S3 to S3, in a tree and with scratch of its own: nothing was fetched before."""
    flags = {
        "model_uri": f"s3://{bucket}/{model}",
        "dataset_uri": f"s3://{bucket}/dataset",
        "output_uri": f"s3://{bucket}/output",
        "max_train_steps": STEPS[kind],
        **OPTIONS,
    }
    scratch = folder / "tmp"
    scratch.mkdir()
    command = [sys.executable, "-m", "entrypoint", "train", *_as_flags(flags)]
    environ = {**os.environ, "SAGEMAKER_BASE_DIR": str(folder / "ml"), "TMPDIR": str(scratch)}
    run = _measure(name, command, ROOT, environ, folder / "ml" / "output" / "tensorboard")
    run.stages = json.loads((folder / "ml" / "model" / "job.json").read_text())["seconds"]
    return run


def _by_hand(name: str, kind: Kind, scripts: SdScripts, folder: Path, dataset: Path) -> Run:
    """sd-scripts alone: the TOML that the job published, and flags for the paths that it does not hold."""
    fetched = next((folder / "tmp").rglob(f"{kind}.safetensors"))
    paths = {
        "config_file": folder / "ml" / "model" / f"{NAME}.toml",
        "pretrained_model_name_or_path": fetched,
        "train_data_dir": dataset,
        "output_dir": folder / "plain",
        "logging_dir": folder / "plain" / "logs",
        "tokenizer_cache_dir": tokenizers.folder(),
    }
    command = [str(scripts.python), sd_scripts.SCRIPTS[kind], *_as_flags(paths)]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder / "tmp")}
    return _measure(name, command, scripts.folder, environ, paths["logging_dir"])


def _as_flags(values: Mapping[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def _measure(name: str, command: Sequence[str], cwd: Path, environ: Mapping[str, str], logs: Path) -> Run:
    """Run `command` to its end. Raises Failed, with its last lines, where it does not exit with 0."""
    run = Run(name, os.getloadavg()[0])
    print(f"{name}: {' '.join(command)}", flush=True)
    begun, cpu = time.time(), _cpu()
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(
            command, cwd=cwd, env=environ, stdout=output, stderr=subprocess.STDOUT
        ) as process:
            try:
                while process.poll() is None:
                    memory, own = _memory(process.pid)
                    run.memory, run.own = max(run.memory, memory), max(run.own, own)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(POLL)
            finally:
                process.terminate()  # where this is left early: the job ends its trainer
                process.wait()
        run.seconds, run.cpu = time.time() - begun, _cpu() - cpu
        if process.returncode:
            output.seek(0)
            raise Failed(f"{name} ended with exit code {process.returncode}:\n{output.read()[-4000:]}")
    times = _step_times(logs)
    run.first = times[0] - begun
    run.step = statistics.median(later - sooner for sooner, later in pairwise(times))
    return run


def _cpu() -> float:
    """Seconds of user and system of all children that have ended, and of theirs: other load counts little."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _memory(pid: int) -> tuple[int, int]:
    """Bytes of a process and all below it: RSS, and RSS without mapped files. PSS would take 25 ms a GiB."""
    found = []
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                found.append(process.memory_info())
    return sum(memory.rss for memory in found), sum(memory.rss - memory.shared for memory in found)


def _step_times(logs: Path) -> list[float]:
    """When each optimizer step was done, in seconds of the epoch, from the event log that both ways write."""
    folder = next(logs.rglob("events.out.tfevents.*")).parent
    log = EventAccumulator(str(folder))
    log.Reload()
    return [event.wall_time for event in log.Scalars(LOSS)]


@contextmanager
def _bucket() -> Iterator[str]:
    """A bucket of its own, gone afterwards."""
    with ExitStack() as stack:
        if "AWS_ENDPOINT_URL_S3" not in os.environ:
            kept = environment(stack.enter_context(s3_server()), dict(os.environ))
            os.environ.clear()
            os.environ.update(kept)
        s3 = boto3.client("s3")
        name = f"full-size-{uuid.uuid4().hex}"
        s3.create_bucket(Bucket=name)
        try:
            yield name
        finally:
            for item in s3.list_objects_v2(Bucket=name).get("Contents", ()):
                s3.delete_object(Bucket=name, Key=item["Key"])
            s3.delete_bucket(Bucket=name)


def table(runs: Sequence[Run]) -> str:
    """All runs as a table in Markdown, and under it what the job costs beside sd-scripts alone."""
    stages = runs[0].stages
    rows: dict[str, list[str]] = {
        "load average before": [f"{run.load:.2f}" for run in runs],
        **{f"{stage}, s": [_seconds(run.stages.get(stage)) for run in runs] for stage in stages},
        "whole process, s": [_seconds(run.seconds) for run in runs],
        "CPU, user and system, s": [_seconds(run.cpu) for run in runs],
        "from its start to the first step, s": [_seconds(run.first) for run in runs],
        "a step, median, s": [f"{run.step:.3f}" for run in runs],
        "peak memory, sum of RSS, GiB": [f"{run.memory / (1 << 30):.2f}" for run in runs],
        "peak memory without mapped files, GiB": [f"{run.own / (1 << 30):.2f}" for run in runs],
    }
    lines = [["", *(run.name for run in runs)], ["---", *("--:" for _ in runs)]]
    lines += [[name, *cells] for name, cells in rows.items()]
    alone = statistics.median(run.seconds for run in runs if not run.stages)
    jobs = [run for run in runs if run.stages]
    train = statistics.median(run.stages["train"] for run in jobs)
    whole = statistics.median(run.seconds for run in jobs)
    fetch = statistics.median(run.stages["fetch"] for run in jobs)
    told = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return (
        f"{told}\n\nMedians: sd-scripts by hand {alone:.1f} s; the job's train stage {train:.1f} s "
        f"({train - alone:+.1f} s, {train / alone - 1:+.1%}); the whole job {whole:.1f} s "
        f"({whole - alone:+.1f} s, of which fetch {fetch:.1f} s)"
    )


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.full_size")
    parser.add_argument("--kind", choices=KINDS, default="sd15")
    default = Path(tempfile.gettempdir(), "sagemaker-kohya-full")
    parser.add_argument("--folder", type=Path, default=default, help=f"keeps the base model ({default})")
    parser.add_argument(
        "--rounds", type=int, choices=range(1, 10), default=2, help="how often the job and sd-scripts run (2)"
    )
    asked = parser.parse_args(arguments)
    asked.folder = asked.folder.absolute()
    asked.folder.mkdir(parents=True, exist_ok=True)
    try:
        asked.scripts = sd_scripts.find()
    except sd_scripts.MissingSdScripts as error:
        parser.error(f"{error}; type make sd-scripts, or set SD_SCRIPTS_DIR and SD_SCRIPTS_PYTHON")
    if asked.kind == "sdxl" and "AWS_ENDPOINT_URL_S3" not in os.environ:
        parser.error("moto's S3 server would hold SDXL in memory; name another with AWS_ENDPOINT_URL_S3")
    free, needed = psutil.virtual_memory().available, MEMORY[asked.kind]
    if free < needed:
        parser.error(f"{needed >> 30} GiB of memory must be free, and {free / (1 << 30):.1f} GiB are")
    return asked


if __name__ == "__main__":
    sys.exit(main())
