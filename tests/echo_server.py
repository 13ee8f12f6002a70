"""The server alone, with an application that echoes requests (echo_app.py)."""

import contextlib
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

from servers import ROOT, START_TIMEOUT, free_port


@contextlib.contextmanager
def serve_echo(folder: pathlib.Path, **limits: float) -> Iterator[tuple[str, int]]:
    """The server with an application that echoes, and these limits (server.limits.Limits)."""
    port, config = free_port(), folder / f"gunicorn-{len(list(folder.iterdir()))}.py"
    config.write_text(
        "from server.limits import Limits\n"
        "from server.worker import Worker\n"
        f"Worker.limits = Limits(**{limits!r})\n"
        "worker_class, keepalive = Worker, 75\n"
        f"bind, pythonpath = '127.0.0.1:{port}', 'tests'\n"
        "control_socket_disable = True\n"
    )
    command = [sys.executable, "-m", "gunicorn", "-c", str(config), "echo_app:app"]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            alive = process.poll() is None and time.monotonic() < deadline
            assert alive, (folder / "log").read_text()
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.02)
        yield "127.0.0.1", port
    finally:
        process.terminate()
        process.wait(30)
