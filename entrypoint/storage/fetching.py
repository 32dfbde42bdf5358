"""Fetching many objects: in parallel, by ranges, verified, each put into its place when it is whole.

Unfinished files and the record of what was verified lie in <root>/.fetch.
"""

import itertools
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from entrypoint import console
from entrypoint.failures import Problem, StorageError
from entrypoint.storage.checksums import Damaged, verify
from entrypoint.storage.crew import Crew, settle
from entrypoint.storage.errors import disk, error_code
from entrypoint.storage.meter import Meter
from entrypoint.storage.objects import FETCH_FOLDER, Fetched, RemoteObject
from entrypoint.storage.retries import Patience

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

    from entrypoint.storage import Storage

MIB = 1 << 20
PART = 32 * MIB  # measured: 8 MiB ranges are a fifth slower, larger ones no faster
OBJECTS_AT_ONCE = 16  # small objects wait for S3's answer, not for bandwidth
PARTS_AT_ONCE = min(16, 4 * (os.cpu_count() or 1))  # S3 gives one connection 85 to 90 MB/s
DAMAGED_TRIES = 4  # of an object that arrives whole, and is not what S3 says it has
_LEFT_SECONDS = 86400.0  # after which unfinished files are nobody's
_STOP_SECONDS = 2.0  # how long an interrupted fetch waits for its threads


class _Replaced(Exception):
    """The object is no longer the one that was listed."""


class Fetch:
    """One call of Storage.fetch: its threads, and how they are stopped."""

    def __init__(self, storage: "Storage", record: "Record", progress: "Meter") -> None:
        self._storage = storage
        self._record = record
        self._progress = progress
        # Of its own: another job may fetch to the same folder at the same time.
        self._unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=record.folder))
        self._numbers = itertools.count()
        self._patience = Patience()
        self._objects = Crew(OBJECTS_AT_ONCE, "fetch")
        self._parts = Crew(PARTS_AT_ONCE, "fetch-part")

    def run(self, wanted: Mapping[str, RemoteObject]) -> Sequence[Fetched]:
        """Fetch all of them, in the order in which they end. The first failure ends everything."""
        finished: SimpleQueue[Future[Fetched]] = SimpleQueue()
        futures: list[Future[Fetched]] = []
        results: list[Fetched] = []
        for left in self._record.folder.glob("unfinished-*"):  # of a job that was killed
            if time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        try:
            for path, source in wanted.items():
                futures.append(self._objects.submit(partial(self._one, path, source)))
                futures[-1].add_done_callback(finished.put)
            while len(results) < len(wanted):
                self._progress.tick()
                try:
                    results.append(finished.get(timeout=1).result())
                except Empty:
                    continue
        finally:
            self._patience.stop.set()
            self._progress.close()
            settle(futures, _STOP_SECONDS)
            self._objects.leave()
            self._parts.leave()
            shutil.rmtree(self._unfinished, ignore_errors=True)
        return results

    def _one(self, path: str, source: RemoteObject) -> Fetched:
        """One object, from S3 into its place."""
        began = time.monotonic()
        unfinished = self._unfinished / str(next(self._numbers))
        place = self._record.root / path
        with disk(place), self._storage.explained("s3:GetObject", source.uri):
            source, verified, checksum = self._verified(source, unfinished)
            place.parent.mkdir(parents=True, exist_ok=True)
            unfinished.replace(place)
            fetched = Fetched(source, place, verified, checksum, time.monotonic() - began)
            self._record.add(path, fetched)
        return fetched

    def _verified(self, source: RemoteObject, file: Path) -> tuple[RemoteObject, str, str]:
        """Transfer until what is on disk is what S3 has; an object that was replaced is begun again."""
        from botocore.exceptions import FlexibleChecksumError  # noqa: PLC0415

        reason, part_sizes = "", partial(self._storage.part_sizes, patience=self._patience)
        for _ in range(DAMAGED_TRIES):
            try:
                with file.open("w+b") as out:
                    facts = self._transfer(source, out.fileno())
                    return source, *verify(out.fileno(), source, facts, part_sizes)
            except _Replaced:
                reason = "was replaced while it was being fetched, each time anew"
                source = self._storage.head(source.uri)
                console.warn(f"{source.uri} was replaced after it was listed; the new object is fetched")
            except (Damaged, FlexibleChecksumError) as error:
                reason = f"arrived damaged {DAMAGED_TRIES} times: {error}"
            self._progress.expect(source.size)
        raise StorageError(Problem(str(source.uri), reason, "Upload the object again and start a new job"))

    def _transfer(self, source: RemoteObject, out: int) -> Mapping[str, Any]:
        """Write an object to an open file; returns what S3 says of the whole of it."""
        if source.size <= PART and "-" not in source.etag:
            return self._part(source, out, 0, source.size, ChecksumMode="ENABLED")  # one answer says it all
        facts = self._storage.facts(source.uri, self._patience, ChecksumMode="ENABLED")
        starts = range(0, source.size, PART)
        parts = []
        for start in starts:
            length = min(PART, source.size - start)
            wanted = f"bytes={start}-{start + length - 1}"
            part = partial(self._part, source, out, start, length, Range=wanted)
            parts.append(self._parts.submit(part))
        try:
            for ended in wait(parts, return_when=FIRST_EXCEPTION).done:
                ended.result()
        finally:
            settle(parts)  # before the file is closed: its number may then be another file's
        return facts

    def _part(
        self, source: RemoteObject, out: int, start: int, length: int, **request: Any
    ) -> Mapping[str, Any]:
        """Write `length` bytes of an object from `start` on."""
        from botocore.exceptions import ClientError  # noqa: PLC0415

        def get(client: "S3Client") -> Mapping[str, Any]:
            position = start
            try:
                answer = client.get_object(
                    Bucket=source.uri.bucket, Key=source.uri.key, IfMatch=f'"{source.etag}"', **request
                )
                with closing(answer["Body"]) as body:
                    if answer["ETag"].strip('"') != source.etag:  # from a server that does not know If-Match
                        raise _Replaced
                    if answer["ContentLength"] != length:
                        raise Damaged(f"S3 sent {answer['ContentLength']:,} bytes of {length:,}")
                    buffer = memoryview(bytearray(min(MIB, length) or 1))
                    while count := body.readinto(buffer):  # type: ignore[arg-type]
                        self._patience.check()
                        _write(out, buffer[:count], position)
                        position += count
                        self._progress.add(count)
                return answer
            except ClientError as error:
                if error_code(error) in ("PreconditionFailed", "412"):
                    raise _Replaced from error
                raise
            except Exception:
                self._progress.add(start - position)
                raise

        return self._storage.ask(get, self._patience)


def _write(out: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(out, data, position)
        data, position = data[count:], position + count


class Record:
    """What was fetched to a folder and verified: one JSON a line, the last line of a path counts.

    A file without a line here, or that has changed since its line was written, is not trusted.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / FETCH_FOLDER
        self._file = self.folder / "record.jsonl"
        self._lock = threading.Lock()
        self._lines: dict[str, Mapping[str, Any]] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        text = self._file.read_text(encoding="utf-8", errors="replace") if self._file.exists() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self._lines[entry["path"]] = entry
            except (ValueError, KeyError, TypeError):
                continue  # cut off when the job was killed

    def find(self, path: str, source: RemoteObject) -> Fetched | None:
        """The object as it was fetched to that path earlier, if it is still what S3 has."""
        entry = self._lines.get(path, {})
        place = self.root / path
        if place.is_symlink() or not place.is_file():
            return None
        now = place.stat()
        if [entry.get("source"), entry.get("mtime_ns")] != [asdict(source), now.st_mtime_ns]:
            return None
        if now.st_size != source.size:
            return None
        return Fetched(source, place, entry["verified"], entry["checksum"], 0.0, reused=True)

    def add(self, path: str, fetched: Fetched) -> None:
        """Write down that a file is whole and verified."""
        now = fetched.path.stat()
        entry = {
            "path": path,
            "source": asdict(fetched.source),
            "mtime_ns": now.st_mtime_ns,
            "verified": fetched.verified,
            "checksum": fetched.checksum,
        }
        with self._lock, self._file.open("a") as file:
            file.write(json.dumps(entry) + "\n")
