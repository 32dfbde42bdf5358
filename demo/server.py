"""An S3 server on loopback, for as long as the demo lives: moto's, in a process of its own.

The server ends when its standard input closes. So it outlives neither an exception, nor Ctrl-C, nor a
SIGKILL of the demo, on any system.
"""

import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_ACCOUNT = {  # moto takes any key; the person's own profile and credentials must play no part
    "AWS_ACCESS_KEY_ID": "demo",
    "AWS_SECRET_ACCESS_KEY": "demo-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}


@contextmanager
def s3_server() -> Iterator[str]:
    """Start the server on a free port; gives its address, and ends it when the block is left."""
    # In a session of its own, so that Ctrl-C does not end it while the job still publishes.
    with subprocess.Popen(
        [sys.executable, "-m", "demo.server"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        try:
            address = server.stdout.readline().strip()
            if not address:
                raise RuntimeError("the S3 server did not start; its own words are above")
            yield address
        finally:
            server.kill()


def environment(address: str, of: dict[str, str]) -> dict[str, str]:
    """`of`, with S3 at `address` and nothing of AWS or SageMaker that was in it before."""
    kept = {name: value for name, value in of.items() if not name.startswith(("AWS_", "SM_", "SAGEMAKER_"))}
    return kept | _ACCOUNT | {"AWS_ENDPOINT_URL_S3": address}


def _serve() -> None:
    from moto.server import ThreadedMotoServer  # noqa: PLC0415 (a second, and only the child needs it)

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    print(f"http://{host}:{port}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _serve()
