"""Fetching from, and uploading to, an S3 that fails now and then, or for good."""

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from entrypoint.failures import Outage, StorageError
from entrypoint.storage import (
    FETCH_FOLDER,
    S3Uri,
    Storage,
    fetching,
    retries,
    safe_relative,
    sending,
)
from tests.contract.test_storage import files, put, put_in_parts
from tests.faults.disk import on_small_disk
from tests.faults.proxy import KINDS, Asked, Drawn, Proxy, always, once, rates
from tests.s3 import S3Server, free_port

FETCHING = [kind for kind in KINDS if kind not in ("damaged", "forgotten", "hollow")]
UPLOADING = [kind for kind in KINDS if kind not in ("corrupt", "broken")]
ALWAYS_UPLOADING = [kind for kind in UPLOADING if kind not in ("forgotten", "hollow", "cut", "empty")]
MIB = 1 << 20


@pytest.fixture
def proxy(s3: S3Server, bucket: S3Uri, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy without faults yet, where this process finds S3."""
    with Proxy(s3.endpoint) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", made.address)
        yield made


def stored(s3: S3Server, folder: S3Uri, small: int) -> dict[str, bytes]:
    """Put objects of every layout into a folder of the bucket."""
    draw = random.Random(5)
    content = {f"{number:03}.png": draw.randbytes(draw.randrange(2000)) for number in range(small)}
    content |= {"empty.txt": b"", "large.bin": draw.randbytes(MIB), "parts.bin": draw.randbytes(5 * MIB + 9)}
    for name, data in content.items():
        if name == "parts.bin":
            put_in_parts(s3, folder / name, [data[: 5 * MIB], data[5 * MIB :]], ChecksumAlgorithm="SHA256")
        else:
            put(s3, folder / name, data, ChecksumAlgorithm="CRC64NVME")
    return content


def fetch(folder: S3Uri, root: Path) -> Mapping[str, str]:
    """Fetch a folder; returns how each file was verified."""
    storage = Storage()
    wanted = {safe_relative(found.uri, folder): found for found in storage.list(folder)}
    return {found.path.name: found.verified for found in storage.fetch(wanted, root)}


def assert_nothing_unfinished(root: Path) -> None:
    assert [path.name for path in (root / FETCH_FOLDER).iterdir() if path.name != "record.jsonl"] == []


# A fault now and then


@pytest.mark.parametrize("kind", FETCHING)
@pytest.mark.usefixtures("quick")
def test_what_fails_once_is_fetched_all_the_same(
    s3: S3Server, bucket: S3Uri, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "corrupt" and not s3.stand_in:
        pytest.skip("this server keeps no checksums of what came in parts")
    monkeypatch.setattr(fetching, "PART", MIB // 2)
    content = stored(s3, bucket / "d", 2)
    proxy.schedule = once(kind)
    verified = fetch(bucket / "d", tmp_path)
    assert files(tmp_path) == content
    assert_nothing_unfinished(tmp_path)
    assert proxy.faults[kind] >= len(content)
    if s3.stand_in:  # Ceph 18 keeps no checksums
        assert (verified["parts.bin"], verified["large.bin"]) == ("sha256", "crc64nvme")


@pytest.mark.parametrize("kind", UPLOADING)
@pytest.mark.usefixtures("quick")
def test_what_fails_once_is_uploaded_all_the_same(
    s3: S3Server, bucket: S3Uri, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(sending, "PART", 5 * MIB)
    proxy.schedule = once(kind)
    content = {"small.toml": b"a = 1", "large.safetensors": os.urandom(11 * MIB)}
    assert_uploads(s3, bucket, content, tmp_path)
    assert proxy.faults[kind] >= (1 if kind == "forgotten" else 2)


def assert_uploads(s3: S3Server, bucket: S3Uri, content: Mapping[str, bytes], folder: Path) -> None:
    for name, data in content.items():
        (folder / name).write_bytes(data)
    Storage().upload({folder / name: bucket / "out" / name for name in content})
    client = s3.client()
    for name, data in content.items():
        assert client.get_object(Bucket=bucket.bucket, Key=f"out/{name}")["Body"].read() == data
    assert client.list_objects_v2(Bucket=bucket.bucket, Prefix="out/")["KeyCount"] == len(content)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.usefixtures("quick")
def test_five_answers_in_a_hundred_are_faulty(
    s3: S3Server, bucket: S3Uri, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(fetching, "PART", MIB // 16)
    monkeypatch.setattr(sending, "PART", 5 * MIB)
    content = stored(s3, bucket / "d", 60)
    proxy.schedule = Drawn(seed, rates(0.05, s3))
    fetch(bucket / "d", tmp_path / "in")
    assert files(tmp_path / "in") == content
    assert_nothing_unfinished(tmp_path / "in")
    uploaded = {f"{number}.png": os.urandom(3000) for number in range(30)} | {"large": os.urandom(11 * MIB)}
    assert_uploads(s3, bucket, uploaded, tmp_path)
    assert proxy.faults.total() >= 5


@pytest.mark.usefixtures("quick")
def test_a_listing_of_several_pages_is_whole(s3: S3Server, bucket: S3Uri, proxy: Proxy) -> None:
    names = [f"{number}.txt" for number in range(5)]
    for name in names:
        put(s3, bucket / "d" / name, b"x")
    for kind in ("cut", "empty", "broken", "slow_down", "lost"):
        proxy.schedule = once(kind)
        before = proxy.faults[kind]
        paged = Storage()
        asked = paged.client.meta.events
        asked.register("provide-client-params.s3.ListObjectsV2", lambda params, **_: {**params, "MaxKeys": 2})
        assert [found.uri.name for found in paged.list(bucket / "d")] == names
        assert proxy.faults[kind] > before
        proxy.schedule = lambda asked, before: None
        proxy._tries.clear()


@pytest.mark.usefixtures("quick")
def test_a_range_a_head_and_a_write_check_take_no_harm(s3: S3Server, bucket: S3Uri, proxy: Proxy) -> None:
    put(s3, bucket / "a.json", b'{"a": 1}')
    storage = Storage()
    kinds = [kind for kind in KINDS if kind not in ("damaged", "forgotten", "corrupt", "stall")]
    for kind in kinds:
        proxy.schedule = once(kind)
        proxy._tries.clear()
        assert storage.read(bucket / "a.json", limit=100) == b'{"a": 1}'
        storage.check_writable(bucket / "out")
    assert set(proxy.faults) == set(kinds)
    # An answer to HEAD does not say why; the GET that is to tell may find nothing wrong.
    for kind in ("expired", "slow_down"):
        proxy.schedule = lambda asked, before, kind=kind: (
            kind if asked.method == "HEAD" and before == 0 else None
        )
        proxy._tries.clear()
        proxy.asked.clear()
        assert storage.head(bucket / "a.json").size == 8
        asked = [one.method for one in proxy.asked if one.path == "/a.json"]
        assert (asked[0], asked[-1], len(asked) > 1) == ("HEAD", "HEAD", True)


@pytest.mark.usefixtures("quick")
def test_new_credentials_are_used_when_old_ones_expire(
    s3: S3Server, bucket: S3Uri, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not s3.stand_in:
        pytest.skip("this server knows its own keys only")
    put(s3, bucket / "a", b"content")
    given: list[str] = []

    class Role(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given.append(f"AKIA{len(given)}")
            told = {"AccessKeyId": given[-1], "SecretAccessKey": "s", "Token": "t"}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({**told, "Expiration": "2099-01-01T00:00:00Z"}).encode())

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Role) as role:
        threading.Thread(target=role.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            monkeypatch.setenv(name, os.devnull)
        address = f"http://127.0.0.1:{role.server_address[1]}/role"
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", address)
        proxy.schedule = lambda asked, before: (
            "expired" if "Credential=AKIA0/" in asked.headers["authorization"] else None
        )
        assert Storage().read_range(bucket / "a", 0, 100) == b"content"
        role.shutdown()
    assert given == ["AKIA0", "AKIA1"]


def test_credentials_that_stay_expired_are_not_waited_for(
    bucket: S3Uri, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "_FIRST", 0.01)
    proxy.schedule = always("expired")
    with pytest.raises(StorageError, match="the credentials have expired"):
        Storage().read_range(bucket / "a", 0, 100)
    assert len(proxy.asked) == 4


@pytest.mark.usefixtures("impatient")
def test_a_checksum_of_parts_is_not_left_out_because_s3_is_busy(
    s3: S3Server, bucket: S3Uri, proxy: Proxy, tmp_path: Path
) -> None:
    stored(s3, bucket / "d", 0)
    if "ChecksumSHA256" not in s3.client().head_object(
        Bucket=bucket.bucket, Key="d/parts.bin", ChecksumMode="ENABLED"
    ):
        pytest.skip("this server keeps no checksums")
    proxy.schedule = lambda asked, before: "slow_down" if "partNumber=1" in asked.path else None
    with pytest.raises(StorageError, match="S3 is busy"):
        fetch(bucket / "d", tmp_path)
    assert "parts.bin" not in files(tmp_path)


def unresolved(times: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no host name be found, that often."""
    real: Any = socket.getaddrinfo
    left = [times]

    def getaddrinfo(*args: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(*args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.usefixtures("quick")
def test_a_host_name_that_is_not_found_for_a_while(
    s3: S3Server, bucket: S3Uri, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3, bucket / "a", b"content")
    unresolved(3, monkeypatch)
    assert Storage().read_range(bucket / "a", 0, 100) == b"content"


def test_s3_that_was_never_reached_is_not_waited_for(
    s3: S3Server, bucket: S3Uri, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3, bucket / "a", b"content")
    monkeypatch.setattr(retries, "BRIEF", 0.0)
    monkeypatch.setattr(retries, "_FIRST", 0.01)
    storage = Storage()
    unresolved(1, monkeypatch)
    with pytest.raises(StorageError, match="Name or service not known"):
        storage.read_range(bucket / "a", 0, 100)
    assert storage.read_range(bucket / "a", 0, 100) == b"content"
    storage.client.close()  # a connection that is open asks for no name
    unresolved(1, monkeypatch)
    assert storage.read_range(bucket / "a", 0, 100) == b"content"  # now it is waited for
    # Once it has been waited for in vain, a job that ends is not held up by each of its files.
    monkeypatch.setattr(retries, "LASTS", 0.3)
    proxy.schedule = always("slow_down")
    for expected in (2, 1):
        before = len(proxy.asked)
        with pytest.raises(StorageError, match="S3 is busy"):
            storage.read_range(bucket / "a", 0, 100)
        tries = len(proxy.asked) - before
        assert tries >= 2 if expected == 2 else tries == 1
    proxy.schedule = lambda asked, before: None
    assert storage.read_range(bucket / "a", 0, 100) == b"content"
    proxy._tries.clear()
    proxy.schedule = once("slow_down")
    assert storage.read_range(bucket / "a", 0, 100) == b"content"


# A fault that lasts

LASTING = {
    "slow_down": (
        "S3 is busy or failing, and stays so. S3 says: Please reduce",
        "Start the job again in a few",
    ),
    "internal_error": (
        "S3 is busy or failing, and stays so. S3 says: We enc",
        "Start the job again in a few",
    ),
    "expired": ("the credentials have expired. S3 says: The provided", "Get new ones"),
    "damaged": ("did not reach S3 as it was sent", "a proxy, or AWS_ENDPOINT_URL_S3"),
    "reset": ("kept breaking off", "Start the job again; if it stays, check AWS_REGION"),
    "lost": ("kept breaking off", "Start the job again; if it stays, check AWS_REGION"),
    "broken": ("kept breaking off", "Start the job again; if it stays, check AWS_REGION"),
    "cut": ("kept breaking off", "Start the job again; if it stays, check AWS_REGION"),
    "empty": ("kept breaking off", "Start the job again; if it stays, check AWS_REGION"),
    "stall": ("kept falling silent", "Start the job again; if it stays, check AWS_REGION"),
    "corrupt": ("arrived damaged 4 times: ", "Upload the object again"),
}


@pytest.mark.parametrize("kind", FETCHING)
@pytest.mark.usefixtures("impatient")
def test_a_fetch_ends_when_a_fault_lasts(
    s3: S3Server, bucket: S3Uri, proxy: Proxy, tmp_path: Path, kind: str
) -> None:
    put(s3, bucket / "base.safetensors", b"x" * 10_000)
    put(s3, bucket / "a.png", b"x")
    good, bad = (Storage().head(bucket / name) for name in ("a.png", "base.safetensors"))
    storage = Storage()
    storage.fetch({"a.png": good}, tmp_path)
    proxy.schedule = always(kind)
    with pytest.raises(StorageError) as raised:
        storage.fetch({"a.png": good, "deep/base.safetensors": bad}, tmp_path)
    assert_told(raised.value, bucket / "base.safetensors", kind)
    assert files(tmp_path) == {"a.png": b"x"}
    assert_nothing_unfinished(tmp_path)
    assert 2 <= proxy.faults[kind] <= 60


@pytest.mark.parametrize("kind", ALWAYS_UPLOADING)
@pytest.mark.usefixtures("impatient")
def test_an_upload_ends_when_a_fault_lasts(bucket: S3Uri, proxy: Proxy, tmp_path: Path, kind: str) -> None:
    (tmp_path / "cat.safetensors").write_bytes(b"x" * 10_000)
    proxy.schedule = always(kind)
    with pytest.raises(StorageError) as raised:
        Storage().upload({tmp_path / "cat.safetensors": bucket / "out/cat.safetensors"})
    assert_told(raised.value, bucket / "out/cat.safetensors", kind)
    assert 2 <= proxy.faults[kind] <= 60


def assert_told(error: StorageError, where: S3Uri, kind: str) -> None:
    wrong, fix = LASTING[kind]
    assert error.problem.where == str(where)
    assert wrong in error.problem.wrong
    assert fix in error.problem.fix
    assert isinstance(error.problem, Outage) == (kind not in ("expired", "damaged", "corrupt"))


@pytest.mark.usefixtures("impatient")
def test_a_name_and_a_port_that_lead_nowhere_are_told(bucket: S3Uri, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    with pytest.raises(StorageError, match=rf"reached at http://127.0.0.1:{port}: .*Connection refused"):
        Storage().head(bucket / "a")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", "http://s3.example.invalid")
        unresolved(float("inf"), patch)
        with pytest.raises(StorageError, match=r"resolve 's3\.example\.invalid'.*as channels instead"):
            Storage().head(bucket / "a")


# An upload that is not waited for


def test_an_upload_ends_when_it_is_cancelled_and_names_what_was_not_sent(
    bucket: S3Uri, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "SILENCE", 120.0)  # which is not waited for
    for name in "bc":
        (tmp_path / f"{name}.png").write_text(name)
    wanted = {tmp_path / f"{name}.png": bucket / f"{name}.png" for name in "bc"}
    proxy.schedule = always("stall")
    cancel = threading.Event()
    threading.Timer(1, cancel.set).start()
    began = time.monotonic()
    with pytest.raises(StorageError) as raised:
        Storage().upload(wanted, cancel=cancel)
    assert time.monotonic() - began < 60
    assert raised.value.problem.where == str(bucket / "b.png")
    not_sent = "b.png was not sent before the time for it was up"
    wrong = f"{not_sent}; 2 of 2 files could not be uploaded: b.png, c.png"
    assert raised.value.problem.wrong == wrong
    assert raised.value.problem.fix == "Upload it by hand, or start the job again"
    before = len(proxy.asked)
    assert before <= 2
    with pytest.raises(StorageError, match=not_sent):
        Storage().upload({tmp_path / "b.png": bucket / "late.png"}, cancel=cancel)
    assert not [asked for asked in proxy.asked if "late" in asked.path]


def test_a_cancel_ends_an_upload_and_no_try_is_begun_after_it(
    bucket: S3Uri, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "SILENCE", 120.0)  # which is not waited for
    (tmp_path / "a.png").write_text("a")
    cancel, released = threading.Event(), threading.Event()

    def schedule(asked: Asked, before: int) -> str:
        cancel.set()
        released.wait(120)
        return "slow_down"

    proxy.schedule = schedule
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"a\.png was not sent before the time for it was up"):
        Storage().upload({tmp_path / "a.png": bucket / "a.png"}, cancel=cancel)
    assert time.monotonic() - began < 60
    released.set()
    time.sleep(0.5)  # in which the try that was under way ends
    assert len(proxy.asked) == 1


def test_of_two_uploads_to_one_place_the_later_one_stays(
    s3: S3Server, bucket: S3Uri, proxy: Proxy, tmp_path: Path
) -> None:
    cancel, released = threading.Event(), threading.Event()

    def schedule(asked: Asked, before: int) -> None:
        if not cancel.is_set():
            cancel.set()
            released.wait(25)

    proxy.schedule = schedule
    storage, log, place = Storage(), tmp_path / "events.out", bucket / "events.out"
    log.write_text("old")
    with pytest.raises(StorageError):
        storage.upload({log: place}, cancel=cancel)  # whose request is under way, and arrives late
    log.write_text("new")
    later = threading.Thread(target=storage.upload, args=({log: place},))
    later.start()
    later.join(0.5)
    released.set()
    later.join(60)
    assert storage.read(place, limit=10) == b"new"


def test_a_server_that_says_nothing_does_not_keep_a_process_from_ending(
    s3: S3Server, bucket: S3Uri, proxy: Proxy, tmp_path: Path
) -> None:
    put(s3, bucket / "a", b"x" * 100)
    etag = Storage().head(bucket / "a").etag
    proxy.schedule = always("stall")
    program = (
        "import signal, sys, pathlib\n"
        "from entrypoint.storage import RemoteObject, S3Uri, Storage\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"source = RemoteObject(S3Uri({bucket.bucket!r}, 'a'), 100, {etag!r})\n"
        f"Storage().fetch({{'a': source}}, pathlib.Path({str(tmp_path)!r}))\n"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        while not proxy.faults:
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        began = time.monotonic()
        assert process.wait(60) == 143
        assert time.monotonic() - began < 20  # seconds; the server would be waited for for 30


# A disk that fills

FETCHER = """
import json, sys
from pathlib import Path
from entrypoint.failures import StorageError
from entrypoint.storage import FETCH_FOLDER, S3Uri, Storage

root, folder, storage, told = Path(sys.argv[1]), S3Uri.parse(sys.argv[2]), Storage(), ""
try:
    storage.fetch({found.uri.name: found for found in storage.list(folder)}, root)
except StorageError as error:
    told = str(error)
there = {path.name: path.stat().st_size for path in root.rglob("*") if path.is_file()}
left = [path.name for path in (root / FETCH_FOLDER).iterdir()] if (root / FETCH_FOLDER).exists() else []
print(json.dumps({"told": told, "there": there, "left": left}))
"""


@pytest.mark.parametrize("kilobytes", [4, 60, 500, 1500, 4000])
def test_a_disk_that_fills_is_told_and_keeps_what_is_whole(
    s3: S3Server, bucket: S3Uri, tmp_path: Path, kilobytes: int
) -> None:
    sizes = {f"{number}.bin": 100_000 * (number + 1) for number in range(6)}  # 2.1 MB
    for name, size in sizes.items():
        put(s3, bucket / "d" / name, b"x" * size)
    disk = on_small_disk(tmp_path, kilobytes << 10)
    command = [*disk, sys.executable, "-c", FETCHER, str(tmp_path), str(bucket / "d")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
    result = json.loads(done.stdout.splitlines()[-1])
    there = {name: size for name, size in result["there"].items() if name != "record.jsonl"}
    assert there.items() <= sizes.items()
    assert set(result["left"]) <= {"record.jsonl"}
    if kilobytes == 4000:
        assert there == sizes
    else:
        assert there != sizes
        assert "the disk says: No space left on device. Give the job a larger volume" in result["told"]
