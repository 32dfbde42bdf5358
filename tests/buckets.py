"""Buckets, batches and pictures an epoch as sd-scripts itself makes them, for tests to compare with.

    PYTHON -m tests.buckets SD_SCRIPTS_FOLDER SEED CASES

PYTHON is the one that sd-scripts runs with. The last line that it prints is JSON: `choices`, what
BucketManager makes of random sizes under random options (null where it divides by zero, or a side is 0);
`epochs`, what becomes of whole data sets of small pictures.
"""

import importlib
import json
import logging
import random
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from PIL import Image

SIZES = 12  # pictures of random size for each set of options


def options(rng: random.Random) -> dict[str, Any]:
    steps = rng.choice([32, 64, 64, 128])
    sides = sorted(rng.randint(4, 20) * 64 for _ in range(4))
    width, height = rng.choice([(sides[1], sides[1]), (sides[1], sides[2]), (sides[2], sides[1])])
    return {
        "resolution": f"{width},{height}",
        "enable_bucket": rng.random() < 0.9,
        "min_bucket_reso": sides[0] - rng.choice([0, 0, 13]),
        "max_bucket_reso": sides[3] + rng.choice([0, 0, 13]),
        "bucket_reso_steps": steps,
        "bucket_no_upscale": rng.random() < 0.5,
    }


def size(rng: random.Random) -> tuple[int, int]:
    common = [(512, 512), (768, 512), (512, 768), (1024, 1024), (1920, 1080), (640, 480), (832, 1216)]
    if rng.random() < 0.2:
        return rng.choice(common)
    return int(9000 ** rng.uniform(0.5, 1)), int(9000 ** rng.uniform(0.5, 1))


def choices(train_util: Any, rng: random.Random) -> dict[str, Any]:
    """What one BucketManager makes of random sizes."""
    values = options(rng)
    width, height = map(int, values["resolution"].split(","))
    if values["enable_bucket"]:
        lowest, highest = train_util.BaseDataset.adjust_min_max_bucket_reso_by_steps(
            None, (width, height), *(values[f"{name}_bucket_reso"] for name in ("min", "max")),
            values["bucket_reso_steps"],
        )  # fmt: skip
        manager = train_util.BucketManager(
            values["bucket_no_upscale"], (width, height), lowest, highest, values["bucket_reso_steps"]
        )
        if not values["bucket_no_upscale"]:
            manager.make_buckets()
    else:
        manager = train_util.BucketManager(False, (width, height), None, None, None)
        manager.set_predefined_resos([(width, height)])
    rows = []
    for given in (size(rng) for _ in range(SIZES)):
        try:
            bucket, resized, _ = manager.select_bucket(*given)
        except ZeroDivisionError:  # of a picture that is far too narrow
            bucket = resized = None
        rows.append([given, bucket, resized] if bucket and 0 not in bucket else [given, None, None])
    return {"values": values, "rows": rows}


def folders(rng: random.Random, names: list[str]) -> dict[str, list[tuple[int, int]]]:
    return {
        name: [(rng.randint(150, 800), rng.randint(150, 800)) for _ in range(rng.randint(1, 9))]
        for name in names
    }


def epoch(modules: Any, rng: random.Random) -> dict[str, Any]:
    """What a data set becomes, with regularisation pictures or without, or by a dataset_config."""
    train_util, config_util, parser = modules
    values = {**options(rng), "bucket_reso_steps": 64, "min_bucket_reso": 64, "max_bucket_reso": 2048}
    values |= {"train_batch_size": rng.randint(1, 4), "caption_extension": ".txt", "cache_latents": True}
    if rng.random() < 0.3:
        values |= {"validation_split": rng.choice([0.25, 0.5]), "validation_seed": rng.randint(0, 99)}
    data = folders(rng, rng.sample(["1_a", "2_b", "10_c", "3"], rng.randint(1, 3)))
    reg = folders(rng, ["2_cat"]) if rng.random() < 0.4 else {}
    described: dict[str, Any] = {}
    if rng.random() < 0.3:
        tables = [
            {"resolution": rng.choice([256, [320, 512]]), "subsets": [{"image_dir": name, "num_repeats": 2}]}
            for name in data
        ]
        described = {"general": {"enable_bucket": True}, "datasets": tables}
        tables[0]["batch_size"] = 3
        reg = {}
    with tempfile.TemporaryDirectory() as root:
        for top, content in (("data", data), ("reg", reg)):
            for folder, sizes in content.items():
                Path(root, top, folder).mkdir(parents=True)
                for number, one in enumerate(sizes):
                    Image.new("L", one).save(Path(root, top, folder, f"{number:02}.png"))
                    Path(root, top, folder, f"{number:02}.txt").write_text("a cat")
        args = parser.parse_args([], Namespace(**values))
        train_util.prepare_dataset_args(args, False)
        placed = json.loads(json.dumps(described))
        for table in placed.get("datasets", ()):
            for subset in table["subsets"]:
                subset["image_dir"] = str(Path(root, "data", subset["image_dir"]))
        if not placed:
            found = config_util.generate_dreambooth_subsets_config_by_subdirs
            placed = {"datasets": [{"subsets": found(str(Path(root, "data")), str(Path(root, "reg")))}]}
        sanitizer = config_util.ConfigSanitizer(True, False, False, True)
        blueprint = config_util.BlueprintGenerator(sanitizer).generate(placed, args)
        group, _ = config_util.generate_dataset_group_by_blueprint(blueprint.dataset_group)
    counted: dict[str, int] = {}
    for made in group.datasets:
        manager = made.bucket_manager
        resos = manager.resos or manager.predefined_resos
        for (width, height), bucket in zip(resos, manager.buckets, strict=True):
            if bucket:
                counted[f"{width}x{height}"] = counted.get(f"{width}x{height}", 0) + len(bucket)
    return {"values": values, "data": data, "reg": reg, "config": described, "buckets": counted,
            "batches": len(group)}  # fmt: skip


def main() -> None:
    folder, seed, cases = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sys.path.insert(0, folder)
    train_util, config_util = (
        importlib.import_module(f"library.{name}") for name in ("train_util", "config_util")
    )
    parser = importlib.import_module("train_network").setup_parser()
    logging.disable(logging.ERROR)
    rng = random.Random(seed)
    found = {
        "source": "sd-scripts v0.10.1",
        "choices": [choices(train_util, rng) for _ in range(cases)],
        "epochs": [epoch((train_util, config_util, parser), rng) for _ in range(cases)],
    }
    print(json.dumps(found, separators=(",", ":")))


if __name__ == "__main__":
    main()
