"""`make demo`: the whole job on an embedded default, with no GPU, no Docker and no AWS account.

    python -m demo [--kind sd15|sdxl] [--trainer builtin|sd-scripts]
                   [--model FILE] [--dataset FOLDER] [--out FOLDER]

Exits 0 when the job succeeded and its LoRA lowers the denoising loss as much as it must, 2 where an
argument is unfit, 130 after Ctrl-C, else 1.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import boto3

from demo import base_model, pictures, settings
from demo.server import environment, s3_server
from entrypoint import checkpoint
from kohya import networks, tokenizers
from kohya.config import Kind

if TYPE_CHECKING:
    from demo.proof import Proof

BUCKET = "demo"
_MARK = ".made-by-make-demo"  # only a folder with this file in it is emptied
_LARGEST_UPLOAD = 1 << 30  # bytes; moto's server holds objects in memory when it joins their parts
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE = 90  # seconds that a job has to publish and end after SIGTERM


class Failed(Exception):
    """The demo did not succeed; its text says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _arguments(arguments)
    for number in _SIGNALS[1:]:
        signal.signal(number, _leave)  # as an exception, so that every child is ended on the way out
    started = time.monotonic()
    try:
        proof = _demo(asked)
    except Failed as error:
        print(f"\nThe demo failed. {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; nothing is left running.", file=sys.stderr)
        return 130
    _next(asked, proof, time.monotonic() - started)
    return 0


def _demo(asked: argparse.Namespace) -> "Proof":
    """Every step in order. Raises Failed."""
    kind, out = asked.kind, asked.out
    step = Steps()
    with s3_server() as address:
        _only_this_s3(address)
        s3 = boto3.client("s3")
        s3.create_bucket(Bucket=BUCKET)
        step.done(f"S3 server on {address} (moto's, for as long as this runs), bucket {BUCKET}")

        model = asked.model or base_model.write(out / "base.safetensors", kind)
        model_uri = _put_model(s3, model)
        what = "your base model" if asked.model else f"a narrow {kind} base model with random weights"
        step.done(f"{what}, {model.stat().st_size / 1e6:.0f} MB, at {model_uri}")

        dataset = asked.dataset or pictures.write(out / "dataset")
        count = _put_folder(s3, dataset)
        what = "your data set" if asked.dataset else "real photographs with captions"
        step.done(f"{what}, {count} files, at s3://{BUCKET}/dataset/")

        chosen = settings.choose(model, kind)
        tree = _tree(out / "opt-ml", {
            "kind": kind,
            "trainer": asked.trainer,
            "model_uri": model_uri,
            "dataset_uri": f"s3://{BUCKET}/dataset/",
            "output_uri": f"s3://{BUCKET}/output/",
            **chosen.hyperparameters,
        })  # fmt: skip
        step.done(f"SageMaker's tree in {tree}; {chosen.why}")

        print("\n$ python -m entrypoint train", flush=True)
        _job(tree, narrow=chosen.narrow)
        print()
        step.done("the job, exit code 0")

        _list_bucket(s3)
        lora = out / f"{settings.NAME}.safetensors"
        s3.download_file(BUCKET, f"output/{lora.name}", str(lora))
    _show_seconds(tree)
    step.done(f"the LoRA fetched from s3://{BUCKET}/output/{lora.name}")
    _curve(tree, out / "loss.png", f"{kind}: loss of each step")
    step.done(f"the loss curve drawn: {out / 'loss.png'} (it jumps, for each step draws its own timesteps)")
    proof = _prove(model, kind, lora, dataset, chosen)
    step.done(f"diffusers loaded the LoRA: {proof.modules} modules, none missing, none more, numbers equal")
    print(f"\nDenoising loss at fixed noise, timesteps and captions, without → with the LoRA:\n  {proof}")
    judge(proof, chosen.drop, len(networks.modules(kind)) if chosen.narrow else proof.modules)
    return proof


def judge(proof: "Proof", drop: float, modules: int) -> None:
    """Raises Failed unless the LoRA has so many modules and lowers the loss by more than the share `drop`."""
    if proof.modules != modules:
        raise Failed(f"The LoRA has {proof.modules} modules and should have {modules}.")
    if not proof.change < -drop:  # NaN fails too
        raise Failed(f"The LoRA should lower the loss by more than {drop:.0%}: {proof}.")


class Steps:
    """Tells each step in one line, with the seconds since the one before."""

    def __init__(self) -> None:
        self._before = time.monotonic()

    def done(self, what: str) -> None:
        now = time.monotonic()
        print(f"{now - self._before:6.1f} s  {what}", flush=True)
        self._before = now


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m demo", description="The whole job, S3 included.")
    parser.add_argument("--kind", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--trainer", choices=("builtin", "sd-scripts"), default="builtin")
    parser.add_argument("--model", type=Path, help="your own base model, one .safetensors file of that kind")
    parser.add_argument("--dataset", type=Path, help="your own folder of pictures and .txt captions")
    parser.add_argument("--out", type=Path, help="folder for what comes out (demo-out/KIND)")
    asked = parser.parse_args(arguments)
    asked.out = (asked.out or Path("demo-out", asked.kind)).absolute()
    if asked.model is not None:
        asked.model = asked.model.expanduser().absolute()
        if not asked.model.is_file():
            parser.error(f"--model: {asked.model} is no file")
        try:
            kind, _ = settings.look(asked.model)
        except checkpoint.NotABaseModel as error:
            parser.error(f"--model: {asked.model}: {error}")
        if kind != asked.kind:
            parser.error(f"--model: {asked.model} is of kind {kind}; type --kind {kind}, or KIND={kind}")
    if asked.dataset is not None:
        asked.dataset = asked.dataset.expanduser().absolute()
        if not asked.dataset.is_dir():
            parser.error(f"--dataset: {asked.dataset} is no folder")
        if asked.dataset.is_relative_to(asked.out):
            parser.error(f"--dataset: {asked.dataset} is below {asked.out}, which is emptied first")
    if not (tokenizers.folder() / tokenizers.CLIP_L / tokenizers.FILES[0]).is_file():
        parser.error(f"no CLIP tokenizers in {tokenizers.folder()}; type: python -m kohya.tokenizers")
    if asked.out.exists() and any(asked.out.iterdir()):
        if not (asked.out / _MARK).exists():
            parser.error(f"--out: {asked.out} holds files that the demo did not make; name another folder")
        shutil.rmtree(asked.out)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / _MARK).touch()
    return asked


def _only_this_s3(address: str) -> None:
    """From here on this process and its children know no other S3 than the one at `address`."""
    kept = environment(address, dict(os.environ))
    os.environ.clear()
    os.environ.update(kept)


def _put_model(s3: Any, model: Path) -> str:
    """Put the base model into the bucket; returns its URI, or its path where it is too large for moto."""
    if model.stat().st_size > _LARGEST_UPLOAD:
        return str(model)
    s3.upload_file(str(model), BUCKET, f"models/{model.name}")
    return f"s3://{BUCKET}/models/{model.name}"


def _put_folder(s3: Any, folder: Path) -> int:
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in files:
        s3.upload_file(str(file), BUCKET, f"dataset/{file.relative_to(folder).as_posix()}")
    return len(files)


def _tree(base: Path, hyperparameters: dict[str, str]) -> Path:
    """What SageMaker puts into /opt/ml before it starts `train`, here with no channels."""
    for folder in ("input/config", "model", "output/data", "checkpoints"):
        (base / folder).mkdir(parents=True)
    contents: dict[str, Any] = {
        "hyperparameters": hyperparameters,
        "inputdataconfig": {},
        "resourceconfig": {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "lo"},
    }
    for name, content in contents.items():
        (base / "input" / "config" / f"{name}.json").write_text(json.dumps(content, indent=2))
    return base


def _job(tree: Path, *, narrow: bool) -> None:
    """Run the job as a child, its output on this terminal. However this ends, the job has ended too."""
    scratch = tree.with_name("scratch")  # of its own: what an earlier demo fetched would not be fetched again
    scratch.mkdir()
    environ = {**os.environ, "SAGEMAKER_BASE_DIR": str(tree), "TMPDIR": str(scratch)}
    if narrow:
        environ["OMP_NUM_THREADS"] = "1"  # several threads only wait for each other on matrices this small
        environ["PYTHONPATH"] = str(
            Path(__file__).with_name("narrow")
        )  # sd-scripts knows the real widths only
    # In a session of its own: Ctrl-C arrives here, and the job gets SIGTERM, as SageMaker stops a job.
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "entrypoint", "train"]
    job = None
    try:
        with _signals_held():  # else one that comes between fork and assignment leaves the job alone
            job = subprocess.Popen(command, cwd=root, env=environ, start_new_session=True)
        code = job.wait()
    finally:
        if job is not None:
            _end(job)
        shutil.rmtree(scratch, ignore_errors=True)
    if code:
        failure = tree / "output" / "failure"
        told = failure.read_text() if failure.exists() else "Its last lines are above."
        raise Failed(f"The job ended with exit code {code}. {told}")


def _end(job: "subprocess.Popen[bytes]") -> None:
    """SIGTERM to a job that still runs; SIGKILL, to it and to all that it started, where that does not do."""
    if job.poll() is not None:
        return
    import psutil  # noqa: PLC0415 (wanted only here)

    family = psutil.Process(job.pid).children(recursive=True)
    job.terminate()
    try:
        job.wait(_PATIENCE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C: do not wait
        job.kill()
        job.wait()
    for process in family:
        if process.is_running():  # by process id and start time: never another's
            process.kill()


def _list_bucket(s3: Any) -> None:
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    rows = [(item["Key"], f"{item['Size']:,}") for page in pages for item in page.get("Contents", [])]
    wide, far = (max(map(len, column)) for column in zip(*rows, strict=True))
    print(f"\ns3://{BUCKET}/")
    for key, size in rows:
        print(f"  {key:<{wide}}  {size:>{far}} bytes")
    print(flush=True)


def _show_seconds(tree: Path) -> None:
    seconds = json.loads((tree / "model" / "job.json").read_text())["seconds"]
    told = ", ".join(f"{stage} {spent:.1f}" for stage, spent in seconds.items())
    print(f"Seconds of each stage, from job.json: {told}\n")


def _curve(tree: Path, picture: Path, title: str) -> None:
    from demo import curve  # noqa: PLC0415 (matplotlib and tensorboard take seconds, while nobody waits for them yet)

    try:
        curve.draw(tree / "output" / "tensorboard", picture, title)
    except LookupError as error:
        raise Failed(str(error)) from error


def _prove(model: Path, kind: Kind, lora: Path, dataset: Path, chosen: settings.Chosen) -> "Proof":
    import torch  # noqa: PLC0415 (as above)

    from demo import proof  # noqa: PLC0415

    if chosen.narrow:
        torch.set_num_threads(1)
    try:
        return proof.measure(model, kind, lora, dataset, resolution=chosen.resolution)
    except ValueError as error:
        raise Failed(str(error)) from error


def _next(asked: argparse.Namespace, proof: "Proof", seconds: float) -> None:
    out = asked.out
    board = Path(sys.executable).with_name("tensorboard")
    print(f"""
Done in {seconds:.0f} s. What came out is in {out}:
  LoRA {out / settings.NAME}.safetensors, loss curve {out / "loss.png"}, job {out / "opt-ml/model"}
  Report, in a browser: {out / "opt-ml/output/data/report.html"}
  TensorBoard:          {board} --logdir {out / "opt-ml/output/tensorboard"}
  With your own things: make demo KIND={asked.kind} MODEL=model.safetensors DATASET=folder""")


@contextmanager
def _signals_held() -> Iterator[None]:
    """Signals that arrive in this block are delivered at its end."""
    arrived: list[int] = []
    before = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for held in arrived:
        signal.raise_signal(held)


def _leave(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
