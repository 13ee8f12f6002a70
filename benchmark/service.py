"""A service of the tool's own: started as the README does, measured from outside, stopped."""

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

from benchmark.traffic import get
from settings import available_cores

ROOT = pathlib.Path(__file__).parent.parent
START_TIMEOUT = 240.0  # seconds


@dataclass
class Service:
    """A running service. Times are in seconds."""

    url: str
    pid: int
    ready: float  # from the start of the process to the first 200 on /health/ready
    stopped: float = 0.0  # from SIGTERM to the exit, once it has exited

    def memory(self) -> tuple[float, float]:
        """PSS and RSS of all its processes, MiB."""
        pss = rss = 0
        for pid in _family(self.pid):
            with contextlib.suppress(OSError):  # ended meanwhile
                rollup = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
                fields = dict(line.split(":", 1) for line in rollup.splitlines()[1:])
                pss += int(fields["Pss"].split()[0])
                rss += int(fields["Rss"].split()[0])
        return pss / 1024, rss / 1024


def _family(pid: int) -> list[int]:
    """A process and all its descendants."""
    pids = [pid]
    for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                pids += _family(int(child))
    return pids


def available() -> list[int]:
    """The processors this process may use, no more than its quota is worth."""
    return sorted(os.sched_getaffinity(0))[: available_cores()]


@contextlib.contextmanager
def service(cores: Sequence[int] | None = None, **environ: str) -> Iterator[Service]:
    """Start a service on a free port, wait until it is ready, stop it at the end.

    Args:
        cores: run it on these alone; None means wherever this process may run.
        environ: settings that differ from this process's environment.

    Raises: OSError, with the service's last words, when it does not become ready.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    models_dir = str(pathlib.Path(os.environ.get("MODELS_DIR") or "models").resolve())
    ours = {"MODELS_DIR": models_dir, "PORT": str(port), "LOG_LEVEL": "warning", **environ}
    with tempfile.TemporaryFile() as log:
        usual = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores or usual)  # a child has its parent's
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "main:app"],
            cwd=ROOT,
            env={**os.environ, **ours},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        os.sched_setaffinity(0, usual)
        try:
            url = f"http://127.0.0.1:{port}"
            while not _ready(url):
                late = time.perf_counter() > started + START_TIMEOUT
                if late or process.poll() is not None:
                    log.seek(0)
                    said = log.read().decode(errors="replace").strip().splitlines()
                    raise OSError(f"the service did not start: {said[-1] if said else 'no word'}")
                time.sleep(0.005)
            running = Service(url, process.pid, time.perf_counter() - started)
            yield running
        finally:
            process.send_signal(signal.SIGTERM)
            told = time.perf_counter()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        running.stopped = time.perf_counter() - told


def _ready(url: str) -> bool:
    try:
        return get(url, "/health/ready")[0] == 200
    except OSError:
        return False
