import json
from pathlib import Path
from typing import Any

import pytest

from entrypoint.contract import Tree
from entrypoint.failures import Problem, StorageError, Unfit
from entrypoint.request import JobRequest, resolve
from entrypoint.storage import S3Uri

PARAMETERS: dict[str, Any] = {
    "id": "1f2e",
    "training-type": "kohya",
    "s3-output-path": "s3://b/Stable-diffusion/checkpoint/custom/1f2e",
    "params": {
        "training_params": {
            "fm_type": "sd_xl",
            "s3_model_path": "s3://b/Stable-diffusion/checkpoint/base.safetensors",
            "s3_data_path": "s3://b/dataset/cat",
            "s3_toml_path": "s3://b/kohya/train/1f2e/input/kohya_config_cloud_xl.toml",
        },
        "config_params": {"output_name": "cat", "max_train_epochs": None},
    },
}


class Objects:
    """A bucket with small objects in it."""

    def __init__(self, **content: object) -> None:
        self.content = {f"s3://b/{name}.json": json.dumps(value) for name, value in content.items()}

    def read(self, uri: S3Uri, *, limit: int) -> bytes:
        try:
            return self.content[str(uri)].encode()
        except KeyError:
            raise StorageError(Problem(str(uri), "there is no such key", "Correct it")) from None


def ask(tree: Path, *flags: str, objects: Objects | None = None, **hyperparameters: str) -> JobRequest:
    folder = tree / "input" / "config"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hyperparameters.json").write_text(json.dumps(hyperparameters))
    return resolve(flags, Tree(tree), objects or Objects())


def wrong(tree: Path, *flags: str, objects: Objects | None = None, **hyperparameters: str) -> str:
    try:
        problems = ask(tree, *flags, objects=objects, **hyperparameters).problems
    except Unfit as error:
        problems = error.problems
    return " ".join(map(str, problems))


def changed(**params: object) -> dict[str, Any]:
    return {**PARAMETERS, "params": {**PARAMETERS["params"], **params}}


def test_channels(tmp_path: Path) -> None:
    for name in ("model", "dataset", "config"):
        (tmp_path / "input" / "data" / name).mkdir(parents=True)
    request = ask(tmp_path, trainer="builtin", kind="sdxl", seed="7")
    assert request.model.location == tmp_path / "input" / "data" / "model"
    assert request.config is not None
    assert (request.model.where, request.kind, request.trainer) == ("channel model", "sdxl", "builtin")
    assert (request.output, request.logs, request.flat, request.problems) == (None, None, False, ())
    assert [(one.name, one.value, one.where) for one in request.layers[0]] == [
        ("seed", "7", "hyperparameter seed")
    ]


def test_uris_from_hyperparameters_and_flags_and_flags_win(tmp_path: Path) -> None:
    request = ask(
        tmp_path,
        "--dataset_uri=s3://b/other",
        "--output-uri",
        "out",
        "--optimizer_args",
        "weight_decay=0.1",
        "eps=1e-8",
        "--xformers",
        model_uri="s3://b/m.safetensors",
        dataset_uri="s3://b/data",
    )
    assert request.model.location == S3Uri("b", "m.safetensors")
    assert str(request.dataset.location) == "s3://b/other"
    assert request.dataset.where == "flag --dataset_uri"
    assert request.output == Path.cwd() / "out"
    assert request.trainer == "sd-scripts"
    assert {one.name: one.value for one in request.layers[1]} == {
        "optimizer_args": '["weight_decay=0.1", "eps=1e-8"]',
        "xformers": "true",
    }


def test_optional_inputs_have_a_channel_or_a_uri_each(tmp_path: Path) -> None:
    (tmp_path / "input" / "data" / "reg").mkdir(parents=True)
    uris = {f"{name}_uri": f"s3://b/{name}" for name in ("model", "dataset", "vae", "weights")}
    request = ask(tmp_path, **uris)
    assert request.problems == ()
    assert request.reg is not None
    assert (request.reg.location, request.reg.where) == (tmp_path / "input/data/reg", "channel reg")
    for name, source in (("vae", request.vae), ("weights", request.weights)):
        assert source is not None
        assert (str(source.location), source.where) == (f"s3://b/{name}", f"hyperparameter {name}_uri")


def test_the_request_is_frozen(tmp_path: Path) -> None:
    request = ask(tmp_path, model_uri="s3://b/m", dataset_uri="s3://b/d")
    with pytest.raises(AttributeError):
        request.trainer = "builtin"  # type: ignore[misc]


def test_esd_parameter_json(tmp_path: Path) -> None:
    request = ask(tmp_path, s3_location="s3://b/param.json", objects=Objects(param=PARAMETERS))
    assert request.kind == "sdxl"
    assert str(request.model.location) == "s3://b/Stable-diffusion/checkpoint/base.safetensors"
    assert str(request.dataset.location) == "s3://b/dataset/cat"
    assert request.config is not None
    assert str(request.config.location).endswith("kohya_config_cloud_xl.toml")
    assert str(request.output) == "s3://b/Stable-diffusion/checkpoint/custom/1f2e"
    assert str(request.logs) == "s3://b/kohya/train/1f2e/logs"
    assert request.flat
    assert "s3_data_path" in request.dataset.where


def test_esd_value_may_be_quoted(tmp_path: Path) -> None:
    objects = Objects(param=PARAMETERS)
    assert ask(tmp_path, s3_location='"s3://b/param.json"', objects=objects).kind == "sdxl"


@pytest.mark.parametrize("place", ["params", "config_params"])
@pytest.mark.parametrize("value", [True, "true"])
def test_esd_captioning_flag_is_understood_in_either_place(tmp_path: Path, place: str, value: object) -> None:
    flag = {"enable_wd14_tagger": value}
    asked = changed(**flag) if place == "params" else changed(config_params=flag)
    said = wrong(tmp_path, s3_location="s3://b/param.json", objects=Objects(param=asked))
    assert "enable_wd14_tagger asks for captions" in said


def test_esd_faults_are_told_together_with_their_keys(tmp_path: Path) -> None:
    broken = changed(
        training_params={"fm_type": "sd_3", "s3_model_path": "s3://b/m", "s3_data_path": "s3://b/d"}
    )
    said = wrong(tmp_path, s3_location="s3://b/param.json", objects=Objects(param=broken))
    assert "params.training_params.fm_type: " in said
    assert "params.training_params.s3_toml_path: field required" in said


def test_esd_of_another_type_is_refused(tmp_path: Path) -> None:
    other = {**PARAMETERS, "training-type": "dreambooth"}
    said = wrong(tmp_path, s3_location="s3://b/param.json", objects=Objects(param=other))
    assert "training-type is 'dreambooth'" in said


def test_esd_id_cannot_lead_the_logs_elsewhere(tmp_path: Path) -> None:
    other = {**PARAMETERS, "id": "../../x"}
    assert "id: " in wrong(tmp_path, s3_location="s3://b/param.json", objects=Objects(param=other))


def test_esd_json_missing_or_damaged(tmp_path: Path) -> None:
    assert "s3://b/param.json: there is no such key" in wrong(tmp_path, s3_location="s3://b/param.json")
    (tmp_path / "p.json").write_text("{")
    assert "it is not JSON" in wrong(tmp_path, s3_location=str(tmp_path / "p.json"))


def test_esd_excludes_uris_and_channels(tmp_path: Path) -> None:
    (tmp_path / "input" / "data" / "model").mkdir(parents=True)
    said = wrong(tmp_path, s3_location="s3://b/p.json", output_uri="s3://b/o", objects=Objects(p=PARAMETERS))
    assert "hyperparameter output_uri: s3_location says where everything is" in said
    assert "channel model: s3_location says where everything is" in said


def test_a_channel_and_a_uri_for_one_thing(tmp_path: Path) -> None:
    (tmp_path / "input" / "data" / "model").mkdir(parents=True)
    said = wrong(tmp_path, model_uri="s3://b/m", dataset_uri="s3://b/d")
    assert "hyperparameter model_uri: there is also a channel model" in said


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("model_uri", "https://example.com/m?X-Amz-Signature=beef", "no S3 URI"),
        ("model_uri", "s3://", "no S3 URI"),
        ("trainer", "kohya", "'kohya' is not one of sd-scripts, builtin"),
        ("kind", "sd21", "'sd21' is not one of sd15, sdxl"),
        ("allow_missing_captions", "maybe", "'maybe' is not one of true, false"),
        ("netwrok_dim", "4", "Did you mean network_dim"),
        ("checkpoint_url", "s3://b/c", "there is no such hyperparameter"),
    ],
)
def test_what_cannot_be_understood_is_refused(tmp_path: Path, name: str, value: str, said: str) -> None:
    told = wrong(tmp_path, **{"model_uri": "s3://b/m", "dataset_uri": "s3://b/d", name: value})
    assert f"hyperparameter {name}: " in told
    assert said in told
    assert "beef" not in told


def test_a_word_that_follows_no_flag(tmp_path: Path) -> None:
    assert "argument seed=1: it follows no flag" in wrong(
        tmp_path, "seed=1", model_uri="s3://b/m", dataset_uri="s3://b/d"
    )


def test_a_word_too_many_after_a_flag(tmp_path: Path) -> None:
    said = wrong(tmp_path, "--seed=3", "stray", model_uri="s3://b/m", dataset_uri="s3://b/d")
    assert "argument stray: it follows no flag" in said


def test_kind_against_fm_type(tmp_path: Path) -> None:
    said = wrong(tmp_path, s3_location="s3://b/p.json", kind="sd15", objects=Objects(p=PARAMETERS))
    assert "fm_type is sd_xl, and kind is sd15" in said
