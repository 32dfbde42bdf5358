"""SIGTERM, as docker stop and SageMaker send it, to the image's first process."""

import json
import signal
import time
from contextlib import suppress
from pathlib import Path

from docker.errors import APIError

from entrypoint.checkpoint import verify_lora
from entrypoint.storage import S3Uri
from kohya.config import Kind
from kohya.networks import expected
from tests.contract.test_job import keys
from tests.harness import TINY
from tests.image.container import ContainerJob, ended
from tests.s3 import S3Server

SECONDS = 30  # of the 120 that SageMaker gives


def test_a_stop_in_training(
    s3_job: ContainerJob,
    s3: S3Server,
    bucket: S3Uri,
    trainer: str,
    base_models: dict[Kind, Path],
    pictures: Path,
) -> None:
    """It ends within seconds, with its state kept and the LoRA of its first epoch published."""
    s3_job.mount("model", base_models["sd15"])
    s3_job.mount("dataset", pictures)
    longer = {"trainer": trainer, "max_train_epochs": "500", "output_uri": str(bucket / "out")}
    s3_job.configure("hyperparameters", {**TINY, **longer})
    sent = []
    result = s3_job.run_until("epoch=2/500", signal.SIGTERM, sent=sent)
    assert time.monotonic() - sent[0] < SECONDS
    assert result.code == 143, result.out + result.err
    assert s3_job.failure is None
    assert s3_job.record["result"] == "stopped"
    (state,) = (s3_job.tree / "checkpoints").glob("state-*")
    assert json.loads((state / "train_state.json").read_text())["current_step"] >= 4
    lora = s3_job.model / "shape-000001.safetensors"
    assert verify_lora(lora, expected("sd15", {"network_module": "networks.lora"})).rank == 4
    published = keys(s3, bucket / "out")
    assert lora.name in published
    assert "shape.safetensors" not in published


def test_a_stop_at_the_start(job: ContainerJob, base_models: dict[Kind, Path], pictures: Path) -> None:
    """Sent until it is heard: the kernel hides from a first process what it does not handle yet."""
    job.mount("model", base_models["sd15"])
    job.mount("dataset", pictures)
    job.configure("hyperparameters", {**TINY, "max_train_epochs": "500"})
    container = job.launch()
    for _ in range(SECONDS * 10):
        container.reload()
        if container.status != "running":
            break
        with suppress(APIError):  # it has just ended
            container.kill("SIGTERM")
        time.sleep(0.1)
    result = ended(container, 1)
    assert result.code == 143, result.out + result.err
    assert job.failure is None
    assert "epoch=" not in result.out
