import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from entrypoint import stops, trainer
from entrypoint.failures import Stopped


def run(code: str, tmp_path: Path, stall_seconds: float = 0) -> trainer.Ended:
    return trainer.run([sys.executable, "-c", code], {"GREETING": "hello"}, tmp_path / "log", stall_seconds)


def test_lines_steps_and_exit_code_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = """
import os, sys
from kohya.metrics import Start, Step, Writer
print(os.environ["GREETING"])
print("to stderr", file=sys.stderr)
print("\\rbar 1\\rbar 2")
writer = Writer()
writer.write(Start(steps=1, epochs=1, images_per_step=1))
writer.write(Step(1, 1, 0.5, 0.5, {"unet": 1e-4}))
sys.exit(3)
"""
    ended = run(code, tmp_path)
    assert ended == trainer.Ended(3, ("hello", "to stderr", "bar 2"))
    assert (tmp_path / "log").read_text() == "hello\nto stderr\nbar 2\n"
    out = capsys.readouterr().out
    assert "step=1/1 epoch=1/1 loss=0.5000" in out
    assert "hello\n" in out


def test_a_killed_trainer_is_told_by_its_signal(tmp_path: Path) -> None:
    assert run("import os; os.kill(os.getpid(), 9)", tmp_path).code == -signal.SIGKILL


def test_a_training_that_diverges_is_ended(tmp_path: Path) -> None:
    code = """
import time
from kohya.metrics import Start, Step, Writer
writer = Writer()
writer.write(Start(steps=100, epochs=1, images_per_step=1))
for number in range(10):
    writer.write(Step(number + 1, 1, float("nan"), 0.5, {"unet": 1e-4}))
time.sleep(600)
"""
    ended = run(code, tmp_path)
    assert ended.cause is not None
    assert ended.cause.startswith("The loss was not a number for 10 steps in a row.")


@pytest.mark.parametrize("own_session", [False, True])
def test_workers_that_the_trainer_leaves_behind_are_ended(own_session: bool, tmp_path: Path) -> None:
    """A launcher for several devices gives each of its processes a session."""
    ended = run(
        "import subprocess, sys;"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        f"stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session={own_session}).pid)",
        tmp_path,
    )
    assert gone(int(ended.tail[0]))


def test_other_programs_and_what_they_start_meanwhile_are_left_alone(tmp_path: Path) -> None:
    begun, there = tmp_path / "begun", tmp_path / "there"
    wait = "import os, time\nwhile not os.path.exists({!r}): time.sleep(0.01)\n"
    program = wait.format(str(begun)) + "import subprocess; subprocess.Popen(['sleep', '600'])\n"
    program += f"open({str(there)!r}, 'w'); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", program])
    run(f"open({str(begun)!r}, 'w')\n" + wait.format(str(there)), tmp_path)
    left = psutil.Process(other.pid).children()
    assert [process.cmdline() for process in left] == [["sleep", "600"]]
    for process in (*left, other):
        process.kill()
    other.wait()


def test_a_log_that_cannot_be_written_does_not_stop_the_listening(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to("/dev/full")
    ended = run(
        "print('x' * 80 + '\\n', end='') or [print('y' * 80) for _ in range(5000)]; print('last')", tmp_path
    )
    assert (ended.code, ended.tail[-1]) == (0, "last")


def test_a_bar_that_is_drawn_over_counts_as_life(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = run("print('a 1%', end='\\r'); print('a 2%', end='\\r'); print('a 3%')", tmp_path)
    assert ended.tail == ("a 3%",)
    assert "a 1%" not in capsys.readouterr().out


def test_a_line_that_the_output_cannot_spell_is_printed_all_the_same() -> None:
    code = "from entrypoint import console as c; c.speak_any_language(); c.say('学習')"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert told.stdout == b"\\u5b66\\u7fd2\n"


def test_a_stop_lets_the_trainer_save_and_reaches_its_workers(tmp_path: Path) -> None:
    code = f"""
import signal, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
def stop(*_):
    open({str(tmp_path / "saved")!r}, "w").write(str(worker.pid))
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
open({str(tmp_path / "ready")!r}, "w")
time.sleep(600)
"""

    def stop_when_ready() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_ready).start()
    with stopping(), pytest.raises(Stopped):
        run(code, tmp_path)
    assert gone(int((tmp_path / "saved").read_text()))


def test_a_second_stop_does_not_wait_for_the_trainer(tmp_path: Path) -> None:
    code = f"""
import signal, time
signal.signal(signal.SIGTERM, lambda *_: open({str(tmp_path / "asked")!r}, "w"))
open({str(tmp_path / "ready")!r}, "w")
while True:
    time.sleep(1)
"""

    def stop_twice() -> None:
        for file in ("ready", "asked"):
            while not (tmp_path / file).exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_twice).start()
    begun = time.monotonic()
    with stopping(), pytest.raises(Stopped):
        run(code, tmp_path)
    assert time.monotonic() - begun < stops.TRAINER / 2
    assert stops.seconds_left() <= stops.HURRIED


def test_a_trainer_that_hangs_is_ended_and_one_that_computes_is_not(tmp_path: Path) -> None:
    ended = run("import time; print('loading'); time.sleep(600)", tmp_path, stall_seconds=2)
    assert ended.cause is not None
    assert ended.cause.startswith("The trainer hung: for 0.0333333 minutes it printed nothing")
    assert "Its last line was: loading." in ended.cause
    (tmp_path / "metrics").unlink()
    busy = "import time; end = time.process_time() + 4\nwhile time.process_time() < end: pass"
    assert run(busy, tmp_path, stall_seconds=2) == trainer.Ended(0, ())


def test_a_stop_while_the_trainer_is_being_started_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    class Slow(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self.pid)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Slow)
    with stopping(), pytest.raises(Stopped):
        trainer.run(["sleep", "600"], {}, tmp_path / "log", 0)
    monkeypatch.undo()
    assert gone(started[0])


@contextmanager
def stopping() -> Iterator[None]:
    """SIGTERM raises Stopped, as in a job."""
    before = {number: signal.getsignal(number) for number in stops.SIGNALS}
    stops.raise_them()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def gone(pid: int) -> bool:
    """Whether a process has ended, or ends within a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
        ).stdout
        if not state.strip() or state.startswith("Z"):
            return True
        time.sleep(0.01)
    return False
