"""GET /metrics: what it counts, over all workers and their deaths; the dashboard that shows it."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import promql_parser
import pytest
import yaml
from conftest import NAME, WIDE
from prometheus_client.parser import text_string_to_metric_families
from servers import KEY, ROOT, Server, letters, serve
from test_server import Client, children, head

from api.metrics import REASONS, UNKNOWN
from image_embeddings import probe_picture
from main import WARM_UP_REQUESTS

Sample = tuple[str, frozenset[tuple[str, str]]]
TEXTS = ["one", "two words", "three words here"]


def labelled(name: str, **labels: str) -> Sample:
    return f"embedder_{name}", frozenset(labels.items())


IN_FLIGHT = labelled("requests_in_flight")  # the scrape itself is one


def scrape(server: Server) -> dict[Sample, float]:
    """Every sample, on a connection of its own: any worker may answer."""
    answer = httpx.get(f"{server.url}/metrics", headers={"X-API-Key": KEY}, trust_env=False)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = [
        sample
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    ]
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples)  # no sample twice
    return found


def scrape_until(server: Server, reached: Callable[[dict[Sample, float]], object]) -> Any:
    """The first scrape of which `reached` is true."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        now = scrape(server)
        if reached(now):
            return now
        assert server.process.poll() is None, server.log
        time.sleep(0.01)
    raise AssertionError(now)


def idle(now: dict[Sample, float]) -> bool:
    """Nobody is served but whoever asked for `now`."""
    queue = now[labelled("queue_requests")] or now[labelled("queue_tokens")]
    return now[labelled("requests_in_flight")] == 1 and not queue


def added(server: Server, act: Callable[[], object], last: Sample) -> dict[Sample, float]:
    """What `act` adds to each sample that it changes. An engine call and a request are counted once
    their answer is on its way, so `last` is waited for, which only the act's end changes.
    """
    before = scrape(server)
    act()
    after = scrape_until(server, lambda now: idle(now) and now.get(last) != before.get(last))
    return {
        sample: value - before.get(sample, 0.0)
        for sample, value in after.items()
        if value != before.get(sample, 0.0)
    }


def requests(route: str, status: int) -> Sample:
    return labelled("requests_total", route=route, status=str(status))


@pytest.fixture(scope="module")
def own(models_dir: pathlib.Path) -> Iterator[Server]:
    """A service that nobody else calls, with small limits."""
    limits = {"MAX_BODY_SIZE": "20000", "MAX_TEXTS_PER_BATCH": "10", "REQUEST_TIMEOUT": "30"}
    with serve(models_dir, PRECISION="fp32", **limits) as server:
        yield server


def test_a_request_is_counted_by_route_and_status_and_timed(own: Server) -> None:
    failed = requests("/embeddings", 400)
    more = added(own, lambda: [own.embed("a"), own.embed("b"), own.post("/embeddings", {})], failed)
    assert more[requests("/embeddings", 200)] == 2
    assert more[failed] == 1
    timed = "request_duration_seconds"
    assert more[labelled(f"{timed}_count", route="/embeddings")] == 3
    assert 0 < more[labelled(f"{timed}_sum", route="/embeddings")] < 30
    assert more[labelled(f"{timed}_bucket", route="/embeddings", le="60.0")] == 3
    assert requests("/embeddings/batch", 200) not in more


def test_the_engine_is_counted_in_calls_tokens_and_padding(own: Server) -> None:
    tokens = [
        len(found) for found in own.post("/tokenize", {"inputs": TEXTS, "model": WIDE}).json()
    ]
    batch = {"texts": TEXTS, "model": WIDE}
    done = labelled("queue_wait_seconds_count")
    more = added(own, lambda: own.post("/embeddings/batch", batch), done)
    assert more[labelled("chunks_total", model=WIDE)] == 3
    assert more[labelled("tokens_total", model=WIDE)] == sum(tokens)
    padded = more[labelled("padded_tokens_total", model=WIDE)]
    assert sum(tokens) <= padded <= 3 * max(tokens)
    calls = more[labelled("engine_call_seconds_count", model=WIDE, modality="text")]
    assert 1 <= calls <= 3
    assert more[labelled("engine_call_seconds_sum", model=WIDE, modality="text")] > 0
    assert more[labelled("batch_items_count")] == more[labelled("batch_tokens_count")] == calls
    assert more[labelled("batch_items_sum")] == 3
    assert more[labelled("batch_tokens_sum")] == sum(tokens)
    assert more[done] == 1
    assert labelled("tokens_total", model=NAME) not in more


def test_pictures_are_counted_apart_from_texts(clip_service: Server) -> None:
    def act() -> None:
        picture = probe_picture()
        files = [("a", picture), ("b", picture)]
        answer = clip_service.client.post("/embeddings/image/batch", files=files)
        assert answer.status_code == 200

    more = added(clip_service, act, labelled("queue_wait_seconds_count"))
    assert more[labelled("images_total", model="tiny-clip")] == 2
    assert labelled("tokens_total", model="tiny-clip") not in more
    assert more[labelled("engine_call_seconds_count", model="tiny-clip", modality="image")] >= 1


def test_paths_that_are_no_route_share_one_label(own: Server) -> None:
    paths = [f"/{number}" for number in range(20)] + ["/metrics/x", "/v1/model", "/embeddings/"]
    lost = requests(UNKNOWN, 404)
    assert added(own, lambda: [own.client.get(path) for path in paths], lost)[lost] == len(paths)
    models = "/v1/models/{model}"
    names, found = (NAME, "x", "a/b"), requests(models, 404)
    more = added(own, lambda: [own.client.get(f"/v1/models/{name}") for name in names], found)
    assert more[requests(models, 200)] == 1
    assert more[found] == 2
    document = own.client.get("/openapi.json").json()["paths"].keys()
    routes = {dict(labels).get("route") for _, labels in scrape(own)} - {None}
    assert routes <= {*document, UNKNOWN, "/openapi.json", "/docs", "/docs/{name}"}


def test_what_the_server_answers_itself_is_counted_too(own: Server) -> None:
    def act() -> None:
        for sent, status in {
            head("Content-Length: 9") + b"{": 400,  # broken off
            head("Content-Length: 1", "Content-Length: 1"): 400,
            b"POST /embeddings HTTP/1.1\r\nA: " + b"x" * 70_000: 431,
            b"no request\r\n\r\n": 400,
        }.items():
            with Client(own, sent) as client:
                client.finish()
                assert client.answer().status == status

    more = added(own, act, requests(UNKNOWN, 400))
    assert more[requests("/embeddings", 400)] == 2
    assert more[requests("/embeddings", 431)] == 1
    assert more[requests(UNKNOWN, 400)] == 1
    assert labelled("request_duration_seconds_count", route="/embeddings") not in more

    def stall() -> None:
        with Client(own, head("Content-Length: 9")) as client:
            assert client.answer().status == 408

    more = added(own, stall, requests("/embeddings", 408))
    assert more[labelled("requests_rejected_total", reason="stalled_client")] == 1


def test_a_full_queue_and_a_deadline_are_counted(models_dir: pathlib.Path) -> None:
    body = {"text": letters(2000)}
    limits = {"REQUEST_TIMEOUT": "0.05", "MAX_QUEUE_TOKENS": "2500", "MAX_REQUEST_TOKENS": "2500"}
    with serve(models_dir, PRECISION="fp32", INFERENCE_THREADS="1", **limits) as server:
        statuses: list[int] = []
        with ThreadPoolExecutor(8) as pool:
            while not set(statuses) >= {429, 504}:
                answers = pool.map(lambda _: server.post("/embeddings", body), range(8))
                statuses += [answer.status_code for answer in answers]
        now = scrape_until(server, idle)
        for status, reason in ((429, "queue_full"), (504, "deadline")):
            assert now[requests("/embeddings", status)] == statuses.count(status)
            counted = now[labelled("requests_rejected_total", reason=reason)]
            assert counted == statuses.count(status)


def test_the_queue_is_seen_while_it_waits(models_dir: pathlib.Path) -> None:
    """10 requests of 10 texts of 242 tokens, for one thread."""
    batch, chunks = {"texts": ["word " * 239 + str(at) for at in range(10)]}, labelled(
        "chunks_total", model=NAME
    )
    with serve(models_dir, PRECISION="fp32", INFERENCE_THREADS="1") as server:
        before = scrape(server)[chunks]
        with ThreadPoolExecutor(10) as pool:
            answers = [pool.submit(server.post, "/embeddings/batch", batch) for _ in range(10)]
            now = scrape_until(server, lambda now: now[labelled("queue_requests")] > 1)
            assert now[labelled("queue_tokens")] >= 242
            assert now[IN_FLIGHT] > 2
        assert [answer.result().status_code for answer in answers] == [200] * 10
        now = scrape_until(server, lambda now: idle(now) and now[chunks] >= before + 100)
        assert now[chunks] == before + 100


def test_models_and_workers_are_described(own: Server) -> None:
    now = scrape(own)
    described = {
        dict(labels)["model"]: dict(labels) for name, labels in now if name == "embedder_model_info"
    }
    assert described.keys() == {NAME, WIDE}
    assert described[WIDE]["dimensions"] == "384" and described[WIDE]["max_tokens"] == "512"
    assert described[NAME]["precision"] == "fp32" and described[NAME]["modalities"] == "text"
    (pid,) = children(own)
    rss = re.search(r"VmRSS:\s+(\d+) kB", pathlib.Path(f"/proc/{pid}/status").read_text())
    assert rss
    memory = now[labelled("worker_resident_memory_bytes", worker="0")]
    assert memory == pytest.approx(int(rss[1]) * 1024, rel=0.1)
    assert now[labelled("worker_cpu_seconds_total", worker="0")] > 0.1
    born = now[labelled("worker_start_time_seconds", worker="0")]
    assert -0.1 <= born - own.launched <= own.ready_seconds + 0.1
    assert {dict(labels).get("reason") for _, labels in now} >= set(REASONS)


def test_it_needs_the_key(own: Server) -> None:
    assert httpx.get(f"{own.url}/metrics", trust_env=False).status_code == 401
    bearer = {"Authorization": f"Bearer {KEY}"}  # as Prometheus sends it
    assert httpx.get(f"{own.url}/metrics", headers=bearer, trust_env=False).status_code == 200


# Several workers


def counters(samples: dict[Sample, float]) -> dict[Sample, float]:
    """Those that may never fall. A worker's CPU seconds are its process's own."""
    kinds = ("_total", "_count", "_sum", "_bucket")
    return {
        sample: value
        for sample, value in samples.items()
        if sample[0].endswith(kinds) and "worker" not in sample[0]
    }


def test_counts_are_of_all_workers_and_outlive_their_deaths(models_dir: pathlib.Path) -> None:
    workers_of = {"WEB_CONCURRENCY": "3", "INFERENCE_THREADS": "1"}
    with serve(models_dir, PRECISION="fp32", **workers_of) as server:
        sent = requests("/embeddings", 200)
        total = 0

        def call(times: int) -> None:
            nonlocal total
            for _ in range(times):  # each on a connection of its own, so that all workers get some
                body, key = {"text": f"text {total}"}, {"X-API-Key": KEY}
                url = f"{server.url}/embeddings"
                answer = httpx.post(url, json=body, headers=key, trust_env=False, timeout=60)
                assert answer.status_code == 200
                total += 1

        def settled() -> dict[Sample, float]:
            now = scrape_until(server, lambda now: now.get(sent, 0) >= total)
            assert now[sent] == total
            return now

        def workers(now: dict[Sample, float]) -> set[str]:
            name = "embedder_worker_resident_memory_bytes"
            return {dict(labels)["worker"] for found, labels in now if found == name}

        call(30)
        settled()
        before = scrape_until(server, lambda now: workers(now) == {"0", "1", "2"})
        for _ in range(3):
            victim, *others = children(server)
            os.kill(victim, signal.SIGKILL)
            await_heir(server, victim, 3)
            call(10)
            now = settled()
            fallen = {
                sample: (value, now.get(sample))
                for sample, value in counters(before).items()
                if now.get(sample, -1.0) < value
            }
            assert not fallen
            assert set(others) <= set(children(server))
            # The new one takes the dead one's place.
            before = scrape_until(server, lambda now: workers(now) == {"0", "1", "2"})
        assert scrape_until(server, idle)[labelled("inference_threads")] == 3


def await_heir(server: Server, victim: int, workers: int) -> None:
    """Wait until gunicorn has started another worker in place of a killed one."""
    deadline = time.monotonic() + 60
    while victim in children(server) or len(children(server)) < workers:
        assert time.monotonic() < deadline, server.log
        time.sleep(0.01)


def test_a_worker_killed_at_work_leaves_nothing_in_flight(models_dir: pathlib.Path) -> None:
    with serve(models_dir, PRECISION="fp32", INFERENCE_THREADS="1") as server:
        (victim,) = children(server)
        with contextlib.ExitStack() as stack:
            body = json.dumps({"texts": ["word " * 239 + str(at) for at in range(100)]}).encode()
            sent = head(f"Content-Length: {len(body)}", path="/embeddings/batch") + body
            for _ in range(5):
                stack.enter_context(Client(server, sent))
            scrape_until(server, lambda now: now[IN_FLIGHT] > 5)
            os.kill(victim, signal.SIGKILL)
        await_heir(server, victim, 1)
        now = scrape(server)
        assert now[IN_FLIGHT] == 1
        assert now[labelled("queue_requests")] == now[labelled("queue_tokens")] == 0
        assert requests("/embeddings/batch", 200) not in now


def test_it_works_where_nothing_can_be_written(models_dir: pathlib.Path) -> None:
    """Two workers, with the file system read-only; /dev/shm takes gunicorn's heartbeat, as ever."""
    readonly = ["unshare", "--mount", "sh", "-c", 'mount -o remount,bind,ro / && exec "$@"', "sh"]
    if subprocess.run([*readonly, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets no test make a file system read-only")
    assert subprocess.run([*readonly, "touch", "x"], capture_output=True).returncode
    with serve(models_dir, prefix=readonly, PRECISION="fp32", WEB_CONCURRENCY="2") as server:
        more = added(server, lambda: server.embed("a text"), requests("/embeddings", 200))
        assert more[requests("/embeddings", 200)] == 1


# The dashboard


def test_the_dashboard_asks_only_for_what_there_is(own: Server) -> None:
    """Each expression parses; its metrics and labels are those of a service that has worked."""
    dashboard = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text())
    own.embed("a text")
    own.post("/embed", {"inputs": "a text", "unknown": 1})
    exposed: dict[str, set[str]] = {}
    for name, labels in scrape(own):
        exposed.setdefault(name, set()).update(label for label, _ in labels)
    exposed |= {"embedder_images_total": {"model"}}  # this service takes none
    of_prometheus = {"job", "instance"}
    used = set()
    source, job = dashboard["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    assert job["definition"] == "label_values(embedder_requests_total, job)"
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            text = target["expr"].replace("$__rate_interval", "1m").replace("$job", "embedder")
            known, asked = set(of_prometheus), set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            for node in nodes(promql_parser.parse(text)):
                if isinstance(node, promql_parser.VectorSelector):
                    assert node.name in exposed, text
                    used.add(node.name)
                    known |= exposed[node.name]
                    asked |= {matcher.name for matcher in node.matchers.matchers}
                elif isinstance(node, promql_parser.AggregateExpr) and node.modifier:
                    asked |= set(node.modifier.labels)
            assert asked <= known, (panel["title"], asked - known)
    assert len({panel["title"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in used}
    ours = {re.sub("_(bucket|sum|count)$", "", name) for name in exposed}
    assert ours - families == set()  # and every metric is on it


def test_alerts_and_the_autoscaler_ask_only_for_what_there_is(own: Server) -> None:
    own.embed("a text")
    exposed: dict[str, set[str]] = {"up": set()}
    for name, labels in scrape(own):
        exposed.setdefault(name, set()).update(label for label, _ in labels)
    (group,) = yaml.safe_load((ROOT / "deploy" / "prometheus-alerts.yaml").read_text())["groups"]
    queries = [rule["expr"] for rule in group["rules"]]
    scaler, configured = yaml.safe_load_all(
        (ROOT / "deploy" / "kubernetes-queue-autoscaler.yaml").read_text()
    )
    (rule,) = yaml.safe_load(configured["data"]["config.yaml"])["rules"]
    assert rule["name"]["as"] == scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    adapted = rule["metricsQuery"].replace("<<.GroupBy>>", "pod")
    queries += [rule["seriesQuery"], adapted.replace("<<.LabelMatchers>>", 'pod="a"')]
    page = (ROOT / "docs" / "operate.md").read_text()
    (keda,) = re.findall(r"^```yaml\n(triggers:\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (trigger,) = yaml.safe_load(keda)["triggers"]
    assert (trigger["type"], trigger["metricType"]) == ("prometheus", "Value")
    queries.append(trigger["metadata"]["query"])
    for query in queries:
        named = [
            node
            for node in nodes(promql_parser.parse(query))
            if isinstance(node, promql_parser.VectorSelector)
        ]
        assert named, query
        for node in named:
            asked = {matcher.name for matcher in node.matchers.matchers}
            assert node.name in exposed, query
            assert asked <= exposed[node.name] | {"job", "instance", "namespace", "pod"}, query
    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"])
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "action"}
        for heading in re.findall(r'docs/(\w+\.md), "(.+?)"', rule["annotations"]["action"]):
            assert f"\n## {heading[1]}\n" in (ROOT / "docs" / heading[0]).read_text()


def test_the_page_has_every_metric_and_its_labels(own: Server) -> None:
    own.embed("a text")
    own.post("/embed", {"inputs": "a text", "unknown": 1})
    page = (ROOT / "docs" / "operate.md").read_text()
    section = page.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    told: dict[str, set[str]] = {}
    for row in re.findall(r"^\| (`[a-z].*?) \|", section, re.MULTILINE):
        for name, labels in re.findall(r"`(\w+)(?:{([\w, ]+)})?`", row):
            told[f"embedder_{name}"] = {label for label in labels.split(", ") if label}
    exposed: dict[str, set[str]] = {"embedder_images_total": {"model"}}  # this service takes none
    for name, labels in scrape(own):
        family = re.sub("_(bucket|sum|count)$", "", name)
        exposed.setdefault(family, set()).update({label for label, _ in labels} - {"le"})
    assert told == exposed


def nodes(expression: Any) -> Iterator[Any]:
    """An expression of PromQL and all that is in it."""
    yield expression
    for name in ("expr", "lhs", "rhs", "vector_selector", "vs"):
        if (inner := getattr(expression, name, None)) is not None:
            yield from nodes(inner)
    for inner in getattr(expression, "args", None) or ():
        yield from nodes(inner)


def test_a_ready_service_has_served_itself_requests_that_nobody_sees(
    models_dir: pathlib.Path,
) -> None:
    with serve(models_dir, LOG_LEVEL="debug") as server:
        now = scrape(server)
        calls = sum(
            value for (name, _), value in now.items() if name.endswith("call_seconds_count")
        )
        assert calls == 2 + WARM_UP_REQUESTS  # the first two are the bundles' probes
        assert not any(dict(labels).get("route") == "/embeddings" for _, labels in now)
        assert "POST" not in server.log
