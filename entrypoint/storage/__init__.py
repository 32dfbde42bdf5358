"""S3 to disk and back. Nobody else imports boto3.

An object is fetched as ranges, in parallel, into <root>/.fetch; it takes its place only when it is whole
and agrees with the checksum that S3 holds of it. What has been verified is written down there as well, so
that it is not fetched a second time.

boto3 and its relatives are imported where they are first needed: they cost half a second, and a job whose
inputs are all channels never talks to S3.
"""

import itertools
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrypoint import console
from entrypoint.failures import Problem, StorageError
from entrypoint.storage.errors import disk, problem
from entrypoint.storage.fetching import (
    ATTEMPTS,
    OBJECTS_AT_ONCE,
    PART,
    PARTS_AT_ONCE,
    Fetch,
    Record,
    broken_streams,
)
from entrypoint.storage.meter import Meter, how_verified, subscriber
from entrypoint.storage.objects import (
    FETCH_FOLDER,
    Fetched,
    RemoteObject,
    S3Uri,
    clashes,
    refused,
    safe_relative,
    unsafe,
)

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

__all__ = [
    "FETCH_FOLDER",
    "Fetched",
    "RemoteObject",
    "S3Uri",
    "Storage",
    "content_type",
    "safe_relative",
    "unsafe",
]


class Storage:
    """S3, as the job uses it. Safe to share between threads; nothing is opened before the first call.

    Region from AWS_REGION or AWS_DEFAULT_REGION, another endpoint from AWS_ENDPOINT_URL_S3, credentials
    wherever boto3 finds them. Every method raises StorageError.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: S3Client | None = None

    def head(self, uri: S3Uri) -> RemoteObject:
        """The size and ETag of one object."""
        facts = self.facts(uri)
        return RemoteObject(uri, facts["ContentLength"], facts["ETag"].strip('"'))

    def list(self, folder: S3Uri) -> Iterator[RemoteObject]:
        """The objects below a folder, a page of 1,000 at a time; empty "folder/" keys are left out."""
        with self.explained("s3:ListBucket", folder):
            pages = self.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=folder.bucket, Prefix=folder.prefix):
                for item in page.get("Contents", ()):
                    if item["Size"] or not item["Key"].endswith("/"):
                        uri = S3Uri(folder.bucket, item["Key"])
                        yield RemoteObject(uri, item["Size"], item["ETag"].strip('"'))

    def read(self, uri: S3Uri, *, limit: int) -> bytes:
        """A small object, such as a JSON or a TOML, of at most `limit` bytes."""
        size = self.head(uri).size
        if size > limit:
            wrong = f"has {size:,} bytes; expected at most {limit:,}"
            raise StorageError(Problem(str(uri), wrong, "Check that this is the object that is meant"))
        return self.read_range(uri, 0, size)

    def read_range(self, uri: S3Uri, start: int, length: int) -> bytes:
        """`length` bytes of an object from `start` on, fewer if it ends before."""
        if length <= 0:
            return b""
        wanted = f"bytes={start}-{start + length - 1}"
        with self.explained("s3:GetObject", uri):
            for attempt in itertools.count(1):
                try:
                    answer = self.client.get_object(Bucket=uri.bucket, Key=uri.key, Range=wanted)
                    with closing(answer["Body"]) as body:
                        return body.read()
                except broken_streams():
                    if attempt == ATTEMPTS:
                        raise
        raise AssertionError("unreachable")

    def fetch(
        self, wanted: Mapping[str, RemoteObject], root: Path, *, what: str = "fetch"
    ) -> Sequence[Fetched]:
        """Fetch each object to its path below `root`, in the order given. `what` opens the progress lines.

        Objects and their parts come in parallel. A file that an earlier fetch verified, and that nobody
        has touched since, stays as it is. When this raises, also because of a signal, no unfinished file is
        left behind, and those that were finished are not fetched again next time.
        """
        for path in clashes(wanted):
            wrong = f"{path} is needed both as a file and as a folder"
            raise StorageError(Problem(str(wanted[path].uri), wrong, "Rename one of the two"))
        for path, source in wanted.items():
            if reason := unsafe(path):
                raise refused(source.uri, reason)
        with disk(root):
            record = Record(root)
            fetched = {path: found for path, source in wanted.items() if (found := record.find(path, source))}
            missing = {path: source for path, source in wanted.items() if path not in fetched}
            progress = Meter(what, sum(source.size for source in missing.values()))
            if missing:
                for result in Fetch(self, record, progress).run(missing):
                    fetched[result.path.relative_to(root).as_posix()] = result
        console.say(progress.summary(len(missing), how_verified(fetched.values())))
        return [fetched[path] for path in wanted]

    def upload(self, files: Mapping[Path, S3Uri], *, what: str = "upload") -> None:
        """Upload each file to its URI, in parallel; S3 checks what it receives against a checksum.

        Every file is tried, also after another has failed. Nothing is ever deleted.
        """
        from s3transfer.manager import TransferConfig, TransferManager  # noqa: PLC0415

        failures: list[StorageError] = []
        progress = Meter(what, sum(path.stat().st_size for path in files if path.is_file()))
        config = TransferConfig(
            multipart_threshold=PART, multipart_chunksize=PART, max_request_concurrency=PARTS_AT_ONCE
        )
        with TransferManager(self.client, config) as manager:
            transfers = [
                (
                    path,
                    uri,
                    manager.upload(
                        str(path),
                        uri.bucket,
                        uri.key,
                        # S3 keeps a CRC64NVME of the whole object, however many parts it came in
                        extra_args={"ChecksumAlgorithm": "CRC64NVME", "ContentType": content_type(path)},
                        subscribers=[subscriber(progress)],
                    ),
                )
                for path, uri in files.items()
            ]
            for path, uri, transfer in transfers:
                while not transfer.done():
                    time.sleep(0.05)
                    progress.tick()
                try:
                    with disk(path), self.explained("s3:PutObject", uri):
                        transfer.result()
                except StorageError as error:
                    failures.append(error)
        if len(failures) == 1:
            raise failures[0]
        if failures:
            first = failures[0].problem
            wrong = f"{first.wrong}; {len(failures)} of {len(files)} files could not be uploaded"
            raise StorageError(Problem(first.where, wrong, first.fix))
        console.say(progress.summary(len(files)))

    def check_writable(self, folder: S3Uri) -> None:
        """Raise StorageError where nothing could be uploaded to a folder, without leaving anything there.

        A multipart upload is begun and given up: it needs s3:PutObject, and an upload that is not completed
        is no object.
        """
        from botocore.exceptions import ClientError  # noqa: PLC0415

        probe = folder / "job.json"
        with self.explained("s3:PutObject", probe):
            begun = self.client.create_multipart_upload(Bucket=probe.bucket, Key=probe.key)
        with suppress(ClientError):  # s3:AbortMultipartUpload is a permission of its own
            self.client.abort_multipart_upload(Bucket=probe.bucket, Key=probe.key, UploadId=begun["UploadId"])

    @property
    def client(self) -> "S3Client":
        with self._lock:
            if self._opened is None:
                import boto3  # noqa: PLC0415
                from botocore.config import Config  # noqa: PLC0415

                endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
                config = Config(
                    connect_timeout=10,
                    read_timeout=30,
                    retries={"mode": "standard", "total_max_attempts": 5},
                    max_pool_connections=OBJECTS_AT_ONCE + PARTS_AT_ONCE,
                    # A bucket is rarely a host name below an endpoint of one's own.
                    s3={"addressing_style": "path" if endpoint else "auto"},
                    # Asked for by the request that wants it. A server that states a checksum of the whole
                    # object with a range of it would otherwise fail every range.
                    response_checksum_validation="when_required",
                )
                region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
                try:
                    self._opened = boto3.session.Session().client("s3", region_name=region, config=config)
                except ValueError as error:
                    fix = "Correct AWS_ENDPOINT_URL_S3 (http://host:port) or AWS_REGION"
                    raise StorageError(Problem("S3", console.redact(str(error)), fix)) from error
            return self._opened

    def facts(self, uri: S3Uri, **more: Any) -> Mapping[str, Any]:
        from botocore.exceptions import ClientError  # noqa: PLC0415

        with self.explained("s3:GetObject", uri):
            try:
                return self.client.head_object(Bucket=uri.bucket, Key=uri.key, **more)
            except ClientError:
                # An answer to HEAD has no body, so it says 403 and not why. An answer to GET does.
                self.client.get_object(Bucket=uri.bucket, Key=uri.key, Range="bytes=0-0")["Body"].close()
                raise

    def part_sizes(self, source: RemoteObject) -> Sequence[int] | None:
        """The sizes of the parts that an object was uploaded in; None where they cannot be told.

        Every uploader makes all parts but the last of one size. (The sizes one by one would need the
        permission s3:GetObjectAttributes, which roles seldom have.)
        """
        from botocore.exceptions import ClientError  # noqa: PLC0415

        try:
            first = self.client.head_object(Bucket=source.uri.bucket, Key=source.uri.key, PartNumber=1)
        except ClientError:
            return None
        part = first["ContentLength"]
        starts = range(0, source.size, part or 1)
        return (
            [min(part, source.size - start) for start in starts]
            if len(starts) == first.get("PartsCount")
            else None
        )

    @contextmanager
    def explained(self, action: str, uri: S3Uri) -> Iterator[None]:
        """Turn boto3's errors into sentences. `action`: the IAM permission that the calls inside need."""
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

        try:
            yield
        except (BotoCoreError, ClientError, ConnectionError) as error:
            raise StorageError(problem(error, action, uri, self.client)) from error


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
