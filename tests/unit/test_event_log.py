from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from entrypoint.event_log import Before, EventLog


def write(folder: Path, first: int, last: int) -> int:
    """Log these steps as a trainer does; the bytes of its file."""
    writer = SummaryWriter(str(folder / "run"))
    for step in range(first, last + 1):
        writer.add_scalar("loss/current", step / 10, step)
    writer.close()
    (file,) = (folder / "run").iterdir()
    return file.stat().st_size


def steps(log: EventLog) -> list[int]:
    events = EventAccumulator(str(log.file))
    events.Reload()
    return [event.step for event in events.Scalars("loss/current")]


def test_whole_records_are_added_as_they_come(tmp_path: Path) -> None:
    size = write(tmp_path / "trainer", 1, 3)
    (file,) = (tmp_path / "trainer" / "run").iterdir()
    content = file.read_bytes()
    log = EventLog(tmp_path / "trainer", tmp_path / "ours", None)
    for length in (0, 5, 40, size - 1):
        file.write_bytes(content[:length])
        log.grow()
        if length:
            assert content.startswith(log.file.read_bytes())
    assert log.file.stat().st_size < size - 1  # nothing of a record that is cut off
    file.write_bytes(content)
    log.grow()
    assert log.file.read_bytes() == content
    assert log.file == tmp_path / "ours" / "run" / file.name


def test_a_run_that_goes_on_has_each_step_once(tmp_path: Path) -> None:
    at_three = write(tmp_path / "first", 1, 3)
    first = EventLog(tmp_path / "first", tmp_path / "ours", None)
    first.grow()
    (file,) = (tmp_path / "first" / "run").iterdir()
    with SummaryWriter(str(tmp_path / "more")) as more:  # steps after the state, which are made again
        more.add_scalar("loss/current", 9.0, 4)
    (later,) = (tmp_path / "more").iterdir()
    file.write_bytes(file.read_bytes() + later.read_bytes())
    first.grow()
    assert steps(first) == [1, 2, 3, 4]
    first.until(at_three, tmp_path / "kept")

    at_five = write(tmp_path / "second", 4, 5)
    assert first.name is not None
    second = EventLog(tmp_path / "second", tmp_path / "ours", Before(tmp_path / "kept", first.name))
    assert steps(second) == [1, 2, 3]
    second.grow()
    assert steps(second) == [1, 2, 3, 4, 5]
    second.until(at_five, tmp_path / "kept again")

    write(tmp_path / "third", 6, 6)
    third = EventLog(tmp_path / "third", tmp_path / "ours", Before(tmp_path / "kept again", first.name))
    third.grow()
    assert steps(third) == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in (tmp_path / "ours" / "run").iterdir()] == [file.name]


def test_what_a_full_disk_cut_off_is_written_again(tmp_path: Path) -> None:
    write(tmp_path / "trainer", 1, 3)
    log = EventLog(tmp_path / "trainer", tmp_path / "ours", None)
    log.grow()
    log.file.write_bytes(log.file.read_bytes()[:50])
    log._read = 0  # as where the disk was full before the first record was whole
    log.grow()
    assert steps(log) == [1, 2, 3]


def test_nothing_is_logged_yet(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "nowhere", tmp_path / "ours", None)
    log.grow()
    assert log.name is None
    assert not (tmp_path / "ours").exists()
