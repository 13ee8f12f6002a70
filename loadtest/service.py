"""Start a service as the README does, wait until it is ready, look at its processes, stop it."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from loadtest.client import get
from settings import available_cores

ROOT = pathlib.Path(__file__).parent.parent
START_TIMEOUT = 240.0  # seconds
STOP_TIMEOUT = 60.0


class Service:
    """A service in processes of its own, started at once and not yet ready. Times are in seconds.

    Args:
        log_path: the file for its output, made anew.
        environ: variables that differ from this process's environment.
        port: to listen on; None means a free one.
        prefix: a command that runs the service's command.
    """

    def __init__(
        self,
        log_path: pathlib.Path,
        environ: Mapping[str, str],
        *,
        port: int | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.log_path, self.port = log_path, port or free_port()
        self.ready_seconds = 0.0  # from the start of the process to the first 200 on /health/ready
        self.stop_seconds = 0.0  # from SIGTERM to the exit
        models_dir = str(pathlib.Path(os.environ.get("MODELS_DIR") or "models").resolve())
        # On loopback the service takes the default key.
        own = {"MODELS_DIR": models_dir, "PORT": str(self.port), "HOST": "127.0.0.1"}
        variables = {**own, **environ}
        self._started = time.perf_counter()
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "gunicorn", "main:app"],
                cwd=ROOT,
                env={**os.environ, **variables},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def is_ready(self) -> bool:
        try:
            return get(self.url, "/health/ready")[0] == 200
        except OSError:
            return False

    def wait_ready(self, timeout: float = START_TIMEOUT) -> None:
        """Raises: OSError, with the last line of the log, when it ends or is not ready in time."""
        while not self.is_ready():
            late = time.perf_counter() > self._started + timeout
            if late or self.process.poll() is not None:
                lines = self.log.strip().splitlines() or ["no output"]
                raise OSError(f"the service did not start: {lines[-1]}")
            time.sleep(0.005)
        self.ready_seconds = time.perf_counter() - self._started

    def stop(self) -> int:
        """Send SIGTERM, unless it has ended, and wait for the exit.

        Returns: the exit code.
        Raises: OSError when it does not end within STOP_TIMEOUT; it is killed then.
        """
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        told = time.perf_counter()
        try:
            code = self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise OSError(f"the service did not stop within {STOP_TIMEOUT:.0f} s") from None
        self.stop_seconds = time.perf_counter() - told
        return code

    def workers(self) -> list[int]:
        """Process ids of the workers."""
        return children(self.process.pid)

    def memory(self) -> tuple[float, float]:
        """PSS and RSS of all its processes, MiB."""
        total = Counter[str]()
        for pid in (self.process.pid, *self.workers()):
            for name, kilobytes in re.findall(
                r"^(Pss|Rss): +(\d+)", _read(f"/proc/{pid}/smaps_rollup"), re.MULTILINE
            ):
                total[name] += int(kilobytes)
        return total["Pss"] / 1024, total["Rss"] / 1024


def children(pid: int) -> list[int]:
    return [int(child) for child in _read(f"/proc/{pid}/task/{pid}/children").split()]


def _read(path: str) -> str:
    """A file of /proc; nothing where its process has ended."""
    try:
        return pathlib.Path(path).read_text()
    except OSError:
        return ""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def available() -> list[int]:
    """The cores this process may use, no more than its quota is worth."""
    return sorted(os.sched_getaffinity(0))[: available_cores()]


@contextlib.contextmanager
def serve(
    environ: Mapping[str, str] | None = None, cores: Sequence[int] | None = None
) -> Iterator[Service]:
    """A service on a free port, ready, stopped at the end. It logs warnings only, unless `environ`
    has LOG_LEVEL. It runs on all cores of this process, or on `cores`.

    Raises: OSError when it does not become ready or does not stop.
    """
    with tempfile.TemporaryDirectory() as folder:
        environ = {"LOG_LEVEL": "warning", **(environ or {})}
        service = Service(pathlib.Path(folder) / "log", environ)
        try:
            if cores:  # long before the service counts them
                os.sched_setaffinity(service.process.pid, cores)
            service.wait_ready()
            yield service
        finally:
            service.stop()
