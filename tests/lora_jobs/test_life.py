"""The life of a job, from a folder of pictures to a LoRA: `lora` as people type it, and the real `train`."""

import json
import re
import signal
import tomllib
from pathlib import Path

import pytest

from demo.stand_in import BUCKET, client
from entrypoint.checkpoint import verify_lora
from kohya import networks
from kohya.config import Kind
from tests.lora_jobs.client import QUICK, Person, shown_steps

# 1,200 steps, of which a machine makes no more than some hundred before it is broken off
LONG = {"max_train_epochs": 300, "save_every_n_epochs": 5}
MOST_COLUMNS = 80


def test_from_pictures_to_a_lora(person: Person, base_models: dict[Kind, Path], pictures: Path) -> None:
    file = person.job_file(base_models["sd15"], pictures)
    file.write_text(file.read_text().replace("\n[training]\n", "\nprice_per_hour = 3600\n\n[training]\n"))
    job = person.submitted(file)

    watched = person.lora("watch", file.name, *QUICK)  # no terminal: plain lines
    assert re.search(
        r"^\d\d:\d\d:\d\d \S+: Training: (check|fetch|prepare|train)$", watched.out, re.MULTILINE
    )
    assert re.search(r": step \d/8, epoch \d/2, loss \d\.\d{4}.*, billable (up to )?\d+ s", watched.out)
    assert watched.lines[-1].startswith(f"{job}: Completed after ")
    assert f"lora fetch {file.name}" in watched.lines[-1]
    assert watched.err == ""
    assert max(map(len, watched.lines)) < 200

    told = person.described(job)
    assert told["TrainingJobStatus"] == "Completed"
    names = {one["MetricName"]: one["Value"] for one in told["FinalMetricDataList"]}
    assert names["train:step"] == 8

    assert person.lora("submit", file).out.startswith(job)  # and starts no second one
    listed = json.loads(person.lora("list", "--json").out)
    assert [one["job"] for one in listed if one["job"].startswith("shape-")] == [job]
    (one,) = (one for one in listed if one["job"] == job)
    assert one["status"] == "Completed"
    assert one["billable_seconds"] == told["BillableTimeInSeconds"]
    assert one["cost"] == told["BillableTimeInSeconds"]  # at 3600 an hour

    log = person.lora("logs", job).lines
    assert any(line.startswith("step=8/8 ") for line in log)
    assert log[-1].startswith("done in ")

    fetched = person.lora("fetch", job)
    folder = person.folder / job
    assert "shape.safetensors" in fetched.out
    assert {path.name for path in folder.iterdir()} >= {
        "shape.safetensors", "shape-000001.safetensors", "shape.toml", "job.json", "report.html",
    }  # fmt: skip
    values = tomllib.loads((folder / "shape.toml").read_text())
    assert verify_lora(folder / "shape.safetensors", networks.expected("sd15", values)).modules
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    person.lora("fetch", job, "--json")
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")} == before

    _shown_in_tensorboard(person, job)


def _shown_in_tensorboard(person: Person, job: str) -> None:
    """`lora board` shows the job as one run with every step, and ends with Ctrl-C."""
    process = person.start("board", job, "--json", "--port", "0", "--every", "0.2")
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, process.communicate(timeout=10)[1]
        told = json.loads(line)
        assert told["jobs"] == [job]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", told["address"])
        assert shown_steps(told["address"], job, 8) == list(range(1, 9))
    finally:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")  # TensorBoard's own words are not the person's


def test_a_spot_job_that_is_interrupted_goes_on(
    person: Person, base_models: dict[Kind, Path], pictures: Path
) -> None:
    """On a new machine, from the checkpoints that were copied. Meanwhile it is watched, on a terminal."""
    file = person.job_file(base_models["sd15"], pictures, "spot", **LONG)
    job = person.submitted(file)
    shown = person.on_a_terminal("watch", job, *QUICK, until="training")
    assert shown.code == 130
    assert f"lora watch {job}" in shown.out  # how to come back
    assert "Training: train" in shown.out
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.out)
    assert max(len(line.rstrip()) for line in re.split(r"[\r\n]+", plain)) <= MOST_COLUMNS

    person.aws.sagemaker.jobs[job].interrupt()
    person.wait(job, person.says(job, "going on after step"))
    states = [one["Status"] for one in person.described(job)["SecondaryStatusTransitions"]]
    assert states.count("Interrupted") == 1
    assert states.count("Downloading") == 2
    person.lora("stop", job)
    watched = person.lora("watch", job, *QUICK, "--json", code=143)
    last = json.loads(watched.lines[-1])
    assert (last["status"], last["steps"]) == ("Stopped", 1200)
    assert last["billed"]
    log = "\n".join(person.lora("logs", job).lines)  # of both machines
    assert log.index("step=1/1200") < log.index("going on after step")
    assert "step=1/1200" not in log[log.index("going on after step") :]


def test_a_job_that_is_stopped_keeps_its_loras_and_goes_on(
    person: Person, base_models: dict[Kind, Path], pictures: Path
) -> None:
    file = person.job_file(base_models["sd15"], pictures, "long", **LONG)
    job = person.submitted(file)
    person.wait(job, person.says(job, "saving long-000005"))
    assert "lora submit" in person.lora("stop", file.name).out
    stopped = person.lora("watch", job, *QUICK, code=143)
    assert stopped.lines[-1].startswith(f"{job}: Stopped after ")
    fetched = json.loads(person.lora("fetch", job, "--json", "--out", "kept").out)
    assert "kept/long-000005.safetensors" in fetched["loras"]
    assert "ended already" in person.lora("stop", job).out

    again = person.submitted(file)
    assert again == f"{job}-2"
    person.wait(again, person.says(again, "going on after step"))
    assert "lora fetch long.toml" in person.lora("stop", file.name).out  # the newest
    person.lora("watch", again, *QUICK, code=143)
    assert not person.says(again, "step=1/1200 ")()


def test_a_job_that_fails_says_why(
    person: Person, base_models: dict[Kind, Path], tmp_path: Path, pictures: Path
) -> None:
    """In the words of its failure file, on the last line."""
    broken = tmp_path / "pictures" / "2_shape"
    broken.mkdir(parents=True)
    for path in (pictures / "2_shape").iterdir():
        content = path.read_bytes()
        (broken / path.name).write_bytes(content[: len(content) // 2] if path.name == "1.png" else content)
    file = person.job_file(base_models["sd15"], broken.parent, "broken")
    job = person.submitted(file)
    watched = person.lora("watch", job, *QUICK, code=1)
    cause = watched.err.splitlines()[-1]
    assert cause.startswith("ERROR: ")
    assert "1.png" in cause
    assert "AlgorithmError" not in cause
    person.lora("fetch", job)
    assert "1.png" in (person.folder / job / "report.html").read_text()
    reason = person.described(job)["FailureReason"]
    assert reason.startswith("AlgorithmError: ")
    assert reason.endswith(", exit code: 2")


def test_network_isolation_needs_no_more_than_channels(
    person: Person, base_models: dict[Kind, Path], pictures: Path
) -> None:
    """The job is given neither credentials nor an endpoint, and is to need none."""
    file = person.job_file(base_models["sd15"], pictures, "alone", max_train_epochs=1)
    file.write_text(file.read_text().replace("\n[training]\n", "\nnetwork_isolation = true\n\n[training]\n"))
    job = person.submitted(file)
    assert person.described(job)["EnableNetworkIsolation"]
    assert "output_uri" not in person.described(job)["HyperParameters"]
    person.lora("watch", job, *QUICK)
    person.lora("fetch", job)
    assert (person.folder / job / "alone.safetensors").is_file()
    objects = client("s3", person.aws.address).list_objects_v2(Bucket=BUCKET, Prefix=f"loras/{job}/")
    assert not [one for one in objects["Contents"] if "/lora/" in one["Key"]]


@pytest.mark.parametrize("command", ["watch", "logs", "stop", "fetch", "board"])
def test_a_job_that_is_not_there_is_told(command: str, person: Person) -> None:
    told = person.lora(command, "nothing-01234567", code=1).err
    assert "nothing-01234567: there is no such job in us-east-1" in told
    assert len(told.splitlines()) == 1
