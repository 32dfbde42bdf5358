"""The trainer as a child process: started, listened to, stopped. Its exit code is not believed."""

import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from entrypoint.console import redact, say
from entrypoint.diagnosis import diagnose
from entrypoint.failures import Stopped
from entrypoint.progress import Progress
from kohya import metrics

STOP_SECONDS = 75  # of the 120 that SageMaker gives: the rest is for publishing
_TAIL_LINES = 40


@dataclass(frozen=True)
class Ended:
    """How the trainer ended: its exit code (negative: a signal), its last lines, the cause if it is known."""

    code: int
    tail: tuple[str, ...]
    cause: str | None = None


def run(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Ended:
    """Run `command` to its end; print its lines and its steps, and keep its lines in `log`.

    When Stopped is raised here (SIGTERM), the trainer gets SIGTERM and STOP_SECONDS to save a state. Its
    loader workers do not: without them it could not end its step. Whatever is left of its process group at
    the end is killed.
    """
    read_end, write_end = os.pipe()
    progress = Progress()
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    child = subprocess.Popen(
        command,
        env={**os.environ, **environment, metrics.VARIABLE: str(write_end), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(write_end,),
        start_new_session=True,
    )
    os.close(write_end)
    listeners = (
        threading.Thread(target=_take_records, args=(child, read_end, progress), daemon=True),
        threading.Thread(target=_take_lines, args=(child, log, progress, tail), daemon=True),
    )
    for listener in listeners:
        listener.start()
    try:
        child.wait()
    except Stopped:
        say(f"train: asked the trainer to stop; it has {STOP_SECONDS} s to save a state")
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            say("train: the trainer did not stop and is killed")
        raise
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for listener in listeners:
            listener.join(timeout=10)
        progress.close()
    cause = progress.alarm or (diagnose(child.returncode, tail) if child.returncode else None)
    return Ended(child.returncode, tuple(tail), cause)


def _take_records(child: "subprocess.Popen[bytes]", read_end: int, progress: Progress) -> None:
    with os.fdopen(read_end, encoding="utf-8") as pipe:
        for record in metrics.read(pipe):
            progress.take(record)
            if progress.alarm:
                child.kill()


def _take_lines(child: "subprocess.Popen[bytes]", log: Path, progress: Progress, tail: deque[str]) -> None:
    assert child.stdout is not None
    with log.open("w", encoding="utf-8") as kept:
        for raw in child.stdout:
            # tqdm redraws its line with \r: only what would stay visible is kept
            line = redact(raw.decode("utf-8", errors="replace").rstrip("\n").rsplit("\r", 1)[-1].rstrip())
            if line:
                tail.append(line)
                kept.write(line + "\n")
                kept.flush()
                progress.write(line)
