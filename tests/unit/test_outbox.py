import errno
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from entrypoint.failures import Problem, StorageError
from entrypoint.outbox import Outbox, place
from entrypoint.storage import S3Uri


class Bucket:
    """A storage that keeps what is uploaded; it fails as often as it is told to, and waits."""

    def __init__(self, *, failures: int = 0) -> None:
        self.content: list[tuple[str, bytes]] = []
        self.may = threading.Event()
        self.may.set()
        self._failures = failures

    def upload(self, files: Mapping[Path, S3Uri], **_: object) -> None:
        self.may.wait()
        if self._failures:
            self._failures -= 1
            raise StorageError(Problem("s3://b/x", "S3 is busy", "Try again"))
        self.content += [(uri.key, path.read_bytes()) for path, uri in files.items()]


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


def test_on_a_full_disk_a_file_gets_a_second_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_source: Path, target: Path) -> None:
        target.write_bytes(b"ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    (tmp_path / "cat").write_bytes(b"half a cat and the other half")
    place({"cat": tmp_path / "cat"}, tmp_path / "out")
    assert (tmp_path / "out" / "cat").samefile(tmp_path / "cat")
    monkeypatch.setattr(Path, "hardlink_to", lambda *_: full(tmp_path / "cat", tmp_path / "x"))
    with pytest.raises(OSError, match="No space left"):
        place({"dog": tmp_path / "cat"}, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cat"]


def test_what_is_there_is_not_sent_again_and_what_has_changed_is(tmp_path: Path) -> None:
    file, bucket = tmp_path / "cat.safetensors", Bucket()
    box = Outbox(bucket)  # type: ignore[arg-type]
    file.write_bytes(b"one")
    for _ in range(2):
        box.send({"cat": file}, S3Uri("b", "out"))
    assert box.has({"cat": file}, S3Uri("b", "out"))
    assert not box.has({"cat": file}, S3Uri("b", "elsewhere"))
    file.write_bytes(b"three")
    box.send({"cat": file}, S3Uri("b", "out"))
    assert bucket.content == [("out/cat", b"one"), ("out/cat", b"three")]


def test_in_the_background_batches_go_in_order_and_a_fault_leaves_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, bucket = tmp_path / "file", Bucket(failures=1)
    file.write_bytes(b"x")
    box = Outbox(bucket)  # type: ignore[arg-type]
    batches = [({"state/model": file}, S3Uri("b")), ({"state/state.json": file}, S3Uri("b"))]
    bucket.may.clear()
    box.begin(batches)
    assert box.busy
    bucket.may.set()
    box.wait()
    assert not box.busy
    assert bucket.content == []  # no manifest without its state
    assert "WARNING: not published yet, and tried again: s3://b/x: S3 is busy" in capsys.readouterr().err
    for files, location in batches:
        box.send(files, location)
    assert [key for key, _ in bucket.content] == ["state/model", "state/state.json"]
