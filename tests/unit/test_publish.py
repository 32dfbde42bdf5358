import os
from pathlib import Path

from entrypoint.publish import event_logs, place


def test_placing_replaces_whole_files_and_leaves_no_parts(tmp_path: Path) -> None:
    source = tmp_path / "a"
    source.write_text("new")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "x.safetensors").write_text("old")
    place({"x.safetensors": source, "deep/er/y": source}, folder)
    made = {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
    }
    assert made == {"x.safetensors": "new", "deep/er/y": "new"}


def test_event_logs_of_this_run_alone_flat_where_esd_reads_them(tmp_path: Path) -> None:
    def log(name: str, seconds: float) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (seconds, seconds))

    log("before/network_train/events.out.tfevents.1.host", 100)
    log("now/network_train/events.out.tfevents.2.host", 200)
    log("now/network_train/1.5/events.out.tfevents.2.host.1", 200)
    log("now/network_train/note.txt", 200)
    assert list(event_logs(tmp_path, 150, flat=False)) == [
        "now/network_train/1.5/events.out.tfevents.2.host.1",
        "now/network_train/events.out.tfevents.2.host",
    ]
    assert list(event_logs(tmp_path, 150, flat=True)) == ["events.out.tfevents.2.host"]
