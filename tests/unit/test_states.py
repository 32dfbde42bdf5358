import errno
import json
from pathlib import Path
from typing import Any

import pytest

from entrypoint import states
from entrypoint.event_log import EventLog
from entrypoint.states import PLACES, Shelf
from entrypoint.storage import Storage
from kohya.config import Kind
from tests.reports import prepared

RUN = {"learning_rate": 1e-4, "data set": "4 pictures, ab"}


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return EventLog(tmp_path / "nothing", tmp_path / "logs", None)


def make(folder: Path, step: int) -> Path:
    """A state as a trainer leaves it."""
    (folder / "deeper").mkdir(parents=True)
    (folder / "train_state.json").write_text(json.dumps({"current_step": step}))
    (folder / "deeper" / "model.safetensors").write_bytes(bytes([step]) * 1000)
    return folder


def find(folder: Path, run: dict[str, Any] = RUN) -> tuple[list[int], list[str]]:
    """The steps of the states in a folder, and the problems with them."""
    found, problems = states.find([folder], run, Storage())
    return [state.manifest.step for state in found], [problem.wrong for problem in problems]


def taken(folder: Path, work: Path) -> states.Taken | None:
    return states.take(states.find([folder], RUN, Storage())[0], work, Storage())


def test_a_step_of_more_gpus_is_another_one(
    tmp_path: Path, log: EventLog, base_models: dict[Kind, Path], pictures: Path
) -> None:
    plan = prepared(tmp_path, base_models["sd15"], pictures).plan
    assert plan is not None
    data: Any = {"data": (plan.dataset, plan.dataset_files), "reg": None, "weights": {}, "values": {}}
    one, four = (
        states.identity(plan.request, "sd15", plan.model, **data, dataset_config=None, processes=count)
        for count in (1, 4)
    )
    shelf = Shelf(tmp_path / "shelf", one, None)
    shelf.keep(make(tmp_path / "1", 1), log)
    assert find(shelf.folder, one) == ([1], [])
    steps, (problem,) = find(shelf.folder, four)
    assert steps == []
    assert "GPUs that train was 1 and is 4" in problem


def test_two_places_take_turns_and_the_newest_is_taken(tmp_path: Path, log: EventLog) -> None:
    shelf = Shelf(tmp_path / "shelf", RUN, None)
    for step in (1, 2, 3):
        shelf.keep(make(tmp_path / str(step), step), log)
    assert sorted(path.name for path in shelf.folder.iterdir()) == [*PLACES]
    assert find(shelf.folder) == ([3, 2], [])
    found = taken(shelf.folder, tmp_path / "work")
    assert found is not None
    assert found.step == 3
    assert (found.folder / "deeper" / "model.safetensors").read_bytes() == bytes([3]) * 1000
    again = Shelf(tmp_path / "shelf", RUN, found)  # of the job that goes on: the older one is replaced
    again.keep(make(tmp_path / "4", 4), log)
    assert find(shelf.folder) == ([4, 3], [])


def test_a_place_that_is_busy_is_not_touched(tmp_path: Path, log: EventLog) -> None:
    shelf = Shelf(tmp_path / "shelf", RUN, None)
    first = shelf.keep(make(tmp_path / "1", 1), log)
    for step in (2, 3):
        assert shelf.keep(make(tmp_path / str(step), step), log, busy={first}) != first
    assert find(shelf.folder) == ([3, 1], [])


@pytest.mark.parametrize("damage", ["a byte", "a file", "the manifest"])
def test_a_broken_state_is_passed_over_with_a_word(
    damage: str, tmp_path: Path, log: EventLog, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf = Shelf(tmp_path / "shelf", RUN, None)
    for step in (1, 2):
        newest = shelf.folder / shelf.keep(make(tmp_path / str(step), step), log)
    file = newest / "deeper" / "model.safetensors"
    match damage:
        case "a byte":
            file.write_bytes(b"\1" + file.read_bytes()[1:])
        case "a file":
            file.unlink()
        case "the manifest":
            (newest / "state.json").write_text('{"format": 1, "st')
    found = taken(shelf.folder, tmp_path / "work")
    assert found is not None
    assert found.step == 1
    said = capsys.readouterr().err
    assert str(newest) in said
    assert "passed over" in said


def test_a_copy_that_fails_leaves_what_was_there(tmp_path: Path, log: EventLog) -> None:
    shelf = Shelf(tmp_path / "shelf", RUN, None)
    for step in (1, 2):
        shelf.keep(make(tmp_path / str(step), step), log)
    half = make(tmp_path / "3", 3)
    (half / "train_state.json").write_text("{")
    with pytest.raises(ValueError, match="Expecting"):
        shelf.keep(half, log)
    assert find(shelf.folder) == ([2, 1], [])
    assert sorted(path.name for path in shelf.folder.iterdir()) == [*PLACES]


def test_a_state_that_cannot_be_fetched_now_is_not_broken(
    tmp_path: Path, log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the job would begin anew, and write over it."""
    shelf = Shelf(tmp_path / "shelf", RUN, None)
    shelf.keep(make(tmp_path / "1", 1), log)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(states, "_copied", full)
    with pytest.raises(OSError, match="No space left"):
        taken(shelf.folder, tmp_path / "work")


def test_without_room_beside_it_the_older_state_makes_room(
    tmp_path: Path, log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(tmp_path / "shelf", RUN, None)
    for step in (1, 2):
        shelf.keep(make(tmp_path / str(step), step), log)
    copied = states._copied

    def on_a_full_disk(source: Path, target: Path) -> Any:
        if len([*shelf.folder.glob("state-*")]) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return copied(source, target)

    monkeypatch.setattr(states, "_copied", on_a_full_disk)
    shelf.keep(make(tmp_path / "3", 3), log)
    assert find(shelf.folder) == ([3, 2], [])


def test_what_differs_is_named(tmp_path: Path, log: EventLog) -> None:
    shelf = Shelf(tmp_path / "shelf", RUN, None)
    shelf.keep(make(tmp_path / "1", 1), log)
    found, problems = find(shelf.folder, {**RUN, "learning_rate": 2e-4, "network_dim": 8})
    assert not found
    assert problems == [
        "it is of another run: learning_rate was 0.0001 and is 0.0002; network_dim was not set and is 8"
    ]


def test_loras_that_were_finished_come_along_and_a_damaged_one_is_told(
    tmp_path: Path, log: EventLog, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf = Shelf(tmp_path / "shelf", RUN, None)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
        shelf.keep_lora(tmp_path / name, f"{name}.safetensors")
    shelf.keep(make(tmp_path / "1", 1), log)
    (shelf.folder / "loras" / "b.safetensors").write_bytes(b"x")
    found = taken(shelf.folder, tmp_path / "work")
    assert found is not None
    assert {name: path.read_bytes() for name, path in found.loras.items()} == {"a.safetensors": b"a"}
    assert "b.safetensors, which was finished before the break, is lost" in capsys.readouterr().err


def test_a_job_that_is_done_leaves_nothing_to_go_on_from(tmp_path: Path, log: EventLog) -> None:
    shelf = Shelf(tmp_path / "shelf", RUN, None)
    shelf.keep(make(tmp_path / "1", 1), log)
    shelf.keep(make(tmp_path / "2", 2), log, name="cat-000001-state")
    assert sorted(shelf.finish()) == ["cat-000001-state/state.json", "state-a/state.json"]
    assert find(shelf.folder) == ([], [])
    left = {path.relative_to(shelf.folder).as_posix() for path in shelf.folder.rglob("*") if path.is_file()}
    asked = {"deeper/model.safetensors", "train_state.json", "state.json"}
    assert left == {"state-a/state.json", *(f"cat-000001-state/{name}" for name in asked)}


def test_a_manifest_does_not_lead_out_of_its_folder(
    tmp_path: Path, log: EventLog, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf = Shelf(tmp_path / "shelf", RUN, None)
    shelf.keep(make(tmp_path / "1", 1), log)
    (tmp_path / "shelf" / "secret").write_text("x")
    manifest = shelf.folder / "state-a" / "state.json"
    content = json.loads(manifest.read_text())
    content["files"]["../secret"] = content["files"]["train_state.json"]
    manifest.write_text(json.dumps(content))
    assert taken(shelf.folder, tmp_path / "work") is None
    assert "../secret is missing" in capsys.readouterr().err
