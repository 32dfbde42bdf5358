"""Files on their way to where a job's results are asked for: a folder, or an S3 prefix.

While the job trains they go in the background, and at its end the rest goes. What is there already, and has
not changed since, is not sent again. Nothing that lies there is ever deleted.
"""

import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from entrypoint import stops
from entrypoint.console import warn
from entrypoint.failures import JobError
from entrypoint.request import Location
from entrypoint.storage import Crew, Storage

Batch = tuple[Mapping[str, Path], Location]  # files by the names that they get there


class Outbox:
    """One job's."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._sent: dict[str, tuple[int, int]] = {}  # where to → size and time of what was sent there
        self._thread = Crew(1, "publish")
        self._running: Future[None] | None = None
        self._over = threading.Event()  # the time after a stop is
        self._told: set[str] = set()

    @property
    def busy(self) -> bool:
        """Whether what was begun is still on its way."""
        return self._running is not None and not self._running.done()

    def begin(self, batches: Sequence[Batch]) -> None:
        """Send these in the background, one batch after the other. Only while it is not busy.

        After a fault nothing more goes to the same place this time; the same fault is told once.
        """
        left = [(new, location) for files, location in batches if (new := self._new(files, location))]
        if left:
            self._running = self._thread.submit(partial(self._all, left))

    def wait(self) -> None:
        """Wait for what was begun, as long as the job may go on."""
        if self._running is not None:
            self._end(self._running)

    def has(self, files: Mapping[str, Path], location: Location) -> bool:
        """Whether these were sent, as they are now."""
        return not self._new(files, location)

    def has_any(self, name: str, location: Location) -> bool:
        """Whether anything was sent under this name."""
        return _key(name, location) in self._sent

    def send(self, files: Mapping[str, Path], location: Location) -> None:
        """Send what is not there yet, now, as long as the job may go on. Raises JobError and OSError."""
        sending = Crew(1, "publish")
        try:
            self._end(sending.submit(partial(self._send, files, location))).result()
        finally:
            sending.leave()

    def _end(self, sending: Future[None]) -> Future[None]:
        """Wait until it has ended; when the time is over it does so by itself, and says what was not sent."""
        while wait([sending], 0.1).not_done:
            if stops.seconds_left() <= 0:
                self._over.set()
        return sending

    def _send(self, files: Mapping[str, Path], location: Location) -> None:
        new = self._new(files, location)
        if not new:
            return
        found = {name: _signature(path) for name, path in new.items()}
        if isinstance(location, Path):
            place(new, location)
        else:
            uris = {path: location / name for name, path in new.items()}
            self._storage.upload(uris, what="publish", cancel=self._over)
        self._sent |= {_key(name, location): signature for name, signature in found.items()}

    def _all(self, batches: Sequence[Batch]) -> None:
        failed = set()
        for files, location in batches:
            if location in failed:  # no manifest without its state
                continue
            try:
                self._send(files, location)
            except (JobError, OSError) as fault:
                failed.add(location)
                if str(fault) not in self._told:
                    warn(f"not published yet, and tried again: {fault}")
                self._told.add(str(fault))

    def _new(self, files: Mapping[str, Path], location: Location) -> dict[str, Path]:
        sent = self._sent
        return {
            name: path for name, path in files.items() if sent.get(_key(name, location)) != _signature(path)
        }


def place(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files into `folder` under the given names, each whole before it has its name.

    Where the disk is full, and holds the file already, it gets a second name there.
    """
    for name, source in files.items():
        with whole(folder / name) as part:
            _copy(source, part)


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A place beside `target` to write it to. It takes its name at the end, or goes where that fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as full:
        target.unlink(missing_ok=True)
        try:
            target.hardlink_to(source)
        except OSError:
            raise full from None


def _key(name: str, location: Location) -> str:
    return str(location / name)


def _signature(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns
