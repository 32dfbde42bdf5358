"""The job as a process, in each of the three ways that it can be asked for, for both kinds."""

import json
import shutil
import signal
import tarfile
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from entrypoint.storage import S3Uri
from kohya.config import KINDS, Kind
from tests.harness import METRIC, TINY, Job, Result, write_compat
from tests.s3 import S3Server

DATA = Path(__file__).parents[1] / "data"


def put(s3: S3Server, uri: S3Uri, content: Path | str) -> S3Uri:
    """Put a file, a text or a folder into the bucket."""
    client = s3.client()
    if isinstance(content, str):
        client.put_object(Bucket=uri.bucket, Key=uri.key, Body=content.encode())
    elif content.is_dir():
        for path in content.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), uri.bucket, f"{uri.key}/{path.relative_to(content).as_posix()}")
    else:
        client.upload_file(str(content), uri.bucket, uri.key)
    return uri


def keys(s3: S3Server, folder: S3Uri) -> list[str]:
    """What lies below a folder of the bucket."""
    answer = s3.client().list_objects_v2(Bucket=folder.bucket, Prefix=folder.key + "/")
    return sorted(item["Key"].removeprefix(folder.key + "/") for item in answer.get("Contents", ()))


def assert_completed(
    result: Result, job: Job, kind: Kind, names: tuple[str, ...] = ("shape", "shape-000001")
) -> None:
    """The job ended well, with everything that its readers expect in SageMaker's folders."""
    assert result.code == 0, result.out + result.err
    assert job.failure is None
    assert result.err == ""
    name = names[0]
    files = {*(f"{lora}.safetensors" for lora in names), f"{name}.toml", "job.json"}
    assert {path.name for path in job.model.iterdir()} == files
    for lora in names:
        assert_lora(job.model / f"{lora}.safetensors", kind)
    metrics = [line for line in result.lines if line.startswith("step=")]
    assert metrics
    assert [line for line in metrics if not METRIC.fullmatch(line)] == []
    assert job.record["result"] == "completed"
    assert list(job.record["seconds"]) == [
        "resolve",
        "check",
        "fetch",
        "prepare",
        "train",
        "verify",
        "publish",
    ]
    (events,) = job.events
    log = EventAccumulator(str(events.parent)).Reload()
    assert "loss/current" in log.Tags()["scalars"]
    assert len(log.Scalars("loss/current")) == 8
    assert not list(job.scratch.glob("kohya-job-*"))


def assert_lora(path: Path, kind: Kind) -> None:
    """The LoRA has the keys, ranks and types that sd-scripts gives it."""
    expected = json.loads((DATA / f"lora_{kind}.json").read_text())
    if kind == "sdxl":  # configs/sdxl.toml trains the U-Net alone
        expected = {key: shape for key, shape in expected.items() if key.startswith("lora_unet_")}
    with safe_open(path, "np") as lora:
        assert set(lora.keys()) == set(expected)
        for key in expected:
            tensor = lora.get_tensor(key)
            assert tensor.dtype == "float16"
            assert tensor.ndim == len(expected[key])
            if "lora_down" in key:
                assert tensor.shape[0] == 4
        assert lora.metadata()["ss_output_name"] == "shape"


@pytest.mark.parametrize("kind", KINDS)
def test_channels_with_hyperparameters(
    kind: Kind, job: Job, base_models: dict[Kind, Path], pictures: Path
) -> None:
    """As CreateTrainingJob starts it: no S3, values as the SDK quotes them, streamed channels left alone."""
    model = job.mount("model", base_models[kind])
    (model.parent / "model-manifest").mkdir()
    job.mount("dataset", pictures)
    job.configure("hyperparameters", {name: json.dumps(value) for name, value in TINY.items()})
    job.configure(
        "inputdataconfig", {name: {"TrainingInputMode": "FastFile"} for name in ("model", "dataset")}
    )
    job.configure("resourceconfig", {"current_host": "algo-1", "hosts": ["algo-1"]})
    job.environment["TRAINING_JOB_NAME"] = "squares-1"
    before = sorted(pictures.rglob("*"))

    result = job.run()

    assert_completed(result, job, kind)
    assert sorted(pictures.rglob("*")) == before
    assert f"fetch: reading {model / base_models[kind].name} once, in order" in result.out
    copies = list(job.scratch.glob("*/inputs/*/*.safetensors"))
    assert [copy.stat().st_size for copy in copies] == [base_models[kind].stat().st_size]
    assert job.record["kind"] == kind
    assert job.record["versions"]["diffusers"] == "0.32.1"
    assert job.record["job"] == "squares-1"
    paths = {item["path"]: item["bytes"] for item in job.record["inputs"]}
    assert paths[str(model / base_models[kind].name)] == base_models[kind].stat().st_size
    assert len(paths) == 9
    values = tomllib.loads((job.model / "shape.toml").read_text())
    assert values["network_dim"] == 4
    assert values["unet_lr"] == 1e-3
    assert not {"output_dir", "train_data_dir", "pretrained_model_name_or_path"} & set(values)


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ("NVIDIA L40S, 8.9, 580.65.06", "mixed_precision bf16 (configs/gpu/l40s.toml line "),
        ("NVIDIA A10, 8.6, 580.65.06", "mixed_precision bf16 (NVIDIA A10, compute capability 8.6)"),
    ],
)
def test_the_gpus_preset_lies_under_the_hyperparameters(
    gpu: str, said: str, job: Job, base_models: dict[Kind, Path], pictures: Path
) -> None:
    """What nvidia-smi tells picks the preset, and the log says which; the job itself needs none."""
    job.pretend(gpu)
    job.mount("model", base_models["sd15"])
    job.mount("dataset", pictures)
    job.configure("hyperparameters", {**TINY, "max_train_epochs": "1", "gradient_checkpointing": "true"})
    result = job.run()
    assert result.code == 0, result.out + result.err
    assert said in result.out
    assert "forward-compatibility" not in result.out
    values = tomllib.loads((job.model / "shape.toml").read_text())
    assert (values["mixed_precision"], values["gradient_checkpointing"]) == ("bf16", True)


def test_an_older_driver_is_met_with_nvidias_libraries(
    job: Job, base_models: dict[Kind, Path], pictures: Path, tmp_path: Path
) -> None:
    compat = write_compat(tmp_path / "compat", "580.65.06")
    job.pretend("NVIDIA A10G, 8.6, 550.90.07")
    job.environment |= {"CUDA_COMPAT_DIR": str(compat), "LD_LIBRARY_PATH": "/other"}
    job.mount("model", base_models["sd15"])
    job.mount("dataset", pictures)
    job.configure("hyperparameters", {**TINY, "max_train_epochs": "1"})
    result = job.run()
    assert result.code == 0, result.out + result.err
    why = "the driver 550.90.07 is older than CUDA 13.0 needs (580)"
    assert f"check: {why}; NVIDIA's forward-compatibility libraries are used" in result.out
    assert f"torch finds libraries in {compat}:/other" in result.out


@pytest.mark.parametrize("kind", KINDS)
def test_uris_as_flags(
    kind: Kind, job: Job, s3: S3Server, bucket: S3Uri, base_models: dict[Kind, Path], pictures: Path
) -> None:
    """S3 to S3; the TOML's values below the flags'; what is verified is not fetched a second time."""
    job.environment |= s3.environment
    put(s3, bucket / "models/base.safetensors", base_models[kind])
    put(s3, bucket / "cats", pictures)
    put(s3, bucket / "job.toml", "[any]\nseed = 7\nnetwork_dim = 64\n")
    flags = [
        f"--model_uri={bucket / 'models'}",  # a folder with one model in it
        f"--dataset_uri={bucket / 'cats'}",
        f"--config_uri={bucket / 'job.toml'}",
        f"--output_uri={bucket / 'out'}",
        f"--logs_uri={bucket / 'logs'}",
        *(f"--{name}={value}" for name, value in TINY.items()),
    ]

    result = job.run(*flags)

    assert_completed(result, job, kind)
    assert keys(s3, bucket / "out") == [
        "job.json",
        "report.html",
        "shape-000001.safetensors",
        "shape.safetensors",
        "shape.toml",
    ]
    (log,) = keys(s3, bucket / "logs")
    assert log.split("/")[1] == "network_train"
    lora = s3.client().get_object(Bucket=bucket.bucket, Key="out/shape.safetensors")["Body"].read()
    assert lora == (job.model / "shape.safetensors").read_bytes()
    values = tomllib.loads((job.model / "shape.toml").read_text())
    assert (values["seed"], values["network_dim"]) == (7, 4)
    for item in job.record["inputs"]:  # of an object in several parts some servers hold no checksum at all
        whole = s3.stand_in or "/cats/" in item["uri"]
        assert (item["verified"] != "size") >= whole, item
        assert bool(item["checksum"]) == (item["verified"] != "size")
    assert {item["uri"] for item in job.record["inputs"]} >= {f"{bucket / 'models/base.safetensors'}"}
    if kind == "sd15":
        again = job.run(*flags, "--max_train_epochs=1")
        assert again.code == 0
        assert "9 already here" in again.out


ESD_TOML = """
[training]
pretrained_model_name_or_path = "./sd-models/some.safetensors"
train_data_dir = "./train/input"
reg_data_dir = ""
output_dir = "output"
logging_dir = "./logs"
log_prefix = "output_name"
output_name = "shape"
enable_wd14_tagger = false
network_module = "networks.lora"
network_args = []
lr_scheduler = "cosine"
lr_restart_cycles = 1
lr_warmup_steps = 0
unet_lr = 1e-3
text_encoder_lr = 1e-5
resolution = "64,64"
enable_bucket = false
train_batch_size = "2"
max_train_epochs = 2
save_every_n_epochs = 1
save_n_epoch_ratio = 0
save_last_n_epochs = 499
save_model_as = "safetensors"
save_precision = "fp16"
mixed_precision = "no"
max_token_length = 225
clip_skip = 2
gradient_checkpointing = false
[training.additional_network]
network_dim = 4
network_alpha = 4
"""


@pytest.mark.parametrize("kind", KINDS)
def test_esd(
    kind: Kind, job: Job, s3: S3Server, bucket: S3Uri, base_models: dict[Kind, Path], pictures: Path
) -> None:
    """As stable-diffusion-aws-extension starts it, and as it reads the bucket afterwards."""
    job.environment |= s3.environment
    if kind == "sdxl":
        torch.save({"state_dict": load_file(base_models[kind])}, job.scratch / "base.ckpt")
        model = put(s3, bucket / "Stable-diffusion/checkpoint/base.ckpt", job.scratch / "base.ckpt")
    else:  # ESD's early form
        archive = job.scratch / "base.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(base_models[kind], "models/base.safetensors")
        model = put(s3, bucket / "Stable-diffusion/checkpoint/base.tar", archive)
    put(s3, bucket / "dataset/shape/2_shape", pictures / "2_shape")
    put(s3, bucket / "dataset/shape_512x512/not a data set of ours.txt", "a neighbour that begins alike")
    put(s3, bucket / "kohya/train/1f/input/kohya_config_cloud.toml", ESD_TOML)
    parameters = {
        "id": "1f",
        "training_id": "1f",
        "sagemaker_program": "extensions/sd-webui-sagemaker/sagemaker_entrypoint_json.py",
        "training-type": "kohya",
        "s3-input-path": str(bucket / "dataset/shape"),
        "s3-output-path": str(bucket / "Stable-diffusion/checkpoint/custom/1f"),
        "params": {
            "training_params": {
                "training_instance_type": "ml.g5.2xlarge",
                "fm_type": {"sd15": "sd_1_5", "sdxl": "sd_xl"}[kind],
                "s3_model_path": str(model),
                "s3_data_path": str(bucket / "dataset/shape"),
                "s3_toml_path": str(bucket / "kohya/train/1f/input/kohya_config_cloud.toml"),
            },
            "config_params": {"output_name": "shape", "enable_wd14_tagger": False, "max_train_epochs": None},
            "enable_wd14_tagger": False,
            "wd14_tagger_params": {"general_threshold": "0", "character_threshold": "0"},
        },
    }
    location = str(put(s3, bucket / "train/param-1f.json", json.dumps(parameters)))
    quoted = json.dumps(location) if kind == "sdxl" else location
    job.configure("hyperparameters", {"s3_location": quoted})
    job.configure("inputdataconfig", {})

    result = job.run("--trainer=builtin", "--save_last_n_epochs=")  # which builtin does not have

    assert_completed(result, job, kind)
    assert "becomes one .safetensors file" in result.out
    assert "lr_restart_cycles is read as lr_scheduler_num_cycles" in result.out
    assert "train_data_dir is the job's to choose, and was replaced" in result.out
    output = keys(s3, bucket / "Stable-diffusion/checkpoint/custom/1f")
    assert output == ["shape-000001.safetensors", "shape.safetensors"]
    (log,) = keys(s3, bucket / "kohya/train/1f/logs")
    assert log.startswith("events.out.tfevents.")
    assert len(job.record["inputs"]) == 9  # and nothing of the neighbour


def test_a_stop_publishes_what_there_is(
    job: Job, s3: S3Server, bucket: S3Uri, base_models: dict[Kind, Path], pictures: Path
) -> None:
    """SIGTERM in the second epoch: the first epoch's LoRA is kept, exit 143, and no failure file."""
    job.environment |= s3.environment
    job.mount("model", base_models["sd15"])
    job.mount("dataset", pictures)
    flags = {
        **TINY,
        "max_train_epochs": "500",
        "output_uri": str(bucket / "out"),
        "logs_uri": str(bucket / "logs"),
    }
    job.configure("hyperparameters", flags)

    result = job.run_until("epoch=2/500", signal.SIGTERM)

    assert result.code == 143, result.out + result.err
    assert job.failure is None
    assert job.record["result"] == "stopped"
    assert "shape-000001.safetensors" in keys(s3, bucket / "out")
    assert "shape.safetensors" not in keys(s3, bucket / "out")
    assert len(keys(s3, bucket / "logs")) == 1
    assert_lora(job.model / "shape-000001.safetensors", "sd15")
    assert (job.tree / "checkpoints" / "state-a" / "train_state.json").exists()
    assert 0 <= job.record["stop_seconds"]["train"] + job.record["stop_seconds"]["publish"] < 100


def test_a_job_goes_on_from_a_state(job: Job, base_models: dict[Kind, Path], pictures: Path) -> None:
    """The job that resumes makes the steps that are left."""
    job.mount("model", base_models["sd15"])
    job.mount("dataset", pictures)
    job.configure("hyperparameters", {**TINY, "max_train_epochs": "6", "state_every_minutes": "0.0001"})
    result = job.run_until("epoch=2/6", signal.SIGTERM)
    assert result.code == 143, result.out + result.err
    state = job.newest_state
    done = json.loads((state / "train_state.json").read_text())["current_step"]

    result = job.run(f"--resume={state}")

    assert result.code == 0, result.out + result.err
    steps = [
        event.step
        for log in job.events
        for event in EventAccumulator(str(log.parent)).Reload().Scalars("loss/current")
    ]
    assert steps == list(range(1, 25))
    assert 4 <= done < 24
    again = tomllib.loads((job.model / "shape.toml").read_text())
    assert "resume" not in again
    assert job.run("--resume=/nowhere").err == (
        "ERROR: flag --resume: /nowhere is no state of the trainer builtin: there is no train_state.json in "
        "it. Name a folder such as lora-step00000012-state.\n"
    )


def test_what_sd_scripts_would_mistake_is_mended_and_what_training_comes_to_is_told(
    job: Job, base_models: dict[Kind, Path], pictures: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    folder = data / "2_shape"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(folder / "0.png") as picture:
        picture.resize((128, 96)).save(folder / "0.jpg", exif=exif)
    (folder / "0.png").unlink()
    (folder / "1.txt").write_bytes(b"\xef\xbb\xbfa green square")
    (folder / "0_0064x0064_sd.npz").write_text("of another day")
    job.mount("model", base_models["sd15"])
    job.mount("dataset", data)
    job.configure(
        "hyperparameters",
        {**TINY, "enable_bucket": "true", "min_bucket_reso": "64", "bucket_no_upscale": "false"},
    )
    before = {path: path.read_bytes() for path in data.rglob("*.*")}

    result = job.run()

    assert result.code == 0, result.out + result.err
    for said in (
        "check: left out: 1 latent cache (0_0064x0064_sd.npz)",
        "fetch: 1 picture (0.jpg): turned as its EXIF tag says",
        "fetch: 1 caption (1.txt): a byte order mark is taken out",
        "fetch: 2_shape: 4 pictures × 2, 4 captions",
        "fetch: 4 batches an epoch, 2 epochs, 8 steps",
        "prepare: 1 picture and 1 caption mended; the data set stays as it is",
    ):
        assert said in result.out, said
    assert {path: path.read_bytes() for path in data.rglob("*.*")} == before
    facts = job.record["facts"]
    assert (facts["batches"], facts["steps"], facts["epochs"], facts["exact"]) == (4, 8, 2, True)
    assert max(int(line.split("/")[1].split()[0]) for line in result.lines if line.startswith("step=")) == 8
