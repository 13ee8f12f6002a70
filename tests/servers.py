"""Services that the tests start, with a client that sends the key."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import httpx

from loadtest import service
from loadtest.service import ROOT, Service

__all__ = ["KEY", "ROOT", "Server", "free_port", "held", "hold", "launch", "letters", "serve"]
__all__ += ["wait_ready"]
KEY = "test-key"
START_TIMEOUT = 300.0  # seconds; on a busy machine the import of torch takes a minute


def free_port() -> int:
    """A port that is free. Each of pytest-xdist's workers asks here for other ports than the rest,
    because a port is handed out a while before its server listens.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    while True:
        port = service.free_port()
        if port // 2 % workers == worker:  # Linux prefers odd ports
            return port


class Server(Service):
    """A service. `client` sends the key; `http()` opens a raw socket."""

    def __init__(
        self,
        models_dir: pathlib.Path,
        log_path: pathlib.Path,
        port: int | None = None,
        prefix: Sequence[str] = (),
        **env: str,
    ) -> None:
        # However slow the machine is, no work is refused for the time that it would wait. Nor does
        # a request that waits for a thread get its 429 before the client's timeout.
        patient = {"MAX_QUEUE_SECONDS": "1000"}
        own = {"MODELS_DIR": str(models_dir), "VECTOR_EMBEDDER_API_KEY": KEY, "HOST": ""}
        env = {**own, **patient, **env}
        self.launched = time.time()
        super().__init__(log_path, env, port=port or free_port(), prefix=prefix)
        self.client = httpx.Client(
            base_url=self.url, headers={"X-API-Key": KEY}, timeout=60, trust_env=False
        )

    def is_ready(self) -> bool:
        try:
            return self.client.get("/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def post(self, path: str, body: Any = None, **kwargs: Any) -> httpx.Response:
        if body is not None:
            kwargs["json"] = body
        return self.client.post(path, **kwargs)

    def embed(self, text: str, **fields: Any) -> list[float]:
        """A good request's vector, through the native route."""
        response = self.post("/embeddings", {"text": text, **fields})
        assert response.status_code == 200, response.text
        vector: list[float] = response.json()["embeddings"][0]
        return vector

    def http(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


def hold(bundle: pathlib.Path) -> bytes:
    """Make a pipe of a file that a model of pictures reads while it loads, so that loading waits.
    The tokenizer's would not do: it is read under the interpreter's lock. gunicorn's master reads
    all files that the manifest lists, so this one leaves the list.

    Args:
        bundle: a copy, or a folder of links.

    Returns: what the file held.
    """
    file, path = bundle / "preprocess.json", bundle / "manifest.json"
    content, manifest = file.read_bytes(), json.loads(path.read_bytes())
    del manifest["files"][file.name]
    for link in (file, path):
        link.unlink()
    path.write_text(json.dumps(manifest))
    os.mkfifo(file)
    return content


def held(server: Server, bundle: pathlib.Path) -> BinaryIO:
    """The other end of the pipe that `hold` made, once the service reads it."""
    while True:
        try:
            end = os.open(bundle / "preprocess.json", os.O_WRONLY | os.O_NONBLOCK)
            return os.fdopen(end, "wb")
        except OSError:  # nobody reads it yet
            assert server.process.poll() is None, server.log
            time.sleep(0.01)


def letters(count: int) -> str:
    """A text of `count` tokens without two equal chunks, which would be computed once."""
    return " ".join(
        "a" if at % 97 else "bcdefghijklmnopqrstuvwxyz"[at // 97 % 25] for at in range(count)
    )


def launch(
    models_dir: pathlib.Path,
    log_path: pathlib.Path,
    port: int,
    prefix: Sequence[str] = (),
    **env: str,
) -> "subprocess.Popen[bytes]":
    """The process of a service that is expected to end by itself. Nothing is waited for.

    `prefix` is a command that runs the service's.
    """
    server = Server(models_dir, log_path, port, prefix, **env)
    server.client.close()
    return server.process


@contextlib.contextmanager
def serve(
    models_dir: pathlib.Path, *, wait: bool = True, prefix: Sequence[str] = (), **env: str
) -> Iterator[Server]:
    """A service on a free port, ready unless `wait` is False, stopped at the end.

    `prefix` is a command that runs the service's.
    """
    with tempfile.TemporaryDirectory() as folder:
        server = Server(models_dir, pathlib.Path(folder) / "log", prefix=prefix, **env)
        try:
            if wait:
                wait_ready(server)
            yield server
        finally:
            server.client.close()
            server.stop()


def wait_ready(server: Server) -> None:
    """Raises: AssertionError, with the log, when the service does not become ready."""
    try:
        server.wait_ready(START_TIMEOUT)
    except OSError as error:
        raise AssertionError(server.log) from error
