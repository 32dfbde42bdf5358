"""Jobs that cannot succeed end at once, with the right exit code and a failure file to act on."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from entrypoint.storage import S3Uri
from kohya.config import Kind
from tests.harness import TINY, Job, Result
from tests.s3 import S3Server
from tests.unit.test_ckpt import Runs

SECONDS = 60  # from process start to exit, on a machine that is busy with other tests


def assert_refused(job: Job, result: Result, *said: str) -> None:
    """Exit 2, a failure file within SageMaker's limit that says all of it, and the same in the log."""
    assert result.code == 2, result.out + result.err
    assert job.failure is not None
    assert len(job.failure.encode()) <= 980
    for text in said:
        assert text in job.failure
        assert text in result.err
    assert "Traceback" not in result.err
    assert "step=" not in result.out
    assert not list(job.model.glob("*.safetensors"))


def test_nothing_given(job: Job) -> None:
    result = job.run()
    assert_refused(
        job,
        result,
        "model: there is neither a channel model nor a hyperparameter model_uri",
        "--dataset_uri=s3://BUCKET/dataset",
    )
    assert job.failure is not None
    assert job.failure.startswith("2 problems: (1) model: ")


def test_three_mistakes_are_told_in_one_report_within_seconds(ready: Job, tmp_path: Path) -> None:
    ready.configure("hyperparameters", {**TINY, "mixed_precision": "fp17", "train_batch_size": "none"})
    (tmp_path / "job.toml").write_text("[a]\nsave_precision = 'half'\n")
    started = time.monotonic()
    result = ready.run(f"--config_uri={tmp_path / 'job.toml'}")
    assert time.monotonic() - started < SECONDS
    assert_refused(
        ready,
        result,
        'hyperparameter mixed_precision: mixed_precision = "fp17" is not one of no, fp16, bf16',
        'hyperparameter train_batch_size: train_batch_size = "none" is not a whole number',
        f"{tmp_path / 'job.toml'} line 2: save_precision",
    )


def test_a_mistyped_name_is_told_with_the_nearest_one(ready: Job) -> None:
    result = ready.run("--netwrok_dim=8")
    assert_refused(ready, result, "flag --netwrok_dim: there is no such", "Did you mean network_dim")


def test_missing_model_in_s3(job: Job, s3: S3Server, bucket: S3Uri, pictures: Path) -> None:
    job.environment |= s3.environment
    s3.client().put_object(Bucket=bucket.bucket, Key="models/sd15.safetensors", Body=b"x")
    job.mount("dataset", pictures)
    result = job.run("--trainer=builtin", f"--model_uri={bucket / 'models/sd51.safetensors'}")
    assert_refused(job, result, f"{bucket / 'models/sd51.safetensors'}", "sd15.safetensors")


def test_missing_model_on_disk(job: Job, pictures: Path) -> None:
    job.mount("dataset", pictures)
    result = job.run("--trainer=builtin", "--model_uri=/nowhere/sd15.safetensors")
    assert_refused(
        job, result, "flag --model_uri: /nowhere/sd15.safetensors: there is no such file or folder"
    )


def test_wrong_bucket(job: Job, s3: S3Server, base_models: dict[Kind, Path]) -> None:
    job.environment |= s3.environment
    job.mount("model", base_models["sd15"])
    result = job.run("--trainer=builtin", "--dataset_uri=s3://no-such-bucket-of-ours/cats")
    assert_refused(job, result, "s3://no-such-bucket-of-ours")


def test_wrong_output_bucket_is_found_before_training(ready: Job, s3: S3Server) -> None:
    ready.environment |= s3.environment
    assert_refused(
        ready, ready.run("--output_uri=s3://no-such-bucket-of-ours/out"), "s3://no-such-bucket-of-ours"
    )


def test_no_credentials(ready: Job) -> None:
    ready.environment |= {"HOME": "/nowhere", "AWS_REGION": "us-east-1"}
    assert_refused(ready, ready.run("--output_uri=s3://some-bucket/out"), "credentials")


def test_empty_data_set(ready: Job, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (ready.tree / "input/data/dataset").unlink()
    ready.mount("dataset", tmp_path / "empty")
    assert_refused(ready, ready.run(), "there is no picture", "N_name")


def test_folders_and_captions_that_would_be_ignored(ready: Job, tmp_path: Path, pictures: Path) -> None:
    shutil.copytree(pictures / "2_shape", tmp_path / "data" / "shape")
    (tmp_path / "data" / "shape" / "0.txt").unlink()
    (ready.tree / "input/data/dataset").unlink()
    folder = ready.mount("dataset", tmp_path / "data")
    assert_refused(
        ready, ready.run(), f"{folder}/shape: the folder's name does not say how often", "10_shape"
    )
    (tmp_path / "data" / "shape").rename(tmp_path / "data" / "10_shape")
    assert_refused(ready, ready.run(), "of 4 pictures, 1 without a caption", "allow_missing_captions=true")


def test_model_of_another_kind(ready: Job, tmp_path: Path) -> None:
    assert_refused(ready, ready.run("--kind=sdxl"), "it is an sd15 model, and the job asks for sdxl")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora", "it is a LoRA"),
        ("cut", "cut off or damaged"),
        ("text", "not a safetensors file"),
        ("words.ckpt", "no .ckpt"),
        ("code.ckpt", "calls posix.system when it is loaded"),
    ],
)
def test_what_is_no_base_model(ready: Job, tmp_path: Path, name: str, said: str) -> None:
    file = tmp_path / (name if "." in name else f"{name}.safetensors")
    if name == "lora":
        save_file({"lora_unet_x.alpha": np.zeros(1, np.float32)}, file)
    elif name == "cut":
        save_file({"a": np.zeros(100, np.float32)}, file)
        os.truncate(file, file.stat().st_size - 1)
    elif name == "code.ckpt":
        torch.save({"a": Runs(os.system, f"touch {tmp_path}/ran")}, file)
    else:
        file.write_text("words " * 100)
    (ready.tree / "input/data/model/sd15.safetensors").unlink()
    ready.tree.joinpath("input/data/model", file.name).symlink_to(file)
    assert_refused(ready, ready.run(), f"channel model: {ready.tree}/input/data/model/{file.name}", said)
    assert not (tmp_path / "ran").exists()


def test_two_hosts_and_pipe_mode(ready: Job) -> None:
    ready.configure("resourceconfig", {"hosts": ["algo-1", "algo-2"]})
    ready.configure("inputdataconfig", {"dataset": {"TrainingInputMode": "Pipe"}})
    assert_refused(ready, ready.run(), "InstanceCount to 1", "Pipe mode")


def test_sd_scripts_is_never_replaced_in_silence(ready: Job) -> None:
    ready.environment["SD_SCRIPTS_DIR"] = "/nowhere"
    result = ready.run("--trainer=sd-scripts")
    assert_refused(ready, result, "sd-scripts is not in /nowhere", "make sd-scripts", "--trainer=builtin")


def test_another_version_of_sd_scripts_is_refused(ready: Job, tmp_path: Path) -> None:
    (tmp_path / "train_network.py").write_text("print('newer')")
    ready.environment["SD_SCRIPTS_DIR"] = str(tmp_path)
    result = ready.run("--trainer=sd-scripts")
    assert_refused(ready, result, f"{tmp_path}/train_network.py is not the one of sd-scripts v0.10.1")


def test_builtin_refuses_what_it_does_not_have_by_name(ready: Job) -> None:
    assert_refused(ready, ready.run("--optimizer_type=Prodigy", "--flip_aug"), "Prodigy", "flag --flip_aug")


def test_builtin_refuses_the_inputs_that_it_does_not_have(ready: Job, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("dataset_config = 'data.toml'\n")
    (tmp_path / "data.toml").write_text("[[datasets]]\n[[datasets.subsets]]\nimage_dir = '2_shape'\n")
    config = ready.mount("config", tmp_path / "job.toml")
    (config / "data.toml").symlink_to(tmp_path / "data.toml")
    vae = {"encoder.down.0.block.0.norm1.weight": (1,), "encoder.conv_out.weight": (8, 1)}
    save_file({name: np.zeros(shape, np.float32) for name, shape in vae.items()}, tmp_path / "v.safetensors")
    result = ready.run(f"--vae_uri={tmp_path / 'v.safetensors'}")
    assert_refused(
        ready,
        result,
        "flag --vae_uri: vae: builtin does not have this option",
        f"{config / 'job.toml'} line 1: dataset_config: builtin does not have this option",
    )


def test_two_configurations_and_nothing_that_tells_them_apart(ready: Job, tmp_path: Path) -> None:
    for name in ("a.toml", "b.toml"):
        (tmp_path / name).write_text("seed = 1\n")
    config = ready.mount("config", tmp_path / "a.toml")
    (config / "b.toml").symlink_to(tmp_path / "b.toml")
    assert_refused(ready, ready.run(), "channel config", "there are 2 files (a.toml, b.toml)")


def test_a_dataset_config_alone_is_no_configuration(ready: Job, tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text("[[datasets]]\n[[datasets.subsets]]\nimage_dir = '/home/me/cat'\n")
    config = ready.mount("config", tmp_path / "data.toml")
    result = ready.run("--dataset_config=data.toml")
    told = f"{config / 'data.toml'}: [[datasets]] 1, subset 1: image_dir = '/home/me/cat' names no folder"
    assert_refused(ready, result, told)
    (config / "job.toml").write_text("seed = ")
    result = ready.run("--dataset_config=data.toml")
    assert_refused(ready, result, "job.toml: it is not TOML")
    assert "no channel config" not in result.err


def test_s3_location_beside_uris(ready: Job) -> None:
    result = ready.run("--s3_location=/tmp/none.json", "--output_uri=/tmp/x")
    assert_refused(ready, result, "flag --output_uri: s3_location says where everything is")


def test_esd_captions_without_a_tagger(job: Job, tmp_path: Path) -> None:
    job.environment.pop("TAGGER_DIR", None)
    (tmp_path / "p.json").write_text(
        '{"id": "1", "training-type": "kohya", "s3-output-path": "/x", "params": {"enable_wd14_tagger": true,'
        '"training_params": {"fm_type": "sd_1_5", "s3_model_path": "/m", "s3_data_path": "/d",'
        '"s3_toml_path": "/t"}}}'
    )
    result = job.run(f"--s3_location={tmp_path / 'p.json'}")
    flag = "params.enable_wd14_tagger: it asks for captions, and there is no tagger"
    assert_refused(job, result, flag, "type --tagger_uri=s3://BUCKET/tagger")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 100 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", folder], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("making a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk_is_seen_before_the_fetch(ready: Job, small_disk: Path) -> None:
    ready.environment["TMPDIR"] = str(small_disk)
    assert_refused(ready, ready.run(), str(small_disk), "MB are free", "VolumeSizeInGB")


def test_a_training_that_diverges_is_no_success(ready: Job) -> None:
    result = ready.run("--unet_lr=1e10", "--text_encoder_lr=1e10", "--max_train_epochs=20")
    assert result.code == 1
    assert ready.failure is not None
    assert ready.failure.startswith("The loss was not a number for 10 steps in a row")
    assert "shape.safetensors" not in {path.name for path in ready.model.iterdir()}


def test_a_lora_that_learned_nothing_is_no_success(ready: Job) -> None:
    """The first step of a warmup has the rate 0."""
    flags = ("--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=100", "--max_train_steps=1")
    result = ready.run(*flags, "--max_train_epochs=", "--save_precision=float")
    assert result.code == 1, result.out + result.err
    assert ready.failure is not None
    assert "it is all zero, nothing was learned" in ready.failure
    assert not list(ready.model.glob("*.safetensors"))


def test_secrets_do_not_reach_log_record_or_failure(ready: Job) -> None:
    ready.configure(
        "hyperparameters", {**TINY, "huggingface_token": "hf_verysecret", "wandb_api_key": "wb_verysecret"}
    )
    result = ready.run("--seed=hf_verysecret")
    assert result.code == 2
    written = [ready.model / "job.json", ready.tree / "output" / "data" / "report.html"]
    everything = result.out + result.err + (ready.failure or "") + "".join(map(Path.read_text, written))
    assert "seed" in everything
    assert "verysecret" not in everything


def test_a_tree_that_cannot_be_written(job: Job, base_models: dict[Kind, Path], pictures: Path) -> None:
    job.environment["SAGEMAKER_BASE_DIR"] = "/dev/null/ml"
    flags = (f"--model_uri={base_models['sd15']}", f"--dataset_uri={pictures}")
    result = job.run("--trainer=builtin", *flags)
    assert result.code == 2
    assert "/dev/null/ml/model: it cannot be written to" in result.err
    assert "SAGEMAKER_BASE_DIR" in result.err
    assert "Traceback" not in result.err


def test_mistakes_of_all_sorts_are_told_at_once(job: Job) -> None:
    result = job.run(
        "--model_uri=/nowhere.safetensors", "--dataset_uri=/nopics", "--learning_rat=3", "--network_dim=x"
    )
    assert_refused(job, result, "/nowhere.safetensors", "/nopics", "learning_rat", "network_dim")


def test_a_failure_file_does_not_outlive_the_next_job(ready: Job) -> None:
    assert ready.run("--seed=x").code == 2
    assert ready.failure is not None
    assert ready.run("--max_train_epochs=1").code == 0
    assert ready.failure is None


def test_fp16_needs_a_gpu(ready: Job) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")
    assert_refused(ready, ready.run("--mixed_precision=fp16"), "does not run on a CPU", "mixed_precision=no")


def test_a_driver_that_is_too_old_is_told_with_everything_else(ready: Job) -> None:
    ready.pretend("NVIDIA GeForce RTX 4090, 8.9, 550.90.07")
    said = "NVIDIA GeForce RTX 4090: the driver 550.90.07 is older than CUDA 13.0 needs (580)"
    assert_refused(ready, ready.run("--seed=x"), said, "make image CUDA=12", "seed")


def test_a_torch_without_cuda_is_no_match_for_a_gpu(ready: Job) -> None:
    """The way out that the message names is one."""
    ready.pretend("NVIDIA A10G, 8.6, 580.65.06", cuda=None)
    assert_refused(ready, ready.run(), "NVIDIA A10G: the trainer's torch is built without CUDA")
    ready.environment["CUDA_VISIBLE_DEVICES"] = ""
    result = ready.run("--max_train_steps=1")
    assert result.code == 0, result.out + result.err


def test_bf16_needs_a_gpu_that_has_it(ready: Job) -> None:
    ready.pretend("Tesla T4, 7.5, 580.65.06")
    said = "mixed_precision = bf16 does not run on a Tesla T4"
    assert_refused(ready, ready.run("--mixed_precision=bf16"), said)


def test_a_capability_that_is_not_told_refuses_nothing(ready: Job) -> None:
    ready.pretend("Tesla T4, [N/A], 580.65.06")
    assert_refused(ready, ready.run("--mixed_precision=bf16", "--seed=x"), "seed")
    assert "bf16" not in str(ready.failure)


def test_a_configuration_that_is_no_configuration(ready: Job, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("#" * (1 << 20) + "\nseed = 1")
    assert_refused(ready, ready.run(f"--config_uri={tmp_path / 'job.toml'}"), "it has more than 1 MiB")


def test_a_secret_in_the_toml_is_not_told(ready: Job, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('huggingface_token = ["hf_verysecret"]\nseed = "hf_verysecret"')
    result = ready.run(f"--config_uri={tmp_path / 'job.toml'}")
    assert_refused(ready, result, 'seed = "***" is not a whole number')
    assert "verysecret" not in result.out + result.err + str(ready.failure)


def test_a_linked_folder_is_seen(ready: Job, tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "2_shape").symlink_to(pictures / "2_shape")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (ready.tree / "input/data/dataset").unlink()
    ready.mount("dataset", tmp_path / "data")
    result = ready.run("--seed=x")  # any mistake, so that nothing is trained
    assert_refused(ready, result, "seed")
    assert "no picture" not in result.err


def test_a_results_folder_that_is_a_file(ready: Job, tmp_path: Path) -> None:
    ready.model.parent.mkdir(exist_ok=True)
    ready.model.write_text("")
    (tmp_path / "out").write_text("")
    result = ready.run(f"--output_uri={tmp_path / 'out'}")
    assert result.code == 2
    assert f"{ready.model}: it cannot be written to" in result.err
    assert f"{tmp_path / 'out'}: it cannot be written to" in result.err
    assert ready.failure is not None


@pytest.fixture
def silent_server() -> Iterator[socket.socket]:
    """A server that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(SECONDS)
        yield server


@pytest.mark.parametrize("flag", ["--s3_location=s3://b/p.json", "--model_uri=s3://b/m.safetensors"])
def test_a_stop_while_s3_does_not_answer(ready: Job, silent_server: socket.socket, flag: str) -> None:
    """In resolve, and in check: no library may take the stop for an error of its own, and try again."""
    (ready.tree / "input/data/model/sd15.safetensors").unlink()
    (ready.tree / "input/data/model").rmdir()
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x" * 9, "AWS_REGION": "us-east-1"}
    ready.environment |= {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{silent_server.getsockname()[1]}", **keys}
    process = ready.start(flag)
    with silent_server.accept()[0] as connection:
        assert connection.recv(1)  # it has asked, and waits for the answer
        process.terminate()
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 143, out + err
    assert ready.failure is None
    assert "The job was stopped" in out
