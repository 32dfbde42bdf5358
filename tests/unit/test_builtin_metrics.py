"""kohya.metrics: what goes into the pipe comes out of it, and a broken pipe hurts nobody."""

import math
import os

import pytest

from kohya import metrics

RECORDS = [
    metrics.Start(steps=64, epochs=2, images_per_step=4, step=32, pid=17),
    metrics.Step(step=33, epoch=2, loss=0.5, avg_loss=0.25, lr={"unet": 1e-4, "textencoder": 5e-5}),
]


def test_what_is_written_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setenv(metrics.VARIABLE, f"/proc/self/fd/{writer}")
    pipe = metrics.Writer()
    os.close(writer)
    for record in RECORDS:
        pipe.write(record)
    pipe.close()
    with os.fdopen(reader) as stream:
        assert list(metrics.read(stream)) == RECORDS


def test_lines_are_as_the_design_spells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setenv(metrics.VARIABLE, f"/proc/self/fd/{writer}")
    pipe = metrics.Writer()
    pipe.write(RECORDS[0])
    pipe.close()
    os.close(writer)
    with os.fdopen(reader) as stream:
        assert (
            stream.read()
            == '{"event":"start","steps":64,"epochs":2,"images_per_step":4,"step":32,"pid":17}\n'
        )


def test_no_number_arrives_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setenv(metrics.VARIABLE, f"/proc/self/fd/{writer}")
    pipe = metrics.Writer()
    pipe.write(metrics.Step(step=1, epoch=1, loss=math.nan, avg_loss=math.inf, lr={}))
    pipe.close()
    os.close(writer)
    with os.fdopen(reader) as stream:
        record = next(metrics.read(stream))
    assert isinstance(record, metrics.Step) and math.isnan(record.loss) and math.isnan(record.avg_loss)


def test_without_a_reader_writing_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setenv(metrics.VARIABLE, f"/proc/self/fd/{writer}")
    pipe = metrics.Writer()
    os.close(reader)
    pipe.write(RECORDS[0])
    pipe.write(RECORDS[1])
    os.close(writer)


@pytest.mark.parametrize("value", ["", "x", "/proc/self/fd/987"])
def test_a_variable_that_names_nothing_is_no_pipe(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(metrics.VARIABLE, value)
    metrics.Writer().write(RECORDS[0])


@pytest.mark.parametrize("line", ["", "{", "[]", '{"event":"other"}', '{"event":"step","step":1}', "null"])
def test_a_torn_line_is_no_record(line: str) -> None:
    assert metrics.parse(line) is None
