"""entrypoint.check: what follows from the GPU, and what sd-scripts would fail on."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from entrypoint import check
from entrypoint.contract import Tree
from entrypoint.gpu import Gpu
from entrypoint.request import Source, resolve
from kohya import config, rules
from kohya.config import Setting
from kohya.sd_scripts import SdScripts


def precision(gpu: Gpu | None) -> tuple[object, str]:
    setting = config.merge("sd15", [config.preset("sd15"), check._machine(gpu)]).settings["mixed_precision"]
    return setting.value, setting.where


def test_the_precision_comes_from_the_gpus_preset() -> None:
    value, where = precision(Gpu("Tesla T4", 7.5, 1))
    assert value == "fp16"
    assert where.startswith("configs/gpu/t4.toml line ")
    assert precision(Gpu("NVIDIA L40S", 8.9, 1))[0] == "bf16"


def test_a_gpu_without_a_preset_gets_what_its_capability_allows() -> None:
    assert precision(Gpu("NVIDIA A10", 8.6, 1)) == ("bf16", "NVIDIA A10, compute capability 8.6")
    assert precision(Gpu("Tesla V100-SXM2-16GB", 7.0, 1))[0] == "fp16"
    assert precision(Gpu("Tesla V100-SXM2-16GB", None, 1)) == (
        "fp16",
        "Tesla V100-SXM2-16GB, compute capability unknown",
    )
    assert precision(None) == ("no", "this machine has no GPU")


@pytest.mark.parametrize("kind", config.KINDS)
def test_the_users_layers_lie_above_the_gpus_preset(kind: config.Kind) -> None:
    gpu = check._machine(Gpu("NVIDIA H100 80GB HBM3", 9.0, 1))
    assert config.merge(kind, [config.preset(kind), gpu]).values["gradient_checkpointing"] is False
    asked = [Setting("gradient_checkpointing", True, "flag"), Setting("mixed_precision", "fp16", "flag")]
    values = config.merge(kind, [config.preset(kind), gpu, asked]).values
    assert (values["gradient_checkpointing"], values["mixed_precision"]) == (True, "fp16")


def adapted(kind: config.Kind, python: Path, **values: object) -> config.Merged:
    """What becomes of `values` on top of the presets, for a Python that lacks nothing."""
    layer = [Setting(name, value, f"flag --{name}") for name, value in values.items()]
    merged = config.merge(kind, [config.preset(kind), check._machine(None), layer])
    merged, _ = rules.settle(kind, merged)
    return check._sd_scripts(SdScripts(python.parent, python), kind, merged, None)[0]


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A Python that finds every module."""
    file = tmp_path / "python"
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    return file


def test_cached_text_takes_the_presets_shuffling_away(python: Path) -> None:
    merged = adapted("sdxl", python, cache_text_encoder_outputs=True)
    assert merged.values["shuffle_caption"] is False
    assert any("shuffle_caption = true becomes false" in note for note in merged.notes)
    assert adapted("sdxl", python).values["shuffle_caption"] is True


def test_persistent_workers_need_workers(python: Path) -> None:
    options = {"persistent_data_loader_workers": True, "max_data_loader_n_workers": 0}
    assert adapted("sd15", python, **options).values["persistent_data_loader_workers"] is False
    options["max_data_loader_n_workers"] = 2
    assert adapted("sd15", python, **options).values["persistent_data_loader_workers"] is True


def test_wandb_alone_would_leave_the_job_without_steps(python: Path) -> None:
    assert adapted("sd15", python, log_with="wandb").values["log_with"] == "all"


T4, A10G = Gpu("Tesla T4", 7.5, 1), Gpu("NVIDIA A10G", 8.6, 1)


def tried(
    gpu: Gpu | None = None, *, trainer: str = "builtin", here: bool = True, **values: object
) -> tuple[config.Merged, str]:
    """The configuration for a trainer on this machine, and what is wrong."""
    layer = [Setting(name, value, f"flag --{name}") for name, value in values.items()]
    merged = config.merge("sd15", [config.preset("sd15"), check._machine(gpu), layer])
    request: Any = SimpleNamespace(trainer=trainer)
    _, merged, problems = check._trainer(request, "sd15", merged, gpu, here=here)
    return merged, " ".join(map(str, problems))


def test_a_precision_that_the_machine_does_not_have() -> None:
    fix = (
        "mixed_precision = fp16 does not run on a CPU, and this machine has no GPU. Write mixed_precision=no."
    )
    assert tried(mixed_precision="fp16")[1] == f"flag --mixed_precision: {fix}"
    assert tried(T4, mixed_precision="fp16")[1] == ""
    fix = "mixed_precision = bf16 does not run on a Tesla T4. Write mixed_precision=fp16."
    assert tried(T4, mixed_precision="bf16")[1] == f"flag --mixed_precision: {fix}"
    assert tried(A10G, mixed_precision="bf16")[1] == ""


def test_tokenizers_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_DIR", str(tmp_path))
    said = f"the CLIP tokenizers are not in {tmp_path}. Type: python -m kohya.tokenizers."
    assert tried()[1] == f"trainer builtin: {said}"
    assert tried(here=False)[1] == ""


@pytest.mark.parametrize("trainer", ["builtin", "sd-scripts"])
def test_a_state_that_is_none(trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = tmp_path / "state"
    state.mkdir()
    own = {"builtin": "random_states.bin", "sd-scripts": "random_states_0.pkl"}[trainer]
    for name in ("train_state.json", own):
        said = (
            f"{state} is no state of the trainer {trainer}: there is no {name} in it. Name a folder such as"
        )
        assert f"flag --resume: {said} lora-step00000012-state." in tried(trainer=trainer, resume="state")[1]
        (state / name).touch()
    merged, said = tried(trainer=trainer, resume="state")
    assert "is no state" not in said
    assert (merged.values["resume"], merged.settings["resume"].where) == (str(state), "flag --resume")


def test_what_builtin_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    said = tried(network_dropout=0.1)[1]
    assert said.startswith("flag --network_dropout: builtin does not have this option. Take it out")
    assert "trainer builtin: network_module: builtin knows networks.lora, not" in " ".join(
        map(str, check._builtin(config.merge("sd15", [])))
    )
    lacking = {"torch", "diffusers", "transformers", "accelerate", "tensorboard", "PIL"}
    for name in lacking:
        monkeypatch.setattr("importlib.util.find_spec", lambda asked, name=name: asked != name or None)
        fix = "Type: pip install 'sagemaker-kohya[train]'."
        assert tried()[1] == f"trainer builtin: {name} cannot be imported here. {fix}"


def test_sd_scripts_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_SCRIPTS_DIR", str(tmp_path))
    absent = f"sd-scripts is not in {tmp_path}: there is no train_network.py"
    said = tried(trainer="sd-scripts")[1]
    assert said.startswith(f"trainer sd-scripts: {absent}. Type make sd-scripts, or set SD_SCRIPTS_DIR")
    assert tried(trainer="sd-scripts", here=False)[1] == ""  # nothing is trained on this machine


def test_xformers_where_there_are_none(python: Path, tmp_path: Path) -> None:
    merged = adapted("sd15", python, xformers=True)
    assert (merged.values["xformers"], merged.values["sdpa"]) == (False, True)
    assert "xformers = true becomes false: xformers needs a GPU" in " ".join(merged.notes)
    python.write_text("#!/bin/sh\necho xformers\n")
    asked = config.merge("sd15", [config.preset("sd15"), [Setting("xformers", True, "flag")]])
    merged, _ = check._sd_scripts(SdScripts(tmp_path, python), "sd15", asked, A10G)
    assert merged.values["xformers"] is False
    assert "xformers is not installed" in " ".join(merged.notes)


def test_what_the_job_sets_for_sd_scripts_itself(python: Path) -> None:
    assert adapted("sd15", python).values["console_log_simple"] is True
    assert "skip_until_initial_step" not in adapted("sd15", python).values
    assert adapted("sd15", python, resume="/state").values["skip_until_initial_step"] is True
    merged = config.merge("sd15", [config.preset("sd15"), check._machine(A10G)])
    assert "ddp_timeout" not in check._sd_scripts(None, "sd15", merged, A10G)[0].values
    two = Gpu("NVIDIA A10G", 8.6, 2)
    assert check._sd_scripts(None, "sd15", merged, two)[0].values["ddp_timeout"] == 120
    asked = config.change(merged, {"ddp_timeout": 5}, "flag")
    assert check._sd_scripts(None, "sd15", asked, two)[0].values["ddp_timeout"] == 5


def test_what_the_python_of_sd_scripts_lacks(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ncase $2 in *import_module*) exit 1;; esac\necho torch lion_pytorch\n")
    python.chmod(0o755)
    lion = config.merge("sd15", [[Setting("optimizer_type", "Lion", "flag --optimizer_type")]])
    said = " ".join(map(str, check._lacking(SdScripts(tmp_path, python), lion)))
    wrong = f"torch cannot be imported by {python}. Type: {python} -m pip install torch."
    assert f"trainer sd-scripts: {wrong}" in said
    wrong = f"lion_pytorch cannot be imported by {python}. Type: {python} -m pip install lion-pytorch"
    assert f"flag --optimizer_type: {wrong}" in said
    own = config.merge("sd15", [[Setting("optimizer_type", "mine.Best", "flag --optimizer_type")]])
    said = " ".join(map(str, check._lacking(SdScripts(tmp_path, python), own)))
    assert f"flag --optimizer_type: mine.Best cannot be imported by {python}. Correct its name." in said


@pytest.mark.parametrize("name", ["torch", "diffusers", "transformers", "accelerate", "tensorboard", "PIL"])
def test_the_python_of_sd_scripts_is_asked_for_each_library(name: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase " $* " in *" {name} "*) echo {name};; esac\n')
    python.chmod(0o755)
    (found,) = check._lacking(SdScripts(tmp_path, python), config.merge("sd15", [config.preset("sd15")]))
    assert str(found).startswith(f"trainer sd-scripts: {name} cannot be imported by {python}")


def test_a_disk_that_is_too_small_and_folders_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = check.Here(Tree(tmp_path / "ml"), tmp_path / "scratch")
    assert check._disk(0, here) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_500_000_000))
    said = "the inputs and the trainer's files need 2,000 MB, and 1,500 MB are free"
    (found,) = check._disk(1_000_000_000, here)
    assert str(found) == f"{tmp_path}/scratch: {said}. Give the job a larger volume (VolumeSizeInGB)."
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=900_000_000))
    assert "ml/model: the LoRAs need 1,000 MB, and 900 MB are free" in str(check._disk(0, here)[1])
    (tmp_path / "file").touch()
    here = check.Here(Tree(tmp_path / "file"), tmp_path / "file")
    fix = "Set SAGEMAKER_BASE_DIR to a folder of your own."
    assert [str(one) for one in check._disk(0, here)] == [
        f"{tmp_path}/file: it cannot be written to (File exists). {fix}",
        f"{tmp_path}/file/model: it cannot be written to (Not a directory). {fix}",
    ]
    outputs: Any = SimpleNamespace(output=tmp_path / "file", logs=None, checkpoints=None)
    said = " ".join(map(str, check._outputs(outputs, here, check.Storage())))
    assert f"{tmp_path}/file: it cannot be written to (File exists). Name another folder." in said
    assert f"{tmp_path}/file/output/tensorboard: it cannot be written to (Not a directory). {fix}" in said


@pytest.mark.parametrize("name", ["dataset_config", "sample_prompts"])
def test_a_toml_that_an_option_names_is_not_the_configuration(name: str, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(f"{name} = './a.toml'")
    (tmp_path / "a.toml").write_text("")
    request: Any = SimpleNamespace(layers=())
    found = check._configuration(request, Source(tmp_path, "channel config"), check.Storage())
    assert found is not None
    assert found[0] == tmp_path / "job.toml"
    (tmp_path / "job.toml").unlink()
    request = SimpleNamespace(layers=[[Setting(name, "a.toml", f"flag --{name}")]])
    assert check._configuration(request, Source(tmp_path, "channel config"), check.Storage()) is None


@pytest.mark.parametrize("resume", [False, True])
def test_a_state_of_another_run_is_told_unless_the_user_names_one(
    resume: bool, tmp_path: Path, base_models: dict[config.Kind, Path], pictures: Path
) -> None:
    tree = Tree(tmp_path / "ml")
    for name in ("state-a", "named"):
        (tree.checkpoints / name).mkdir(parents=True)
        for file in ("train_state.json", "random_states.bin"):
            (tree.checkpoints / name / file).write_text("{}")
    manifest = {"format": 1, "step": 3, "run": {"seed": 1}, "event_log": None, "files": {}, "loras": {}}
    (tree.checkpoints / "state-a" / "state.json").write_text(json.dumps(manifest))
    flags = [f"--model_uri={base_models['sd15']}", f"--dataset_uri={pictures}", "--trainer=builtin"]
    flags += [f"--resume={tree.checkpoints / 'named'}"] if resume else []
    request = resolve(flags, tree, check.Storage())
    found = check.examine(request, None, check.Storage(), check.Here(tree, tmp_path / "scratch"))
    told = [str(problem) for problem in found.problems]
    if resume:
        assert told == []
    else:
        (problem,) = told
        assert problem.startswith(
            f"{tree.checkpoints}/state-a: it is of another run: GPUs that train was not"
        )
    assert found.plan is not None
    assert found.plan.states == []
