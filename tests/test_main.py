"""The service as a whole: vectors over HTTP, start, refusals to start, and what serving imports."""

import base64
import json
import os
import pathlib
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from conftest import NAME, WIDE
from servers import KEY, ROOT, Server, free_port, held, hold, launch, serve, wait_ready
from test_api_logs import until

from bake.samples import sample_texts
from engine.bundle import PARITY_FLOOR, Precision
from engine.encoder import cpu
from engine.openvino_backend import has_bf16
from image_embeddings import probe_picture
from settings import available_cores

TEXTS = 80
MIX = 20  # texts a batch


@pytest.fixture(scope="module")
def expected(sentence_transformer: Any) -> dict[str, tuple[list[str], Any]]:
    """For each bundle: texts of 1 token to its full window, and sentence-transformers'
    vectors of them."""
    result = {}
    threads = torch.get_num_threads()  # tiny_models has set one
    torch.set_num_threads(available_cores())
    own = sentence_transformer.max_seq_length
    tokenizer = sentence_transformer.tokenizer.backend_tokenizer
    for name, window in ((NAME, 256), (WIDE, 512)):
        sentence_transformer.max_seq_length = window
        tokenizer.no_truncation()
        texts = sample_texts(tokenizer, "", window, TEXTS)
        result[name] = texts, sentence_transformer.encode(texts, batch_size=4)
    sentence_transformer.max_seq_length = own
    torch.set_num_threads(threads)
    return result


@pytest.fixture(scope="module", params=["fp32", "bf16", "int8"])
def precise(request: Any, models_dir: pathlib.Path) -> Iterator[tuple[Precision, Server]]:
    if request.param == "bf16" and not has_bf16():
        pytest.skip("this CPU has no bf16")
    with serve(models_dir, PRECISION=request.param) as server:
        yield request.param, server


@pytest.mark.parametrize("name", [NAME, WIDE])
def test_vectors_over_http_are_the_models_own_alone_and_in_company(
    precise: tuple[Precision, Server], name: str, expected: dict[str, tuple[list[str], Any]]
) -> None:
    precision, server = precise
    texts, reference = expected[name]

    def batch(texts: list[str]) -> list[list[float]]:
        response = server.post("/embeddings/batch", {"texts": texts, "model": name})
        return [vector for (vector,) in response.json()["embeddings"]]

    with ThreadPoolExecutor(8) as pool:
        alone = np.array(list(pool.map(lambda text: server.embed(text, model=name), texts)))
        shuffled = np.random.default_rng(1).permutation(TEXTS)
        parts = np.split(shuffled, TEXTS // MIX)
        company = np.empty_like(alone)
        rows = pool.map(lambda part: batch([texts[row] for row in part]), parts)
        for part, vectors in zip(parts, rows):
            company[part] = vectors
    floor = PARITY_FLOOR[precision]
    same = {"fp32": 0.99999, "bf16": 0.9999, "int8": 0.999}[precision]
    cosines = {
        "alone": ((alone * reference).sum(axis=1), floor),
        "in company": ((company * reference).sum(axis=1), floor),
        "against each other": ((alone * company).sum(axis=1), same),
    }
    # All three of a row: they tell whether a vector or its reference is off.
    off = {
        int(row): [texts[row][:40], *(float(each[row]) for each, _ in cosines.values())]
        for each, least in cosines.values()
        for row in np.flatnonzero(~(each >= least))
    }
    assert not off, f"of {[*cosines]}: {off}"


def test_health_answers_while_the_model_loads_and_calls_wait_for_it(
    clip_models_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (name,) = [folder.name for folder in clip_models_dir.iterdir()]
    shutil.copytree(clip_models_dir / name, tmp_path / name, copy_function=os.symlink)
    content = hold(tmp_path / name)
    with (
        serve(tmp_path, wait=False) as server,
        ThreadPoolExecutor(1) as pool,
        held(server, tmp_path / name) as pipe,
    ):
        response = server.client.get("/health/ready")
        assert (response.status_code, response.json()) == (503, {"status": "loading"})
        assert response.headers["Retry-After"] == "1"
        assert server.client.get("/health").json() == {"status": "ok"}
        waiting = pool.submit(server.embed, "waits for the model instead of failing")
        time.sleep(0.3)
        assert not waiting.done()
        pipe.write(content)
        pipe.close()
        assert len(waiting.result()) > 1
        wait_ready(server)
        ready = server.client.get("/health/ready")
        assert ready.json() == {"status": "ready", "model": name, "supports_images": True}


@pytest.mark.parametrize("later", [0.01, 0.03, 0.05, 0.07, 0.1])  # seconds: while it starts
def test_sigterm_while_a_worker_starts_ends_it_cleanly(
    models_dir: pathlib.Path, later: float
) -> None:
    with serve(models_dir, wait=False) as server:
        until(lambda: "Booting worker" in server.log, every=0.002)
        time.sleep(later)
        started = time.monotonic()
        server.process.terminate()
        assert server.process.wait(30) == 0
        assert time.monotonic() - started < 8, "it did not see the signal"
        assert "Traceback" not in server.log


def test_limits_that_the_probe_would_exceed_do_not_stop_the_service(
    models_dir: pathlib.Path,
) -> None:
    with serve(models_dir, MAX_TEXT_SIZE="3", MAX_REQUEST_TOKENS="3") as server:
        assert len(server.embed("cat")) == 384
        assert server.post("/embeddings", {"text": "cats"}).status_code == 413


def test_the_engine_is_held_below_what_the_cpu_has(models_dir: pathlib.Path) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("our own engine is for x86-64")
    with serve(models_dir, PRECISION="fp32", ENCODER_ISA="portable") as server:
        info = server.client.get("/info").json()
        assert (info["engine"], info["instruction_set"]) == ("own engine", "portable")
        assert "fp32 by own engine (portable)" in server.log
        assert len(server.embed("cat")) == 384


@pytest.mark.parametrize("pictures", [False, True])
def test_serving_imports_no_torch_transformers_or_sentence_transformers(
    models_dir: pathlib.Path, clip_models_dir: pathlib.Path, pictures: bool
) -> None:
    route, body = "/embeddings", {"text": "hello"}
    if pictures:
        file = base64.b64encode(probe_picture()).decode()
        route, body = "/embeddings/image", {"image": file}
    program = (
        "import sys, json, main\n"
        "from werkzeug.test import Client\n"
        "client = Client(main.Application())\n"
        f"headers = {{'X-API-Key': '{KEY}'}}\n"
        f"answer = client.post('{route}', json={body}, headers=headers)\n"
        "modules = sorted({name.split('.')[0] for name, made in sys.modules.items() if made})\n"
        "print(json.dumps([answer.status_code, modules]))"
    )
    folder = clip_models_dir if pictures else models_dir
    environ = {**os.environ, "MODELS_DIR": str(folder), "VECTOR_EMBEDDER_API_KEY": KEY}
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environ, capture_output=True, check=True
    )
    status, modules = json.loads(out.stdout)
    assert status == 200
    # openvino_telemetry would tell Google Analytics of every start.
    assert "openvino_telemetry" not in modules
    heavy = {"torch", "transformers", "sentence_transformers", "nncf", "scipy", "sklearn", "pandas"}
    assert not (heavy | {"torchvision", "opentelemetry", "google", "requests"}) & set(modules)
    # Half of the start, where it is not needed.
    assert ("openvino" in modules) == (cpu.fastest("fp32") is None)
    assert ("PIL" in modules) == pictures


def test_garbage_is_collected_once_gunicorn_has_read_its_file(models_dir: pathlib.Path) -> None:
    program = (
        "import gc, runpy\n"
        "for _ in range(2):\n"  # SIGHUP reads it again
        "    runpy.run_path('gunicorn.conf.py')\n"
        "    print(gc.isenabled(), gc.get_freeze_count() > 10_000)"
    )
    environ = {**os.environ, "MODELS_DIR": str(models_dir)}
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environ, capture_output=True, check=True
    )
    assert out.stdout.split() == [b"True"] * 4


def start_and_end(
    models_dir: pathlib.Path, tmp_path: pathlib.Path, prefix: Sequence[str] = (), **env: str
) -> tuple[int, str]:
    """Start a service that must end by itself. Returns: its exit code and what it printed."""
    log = tmp_path / "log"
    process = launch(models_dir, log, free_port(), prefix, **env)
    try:
        return process.wait(30), log.read_text()
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"PORT": "http"}, "cannot start: PORT='http'; it takes a whole number from 1 to 65535"),
        ({"HOST": "192.0.2.1"}, "cannot start: HOST='192.0.2.1': cannot listen there"),
        ({"PRECISION": "fp8"}, "cannot start: PRECISION='fp8'; it takes one of auto, fp32"),
        ({"EMBEDDING_MODEL": "x"}, f"cannot start: no model 'x' here; there is: {NAME}, {WIDE}"),
        (
            {"EMBEDDING_MODEL": "x", "MODEL_ALIASES": f"*={NAME}"},
            f"cannot start: no model 'x' here; there is: {NAME}, {WIDE}",
        ),
        (
            {"EMBEDDING_MODEL": "a", "MODEL_ALIASES": f"a={NAME}:query"},
            "cannot start: EMBEDDING_MODEL=a: this alias has the prompt 'query'",
        ),
        ({"MODEL_ALIASES": "a=x"}, "cannot start: MODEL_ALIASES: a=x: no model 'x' here; there is"),
        (
            {"MODEL_ALIASES": f"a={NAME}:x"},
            f"MODEL_ALIASES: a={NAME}:x: model {NAME} has no prompt",
        ),
        ({"MODEL_ALIASES": "a"}, "cannot start: MODEL_ALIASES='a'; it takes alias=name,alias=name"),
        ({"MODELS_DIR": "/absent"}, "cannot start: MODELS_DIR /absent: No such file or directory"),
        ({"KEY_LIMITS": "app"}, "cannot start: KEY_LIMITS='app'; it takes name:limit=number"),
    ],
)
def test_a_wrong_setting_ends_the_start_with_one_line(
    models_dir: pathlib.Path, tmp_path: pathlib.Path, env: dict[str, str], says: str
) -> None:
    code, log = start_and_end(models_dir, tmp_path, **env)
    assert code != 0
    assert says in log and len(log.splitlines()) == 1


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"K_SERVICE": "s"},
        {"HOST": "0.0.0.0"},
        {"HOST": "127.0.0.1", "GUNICORN_CMD_ARGS": "--bind 0.0.0.0:0"},
        {"HOST": "127.0.0.1", "GUNICORN_CMD_ARGS": "--bind 127.0.0.1:0 --bind [::]:0"},
    ],
    ids=str,
)
def test_the_default_key_is_for_this_machine(
    models_dir: pathlib.Path, tmp_path: pathlib.Path, env: dict[str, str]
) -> None:
    code, log = start_and_end(models_dir, tmp_path, VECTOR_EMBEDDER_API_KEY="abc123", **env)
    (line,) = [line for line in log.splitlines() if "cannot start" in line]
    assert code != 0 and "VECTOR_EMBEDDER_API_KEY is the default, which everybody knows" in line
    assert "HOST=127.0.0.1 to serve this machine alone, or ALLOW_DEFAULT_KEY=1" in line
    assert "Traceback" not in log


# Run a command with a socket as its file 3, as systemd does.
INHERIT = """
import os, socket, sys
listening = socket.create_server((sys.argv.pop(1), 0))
os.dup2(listening.fileno(), 3)
os.set_inheritable(3, True)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize(
    "env", [{"LISTEN_FDS": "1"}, {"GUNICORN_CMD_ARGS": "--bind fd://3"}], ids=str
)
def test_the_default_key_is_for_this_machine_whoever_opened_the_socket(
    models_dir: pathlib.Path, tmp_path: pathlib.Path, env: dict[str, str]
) -> None:
    own = {"VECTOR_EMBEDDER_API_KEY": "abc123", "HOST": "127.0.0.1"}
    prefix = (sys.executable, "-c", INHERIT, "0.0.0.0")
    code, log = start_and_end(models_dir, tmp_path, prefix, **own, **env)
    (line,) = [line for line in log.splitlines() if "cannot start" in line]
    assert code == 1 and "which everybody knows, and others can reach 0.0.0.0" in line
    assert "Traceback" not in log and "Booting worker" not in log


def test_the_default_key_serves_an_inherited_socket_of_this_machine(
    models_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """HOST has no part in it."""
    prefix = (sys.executable, "-c", INHERIT, "127.0.0.1")
    own = {"VECTOR_EMBEDDER_API_KEY": "abc123", "LISTEN_FDS": "1"}
    process = launch(models_dir, log := tmp_path / "log", free_port(), prefix, **own)
    try:
        until(lambda: "main: serving" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_a_name_that_is_no_address_ends_the_start_with_one_line(
    models_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    bind = {"GUNICORN_CMD_ARGS": "--bind no-such-host.invalid:5001", "LOG_LEVEL": "warning"}
    code, log = start_and_end(models_dir, tmp_path, **bind)
    (line,) = log.splitlines()
    assert code == 1 and "cannot start: cannot listen on 'no-such-host.invalid' (" in line


def test_a_taken_port_ends_the_start_with_one_line(
    models_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    log = tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        process = launch(models_dir, log, port, LOG_LEVEL="warning")
        try:
            assert process.wait(30) == 1
        finally:
            process.kill()
    (line,) = log.read_text().splitlines()
    said = f"cannot start: PORT={port} is taken by another process; stop that, or set another PORT"
    assert line.endswith(said)


def copy(models_dir: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    shutil.copytree(models_dir / NAME, folder / "models" / NAME)
    return folder / "models"


def test_a_damaged_bundle_ends_the_start_with_one_line(
    models_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    models = copy(models_dir, tmp_path)
    weights = models / NAME / "text.bin"
    data = bytearray(weights.read_bytes())
    data[1_000_000] ^= 1
    weights.write_bytes(data)
    code, log = start_and_end(models, tmp_path)
    assert code != 0 and len(log.splitlines()) == 1
    assert log.startswith(f"cannot start: bundle {models / NAME}: text.bin is damaged")


def test_a_bundle_that_cannot_be_loaded_ends_the_whole_service(
    models_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Its files are as the manifest says, but its probe no longer gives its vector."""
    models = copy(models_dir, tmp_path)
    path = models / NAME / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["probe"]["vector"] = manifest["probe"]["vector"][::-1]
    path.write_text(json.dumps(manifest))
    code, log = start_and_end(models, tmp_path)
    assert code == 3
    (line,) = [line for line in log.splitlines() if "cannot serve" in line]
    assert "its probe text is off (cosine " in line
    assert "Traceback" not in log


def test_a_bundle_without_the_precision_that_is_asked_for(
    models_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    models = copy(models_dir, tmp_path)
    path = models / NAME / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["precisions"].remove("int8")
    path.write_text(json.dumps(manifest))
    code, log = start_and_end(models, tmp_path, PRECISION="int8")
    assert code == 3 and f"PRECISION=int8, but bundle {NAME} was baked without it" in log


def test_a_warning_for_the_default_key_and_for_what_is_no_setting(
    models_dir: pathlib.Path,
) -> None:
    default = {"VECTOR_EMBEDDER_API_KEY": "abc123", "ALLOW_DEFAULT_KEY": "1"}
    wrong = {"TOKENIZER_MODEL": "x", "MAX_TEXT_PER_BATCH": "9"}
    with serve(models_dir, **wrong, **default) as server:
        assert "WARNING start: VECTOR_EMBEDDER_API_KEY is the default" in server.log
        assert "WARNING start: TOKENIZER_MODEL is ignored" in server.log
        said = "MAX_TEXT_PER_BATCH is not a setting; did you mean MAX_TEXTS_PER_BATCH?\n"
        assert f"WARNING start: {said}" in server.log
        answer = server.post("/embeddings", {"text": "x"}, headers={"X-API-Key": "abc123"})
        assert answer.status_code == 200


def test_several_workers_serve(models_dir: pathlib.Path) -> None:
    with serve(models_dir, WEB_CONCURRENCY="2") as server:
        with ThreadPoolExecutor(16) as pool:
            vectors = np.array(list(pool.map(server.embed, ["the same"] * 64)))
        assert (vectors @ vectors[0]).min() >= 0.9999


def test_gunicorns_own_options_divide_the_cores_and_may_preload(models_dir: pathlib.Path) -> None:
    with serve(models_dir, GUNICORN_CMD_ARGS="--workers 2 --preload") as server:
        assert len(server.embed("hello")) == 384
        threads = max(1, -(-available_cores() // 2))
        line = f"2 workers, in each {threads} inference threads"
        until(lambda: server.log.count(line) >= 2)  # the other one loads yet
        assert server.log.count(line) == 2


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_both_kinds_of_addresses_are_listened_to_by_default(models_dir: pathlib.Path) -> None:
    with serve(models_dir) as server:
        for host in ("127.0.0.1", "[::1]"):
            url = f"http://{host}:{server.port}/nowhere"
            assert httpx.get(url, trust_env=False).status_code == 401
        until(lambda: " 127.0.0.1 " in server.log and " ::1 " in server.log)  # it logs afterwards
        assert "::ffff:" not in server.log


def test_host_chooses_the_address(models_dir: pathlib.Path) -> None:
    with serve(models_dir, HOST="127.0.0.1") as server:
        assert f"http://127.0.0.1:{server.port}" in server.log
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://[::1]:{server.port}/health", trust_env=False)
