"""Start a service as the README does, wait until it is ready, look at its processes, stop it."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

from loadtest.client import get
from settings import available_cores

ROOT = pathlib.Path(__file__).parent.parent
START_TIMEOUT = 240.0  # seconds
STOP_TIMEOUT = 60.0
_TCP_ESTABLISHED = "01"


class Service:
    """A service in processes of its own, started at once and not yet ready. Times are in seconds.

    Args:
        log_path: the file for its output, made anew.
        environ: variables that differ from this process's environment.
        port: to listen on; None means a free one.
        cores: the cores it may run on; None means those of this process.
        prefix: a command that runs the service's command.
    """

    def __init__(
        self,
        log_path: pathlib.Path,
        environ: Mapping[str, str],
        *,
        port: int | None = None,
        cores: Sequence[int] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.log_path, self.port = log_path, port or free_port()
        self.ready_seconds = 0.0  # from the start of the process to the first 200 on /health/ready
        self.stop_seconds = 0.0  # from SIGTERM to the exit
        models_dir = str(pathlib.Path(os.environ.get("MODELS_DIR") or "models").resolve())
        variables = {"MODELS_DIR": models_dir, "PORT": str(self.port), **environ}
        usual = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores or usual)  # a child process inherits it
        self._started = time.perf_counter()
        try:
            with log_path.open("wb") as log:
                self.process = subprocess.Popen(
                    [*prefix, sys.executable, "-m", "gunicorn", "main:app"],
                    cwd=ROOT,
                    env={**os.environ, **variables},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        finally:
            os.sched_setaffinity(0, usual)

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

    def connections(self) -> dict[int, int]:
        """How many clients' connections each worker holds."""
        port, held = f":{self.port:04X}", {}
        tables = _read("/proc/net/tcp") + _read("/proc/net/tcp6")
        rows = [line.split() for line in tables.splitlines()]
        inodes = {row[9] for row in rows if row[3] == _TCP_ESTABLISHED and row[1].endswith(port)}
        for pid in self.workers():
            held[pid] = 0
            with contextlib.suppress(OSError):  # it has ended
                for link in pathlib.Path(f"/proc/{pid}/fd").iterdir():
                    held[pid] += os.readlink(link)[8:-1] in inodes  # socket:[inode]
        return held

    def memory(self) -> tuple[float, float]:
        """PSS and RSS of all its processes, MiB."""
        pss = rss = 0
        for pid in (self.process.pid, *self.workers()):
            for line in _read(f"/proc/{pid}/smaps_rollup").splitlines()[1:]:
                name, value = line.split(":", 1)
                pss += int(value.split()[0]) if name == "Pss" else 0
                rss += int(value.split()[0]) if name == "Rss" else 0
        return pss / 1024, rss / 1024

    def cpu_seconds(self) -> dict[int, float]:
        """Processor time that each worker has used so far."""
        return {pid: cpu_seconds(pid) for pid in self.workers()}


def children(pid: int) -> list[int]:
    return [int(child) for child in _read(f"/proc/{pid}/task/{pid}/children").split()]


def cpu_seconds(pid: int) -> float:
    """Processor time of one process."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


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
    has LOG_LEVEL.

    Raises: OSError when it does not become ready or does not stop.
    """
    with tempfile.TemporaryDirectory() as folder:
        environ = {"LOG_LEVEL": "warning", **(environ or {})}
        service = Service(pathlib.Path(folder) / "log", environ, cores=cores)
        try:
            service.wait_ready()
            yield service
        finally:
            service.stop()
