"""What becomes visible in the bucket while a trainer writes: whole LoRAs that work, and nothing else."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from entrypoint.checkpoint import Lora, verify_lora
from entrypoint.contract import Tree
from entrypoint.failures import BadLora
from entrypoint.keeper import Keeper
from entrypoint.outbox import Outbox
from entrypoint.storage import S3Uri, Storage
from kohya.networks import expected
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


class Reader:
    """Opens every LoRA in a folder of the bucket as soon as it is there, and again when it has changed."""

    def __init__(self, s3: S3Server, folder: S3Uri, scratch: Path) -> None:
        self.seen: dict[str, str] = {}  # key → ETag
        self.bad: list[str] = []
        self._client, self._folder, self._scratch = s3.client(), folder, scratch

    def look(self) -> None:
        answer = self._client.list_objects_v2(Bucket=self._folder.bucket, Prefix=self._folder.prefix)
        for item in answer.get("Contents", ()):
            if self.seen.get(item["Key"]) == item["ETag"]:
                continue
            self.seen[item["Key"]] = item["ETag"]
            body = self._client.get_object(Bucket=self._folder.bucket, Key=item["Key"])["Body"].read()
            self._scratch.write_bytes(body)
            try:
                verify_lora(self._scratch, EXPECTED)
            except BadLora as error:
                self.bad.append(f"{item['Key']}: {error}")

    def wait_for(self, count: int) -> None:
        """Until it has seen so many LoRAs, as in a minute it must."""
        end = time.monotonic() + 60
        while len(self.seen) < count:
            assert time.monotonic() < end
            time.sleep(0.02)

    @contextmanager
    def watching(self) -> Iterator[None]:
        ended = threading.Event()

        def watch() -> None:
            while not ended.is_set():
                self.look()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.look()


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
    plan = SimpleNamespace(request=request, run={})
    prepared: Any = SimpleNamespace(plan=plan, taken=None, output_name="cat", **folders)

    def verify(path: Path, _prepared: Any) -> Lora:
        sweeps.release()
        return verify_lora(path, EXPECTED) if verified else Lora(path, 1, 4, 1)

    outbox = Outbox(Storage())
    job: Any = SimpleNamespace(tree=Tree(tmp_path / "ml"), work=tmp_path)
    keeper = Keeper(job, prepared, outbox, verify)
    reader = Reader(s3, bucket / "out", tmp_path / "read")
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
