"""tests/smoke.py: the services it accepts and refuses."""

import subprocess
import sys

from servers import KEY, ROOT, Server, free_port


def smoke(url: str, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "tests/smoke.py", "--url", url, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_good_service(service: Server) -> None:
    done = smoke(service.url, "--key", KEY)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ok: all-MiniLM-L6-v2 at fp32, 384 dimensions, ready after ")


def test_another_key(service: Server) -> None:
    done = smoke(service.url, "--key", "another")
    assert done.returncode == 1
    line = f"smoke test of {service.url}: /v1/models answers 401: "
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_nobody_there() -> None:
    done = smoke(f"http://127.0.0.1:{free_port()}", "--wait", "0")
    assert done.returncode == 1
    assert "not ready after 0 s; " in done.stderr and "refused" in done.stderr
