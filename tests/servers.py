"""Real gunicorn processes for the tests."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

ROOT = pathlib.Path(__file__).parent.parent
KEY = "test-key"
START_TIMEOUT = 60


@dataclass
class Server:
    """A running service. `client` sends the key; `http()` opens a raw socket."""

    process: "subprocess.Popen[bytes]"
    port: int
    log_path: pathlib.Path
    client: httpx.Client

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text()

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


def letters(count: int) -> str:
    """A text of `count` tokens without two equal chunks, which would be computed once."""
    return " ".join(
        "a" if at % 97 else "bcdefghijklmnopqrstuvwxyz"[at // 97 % 25] for at in range(count)
    )


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def launch(
    models_dir: pathlib.Path,
    log_path: pathlib.Path,
    port: int,
    prefix: Sequence[str] = (),
    **env: str,
) -> "subprocess.Popen[bytes]":
    """Start the service as the README does. Nothing is waited for."""
    environ = {
        **os.environ,
        "MODELS_DIR": str(models_dir),
        "PORT": str(port),
        "VECTOR_EMBEDDER_API_KEY": KEY,
        **env,
    }
    with log_path.open("wb") as log:
        return subprocess.Popen(
            [*prefix, sys.executable, "-m", "gunicorn", "main:app"],
            cwd=ROOT,
            env=environ,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


@contextlib.contextmanager
def serve(
    models_dir: pathlib.Path, *, wait: bool = True, prefix: Sequence[str] = (), **env: str
) -> Iterator[Server]:
    """A service on a free port, ready unless `wait` is False, stopped by SIGTERM at the end.

    `prefix` is a command that runs the service's.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        log_path = pathlib.Path(folder) / "log"
        process = launch(models_dir, log_path, port, prefix, **env)
        client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            headers={"X-API-Key": KEY},
            timeout=60,
            trust_env=False,
        )
        server = Server(process, port, log_path, client)
        try:
            if wait:
                wait_ready(server)
            yield server
        finally:
            client.close()
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(30)


def wait_ready(server: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise AssertionError(f"the service ended: {server.log}")
        with contextlib.suppress(httpx.TransportError):
            if server.client.get("/health/ready").status_code == 200:
                return
        time.sleep(0.02)
    raise AssertionError(f"the service did not become ready: {server.log}")
