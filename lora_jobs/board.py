"""Shows the curves of jobs in TensorBoard on this machine, and goes on while they grow, until Ctrl-C."""

import argparse
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from entrypoint.console import say, warn
from lora_jobs.aws import Aws
from lora_jobs.errors import LoraError
from lora_jobs.jobs import add_job, describe, find

EVERY = 10.0  # seconds between two looks for what has been logged
_PORT = 6006  # TensorBoard's own
_OVERLAP = 1024  # bytes that are fetched again, to see whether they are still the same
_STARTS = 60.0  # seconds that TensorBoard has to start
_TOLD = 2000  # bytes of what it says, where it ends


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser, several=True)
    parser.add_argument("--port", type=int, help=f"of TensorBoard ({_PORT}, or a free one)")
    parser.add_argument("--no-browser", action="store_true", help="print the address, and open nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and open nothing")
    parser.add_argument("--every", type=float, default=EVERY, metavar="SECONDS", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):  # TensorBoard must not outlive a terminal that is closed
        signal.signal(number, signal.default_int_handler)
    jobs = [find(asked, arguments.region) for asked in arguments.job]
    with _shown(jobs, arguments.port, arguments.every) as shown:
        names = [name for _, name in jobs]
        if arguments.json:
            say(json.dumps({"address": shown.address, "jobs": names}))
        else:
            say(f"TensorBoard shows {', '.join(names)} on {shown.address} until Ctrl-C.")
        if not arguments.no_browser and not arguments.json:
            webbrowser.open(shown.address)
        shown.process.wait()
        raise LoraError(f"TensorBoard ended with exit code {shown.process.returncode}. {shown.last}")


@contextmanager
def board(*jobs: str, port: int | None = None, every: float = EVERY, aws: Aws | None = None) -> Iterator[str]:
    """TensorBoard with the curves of these jobs, on this machine, for as long as the block lasts.

    Gives its address. `every`: seconds between two looks for what has been logged. Raises LoraError where
    there is no such job, or TensorBoard does not start.
    """
    aws = aws or Aws()
    with _shown([(aws, job) for job in jobs], port, every) as shown:
        yield shown.address


@dataclass(frozen=True)
class _Board:
    """TensorBoard, as it runs."""

    address: str
    process: "subprocess.Popen[bytes]"
    said: IO[bytes]

    @property
    def last(self) -> str:
        """The end of what it said."""
        self.said.seek(0)
        return f"It said: {self.said.read()[-_TOLD:].decode(errors='replace').strip() or 'nothing'}"


@contextmanager
def _shown(jobs: Sequence[tuple[Aws, str]], port: int | None, every: float) -> Iterator[_Board]:
    """TensorBoard as a child, which ends with the block; a thread fetches what is logged meanwhile."""
    over, port = threading.Event(), _free_port(port)
    temporary = tempfile.TemporaryDirectory(prefix="lora-board-", ignore_cleanup_errors=True)
    with temporary as folder, tempfile.TemporaryFile() as said:
        runs = [Run(aws, job, Path(folder)) for aws, job in jobs]
        for one in runs:
            one.look()
            if not one.files:
                warn(f"{one.job} has logged nothing yet; its curve appears when it does.")
        looking = threading.Thread(target=_look, args=(runs, every, over), daemon=True)
        with _tensorboard(Path(folder), port, said) as process:
            shown = _Board(f"http://127.0.0.1:{port}/", process, said)
            if not _answers(process, port):
                raise LoraError(f"TensorBoard did not start on port {port}. {shown.last}")
            looking.start()
            try:
                yield shown
            finally:
                over.set()
                looking.join(1)  # and no longer: the network that it waits for may be gone


class Run:
    """One job's event logs: in S3, and as a run of TensorBoard in a folder of the job's name."""

    def __init__(self, aws: Aws, job: str, folder: Path) -> None:
        """Raises LoraError where there is no such job, or where it has no place for event logs in S3."""
        self.job = job
        self.files: dict[str, Path] = {}  # by key
        self._s3, self._folder = aws.s3, folder / job
        self._etags: dict[str, str] = {}
        self._made = 0  # files, so that no two have one name
        self._folder.mkdir(exist_ok=True)
        place = describe(aws, job).get("TensorBoardOutputConfig", {}).get("S3OutputPath")
        if not place:
            raise LoraError(f"{job} was made without a TensorBoardOutputConfig, and keeps no event log in S3")
        self._bucket, _, key = place.removeprefix("s3://").partition("/")
        self._prefix = f"{key.strip('/')}/{job}/tensorboard-output/".lstrip("/")

    def look(self) -> None:
        """Fetch what has been logged since the last look."""
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
        for item in (item for page in pages for item in page.get("Contents", ())):
            key, etag = item["Key"], item["ETag"]
            if "events.out.tfevents" in key and item["Size"] and self._etags.get(key) != etag:
                self._fetch(key, item["Size"])
                self._etags[key] = etag

    def _fetch(self, key: str, size: int) -> None:
        """What a log has grown by is added to its file, which TensorBoard holds open.

        The log of a job that went on from a state was cut there. Then the file is a new one, whose steps
        take the place of those that it repeats.
        """
        path = self.files.get(key)
        have = path.stat().st_size if path else 0
        if path and size >= have:
            start = max(0, have - _OVERLAP)
            came = self._get(key, start)
            if came.startswith(path.read_bytes()[start:]):
                with path.open("ab") as file:
                    file.write(came[have - start :])
                return
        content = self._get(key, 0)
        if path:
            path.unlink()
        self._made += 1
        self.files[key] = self._folder / f"events.out.tfevents.{self._made}"
        self.files[key].write_bytes(content)

    def _get(self, key: str, start: int) -> bytes:
        answer = self._s3.get_object(Bucket=self._bucket, Key=key, Range=f"bytes={start}-")
        return answer["Body"].read()


def _look(runs: Sequence[Run], every: float, over: threading.Event) -> None:
    """Until it is over. What cannot be had now is had at the next look."""
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 (lora --help needs none)

    while not over.wait(every):
        for one in runs:
            if over.is_set():
                return
            try:
                one.look()
            except (BotoCoreError, ClientError, OSError) as error:
                if not over.is_set():
                    warn(f"{one.job}: its event log could not be fetched, and is tried again: {error}")


@contextmanager
def _tensorboard(folder: Path, port: int, said: IO[bytes]) -> Iterator["subprocess.Popen[bytes]"]:
    """TensorBoard as a child, which ends with the block. What it says goes to `said`."""
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={folder}", "--host=127.0.0.1"]
    with subprocess.Popen(
        [*command, f"--port={port}", "--reload_interval=5"],
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is for us; then we end it
    ) as board:
        try:
            yield board
        finally:
            with suppress(ProcessLookupError):
                board.send_signal(signal.SIGTERM)
            try:
                board.wait(10)
            except subprocess.TimeoutExpired:
                board.kill()


def _answers(board: "subprocess.Popen[bytes]", port: int) -> bool:
    """Wait until it answers; False where it does not."""
    end = time.monotonic() + _STARTS
    while board.poll() is None and time.monotonic() < end:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        time.sleep(0.1)
    return False


def _free_port(asked: int | None) -> int:
    """The one asked for, 0 for a free one; None: TensorBoard's own, else a free one. Raises LoraError."""
    for port in (_PORT, 0) if asked is None else (asked,):
        with socket.socket() as listener, suppress(OSError, OverflowError):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            return int(listener.getsockname()[1])
    raise LoraError(f"--port {asked}: it cannot be listened on. Leave it out for a free one")
