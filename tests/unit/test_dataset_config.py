from typing import Any

import pytest

from kohya.dataset_config import read

GOOD = """
[general]
caption_extension = ".txt"
num_repeats = 2
[[datasets]]
resolution = [512, 768]
batch_size = 2
keep_tokens = 1
[[datasets.subsets]]
image_dir = "cat/"
num_repeats = 5
face_crop_aug_range = [1.0, 2.0]
caption_dropout_rate = 0
[[datasets.subsets]]
image_dir = "./reg/cats"
is_reg = true
class_tokens = "cat"
[[datasets]]
[[datasets.subsets]]
image_dir = "."
caption_extension = ".cap"
"""


def told(text: str, **options: Any) -> str:
    return " ".join(map(str, read(text, "data.toml", options)[1]))


def subset(*lines: str) -> str:
    return "\n".join(["[[datasets]]", "[[datasets.subsets]]", *lines])


def test_what_counts_for_each_subset_is_found_through_the_tables() -> None:
    found, problems = read(GOOD, "data.toml", {"caption_extension": ".caption"})
    assert problems == []
    assert [
        (one.image_dir, one.repeats, one.is_reg, one.has_class, one.caption_extension)
        for one in found.folders
    ] == [
        ("cat", 5, False, False, ".txt"),
        ("reg/cats", 2, True, True, ".txt"),
        (".", 2, False, False, ".cap"),
    ]


def test_options_count_where_no_table_says_otherwise() -> None:
    (folder,) = read(subset("image_dir = 'a'"), "x", {"dataset_repeats": 7, "caption_extension": ".txt"})[
        0
    ].folders
    assert (folder.repeats, folder.caption_extension) == (7, ".txt")
    (folder,) = read(subset("image_dir = 'a'"), "x", {})[0].folders
    assert (folder.repeats, folder.caption_extension) == (1, ".caption")  # sd-scripts' own defaults


def test_folders_are_replaced_in_their_order_and_nothing_else_is() -> None:
    found, _ = read(GOOD, "data.toml", {})
    placed = found.placed(["/0", "/1", "/2"])
    first, second = placed["datasets"]
    assert [one["image_dir"] for one in (*first["subsets"], *second["subsets"])] == ["/0", "/1", "/2"]
    assert (first["resolution"], first["subsets"][0]["num_repeats"]) == ([512, 768], 5)
    assert found.content["datasets"][0]["subsets"][0]["image_dir"] == "cat/"


@pytest.mark.parametrize(
    "path", ["/home/me/cat", "~/cat", "C:\\\\cat", "../cat", "s3://b/cat", "", "a/../../b"]
)
def test_a_folder_of_another_machine_is_told_how_to_be_named(path: str) -> None:
    said = told(subset(f'image_dir = "{path}"'))
    assert "data.toml: [[datasets]] 1, subset 1: image_dir = " in said
    assert 'Write image_dir = "cat"' in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[datasets", "it is not TOML"),
        ("[general]\n", "it lists no [[datasets]] with [[datasets.subsets]]"),
        ("[[datasets]]\nresolution = 512", "it lists no [[datasets]]"),
        ("datasets = 3", "it lists no [[datasets]]"),
        ("general = 3\n" + subset("image_dir = 'a'"), "data.toml: general is no table. Write [general]"),
        ("a = " + "[" * 5000, "it is not TOML"),
        ("seed = 1" + "0" * 5000, "it is not TOML"),
        ("a." * 200_000 + "b = 1", "it has a key with 100 parts"),
        ("shuffle_caption = true\n" + subset("image_dir = 'a'"), "shuffle_caption stands outside"),
        (subset("num_repeats = 1"), "image_dir = None names no folder"),
        (
            subset("image_dir = 'a'", "num_repeat = 1"),
            "num_repeat is no key of this table. Did you mean num_rep",
        ),
        (subset("image_dir = 'a'", "resolution = 512"), "resolution is no key of this table"),
        (subset("image_dir = 'a'", "num_repeats = '3'"), "num_repeats = '3' is not a whole number"),
        (subset("image_dir = 'a'", "num_repeats = 0"), "num_repeats = 0 is too small"),
        (subset("image_dir = 'a'", "face_crop_aug_range = [1, 2]"), "such as [1.0, 2.0]"),
        (subset("image_dir = 'a'", "metadata_file = 'm.json'"), "metadata_file names a file or folder"),
        (subset("image_dir = 'a'", "conditioning_data_dir = 'm'"), "conditioning_data_dir names a file or"),
        (
            subset("image_dir = 'a'").replace("]]", "]]\nbatch_size = 0", 1),
            "data.toml: [[datasets]] 1: batch_size = 0 is too small. Write 1 or more.",
        ),
        (subset("image_dir = 'a'", "is_reg = true"), "regularisation pictures alone"),
        ("[general]\nis_reg = true\n" + subset("image_dir = 'a'"), "[general]: is_reg is no key"),
        ("[general]\nresolution = '512'\n" + subset("image_dir = 'a'"), "is not pixels"),
        ("[general]\nvalidation_split = 0\n" + subset("image_dir = 'a'"), "a number with a point"),
    ],
)
def test_what_sd_scripts_would_refuse_or_leave_out(text: str, said: str) -> None:
    assert said in told(text)


def test_all_that_is_wrong_is_told_at_once() -> None:
    said = told("[general]\nseed = 1\n" + subset("image_dir = '/a'", "flip_aug = 1"))
    assert "seed is no key" in said
    assert "flip_aug = 1 is not true or false" in said
    assert "image_dir = '/a' names no folder" in said


# config_util.py of v0.10.1, ConfigSanitizer: the keys of every table, of those above subsets, of subsets.
ANYWHERE = """
color_aug = true
flip_aug = true
random_crop = true
shuffle_caption = true
enable_wildcard = true
cache_info = true
num_repeats = 2
keep_tokens = 1
token_warmup_min = 1
caption_dropout_every_n_epochs = 0
keep_tokens_separator = "|||"
secondary_separator = ";;;"
caption_separator = ","
caption_prefix = "a"
caption_suffix = "b"
resize_interpolation = "area"
caption_extension = ".txt"
class_tokens = "cat"
token_warmup_step = 1
caption_dropout_rate = 0.1
caption_tag_dropout_rate = 0.1
face_crop_aug_range = [1.0, 2.0]
custom_attributes = {a = 1}
"""
ABOVE = """
bucket_no_upscale = true
enable_bucket = true
batch_size = 2
bucket_reso_steps = 64
max_bucket_reso = 1024
min_bucket_reso = 256
validation_seed = 1
validation_split = 0.5
network_multiplier = 1.0
resolution = 512
"""
OWN = 'image_dir = "a"\nis_reg = false\nalpha_mask = true\n'
TABLES = f"[general]{ANYWHERE}{ABOVE}\n[[datasets]]{ANYWHERE}{ABOVE}\n[[datasets.subsets]]{ANYWHERE}{OWN}"


def test_every_key_of_sd_scripts_is_known() -> None:
    assert told(TABLES) == ""


@pytest.mark.parametrize("line", [*(ANYWHERE + ABOVE + OWN).split("\n")[1:-1]])
def test_a_value_of_another_type(line: str) -> None:
    """A date is none of any key."""
    name = line.partition(" = ")[0]
    if name == "image_dir" or not name:
        return
    said = told(TABLES.replace(line, f"{name} = 2020-01-01"))
    assert f"{name} = datetime.date(2020, 1, 1) is not " in said
