"""How far a transfer is, with and without a terminal."""

import io
import threading
from collections.abc import Iterator

import pytest

from entrypoint.storage import meter
from entrypoint.storage.meter import Meter

CLEAR = "\r\x1b[K"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What time it is, to be changed."""
    now = [100.0]
    monkeypatch.setattr(meter.time, "monotonic", lambda: now[0])
    yield now


def ticked(clock: list[float]) -> str:
    """What is printed of a transfer of 2 MB that takes 20 s, by someone who looks twice a second."""
    progress = Meter("fetch", 2_000_000)
    for _ in range(40):
        clock[0] += 0.5
        progress.add(50_000)
        progress.tick()
    progress.close()
    return progress.summary(1)


def test_lines_where_there_is_no_terminal(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert ticked(clock) == "fetch: 1 file, 2.0 MB in 20 s, 0 MB/s"
    assert capsys.readouterr().out.splitlines() == [
        "fetch: 0.9/2.0 MB, 0 MB/s, 11 s left",
        "fetch: 1.8/2.0 MB, 0 MB/s, 2.0 s left",
    ]


def test_one_line_on_a_terminal(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    ticked(clock)
    first, second, *_, last, nothing = terminal.getvalue().split(CLEAR)[1:]
    assert (first, second) == ("fetch: 0.1/2.0 MB, 0 MB/s, 20 s left", "fetch: 0.1/2.0 MB, 0 MB/s, 19 s left")
    assert last.startswith("fetch: 2.0/2.0 MB")
    assert nothing == ""
    assert "\n" not in terminal.getvalue()


def test_another_thread_draws_nothing(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's bar may be drawn meanwhile."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    thread = threading.Thread(target=ticked, args=(clock,))
    thread.start()
    thread.join()
    assert CLEAR not in terminal.getvalue()
    assert len(terminal.getvalue().splitlines()) == 2
