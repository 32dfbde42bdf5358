"""S3 as the job uses it: names, checksums, and what is said when S3 or the disk says no.

The error sentences are tested over HTTP, against a server on loopback that answers what S3 answers
(https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html); boto3 itself is not patched.
"""

import base64
import hashlib
import os
import random
import re
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from awscrt import checksums

from entrypoint import console
from entrypoint.failures import Stopped, StorageError
from entrypoint.storage import (
    FETCH_FOLDER,
    RemoteObject,
    S3Uri,
    Storage,
    content_type,
    fetching,
    meter,
    retries,
    safe_relative,
    sending,
)
from tests.harness import stopped_when
from tests.s3 import free_port

FOLDER = S3Uri("bucket", "data")


@dataclass
class Answer:
    """What the server sends."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    stall: bool = False  # send half of the body, and the rest when released
    cut: bool = False  # send half of the body, then hang up


@dataclass
class Server:
    """A loopback server that answers as a test tells it, and remembers what it was asked."""

    answer: Callable[[str, str, Mapping[str, str]], Answer] = lambda method, path, headers: Answer(500)
    asked: list[tuple[str, str]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    told = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            told.asked.append((self.command, self.path))
            answer = told.answer(self.command, self.path, dict(self.headers))
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            broken = answer.stall or answer.cut
            self.wfile.write(answer.body[: len(answer.body) // 2] if broken else answer.body)
            if answer.stall:
                self.wfile.flush()
                told.released.wait(120)
                self.wfile.write(answer.body[len(answer.body) // 2 :])
            self.close_connection = broken

        do_HEAD = do_PUT = do_GET

        def log_message(self, *args: object) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        def handle_error(self, *args: object) -> None:
            """A client that hangs up is what some tests are about."""

    listener = Listener(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{listener.server_address[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-that-no-one-may-see")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    yield told
    told.released.set()
    listener.shutdown()
    listener.server_close()


def error(status: int, code: str, message: str = "", more: str = "", **headers: str) -> Answer:
    """An error as S3 sends it."""
    body = f'<?xml version="1.0"?>\n<Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>'
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, {"Content-Type": "application/xml", **sent}, body.encode())


def always(answer: Answer) -> Callable[[str, str, Mapping[str, str]], Answer]:
    return lambda method, path, headers: answer


def holding(content: bytes, **headers: str) -> Callable[[str, str, Mapping[str, str]], Answer]:
    """A server with one object. `headers`: of answers to requests for the whole of it."""
    etag = headers.pop("etag", hashlib.md5(content).hexdigest())
    sent = {f"x-amz-{name.replace('_', '-')}": value for name, value in headers.items()}

    def answer(method: str, path: str, asked: Mapping[str, str]) -> Answer:
        if method == "HEAD" and "partNumber=1" in path:
            return Answer(206, {"ETag": f'"{etag}"', "Content-Length": "4", "x-amz-mp-parts-count": "3"})
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", asked.get("Range", "")):
            return Answer(206, {"ETag": f'"{etag}"'}, content[int(found[1]) : int(found[2]) + 1])
        return Answer(200, {"ETag": f'"{etag}"', **sent}, content)

    return answer


def one(content: bytes, etag: str | None = None) -> Mapping[str, RemoteObject]:
    etag = etag or hashlib.md5(content).hexdigest()
    return {"file": RemoteObject(S3Uri("bucket", "key"), len(content), etag)}


# Names


@pytest.mark.parametrize(
    ("text", "bucket", "key"),
    [("s3://b", "b", ""), ("s3://b/", "b", ""), ("s3://b/a/c.x", "b", "a/c.x"), ("s3://b/a/", "b", "a/")],
)
def test_a_uri_is_a_bucket_and_a_key(text: str, bucket: str, key: str) -> None:
    assert S3Uri.parse(text) == S3Uri(bucket, key)


@pytest.mark.parametrize(
    "text", ["", "b/key", "/a/path", "s3:/b/key", "s3:///key", "https://b/key", "s3:// b/k"]
)
def test_anything_else_is_no_uri(text: str) -> None:
    with pytest.raises(ValueError, match="is no S3 URI; expected s3://bucket/key"):
        S3Uri.parse(text)


def test_uris_join_whether_or_not_a_folder_ends_in_a_slash() -> None:
    assert str(S3Uri("b", "a") / "c") == str(S3Uri("b", "a/") / "c") == "s3://b/a/c"
    assert str(S3Uri("b") / "c") == "s3://b/c"
    assert S3Uri("b", "a/cats/").name == S3Uri("b", "a/cats").name == "cats"


@pytest.mark.parametrize(
    "key",
    [
        "data/a.png",
        "data/10_cat/a b.png",
        "data/ä/日本語.txt",
        "data/a+b%20&c.png",
        "data/12:30.png",
        "data/..a",
        "data/" + "x" * 255,
    ],
)
def test_a_key_maps_to_the_path_below_its_folder(key: str) -> None:
    assert safe_relative(S3Uri("bucket", key), FOLDER) == key.removeprefix("data/")


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("data/../etc/passwd", "leads out of its folder"),
        ("data/a/../../b", "leads out of its folder"),
        ("data/./a", "leads out of its folder"),
        ("data//etc/passwd", "empty name"),
        ("data/a//b", "empty name"),
        ("data/a/", "empty name"),
        ("data/", "empty name"),
        ("data/a\\b", "backslash"),
        ("data/C:/b", "drive"),
        ("data/c:b", "drive"),
        ("data/a\0b", "control character"),
        ("data/a\nb", "control character"),
        ("data/x/NUL.txt", "device"),
        ("data/con", "device"),
        ("data/a./b", "dot or a space"),
        ("data/a ", "dot or a space"),
        ("data/" + "ä" * 128, "255 bytes"),
        (f"data/{FETCH_FOLDER}/record.jsonl", "needs itself"),
    ],
)
def test_a_key_that_would_leave_its_folder_is_refused_by_name(key: str, reason: str) -> None:
    with pytest.raises(StorageError, match=reason) as raised:
        safe_relative(S3Uri("bucket", key), FOLDER)
    assert key[:20].encode("unicode_escape").decode() in str(raised.value).encode(
        "unicode_escape"
    ).decode() or (repr(key)[1:-1] in str(raised.value))


def test_whatever_the_key_a_path_that_is_allowed_lies_in_the_folder(tmp_path: Path) -> None:
    draw = random.Random(7)
    pieces = [
        "a",
        "..",
        ".",
        "/",
        "//",
        "\\",
        "C:",
        "\0",
        " ",
        "é",
        "nul",
        "x" * 200,
        ".png",
        "~",
        "-",
        "\u202e",
        "%2e",
    ]
    allowed = 0
    for _ in range(20_000):
        key = "data/" + "".join(draw.choices(pieces, k=draw.randint(1, 6)))
        try:
            relative = safe_relative(S3Uri("bucket", key), FOLDER)
        except StorageError:
            continue
        allowed += 1
        path = os.path.normpath(tmp_path / relative)
        assert path == str(tmp_path / relative)  # one name for one file
        assert path.startswith(f"{tmp_path}/")
    assert allowed > 1000


def test_a_key_cannot_be_both_a_file_and_a_folder(tmp_path: Path) -> None:
    wanted = {name: RemoteObject(FOLDER / name, 1, "e") for name in ("a/b", "a/b/c/d", "a/bc")}
    with pytest.raises(
        StorageError, match="s3://bucket/data/a/b: a/b is needed both as a file and as a folder"
    ):
        Storage().fetch(wanted, tmp_path)


def test_fetch_itself_refuses_to_leave_its_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="leads out of its folder"):
        Storage().fetch({"../x": RemoteObject(FOLDER / "x", 1, "e")}, tmp_path)


# Costs


def test_a_storage_costs_nothing_until_it_is_used() -> None:
    program = (
        "import sys; from entrypoint.storage import Storage; Storage(); "
        "print('boto3' in sys.modules, 'botocore' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["False", "False"]


def test_small_files_cost_one_request_each(server: Server, tmp_path: Path) -> None:
    server.answer = holding(b"content")
    wanted = {f"{number}.png": one(b"content")["file"] for number in range(20)}
    Storage().fetch(wanted, tmp_path)
    assert [method for method, _ in server.asked] == ["GET"] * 20


# Verifying

CONTENT = b"abcdefghij"  # in parts of 4, 4 and 2 bytes
PARTS = [b"abcd", b"efgh", b"ij"]


def big_endian(value: int, width: int) -> bytes:
    return value.to_bytes(width, "big")


DIGESTS: Mapping[str, Callable[[bytes], bytes]] = {
    "crc64nvme": lambda data: big_endian(checksums.crc64nvme(data), 8),
    "crc32c": lambda data: big_endian(checksums.crc32c(data), 4),
    "crc32": lambda data: big_endian(zlib.crc32(data), 4),
    "sha256": lambda data: hashlib.sha256(data).digest(),
    "sha1": lambda data: hashlib.sha1(data).digest(),
}


def stated(name: str, parts: list[bytes] | None = None) -> str:
    digest = DIGESTS[name]
    if parts is None:
        return base64.b64encode(digest(CONTENT)).decode()
    return base64.b64encode(digest(b"".join(map(digest, parts)))).decode() + f"-{len(parts)}"


@pytest.mark.parametrize("name", DIGESTS)
@pytest.mark.parametrize("kind", ["FULL_OBJECT", "COMPOSITE"])
def test_a_file_is_verified_by_the_checksum_that_s3_holds(
    server: Server, tmp_path: Path, name: str, kind: str
) -> None:
    value = stated(name, PARTS if kind == "COMPOSITE" else None)
    etag = "0" * 32 + ("-3" if kind == "COMPOSITE" else "")
    server.answer = holding(CONTENT, etag=etag, **{f"checksum_{name}": value, "checksum_type": kind})
    [fetched] = Storage().fetch(one(CONTENT, etag), tmp_path)
    assert (fetched.verified, fetched.checksum) == (name, value)
    assert fetched.path.read_bytes() == CONTENT


def test_known_values_of_the_checksums() -> None:
    """The check values of the CRC catalogue, of "123456789": what the tests here rest on."""
    assert checksums.crc64nvme(b"123456789") == 0xAE8B14860A799888
    assert checksums.crc32c(b"123456789") == 0xE3069283
    assert checksums.crc32(b"123456789") == 0xCBF43926


@pytest.mark.parametrize("name", DIGESTS)
@pytest.mark.parametrize("kind", ["FULL_OBJECT", "COMPOSITE"])
def test_a_file_that_disagrees_with_its_checksum_is_tried_again_then_refused(
    server: Server, tmp_path: Path, name: str, kind: str
) -> None:
    value = stated(name, PARTS if kind == "COMPOSITE" else None)
    etag = "0" * 32 + ("-3" if kind == "COMPOSITE" else "")
    server.answer = holding(b"abcdefghiX", etag=etag, **{f"checksum_{name}": value, "checksum_type": kind})
    with pytest.raises(StorageError, match=r"s3://bucket/key: arrived damaged 4 times") as raised:
        Storage().fetch(one(CONTENT, etag), tmp_path)
    assert value in str(raised.value)
    assert not (tmp_path / "file").exists()
    assert sum(method == "GET" for method, _ in server.asked) == 4


def test_without_a_checksum_it_is_verified_by_the_md5_in_the_etag(server: Server, tmp_path: Path) -> None:
    server.answer = holding(CONTENT)
    [fetched] = Storage().fetch(one(CONTENT), tmp_path)
    assert (fetched.verified, fetched.checksum) == ("md5", hashlib.md5(CONTENT).hexdigest())
    server.answer = holding(CONTENT[::-1], etag=hashlib.md5(CONTENT).hexdigest())
    with pytest.raises(StorageError, match="its MD5 is not"):
        Storage().fetch(one(CONTENT), tmp_path / "other")


@pytest.mark.parametrize(
    "headers",
    [
        {"etag": "0" * 32, "server_side_encryption": "aws:kms"},
        {"etag": "0" * 32, "server_side_encryption_customer_algorithm": "AES256"},
        {"etag": "0" * 32 + "-3"},
    ],
)
def test_an_etag_that_is_no_md5_leaves_the_size(
    server: Server, tmp_path: Path, headers: dict[str, str]
) -> None:
    server.answer = holding(CONTENT, **headers)
    [fetched] = Storage().fetch(one(CONTENT, headers["etag"]), tmp_path)
    assert (fetched.verified, fetched.checksum) == ("size", "")


def test_a_connection_that_breaks_is_taken_up_again(server: Server, tmp_path: Path) -> None:
    whole = holding(CONTENT)

    def answer(method: str, path: str, headers: Mapping[str, str]) -> Answer:
        told = whole(method, path, headers)
        told.cut = len(server.asked) < 3
        return told

    server.answer = answer
    [fetched] = Storage().fetch(one(CONTENT), tmp_path)
    assert fetched.path.read_bytes() == CONTENT
    assert len(server.asked) == 3


def test_a_server_that_knows_no_if_match_cannot_mix_two_objects(server: Server, tmp_path: Path) -> None:
    server.answer = holding(b"the new one")
    [fetched] = Storage().fetch(one(CONTENT), tmp_path)
    assert fetched.source.etag == hashlib.md5(b"the new one").hexdigest()
    assert fetched.path.read_bytes() == b"the new one"


# Stopping


@pytest.mark.parametrize("size", [1000, 100_000])
def test_a_signal_stops_a_fetch_at_once_and_leaves_nothing_unfinished(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(fetching, "PART", 1000)
    monkeypatch.setattr(fetching, "PARTS_AT_ONCE", 4)
    whole = holding(b"x" * size)

    def answer(method: str, path: str, headers: Mapping[str, str]) -> Answer:
        told = whole(method, path, headers)
        told.stall = True
        return told

    server.answer = answer
    monkeypatch.setattr(retries, "SILENCE", 120.0)  # which is not waited for
    began = time.monotonic()
    with pytest.raises(Stopped), stopped_when(lambda: "GET" in dict(server.asked)):
        Storage().fetch(one(b"x" * size), tmp_path)
    assert time.monotonic() - began < 60
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    asked = len(server.asked)
    server.released.set()
    time.sleep(0.5)
    assert len(server.asked) == asked  # threads that waited for the server do not go on


def test_one_failure_ends_the_others(server: Server, tmp_path: Path) -> None:
    whole = holding(CONTENT)
    server.answer = lambda method, path, headers: (
        error(403, "AccessDenied") if path.endswith("/0") else whole(method, path, headers)
    )
    etag = hashlib.md5(CONTENT).hexdigest()
    wanted = {str(number): RemoteObject(FOLDER / str(number), 10, etag) for number in range(500)}
    with pytest.raises(StorageError, match="s3://bucket/data/0: access denied"):
        Storage().fetch(wanted, tmp_path)
    assert len(server.asked) < 400
    assert not (tmp_path / FETCH_FOLDER / "unfinished").exists()


# What is said

KEY = S3Uri("bucket", "models/base.safetensors")


@pytest.mark.parametrize(
    ("answer", "sentence", "way_out"),
    [
        (
            error(400, "ExpiredToken", "The provided token has expired."),
            "the credentials have expired",
            "aws sso login",
        ),
        (
            error(403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist"),
            "does not accept",
            "AWS_ACCESS_KEY_ID",
        ),
        (
            error(403, "SignatureDoesNotMatch", "The request signature"),
            "does not accept",
            "AWS_SECRET_ACCESS_KEY",
        ),
        (
            error(403, "RequestTimeTooSkewed", "The difference"),
            "this machine's clock is wrong",
            "Set the clock",
        ),
        (
            error(404, "NoSuchBucket", "The specified bucket does not exist"),
            "there is no such bucket",
            "bucket's name",
        ),
        (
            error(403, "AccessDenied", "User: arn:aws:sts::1:assumed-role/r is not authorized"),
            "access denied. S3 says: User: arn:aws:sts::1:assumed-role/r",
            "Allow s3:GetObject on arn:aws:s3:::bucket/models/base.safetensors to the job's role, "
            "and check the key: without s3:ListBucket on arn:aws:s3:::bucket a missing object looks the same",
        ),
        (
            error(403, "AccessDenied", "User r is not authorized to perform: kms:Decrypt on this resource"),
            "its KMS key may not be used",
            "Allow kms:Decrypt on that key",
        ),
        (
            error(400, "KMS.DisabledException", "key is disabled"),
            "its KMS key may not be used",
            "kms:Decrypt",
        ),
        (
            error(301, "PermanentRedirect", "The bucket you are", x_amz_bucket_region="eu-west-1"),
            "the bucket is in eu-west-1, and this job asks in us-east-1",
            "AWS_REGION=eu-west-1",
        ),
        (
            error(400, "AuthorizationHeaderMalformed", "expecting 'eu-west-3'", "<Region>eu-west-3</Region>"),
            "the bucket is in eu-west-3",
            "AWS_REGION=eu-west-3",
        ),
        (
            error(
                400,
                "IllegalLocationConstraintException",
                "The me-south-1 location constraint is incompatible",
            ),
            "the bucket is not in us-east-1",
            "AWS_REGION",
        ),
        (
            error(403, "InvalidObjectState", "not valid for the object's storage class"),
            "archived",
            "restore-object --bucket bucket",
        ),
        (
            error(418, "Teapot", "short and stout"),
            "S3 refuses: Teapot. S3 says: short and stout",
            "Look Teapot up",
        ),
    ],
    ids=lambda value: (
        re.sub(r"(?s).*<Code>|</Code>.*", "", value.body.decode()) if isinstance(value, Answer) else ""
    ),
)
@pytest.mark.parametrize("call", ["head", "fetch"])
def test_every_error_has_a_sentence_and_a_way_out(
    server: Server, tmp_path: Path, *, answer: Answer, sentence: str, way_out: str, call: str
) -> None:
    server.answer = always(answer)
    with pytest.raises(StorageError) as raised:
        if call == "head":
            Storage().head(KEY)
        else:
            Storage().fetch({"file": RemoteObject(KEY, 10, "e")}, tmp_path)
    assert raised.value.problem.where == str(KEY)
    assert sentence in raised.value.problem.wrong
    assert way_out in raised.value.problem.fix
    assert "a-secret-that" not in str(raised.value)


def test_denied_listing_and_upload_name_their_own_permission(server: Server, tmp_path: Path) -> None:
    server.answer = always(error(403, "AccessDenied", "Access Denied"))
    with pytest.raises(StorageError, match="Allow s3:ListBucket on arn:aws:s3:::bucket to the job's role"):
        list(Storage().list(FOLDER))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(
        StorageError, match=r"Allow s3:PutObject on arn:aws:s3:::bucket/data/a\.txt to the job's role"
    ):
        Storage().upload({tmp_path / "a.txt": FOLDER / "a.txt"})


def test_an_upload_that_fails_does_not_keep_the_others_from_being_tried(
    server: Server, tmp_path: Path
) -> None:
    server.answer = lambda method, path, headers: (
        error(403, "AccessDenied") if path.endswith("b.txt") else Answer()
    )
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    files = {tmp_path / f"{name}.txt": FOLDER / f"{name}.txt" for name in ("a", "b", "c", "none")}
    with pytest.raises(StorageError, match="2 of 4 files could not be uploaded"):
        Storage().upload(files)
    assert {path for _, path in server.asked} == {f"/bucket/data/{name}.txt" for name in "abc"}


def test_an_endpoint_that_does_not_answer_points_at_channels(
    monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(
        StorageError, match=r"S3 cannot be reached at http://127.0.0.1:\d+.*as channels instead\."
    ):
        Storage().head(KEY)


def test_an_endpoint_that_is_no_url_is_told(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "no url")
    with pytest.raises(StorageError, match="Correct AWS_ENDPOINT_URL_S3"):
        Storage().head(KEY)


def test_no_credentials_is_told(monkeypatch: pytest.MonkeyPatch, server: Server, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_ENDPOINT_URL_S3"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        StorageError, match=r"there are no credentials for S3.*execution role.*network isolation"
    ):
        Storage().head(KEY)
    assert server.asked == []


@pytest.mark.parametrize("name", ["Bad Bucket", "a"])
def test_a_bucket_name_that_cannot_be_is_told(server: Server, name: str) -> None:
    server.answer = always(error(400, "InvalidBucketName", "The specified bucket is not valid."))
    with pytest.raises(StorageError, match="Correct the URI: s3://bucket/key"):
        Storage().head(S3Uri(name, "key"))


def test_an_object_larger_than_expected_is_not_read(server: Server) -> None:
    server.answer = holding(b"x" * 101)
    with pytest.raises(StorageError, match="has 101 bytes; expected at most 100"):
        Storage().read(KEY, limit=100)
    assert [method for method, _ in server.asked] == ["HEAD"]


def test_a_long_fetch_says_how_far_it_is(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if "1.0/3.0 MB" in line:
            server.released.set()

    monkeypatch.setattr(meter, "_PROGRESS_SECONDS", 1.0)
    monkeypatch.setattr(console, "say", say)
    content = b"x" * 3_000_000
    whole = holding(content)

    def answer(method: str, path: str, headers: Mapping[str, str]) -> Answer:
        told = whole(method, path, headers)
        told.stall = True
        return told

    server.answer = answer
    late = threading.Timer(60, server.released.set)
    late.start()
    Storage().fetch(one(content), tmp_path, what="base model")
    late.cancel()
    assert re.fullmatch(
        r"base model: [01]\.\d/3\.0 MB, \d+ MB/s, (\d+\.\d s left|waiting for S3)", lines[0]
    ), lines
    assert any(re.fullmatch(r"base model: 1\.0/3\.0 MB, \d+ MB/s, \d+\.\d s left", line) for line in lines), (
        lines
    )
    assert re.fullmatch(r"base model: 1 file, 3\.0 MB in .* s, .* MB/s; 1 verified by md5", lines[-1]), lines


# When it is tried again


@pytest.mark.parametrize("told", ["ChecksumCRC64NVME", "ETag"])
def test_a_part_that_s3_has_is_held_against_the_file(tmp_path: Path, told: str) -> None:
    """By its checksum, for under a key of KMS the ETag is no MD5; else by that."""
    whole = bytes([1]) * sending.PART + b"end"
    for content in (whole, whole[:-1] + b"x"):
        file = tmp_path / "file"
        file.write_bytes(content)
        checksum, md5 = (
            base64.b64encode(DIGESTS["crc64nvme"](b"end")).decode(),
            hashlib.md5(b"end").hexdigest(),
        )
        part = {"PartNumber": 2, "Size": 3, "ETag": f'"{md5}"'}
        if told != "ETag":
            part |= {told: checksum, "ETag": f'"{"0" * 32}"'}
        with file.open("rb") as opened:
            assert sending._is_part(opened.fileno(), len(whole), part) == (content is whole)
            assert not sending._is_part(opened.fileno(), len(whole), {**part, "Size": 2})


def test_pauses_grow_to_a_ceiling_and_are_drawn_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        return 0.0

    monkeypatch.setattr(random, "uniform", uniform)
    patience = retries.Patience()
    assert all(patience.pause(tries, time.monotonic() + 60) for tries in range(1, 10))
    assert bounds == [(0, 0.25 * 2**power) for power in range(7)] + [(0, 20), (0, 20)]


def test_no_try_is_begun_after_its_end_or_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: 10.0)
    now = time.monotonic()
    assert not retries.Patience().pause(1, end=now + 9)
    stopped = retries.Patience()
    stopped.stop.set()
    assert stopped.pause(1, end=now + 60)  # at once, for who asks next is told
    assert time.monotonic() - now < 9
    with pytest.raises(retries.GivenUp):
        stopped.check()


def test_content_types() -> None:
    names = ["a.safetensors", "a.json", "a.toml", "a.HTML", "events.out.tfevents.1.host.2.0"]
    assert [content_type(Path(name)) for name in names] == [
        "application/octet-stream",
        "application/json",
        "application/toml",
        "text/html; charset=utf-8",
        "application/octet-stream",
    ]
