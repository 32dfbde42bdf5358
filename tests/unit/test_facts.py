"""entrypoint.facts and kohya.buckets, held to what sd-scripts itself makes of random data sets."""

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from entrypoint.dataset import DataSet, inspect, inspect_folders
from entrypoint.facts import BucketFacts, Facts, FolderFacts, facts
from kohya import dataset_config
from kohya.buckets import Buckets, reg_repeats, resolution, steps

RECORDED = Path(__file__).parents[1] / "data" / "sd_scripts_facts.json"


def choices_differ(recorded: dict[str, Any]) -> list[Any]:
    """Every size for which kohya.buckets chooses otherwise than sd-scripts did."""
    differ = []
    for case in recorded["choices"]:
        buckets = Buckets.of(case["values"])
        for size, bucket, resized in case["rows"]:
            chosen = buckets.choose(tuple(size))
            expected = None if bucket is None else (tuple(bucket), tuple(resized))
            if (None if 0 in chosen[0] else chosen) != expected:
                differ.append((case["values"], size, chosen, expected))
    return differ


def told(case: dict[str, Any], sized: bool = True) -> Facts:
    """The facts of a recorded data set."""

    def found(folders: dict[str, Any]) -> tuple[DataSet, list[tuple[int, int]]]:
        names = [f"{folder}/{number:02}" for folder, sizes in folders.items() for number in range(len(sizes))]
        listing = {f"{name}{ending}": 5 for name in names for ending in (".png", ".txt")}
        if case["config"]:
            described, problems = dataset_config.read(tomli_w.dumps(case["config"]), "x", case["values"])
            assert problems == []
            data_set, problems = inspect_folders(listing, "x", described.folders)
        else:
            data_set, problems = inspect(listing, "x")
        assert problems == []
        in_order = [folders[picture.path.split("/")[0]][int(picture.path.split("/")[1][:2])]
                    for subset in data_set.subsets for picture in subset.pictures]  # fmt: skip
        return data_set, [(width, height) for width, height in in_order]

    data, sizes = found(case["data"])
    reg, reg_sizes = found(case["reg"]) if case["reg"] else (None, [])
    return facts(data, reg, case["values"], (sizes, reg_sizes) if sized else None)


def epochs_differ(recorded: dict[str, Any]) -> list[Any]:
    """Every data set of which an epoch has other buckets or batches than sd-scripts gave it."""
    differ = []
    for case in recorded["epochs"]:
        found = told(case)
        buckets = {f"{one.width}x{one.height}": one.pictures for one in found.buckets}
        if (buckets, found.batches, found.exact) != (case["buckets"], case["batches"], True):
            differ.append((case, found))
        least = told(case, sized=False)
        if least.batches > found.batches or (least.exact and least.batches != found.batches):
            differ.append((case, least))
    return differ


def test_buckets_are_those_that_sd_scripts_chose() -> None:
    recorded = json.loads(RECORDED.read_text())
    assert choices_differ(recorded) == []
    kinds = {
        (case["values"]["enable_bucket"], case["values"]["bucket_no_upscale"]) for case in recorded["choices"]
    }
    assert len(kinds) == 4
    assert any(bucket is None for case in recorded["choices"] for _, bucket, _ in case["rows"])


def test_an_epoch_is_the_one_that_sd_scripts_made() -> None:
    recorded = json.loads(RECORDED.read_text())
    assert epochs_differ(recorded) == []
    assert {bool(case["reg"]) for case in recorded["epochs"]} == {True, False}
    assert {bool(case["config"]) for case in recorded["epochs"]} == {True, False}
    assert any("validation_split" in case["values"] for case in recorded["epochs"])


@pytest.mark.parametrize(
    ("values", "processes", "expected"),
    [
        ({"max_train_epochs": 10}, 1, (1010, 10)),
        ({"max_train_epochs": 10, "max_train_steps": 5}, 1, (1010, 10)),
        ({"max_train_epochs": 10, "gradient_accumulation_steps": 4}, 1, (260, 10)),
        ({"max_train_epochs": 10, "gradient_accumulation_steps": 4}, 2, (130, 10)),
        ({"max_train_steps": 203}, 1, (203, 3)),
        ({"max_train_steps": 203, "gradient_accumulation_steps": 3}, 4, (203, 23)),
        ({}, 1, (1600, 16)),
    ],
)
def test_steps_and_epochs(values: dict[str, int], processes: int, expected: tuple[int, int]) -> None:
    """By hand from train_network.py:799-803 and 978-979, of 101 batches."""
    assert steps(101, values, processes) == expected


def test_regularisation_pictures_fill_up_to_those_trained_on() -> None:
    assert reg_repeats(10, [2, 2, 2]) == [4, 3, 3]
    assert reg_repeats(3, [2, 2, 2]) == [2, 2, 0]
    assert reg_repeats(10, []) == []


@pytest.mark.parametrize("value", ["512", "512,512", 512, [512, 512]])
def test_a_resolution_in_each_of_its_forms(value: object) -> None:
    assert resolution(value) == (512, 512)
    assert resolution("512,768") == resolution([512, 768]) == (512, 768)


def test_facts_are_kept_and_said() -> None:
    paths = [f"{folder}/{name}" for folder in ("10_cat", "2_dog") for name in ("a.png", "a.txt", "b.png")]
    data, _ = inspect(dict.fromkeys(paths, 500_000), "x", allow_missing_captions=True)
    reg, _ = inspect({"1_cat/r.png": 1_000_000}, "x", allow_missing_captions=True)
    values = {
        "resolution": "512,512", "enable_bucket": True, "bucket_no_upscale": True, "train_batch_size": 5,
        "max_train_epochs": 3,
    }  # fmt: skip
    sizes = [(512, 512), (512, 512), (640, 400), (512, 512)]
    found = facts(data, reg, values, (sizes, [(300, 300)]))
    assert found.folders == (
        FolderFacts("10_cat", 2, 10, 1, 1_500_000, False),
        FolderFacts("2_dog", 2, 2, 1, 1_500_000, False),
        FolderFacts("1_cat", 1, 1, 0, 1_000_000, True),
    )
    assert found.buckets == (BucketFacts(256, 256, 24), BucketFacts(512, 512, 22), BucketFacts(640, 384, 2))
    assert (found.pictures, found.with_repeats, found.bytes) == (4, 24, 4_000_000)
    assert (found.batches, found.steps, found.epochs, found.exact) == (5 + 5 + 1, 33, 3, True)
    assert json.loads(json.dumps(found.as_json()))["buckets"][0] == {
        "width": 256,
        "height": 256,
        "pictures": 24,
    }
    assert found.lines() == [
        "10_cat: 2 pictures × 10, 1 caption, 1.5 MB",
        "2_dog: 2 pictures × 2, 1 caption, 1.5 MB",
        "1_cat (regularisation): 1 picture × 1, 0 captions, 1.0 MB",
        "buckets 256×256: 24, 512×512: 22, 640×384: 2",
        "11 batches an epoch, 3 epochs, 33 steps",
    ]
    listed = facts(data, reg, values)
    assert listed.lines()[-1] == "at least 10 batches an epoch, 3 epochs, at least 30 steps"
    assert listed.buckets == ()
    by_steps = facts(data, reg, {**values, "max_train_epochs": None, "max_train_steps": 30})
    assert by_steps.lines()[-1] == "at least 10 batches an epoch, at most 3 epochs, 30 steps"


def test_the_log_stays_short() -> None:
    paths = [f"1_{number}/a.png" for number in range(60)]
    data, _ = inspect(dict.fromkeys(paths, 5), "x", allow_missing_captions=True)
    values = {"resolution": "2048", "enable_bucket": True, "bucket_no_upscale": True}
    lines = facts(data, None, values, ([(64 * (number + 1), 640) for number in range(60)], [])).lines()
    assert len(lines) == 7
    assert "and 56 more folders: 56 pictures" in lines
    assert lines[-2].endswith(", and 54 more: 54")


def test_a_folder_that_is_named_twice_is_there_once() -> None:
    """Trained twice an epoch; its files are those of one folder."""
    listing = {"cat/a.png": 500_000, "cat/a.txt": 5, "dog/b.png": 500_000, "dog/b.txt": 5}
    tables = "".join(
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{name}'\ncaption_extension = '.txt'\n"
        for name in ("cat", "cat", "dog")
    )
    described, problems = dataset_config.read(tables, "x", {})
    assert problems == []
    found = facts(inspect_folders(listing, "x", described.folders)[0], None, {"max_train_steps": 1})
    assert (found.pictures, found.with_repeats, found.bytes, found.batches) == (2, 3, 1_000_010, 3)
    assert found.lines()[-1] == "3 batches an epoch, 1 epoch, 1 step"


def test_what_sd_scripts_draws_is_not_called_exact() -> None:
    data, _ = inspect({f"1_a/{n}.png": 5 for n in range(10)}, "x", allow_missing_captions=True)
    values = {"resolution": "512", "enable_bucket": True, "validation_split": 0.2}
    found = facts(data, None, values, ([(512, 512)] * 10, []))
    assert (found.batches, found.exact) == (8, False)
    assert facts(data, None, {**values, "validation_seed": 1}, ([(512, 512)] * 10, [])).exact
