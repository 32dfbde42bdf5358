"""An S3 server that has bad days: a proxy before a real one, which spoils some of its answers.

    with Proxy(s3.endpoint, Drawn(seed=7, rates=dict.fromkeys(KINDS, 0.005))) as proxy:
        ...AWS_ENDPOINT_URL_S3=proxy.address...
    assert proxy.faults["reset"]

Which answers are spoiled hangs on the seed, on what is asked for, and on how often it was asked for
before; not on the order in which a client's threads ask, nor on names of buckets and uploads, which are
new each time.
"""

import random
import re
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.s3 import S3Server

_S3_ERRORS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "internal_error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "damaged": (400, "BadDigest", "The CRC64NVME you specified did not match the calculated checksum."),
    "forgotten": (404, "NoSuchUpload", "The specified multipart upload does not exist."),
}

# What may befall a request. The first of them do not reach S3.
KINDS = (
    "slow_down",  # 503
    "internal_error",  # 500
    "expired",  # 400 ExpiredToken
    "reset",  # the connection, in the middle of the request's body, or before an answer
    "damaged",  # a body that is sent: S3's answer where it disagrees with its checksum
    "forgotten",  # an upload in parts, when it is to be put together
    "hollow",  # "200 OK", of a request that S3 only then begins with, and no body
    "lost",  # S3 has done it, and the connection is reset before it says so
    "stall",  # half of the answer, or nothing, then silence
    "broken",  # half of the answer's body, then a reset
    "cut",  # half of the answer's body, then an orderly end
    "empty",  # none of the answer's body, and an orderly end
    "corrupt",  # one byte of an object's body is another
)

_STALL_SECONDS = 25.0  # longer than a test waits; a client that waits for longer still does not hang it


def rates(total: float, s3: S3Server) -> dict[str, float]:
    """Probabilities that sum up to `total`; without what only a checksum tells where a server keeps none."""
    kinds = KINDS if s3.stand_in else KINDS[: KINDS.index("corrupt")]
    return dict.fromkeys(kinds, total / len(KINDS))


@dataclass(frozen=True)
class Asked:
    """A request, as a schedule sees it."""

    method: str
    path: str  # without the bucket
    headers: Mapping[str, str]  # by names in lower case
    length: int  # of its body, in bytes

    @property
    def name(self) -> str:
        """What is asked for, the same in every run."""
        named = re.sub(r"(?i)([?&]uploadId)=[^&]*", r"\1", self.path)
        return f"{self.method} {named} {self.headers.get('range', '')}"

    def can(self, kind: str) -> bool:
        """Whether a fault is one that a client must overcome. What no checksum covers cannot be told from
        what is meant: a listing, a range that is read alone."""
        whole = "range" not in self.headers or "if-match" in self.headers
        if kind == "damaged":
            return self.method == "PUT" and self.length > 0
        if kind == "corrupt":
            return self.method == "GET" and "list-type=" not in self.path and whole
        if kind in ("forgotten", "hollow"):
            return self.method == "POST" and (kind == "hollow" or "uploadId=" in self.path)
        return kind not in ("broken", "cut", "empty") or self.method in ("GET", "POST")


Schedule = Callable[[Asked, int], str | None]


def once(kind: str) -> Schedule:
    """The first try of every request fails."""
    return lambda asked, before: kind if before == 0 else None


def always(kind: str) -> Schedule:
    return lambda asked, before: kind


@dataclass(frozen=True)
class Drawn:
    """Each try of a request fails with these probabilities, by kind."""

    seed: int
    rates: Mapping[str, float]

    def __call__(self, asked: Asked, before: int) -> str | None:
        drawn = random.Random(f"{self.seed} {before} {asked.name}").random()
        for kind, rate in self.rates.items():
            if drawn < rate:
                return kind
            drawn -= rate
        return None


class Proxy:
    """Forwards to the server at `upstream`, with the faults of a schedule; counts them by kind."""

    def __init__(self, upstream: str, schedule: Schedule = lambda asked, before: None) -> None:
        self.schedule = schedule
        self.faults: Counter[str] = Counter()
        self.asked: list[Asked] = []
        self._upstream = urlsplit(upstream).netloc
        self._tries: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._released = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy._handle(self)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

            def log_message(self, *args: object) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *args: object) -> None:
                """A client that hangs up is what this is about."""

        self._listener = Listener(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._listener.server_address[1]}"

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._listener.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._listener.shutdown()
        self._listener.server_close()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length", 0))
        half = handler.rfile.read(length // 2)
        headers = {name.lower(): value for name, value in handler.headers.items()}
        path = re.sub("^/[^/?]*/?", "/", handler.path)
        kind = self._fault(Asked(handler.command, path, headers, length))
        body = half if kind == "reset" else half + handler.rfile.read(length - len(half))
        handler.close_connection = kind is not None
        if kind == "reset":
            _reset(handler.connection)
        elif kind in _S3_ERRORS:
            _answer_error(handler, *_S3_ERRORS[kind])
        elif kind == "hollow":
            _say(handler, 200, HTTPMessage(), 100)
        else:
            self._forward(handler, body, kind)

    def _fault(self, asked: Asked) -> str | None:
        with self._lock:
            self.asked.append(asked)
            before = self._tries[asked.name]
            self._tries[asked.name] += 1
        kind = self.schedule(asked, before)
        if kind is None or not asked.can(kind):
            return None
        with self._lock:
            self.faults[kind] += 1
        return kind

    def _forward(self, handler: BaseHTTPRequestHandler, body: bytes, kind: str | None) -> None:
        upstream = HTTPConnection(self._upstream, timeout=60)
        # As they came: the signature covers Host. The client has had its 100 Continue from the handler.
        upstream.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
        for name, value in handler.headers.items():
            if name.lower() not in ("expect", "connection"):
                upstream.putheader(name, value)
        upstream.endheaders(body or None)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if kind == "lost":
            _reset(handler.connection)
            return
        if kind == "corrupt" and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        kept = {"stall": len(content) // 2, "broken": len(content) // 2, "cut": len(content) // 2, "empty": 0}
        if kind == "stall" and not content:
            self._released.wait(_STALL_SECONDS)
            return
        _say(handler, answer.status, answer.headers, len(content))
        handler.wfile.write(content[: kept.get(kind or "", len(content))])
        handler.wfile.flush()
        if kind == "stall":
            self._released.wait(_STALL_SECONDS)
        if kind == "broken":
            _reset(handler.connection)


def _say(handler: BaseHTTPRequestHandler, status: int, headers: HTTPMessage, length: int) -> None:
    handler.send_response_only(status)
    if handler.command != "HEAD":
        del headers["Content-Length"]
        headers["Content-Length"] = str(length)
    for name, value in headers.items():
        if name.lower() not in ("connection", "transfer-encoding"):
            handler.send_header(name, value)
    if handler.close_connection:  # else the next request may be lost on it
        handler.send_header("Connection", "close")
    handler.end_headers()


def _answer_error(handler: BaseHTTPRequestHandler, status: int, code: str, message: str) -> None:
    body = f'<?xml version="1.0"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()
    told: Any = HTTPMessage()
    told["Content-Type"] = "application/xml"
    _say(handler, status, told, len(body))
    if handler.command != "HEAD":
        handler.wfile.write(body)


def _reset(connection: socket.socket) -> None:
    """Let the other side see a reset, not an end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


# The job with a client that waits for less long.
_IMPATIENT = """
import runpy, sys
from entrypoint.storage import retries
retries.SILENCE, retries.LASTS = float(sys.argv[1]), float(sys.argv[2])
sys.argv = sys.argv[5:]  # after: this, its two numbers, python, -m
runpy.run_module("entrypoint", run_name="__main__", alter_sys=True)
"""


def impatient(silence: float, lasts: float = 60.0) -> tuple[str, ...]:
    """The beginning of a job's command, which sets how many seconds S3 is waited for (retries.py)."""
    return (sys.executable, "-c", _IMPATIENT, str(silence), str(lasts))
