"""benchmark_embeddings.py and its parts in loadtest/: what they send, measure and print."""

import datetime
import functools
import http.server
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import NAME
from PIL import Image
from servers import KEY, Server, free_port

import benchmark_embeddings as command
from engine.bundle import Manifest
from engine.choice import runs
from engine.openvino_backend import available_precisions
from loadtest import client, in_process, loads, machine, measures, recommend, report, rounds
from loadtest.client import Client, Result
from loadtest.loads import LOADS, STREAM, Dialect, Load, Target
from loadtest.recommend import Point
from loadtest.service import available, serve
from tokens import load_tokenizer

QUICK = ["--seconds", "0.2", "--rounds", "1"]
SHORT = ["--seconds", "0.05", "--rounds", "1"]  # in this process every caller calls once at least


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, models_dir: pathlib.Path) -> None:
    monkeypatch.setenv("VECTOR_EMBEDDER_API_KEY", f"{KEY},another")
    monkeypatch.setenv("MODELS_DIR", str(models_dir))
    monkeypatch.setenv("EMBEDDING_MODEL", NAME)
    # Short requests, so that the tests do not take long on a slow or busy machine.
    monkeypatch.setitem(LOADS, "batch32", Load(4, 12, (4,), texts=32))
    monkeypatch.setitem(LOADS, "long", Load(180, 220, (4,)))  # two chunks each
    monkeypatch.setattr(in_process, "SAMPLE_TOKENS", 2_000)
    monkeypatch.setattr(measures, "STEADY", 0.2)


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    command.main([*arguments, "--json"])
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


# -- what is sent


def test_texts_are_of_the_words_asked_for_and_all_different() -> None:
    for load in (*LOADS.values(), STREAM):
        texts = list(itertools.islice(loads.texts(load, seed=3), 200))
        assert len(set(texts)) == 200
        assert {load.fewest <= len(text.split()) <= load.most for text in texts} == {True}
        assert texts == list(itertools.islice(loads.texts(load, seed=3), 200))


@pytest.mark.parametrize("tokens", [3, 20, 200, 500, 1000])
def test_texts_have_exactly_the_tokens_they_are_named_for(service: Server, tokens: int) -> None:
    bundle = in_process.default_bundle(in_process.settings())
    tokenizer, _, _ = load_tokenizer(bundle)
    texts = loads.exact_texts(lambda text: len(tokenizer.encode(text).ids), tokens, 4)
    answer = service.post("/tokenize", {"inputs": texts}).json()
    assert [len(found) for found in answer] == [tokens] * 4
    assert tokens < 10 or len(set(texts)) == 4


def test_no_text_has_fewer_tokens_than_the_special_ones() -> None:
    with pytest.raises(ValueError, match="no texts of exactly 2 tokens"):
        loads.exact_texts(lambda text: len(text.split()) + 2, 2, 1)


@pytest.mark.parametrize("dialect", loads.DIALECTS)
def test_every_dialect_is_answered(service: Server, dialect: Dialect) -> None:
    target = Target(service.url + "/", dialect, model=NAME)
    for name in ("query", "batch32"):
        result = measures.one(target, name, 2, 1, 0.2)
        assert result.failed == 0 and result.rate > 0 and result.cpu > 0


def test_a_path_of_its_own_and_pictures_in_dialects(clip_service: Server) -> None:
    request = Target("http://127.0.0.1:1/base/", "openai", "/own", "m").request(["a", "b"])
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /base/own HTTP/1.1\r\nHost: 127.0.0.1:1\r\n")
    assert json.loads(body) == {"model": "m", "input": ["a", "b"]}
    model = clip_service.client.get("/health/ready").json()["model"]
    result = measures.one(Target(clip_service.url, "openai", model=model), loads.IMAGES, 1, 1, 0.2)
    assert result.failed == 0 and result.rate > 0
    with pytest.raises(ValueError, match="no pictures"):
        Target(clip_service.url, "tei").image_request(b"")


# -- the generator


class Peer(http.server.BaseHTTPRequestHandler):
    """A server with other habits than ours."""

    protocol_version = "HTTP/1.1"
    habit = ""
    answered = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).answered += 1
        self.send_response(200)
        if self.habit == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"3\r\n[0]\r\n0\r\n\r\n")
            return
        self.send_header("Content-Length", "3")
        if self.habit == "closing":
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"[0" if self.habit == "broken" else b"[0]")
        # Unannounced, as a server does whose time for idle connections is over.
        self.close_connection = self.habit != ""

    def log_message(self, format: str, *args: Any) -> None:
        pass


class PeerServer(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """The generator leaves without a word once its answers are whole, or broken."""


@pytest.fixture(params=["", "closing", "leaving", "chunked", "broken"])
def peer(request: pytest.FixtureRequest) -> Iterator[tuple[str, type[Peer]]]:
    handler = type("Handler", (Peer,), {"habit": request.param, "answered": 0})
    with PeerServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


def test_peers_of_all_habits(peer: tuple[str, type[Peer]]) -> None:
    url, handler = peer
    some = Client(loads.requests(Target(url), LOADS["batch32"], 1), 3, units=32)
    if handler.habit == "broken":
        with pytest.raises(OSError, match=f"{url}: closed in the middle of a response"):
            client.drive(url, [some], 0.2)
        return
    (result,) = client.drive(url, [some], 0.2)
    assert result.failed == 0 and 0 < result.p50 <= result.p99
    assert 3 <= len(result.latencies) <= handler.answered
    # Requests that were under way when the time ended count in part.
    assert len(result.latencies) - 3 <= result.rate * 0.2 / 32 <= len(result.latencies)


def test_clients_of_different_kinds_at_the_same_time() -> None:
    """A server that answers once a request of each connection is there, and refuses batches."""
    together = threading.Barrier(3)

    class Handler(Peer):
        met = False  # of a connection

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if not self.met:
                together.wait(30)
                self.met = True
            self.send_response(400 if b'"texts"' in body else 200)
            self.send_header("Content-Length", "3")
            self.end_headers()
            self.wfile.write(b"[0]")

    with PeerServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        target = Target(f"http://127.0.0.1:{server.server_port}")
        large = Client(loads.requests(target, LOADS["batch32"], 1), 1, 32)
        small = Client(loads.requests(target, LOADS["query"], 2), 2)
        batches, queries = client.drive(target.url, [large, small], 0.5)
        server.shutdown()
        thread.join()
    assert batches.failed > 0 and len(batches.latencies) == 0 and batches.rate == 0
    assert queries.failed == 0 and len(queries.latencies) >= 2 and queries.rate > 0


def test_rounds_alternate(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[str, int, float]] = []

    def side(name: str, number: int, seconds: float) -> str:
        calls.append((name, number, seconds))
        return f"{name}{number}"

    sides = [functools.partial(side, name) for name in "ab"]
    results = rounds.alternate("both", sides, 7.0, 2)
    assert calls[:2] == [("b", 0, rounds.WARM_UP), ("a", 0, rounds.WARM_UP)]
    assert calls[2:] == [("a", 1, 7.0), ("b", 1, 7.0), ("b", 2, 7.0), ("a", 2, 7.0)]
    assert results == [["a1", "a2"], ["b1", "b2"]]
    said = capsys.readouterr().err.splitlines()
    assert said == ["both: warming up", "both: round 1 of 2", "both: round 2 of 2"]


# -- what is made of it


def test_rounds_are_combined_by_medians_and_all_latencies() -> None:
    results = [Result(rate, (rate,) * 2, int(rate), 0.1) for rate in (3.0, 1.0, 2.0)]
    assert rounds.combine(results) == Result(2.0, (3.0, 3.0, 1.0, 1.0, 2.0, 2.0), 6, 0.1)


def test_the_ratio_is_taken_round_by_round() -> None:
    here = [Result(rate, (2.0,), 0) for rate in (10.0, 110.0, 30.0)]
    there = [Result(rate, (1.0,), 0) for rate in (5.0, 50.0, 14.0)]

    def compared(others: list[Result]) -> dict[str, Any]:
        sides = [
            ("x", lambda number, _: here[number - 1]),
            ("y", lambda number, _: others[number - 1]),
        ]
        return report.compare("query", 8, sides, True, 0.0, 3)[0]

    row = compared(there)
    assert (row["rate"], row["p50"], row["p99"]) == (30.0, 2.0, 2.0)
    assert row["ratio"] == pytest.approx(30 / 14) and row["note"] is None
    failing = compared([*there[:2], Result(10.0, (1.0,), 1)])
    assert failing["ratio"] is None and failing["note"] == "no ratio: requests failed"


def test_a_ratio_that_differs_from_round_to_round_is_not_stated() -> None:
    here = [Result(rate) for rate in (20.0, 25.0, 20.0)]
    steady, noisy = ([Result(rate) for rate in rates] for rates in ((10.0,) * 3, (10.0, 9.0, 10.0)))
    assert rounds.ratio(here, steady) == 2.0 and rounds.doubt(here, steady) is None
    assert rounds.ratio(here, noisy) is None
    said = rounds.doubt(here, noisy)
    assert said and said.startswith("no ratio: 2.00 to 2.78 in 3 rounds; use a quieter machine")
    assert rounds.doubt(here, []) is None


def test_what_others_do_with_the_machine_is_what_is_not_our_own() -> None:
    before = machine.Ticks(at=100.0, busy=50.0, stolen=5.0, own=10.0, load=1.0)
    after = machine.Ticks(at=110.0, busy=64.0, stolen=6.0, own=19.0, load=2.5)
    usage = machine.Usage(before, after)
    assert (usage.others, usage.stolen, usage.busy) == (0.5, 0.1, True)
    cores = len(os.sched_getaffinity(0))
    assert str(usage) == (
        f"load 1.0 before and 2.5 after; other processes took 0.50 of {cores} cores, the host 0.10 "
        "(steal)"
    )
    usage = machine.Usage(before, machine.Ticks(110.0, busy=59.1, stolen=5.0, own=19.2, load=1.0))
    assert (usage.others, usage.busy) == (0.0, False)


def test_processes_that_were_started_are_our_own() -> None:
    before = machine.ticks()
    code = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    after = machine.ticks()
    assert after.own - before.own > 0.2 and after.busy - before.busy > 0.2  # in steps of 0.01


def test_a_table_has_no_empty_columns() -> None:
    rows = [{"load": "query", "rate": 1234.5, "share": 0.5, "ratio": None}]
    assert report.table(rows).splitlines() == [
        "| load | a second | share |",
        "|---|---|---|",
        "| query | 1234 | 50.0 % |",
    ]


def test_a_plot_is_a_picture_with_its_lines(tmp_path: pathlib.Path) -> None:
    def drawn(*points: tuple[str, str, int, float, float]) -> Image.Image:
        file = tmp_path / "curves.png"
        keys = ("side", "load", "connections", "rate", "p99")
        report.plot([dict(zip(keys, point)) for point in points], file, "texts: a model, a CPU")
        with Image.open(file) as picture:
            picture.load()
            assert picture.format == "PNG"
            return picture.copy()

    first, alone = ("a", "query", 16, 90.0, 80.0), ("one point", "query", 4, 0.0, 0.0)
    one = drawn(first, alone, ("a", "query", 1, 10.0, 5.0))
    colours = {colour[:3] for _, colour in one.getcolors(1 << 20) or []}
    blue, orange = (31, 119, 180), (255, 127, 14)  # matplotlib's first two
    assert {blue, orange, (255, 255, 255)} <= colours
    two = drawn(first, ("a", "passage", 16, 9.0, 800.0))  # a row of panels for each load
    assert two.width == one.width and two.height > one.height + 200


def test_a_plot_says_what_where_and_when(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    said: list[str] = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text: said.append(text))
    row = {"side": "a", "load": "query", "connections": 1, "rate": 1.0, "p99": 1.0}
    report.plot([row], tmp_path / "curves.png", "texts: a model, a CPU")
    assert said == [f"texts: a model, a CPU, {datetime.date.today():%Y-%m-%d}"]


def test_a_plot_needs_matplotlib_and_says_so_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        command.main(["--plot", "x.png"])
    line = "--plot needs matplotlib: pip install -r requirements-plot.txt\n"
    assert (stop.value.code, capsys.readouterr().err) == (2, line)


# -- the command, on running services


def test_texts_and_pictures_against_another_service(
    clip_service: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = [
        "--url",
        clip_service.url,
        "--against",
        clip_service.url + "/",
        "--connections",
        "1",
        "2",
    ]
    answer = measured(capsys, *urls, "--loads", "query", loads.IMAGES, *QUICK)
    rows = answer["rows"]
    assert answer["what"] == "texts" and "cores" in answer["conditions"]
    assert [(row["side"], row["load"], row["connections"]) for row in rows] == [
        (url, load, connections)
        for load in ("query", loads.IMAGES)
        for connections in (1, 2)
        for url in (clip_service.url, clip_service.url + "/")
    ]
    for row in rows:
        assert row["failed"] == 0 and row["rate"] > 0 and 0 < row["p50"] <= row["p99"]
        assert row["ratio"] > 0


def test_a_table_to_paste_and_progress_beside_it(
    service: Server, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "curve.png"
    few = ["--loads", "query", "--connections", "1", "2", "--plot", str(file)]
    command.main(["--url", service.url, *few, *QUICK])
    out, err = capsys.readouterr()
    conditions, machine, _, header, rule, *rows = out.splitlines()
    assert conditions.startswith(f"texts: {NAME}, client on ")
    assert machine.startswith("machine: load ") and set(rule) == {"|", "-"} and len(rows) == 2
    assert header.startswith("| what | load | at a time | a second | p50 ms | p99 ms | failed |")
    assert rows[0].startswith(f"| {service.url} | query | 1 | ")
    assert err.splitlines()[-1] == "query, 2 at a time: round 1 of 1"
    with Image.open(file) as picture:
        assert picture.width > 500


def test_failures_are_counted_and_void_the_ratio(
    service: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VECTOR_EMBEDDER_API_KEY", "wrong")
    urls = ["--url", service.url, "--against", service.url, "--loads", "query"]
    here, there = measured(capsys, *urls, "--connections", "2", *QUICK)["rows"]
    assert here["failed"] > 0 and there["failed"] > 0
    assert here["rate"] == 0 and here["ratio"] is there["ratio"] is None


def test_a_row_counts_its_own_failures_once() -> None:
    right, failing = Result(1.0, (1.0,), 0), Result(1.0, (1.0,), 2)
    sides = [("x", lambda *_: right), ("y", lambda *_: failing)]
    rows = report.compare("query", 1, sides, True, 0.0, 3)
    assert [row["failed"] for row in rows] == [0, 6]
    assert all(row["note"] == "no ratio: requests failed" for row in rows)


def test_a_service_says_whether_it_takes_pictures(service: Server, clip_service: Server) -> None:
    assert measures.takes_images(Target(clip_service.url))
    assert not measures.takes_images(Target(clip_service.url, "tei"))
    assert not measures.takes_images(Target(service.url))


def test_loads_may_be_named_with_their_connections(
    service: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--loads", "query-c1", "passage-c16"]
    rows = measured(capsys, "--url", service.url, *few, *QUICK)["rows"]
    assert [(row["load"], row["connections"]) for row in rows] == [("query", 1), ("passage", 16)]
    with pytest.raises(SystemExit, match="cannot measure: none of these loads"):
        command.main(["padding", "--loads", "query-c1", *QUICK])


def test_a_service_that_is_not_there_is_one_line() -> None:
    with pytest.raises(SystemExit, match="cannot measure: http.*refused"):
        command.main(["--url", f"http://127.0.0.1:{free_port()}", *QUICK])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["start", "--plot", "x.png"], "--plot draws texts and recommend"),
        (["--loads", "query-c2"], "no load 'query-c2'"),
        (["recommend", "--loads", "query-c16"], "no load 'query-c16'"),
        (["--against", "http://127.0.0.1:1"], "--against needs --url"),
        (["--recommend", "--url", "http://127.0.0.1:1"], "recommend takes no --url"),
        (["--rounds", "0"], "'0' is not a whole number of 1 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_served_against_the_ceiling(service: Server, capsys: pytest.CaptureFixture[str]) -> None:
    some = ["--url", service.url, "--loads", "query-c1", "query-c16", "long"]
    rows = measured(capsys, "ceiling", *some, *QUICK)["rows"]
    assert [row["load"] for row in rows] == ["query-c1", "query-c16", "long-c4"]
    for row in rows:
        assert row["failed"] == 0
        assert row["share"] == pytest.approx(row["served"] / row["ceiling"], rel=0.01)
        assert 1 <= row["batch_size"] <= 64


def test_perfect_batches_hold_every_chunk_once_and_keep_the_limits() -> None:
    options = in_process.settings()
    bundle = in_process.default_bundle(options)
    (ceiling,) = in_process.ceilings(options, bundle, ["long"]).values()
    batches = ceiling.batches(64)
    assert sum(map(len, batches)) == len(ceiling.chunks)
    assert ceiling.texts_a_chunk < 1  # long texts are several
    for batch in batches:
        longest = max(map(len, batch))
        assert len(batch) == 1 or longest * len(batch) <= options.max_batch_tokens
    assert {len(batch) for batch in ceiling.batches(1)} == {1}


def test_padding_is_what_the_service_counts(service: Server) -> None:
    (row,) = measures.padding(Target(service.url), [("mixed", 16)], 0.2)
    assert row["load"] == "mixed-c16" and 0 < row["real_tokens"] <= row["padded_tokens"]
    assert row["rate"] > 0
    assert row["wasted"] == 1 - row["real_tokens"] / row["padded_tokens"] < 0.5
    with pytest.raises(OSError, match="/metrics answers 404"):
        measures.padding(Target(service.url + "/v1"), [("mixed", 16)], 0.2)


def test_queries_beside_a_stream_of_batches(service: Server) -> None:
    stream = Load(20, 20, (1,), texts=50)
    (row,) = measures.fairness(Target(service.url), 0.3, 1, stream)
    assert row["failed"] == 0 and row["queries"] > 0
    assert row["query_p50"] <= row["query_p99"]
    assert row["kept"] == pytest.approx(row["stream_beside"] / row["stream_alone"])


def test_a_start_and_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = measured(capsys, "start", "--rounds", "1")["rows"]
    assert row["starts"] == 1 and row["failed"] == 0
    assert 0 < row["ready"] == row["ready_worst"] and row["stop"] > 0
    assert 50 < row["pss"] <= row["rss"] and row["first"] > 0 and row["steady"] > 0


def test_a_service_that_does_not_start_says_why() -> None:
    with pytest.raises(OSError, match="did not start: cannot start: PRECISION='fp31'"):
        with serve({"PRECISION": "fp31"}):
            raise AssertionError("it started")


# -- in this process


@pytest.mark.usefixtures("torch_child")
def test_every_precision_beside_sentence_transformers(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, real_model: pathlib.Path
) -> None:
    file = tmp_path / "curve.png"
    some = ["--tokens", "20", "300", "--connections", "2", "--model", str(real_model)]
    rows = measured(capsys, *some, "--plot", str(file), *SHORT)["rows"]
    sides = [*available_precisions(), in_process.REFERENCE]
    assert [(row["load"], row["connections"], row["side"]) for row in rows] == [
        (load, 2, side) for load in ("20 tokens", "300 tokens") for side in sides
    ]
    for row in rows:
        assert row["tokens"] == pytest.approx(row["rate"] * int(row["load"].split()[0]), rel=0.01)
        assert row["failed"] == 0 and row["ratio"] > 0 and 0 < row["p50"] <= row["p99"]
    assert [row["ratio"] for row in rows if row["side"] == in_process.REFERENCE] == [1.0] * 2
    assert file.exists()


@pytest.mark.usefixtures("torch_child")
def test_pictures_too_where_the_model_takes_them(
    clip_models_dir: pathlib.Path,
    tiny_clip_folder: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MODELS_DIR", str(clip_models_dir))
    monkeypatch.delenv("EMBEDDING_MODEL")
    some = ["--tokens", "8", "--connections", "2", "--model", str(tiny_clip_folder)]
    rows = measured(capsys, *some, *SHORT)["rows"]
    pictures = [row for row in rows if row["load"] == loads.IMAGES]
    assert [row["side"] for row in pictures][-1] == in_process.REFERENCE
    assert len(pictures) * 2 == len(rows)
    assert {"tokens": None, "failed": 0}.items() <= pictures[0].items() and pictures[0]["rate"] > 0


def test_a_model_that_was_asked_for_and_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(manifest: Manifest, model: str | None) -> None:
        raise OSError(f"no {model}")

    monkeypatch.setattr(command, "Reference", fail)
    with pytest.raises(SystemExit, match="cannot measure: no such/model"):
        command.main(["--model", "such/model", *QUICK])


@pytest.mark.usefixtures("torch_child")
def test_without_sentence_transformers_model_the_rest_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The wide bundle's source names no model on this machine, and none is fetched."""
    monkeypatch.setenv("EMBEDDING_MODEL", f"{NAME}-512")
    command.main(["--tokens", "8", "--connections", "1", "--json", *SHORT])
    out, err = capsys.readouterr()
    assert "without sentence-transformers beside it: sentence-transformers: " in err
    rows = json.loads(out)["rows"]
    assert [row["side"] for row in rows] == available_precisions()
    assert {row["ratio"] for row in rows} == {None}


def test_no_bundle_is_one_line(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match="cannot measure: MODELS_DIR .*bake a model first"):
        command.main([])


# -- advice


PARITY = {"fp32": 0.99999, "bf16": 0.9999, "int8": 0.992}


def setting(
    cores: int, workers: int, precision: str, rate: float, p99: float = 100.0, rss: float = 250.0
) -> list[Point]:
    """Half the rate at 1 connection, 97 % of it at 8, all of it at 64, where waiting is long."""
    figures = [
        (1, rate / 2, 5.0, p99 / 10),
        (8, rate * 0.97, 20.0, p99),
        (64, rate, 90.0, 10 * p99),
    ]
    return [Point(precision, cores, workers, "mixed", *each, 0, rss) for each in figures]


@pytest.mark.parametrize(("limit", "connections"), [(2000.0, 8), (50.0, 1)])
def test_the_fewest_connections_that_bring_nearly_all_within_the_limit(
    limit: float, connections: int
) -> None:
    advised = recommend.recommend(setting(1, 1, "fp32", 100.0), PARITY, limit)
    assert advised.concurrency == connections and advised.kept


def test_points_with_failures_do_not_count() -> None:
    points = [
        point._replace(failed=point.connections > 1) for point in setting(1, 1, "fp32", 100.0)
    ]
    assert recommend.recommend(points, PARITY, 2000.0).concurrency == 1


def test_advice_by_the_stated_rules() -> None:
    points = [
        *setting(2, 1, "fp32", 100.0),
        *setting(2, 1, "bf16", 200.0),
        *setting(2, 1, "int8", 400.0),  # the fastest, but not exact enough
        *setting(1, 1, "bf16", 105.0),  # a little more a core
        *setting(2, 2, "bf16", 215.0),  # not worth twice the memory
    ]
    advised = recommend.recommend(points, PARITY, 500.0)
    assert advised[:6] == (2, 512, 8, 1, "bf16", 200.0 * 0.97) and advised.kept
    assert advised.command == (
        "gcloud run deploy … --cpu 2 --memory 512Mi --concurrency 8 "
        "--set-env-vars PRECISION=auto,WEB_CONCURRENCY=1"
    )
    text = recommend.text(advised)
    assert "int8 0.99200, 400.0/s" in text and "1.07 times the texts of 1" in text
    assert "measured: all of the above, on up to 2 cores of this machine" in text
    assert "not measured, so not advised: more cores than that" in text


@pytest.mark.parametrize(
    ("precision", "deployed"),
    [("fp32", "fp32"), ("int8", "int8"), ("bf16", "auto"), ("fp16", "auto")],
)
def test_no_instance_is_stopped_by_what_is_advised(precision: str, deployed: str) -> None:
    """Where the CPU is another than the one that was measured."""
    advised = recommend.recommend(setting(1, 1, precision, 100.0), {precision: 0.9999}, 500.0)
    assert advised.precision == precision and f" PRECISION={deployed}," in advised.command
    said = [reason for reason in advised.reasons if reason.startswith("PRECISION=auto: ")]
    assert len(said) == (deployed == "auto")


def test_cores_are_those_that_cloud_run_gives_with_the_memory() -> None:
    advised = recommend.recommend(setting(1, 1, "fp32", 100.0, rss=4000.0), PARITY, 500.0)
    assert (advised.cores, advised.memory) == (2, 8192)
    assert "2 CPU: Cloud Run gives 8192 MiB to no fewer" in advised.reasons


def test_the_cost_of_a_million_texts() -> None:
    prices = recommend.Prices(0.00002, 0.000002, 0.5)
    advised = recommend.recommend(setting(2, 1, "fp32", 100.0), PARITY, 500.0, prices)
    assert advised.cost == pytest.approx(1e6 / 97 * (2 * 0.00002 + 0.5 * 0.000002) + 0.5)
    (said,) = [reason for reason in advised.reasons if reason.startswith("cost: ")]
    assert said.startswith(f"cost: {advised.cost:.2f} US dollars for a million texts")
    batches = setting(2, 1, "fp32", 100.0)[0]._replace(load="batch32")
    assert recommend.cost(batches, 1024, 1, recommend.Prices(0, 0, 0.4)) == pytest.approx(0.0125)


def test_workers_that_bring_enough_and_cores_that_do_not() -> None:
    points = [*setting(4, 1, "fp32", 200.0), *setting(1, 1, "fp32", 100.0)]
    advised = recommend.recommend([*points, *setting(4, 4, "fp32", 300.0)], PARITY, 500.0)
    assert (advised.cores, advised.workers) == (1, 1)  # 100 a core against 75
    points += setting(4, 4, "fp32", 390.0, rss=900.0)
    advised = recommend.recommend(points, PARITY, 500.0)
    assert (advised.cores, advised.workers, advised.memory) == (4, 4, 2048)


def test_a_limit_that_nothing_keeps_is_said() -> None:
    advised = recommend.recommend(setting(1, 1, "int8", 10.0, p99=3000.0), PARITY, 100.0)
    assert not advised.kept and advised.concurrency == 1 and advised.precision == "int8"
    assert any("no setting kept p99 within 100 ms" in reason for reason in advised.reasons)


def test_recommended_from_what_is_measured_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    """At one precision: every other one takes another start."""
    monkeypatch.setattr(recommend, "precisions", lambda bundle: ["fp32"])
    file = tmp_path / "curves.png"
    few = ["--loads", "query", "--connections", "1", "2", "--plot", str(file), "--p99", "60000"]
    answer = measured(capsys, "--recommend", *few, *QUICK)
    rows, cores = answer["rows"], len(available())
    cores = max(each for each in recommend.CORES if each <= cores)
    assert {row["cores"] for row in rows} >= {cores, 1}
    assert {row["workers"] for row in rows} == {1, cores}
    assert all(row["failed"] == 0 and row["rate"] > 0 and row["rss"] > 50 for row in rows)
    recommended = answer["recommended"]
    assert recommended["kept"] and recommended["precision"] == "fp32"
    assert recommended["rate"] in [pytest.approx(row["rate"], rel=1e-3) for row in rows]
    assert recommended["command"].startswith("gcloud run deploy … --cpu ")
    assert file.exists()


def test_the_cosine_is_that_of_the_engine_that_serves(
    models_dir: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models_dir / NAME, tmp_path / NAME)
    path = tmp_path / NAME / "manifest.json"
    manifest = json.loads(path.read_bytes())
    minima = {"OpenVINO": 0.91, "own engine": 0.92}
    for backend, parity in manifest["parity"].items():
        parity["fp32"]["minimum"] = minima[backend]
    path.write_text(json.dumps(manifest))
    monkeypatch.setenv("MODELS_DIR", str(tmp_path))
    with serve({"PRECISION": "fp32"}) as running:
        found = recommend.smallest_cosine(running.url, NAME)
    assert found == minima["own engine" if runs("own engine", "fp32") else "OpenVINO"]


def test_a_service_that_fails_requests_everywhere_is_not_recommended() -> None:
    failing = [point._replace(failed=1) for point in setting(1, 1, "fp32", 100.0)]
    with pytest.raises(ValueError, match="no setting answered every request"):
        recommend.recommend(failing, PARITY, 500.0)
