"""Clients that meet faults, and do not wait for long."""

import pytest

from entrypoint.storage import retries


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, and a second of silence at most; patience as ever, for a machine may be busy."""
    monkeypatch.setattr(retries, "_FIRST", 0.01)
    monkeypatch.setattr(retries, "SILENCE", 1.0)
    monkeypatch.setattr(retries, "BRIEF", 30.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lasts is given up at once. For tests in which every try fails."""
    monkeypatch.setattr(retries, "_FIRST", 0.01)
    monkeypatch.setattr(retries, "SILENCE", 0.2)
    monkeypatch.setattr(retries, "LASTS", 0.3)
    monkeypatch.setattr(retries, "BRIEF", 0.3)
