"""The optional inputs, found in folders: real headers, and no S3."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from entrypoint.check import ModelFile, _sd_scripts, _to_fetch
from entrypoint.contract import Tree
from entrypoint.files import File, Single
from entrypoint.inputs import Extras, find, pictures
from entrypoint.request import JobRequest, resolve
from entrypoint.storage import RemoteObject, S3Uri, Storage
from kohya import config
from kohya.config import Kind, Merged
from kohya.networks import modules
from kohya.sd_scripts import SdScripts

VAE = {"encoder.down.0.block.0.norm1.weight": (128,), "encoder.conv_out.weight": (8, 512, 3, 3)}


class Asked:
    """A job with some channels, and what was found of them."""

    def __init__(self, folder: Path) -> None:
        self.tree = Tree(folder)
        self.channel("model")
        self.channel("dataset")

    def channel(self, name: str) -> Path:
        path = self.tree.base / "input" / "data" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def request(self) -> JobRequest:
        return resolve([], self.tree, Storage())

    def find(self, toml: str = "", kind: Kind = "sd15") -> tuple[Extras, Merged, str]:
        """With this TOML in the channel config, if it is there."""
        settings, problems = config.read(toml, "job.toml")
        assert problems == []
        merged = config.merge(kind, [config.preset(kind), settings])
        folder = self.tree.base / "input" / "data" / "config"
        extras, merged, wrong = find(
            self.request(), folder if folder.is_dir() else None, kind, merged, Storage()
        )
        return extras, merged, " ".join(map(str, [*merged.problems, *wrong]))

    def wrong(self, toml: str = "") -> str:
        return self.find(toml)[2]


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    return Asked(tmp_path)


def save(path: Path, shapes: dict[str, tuple[int, ...]], dtype: Any = np.float16) -> Path:
    save_file({name: np.zeros(shape, dtype) for name, shape in shapes.items()}, path)
    return path


def save_lora(
    path: Path, kind: Kind = "sd15", *, rank: int = 4, alpha: float | None = 4, unet_only: bool = False
) -> Path:
    tensors: dict[str, np.ndarray] = {}
    for name in modules(kind, text_encoders=not unet_only):
        tensors[f"{name}.lora_down.weight"] = np.zeros((rank, 2), np.float16)
        if alpha is not None:
            tensors[f"{name}.alpha"] = np.array(alpha, np.float16)
    save_file(tensors, path)
    return path


RANK_4 = "network_dim = 4\nnetwork_alpha = 4\n"


def test_without_channels_nothing_is_found_and_nothing_is_set(asked: Asked) -> None:
    extras, merged, wrong = asked.find()
    assert (extras, wrong) == (Extras({}, None, None), "")
    assert not {"vae", "reg_data_dir", "network_weights"} & set(merged.values)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_vae(asked: Asked, prefix: str) -> None:
    file = save(asked.channel("vae") / "v.safetensors", {prefix + name: shape for name, shape in VAE.items()})
    extras, merged, wrong = asked.find("vae = '/home/me/vae.pt'")
    assert wrong == ""
    assert extras.weights["vae"][0].file == file
    assert (merged.settings["vae"].value, merged.settings["vae"].where) == (str(file), "channel vae")
    assert "job.toml line 1: vae = " in merged.notes[-1]


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({**VAE, "model.diffusion_model.input_blocks.0.0.weight": (1,)}, "it is a U-Net"),
        ({"lora_unet_x.alpha": ()}, "it is a LoRA, and not a VAE"),
        ({"encoder.down_blocks.0.x": (1,)}, "diffusers' layout"),
        ({**VAE, "encoder.conv_out.weight": (32, 512, 3, 3)}, "16 latent channels"),
    ],
)
def test_what_is_no_vae(asked: Asked, shapes: dict[str, tuple[int, ...]], said: str) -> None:
    save(asked.channel("vae") / "v.safetensors", shapes)
    assert said in asked.wrong()


@pytest.mark.parametrize("name", ["v.ckpt", "v.pt", "v.pth", "v.bin"])
def test_a_vae_that_is_a_pickle(asked: Asked, name: str) -> None:
    (asked.channel("vae") / name).write_bytes(b"PK")
    assert "it is a pickle" in asked.wrong()


@pytest.mark.parametrize(
    ("line", "channel"),
    [
        ("vae = 'v.safetensors'", "vae"),
        ("reg_data_dir = './reg'", "reg"),
        ("network_weights = 'a.safetensors'", "weights"),
        ("base_weights = ['a.safetensors']", "weights"),
    ],
)
def test_a_path_without_its_channel(asked: Asked, line: str, channel: str) -> None:
    said = asked.wrong(line)
    assert "job.toml line 1: " in said
    assert f"channel {channel}" in said


def test_one_lora_that_no_option_names_is_gone_on_from(asked: Asked) -> None:
    file = save_lora(asked.channel("weights") / "a.safetensors")
    extras, merged, wrong = asked.find(RANK_4)
    assert wrong == ""
    assert merged.values["network_weights"] == "a.safetensors"
    assert [one.file for one in extras.weights["network_weights"]] == [file]


def test_several_loras_are_to_be_named(asked: Asked) -> None:
    for name in ("a", "b"):
        save_lora(asked.channel("weights") / f"{name}.safetensors")
    assert "there are 2 files (a.safetensors, b.safetensors)" in asked.wrong(RANK_4)
    extras, _, wrong = asked.find(RANK_4 + "base_weights = ['b.safetensors', 'a.safetensors']")
    assert wrong == ""
    assert [Path(str(one.file)).name for one in extras.weights["base_weights"]] == [
        "b.safetensors",
        "a.safetensors",
    ]
    assert "network_weights" not in extras.weights


def test_a_name_that_is_not_in_the_channel(asked: Asked) -> None:
    save_lora(asked.channel("weights") / "a.safetensors")
    said = asked.wrong(RANK_4 + "network_weights = '/home/me/b.safetensors'")
    assert "job.toml line 3: network_weights names '/home/me/b.safetensors'" in said
    assert "there: a.safetensors" in said


def test_multipliers_without_their_loras(asked: Asked) -> None:
    save_lora(asked.channel("weights") / "a.safetensors")
    said = asked.wrong("base_weights = ['a.safetensors']\nbase_weights_multiplier = [1.0, 0.5]")
    assert "job.toml line 2: base_weights_multiplier has 2 numbers" in said


@pytest.mark.parametrize("option", ["network_weights = 'a.safetensors'", "base_weights = ['a.safetensors']"])
def test_a_lora_of_another_kind(asked: Asked, option: str) -> None:
    save_lora(asked.channel("weights") / "a.safetensors", "sdxl")
    assert "it is a LoRA for sdxl, and the base model is sd15" in asked.wrong(RANK_4 + option)


def test_names_of_blocks_that_sd_scripts_would_leave_out(asked: Asked) -> None:
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q.alpha"
    save(asked.channel("weights") / "a.safetensors", {name: ()})
    assert "diffusers' names of blocks" in asked.wrong(RANK_4)


def test_a_file_that_is_no_lora(asked: Asked) -> None:
    save(asked.channel("weights") / "a.safetensors", VAE)
    assert "it is a VAE, and not an SD1.5 or SDXL LoRA" in asked.wrong(RANK_4)


def test_another_rank_or_alpha_is_told_with_the_value_to_write(asked: Asked) -> None:
    save_lora(asked.channel("weights") / "a.safetensors", rank=8, alpha=2)
    assert "it has rank 8, and network_dim is 4. Write network_dim = 8" in asked.wrong(RANK_4)
    said = asked.wrong("network_dim = 8\nnetwork_alpha = 8")
    assert "its alpha is 2, and network_alpha is 8" in said
    assert "Write network_alpha = 2" in said
    assert asked.wrong("network_dim = 8\nnetwork_alpha = 2") == ""
    # base_weights may have any, and so may a network whose modules network_args decide
    assert asked.wrong(RANK_4 + "base_weights = ['a.safetensors']") == ""
    assert asked.wrong(RANK_4 + "network_args = ['conv_dim=4']") == ""


def test_a_lora_without_alpha_has_none_to_disagree_with(asked: Asked) -> None:
    save_lora(asked.channel("weights") / "a.safetensors", alpha=None)
    assert asked.wrong("network_dim = 4\nnetwork_alpha = 1") == ""


def test_dim_from_weights_takes_rank_and_alpha_from_the_file(asked: Asked) -> None:
    save_lora(asked.channel("weights") / "a.safetensors", rank=8, alpha=2)
    _, merged, wrong = asked.find("dim_from_weights = true\nnetwork_dim = 4")
    assert wrong == ""
    assert (merged.values["network_dim"], merged.values["network_alpha"]) == (8, 2.0)
    assert "network_dim = 4 becomes 8: dim_from_weights" in " ".join(merged.notes)


def test_dim_from_weights_of_a_lora_that_lacks_a_part(asked: Asked) -> None:
    save_lora(asked.channel("weights") / "a.safetensors", unet_only=True)
    assert "it lacks 72 of 264 modules to train" in asked.wrong("dim_from_weights = true")
    assert asked.wrong("dim_from_weights = true\nnetwork_train_unet_only = true") == ""
    assert asked.wrong(RANK_4) == ""  # the text encoder begins anew


def test_modules_that_are_left_out_are_told(asked: Asked) -> None:
    save_lora(asked.channel("weights") / "a.safetensors")
    _, merged, wrong = asked.find(RANK_4 + "network_train_unet_only = true")
    assert wrong == ""
    assert "72 of its 264 modules are not trained, and left out, lora_te_" in merged.notes[-1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "# a comment\n\na cat --w 512 --n bad\n"),
        ("p.json", json.dumps([{"prompt": "a cat"}, "a dog"])),
        ("p.toml", "[prompt]\nwidth = 512\n[[prompt.subset]]\nprompt = 'a cat'\n"),
    ],
)
def test_sample_prompts(asked: Asked, name: str, text: str) -> None:
    (asked.channel("config") / name).write_text(text)
    extras, _, wrong = asked.find(f"sample_prompts = './{name}'\nsample_every_n_epochs = 1")
    assert (extras.prompts, wrong) == ((name, text), "")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"# nothing\n\n", "there is no prompt in it"),
        ("p.txt", b"caf\xe9", "Save it as UTF-8"),
        ("p.txt", b"a cat --cn pose.png", "ControlNet"),
        ("p.json", b"{}", "it holds no sample prompts"),
        ("p.json", b"[", "it holds no sample prompts"),
        ("p.toml", b"prompt = 'a cat'", "it holds no sample prompts"),
        ("p.yaml", b"a cat", "has none of the endings .txt"),
        ("other.txt", b"a cat", "in its folder there are other.txt"),
        ("p.toml", b"a = " + b"[" * 5000, "it holds no sample prompts"),
        ("p.toml", b"a." * 200_000 + b"b = 1", "it holds no sample prompts"),
        ("p.json", b"[" * 100_000, "it holds no sample prompts"),
        ("p.json", b"[1" + b"0" * 5000 + b"]", "it holds no sample prompts"),
        ("p.json", b"[1]", "expected a list of texts or objects"),
        ("p.json", b'[{"controlnet_image": "pose.png"}]', "ControlNet"),
    ],
)
def test_sample_prompts_that_would_fail_at_the_first_sample(
    asked: Asked, name: str, content: bytes, said: str
) -> None:
    (asked.channel("config") / name).write_bytes(content)
    named = "p.txt" if name == "other.txt" else name
    assert said in asked.wrong(f"sample_prompts = '{named}'\nsample_every_n_epochs = 1")


@pytest.mark.parametrize("path", ["/home/me/p.txt", "~/p.txt", "C:\\me\\p.txt", "../p.txt", "s3://b/p.txt"])
def test_a_path_on_another_machine_is_told_how_to_be_named(asked: Asked, path: str) -> None:
    asked.channel("config")
    said = asked.wrong(f"sample_prompts = '{path}'\nsample_at_first = true")
    assert 'Put it beside the configuration, and write sample_prompts = "p.txt"' in said


def test_prompts_and_when_to_draw_them_want_each_other(asked: Asked) -> None:
    (asked.channel("config") / "p.txt").write_text("a cat")
    _, merged, wrong = asked.find("sample_prompts = 'p.txt'")
    assert wrong == ""
    assert any("nothing says when to draw" in note for note in merged.notes)
    for line in ("sample_every_n_steps = 10", "sample_every_n_epochs = 1", "sample_at_first = true"):
        said = (
            f"job.toml line 1: {line.split()[0]} asks for pictures, and there are no sample_prompts to draw"
        )
        assert said in asked.wrong(line)
    assert asked.wrong("sample_every_n_steps = 0") == ""  # switched off (train_util.py:4462-4472)


def test_a_file_beside_a_configuration_that_is_not_there(asked: Asked) -> None:
    said = asked.wrong("sample_prompts = 'p.txt'\nsample_at_first = true")
    assert "sample_prompts names a file beside the configuration, and there is no channel config" in said
    assert 'write sample_prompts = "p.txt"; or type --config_uri=s3://BUCKET/config' in said


def test_a_vae_that_may_not_be_read(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(asked.channel("vae") / "v.safetensors", VAE)
    usual = Path.open

    def refused(self: Path, *mode: Any, **more: Any) -> Any:
        if self == file:
            raise PermissionError(13, "Permission denied")
        return usual(self, *mode, **more)

    monkeypatch.setattr(Path, "open", refused)
    said = f"channel vae: {file}: it cannot be read (Permission denied). Check its path and permissions."
    assert asked.wrong() == said


def test_a_masked_loss_wants_a_mask_in_a_subset(asked: Asked) -> None:
    described = asked.channel("config") / "data.toml"
    described.write_text(DATA)
    said = asked.wrong("dataset_config = 'data.toml'\nmasked_loss = true")
    assert "job.toml line 2: masked_loss needs alpha_mask, which no subset has. Set alpha_mask = true" in said
    described.write_text(DATA + "alpha_mask = true\n")
    assert asked.wrong("dataset_config = 'data.toml'\nmasked_loss = true") == ""


DATA = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'cat'\nnum_repeats = 3\n"
REG = "[[datasets.subsets]]\nimage_dir = 'cats'\nis_reg = true\nclass_tokens = 'cat'\n"


def test_a_dataset_config_and_the_reg_channel_want_each_other(asked: Asked) -> None:
    described = asked.channel("config") / "data.toml"
    described.write_text(DATA + REG)
    assert "a subset with is_reg wants a channel reg" in asked.wrong("dataset_config = 'data.toml'")
    asked.channel("reg")
    extras, merged, wrong = asked.find("dataset_config = 'data.toml'")
    assert wrong == ""
    assert extras.dataset_config is not None
    assert "reg_data_dir" not in merged.values
    described.write_text(DATA)
    assert "names no folder of channel reg" in asked.wrong("dataset_config = 'data.toml'")


def test_pictures_by_a_dataset_config(asked: Asked) -> None:
    (asked.channel("config") / "data.toml").write_text(DATA + REG)
    for folder in ("dataset/cat", "dataset/dog", "reg/cats"):
        asked.channel(folder)
        (asked.channel(folder) / "a.png").write_text("x")
        (asked.channel(folder) / "a.txt").write_text("x")
    (asked.channel("reg/cats") / "b.png").write_text("x")
    extras, merged, wrong = asked.find("dataset_config = 'data.toml'")
    assert wrong == ""
    request = asked.request()
    data_set, there, problems = pictures(request, request.dataset, merged, extras, Storage())
    assert (problems, sorted(there), data_set.repeated) == ([], ["cat/a.png", "cat/a.txt"], 3)
    assert request.reg is not None
    reg, there, problems = pictures(request, request.reg, merged, extras, Storage())
    assert (problems, len(there), reg.pictures, reg.repeated) == ([], 3, 2, 2)


def test_regularisation_pictures_need_no_captions_but_a_class_word(asked: Asked) -> None:
    (asked.channel("reg/1_cat") / "a.png").write_text("x")
    request = asked.request()
    assert request.reg is not None
    extras, merged, _ = asked.find()
    assert merged.settings["reg_data_dir"].where == "channel reg"
    reg, _, problems = pictures(request, request.reg, merged, extras, Storage())
    assert (problems, [subset.folder for subset in reg.subsets]) == ([], ["1_cat"])
    (asked.channel("reg/1_cat") / "a.png").unlink()
    (asked.channel("reg") / "a.png").write_text("x")
    _, _, problems = pictures(request, request.reg, merged, extras, Storage())
    assert "does not look beside the folders" in str(problems[0])


def test_what_is_fetched_and_what_is_copied_counts_for_the_disk(tmp_path: Path) -> None:
    model = ModelFile(RemoteObject(S3Uri("b", "m"), 1000, ""), 1000, None, streamed=False)
    (tmp_path / "v").write_bytes(b"x" * 10)
    remote, local = RemoteObject(S3Uri("b", "l"), 200, ""), tmp_path / "v"
    pictures: list[File] = [RemoteObject(S3Uri("b", "p"), 30, ""), local]
    weights = {"base_weights": (Single(remote, streamed=False), Single(local, streamed=False))}
    assert _to_fetch(model, pictures, Extras(weights, None, None), None) == 1230
    weights["vae"] = (Single(local, streamed=True),)
    assert _to_fetch(model, pictures, Extras(weights, None, None), None) == 1240


def test_fp16_keeps_sdxls_own_vae_in_fp32_and_not_one_that_is_given(tmp_path: Path) -> None:
    asked, _ = config.read("mixed_precision = 'fp16'\nno_half_vae = false", "job.toml")
    merged = config.merge("sdxl", [config.preset("sdxl"), asked])
    scripts = SdScripts(tmp_path, Path(sys.executable))
    assert _sd_scripts(scripts, "sdxl", merged, None)[0].values["no_half_vae"] is True
    with_vae = config.change(merged, {"vae": "v.safetensors"}, "channel vae")
    assert _sd_scripts(scripts, "sdxl", with_vae, None)[0].values["no_half_vae"] is False


@pytest.mark.parametrize("place", ["disk", "S3"])
def test_a_file_that_is_not_there_is_told_with_the_option_that_names_it(
    asked: Asked, bucket: S3Uri, place: str
) -> None:
    folder = asked.channel("config") if place == "disk" else bucket
    settings, _ = config.read("seed = 1\nsample_prompts = 'p.txt'\nsample_at_first = true", "job.toml")
    merged = config.merge("sd15", [config.preset("sd15"), settings])
    (problem,) = find(asked.request(), folder, "sd15", merged, Storage())[2]
    assert problem.where == f"job.toml line 2: {folder / 'p.txt'}"
