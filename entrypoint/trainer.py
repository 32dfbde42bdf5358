"""The trainer as a child process: started, listened to, stopped. Its exit code is not believed."""

import ctypes
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from entrypoint import stops
from entrypoint.console import redact, say
from entrypoint.diagnosis import diagnose
from entrypoint.progress import Progress
from entrypoint.stall import Stall
from kohya import metrics

_TAIL_LINES = 100  # a launcher of several processes reports at length on their end
_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


@dataclass(frozen=True)
class Ended:
    """How the trainer ended: its exit code (negative: a signal), its last lines, the cause if it is known."""

    code: int
    tail: tuple[str, ...]
    cause: str | None = None


def run(command: Sequence[str], environment: Mapping[str, str], log: Path, stall_seconds: float) -> Ended:
    """Run `command` to its end; print its lines and its steps, and keep its lines in `log`.

    On a stop the trainer gets SIGTERM and stops.TRAINER seconds to save a state, and then Stopped is raised.
    Its loader workers get none: without them it could not end its step. A trainer that hangs for
    `stall_seconds` is killed. At the end every process that came of it is killed, in whatever session it is.
    """
    pipe = log.with_name("metrics")
    os.mkfifo(pipe)
    read_end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # does not wait for a writer
    write_end = os.open(pipe, os.O_WRONLY)  # held until the end, so that the reader sees no end before it
    os.set_blocking(read_end, True)
    progress = Progress()
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    _adopt_orphans()
    with stops.held_back() as stop:
        child = subprocess.Popen(
            command,
            env={**os.environ, **environment, metrics.VARIABLE: str(pipe), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        listeners = (
            threading.Thread(target=_take_records, args=(child, read_end, progress), daemon=True),
            threading.Thread(target=_take_lines, args=(child, log, progress, tail), daemon=True),
        )
        try:
            for listener in listeners:
                listener.start()
            hang = _wait(child, progress, stop, Stall(stall_seconds, lambda: _processes(pipe)))
        finally:
            child.kill()
            child.wait()
            _kill_what_is_left(pipe)
            os.close(write_end)
            for listener in listeners:
                listener.join(timeout=10)
            progress.close()
    cause = progress.alarm or hang or (diagnose(child.returncode, tail) if child.returncode else None)
    return Ended(child.returncode, tuple(tail), cause)


def _wait(
    child: "subprocess.Popen[bytes]", progress: Progress, stop: threading.Event, stall: Stall
) -> str | None:
    """Wait for the end, and say now and then that nothing else is heard; on a stop pass it on.

    Returns the cause where the trainer hangs.
    """
    while not stop.is_set():
        with suppress(subprocess.TimeoutExpired):
            child.wait(0.5)
            return None
        progress.listen()
        if stall.hangs(progress.heard):
            return stall.cause(progress.last_line)
    say(f"train: asked the trainer to stop; it has {stops.TRAINER:.0f} s to save a state")
    with suppress(ProcessLookupError):
        os.kill(progress.pid or child.pid, signal.SIGTERM)
    end = time.monotonic() + stops.TRAINER
    while child.poll() is None:
        if stops.hurried() or time.monotonic() > end:
            say(f"train: the trainer {'is hurried' if stops.hurried() else 'did not stop'}, and is killed")
            return None
        with suppress(subprocess.TimeoutExpired):
            child.wait(0.1)
    return None


def _adopt_orphans() -> None:
    """Let processes that lose their parent become this one's children, so that they are found at the end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _kill_what_is_left(pipe: Path) -> None:
    """Kill all that came of the trainer.

    A launcher's processes have sessions of their own, and those of other programs are not to be touched.
    """
    for _ in range(3):  # the children of one that is killed become this process's, and are reaped in turn
        left = _processes(pipe)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)


def _processes(pipe: Path) -> list[psutil.Process]:
    """All that came of the trainer: it has the pipe's name in its environment, in whatever session."""
    return [one for one in psutil.Process().children(recursive=True) if _pipe_of(one) == str(pipe)]


def _pipe_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(metrics.VARIABLE)
    except psutil.Error:
        return None


def _take_records(child: "subprocess.Popen[bytes]", read_end: int, progress: Progress) -> None:
    with os.fdopen(read_end, encoding="utf-8") as pipe:
        for record in metrics.read(pipe):
            progress.take(record)
            if progress.alarm:
                child.kill()


def _take_lines(child: "subprocess.Popen[bytes]", log: Path, progress: Progress, tail: deque[str]) -> None:
    """Every line until the end: where nobody reads, the trainer waits for ever."""
    assert child.stdout is not None
    with suppress(OSError), log.open("w", encoding="utf-8") as kept:
        # tqdm redraws its line with \r: only what would stay visible is kept
        for raw in io.TextIOWrapper(child.stdout, encoding="utf-8", errors="replace", newline=""):
            line = redact(raw.strip())
            if raw.endswith("\r"):
                progress.redrawn(line)
            elif line:
                tail.append(line)
                with suppress(OSError):  # a full disk, which the trainer itself will tell of
                    kept.write(line + "\n")
                    kept.flush()
                progress.write(line)
