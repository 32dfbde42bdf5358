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
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from entrypoint import console
from entrypoint.failures import Problem, StorageError
from entrypoint.storage import retries
from entrypoint.storage.checksums import Damaged, verify
from entrypoint.storage.crew import Crew
from entrypoint.storage.errors import disk, problem
from entrypoint.storage.fetching import Fetch, Record
from entrypoint.storage.meter import Meter, how_verified
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
from entrypoint.storage.retries import Fault, Patience, uncut
from entrypoint.storage.sending import Send, content_type

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

T = TypeVar("T")

__all__ = [
    "FETCH_FOLDER",
    "Crew",
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
    wherever boto3 finds them. Every method raises StorageError, and does so only when what is wrong stays
    so: at most two minutes after S3 stopped being of use (retries.py).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: S3Client | None = None
        self._reached: bool | None = None  # S3 has answered; False: it has been waited for in vain since
        self._turns: defaultdict[S3Uri, threading.Lock] = defaultdict(threading.Lock)

    def head(self, uri: S3Uri) -> RemoteObject:
        """The size and ETag of one object."""
        facts = self.facts(uri)
        return RemoteObject(uri, facts["ContentLength"], facts["ETag"].strip('"'))

    def list(self, folder: S3Uri) -> Iterator[RemoteObject]:
        """The objects below a folder, a page of 1,000 at a time; empty "folder/" keys are left out."""
        for page in self._pages(folder):
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

        def get(client: "S3Client") -> bytes:
            answer = client.get_object(Bucket=uri.bucket, Key=uri.key, Range=wanted)
            with closing(answer["Body"]) as body:
                return body.read()

        with self.explained("s3:GetObject", uri):
            return self.ask(get)

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

    def upload(
        self,
        files: Mapping[Path, S3Uri],
        *,
        what: str = "upload",
        cancel: threading.Event | None = None,
        go_on: bool = False,
    ) -> None:
        """Upload each file to its URI, in parallel; S3 checks what it receives against a checksum.

        Every file is tried, also after another has failed. Nothing is ever deleted. It ends soon after
        `cancel` is set, whatever S3 does: then no try is begun any more, and the error names what was not
        sent. A try that runs may still end well, and the next upload to its URI waits for that, so that of
        two uploads the later one stays.

        `go_on`: a large file whose upload was cut off goes on with the parts that S3 has of it. Only for
        URIs that never get another content.
        """
        progress = Meter(what, sum(path.stat().st_size for path in files if path.is_file()))
        unsent = Send(self, progress, go_on=go_on).run(files, cancel or threading.Event())
        if len(unsent) == 1:
            raise next(iter(unsent.values()))
        if unsent:
            first = next(iter(unsent.values())).problem
            names = ", ".join(path.name for path in unsent)
            wrong = f"{first.wrong}; {len(unsent)} of {len(files)} files could not be uploaded: {names}"
            raise StorageError(type(first)(first.where, wrong, first.fix))
        console.say(progress.summary(len(files)))

    def check_writable(self, folder: S3Uri) -> None:
        """Raise StorageError where nothing could be uploaded to a folder, without leaving anything there.

        A multipart upload is begun and given up: it needs s3:PutObject, and an upload that is not completed
        is no object.
        """
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

        probe = folder / "job.json"
        place: dict[str, Any] = {"Bucket": probe.bucket, "Key": probe.key}
        with self.explained("s3:PutObject", probe):
            begun = self.ask(lambda client: uncut(client.create_multipart_upload(**place), "UploadId"))
        place["UploadId"] = begun["UploadId"]
        with suppress(BotoCoreError, ClientError):  # s3:AbortMultipartUpload is a permission of its own
            self.ask(lambda client: client.abort_multipart_upload(**place))

    def ask(self, call: Callable[["S3Client"], T], patience: Patience | None = None) -> T:
        """What `call` returns, given a client; called again, after a pause, while that may help.

        Raises what it raised last, of boto3's exceptions; GivenUp when nobody waits for it any more.
        """
        patience, failed, expired = patience or Patience(), 0.0, 0
        for tries in itertools.count(1):
            patience.check()
            client = self.client
            try:
                answer = call(client)
            except Exception as error:
                found = retries.fault(error)
                if found is Fault.LASTING:
                    raise
                if found is not Fault.UNREACHED and self._reached is None:
                    self._reached = True
                failed = failed or time.monotonic()
                end = failed + (retries.LASTS if self._reached else retries.BRIEF)
                expired += found is Fault.EXPIRED
                if expired == retries.EXPIRED_TRIES:
                    raise
                if not patience.pause(tries, end):
                    self._reached = False
                    raise
                if found is Fault.EXPIRED:
                    self._forget(client)
            else:
                self._reached = True
                return answer
        raise AssertionError("unreachable")

    def turn(self, uri: S3Uri) -> threading.Lock:
        """Held by whoever uploads to that URI."""
        with self._lock:
            return self._turns[uri]

    def _pages(self, folder: S3Uri) -> Iterator[Mapping[str, Any]]:
        """S3's answers to a listing, of at most 1,000 objects each."""
        asked: dict[str, Any] = {"Bucket": folder.bucket, "Prefix": folder.prefix}
        while True:
            with self.explained("s3:ListBucket", folder):
                page = self.ask(lambda client: uncut(client.list_objects_v2(**asked), "IsTruncated"))
            yield page
            if not page["IsTruncated"]:
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def _forget(self, client: "S3Client") -> None:
        """Look for credentials anew before the next request."""
        with self._lock:
            if self._opened is client:
                self._opened = None

    @property
    def client(self) -> "S3Client":
        with self._lock:
            if self._opened is None:
                import boto3  # noqa: PLC0415
                from botocore.config import Config  # noqa: PLC0415

                endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
                config = Config(
                    connect_timeout=retries.CONNECT,
                    read_timeout=retries.SILENCE,
                    retries={"mode": "standard", "total_max_attempts": 1},  # retries.py says why
                    max_pool_connections=64,  # more than threads that ask at once
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

    def facts(self, uri: S3Uri, patience: Patience | None = None, **more: Any) -> Mapping[str, Any]:
        """What S3 says of one object."""
        from botocore.exceptions import ClientError  # noqa: PLC0415

        place: dict[str, Any] = {"Bucket": uri.bucket, "Key": uri.key}

        def head(client: "S3Client") -> Mapping[str, Any]:
            try:
                return client.head_object(**place, **more)
            except ClientError as error:
                if retries.fault(error) is not Fault.LASTING:
                    raise
                # An answer to HEAD has no body, so it says 403 and not why. An answer to GET does.
                client.get_object(**place)["Body"].close()
                raise ConnectionError("S3 refused a HEAD and not the GET after it") from error

        with self.explained("s3:GetObject", uri):
            return self.ask(head, patience)

    def holds(self, source: RemoteObject, path: Path) -> bool:
        """Whether an object holds what a file does, as far as S3's checksum of it tells; else its size."""
        facts = self.facts(source.uri, ChecksumMode="ENABLED")
        with disk(path), path.open("rb") as file:
            try:
                verify(file.fileno(), source, facts, self.part_sizes)
            except Damaged:
                return False
        return True

    def part_sizes(self, source: RemoteObject, patience: Patience | None = None) -> Sequence[int] | None:
        """The sizes of the parts that an object was uploaded in; None where they cannot be told.

        Every uploader makes all parts but the last of one size. (The sizes one by one would need the
        permission s3:GetObjectAttributes, which roles seldom have.)
        """
        from botocore.exceptions import ClientError  # noqa: PLC0415

        place: dict[str, Any] = {"Bucket": source.uri.bucket, "Key": source.uri.key}
        try:
            first = self.ask(lambda client: client.head_object(**place, PartNumber=1), patience)
        except ClientError as error:
            if retries.fault(error) is Fault.LASTING:
                return None
            raise
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
