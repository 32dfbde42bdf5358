"""`make checks`: what the checks of a data set cost, beside the least that they could.

    python -m benchmarks.checks [--pictures N] [--files N] [--rounds N]

1. The listing-level report on a bucket of 100,000 captioned pictures, beside listing it alone. The S3 server
   is a process of its own that has its pages ready: a real one takes longer to list, and the report no more.
   And the memory that it takes: kept, at most at a time, and as the system sees it beside 1,000 pictures.
2. Opening every picture, beside unpacking the same files with Pillow in as many threads.
3. A job that its listing and its model's header show unfit, from the start of the process to its end.

Exits 1 where a bound is not kept. Times are the best of the rounds: the machine may have other work.
"""

import argparse
import gc
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

from entrypoint import dataset, files, pictures
from entrypoint.facts import facts
from entrypoint.request import Source
from entrypoint.storage import S3Uri, Storage

REPORT_TO_LISTING = 1.3  # times as long, at most
CHECK_TO_UNPACKING = 0.9  # times as fast, at least
BYTES_A_PICTURE = 200  # fewer
UNFIT_SECONDS = 2.0
PAGE = 1000  # objects in an answer of S3
FOLDERS = 10
VALUES = {"resolution": "512,512", "enable_bucket": True, "bucket_no_upscale": True, "cache_latents": True,
          "max_train_epochs": 10, "train_batch_size": 2}  # fmt: skip
FORMATS: dict[str, dict[str, Any]] = {"jpg": {"quality": 90}, "png": {}, "webp": {"quality": 90}}


def keys(count: int) -> Iterator[str]:
    """Pictures with captions in ten folders, as S3 lists them."""
    for folder in range(FOLDERS):
        for number in range(count // FOLDERS):
            yield f"cats/10_cat{folder}/{number:06}.png"
            yield f"cats/10_cat{folder}/{number:06}.txt"


def _pages(count: int) -> list[bytes]:
    """The answers to ListObjectsV2, in order."""
    every, pages = list(keys(count)), []
    for start in range(0, len(every), PAGE):
        items = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{number:032x}&quot;</ETag><Size>{100_000 + number}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for number, key in enumerate(every[start : start + PAGE], start)
        )
        more = start + PAGE < len(every)
        token = f"<NextContinuationToken>{start // PAGE + 1}</NextContinuationToken>" if more else ""
        pages.append(
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>b</Name><Prefix>cats/</Prefix><KeyCount>{PAGE}</KeyCount><MaxKeys>{PAGE}</MaxKeys>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{items}</ListBucketResult>".encode()
        )
    return pages


def _serve(count: int, port: Any) -> None:
    pages = _pages(count)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # in one piece: small ones wait for each other

        def do_GET(self) -> None:
            token = parse_qs(urlsplit(self.path).query).get("continuation-token", ["0"])[0]
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(pages[int(token)])))
            self.end_headers()
            self.wfile.write(pages[int(token)])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.send(server.server_address[1])
    server.serve_forever()


@contextmanager
def bucket(count: int) -> Iterator[Storage]:
    """A bucket of `count` pictures. Ends the program with a sentence where its server does not begin."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(count, theirs), daemon=True)
    server.start()
    theirs.close()  # so that the server's own is the last one, and its end is seen
    try:
        port = ours.recv()
    except EOFError:
        server.join()
        code = server.exitcode
        sys.exit(
            f"the benchmark's S3 server ended before it answered, with code {code}; see what it says above"
        )
    os.environ |= {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "us-east-1",
    }
    try:
        yield Storage()
    finally:
        server.terminate()
        server.join()


def report(storage: Storage) -> object:
    """All that is told of a data set before it is fetched, and what the job keeps of it."""
    source = Source(S3Uri("b", "cats"), "dataset_uri")
    found = files.listing(source, storage)
    data_set, problems = dataset.inspect(found.sizes, "s3://b/cats")
    assert not problems
    return data_set, found.only(data_set.places), facts(data_set, None, VALUES)


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def measure_listing(count: int, rounds: int) -> Iterator[tuple[str, float, float, bool]]:
    with bucket(count) as storage:
        folder = S3Uri("b", "cats")

        def listing() -> None:
            for _ in storage.list(folder):
                pass

        listing()
        alone, whole = [], []
        for _ in range(rounds):
            alone.append(seconds(listing))
            whole.append(seconds(lambda: report(storage)))
        print(f"  listing {count} pictures: {min(alone):.2f} s; with the report {min(whole):.2f} s")
        ratio = min(whole) / min(alone)
        yield "report / listing alone, times", ratio, REPORT_TO_LISTING, ratio <= REPORT_TO_LISTING
        gc.collect()
        tracemalloc.start()
        kept = report(storage)
        gc.collect()
        now, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert kept
        for what, found in (("kept", now / count), ("at most at a time", peak / count)):
            yield f"memory {what}, bytes a picture", found, BYTES_A_PICTURE, found < BYTES_A_PICTURE


def measure_process(count: int) -> Iterator[tuple[str, float, float, bool]]:
    """What the most memory that a process of its own has grows by with the pictures."""
    most = []
    for number in (PAGE, count):
        with bucket(number):
            command = [sys.executable, "-c", "from benchmarks import checks; checks.tell_memory()"]
            most.append(int(subprocess.run(command, capture_output=True, check=True).stdout))
    grown = (most[1] - most[0]) / (count - PAGE)
    yield "memory of the process, bytes a picture", grown, BYTES_A_PICTURE, grown < BYTES_A_PICTURE


def tell_memory() -> None:
    """Print the most memory that this process has had after a report. ru_maxrss begins with its parent's."""
    report(Storage())
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) * 1024)


def write_pictures(folder: Path, count: int, ending: str) -> None:
    """Pictures of about a megapixel that compress as photographs do."""
    rng = np.random.default_rng(0)
    (folder / "1_cat").mkdir(parents=True)
    for number in range(count):
        coarse = rng.integers(0, 256, (96, 128, 3), np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((1024, 768), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(image + rng.integers(-6, 7, image.shape), 0, 255).astype(np.uint8)
        path = folder / "1_cat" / f"{number:04}.{ending}"
        Image.fromarray(noisy).save(path, **FORMATS[ending])
        path.with_suffix(".txt").write_text("a cat, sitting, on a mat")


def _unpack(path: Path) -> None:
    with Image.open(path) as picture:
        picture.load()


def measure_pictures(count: int, rounds: int) -> Iterator[tuple[str, float, float, bool]]:
    for ending in FORMATS:
        with tempfile.TemporaryDirectory() as root:
            write_pictures(Path(root), count, ending)
            there = {path.relative_to(root).as_posix(): path for path in Path(root).rglob("*.*")}
            data_set, _ = dataset.inspect({name: path.stat().st_size for name, path in there.items()}, root)
            names = {name: name for name in there}
            paths = [path for path in there.values() if path.suffix != ".txt"]

            def check() -> None:
                with redirect_stdout(io.StringIO()):
                    pictures.check(data_set, there, names, VALUES)  # noqa: B023

            def unpack() -> None:
                with ThreadPoolExecutor(pictures.THREADS) as pool:
                    list(pool.map(_unpack, paths))  # noqa: B023

            unpack()
            alone, whole = [], []
            for _ in range(rounds):
                alone.append(seconds(unpack))
                whole.append(seconds(check))
            ratio = min(alone) / min(whole)
            print(f"  {ending}: {count / min(whole):.0f} checked a second, {count / min(alone):.0f} unpacked")
            yield (
                f"{ending}, check / unpacking, times as fast",
                ratio,
                CHECK_TO_UNPACKING,
                (ratio >= CHECK_TO_UNPACKING),
            )


def measure_unfit(rounds: int) -> Iterator[tuple[str, float, float, bool]]:
    with tempfile.TemporaryDirectory() as root:
        place = Path(root)
        header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        model = place / "model.safetensors"
        model.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        (place / "data" / "cat").mkdir(parents=True)
        (place / "data" / "cat" / "a.png").write_bytes(b"x")
        command = [sys.executable, "-m", "entrypoint", "train", f"--model_uri={model}"]
        command += [f"--dataset_uri={place / 'data'}", "--trainer=builtin", "--network_dimm=4"]
        environment = {**os.environ, "SAGEMAKER_BASE_DIR": str(place / "ml"), "TMPDIR": root}

        def job() -> None:
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            assert done.returncode == 2, done.stderr
            for told in ("network_dimm", "safetensors", "repeat its 1 picture"):
                assert told in done.stderr, done.stderr

        job()
        took = min(seconds(job) for _ in range(rounds))
        yield "an unfit job, seconds", took, UNFIT_SECONDS, took < UNFIT_SECONDS


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what the checks of a data set cost.")
    parser.add_argument("--pictures", type=int, default=100_000, help="in the bucket that is listed")
    parser.add_argument("--files", type=int, default=60, help="pictures that are opened, of each format")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args(arguments)
    if asked.pictures <= PAGE:
        parser.error(f"--pictures={asked.pictures}: the memory is compared with that of {PAGE}, so take more")
    kept = True
    for measured in (
        measure_listing(asked.pictures, asked.rounds),
        measure_process(asked.pictures),
        measure_pictures(asked.files, asked.rounds),
        measure_unfit(asked.rounds),
    ):
        for what, found, bound, good in measured:
            print(f"{'ok  ' if good else 'MISS'} {what}: {found:.2f} (bound {bound:g})", flush=True)
            kept = kept and good
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
