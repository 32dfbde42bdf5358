"""What becomes visible in the bucket while a trainer writes: whole LoRAs that work, and nothing else."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from entrypoint.checkpoint import Lora, verify_lora
from entrypoint.contract import Tree
from entrypoint.keeper import Keeper
from entrypoint.outbox import Outbox
from entrypoint.storage import S3Uri, Storage
from kohya.networks import expected
from tests.faults.reader import Reader
from tests.s3 import S3Server

SHAPES = Path(__file__).parents[1] / "data" / "lora_sd15.json"
EXPECTED = expected("sd15", {"network_module": "networks.lora", "network_dim": 4, "learning_rate": 1e-4})


def lora(seed: int) -> bytes:
    """A narrow LoRA that works."""
    rng = np.random.default_rng(seed)
    shapes = json.loads(SHAPES.read_text())
    return save(
        {
            name: rng.standard_normal([4 if size == 4 else 8 for size in shape]).astype(np.float16)
            for name, shape in shapes.items()
        }
    )


@pytest.mark.parametrize("verified", [True, False])
def test_no_half_lora_is_ever_visible(
    verified: bool, s3: S3Server, bucket: S3Uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow writer holds its file while the keeper sweeps; without verification the reader finds it half."""
    monkeypatch.setattr("entrypoint.keeper.SWEEP_SECONDS", 0.02)
    sweeps = threading.Semaphore(0)
    request = SimpleNamespace(output=bucket / "out", logs=None, checkpoints=None, flat=False)
    folders = {name: tmp_path / name for name in ("output", "states", "logs")}
    for folder in folders.values():
        folder.mkdir()
    plan = SimpleNamespace(request=request, run={}, states=())
    prepared: Any = SimpleNamespace(plan=plan, taken=None, output_name="cat", **folders)

    def verify(path: Path, _prepared: Any) -> Lora:
        sweeps.release()
        return verify_lora(path, EXPECTED) if verified else Lora(path, 1, 4, 1)

    outbox = Outbox(Storage())
    job: Any = SimpleNamespace(tree=Tree(tmp_path / "ml"), work=tmp_path)
    keeper = Keeper(job, prepared, outbox, verify)
    reader = Reader(s3, bucket / "out", tmp_path / "read", EXPECTED)
    with reader.watching(), keeper.watching():
        for number in range(3):
            content = lora(number)
            with (folders["output"] / f"cat-{number}.safetensors").open("wb") as file:
                for piece in (content[: len(content) // 2], content[len(content) // 2 :]):
                    file.write(piece)
                    file.flush()
                    assert sweeps.acquire(timeout=60)  # the keeper has looked at what there is
                    if not verified:
                        reader.wait_for(number + 1)
        reader.wait_for(3)
    outbox.wait()
    assert not reader.bad if verified else reader.bad
