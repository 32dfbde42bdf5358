import json
import time
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kohya import config, rules
from kohya.config import Setting

CONFIGS = Path(config.__file__).parents[1] / "configs"
GPUS = sorted(path.stem for path in (CONFIGS / "gpu").glob("*.toml"))


def merged(text: str, kind: config.Kind = "sd15", **hyperparameters: str) -> config.Merged:
    settings, problems = config.read(text, "job.toml")
    assert problems == []
    layer = [
        Setting(name, value, f"hyperparameter {name}", as_text=True)
        for name, value in hyperparameters.items()
    ]
    return config.merge(kind, [settings, layer])


def problem(text: str, kind: config.Kind = "sd15") -> str:
    (found,) = merged(text, kind).problems
    return str(found)


def test_options_are_those_of_the_pinned_parsers() -> None:
    known = config.options()
    assert len(known) == 196
    assert sum("sd15" in option.kinds for option in known.values()) == 193
    assert known["caption_extension"].default == ".caption"


@pytest.mark.parametrize("kind", config.KINDS)
@pytest.mark.parametrize("gpu", [None, *GPUS])
def test_every_preset_passes_the_pinned_parsers(kind: config.Kind, gpu: str | None) -> None:
    """Name, type, choices and kind of every value, as they stand in the file: nothing has to be mended."""
    presets = [config.preset(kind), config.preset(f"gpu/{gpu}") if gpu else ()]
    result = config.merge(kind, presets)
    assert result.problems == ()
    assert result.notes == ()
    for setting in (*presets[0], *presets[1]):
        read = config.merge(kind, [[setting]]).values[setting.name]
        assert read == setting.value
        assert isinstance(read, str) == isinstance(setting.value, str), setting


@pytest.mark.parametrize("kind", config.KINDS)
def test_every_preset_opens_with_its_purpose_and_its_command(kind: config.Kind) -> None:
    lines = (CONFIGS / f"{kind}.toml").read_text().splitlines()
    assert lines[0].startswith("# A LoRA for Stable Diffusion")
    assert "python -m entrypoint train" in lines[2]


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_preset_opens_with_its_gpu_and_its_instances(gpu: str) -> None:
    opening = (CONFIGS / "gpu" / f"{gpu}.toml").read_text().split("\n\n")[0]
    assert opening.startswith(f"# NVIDIA {gpu.upper()}, ")
    assert ": ml." in opening
    assert "python -m entrypoint train" in opening


@pytest.mark.parametrize("gpu", GPUS)
def test_a_gpu_preset_changes_speed_and_memory_and_never_what_is_learned(gpu: str) -> None:
    names = {setting.name for setting in config.preset(f"gpu/{gpu}")}
    assert names <= {"mixed_precision", "sdpa", "gradient_checkpointing"}
    assert "mixed_precision" in names


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("Tesla T4", "t4"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A10", None),
        ("NVIDIA L40", None),
        ("NVIDIA T4G", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("../../sd15", None),
        ("", None),
    ],
)
def test_a_gpu_preset_is_found_by_the_name_that_nvidia_smi_prints(name: str, gpu: str | None) -> None:
    found = config.gpu_preset(name)
    assert found == (config.preset(f"gpu/{gpu}") if gpu else ())
    assert all(setting.where.startswith(f"configs/gpu/{gpu}.toml line ") for setting in found)


def test_a_users_learning_rate_counts_over_the_presets() -> None:
    for kind in config.KINDS:
        merged = config.merge(kind, [config.preset(kind), [Setting("learning_rate", 3e-5, "flag")]])
        assert merged.values["learning_rate"] == 3e-5
        assert "unet_lr" not in merged.values  # which would count instead


def test_a_text_encoders_rate_without_effect_is_told() -> None:
    rate = [Setting("text_encoder_lr", 1e-5, "job.toml line 3")]
    (note,) = config.merge("sdxl", [config.preset("sdxl"), rate]).notes
    assert note.startswith(
        "job.toml line 3: text_encoder_lr has no effect: network_train_unet_only (configs/"
    )
    trained = [*rate, Setting("network_train_unet_only", False, "job.toml line 4")]
    assert config.merge("sdxl", [config.preset("sdxl"), trained]).notes == ()


def test_higher_layers_win_and_say_where_they_come_from() -> None:
    result = merged("seed = 1\nnetwork_dim = 8", seed="2")
    assert result.values == {"seed": 2, "network_dim": 8}
    assert result.settings["seed"].where == "hyperparameter seed"
    assert result.settings["network_dim"].where == "job.toml line 2"


def test_sections_mean_nothing() -> None:
    assert merged("seed = 1\n[any]\nnetwork_dim = 8").values == {"seed": 1, "network_dim": 8}


def test_deeper_sections_are_refused_but_read_for_esd() -> None:
    text = "[training]\nseed = 1\n[training.additional_network]\nnetwork_dim = 8"
    assert "additional_network stands inside another" in str(config.read(text, "job.toml")[1][0])
    settings, problems = config.read(text, "job.toml", any_depth=True)
    assert [setting.name for setting in settings] == ["seed", "network_dim"]
    assert problems == []


def test_a_key_in_two_sections_is_named_with_both_lines() -> None:
    _, problems = config.read("[a]\nseed = 1\n[b]\nseed = 2", "job.toml")
    assert "job.toml line 2 and 4: seed is set twice" in str(problems[0])


def test_broken_toml_names_the_line() -> None:
    _, problems = config.read("seed = 1\nfoo = [1,\n", "job.toml")
    assert "job.toml: it is not TOML" in str(problems[0])
    assert "line" in str(problems[0])


@pytest.mark.parametrize(
    ("name", "sent", "read"),
    [
        ("xformers", "false", False),
        ("xformers", "True", True),
        ("network_dim", "16", 16),
        ("unet_lr", "1e-4", 1e-4),
        ("lr_warmup_steps", "0.1", 0.1),
        ("lr_warmup_steps", "100", 100),
        ("lr_warmup_steps", "5%", 0.05),
        ("text_encoder_lr", "5e-5", [5e-5]),
        ("text_encoder_lr", "[1e-5, 2e-5]", [1e-5, 2e-5]),
        ("optimizer_args", "weight_decay=0.1 betas=0.9,0.99", ["weight_decay=0.1", "betas=0.9,0.99"]),
        ("optimizer_args", '["weight_decay=0.1"]', ["weight_decay=0.1"]),
        ("resolution", "512", "512"),
        ("training_comment", "it's; $(rm -rf /)\nfine", "it's; $(rm -rf /)\nfine"),
    ],
)
def test_a_hyperparameter_is_read_as_its_options_type(name: str, sent: str, read: object) -> None:
    result = merged("", **{name: sent})
    assert (result.problems, result.notes) == ((), ())
    assert result.values == {name: read}
    assert type(result.values[name]) is type(read)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "networkdim = 4",
            "networkdim is no option of sd-scripts, which would ignore it. Did you mean network_dim",
        ),
        ("network_dim = 'four'", 'network_dim = "four" is not a whole number'),
        ("network_dim = 4.5", "network_dim = 4.5 is not a whole number"),
        ("network_dim = true", "network_dim = true is not a whole number"),
        ("unet_lr = 'fast'", "is not a number"),
        ("unet_lr = nan", "is not a number"),
        ("xformers = 'perhaps'", "is neither true nor false"),
        ("mixed_precision = 'bfloat16'", "is not one of no, fp16, bf16. Write bf16."),
        ("save_precision = 'bfloat16'", "is not one of float, fp16, bf16"),
        ("max_token_length = 100", "is not one of 150, 225"),
        ("train_batch_size = 0", "is too small. Write 1 or more"),
        ("max_train_steps = 0", "is too small"),
        ("clip_skip = 99", "clip_skip = 99 is too large. Write 12 or less"),
        ("learning_rate = -1", "is too small. Write 0 or more"),
        ("text_encoder_lr = [1e-5, -1]", "is too small"),
        ("seed = 99999999999999999999999", "is too large"),
        ("caption_dropout_rate = 1.5", "is too large"),
        ("output_name = '" + "猫" * 100 + "'", "cannot be part of a file name"),
        ("resolution = 'big'", 'Write resolution = "512,512"'),
        ("save_model_as = 'ckpt'", "makes a pickle"),
        ("output_name = '../x'", "cannot be part of a file name"),
        ("in_json = '/tmp/meta.json'", "there is no channel for it"),
        ("cache_text_encoder_outputs = true", "is an option of sdxl only, and this job is sd15"),
        ("output_name = true", "is not text"),
    ],
)
def test_what_sd_scripts_would_swallow_is_a_problem(line: str, said: str) -> None:
    told = problem(line)
    assert told.startswith("job.toml line 1: ")
    assert said in told


def test_the_other_kinds_option_is_fine_for_its_own_kind() -> None:
    assert merged("cache_text_encoder_outputs = true", "sdxl").problems == ()


def test_all_problems_are_told_at_once() -> None:
    assert len(merged("a = 1\nb = 2\nseed = 'x'").problems) == 3


def test_what_can_be_mended_is_mended_and_said() -> None:
    result = merged('lr_restart_cycles = 2\nnetwork_dim = "8"')
    assert result.values == {"lr_scheduler_num_cycles": 2, "network_dim": 8}
    assert result.notes == (
        "job.toml line 1: lr_restart_cycles is read as lr_scheduler_num_cycles",
        'job.toml line 2: network_dim = "8" is read as 8',
    )


def test_empty_values_are_not_set_and_unset_a_lower_layer() -> None:
    assert merged('reg_data_dir = ""\nnetwork_args = []\nseed = 1', seed="").values == {}
    assert merged("text_encoder_lr = 1e-4", text_encoder_lr="[]").values == {}


def test_an_empty_length_drops_no_other() -> None:
    assert merged("max_train_epochs = 1", max_train_steps="").values == {"max_train_epochs": 1}


def test_esds_tables_lie_over_its_template() -> None:
    text = "[training]\nnetwork_dim = 32\n[training.additional_network]\nnetwork_dim = 8"
    settings, problems = config.read(text, "job.toml", any_depth=True)
    assert problems == []
    assert config.merge("sd15", [settings]).values == {"network_dim": 8}


def test_the_later_wish_for_the_length_counts() -> None:
    low = (Setting("max_train_epochs", 10, "preset"),)
    high = (Setting("max_train_steps", 50, "flag"),)
    assert config.merge("sd15", [low, high]).values == {"max_train_steps": 50}
    assert config.merge("sd15", [high, low]).values == {"max_train_epochs": 10}
    both = config.merge("sd15", [low + high])
    assert "max_train_epochs is set too, and counts" in both.notes[0]


def test_the_job_replaces_its_own_paths_and_says_so() -> None:
    result = config.own(merged('output_dir = "./out"\nseed = 1'), {"output_dir": "/scratch"})
    assert result.values == {"output_dir": "/scratch", "seed": 1}
    assert result.notes == ("job.toml line 1: output_dir is the job's to choose, and was replaced",)


def test_what_is_dumped_reads_back() -> None:
    values = {
        "seed": 1,
        "output_name": 'a "b" \\ 絵',
        "text_encoder_lr": [1e-5],
        "xformers": False,
        "unet_lr": 1e-4,
    }
    assert tomllib.loads(config.dump(values)) == values
    assert list(tomllib.loads(config.dump(values))) == sorted(values)


def test_options_file_holds_facts_only() -> None:
    facts = json.loads(Path(config.__file__).with_name("options.json").read_text())
    assert {key for fact in facts.values() for key in fact} == {
        "type",
        "nargs",
        "default",
        "choices",
        "kinds",
    }


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("max_token_length = 75", "max_token_length"),
        ("save_every_n_epochs = 0", "save_every_n_epochs"),
        ("vae_batch_size = 0", "vae_batch_size"),
        ("dynamo_backend = 'no'", "dynamo_backend"),
    ],
)
def test_a_value_that_means_off_unsets_the_presets(line: str, name: str) -> None:
    settings, _ = config.read(line, "job.toml")
    merged = config.merge("sd15", [config.preset("sd15"), settings])
    assert merged.problems == ()
    assert name not in merged.values
    assert any(f"{name} = " in note and "is read as unset" in note for note in merged.notes)


def test_a_user_interfaces_own_keys_are_left_out() -> None:
    settings, _ = config.read("epoch = 10\nnoise_offset_type = 'Original'", "job.toml")
    merged = config.merge("sd15", [settings])
    assert (merged.problems, len(merged.notes)) == ((), 2)


@pytest.mark.parametrize("value", ["'512, 768'", "[512, 768]", "'512,768'"])
def test_a_resolution_may_be_a_list_or_have_spaces(value: str) -> None:
    settings, _ = config.read(f"resolution = {value}", "job.toml")
    assert config.merge("sd15", [settings]).values["resolution"] == "512,768"


def test_keys_that_are_set_twice_in_one_table_are_all_named_with_both_lines() -> None:
    """TOML forbids it, and its reader stops at the first."""
    text = "seed = 1\n[a]\n'unet_lr' = 1\nseed = 2\nunet_lr = 2\nseed = 3\n[ a ] # again\nnope = 1"
    settings, problems = config.read(text, "job.toml")
    assert [str(problem).partition(",")[0] for problem in problems] == [
        "job.toml line 2 and 7: [a] opens twice",
        "job.toml line 3 and 5: unet_lr is set twice",
        "job.toml line 4 and 6: seed is set twice",
        "job.toml line 1 and 4 and 6: seed is set twice",
    ]
    assert "nope" in [setting.name for setting in settings]  # and so all else is told as well


def test_a_mistake_beside_a_key_that_is_set_twice_is_told_too() -> None:
    _, problems = config.read("seed = 1\nseed = 2\nfoo = [1,", "job.toml")
    assert "line 1 and 2: seed is set twice" in str(problems[0])
    assert "it is not TOML" in str(problems[1])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = " + "[" * 5000, "it is not TOML"),
        ("seed = 1" + "0" * 5000, "it is not TOML"),
        ("a." * 200_000 + "b = 1", "a key with 100 parts"),
        ('"\\"".' * 200_000 + "b = 1", "a key with 100 parts"),
        ("k" * 60_000, "it is not TOML"),
        ("[" + " " * 60_000, "it is not TOML"),
        ("nope = '" + "k" * 60_000 + "'", "nope is no option"),
        ("x = {" + "'a' . " * 100 + "b = 1}", "a key with 100 parts"),
        ("".join(f"key{number} = 1\n" for number in range(60_000)), "it sets 60000 keys"),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '.'\n",
            "datasets belongs to a dataset_config",
        ),
        ("[general]\nshuffle_caption = true\ngeneral = 1", "general belongs to a dataset_config"),
        ("seed = 0x" + "f" * 5000, "seed is too large"),
        ("optimizer_args = [[0x" + "f" * 5000 + "]]", "optimizer_args is too large"),
        ("text_encoder_lr = [2020-01-01]", "text_encoder_lr = 2020-01-01 is not a number"),
        ("text_encoder_lr = [[1]]", "is not a number"),
        ("text_encoder_lr = '" + "[" * 5000 + "'", "is not a number"),
        ("k" * 5000 + " = 1", "k is no option of sd-scripts"),
    ],
)
def test_a_hostile_toml_is_a_problem_at_once(text: str, said: str) -> None:
    begun = time.process_time()  # whatever else the machine does
    settings, problems = config.read(text, "job.toml")
    told = [str(problem) for problem in (*problems, *config.merge("sd15", [settings]).problems)]
    assert any(said in one for one in told), [one[:300] for one in told]
    assert max(map(len, told)) < 1000
    assert time.process_time() - begun < 15


@settings(deadline=None)
@given(st.text(), st.booleans())
def test_no_text_brings_the_reader_down(text: str, any_depth: bool) -> None:
    found, problems = config.read(text, "job.toml", any_depth=any_depth)
    config.merge("sdxl", [found])
    assert all(problem.where.startswith("job.toml") for problem in problems)


KEYS = st.sampled_from([*config.options(), *config.ALIASES, "epoch", "datasets", "nope"])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.dates()
    | st.sampled_from(["1e-4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@settings(deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=6), st.sampled_from(config.KINDS), st.booleans())
def test_no_value_brings_the_checks_down_and_what_is_read_stays_read(
    values: dict[str, object], kind: config.Kind, as_text: bool
) -> None:
    layer = [Setting(name, str(value) if as_text else value, name, as_text) for name, value in values.items()]
    merged = config.merge(kind, [layer])
    again = config.merge(kind, [list(merged.settings.values())])
    assert (again.values, again.problems) == (merged.values, ())
    assert tomllib.loads(config.dump(merged.values)) == merged.values
    settled, _ = rules.settle(kind, merged)
    assert tomllib.loads(config.dump(settled.values)) == settled.values


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("log_tracker_name = '../x'", "cannot be part of a file name"),
        ("log_prefix = '../x'", "cannot be part of a file name"),
        ("output_name = '../x'", "cannot be part of a file name"),
        ("caption_extension = '/../x'", 'caption_extension = "/../x" is no ending of a file name'),
        ("sample_every_n_steps = -1", "is too small"),
    ],
)
def test_values_that_would_leave_their_place(line: str, said: str) -> None:
    assert said in problem(line)


def test_every_bound_is_held() -> None:
    """One value beside each, and the bound itself."""
    for bounds, step in ((config.MINIMUM, -1), (config.MAXIMUM, 1)):
        for name, bound in bounds.items():
            option = config.options()[name]
            for value, fits in ((bound + step, False), (bound, True)):
                if option.type == "int" and not float(value).is_integer():
                    continue
                asked = [Setting(name, [value] if option.nargs == "*" else value, name)]
                told = config.merge(option.kinds[0], [asked])
                off = str(value) in config._MEAN_UNSET.get(name, ())
                assert (told.problems == ()) == (fits or off), (name, value)


def test_the_smallest_and_largest_values() -> None:
    """What sd-scripts ends in an error over, or trains nothing with, one below and one above."""
    zero = """seed keep_tokens max_data_loader_n_workers learning_rate unet_lr text_encoder_lr lr_warmup_steps
        max_grad_norm caption_dropout_rate noise_offset min_snr_gamma network_alpha caption_tag_dropout_rate
        network_dropout validation_split save_n_epoch_ratio caption_dropout_every_n_epochs min_timestep"""
    one = """gradient_accumulation_steps max_train_epochs max_train_steps network_dim save_every_n_epochs
        save_every_n_steps train_batch_size vae_batch_size bucket_reso_steps clip_skip max_timestep
        sample_every_n_epochs sample_every_n_steps"""
    least = {**dict.fromkeys(zero.split(), 0), **dict.fromkeys(one.split(), 1), "min_bucket_reso": 64}
    shares = dict.fromkeys(("caption_dropout_rate", "caption_tag_dropout_rate", "network_dropout"), 1)
    most = {**shares, "clip_skip": 12, "validation_split": 0.99, "min_timestep": 999}
    assert least == config.MINIMUM
    assert {**most, "max_timestep": 1000} == config.MAXIMUM


@pytest.mark.parametrize(
    "name",
    ["pretrained_model_name_or_path", "train_data_dir", "output_dir", "logging_dir", "tokenizer_cache_dir"],
)
def test_a_path_of_the_jobs_own_is_replaced(name: str) -> None:
    result = config.own(merged(f"{name} = './x'"), {name: "/y"})
    assert result.notes == (f"job.toml line 1: {name} is the job's to choose, and was replaced",)


@pytest.mark.parametrize(
    "name",
    [
        "conditioning_data_dir", "config_file", "console_log_file", "in_json", "log_tracker_config",
        "offload_optimizer_nvme_path", "offload_param_nvme_path",
    ],
)  # fmt: skip
def test_a_path_without_a_channel_is_refused(name: str) -> None:
    assert f"{name} names a file or folder, and there is no channel for it" in problem(f"{name} = 'x'")


def test_the_misspelt_caption_extension_is_the_right_one() -> None:
    assert merged("caption_extention = '.cap'").values == {"caption_extension": ".cap"}


def test_rates_of_two_text_encoders_are_told_with_the_one_that_there_is() -> None:
    said = "Write text_encoder_lr = 1e-5: sd-scripts trains both text encoders at one rate"
    for name in config.TEXT_ENCODER_LRS:
        assert config.merge("sdxl", [[Setting(name, 1e-5, "x")]]).problems[0].fix == said
        assert config.nearest(name, ["seed"]) == "Remove it, or correct its name"  # in a dataset_config
