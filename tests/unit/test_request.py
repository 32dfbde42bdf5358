import json
from pathlib import Path
from typing import Any

import pytest

from entrypoint import console
from entrypoint.contract import Tree
from entrypoint.failures import Problem, StorageError, Unfit
from entrypoint.hyperparameters import HYPERPARAMETERS
from entrypoint.request import Captioning, JobRequest, resolve
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


def test_the_defaults_are_those_that_the_table_tells(tmp_path: Path) -> None:
    asked = ask(tmp_path, "--model_uri=m", "--dataset_uri=d", "--caption=wd14")
    told = {name: one.default for name, one in HYPERPARAMETERS.items() if one.default is not None}
    assert asked.caption is not None
    assert told == {
        "trainer": asked.trainer,
        "allow_missing_captions": str(asked.allow_missing_captions).lower(),
        "caption_general_threshold": asked.caption.general,
        "caption_character_threshold": asked.caption.character,
        "resize_crop": str(asked.resize_crop).lower(),
        "state_every_minutes": asked.state_every_minutes,
        "stall_minutes": asked.stall_minutes,
    }


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
@pytest.mark.parametrize(
    ("general", "character", "read"),
    [
        ("0", "0", (0.35, 0.85)),  # ESD's default
        ("0.4", "0.9", (0.4, 0.9)),
        (0.5, "", (0.5, 0.85)),
        (None, 0, (0.35, 0.85)),
    ],
)
def test_esd_captioning_flag_is_understood_in_either_place(
    tmp_path: Path, place: str, value: object, general: object, character: object, read: tuple[float, float]
) -> None:
    told = {"general_threshold": general, "character_threshold": character}
    flag = {"enable_wd14_tagger": value, "wd14_tagger_params": told}
    asked = changed(**flag) if place == "params" else changed(config_params=flag)
    request = ask(tmp_path, s3_location="s3://b/param.json", objects=Objects(param=asked))
    path = "params" if place == "params" else "params.config_params"
    where = f"hyperparameter s3_location → s3://b/param.json: {path}.enable_wd14_tagger"
    note = "ESD's threshold 0 stands for the default" if read[1] == 0.85 else ""
    assert request.caption == Captioning(where, *read, note)
    assert request.problems == ()
    assert request.may_lack_captions


def test_esd_captioning_flag_off_or_without_thresholds(tmp_path: Path) -> None:
    for flag, asked in ((False, False), (None, False), (True, True)):
        objects = Objects(param=changed(enable_wd14_tagger=flag))
        request = ask(tmp_path, s3_location="s3://b/param.json", objects=objects)
        assert (request.caption is not None) == asked


def test_esd_threshold_that_is_none(tmp_path: Path) -> None:
    told = {"general_threshold": "2", "character_threshold": "high"}
    objects = Objects(param=changed(enable_wd14_tagger=True, wd14_tagger_params=told))
    said = wrong(tmp_path, s3_location="s3://b/param.json", objects=objects)
    assert "params.wd14_tagger_params.general_threshold: '2' is no confidence" in said
    assert "params.wd14_tagger_params.character_threshold: 'high' is no confidence" in said


def test_a_tagger_may_come_beside_s3_location(tmp_path: Path) -> None:
    objects = Objects(param=changed(enable_wd14_tagger=True))
    asked = {"s3_location": "s3://b/param.json", "caption_general_threshold": "0.5"}
    request = ask(tmp_path, objects=objects, tagger_uri="s3://b/tagger", **asked)
    assert request.problems == ()
    assert request.tagger is not None
    assert str(request.tagger.location) == "s3://b/tagger"
    assert request.caption is not None
    assert request.caption.general == 0.5
    (tmp_path / "input" / "data" / "tagger").mkdir(parents=True)
    request = ask(tmp_path, objects=objects, **asked)
    assert request.problems == ()
    assert request.tagger is not None
    assert request.tagger.where == "channel tagger"
    assert "there is also a channel tagger" in wrong(
        tmp_path, tagger_uri="s3://b/t", objects=objects, **asked
    )


def test_captions_and_resizing(tmp_path: Path) -> None:
    uris = {"model_uri": "s3://b/m", "dataset_uri": "s3://b/d"}
    request = ask(tmp_path, **uris)
    assert (request.caption, request.resize, request.resize_crop) == (None, None, False)
    assert not request.may_lack_captions
    request = ask(
        tmp_path,
        caption="wd14",
        caption_general_threshold="0.5",
        caption_character_threshold="1",
        resize="768",
        resize_crop="true",
        **uris,
    )
    assert request.problems == ()
    assert request.caption == Captioning("hyperparameter caption", 0.5, 1)
    assert (request.resize, request.resize_crop) == (768, True)
    assert ask(tmp_path, resize="64", **uris).resize == 64
    assert ask(tmp_path, resize="4096", **uris).resize == 4096


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
    (tmp_path / "p.json").write_text("[" * 100_000)
    assert "it is not JSON" in wrong(tmp_path, s3_location=str(tmp_path / "p.json"))
    said = wrong(tmp_path, s3_location=str(tmp_path / "nowhere.json"))
    assert f"{tmp_path}/nowhere.json: it cannot be read (No such file or directory). Correct the path" in said


def test_esd_excludes_uris_and_channels(tmp_path: Path) -> None:
    (tmp_path / "input" / "data" / "model").mkdir(parents=True)
    said = wrong(tmp_path, s3_location="s3://b/p.json", output_uri="s3://b/o", objects=Objects(p=PARAMETERS))
    assert "hyperparameter output_uri: s3_location says where everything is" in said
    assert "channel model: s3_location says where everything is" in said


@pytest.mark.parametrize("name", ["config", "dataset", "logs", "model", "output", "reg", "vae", "weights"])
def test_each_uri_is_known_and_none_goes_with_s3_location(tmp_path: Path, name: str) -> None:
    asked = {"model_uri": "s3://b/m", "dataset_uri": "s3://b/d", f"{name}_uri": "s3://b/x"}
    assert ask(tmp_path, **asked).problems == ()
    said = wrong(tmp_path, s3_location="s3://b/p.json", objects=Objects(p=PARAMETERS), **{f"{name}_uri": "x"})
    assert f"hyperparameter {name}_uri: s3_location says where everything is. Remove one of the two." in said


def test_event_logs_have_a_place_of_their_own(tmp_path: Path) -> None:
    request = ask(tmp_path, "--logs_uri=s3://b/logs", model_uri="s3://b/m", dataset_uri="s3://b/d")
    assert (str(request.logs), request.output) == ("s3://b/logs", None)


def test_inputs_that_no_job_goes_without(tmp_path: Path) -> None:
    said = wrong(tmp_path)
    assert "model: there is neither a channel model nor a hyperparameter model_uri. Add a channel" in said
    assert "dataset: there is neither a channel dataset nor a hyperparameter dataset_uri" in said


def test_what_sagemakers_own_files_have_wrong_is_told_as_well(tmp_path: Path) -> None:
    folder = tmp_path / "input" / "config"
    (tmp_path / "input" / "data" / "extra").mkdir(parents=True)
    folder.mkdir()
    (folder / "resourceconfig.json").write_text('{"hosts": ["algo-1", "algo-2"]}')
    (folder / "hyperparameters.json").write_text("[]")
    with pytest.raises(Unfit) as raised:
        resolve([], Tree(tmp_path), Objects())
    said = str(raised.value)
    assert "hyperparameters.json: it is not a JSON object" in said
    assert "channel extra: there is no such channel" in said
    assert "resourceconfig.json: hosts: the job has 2 hosts" in said


def test_old_names_of_options_are_known(tmp_path: Path) -> None:
    uris = {"model_uri": "s3://b/m", "dataset_uri": "s3://b/d"}
    request = ask(tmp_path, lr_restart_cycles="2", caption_extention=".cap", **uris)
    assert request.problems == ()
    assert [one.name for one in request.layers[0]] == ["lr_restart_cycles", "caption_extention"]


def test_a_state_is_saved_every_so_many_minutes(tmp_path: Path) -> None:
    uris = {"model_uri": "s3://b/m", "dataset_uri": "s3://b/d"}
    assert ask(tmp_path, **uris).state_every_minutes == 5
    assert ask(tmp_path, state_every_minutes="0.5", **uris).state_every_minutes == 0.5
    assert ask(tmp_path, state_every_minutes="0", **uris).problems == ()


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
        ("caption", "blip", "'blip' is not one of wd14"),
        ("caption_general_threshold", "0.5", "nothing asks for captions to be written. Add caption=wd14"),
        ("caption_character_threshold", "0.5", "nothing asks for captions to be written. Add caption=wd14"),
        ("resize", "63", "'63' is no whole number of pixels from 64 to 4096"),
        ("resize", "4097", "'4097' is no whole number of pixels from 64 to 4096"),
        ("resize", "512.5", "'512.5' is no whole number of pixels"),
        ("resize", "9" * 5000, "is no whole number of pixels"),
        ("resize_crop", "true", "it crops what is resized, and resize is not set. Add resize=512"),
        ("resize_crop", "square", "'square' is not one of true, false"),
        ("netwrok_dim", "4", "Did you mean network_dim"),
        ("checkpoint_url", "s3://b/c", "there is no such hyperparameter"),
        ("state_every_minutes", "soon", "'soon' is no number of minutes. Write state_every_minutes=5"),
        ("state_every_minutes", "-1", "'-1' is no number of minutes"),
        ("state_every_minutes", "inf", "'inf' is no number of minutes"),
        ("state_every_minutes", "nan", "'nan' is no number of minutes"),
        ("vae_uri", "ftp://b/vae", "'ftp://b/vae' is no S3 URI"),
        ("tagger_uri", "s3://b/a\nb", "holds characters that no path has. Write tagger_uri=s3://BUCKET/KEY"),
        ("dataset_uri", "~nobody-of-that-name/x", "Write dataset_uri=s3://BUCKET/KEY"),
    ],
)
def test_what_cannot_be_understood_is_refused(tmp_path: Path, name: str, value: str, said: str) -> None:
    told = wrong(tmp_path, **{"model_uri": "s3://b/m", "dataset_uri": "s3://b/d", name: value})
    assert f"hyperparameter {name}: " in told
    assert said in told
    assert "beef" not in told


@pytest.mark.parametrize("value", ["0", "1.01", "-1", "nan", "much"])
@pytest.mark.parametrize("name", ["caption_general_threshold", "caption_character_threshold"])
def test_a_threshold_is_a_confidence(tmp_path: Path, name: str, value: str) -> None:
    uris = {"model_uri": "s3://b/m", "dataset_uri": "s3://b/d"}
    said = wrong(tmp_path, caption="wd14", **uris, **{name: value})
    assert f"hyperparameter {name}: '{value}' is no confidence above 0 and up to 1" in said


@pytest.mark.parametrize("name", ["huggingface_token", "wandb_api_key"])
def test_an_option_that_holds_a_secret_is_never_told(tmp_path: Path, name: str) -> None:
    uris = {"model_uri": "s3://b/m", "dataset_uri": "s3://b/d"}
    ask(tmp_path, **uris, **{name: f"secret-of-{name}"})
    assert console.redact(f"it is secret-of-{name}") == "it is ***"


def test_a_word_that_follows_no_flag(tmp_path: Path) -> None:
    assert "argument seed=1: it follows no flag" in wrong(
        tmp_path, "seed=1", model_uri="s3://b/m", dataset_uri="s3://b/d"
    )


def test_a_word_too_many_after_a_flag(tmp_path: Path) -> None:
    said = wrong(tmp_path, "--seed=3", "stray", model_uri="s3://b/m", dataset_uri="s3://b/d")
    assert "argument stray: it follows no flag" in said


def test_each_kind_can_be_asked_for(tmp_path: Path) -> None:
    for kind in ("sd15", "sdxl"):
        request = ask(tmp_path, kind=kind, model_uri="s3://b/m", dataset_uri="s3://b/d")
        assert (request.kind, request.problems) == (kind, ())


def test_kind_against_fm_type(tmp_path: Path) -> None:
    said = wrong(tmp_path, s3_location="s3://b/p.json", kind="sd15", objects=Objects(p=PARAMETERS))
    assert "fm_type is sd_xl, and kind is sd15" in said


def test_three_mistakes_are_told_although_there_is_no_base_model(tmp_path: Path) -> None:
    given = {"network_dim": "many", "resize": "7", "output_uri": "gs://b/out"}
    said = wrong(tmp_path, "--state_every_minutes=often", dataset_uri="s3://b/data", **given)
    for told in (
        "model: there is neither a channel model",
        'hyperparameter network_dim: network_dim = "many" is not a whole number',
        "hyperparameter resize: '7' is no whole number of pixels",
        "hyperparameter output_uri: 'gs://b/out' is no S3 URI",
        "flag --state_every_minutes: 'often' is no number of minutes",
    ):
        assert said.count(told) == 1
    both = {"model_uri": "s3://b/model", "dataset_uri": "s3://b/data"}
    assert [one.where for one in ask(tmp_path, "--output_uri=s3:/b/out", **both).problems] == [
        "flag --output_uri"
    ]
