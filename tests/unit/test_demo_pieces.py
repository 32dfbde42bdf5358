"""The demo's parts: its data set, base model, S3 server and loss curve."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from demo import base_model, curve, pictures, settings
from demo.server import environment, s3_server
from kohya.config import Kind


def test_the_data_set_is_photographs_with_captions_in_a_folder_that_kohya_reads(tmp_path: Path) -> None:
    pictures.write(tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.name == "2_photo"
    photographs = [file for file in folder.iterdir() if file.suffix in (".png", ".jpg")]
    assert len(photographs) == 14
    for photograph in photographs:
        with Image.open(photograph) as image:
            image.load()
            assert min(image.size) >= 300 and max(image.size) <= 1000
        assert photograph.with_suffix(".txt").read_text().startswith("photo of ")


def test_a_wheel_that_is_not_installed_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"absent_wheel is not installed\. Type: pip install"):
        pictures._inside(Path("absent_wheel/data"))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_base_model_depends_on_kind_and_seed_alone(kind: Kind, tmp_path: Path) -> None:
    first, again = (base_model.write(tmp_path / name, kind) for name in ("first", "again"))
    other = base_model.write(tmp_path / "other", kind, seed=1)
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    assert settings.look(first) == (kind, True)


def test_the_server_speaks_s3_and_ends_with_its_block() -> None:
    with s3_server() as address:
        s3 = boto3.Session("key", "secret", region_name="us-east-1").client("s3", endpoint_url=address)
        s3.create_bucket(Bucket="bucket")
        s3.put_object(Bucket="bucket", Key="key", Body=b"content")
        assert s3.get_object(Bucket="bucket", Key="key")["Body"].read() == b"content"
    assert _closed(address)


def test_the_server_does_not_outlive_a_killed_demo() -> None:
    code = "from demo.server import s3_server\nwith s3_server() as a: print(a, flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        address = demo.stdout.readline().strip()
        assert not _closed(address, patience=0)
        os.kill(demo.pid, signal.SIGKILL)
    assert _closed(address)


def test_the_job_sees_nothing_of_the_person_s_own_aws_account() -> None:
    given = {"AWS_PROFILE": "work", "AWS_SESSION_TOKEN": "real", "SM_CHANNELS": "[]", "PATH": "/bin"}
    job = environment("http://127.0.0.1:1", given)
    assert job["AWS_ENDPOINT_URL_S3"] == "http://127.0.0.1:1"
    assert job["PATH"] == "/bin"
    assert not {"AWS_PROFILE", "AWS_SESSION_TOKEN", "SM_CHANNELS"} & job.keys()
    assert job["AWS_CONFIG_FILE"] == job["AWS_SHARED_CREDENTIALS_FILE"] == "/dev/null"


def test_the_curve_is_drawn_from_the_event_log(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "logs" / "20260101" / "network_train")) as log:
        for step in range(1, 31):
            log.add_scalar("loss/current", 1 / step, step)
    assert curve.draw(tmp_path / "logs", tmp_path / "loss.png", "loss") == 30
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (960, 540)
    with pytest.raises(LookupError, match="no event log below"):
        curve.draw(tmp_path / "nothing", tmp_path / "none.png", "loss")


def test_smoothing_starts_at_the_first_value_and_lags() -> None:
    assert curve.smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    rising = curve.smoothed([0.0, 1.0])
    assert rising == pytest.approx([0.0, 0.1 / 0.19])


def _closed(address: str, patience: float = 60) -> bool:
    """Whether nobody listens at `address`, within `patience` seconds."""
    port = urlsplit(address).port
    end = time.monotonic() + patience
    while True:
        with socket.socket() as connection:
            if connection.connect_ex(("127.0.0.1", port)) != 0:
                return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.1)
