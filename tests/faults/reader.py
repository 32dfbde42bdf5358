"""Whoever uses a job's LoRAs while it still runs."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from entrypoint.checkpoint import verify_lora
from entrypoint.failures import BadLora
from entrypoint.storage import S3Uri
from kohya.networks import Expected
from tests.s3 import S3Server


class Reader:
    """Opens every LoRA below a folder of the bucket as soon as it is there, and again when it has changed."""

    def __init__(self, s3: S3Server, folder: S3Uri, scratch: Path, wanted: Expected) -> None:
        self.seen: dict[str, str] = {}  # key → ETag
        self.opened = 0
        self.bad: list[str] = []
        self._client, self._folder, self._scratch, self._expected = s3.client(), folder, scratch, wanted

    def look(self) -> None:
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._folder.bucket, Prefix=self._folder.prefix):
            for item in page.get("Contents", ()):
                if item["Key"].endswith(".safetensors") and self.seen.get(item["Key"]) != item["ETag"]:
                    self._open(item["Key"])
                    self.seen[item["Key"]] = item["ETag"]

    def _open(self, key: str) -> None:
        body = self._client.get_object(Bucket=self._folder.bucket, Key=key)["Body"].read()
        self._scratch.write_bytes(body)
        self.opened += 1
        try:
            verify_lora(self._scratch, self._expected)
        except BadLora as error:
            self.bad.append(f"{key}: {error}")

    def wait_for(self, count: int) -> None:
        """Until it has seen so many LoRAs, as in a minute it must."""
        end = time.monotonic() + 60
        while len(self.seen) < count:
            assert time.monotonic() < end
            time.sleep(0.02)

    @contextmanager
    def watching(self, seconds: float = 0) -> Iterator[None]:
        """Look, again and again, `seconds` apart."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(seconds):
                self.look()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.look()
