"""Keys as tenants: names in log and metrics, limits, fair admission, rotation without a restart."""

import contextlib
import json
import pathlib
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from servers import Server, letters, serve
from test_api_logs import entry, until
from test_server import children

KEYS = {
    "slow": "slow-key-0123456789",  # the first, with which a worker warms up
    "app": "app-key-0123456789",
    "batch": "batch-key-0123456789",
    "few": "few-key-0123456789",
    "#5": "a-key-without-a-name",
}
LIMITS = "slow:requests_per_second=0.01;tokens_per_minute=600,few:concurrent_tokens=50"
BATCH = 2000  # tokens of a batch


@pytest.fixture(scope="module")
def tenants(models_dir: pathlib.Path) -> Iterator[Server]:
    """A service with keys of several tenants, and a short queue."""
    keys = [key if name[0] == "#" else f"{name}:{key}" for name, key in KEYS.items()]
    with serve(
        models_dir,
        PRECISION="fp32",
        INFERENCE_THREADS="1",
        LOG_FORMAT="json",
        VECTOR_EMBEDDER_API_KEY=",".join(keys),
        KEY_LIMITS=LIMITS,
        MAX_QUEUE_TOKENS="8000",
        MAX_REQUEST_TOKENS="8000",
    ) as server:
        yield server


def ask(server: Server, name: str, body: Any = None, path: str = "/embeddings") -> httpx.Response:
    """A request with a tenant's key."""
    headers = {"X-API-Key": KEYS[name]}
    return server.client.post(path, json=body or {"text": "a short query"}, headers=headers)


def counted(server: Server, metric: str, name: str) -> float:
    text = server.client.get("/metrics", headers={"X-API-Key": KEYS["#5"]}).text
    found = re.search(rf'^embedder_{metric}_total{{key_name="{name}"}} (\S+)$', text, re.MULTILINE)
    assert found, text
    return float(found[1])


# Names


def test_a_keys_name_is_in_the_log_and_the_key_is_not(tenants: Server) -> None:
    for name, logged in (("app", "app"), ("#5", None)):
        found = entry(tenants, ask(tenants, name).headers["X-Request-Id"])
        assert found.get("keyName") == logged
    nobody = tenants.client.post("/embeddings", headers={"X-API-Key": "app-key"})
    assert "keyName" not in entry(tenants, nobody.headers["X-Request-Id"])
    assert not any(key in tenants.log for key in KEYS.values())


def test_requests_and_tokens_are_counted_by_key(tenants: Server) -> None:
    for name in ("app", "#5"):
        metrics = ("key_requests", "key_tokens", "key_refused")
        before = [counted(tenants, metric, name) for metric in metrics]
        answer = ask(tenants, name, {"texts": [letters(20), letters(30)]}, "/embeddings/batch")
        assert answer.status_code == 200
        until(lambda: counted(tenants, "key_tokens", name) > before[1])
        added = [counted(tenants, metric, name) - old for metric, old in zip(metrics, before)]
        assert added[0] >= 1 and added[1:] == [54, 0]  # two special tokens a text


def test_what_clients_send_with_the_name_is_the_key_too(tenants: Server) -> None:
    for sent, status in {
        f"app:{KEYS['app']}": 200,
        f"batch:{KEYS['app']}": 401,
        "app": 401,
        "app:": 401,
    }.items():
        answer = tenants.client.post("/embeddings", json={"text": "a"}, headers={"X-API-Key": sent})
        assert answer.status_code == status, sent


# Limits


def test_a_keys_limits_are_told_and_kept(tenants: Server) -> None:
    first = ask(tenants, "slow", {"text": letters(98)})
    assert first.status_code == 200
    told = {name: value for name, value in first.headers.items() if "ratelimit" in name}
    assert re.fullmatch(r"1m[\d.]+s", told.pop("x-ratelimit-reset-requests"))
    assert re.fullmatch(r"[\d.]+m?s", told.pop("x-ratelimit-reset-tokens"))
    assert 500 <= int(told.pop("x-ratelimit-remaining-tokens")) < 600
    assert told == {
        "x-ratelimit-limit-requests": "1",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-limit-tokens": "600",
    }
    refused = counted(tenants, "key_refused", "slow")
    for path in ("/embeddings", "/v1/embeddings", "/embed"):
        body = {"input": "a"} if path == "/v1/embeddings" else {"text": "a"}
        answer = ask(tenants, "slow", body, path)
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["Retry-After"]) <= 100
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        error = answer.json()["error"]
        message = "the limit of key 'slow' is 0.01 requests a second (KEY_LIMITS)"
        if path == "/v1/embeddings":
            assert (error["message"], error["type"]) == (message, "rate_limit_error")
            assert error["code"] == "rate_limit_exceeded"
        else:
            assert (error, answer.json()["error_type"]) == (message, "rate_limited")
    assert counted(tenants, "key_refused", "slow") == refused + 3
    listed = tenants.client.get("/v1/models", headers={"X-API-Key": KEYS["slow"]})
    assert listed.status_code == 200  # only requests with work are limited
    assert "x-ratelimit-limit-tokens" in listed.headers
    assert not [name for name in ask(tenants, "app").headers if "ratelimit" in name]


def test_tokens_at_a_time_are_of_a_key(tenants: Server) -> None:
    """While other keys' requests are as many as ever."""
    many = {"texts": [f"{number} {letters(20)}" for number in range(40)]}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(tenants, "few", many, "/embeddings/batch"), range(8)))
        others = list(pool.map(lambda _: ask(tenants, "app"), range(8)))
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}  # the first one comes alone
    for answer in answers:
        if answer.status_code == 429:
            assert "'few' is 50 tokens at a time" in answer.json()["error"]
    assert {answer.status_code for answer in others} == {200}


# Admission


def test_while_one_key_keeps_the_queue_full_anothers_queries_are_answered(tenants: Server) -> None:
    """And its own short ones."""
    statuses, over = list[int](), threading.Event()
    texts = {"texts": [f"{n} {letters(240)}" for n in range(BATCH // 250)]}

    def keep_full() -> None:
        while not over.is_set():
            answer = ask(tenants, "batch", texts, "/embeddings/batch")
            statuses.append(answer.status_code)
            if answer.status_code == 429:
                assert "MAX_QUEUE_TOKENS" in answer.text
                assert 1 <= int(answer.headers["Retry-After"]) <= 60

    with ThreadPoolExecutor(20) as pool, contextlib.ExitStack() as end:
        end.callback(over.set)
        loads = [pool.submit(keep_full) for _ in range(8)]
        until(lambda: 429 in statuses)
        queries = [pool.submit(ask, tenants, "app") for _ in range(12)]
        assert [query.result().status_code for query in queries] == [200] * 12
        refused = statuses.count(429)
        until(lambda: statuses.count(429) > refused)  # it was full all along
        assert ask(tenants, "batch").status_code == 200
        over.set()
        for load in loads:
            load.result()
    assert set(statuses) == {200, 429}


# Rotation


def test_keys_are_read_again_at_sighup_and_no_request_is_lost(
    models_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    old, new, path = "old-key-0123456789", "new-key-0123456789", tmp_path / "keys"
    path.write_text(f"app:{old}\n")
    from_file = {"VECTOR_EMBEDDER_API_KEY_FILE": str(path), "VECTOR_EMBEDDER_API_KEY": ""}
    with serve(models_dir, PRECISION="fp32", **from_file) as server:
        server.client.close()  # an old worker would wait for its kept connection

        def status(key: str) -> int:
            """On a connection of its own: a kept one may be an old worker's."""
            body, headers = {"text": "a"}, {"X-API-Key": key}
            url = f"{server.url}/embeddings"
            answer = httpx.post(url, json=body, headers=headers, trust_env=False, timeout=60)
            return answer.status_code

        def rotate(content: str) -> None:
            before = children(server)
            path.write_text(content)
            server.process.send_signal(signal.SIGHUP)
            until(lambda: not set(children(server)) & set(before) and children(server))

        assert (status(old), status(new)) == (200, 401)
        statuses, over = list[int](), threading.Event()

        def call(key: str) -> None:
            while not over.is_set():
                statuses.append(status(key))

        with ThreadPoolExecutor(4) as pool, contextlib.ExitStack() as end:
            end.callback(over.set)
            calls = [pool.submit(call, old) for _ in range(4)]
            rotate(f"app:{old}\napp:{new}\n")
            assert status(new) == 200
            over.set()
            for each in calls:
                each.result()  # raises where a connection was cut
        assert set(statuses) == {200}
        rotate(f"app:{new}\n")
        assert (status(old), status(new)) == (401, 200)

        for wrong in ("", "app:", "a,,b", "short", "app:abc123"):
            before, lines = children(server), server.log.count("not reloaded")
            path.write_text(wrong)
            server.process.send_signal(signal.SIGHUP)
            until(lambda: server.log.count("not reloaded") > lines)
            assert children(server) == before and status(new) == 200
        text = httpx.get(f"{server.url}/metrics", headers={"X-API-Key": new}, trust_env=False).text
        found = re.search(r'^embedder_key_requests_total{key_name="app"} (\S+)', text, re.MULTILINE)
        assert found and float(found[1]) == len(statuses) + 8
        assert old not in server.log and new not in server.log


# What looks like a key in the log


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_key_that_is_a_part_of_a_word_leaves_the_log_whole(
    models_dir: pathlib.Path, form: str
) -> None:
    keys = ["k", "200", "POST", "v1", "embeddings", "gunicorn", "127.0.0.1", "severity"]
    env = {"VECTOR_EMBEDDER_API_KEY": ",".join(keys), "HOST": "127.0.0.1", "LOG_FORMAT": form}
    with serve(models_dir, PRECISION="fp32", **env) as server:
        shown = []
        for key in keys:
            for path in ("/embeddings", "/v1/embeddings"):
                body = {"text": "a"} if path == "/embeddings" else {"input": "a"}
                answer = server.client.post(path, json=body, headers={"X-API-Key": key})
                assert answer.status_code == 200
                shown.append((path, answer.headers["X-Request-Id"]))
        last = server.client.get("/k/embeddings/x", headers={"X-API-Key": "k"})
        until(lambda: last.headers["X-Request-Id"] in server.log)
        for path, known in shown:
            (line,) = [line for line in server.log.splitlines() if known in line]
            assert f"POST {path} 200 " in line and "***" not in line and "127.0.0.1" in line
            if form == "json":
                assert json.loads(line)["httpRequest"]["requestUrl"] == path
        assert "Starting gunicorn" in server.log and "Booting worker with pid" in server.log
        (line,) = [x for x in server.log.splitlines() if last.headers["X-Request-Id"] in x]
        assert "GET *** 404" in line  # no route of ours, so it may be the key
