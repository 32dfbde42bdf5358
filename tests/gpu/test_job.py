"""The job on a GPU, with the real sd-scripts. `make test-gpu` runs these on a machine that has one.

The last test takes the presets as they are, on base models of real size with random weights, and writes
what it measured to benchmarks/gpu/<GPU>-<kind>.md.
"""

import re
import statistics
import subprocess
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from entrypoint.gpu import find_gpu
from kohya import sd_scripts
from kohya.config import KINDS, Kind
from tests.contract.test_job import assert_lora
from tests.harness import NARROW, TINY, Job, Result, write_dataset

GPU = find_gpu()
BELOW_BF16 = GPU is not None and (GPU.capability or 8) < 8
TABLES = Path(__file__).parents[2] / "benchmarks" / "gpu"
STEPS, WARM_UP = 30, 5  # of the timed run, and how many of them do not count
USED = 200  # MiB; no process that trains leaves less on its GPU

pytestmark = pytest.mark.skipif(GPU is None, reason="nvidia-smi finds no GPU")


@pytest.fixture
def ready(job: Job, pictures: Path) -> Job:
    """A job by channels that lacks its base model; long enough for fp16's loss scale to settle."""
    job.environment["PYTHONPATH"] = str(NARROW)
    job.mount("dataset", pictures)
    longer = {"trainer": "sd-scripts", "max_train_epochs": "10", "save_every_n_epochs": "5"}
    job.configure("hyperparameters", {**TINY, **longer})
    return job


def assert_trained_on_the_gpu(result: Result, job: Job, kind: Kind) -> None:
    assert result.code == 0, result.out + result.err
    assert "accelerator device: cuda" in result.out
    assert_lora(job.model / "shape.safetensors", kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "precision",
    [
        "fp16",
        pytest.param("bf16", marks=pytest.mark.skipif(BELOW_BF16, reason="bf16 wants capability 8.0")),
    ],
)
def test_precisions(ready: Job, kind: Kind, precision: str, base_models: dict[Kind, Path]) -> None:
    ready.mount("model", base_models[kind])
    result = ready.run(f"--mixed_precision={precision}")
    assert_trained_on_the_gpu(result, ready, kind)
    assert f"mixed_precision {precision} (flag --mixed_precision)" in result.out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("module", "flag", "said"),
    [
        ("xformers", "--xformers", "Enable xformers for U-Net"),
        ("bitsandbytes", "--optimizer_type=AdamW8bit", "use 8-bit AdamW optimizer"),
    ],
)
def test_what_runs_on_a_gpu_alone_or_best(
    ready: Job, kind: Kind, module: str, flag: str, said: str, base_models: dict[Kind, Path]
) -> None:
    if sd_scripts.find().lacks([module]):
        pytest.skip(f"{module} is not installed where sd-scripts runs")
    ready.mount("model", base_models[kind])
    result = ready.run(flag)
    assert_trained_on_the_gpu(result, ready, kind)
    assert said in result.out


@pytest.mark.parametrize("kind", KINDS)
def test_two_gpus(ready: Job, kind: Kind, base_models: dict[Kind, Path]) -> None:
    if len(before := used()) < 2:
        pytest.skip("there is one GPU")
    ready.mount("model", base_models[kind])
    with watched() as peak:
        result = ready.run()
    assert_trained_on_the_gpu(result, ready, kind)
    assert all(now - then > USED for then, now in zip(before, peak, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_presets_at_full_size(
    job: Job, kind: Kind, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.full_size import write_checkpoint  # noqa: PLC0415 (wanted only here)

    base = tmp_path / f"{kind}.safetensors"
    write_checkpoint(base, kind)
    try:
        row = timed(job, kind, base, write_dataset(tmp_path / "pictures", side=1024))
    finally:
        base.unlink()  # pytest keeps its folders, and this is up to 7 GB
    file = write_table(job, kind, row)
    with capsys.disabled():
        print(f"\n{file}:\n{file.read_text()}")


def timed(job: Job, kind: Kind, base: Path, dataset: Path) -> dict[str, str]:
    """A job with nothing set but its length, and a row of the table that tells how it went."""
    job.mount("model", base)
    job.mount("dataset", dataset)
    job.configure("hyperparameters", {"max_train_steps": str(STEPS)})
    before = used()
    with watched() as peak:
        result = job.run(timeout=3600)
    assert result.code == 0, result.out + result.err
    chosen = re.search(r"mixed_precision (\w+) \((.+)\)", result.out)
    assert chosen
    values = tomllib.loads((job.model / "lora.toml").read_text())
    (events,) = job.events
    ends = [
        event.wall_time for event in EventAccumulator(str(events.parent)).Reload().Scalars("loss/current")
    ]
    step = statistics.median(
        after - end for end, after in zip(ends[WARM_UP:], ends[WARM_UP + 1 :], strict=False)
    )
    cards = sum(now - then > USED for then, now in zip(before, peak, strict=True))
    return {
        "kind": kind,
        "GPU": f"{cards} × {GPU.name}" if GPU else "",
        "mixed_precision": f"{chosen[1]} ({chosen[2]})",
        "gradient_checkpointing": str(values["gradient_checkpointing"]).lower(),
        "resolution": values["resolution"],
        "train_batch_size": str(values["train_batch_size"]),
        "s/step, median": f"{step:.3f}",
        "images/s": f"{values['train_batch_size'] * cards / step:.2f}",
        "GPU memory, peak": f"{max(peak):,} MiB, {max(before):,} before",
    }


def write_table(job: Job, kind: Kind, row: dict[str, str]) -> Path:
    """The row as Markdown, with what it was measured by."""
    versions = ", ".join(f"{name} {version}" for name, version in job.record["versions"].items())
    lines = [
        f"Written by `make test-gpu`, {time.strftime('%Y-%m-%d', time.gmtime())}: {STEPS} steps of a job on",
        f"random weights of real size, the presets as they are; the first {WARM_UP} steps do not count, and",
        "memory is all that nvidia-smi tells to be in use on the fullest GPU.",
        "",
        f"| {' | '.join(row)} |",
        f"|{'---|' * len(row)}",
        f"| {' | '.join(row.values())} |",
        "",
        f"{versions}.",
        "",
    ]
    name = re.sub(r"\W+", "-", GPU.name.lower() if GPU else "none")
    file = TABLES / f"{name}-{kind}.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def used() -> list[int]:
    """The memory in use on each GPU, in MiB, by whatever process: in a container none is told by name."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    return [int(line) for line in told.splitlines()]


@contextmanager
def watched() -> Iterator[list[int]]:
    """The most that was in use on each GPU until the block ended, looked at twice a second."""
    peak, over = used(), threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            peak[:] = map(max, peak, used())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()
