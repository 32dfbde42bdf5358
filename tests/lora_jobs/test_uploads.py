"""Local inputs on their way to S3: only what changed, whole or not marked as whole."""

import json
from pathlib import Path
from typing import Any

import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError

from entrypoint.check import Plan
from entrypoint.failures import StorageError, Unfit
from entrypoint.storage import S3Uri, Storage
from entrypoint.storage.sending import PART
from lora_jobs import uploads
from lora_jobs.check import look
from lora_jobs.errors import LoraError
from lora_jobs.job_file import Draft, JobFile
from lora_jobs.uploads import Upload
from tests.lora_jobs.account import BUCKET, Account, account, job_file, write
from tests.lora_jobs.test_submit import copy

__all__ = ["account", "job_file"]

FOLDER = S3Uri(BUCKET, "of/mine/inputs")


def plan_of(path: Path) -> tuple[JobFile, Plan]:
    report = look(Draft.read(path))
    assert report.found, report.problems
    assert report.found.plan, report.problems
    return JobFile.read(path), report.found.plan


@pytest.fixture
def pictures_of_mine(job_file: Path, pictures: Path) -> Path:
    """The job file's data set, to be changed."""
    folder = job_file.parent / "pictures"
    folder.unlink()
    copy(pictures, folder)
    return folder / "2_shape"


def dataset(job_file: Path) -> Upload:
    job, plan = plan_of(job_file)
    return next(one for one in uploads.find(job, plan) if one.channel == "dataset")


def sent(account: Account, job_file: Path) -> tuple[list[str], list[str]]:
    """What is sent, and what is copied, of the data set now; by the names of the files."""
    account.calls.clear()
    uploads.send(dataset(job_file), Storage())
    put = sorted(Path(one["Key"]).name for one in account.made("PutObject") if "manifests" not in one["Key"])
    return put, sorted(Path(one["Key"]).name for one in account.made("CopyObject"))


ALL = sorted(f"{number}.{ending}" for number in range(4) for ending in ("png", "txt"))


def test_only_what_changed_is_sent(account: Account, job_file: Path, pictures_of_mine: Path) -> None:
    assert sent(account, job_file) == (ALL, [])
    assert sent(account, job_file) == ([], [])
    assert not account.made("PutObject")
    (pictures_of_mine / "0.txt").write_text("another caption")
    (pictures_of_mine / "3.png").rename(pictures_of_mine / "4.png")
    (pictures_of_mine / "3.txt").rename(pictures_of_mine / "4.txt")
    rest = sorted({*ALL, "4.png", "4.txt"} - {"0.txt", "3.png", "3.txt"})
    assert sent(account, job_file) == (["0.txt"], rest)
    for upload in (dataset(job_file),):
        for path, file in upload.files.items():
            uri = upload.folder / path
            assert Storage().read(uri, limit=1 << 20) == file.read_bytes()
        manifest = json.loads(Storage().read(upload.manifest, limit=1 << 20))
        assert manifest == {"files": dict(upload.digests)}


def test_what_went_missing_is_sent_again(account: Account, job_file: Path, pictures_of_mine: Path) -> None:
    """Somebody tidied up: the manifest alone makes no folder whole, and no copy."""
    sent(account, job_file)
    folder = dataset(job_file).folder
    client = account.client("s3")
    client.delete_object(Bucket=BUCKET, Key=(folder / "2_shape/1.png").key)
    assert sent(account, job_file) == (["1.png"], [])
    client.delete_object(Bucket=BUCKET, Key=(folder / "2_shape/1.png").key)
    (pictures_of_mine / "0.txt").write_text("another caption")
    assert sent(account, job_file)[0] == ["0.txt", "1.png"]


def test_another_size_is_another_file(account: Account, job_file: Path) -> None:
    sent(account, job_file)
    key = (dataset(job_file).folder / "2_shape/1.png").key
    account.client("s3").put_object(Bucket=BUCKET, Key=key, Body=b"half")
    assert sent(account, job_file) == (["1.png"], [])


def test_what_was_sent_while_it_changed_is_sent_again(
    account: Account, job_file: Path, pictures_of_mine: Path
) -> None:
    """It has the size of what it should be, and no manifest says that the folder is whole."""
    upload, caption = dataset(job_file), pictures_of_mine / "0.txt"
    meant = caption.read_text()
    caption.write_text(meant[::-1])
    with pytest.raises(LoraError, match="it was changed while it was sent"):
        uploads.send(upload, Storage())
    caption.write_text(meant)
    assert dataset(job_file).folder == upload.folder
    assert sent(account, job_file) == (["0.txt"], [])
    assert Storage().read(upload.folder / "2_shape/0.txt", limit=1 << 20) == meant.encode()


def test_what_may_not_be_read_is_sent_again(
    account: Account, job_file: Path, pictures_of_mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a key of KMS that one may only encrypt with."""
    sent(account, job_file)
    (pictures_of_mine / "0.txt").write_text("another caption")  # beside the manifest of the former folder
    sent(account, job_file)
    account.client("s3").delete_object(Bucket=BUCKET, Key=dataset(job_file).manifest.key)
    ask = BaseClient._make_api_call  # type: ignore[attr-defined]

    def refuse(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        if operation in ("HeadObject", "GetObject"):
            raise REFUSED
        return ask(client, operation, arguments)

    monkeypatch.setattr(BaseClient, "_make_api_call", refuse)
    uploads.send(dataset(job_file), Storage())
    assert len(account.keys("of/mine/inputs/manifests/dataset-")) == 2


def test_a_file_that_changes_meanwhile(account: Account, job_file: Path, pictures_of_mine: Path) -> None:
    upload = dataset(job_file)
    (pictures_of_mine / "0.txt").write_text("something quite different")
    with pytest.raises(LoraError, match=r"0\.txt: it was changed while it was sent"):
        uploads.send(upload, Storage())
    assert not account.keys("of/mine/inputs/manifests/")


def test_only_what_a_job_reads_is_sent(account: Account, job_file: Path, pictures: Path) -> None:
    folder = job_file.parent
    for name in ("training.toml", "other.toml", "prompts.txt", "notes.txt"):
        (folder / name).write_text("")
    (folder / "training.toml").write_text("network_dim = 8")
    (folder / "tagger").mkdir()
    for name in ("model.onnx", "selected_tags.csv", "README.md"):
        (folder / "tagger" / name).write_text("x")
    _, plan = plan_of(job_file)
    lines = 'sample_prompts = "prompts.txt"\nsample_every_n_epochs = 1'
    job = JobFile.read(write(job_file, config="training.toml", tagger="tagger", training=lines))
    found = {one.channel: sorted(one.files) for one in uploads.find(job, plan)}
    assert found["config"] == ["prompts.txt", "training.toml"]
    assert found["tagger"] == ["model.onnx", "selected_tags.csv"]
    assert found["model"] == ["model.safetensors"]
    whole = JobFile.read(write(job_file, config=str(folder / "tagger")))
    assert {one.channel: sorted(one.files) for one in uploads.find(whole, plan)}["config"] == []


def test_a_flat_folder_keeps_its_name(account: Account, job_file: Path, pictures: Path) -> None:
    """As a channel it would be called dataset, and that be the word that pictures without a caption have."""
    (job_file.parent / "cat").mkdir()
    for file in (pictures / "2_shape").iterdir():
        (job_file.parent / "cat" / file.name).write_bytes(file.read_bytes())
    job, plan = plan_of(write(job_file, dataset="cat"))
    (upload,) = (one for one in uploads.find(job, plan) if one.channel == "dataset")
    assert sorted(upload.files) == [f"10_cat/{name}" for name in ALL]


def test_where_channels_lie(account: Account, job_file: Path) -> None:
    job, plan = plan_of(job_file)
    local = uploads.find(job, plan)
    assert uploads.places(job, local) == {one.channel: f"{one.folder}/" for one in local}
    job = JobFile.read(write(job_file, base_model="s3://a/b.safetensors", dataset="s3://a/cat"))
    assert uploads.places(job, []) == {"model": "s3://a/b.safetensors", "dataset": "s3://a/cat/"}


def test_a_configuration_in_s3_that_is_not_alone(account: Account, job_file: Path) -> None:
    """As a channel it comes alone, so that the job would miss what it names."""
    for name, text in {"training.toml": b"network_dim = 8", "prompts.txt": b"a cat"}.items():
        account.client("s3").put_object(Bucket=BUCKET, Key=f"of/config/{name}", Body=text)
    lines = 'trainer = "sd-scripts"\nsample_prompts = "prompts.txt"\nsample_every_n_epochs = 1'
    told = rf"job\.toml: config: sample_prompts names a file .* Write the folder: config = \"s3://{BUCKET}/of/config\""
    with pytest.raises(Unfit, match=told):
        uploads.find(
            *plan_of(write(job_file, config=f"s3://{BUCKET}/of/config/training.toml", training=lines))
        )
    uploads.find(*plan_of(write(job_file, config=f"s3://{BUCKET}/of/config", training=lines)))


@pytest.fixture
def large(job_file: Path, tmp_path: Path) -> Upload:
    """A file of three parts and a bit, to be sent as the base model."""
    file = tmp_path / "large.safetensors"
    file.write_bytes(b"".join(bytes([number]) * PART for number in range(3)) + b"end")
    job, plan = plan_of(job_file)
    (upload,) = [
        one
        for one in uploads.find(JobFile.model_validate({**job.model_dump(), "base_model": str(file)}), plan)
        if one.channel == "model"
    ]
    return upload


REFUSED = ClientError(
    {"Error": {"Code": "AccessDenied", "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": 403}},
    "UploadPart",
)


@pytest.mark.parametrize(
    ("error", "told"), [(KeyboardInterrupt(), KeyboardInterrupt), (REFUSED, StorageError)]
)
def test_a_large_file_goes_on_where_it_was_cut_off(
    account: Account, large: Upload, error: BaseException, told: type[BaseException]
) -> None:
    ask = BaseClient._make_api_call  # type: ignore[attr-defined]

    def cut(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        if operation == "UploadPart" and arguments["PartNumber"] == 3:
            raise error
        return ask(client, operation, arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseClient, "_make_api_call", cut)
        with pytest.raises(told):
            uploads.send(large, Storage())
    assert account.keys() == []
    had = {one["PartNumber"] for one in account.made("UploadPart")}
    account.calls.clear()
    uploads.send(large, Storage())
    assert {one["PartNumber"] for one in account.made("UploadPart")} == {1, 2, 3, 4} - had
    assert 3 not in had
    assert had
    content = account.client("s3").get_object(Bucket=BUCKET, Key=(large.folder / "large.safetensors").key)
    assert content["Body"].read() == large.files["large.safetensors"].read_bytes()
    assert not account.client("s3").list_multipart_uploads(Bucket=BUCKET).get("Uploads")


@pytest.mark.parametrize("size", [5 << 20, PART])
def test_parts_of_another_file_are_sent_again(account: Account, large: Upload, size: int) -> None:
    """They are of another program, or of the file as it was."""
    client = account.client("s3")
    place = {"Bucket": BUCKET, "Key": (large.folder / "large.safetensors").key}
    begun = client.create_multipart_upload(**place)
    client.upload_part(**place, UploadId=begun["UploadId"], PartNumber=1, Body=b"x" * size)
    account.calls.clear()
    uploads.send(large, Storage())
    assert {one["PartNumber"] for one in account.made("UploadPart")} == {1, 2, 3, 4}
    content = account.client("s3").get_object(**place)["Body"].read()
    assert content == large.files["large.safetensors"].read_bytes()
