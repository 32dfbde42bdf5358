from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from entrypoint.contract import Tree
from entrypoint.failures import JobError
from entrypoint.outbox import Outbox
from entrypoint.publish import results
from entrypoint.storage import Storage


def test_what_cannot_be_put_in_one_place_is_still_put_in_the_others(tmp_path: Path) -> None:
    lora, output = tmp_path / "cat.safetensors", tmp_path / "elsewhere"
    lora.write_text("a LoRA")
    tree = Tree(tmp_path / "ml")
    tree.base.mkdir()
    tree.model.write_text("a file where the folder should be")
    values = {"seed": 1, "wandb_api_key": "x", "vae": "/some/vae", "network_weights": "cat-1.safetensors"}
    values["reg_data_dir"] = "/some/reg"
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "cat_e000001_00.png").write_text("a picture")
    (tmp_path / "a.txt").write_text("a caption")
    job: Any = SimpleNamespace(
        tree=tree,
        work=tmp_path,
        loras=[SimpleNamespace(path=lora)],
        request=SimpleNamespace(output=output, logs=None, flat=False),
        prepared=SimpleNamespace(
            output_name="cat",
            output=tmp_path,
            plan=SimpleNamespace(merged=SimpleNamespace(values=values)),
        ),
        captions={"1_cat/a.txt": tmp_path / "a.txt"},
    )
    with pytest.raises(JobError, match="model"):
        results(job, Outbox(Storage()))
    assert (output / "cat.safetensors").read_text() == "a LoRA"
    for folder in (output, tree.data):
        assert (folder / "sample" / "cat_e000001_00.png").read_text() == "a picture"
        assert (folder / "captions" / "1_cat" / "a.txt").read_text() == "a caption"
    written = (tmp_path / "cat.toml").read_text()  # to run again: names, and no paths of this job
    assert written == 'network_weights = "cat-1.safetensors"\noutput_name = "cat"\nseed = 1\n'


def test_esd_is_sent_loras_and_neither_samples_nor_captions(tmp_path: Path) -> None:
    lora, output = tmp_path / "cat.safetensors", tmp_path / "elsewhere"
    lora.write_text("a LoRA")
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "cat_e000001_00.png").write_text("a picture")
    (tmp_path / "a.txt").write_text("a caption")
    job: Any = SimpleNamespace(
        tree=Tree(tmp_path / "ml"),
        work=tmp_path,
        loras=[SimpleNamespace(path=lora)],
        request=SimpleNamespace(output=output, logs=None, flat=True),
        prepared=SimpleNamespace(
            output_name="cat",
            output=tmp_path,
            plan=SimpleNamespace(merged=SimpleNamespace(values={})),
        ),
        captions={"1_cat/a.txt": tmp_path / "a.txt"},
    )
    results(job, Outbox(Storage()))
    assert [path.name for path in output.iterdir()] == ["cat.safetensors"]
