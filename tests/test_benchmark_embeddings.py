"""benchmark_embeddings.py: what it sends is answered, what it prints is what it measured."""

import json

import pytest

import benchmark_embeddings as benchmark
from benchmark_embeddings import Result, Row
from servers import KEY, Server, free_port


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VECTOR_EMBEDDER_API_KEY", f"{KEY},another")


def quick(*more: str) -> list[str]:
    return ["--seconds", "0.2", "--rounds", "1", "--tokens", "20", "--connections", "1", "2", *more]


def test_texts_and_pictures_against_another_service(
    clip_service: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = ["--url", clip_service.url, "--against", clip_service.url + "/"]
    benchmark.main(quick(*urls, "--json"))
    rows = json.loads(capsys.readouterr().out)
    assert [(row["load"], row["connections"]) for row in rows] == [
        ("text-20", 1),
        ("text-20", 2),
        ("image-640x480", 1),
        ("image-640x480", 2),
    ]
    for row in rows:
        assert row["failed"] == 0 and row["rate"] > 0 and 0 < row["p50"] <= row["p99"]
        assert row["ratio"] > 0


def test_a_table_to_paste(service: Server, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(quick("--url", service.url))
    header, rule, *rows = capsys.readouterr().out.splitlines()
    assert rule == "|---|---|---|---|---|---|---|" and len(rows) == 2  # no pictures: it takes none
    assert rows[0].startswith("| text-20 | 1 | ")


def test_failures_are_counted_and_void_the_ratio(
    service: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VECTOR_EMBEDDER_API_KEY", "wrong")
    result = benchmark.run(service.url, benchmark.text_load(20), 2, 0.2)
    assert result.failed > 0 and result.rate == 0
    row = benchmark.summarise("x", 2, [result], [Result(1.0, 1.0, 1.0, 0)])
    assert row.ratio is None and row.failed == result.failed


def test_the_ratio_is_taken_round_by_round() -> None:
    here = [Result(rate, 2.0, 4.0, 0) for rate in (10.0, 100.0, 30.0)]
    there = [Result(rate, 1.0, 1.0, 0) for rate in (5.0, 25.0, 10.0)]
    row = benchmark.summarise("x", 8, here, there)
    assert row == Row("x", 8, rate=30.0, p50=2.0, p99=4.0, failed=0, ratio=3.0)


def test_texts_have_about_the_tokens_they_are_named_for(service: Server) -> None:
    for tokens in (20, 200, 500):
        body = json.loads(benchmark.text_load(tokens, 1).bodies[0])
        (found,) = service.post("/tokenize", {"inputs": body["text"]}).json()
        assert len(found) == pytest.approx(tokens, rel=0.25)


def test_a_service_that_is_not_there_is_one_line() -> None:
    with pytest.raises(SystemExit, match="cannot measure: .*refused"):
        benchmark.main(quick("--url", f"http://127.0.0.1:{free_port()}"))
