"""One event log a run, whatever became of it: what was logged before a break, and what is logged after it.

A trainer begins a new file each time that it is started. Its records are added to one that goes on from what
the state's run had logged by the state's step, so that each step stands there once.

TensorBoard's files are TFRecords, one after the other: the length of the content (8 bytes, little-endian), a
checksum (4), the content, a checksum (4). https://www.tensorflow.org/tutorials/load_data/tfrecord
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

_HEAD, _TAIL = 12, 4  # bytes around a record's content


@dataclass(frozen=True)
class Before:
    """What was logged before a break: a file, and its name below the folder of event logs."""

    file: Path
    name: str


class EventLog:
    """The event log that the trainer is writing below `source`, added to one below `folder`.

    `name`: of one that begins here; without it, that of the trainer's file, which no other run has.
    """

    def __init__(self, source: Path, folder: Path, before: Before | None, name: str | None = None) -> None:
        self._source, self._folder = source, folder
        self.name = before.name if before else name  # below `folder`; None while it is not known
        self._read = 0  # bytes of the trainer's file
        self._before = 0  # bytes that were logged before a break
        if before is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(before.file, self.file)
            self._before = self.file.stat().st_size
        self._shift = 0  # by how many bytes ours is longer

    @property
    def file(self) -> Path:
        """Where it is. There may be nothing yet."""
        return self._folder / (self.name or "")

    def grow(self) -> None:
        """Add what is logged since. Raises OSError, and can be called again then."""
        written = next(self._source.rglob("events.out.tfevents.*"), None)
        if written is None:
            return
        self.name = self.name or written.relative_to(self._source).as_posix()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.touch()
        with written.open("rb") as source:
            source.seek(self._read)
            content = source.read()
        added = content[: _whole(content)]
        if not added:
            return
        if self._read == 0 and self._before:
            first = _record(added)  # says which version of the format follows, and is there already
            added, self._read = added[first:], first
            self._shift = self._before - first
        with self.file.open("r+b") as ours:  # what a full disk cut off the last time is overwritten
            ours.seek(self._read + self._shift)
            ours.write(added)
            ours.truncate()
        self._read += len(added)

    def until(self, length: int, file: Path) -> None:
        """Copy what there was when the trainer's own file had this length. Raises OSError."""
        with self.file.open("rb") as ours:
            file.write_bytes(ours.read(length + self._shift))


def _whole(content: bytes) -> int:
    """How many of these bytes are whole records."""
    end = 0
    while (size := _record(content[end : end + _HEAD])) and end + size <= len(content):
        end += size
    return end


def _record(content: bytes) -> int:
    """The bytes of the record that begins here; 0 where not even its length is known."""
    if len(content) < _HEAD:
        return 0
    return _HEAD + int.from_bytes(content[:8], "little") + _TAIL
