from pathlib import Path

import pytest

from kohya import states
from kohya.states import KEPT_SECONDS, VARIABLE, Timer


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock, in seconds."""
    clock = [1000.0]
    monkeypatch.setattr(states.time, "monotonic", lambda: clock[0])
    return clock


def test_a_state_is_whole_and_kept_before_the_minutes_are_over(
    tmp_path: Path, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "5")
    timer = Timer()
    now[0] += 300 - KEPT_SECONDS - 0.1
    assert not timer.due
    now[0] += 0.1
    assert timer.due
    now[0] += 7  # while it is saved
    timer.saved(tmp_path / "a")
    now[0] += 300 - KEPT_SECONDS - 7 - 0.1
    assert not timer.due
    now[0] += 0.1
    assert timer.due


@pytest.mark.parametrize(("minutes", "after"), [("0.05", 1.5), ("0", None), (None, None)])
def test_minutes_that_are_short_or_none(
    minutes: str | None, after: float | None, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if minutes is not None:
        monkeypatch.setenv(VARIABLE, minutes)
    timer = Timer()
    now[0] += (after or 1e9) - 0.1
    assert not timer.due
    now[0] += 0.1
    assert timer.due == (after is not None)
