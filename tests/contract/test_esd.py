"""What stable-diffusion-aws-extension reads of a job, read as it reads it (its commit 969a192c)."""

import signal
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from entrypoint.storage import S3Uri
from kohya.config import Kind
from tests.contract.test_job import put
from tests.harness import TINY, Job, esd_parameters
from tests.s3 import S3Server

OUTPUT = "Stable-diffusion/checkpoint/custom/1f"
LOGS = "kohya/train/1f/logs"


def checkpoints(s3: S3Server, bucket: S3Uri) -> list[str]:
    """What its status handler registers when a job is completed: each key (training_event.py:88-104)."""
    answer = s3.client().list_objects(Bucket=bucket.bucket, Prefix=OUTPUT)
    return [item["Key"].split("/")[-1] for item in answer.get("Contents", ()) if item["Key"] != OUTPUT]


def curve(s3: S3Server, bucket: S3Uri) -> list[int]:
    """The steps on its TensorBoard page, which saves one file after the other under its name alone.

    sagemaker_ui_tab.py:1571-1586: the folder is emptied each time, so of several files the last one is left.
    """
    steps: list[int] = []
    for item in s3.client().list_objects(Bucket=bucket.bucket, Prefix=LOGS).get("Contents", ()):
        name = item["Key"].removeprefix(f"{LOGS}/")
        assert "/" not in name
        with tempfile.TemporaryDirectory() as folder:
            s3.client().download_file(bucket.bucket, item["Key"], str(Path(folder, name)))
            events = EventAccumulator(folder).Reload()
            steps = [event.step for event in events.Scalars("loss/current")]
    return steps


def test_a_job_of_esds_is_read_whole_also_after_a_break(
    job: Job, s3: S3Server, bucket: S3Uri, base_models: dict[Kind, Path], pictures: Path
) -> None:
    job.environment |= s3.environment
    asked = {name: value for name, value in TINY.items() if name != "trainer"} | {"max_train_epochs": "10"}
    toml = "\n".join(f'{name} = "{value}"' for name, value in asked.items())
    model = put(s3, bucket / "models/base.safetensors", base_models["sd15"])
    data = put(s3, bucket / "dataset/shapes", pictures)
    config = put(s3, bucket / "kohya/train/1f/input/kohya_config_cloud.toml", f"[training]\n{toml}\n")
    told = esd_parameters(bucket / OUTPUT, model, data, config)
    job.configure("hyperparameters", {"s3_location": str(put(s3, bucket / "train/param-1f.json", told))})

    assert job.run_until("epoch=2/10", signal.SIGTERM, "--trainer=builtin").code == 143

    epochs = [f"shape-{number:06d}.safetensors" for number in range(1, 10)]
    first = checkpoints(s3, bucket)
    assert first == epochs[: len(first)]
    assert first
    done = curve(s3, bucket)
    assert done == list(range(1, len(done) + 1))
    before = {item["Key"] for item in s3.client().list_objects(Bucket=bucket.bucket)["Contents"]}

    result = job.run("--trainer=builtin")

    assert result.code == 0, result.out + result.err
    assert f"fetch: going on after step {len(done)}" in result.out
    assert checkpoints(s3, bucket) == [*epochs, "shape.safetensors"]
    assert curve(s3, bucket) == list(range(1, 41))
    after = {item["Key"] for item in s3.client().list_objects(Bucket=bucket.bucket)["Contents"]}
    assert before <= after  # nothing is deleted
    assert len([key for key in after if key.startswith(LOGS)]) == 1
    uploads = s3.client().list_multipart_uploads(Bucket=bucket.bucket).get("Uploads", ())
    assert not uploads
