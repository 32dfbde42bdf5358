"""S3 to disk and back, against a real S3 server (TEST_S3_ENDPOINT), else moto's."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from entrypoint.failures import Stopped, StorageError
from entrypoint.storage import FETCH_FOLDER, RemoteObject, S3Uri, Storage, fetching, safe_relative
from tests.harness import stopped_when
from tests.s3 import S3Server

LARGE = 40 << 20  # bytes: two parts


def put(s3: S3Server, uri: S3Uri, content: bytes, **more: Any) -> None:
    s3.client().put_object(Bucket=uri.bucket, Key=uri.key, Body=content, **more)


def put_in_parts(s3: S3Server, uri: S3Uri, parts: list[bytes], **more: Any) -> None:
    client, place = s3.client(), {"Bucket": uri.bucket, "Key": uri.key}
    upload = client.create_multipart_upload(**place, **more)["UploadId"]
    done = []
    for number, part in enumerate(parts, 1):
        told = client.upload_part(**place, UploadId=upload, PartNumber=number, Body=part, **more)
        sums = {name: value for name, value in told.items() if name.startswith("Checksum")}
        done.append({"PartNumber": number, "ETag": told["ETag"], **sums})
    client.complete_multipart_upload(**place, UploadId=upload, MultipartUpload={"Parts": done})


def files(root: Path) -> dict[str, bytes]:
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(FETCH_FOLDER)}


def fetch_folder(folder: S3Uri, root: Path) -> Any:
    storage = Storage()
    return storage.fetch({safe_relative(found.uri, folder): found for found in storage.list(folder)}, root)


def test_a_folder_comes_whole_and_its_neighbour_does_not(s3: S3Server, bucket: S3Uri, tmp_path: Path) -> None:
    folder = bucket / "dataset/cats"
    content = {
        "10_cat/a b.png": b"1",
        "10_cat/ä+%20&=.txt": b"two",
        "日本/語.png": b"3" * 100_000,
        "empty.txt": b"",
    }
    for name, data in content.items():
        put(s3, folder / name, data)
    put(s3, bucket / "dataset/cats/", b"")
    put(s3, bucket / "dataset/cats/10_cat/", b"")
    put(s3, bucket / "dataset/cats_512x512/10_cat/a.png", b"neighbour")
    for uri in (folder, S3Uri(folder.bucket, folder.key + "/")):
        fetched = fetch_folder(uri, tmp_path / uri.key)
        assert files(tmp_path / uri.key) == content
        assert all(found.path.stat().st_size == found.source.size for found in fetched)


def test_a_folder_of_more_than_one_page_is_listed_lazily(s3: S3Server, bucket: S3Uri) -> None:
    client = s3.client()

    def fill(number: int) -> None:
        client.put_object(Bucket=bucket.bucket, Key=f"many/{number:04}.txt", Body=b"x")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(fill, range(1001)))
    listed = Storage().list(bucket / "many")
    assert next(listed).uri == bucket / "many/0000.txt"
    assert len(list(listed)) == 1000


def test_what_is_whole_is_not_fetched_again_and_what_was_touched_is(
    s3: S3Server, bucket: S3Uri, tmp_path: Path
) -> None:
    for name in ("kept", "edited", "same_size", "gone", "replaced", "forged"):
        put(s3, bucket / f"d/{name}", name.encode())
    first = fetch_folder(bucket / "d", tmp_path)
    assert not any(found.reused for found in first)
    (tmp_path / "edited").write_bytes(b"something longer")
    (tmp_path / "same_size").write_bytes(b"SAME_SIZE")
    (tmp_path / "gone").unlink()
    put(s3, bucket / "d/replaced", b"REPLACED")
    (tmp_path / "forged").unlink()
    (tmp_path / "forged").symlink_to("kept")
    second = fetch_folder(bucket / "d", tmp_path)
    assert [found.path.name for found in second if found.reused] == ["kept"]
    expected = {name: name.encode() for name in ("kept", "edited", "same_size", "gone", "forged")}
    assert files(tmp_path) == {**expected, "replaced": b"REPLACED"}
    assert all(found.reused for found in fetch_folder(bucket / "d", tmp_path))


def test_a_file_without_a_record_is_not_trusted(s3: S3Server, bucket: S3Uri, tmp_path: Path) -> None:
    put(s3, bucket / "d/file", b"right")
    (tmp_path / "file").write_bytes(b"wrong")
    record = tmp_path / FETCH_FOLDER / "record.jsonl"
    record.parent.mkdir()
    record.write_text('{"path": "file", "source": {"uri"\n[]\n17\n')  # cut off, as by a kill
    fetch_folder(bucket / "d", tmp_path)
    assert files(tmp_path) == {"file": b"right"}
    assert fetch_folder(bucket / "d", tmp_path)[0].reused


def test_a_large_object_comes_in_parts(s3: S3Server, bucket: S3Uri, tmp_path: Path) -> None:
    content = os.urandom(LARGE + 12345)
    (tmp_path / "up").write_bytes(content)
    storage = Storage()
    uri = bucket / "model.safetensors"
    storage.upload({tmp_path / "up": uri})
    found = storage.head(uri)
    assert found.etag.endswith("-6")  # 8 MiB each
    [fetched] = storage.fetch({"base/model.safetensors": found}, tmp_path)
    assert fetched.path == tmp_path / "base/model.safetensors"
    assert hashlib.sha256(fetched.path.read_bytes()).digest() == hashlib.sha256(content).digest()
    assert storage.read_range(uri, 100, 50) == content[100:150]
    assert storage.read_range(uri, len(content) - 5, 50) == content[-5:]
    if s3.stand_in:  # Ceph 18 keeps no checksums
        assert fetched.verified == "crc64nvme"


@pytest.mark.parametrize("algorithm", ["CRC64NVME", "CRC32C", "CRC32", "SHA256", "SHA1"])
def test_stored_checksums_are_what_files_are_verified_by(
    s3: S3Server, bucket: S3Uri, tmp_path: Path, algorithm: str
) -> None:
    put(s3, bucket / "d/file", b"content", ChecksumAlgorithm=algorithm)
    place = {"Bucket": bucket.bucket, "Key": "d/file"}
    if f"Checksum{algorithm}" not in s3.client().head_object(**place, ChecksumMode="ENABLED"):
        pytest.skip("this server keeps no checksums, so files are verified by MD5 or size")
    [fetched] = fetch_folder(bucket / "d", tmp_path)
    assert fetched.verified == algorithm.lower()


def test_a_checksum_of_parts_is_verified(s3: S3Server, bucket: S3Uri, tmp_path: Path) -> None:
    parts = [os.urandom(5 << 20), os.urandom(5 << 20), b"end"]
    put_in_parts(s3, bucket / "d/file", parts, ChecksumAlgorithm="SHA256")
    place = {"Bucket": bucket.bucket, "Key": "d/file"}
    [fetched] = fetch_folder(bucket / "d", tmp_path)
    assert fetched.path.read_bytes() == b"".join(parts)
    if "ChecksumSHA256" not in s3.client().head_object(**place, ChecksumMode="ENABLED"):
        pytest.skip("this server keeps no checksums; the object is verified by its size")
    assert fetched.verified == "sha256"


def test_an_object_that_was_replaced_is_fetched_as_it_is_now(
    s3: S3Server, bucket: S3Uri, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = Storage()
    for name, old, new in (("small", b"old", b"new and longer"), ("large", b"o" * LARGE, b"n" * (LARGE - 1))):
        put(s3, bucket / name, old)
        listed = storage.head(bucket / name)
        put(s3, bucket / name, new)
        [fetched] = storage.fetch({name: listed}, tmp_path)
        assert fetched.path.read_bytes() == new
        assert fetched.source == storage.head(bucket / name)
        assert f"{bucket / name} was replaced" in capsys.readouterr().err


def test_an_interrupted_fetch_stops_and_the_next_one_goes_on(
    s3: S3Server, bucket: S3Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_STOP_SECONDS", 60)  # which its threads may need on a busy machine
    put(s3, bucket / "d/model", os.urandom(8 << 20))
    listed = Storage().head(bucket / "d/model")
    wanted = {f"{number:03}": listed for number in range(200)}  # 1.6 GB, seconds on any server
    with pytest.raises(Stopped), stopped_when(lambda: [*tmp_path.glob("[0-9]*")]):
        Storage().fetch(wanted, tmp_path)
    assert not [*(tmp_path / FETCH_FOLDER).glob("unfinished*")]
    there = sorted(files(tmp_path))
    assert 0 < len(there) < len(wanted)
    assert all(path.stat().st_size == listed.size for path in map(tmp_path.joinpath, there))
    some = dict.fromkeys([*there, "200"], listed)
    assert [found.reused for found in Storage().fetch(some, tmp_path)] == [True] * len(there) + [False]


def test_uploads_carry_a_content_type_and_delete_nothing(s3: S3Server, bucket: S3Uri, tmp_path: Path) -> None:
    put(s3, bucket / "out/other.safetensors", b"someone else's")
    types = {
        "lora.safetensors": "application/octet-stream",
        "job.json": "application/json",
        "config.toml": "application/toml",
        "report.html": "text/html; charset=utf-8",
        "events.out.tfevents.1": "application/octet-stream",
    }
    for name in types:
        (tmp_path / name).write_text(name)
    Storage().upload({tmp_path / name: bucket / "out" / name for name in types})
    client = s3.client()
    for name, expected in types.items():
        told = client.get_object(Bucket=bucket.bucket, Key=f"out/{name}", ChecksumMode="ENABLED")
        assert told["ContentType"] == expected
        assert told["Body"].read() == name.encode()
        if s3.stand_in:  # Ceph 18 keeps no checksums
            assert "ChecksumCRC64NVME" in told
    assert Storage().read(bucket / "out/other.safetensors", limit=100) == b"someone else's"


def test_a_missing_object_is_told_with_what_is_near_it(s3: S3Server, bucket: S3Uri, tmp_path: Path) -> None:
    for name in ("models/sd_xl_base_1.0.safetensors", "models/vae/x", "models/unrelated"):
        put(s3, bucket / name, b"x")
    missing = bucket / "models/sdxl_base_1.0.safetensors"
    fix = f"Correct the key; near it: {bucket}models/sd_xl_base_1.0.safetensors"
    with pytest.raises(StorageError) as raised:
        Storage().head(missing)
    assert str(raised.value).startswith(f"{missing}: there is no such object. {fix}")
    with pytest.raises(StorageError, match="there is no such object"):
        Storage().fetch({"file": RemoteObject(missing, 1, "e")}, tmp_path)
    with pytest.raises(StorageError, match="It is a folder"):
        Storage().read(bucket / "models/vae", limit=10)
    with pytest.raises(StorageError, match="there is nothing below"):
        Storage().read_range(bucket / "elsewhere/x", 0, 10)


def test_a_missing_bucket_is_told(bucket: S3Uri, tmp_path: Path) -> None:
    nowhere = S3Uri(bucket.bucket + "-not", "a")
    (tmp_path / "file").write_text("x")
    for call in (
        lambda: Storage().head(nowhere),
        lambda: list(Storage().list(nowhere)),
        lambda: Storage().upload({tmp_path / "file": nowhere}),
    ):
        with pytest.raises(StorageError, match="there is no such bucket"):
            call()


def test_a_wrong_secret_is_told(s3: S3Server, bucket: S3Uri, monkeypatch: pytest.MonkeyPatch) -> None:
    if s3.stand_in:
        pytest.skip("moto accepts any secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(StorageError, match="S3 does not accept the credentials") as raised:
        Storage().head(bucket / "key")
    assert "wrong-secret" not in str(raised.value)


def test_a_listing_of_nothing_is_empty(bucket: S3Uri) -> None:
    assert list(Storage().list(bucket / "nothing")) == []


def test_two_fetches_to_one_folder_do_not_disturb_each_other(
    s3: S3Server, bucket: S3Uri, tmp_path: Path
) -> None:
    contents = [bytes([number]) * (1 << 20) for number in range(12)]
    for number, content in enumerate(contents):
        put(s3, bucket / str(number), content)
    with ThreadPoolExecutor(4) as jobs:
        wanted = [
            {f"{job}/{number}": Storage().head(bucket / str(number)) for number in range(job, 12, 4)}
            for job in range(4)
        ]
        for fetched in jobs.map(lambda some: Storage().fetch(some, tmp_path), wanted):
            assert all(item.path.read_bytes() == contents[int(item.path.name)] for item in fetched)
    assert [path.name for path in (tmp_path / FETCH_FOLDER).iterdir()] == ["record.jsonl"]


def test_checking_that_a_folder_can_be_written_leaves_nothing_there(s3: S3Server, bucket: S3Uri) -> None:
    Storage().check_writable(bucket / "out")
    client = s3.client()
    assert client.list_objects_v2(Bucket=bucket.bucket)["KeyCount"] == 0
    assert not client.list_multipart_uploads(Bucket=bucket.bucket).get("Uploads")
    with pytest.raises(StorageError, match="there is no such bucket"):
        Storage().check_writable(S3Uri("no-such-bucket-of-ours", "out"))
