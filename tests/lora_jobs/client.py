"""The command `lora` as a person types it, against the stand-in of AWS."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from demo.stand_in import BUCKET, IMAGE, ROLE, StandIn, client
from tests.harness import TINY, Result

ROOT = Path(__file__).parents[2]
QUICK = ("--every", "0.2")  # seconds between two looks


def shown_steps(address: str, job: str, count: int) -> list[int]:
    """The steps that TensorBoard shows of a job's loss, once there are so many, or two minutes are over."""
    place = f"{address}data/plugin/scalars/scalars?run={job}&tag=loss%2Fcurrent"
    steps, end = list[int](), time.monotonic() + 120
    while len(steps) < count and time.monotonic() < end:
        with suppress(urllib.error.HTTPError), urllib.request.urlopen(place, timeout=30) as answer:
            steps = [step for _, step, _ in json.load(answer)]
        time.sleep(0.1)  # it is not read in yet
    return steps


class Person:
    """Somebody in a folder of their own, with the stand-in for AWS."""

    def __init__(self, aws: StandIn, folder: Path) -> None:
        self.aws, self.folder = aws, folder
        self.sagemaker = client("sagemaker", aws.address)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "LORA_"))}
        self.environment = {**kept, **aws.environment, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}

    def lora(self, *words: object, code: int = 0) -> Result:
        """Type `lora …`, without a terminal; it must end with `code`."""
        process = self.start(*words)
        out, err = process.communicate(timeout=240)
        result = Result(process.returncode, out, err)
        assert result.code == code, f"lora {words}\n{out}\n{err}"
        return result

    def start(self, *words: object) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "lora_jobs", *map(str, words)],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def on_a_terminal(self, *words: object, until: str = "", columns: int = 80) -> Result:
        """Type `lora …` on a terminal, and Ctrl-C once it has shown `until`. Everything comes in `out`."""
        shown, seen = bytearray(), threading.Event()
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(self.folder)
            command = [sys.executable, "-m", "lora_jobs", *map(str, words)]
            os.execve(sys.executable, command, {**self.environment, "COLUMNS": str(columns), "TERM": "xterm"})
        killer = threading.Timer(240, os.kill, (pid, signal.SIGKILL))
        killer.start()
        try:
            while True:
                try:
                    shown += os.read(terminal, 65536)
                except OSError:  # the other side is closed
                    break
                if until and until.encode() in shown and not seen.is_set():
                    seen.set()
                    os.kill(pid, signal.SIGINT)
        finally:
            _, status = os.waitpid(pid, 0)
            killer.cancel()
            os.close(terminal)
        return Result(os.waitstatus_to_exitcode(status), shown.decode(errors="replace"), "")

    def job_file(self, model: object, dataset: object, name: str = "shape", **training: Any) -> Path:
        """What `lora init` writes, with a training of seconds."""
        file = self.folder / f"{name}.toml"
        places = {"base-model": model, "dataset": dataset, "output": f"s3://{BUCKET}/loras"}
        places |= {"role": ROLE, "image": IMAGE, "instance": "ml.m5.xlarge"}
        flags = [word for key, value in places.items() for word in (f"--{key}", value)]
        self.lora("init", *flags, file.name)
        options = {**TINY, **{key: str(value) for key, value in training.items()}}
        del options["output_name"]
        table = "\n".join(f'{key} = "{value}"' for key, value in options.items())
        before = file.read_text().partition("\n[training]\n")[0]
        file.write_text(f"{before}\n[training]\n{table}\n")
        return file

    def submitted(self, file: Path) -> str:
        """Type `lora submit`; the name of the job that was started."""
        before = set(self.aws.sagemaker.jobs)
        self.lora("submit", file)
        (name,) = set(self.aws.sagemaker.jobs) - before
        return name

    def described(self, job: str) -> Mapping[str, Any]:
        told: Mapping[str, Any] = self.sagemaker.describe_training_job(TrainingJobName=job)
        return told

    def wait(self, job: str, happened: Callable[[], object], seconds: float = 180) -> None:
        """Until that has happened; fails where the job has ended without it."""
        end = time.monotonic() + seconds
        while not happened():
            told = self.described(job)
            over = told["TrainingJobStatus"] in ("Completed", "Failed", "Stopped")
            assert not over or happened(), f"{job} has ended: {told.get('FailureReason')}"
            assert time.monotonic() < end, f"{job}: {told['SecondaryStatus']} after {seconds} s"
            time.sleep(0.1)

    def says(self, job: str, text: str) -> Callable[[], bool]:
        """Whether the job's log holds this text by now."""
        return lambda: any(text in line for line in self.aws.sagemaker.jobs[job].lines)
