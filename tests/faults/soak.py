"""`make soak`: jobs that are killed, starved and lied to, and what became of them.

    python -m tests.faults.soak [--seed S] [--jobs N] [--only kills|faults|disk] [--trainer NAME]

kills    a job is killed one to three times, by SIGTERM or by SIGKILL of all its processes, at random
         steps or while it begins or ends, and started again, half of the time as on a new machine, where
         nothing is left but /opt/ml/checkpoints; it must end with the LoRAs of the job that nobody broke
         off (sd-scripts: with the same number of steps), and with each step once in one event log
faults   a job whose S3 spoils 5 % of its answers must end well
disk     a job whose disk fills at a random moment must end with a sentence, and damage nothing

A reader opens and verifies every LoRA that becomes visible in the bucket meanwhile. Job i of each part is
drawn from the seed S + i: one that failed is repeated by its own seed and --jobs 1. Exits 1 where one failed.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from demo import base_model
from entrypoint.storage import S3Uri
from kohya import sd_scripts
from kohya.networks import expected
from tests.contract.test_job import put
from tests.faults.disk import on_small_disk
from tests.faults.proxy import Drawn, Proxy, impatient, rates
from tests.faults.reader import Reader
from tests.harness import NARROW, TINY, Job, Result, write_dataset
from tests.s3 import S3Server, new_bucket, serving

AT_ONCE = {"kills": 2, "faults": 4, "disk": 2}  # jobs; those with faults wait most of their time
TRAINERS = ("builtin", "sd-scripts")
STATE_SECONDS = 3.0
EPOCHS, STEPS = 10, 40
ASKED: Mapping[str, str] = {
    **TINY,
    "max_train_epochs": str(EPOCHS),
    "save_every_n_epochs": "4",
    "seed": "1",
    "mixed_precision": "no",
    "state_every_minutes": str(STATE_SECONDS / 60),
}
JOBS = {("kills", "builtin"): 60, ("kills", "sd-scripts"): 20, ("faults", "builtin"): 60,
        ("faults", "sd-scripts"): 20, ("disk", "builtin"): 20, ("disk", "sd-scripts"): 5}  # fmt: skip
FAULTY = 0.05  # of all answers
DISK = 1_400_000_000  # bytes: more than the job checks for, and than it needs


@dataclass
class Figures:
    """What was measured."""

    failed: dict[int, str] = field(default_factory=dict)  # seed → why
    stops: list[float] = field(default_factory=list)  # seconds from SIGTERM to the end of the process
    lost: list[float] = field(default_factory=list)  # seconds from the first lost step to a SIGKILL
    kills: int = 0
    faults: int = 0
    ends: dict[str, int] = field(default_factory=dict)  # how jobs on a small disk ended


@dataclass(frozen=True)
class World:
    """What all jobs share."""

    folder: Path
    model: Path
    pictures: Path
    s3: S3Server
    bucket: S3Uri


class Failed(Exception):
    """A job did not end as it must."""


@dataclass(frozen=True)
class Reference:
    """The job that nobody broke off."""

    loras: Mapping[str, bytes]
    seconds: float


def make_job(world: World, trainer: str, name: str) -> Job:
    """A job by channels, with its LoRAs published to a folder of its own."""
    job = Job(world.folder / name)
    job.environment |= {**world.s3.environment, "PYTHONPATH": str(NARROW), "TRAINING_JOB_NAME": name}
    job.mount("model", world.model)
    job.mount("dataset", world.pictures)
    workers = {} if trainer == "builtin" else {"max_data_loader_n_workers": "0"}
    output = {"output_uri": str(world.bucket / "out" / name)}
    job.configure("hyperparameters", {**ASKED, **workers, **output, "trainer": trainer})
    return job


def check_end(job: Job, trainer: str, result: Result, reference: Reference) -> None:
    """Raise Failed where a job did not end as the one that nobody broke off."""
    if result.code != 0:
        raise Failed(f"exit code {result.code}: {result.err.strip()[-300:]}")
    found = job.loras
    if found.keys() != reference.loras.keys():
        raise Failed(f"it left {', '.join(sorted(found))}")
    if trainer == "builtin" and found != reference.loras:
        other = [name for name in found if found[name] != reference.loras[name]]
        raise Failed(f"its LoRAs are not those of the job that nobody broke off: {', '.join(other)}")
    if job.steps != list(range(1, STEPS + 1)):
        raise Failed(f"its event log holds the steps {job.steps}")


def killed(world: World, trainer: str, seed: int, reference: Reference, figures: Figures) -> None:
    drawn, job = random.Random(seed), make_job(world, trainer, f"kills-{trainer}-{seed}")
    job.prefix = ("setsid",)
    try:
        for _ in range(drawn.randint(1, 3)):
            how = drawn.choice((signal.SIGTERM, signal.SIGKILL))
            result, when = broken_off(job, how, moment(drawn, job, reference), figures)
            if result.code == 0:
                break
            if result.code not in (143, -how):
                raise Failed(f"exit code {result.code} after {how.name}: {result.err.strip()[-300:]}")
            figures.kills += 1
            made, kept = last_step(result), max(job.states.values(), default=0)
            whole = made == STEPS and reference.loras.keys() <= job.loras.keys()  # all of it was made by then
            if how == signal.SIGTERM and made > kept and not whole:
                raise Failed(f"stopped after step {made}, and the newest state is of step {kept}")
            if how == signal.SIGKILL and job.events:
                figures.lost.append(when - next((at for step, at in job.logged if step > kept), when))
            if drawn.random() < 0.5:  # a new machine
                for name in ("model", "output"):
                    shutil.rmtree(job.tree / name, ignore_errors=True)
        check_end(job, trainer, job.run(), reference)
    finally:
        job.end()
        shutil.rmtree(job.tree.parent, ignore_errors=True)


def moment(drawn: random.Random, job: Job, reference: Reference) -> tuple[int, float]:
    """When a job is broken off: once a step is done, 0 for its start, and so many seconds later.

    Not so many seconds from its start alone: on a busy machine that would be before its first step each time.
    """
    if drawn.random() < 0.3:
        return 0, drawn.uniform(0, reference.seconds / 2)
    done = max(job.states.values(), default=0)
    return drawn.randint(min(done + 1, STEPS), STEPS), drawn.uniform(0, 1)


def broken_off(
    job: Job, how: signal.Signals, when: tuple[int, float], figures: Figures
) -> tuple[Result, float]:
    """Run, send a signal at this moment, SIGKILL to all of its processes, and wait for the end.

    Returns when it was sent as well, in seconds of the epoch.
    """
    process, sent, seen = job.start(), list[float](), list[str]()

    def send() -> None:
        sent.append(time.time())
        if how == signal.SIGKILL:
            os.killpg(process.pid, how)
        else:
            process.send_signal(how)

    step, after = when
    assert process.stdout is not None
    while step and (line := process.stdout.readline()):
        seen.append(line)
        if (told := re.match(r"step=(\d+)/", line)) and int(told[1]) >= step:
            break
    timer = threading.Timer(after, send)
    timer.start()
    out, err = process.communicate(timeout=600)
    timer.cancel()
    if process.returncode == 143:
        figures.stops.append(time.time() - sent[0])
    return Result(process.returncode, "".join(seen) + out, err), sent[0] if sent else time.time()


def last_step(result: Result) -> int:
    """The last optimizer step that the log tells of."""
    return max(
        (int(step) for step in re.findall(r"(?:step=|stopped after step )(\d+)", result.out)), default=0
    )


def lied_to(world: World, trainer: str, seed: int, reference: Reference, figures: Figures) -> None:
    job = make_job(world, trainer, f"faults-{trainer}-{seed}")
    for channel in ("model", "dataset"):
        path = job.tree / "input" / "data" / channel
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    name = f"faults-{trainer}-{seed}"
    inputs = (
        "--model_uri=" + str(world.bucket / "in/model.safetensors"),
        "--dataset_uri=" + str(world.bucket / "in/data"),
    )
    outputs = [f"--{what}_uri={world.bucket / what / name}" for what in ("logs", "checkpoint")]
    try:
        with Proxy(world.s3.endpoint, Drawn(seed, rates(FAULTY, world.s3))) as proxy:
            job.environment["AWS_ENDPOINT_URL_S3"] = proxy.address
            job.prefix = impatient(silence=2)
            check_end(job, trainer, job.run(*inputs, *outputs), reference)
            figures.faults += proxy.faults.total()
        sent = sent_to(world, f"out/{name}/")
        if missing := {*reference.loras} - sent:
            raise Failed(f"not in the bucket: {', '.join(sorted(missing))}")
    finally:
        job.end()
        shutil.rmtree(job.tree.parent, ignore_errors=True)


def starved(world: World, trainer: str, seed: int, reference: Reference, figures: Figures) -> None:
    """The disk holds everything that the job writes; a file fills it at a random moment."""
    drawn, name = random.Random(seed), f"disk-{trainer}-{seed}"
    job = make_job(world, trainer, name)
    disk = job.tree.parent / "disk"
    disk.mkdir()
    fill = 'mkdir "$2/tmp"; (sleep "$1"; cat /dev/zero >"$2/full") >/dev/null 2>&1 & shift 2; exec "$@"'
    after = f"{drawn.uniform(0, reference.seconds):.2f}"
    job.prefix = (*on_small_disk(disk, DISK), "sh", "-c", fill, "sh", after, str(disk))
    job.environment |= {"SAGEMAKER_BASE_DIR": str(disk / "ml"), "TMPDIR": str(disk / "tmp")}
    asked = json.loads((job.tree / "input/config/hyperparameters.json").read_text())
    places = {"model_uri": world.model, "dataset_uri": world.pictures}
    try:
        result = job.run(*(f"--{key}={value}" for key, value in {**asked, **places}.items()))
        if result.code == 0:
            if missing := {*reference.loras} - sent_to(world, f"out/{name}/"):
                raise Failed(f"completed, and not in the bucket: {', '.join(sorted(missing))}")
        elif result.code not in (1, 2) or "a defect of" in result.err:
            raise Failed(f"exit code {result.code}: {(result.out + result.err).strip()[-3000:]}")
        elif not re.search("(?i)disk|No space left|are free", result.err.splitlines()[-1]):
            raise Failed(f"it does not say that the disk is full: {result.err.strip()[-300:]}")
        figures.ends[f"exit code {result.code}"] = figures.ends.get(f"exit code {result.code}", 0) + 1
    finally:
        job.end()
        shutil.rmtree(job.tree.parent, ignore_errors=True)


def sent_to(world: World, prefix: str) -> set[str]:
    answer = world.s3.client().list_objects_v2(Bucket=world.bucket.bucket, Prefix=prefix)
    return {item["Key"].removeprefix(prefix) for item in answer.get("Contents", ())}


PARTS = {"kills": killed, "faults": lied_to, "disk": starved}


def reference_of(world: World, trainer: str) -> Reference:
    """Run the job that nobody breaks off, beside another one as the others will be."""

    def run(name: str) -> Reference:
        job = make_job(world, trainer, name)
        begun = time.monotonic()
        result = job.run()
        seconds = time.monotonic() - begun
        try:
            if result.code != 0:
                raise SystemExit(f"the job of {trainer} does not run as it is:\n{result.out}{result.err}")
            return Reference(job.loras, seconds)
        finally:
            job.end()

    with ThreadPoolExecutor() as pool:
        one, *_ = pool.map(run, [f"reference-{trainer}-{number}" for number in range(AT_ONCE["kills"])])
    return one


def soak(world: World, part: str, trainer: str, seeds: Sequence[int], reference: Reference) -> Figures:
    """One part with one trainer."""
    figures = Figures()

    def one(seed: int) -> None:
        try:
            PARTS[part](world, trainer, seed, reference, figures)
        except (Failed, OSError, ValueError, subprocess.SubprocessError) as error:
            figures.failed[seed] = str(error) or type(error).__name__
            print(f"  FAILED, seed {seed}: {figures.failed[seed]}", flush=True)

    begun = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE[part]) as pool:
        list(pool.map(one, seeds))
    good = len(seeds) - len(figures.failed)
    told = [f"{part}, {trainer}: {good} of {len(seeds)} jobs in {time.monotonic() - begun:.0f} s"]
    if figures.kills:
        told.append(f"{figures.kills} times broken off")
    if figures.stops:
        ordered = sorted(figures.stops)
        p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
        told.append(
            f"SIGTERM to exit: median {statistics.median(ordered):.1f} s, p99 {p99:.1f} s, of {len(ordered)}"
        )
    if figures.lost:
        lost = f"median {statistics.median(figures.lost):.1f} s, at most {max(figures.lost):.1f} s"
        told.append(f"lost to SIGKILL: {lost} of training, with a state every {STATE_SECONDS:g} s")
    if figures.faults:
        told.append(f"{figures.faults} answers spoiled")
    told += [f"{count} with {end}" for end, count in sorted(figures.ends.items())]
    print("; ".join(told), flush=True)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Break jobs off, and see what becomes of them.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, help="of each part; without it as many as a full run has")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--trainer", choices=TRAINERS)
    asked = parser.parse_args(arguments)
    trainers = [asked.trainer] if asked.trainer else [*TRAINERS]
    if "sd-scripts" in trainers and not asked.trainer:
        try:
            sd_scripts.find()
        except sd_scripts.MissingSdScripts as error:
            print(f"NOT RUN: sd-scripts. {error}")
            trainers.remove("sd-scripts")
    bad = False
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, serving() as s3:
        root = Path(folder)
        os.environ |= s3.environment
        model = base_model.write(root / "model.safetensors", "sd15")
        world = World(root, model, write_dataset(root / "pictures"), s3, new_bucket(s3))
        put(s3, world.bucket / "in/model.safetensors", model)
        put(s3, world.bucket / "in/data", world.pictures)
        wanted = expected("sd15", {"network_module": "networks.lora", "learning_rate": 1e-4})
        reader = Reader(s3, world.bucket / "out", root / "read", wanted)
        with reader.watching(0.5):
            for trainer in trainers:
                reference = reference_of(world, trainer)
                for part in [asked.only] if asked.only else PARTS:
                    seeds = range(asked.seed, asked.seed + (asked.jobs or JOBS[part, trainer]))
                    bad |= bool(soak(world, part, trainer, seeds, reference).failed)
        print(f"{reader.opened} LoRAs became visible and were opened; {len(reader.bad)} were bad")
        for told in reader.bad:
            print(f"  {told}")
        return 1 if bad or reader.bad else 0


if __name__ == "__main__":
    sys.exit(main())
