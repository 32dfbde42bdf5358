"""entrypoint.rate: a line every few seconds, and none at the end, where another tells the sum."""

import pytest

from entrypoint import rate


def test_a_line_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(rate.time, "monotonic", lambda: now[0])
    counted = rate.Rate("prepare: captioning", 40)
    for now[0] in (101.0, 102.0, 106.0, 107.0, 112.0):
        counted.add(8)
    assert capsys.readouterr().out.splitlines() == [
        "prepare: captioning: 24 of 40 pictures, 4.00 pictures/s, eta_s=4"
    ]
    assert str(counted) == "3.33 pictures/s"
