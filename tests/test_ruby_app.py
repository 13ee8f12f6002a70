"""examples/ruby-app: waits for the model, embeds, tries again when it is told to, stops cleanly."""

import contextlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator

import pytest
from servers import KEY, ROOT, Server

APP = ROOT / "examples" / "ruby-app" / "app.rb"

pytestmark = pytest.mark.skipif(shutil.which("ruby") is None, reason="needs ruby")


@contextlib.contextmanager
def running(url: str, **env: str) -> Iterator["subprocess.Popen[str]"]:
    given = {"EMBEDDER_URL": url, "VECTOR_EMBEDDER_API_KEY": KEY, "INTERVAL": "0.01", **env}
    with subprocess.Popen(
        ["ruby", str(APP)],
        env={**os.environ, "LANG": "C.UTF-8", **given},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_embeds_until_it_is_stopped(service: Server, number: signal.Signals) -> None:
    with running(service.url) as app:
        assert line(app) == f"ready: all-MiniLM-L6-v2 at {service.url}\n"
        first = ", ".join(f"{value:.4f}" for value in service.embed("What is deep learning?")[:4])
        assert line(app).startswith(f'"What is deep learning?": 384 dimensions [{first}, …] in ')
        app.send_signal(number)
        out, err = app.communicate(timeout=30)
        assert (app.returncode, err) == (0, "") and out.endswith("stopped\n")


def test_a_final_answer_ends_it(service: Server) -> None:
    with running(service.url, VECTOR_EMBEDDER_API_KEY="another") as app:
        _, err = app.communicate(timeout=30)
        assert app.returncode == 1 and err.startswith("cannot go on: 401 ")


ANSWERS: dict[str, list[tuple[int, object]]] = {
    "/health/ready": [(503, {"status": "loading"}), (200, {"status": "ready", "model": "m"})],
    "/embeddings": [
        (429, {"error": "queue full"}),
        (503, {"error": "loading"}),
        (200, {"embeddings": [[0.5, -1, 0.25, 0, 2]]}),
        (500, {"error": "gone wrong"}),
    ],
}


def test_it_waits_and_tries_again() -> None:
    """Against a server that answers what a real one answers only under load."""
    answers = {path: iter(each) for path, each in ANSWERS.items()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body = next(answers[self.path])
            self.send_response(status)
            if status in (429, 503):
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with running(url) as app:
                out, err = app.communicate(timeout=60)
        finally:
            server.shutdown()
            thread.join()
    lines = out.splitlines()
    assert lines[:2] == [f"waiting for {url}: answers 503", f"ready: m at {url}"]
    assert lines[2] == 'again in 0 s: 429 {"error": "queue full"}'
    assert lines[3] == 'again in 0 s: 503 {"error": "loading"}'
    assert lines[4].startswith(
        '"What is deep learning?": 5 dimensions [0.5000, -1.0000, 0.2500, 0.0000, …] in '
    )
    assert len(lines) == 5 and app.returncode == 1
    assert err == 'cannot go on: 500 {"error": "gone wrong"}\n'
