"""Sending many files: in parallel, large ones in parts, until they are there or their time is up."""

import base64
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from entrypoint.failures import Outage, StorageError
from entrypoint.storage.checksums import digest
from entrypoint.storage.crew import Crew, settle
from entrypoint.storage.errors import disk, error_code
from entrypoint.storage.meter import Meter
from entrypoint.storage.objects import S3Uri
from entrypoint.storage.retries import GivenUp, Patience, uncut

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

    from entrypoint.storage import Storage

PART = 8 << 20  # bytes, each held in memory while it is sent
_FILES_AT_ONCE = 8
_PARTS_AT_ONCE = 8
_LOOK_SECONDS = 0.1  # how soon a cancel is seen
_BEGINNINGS = 4  # of an upload in parts that S3 forgets about
Place = Mapping[str, Any]  # of an object, or an upload, as boto3 is told
_CHECKSUM: Final = "CRC64NVME"  # S3 keeps one of the whole object, however many parts it came in


class Send:
    """One call of Storage.upload: its threads, and how they are stopped."""

    def __init__(self, storage: "Storage", progress: Meter, *, go_on: bool = False) -> None:
        self._storage = storage
        self._go_on = go_on  # with uploads in parts that were cut off
        self._progress = progress
        self._patience = Patience()
        self._files = Crew(_FILES_AT_ONCE, "send")
        self._parts = Crew(_PARTS_AT_ONCE, "send-part")

    def run(self, files: Mapping[Path, S3Uri], cancel: threading.Event) -> Mapping[Path, StorageError]:
        """Send all of them; returns those that were not sent, in their order, each with the reason."""
        sent = {path: self._files.submit(partial(self._one, path, uri)) for path, uri in files.items()}
        try:
            while not cancel.is_set() and wait(sent.values(), _LOOK_SECONDS).not_done:
                self._progress.tick()
        finally:
            self._patience.stop.set()
            self._progress.close()
            settle(sent.values(), 0)
            self._files.leave()
            self._parts.leave()
        reasons = {path: _reason(future, path, files[path]) for path, future in sent.items()}
        return {path: reason for path, reason in reasons.items() if reason is not None}

    def _one(self, path: Path, uri: S3Uri) -> None:
        """One file, as long as it is now: an event log grows while it is read."""
        place: Place = {"Bucket": uri.bucket, "Key": uri.key}
        told: Place = {"ChecksumAlgorithm": _CHECKSUM, "ContentType": content_type(path)}
        with (
            self._turn(uri),
            disk(path),
            self._storage.explained("s3:PutObject", uri),
            path.open("rb") as file,
        ):
            size = os.fstat(file.fileno()).st_size
            if size > PART:
                self._in_parts(file.fileno(), size, place, told)
                return
            body = os.pread(file.fileno(), size, 0)
            self._storage.ask(lambda client: client.put_object(**place, **told, Body=body), self._patience)
            self._progress.add(size)

    def _in_parts(self, file: int, size: int, place: Place, told: Place) -> None:
        """Send a file in parts, and begin again where S3 no longer knows of them.

        So it is when the answer to the last request was lost: the object is there, and nothing says so.
        """
        from botocore.exceptions import ClientError  # noqa: PLC0415

        for left in reversed(range(_BEGINNINGS)):
            try:
                self._once_in_parts(file, size, place, told)
                return
            except ClientError as error:
                if error_code(error) != "NoSuchUpload" or not left:
                    raise
                self._progress.expect(size)

    def _once_in_parts(self, file: int, size: int, place: Place, told: Place) -> None:
        from botocore.exceptions import ClientError  # noqa: PLC0415

        def begin(client: "S3Client") -> Mapping[str, Any]:
            return uncut(client.create_multipart_upload(**place, **told), "UploadId")

        def complete(client: "S3Client") -> Mapping[str, Any]:
            return uncut(client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}), "ETag")

        begun, there = self._begun(file, size, place) if self._go_on else (None, {})
        upload = {**place, "UploadId": begun or self._storage.ask(begin, self._patience)["UploadId"]}
        try:
            parts = self._all_parts(file, size, upload, there)
            self._storage.ask(complete, self._patience)
        except ClientError:
            if self._go_on:  # the next upload takes up these parts
                raise
            with suppress(Exception):  # one try: what is incomplete is no object
                self._storage.client.abort_multipart_upload(**upload)
            raise

    def _begun(self, file: int, size: int, place: Place) -> tuple[str | None, Mapping[int, Any]]:
        """The newest upload of this object that was cut off, and what S3 tells of its parts, by number.

        Only of those that are still the file's: it may have been changed meanwhile.
        """

        def find(client: "S3Client") -> tuple[str | None, Mapping[int, Any]]:
            asked = {"Bucket": place["Bucket"], "Prefix": place["Key"]}
            pages = client.get_paginator("list_multipart_uploads").paginate(**asked)
            begun = [
                one
                for page in pages
                for one in page.get("Uploads", ())
                if one["Key"] == place["Key"] and one.get("ChecksumAlgorithm", _CHECKSUM) == _CHECKSUM
            ]
            if not begun:
                return None, {}
            upload = {**place, "UploadId": max(begun, key=lambda one: one["Initiated"])["UploadId"]}
            listed = client.get_paginator("list_parts").paginate(**upload)
            parts = {one["PartNumber"]: one for page in listed for one in page.get("Parts", ())}
            there = {number: _told(number, one) for number, one in parts.items() if _is_part(file, size, one)}
            return upload["UploadId"], there

        return self._storage.ask(find, self._patience)

    def _all_parts(self, file: int, size: int, upload: Place, there: Mapping[int, Any]) -> Sequence[Any]:
        """Send a file's parts but those that are `there`; returns what S3 wants to be told of each."""
        missing = [start for start in range(0, size, PART) if start // PART + 1 not in there]
        self._progress.expect(sum(min(PART, size - start) for start in missing) - size)
        sent = [
            self._parts.submit(partial(self._part, file, start, min(PART, size - start), upload))
            for start in missing
        ]
        try:
            for ended in wait(sent, return_when=FIRST_EXCEPTION).done:
                ended.result()
        finally:
            settle(sent)  # before the file is closed: its number may then be another file's
        told = [*there.values(), *(part.result() for part in sent)]
        return sorted(told, key=lambda part: part["PartNumber"])

    def _part(self, file: int, start: int, length: int, upload: Place) -> Mapping[str, Any]:
        number, body = start // PART + 1, os.pread(file, length, start)
        answer: Mapping[str, Any] = self._storage.ask(
            lambda client: client.upload_part(
                **upload, PartNumber=number, Body=body, ChecksumAlgorithm=_CHECKSUM
            ),
            self._patience,
        )
        self._progress.add(length)
        return _told(number, answer)

    @contextmanager
    def _turn(self, uri: S3Uri) -> Iterator[None]:
        """Wait for an upload to the same URI that was given up, and whose last try may still arrive."""
        turn = self._storage.turn(uri)
        while not turn.acquire(timeout=_LOOK_SECONDS):
            self._patience.check()
        try:
            yield
        finally:
            turn.release()


def _told(number: int, answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """What S3 wants to be told of a part, from what it said of it."""
    names = ("ETag", f"Checksum{_CHECKSUM}")
    return {"PartNumber": number, **{name: answer[name] for name in names if name in answer}}


def _is_part(file: int, size: int, part: Mapping[str, Any]) -> bool:
    """Whether a part that S3 has is the file's, by what S3 tells of it: its checksum, else its MD5."""
    start = (part["PartNumber"] - 1) * PART
    if part["Size"] != min(PART, size - start):
        return False
    if stated := part.get(f"Checksum{_CHECKSUM}"):
        return bool(base64.b64encode(digest(file, _CHECKSUM, start, part["Size"])).decode() == stated)
    return bool(digest(file, "MD5", start, part["Size"]).hex() == part["ETag"].strip('"'))


def _reason(sent: "Future[None]", path: Path, uri: S3Uri) -> StorageError | None:
    """Why a file was not sent; None for one that was."""
    error = sent.exception() if sent.done() and not sent.cancelled() else GivenUp()
    if isinstance(error, GivenUp):
        wrong = f"{path.name} was not sent before the time for it was up"
        return StorageError(Outage(str(uri), wrong, "Upload it by hand, or start the job again"))
    if error is None or isinstance(error, StorageError):
        return error
    raise error


def content_type(path: Path) -> str:
    """The Content-Type that a file is uploaded with."""
    return _CONTENT_TYPES.get(path.suffix.lower(), "application/octet-stream")


_CONTENT_TYPES = {
    ".csv": "text/csv; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".json": "application/json",
    ".log": "text/plain; charset=utf-8",
    ".png": "image/png",
    ".toml": "application/toml",
    ".txt": "text/plain; charset=utf-8",
    ".webp": "image/webp",
}
