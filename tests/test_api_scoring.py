"""/rerank, /classify, /predict and Cohere's routes: bundles of several tasks in one service,
beside sentence-transformers' own scores.
"""

import pathlib
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from servers import Server, serve
from tiny_scorers import DOCUMENTS, QUERY

import main
from engine import bundle as bundles
from engine.certificate import BelowFloor
from engine.queue import Queue
from settings import Settings

LONG = "the river rose and the old bridge was closed to traffic. " * 12
PICTURE = "data:image/png;base64,iVBORw0KGgo="
PAIRS = [(QUERY, document) for document in DOCUMENTS]


@pytest.fixture(scope="module")
def expected(scorers: pathlib.Path) -> Any:
    """CrossEncoder.predict of PAIRS, shape (pairs,)."""
    return CrossEncoder(str(scorers / "reranker"), device="cpu").predict(PAIRS)


def good(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def refusal(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    message: str = body.get("message") or body["error"]
    return message


def in_order(scores: Any) -> list[int]:
    return [int(at) for at in np.argsort(-np.asarray(scores), kind="stable")]


def test_native(scoring: Server, expected: Any) -> None:
    body = {"query": QUERY, "documents": DOCUMENTS}
    results = good(scoring.post("/rerank", body))["results"]
    assert [each["index"] for each in results] == in_order(expected)
    assert np.allclose([each["score"] for each in results], sorted(expected)[::-1], atol=2e-3)
    few = good(scoring.post("/rerank", {**body, "top_n": 2}))["results"]
    assert few == results[:2]
    assert good(scoring.post("/rerank", {**body, "top_n": 10**15}))["results"] == results


def test_a_long_document_has_its_best_chunks_score(scoring: Server) -> None:
    body = {"query": QUERY, "documents": ["a", LONG], "chunks": True}
    results = good(scoring.post("/rerank", body))["results"]
    (found,) = [each for each in results if each["index"] == 1]
    assert found["score"] == max(chunk["score"] for chunk in found["chunks"])
    pieces = [LONG[chunk["start"] : chunk["end"]] for chunk in found["chunks"]]
    assert "".join(pieces) == LONG and len(pieces) > 2
    again = good(scoring.post("/rerank", {"query": QUERY, "documents": pieces}))["results"]
    assert again[0]["score"] == pytest.approx(found["score"], abs=1e-4)


def test_text_embeddings_inference(scoring: Server, scorers: pathlib.Path, expected: Any) -> None:
    body = {"query": QUERY, "texts": DOCUMENTS}
    ranks = good(scoring.post("/rerank", body))
    assert [each["index"] for each in ranks] == in_order(expected)
    assert np.allclose([each["score"] for each in ranks], sorted(expected)[::-1], atol=2e-3)
    assert all(each.keys() == {"index", "score"} for each in ranks)
    assert good(scoring.post("/", {**body, "model": "reranker"})) == ranks
    own = CrossEncoder(str(scorers / "reranker"), device="cpu")
    raw = own.predict(PAIRS, activation_fn=torch.nn.Identity())
    made = good(scoring.post("/rerank", {**body, "raw_scores": True, "return_text": True}))
    assert np.allclose([each["score"] for each in made], sorted(raw)[::-1], atol=5e-3)
    assert all(each["text"] == DOCUMENTS[each["index"]] for each in made)


def test_truncate_cuts_a_document(scoring: Server) -> None:
    body = {"query": QUERY, "texts": [LONG, LONG[::-1]], "truncate": True}
    response = scoring.post("/rerank", body)
    good(response)
    assert response.headers["X-Truncated"] == "2"


def test_predict(scoring: Server) -> None:
    one = good(scoring.post("/predict", {"inputs": QUERY, "model": "classifier"}))
    assert {each["label"] for each in one} == {"bad", "fair", "good"}
    assert one == sorted(one, key=lambda each: -each["score"])
    assert sum(each["score"] for each in one) == pytest.approx(1, abs=1e-5)
    rows = [[QUERY], [QUERY, "a"]]
    many = good(scoring.post("/predict", {"inputs": rows, "model": "classifier"}))
    assert np.allclose(
        [each["score"] for each in many[0]], [each["score"] for each in one], atol=1e-5
    )
    pair = good(scoring.post("/predict", {"inputs": [QUERY, "a"], "model": "classifier"}))
    assert pair == many[1]
    raw = good(scoring.post("/predict", {"inputs": QUERY, "model": "tagger", "raw_scores": True}))
    made = good(scoring.post("/predict", {"inputs": QUERY, "model": "tagger"}))
    logits = {each["label"]: each["score"] for each in raw}
    for each in made:
        expected = 1 / (1 + np.exp(-logits[each["label"]]))
        assert each["score"] == pytest.approx(expected, abs=1e-5)


def test_classify(scoring: Server) -> None:
    predicted = good(scoring.post("/predict", {"inputs": QUERY, "model": "tagger"}))
    made = good(scoring.post("/classify", {"text": QUERY, "model": "tagger"}))
    assert made == {"labels": predicted}
    several = {"texts": [QUERY, ["a", "b"]], "model": "tagger"}
    labels = good(scoring.post("/classify", several))["labels"]
    assert [each["label"] for each in labels[0]] == [each["label"] for each in predicted]
    rows = [["a", "b"]]
    assert labels[1] == good(scoring.post("/predict", {"inputs": rows, "model": "tagger"}))[0]


@pytest.mark.parametrize("version", ["1", "2"])
def test_cohere_and_jina(version: str, scoring: Server, expected: Any) -> None:
    documents = [{"text": DOCUMENTS[0], "id": 7}, *DOCUMENTS[1:]]
    body = {"model": "reranker", "query": QUERY, "documents": documents, "return_documents": True}
    made = good(scoring.post(f"/v{version}/rerank", body))
    assert [each["index"] for each in made["results"]] == in_order(expected)
    scores = [each["relevance_score"] for each in made["results"]]
    assert np.allclose(scores, sorted(expected)[::-1], atol=2e-3)
    first = next(each for each in made["results"] if each["index"] == 0)
    second = next(each for each in made["results"] if each["index"] == 1)
    assert first["document"] == documents[0] and second["document"] == {"text": DOCUMENTS[1]}
    assert made["meta"]["api_version"]["version"] == version and made["model"] == "reranker"
    assert made["usage"]["total_tokens"] > len(DOCUMENTS) and made["id"]
    few = {**body, "top_n": 1, "max_tokens_per_doc": 4096, "rank_fields": ["text"]}
    assert [
        each["index"] for each in good(scoring.post(f"/v{version}/rerank", few))["results"]
    ] == [in_order(expected)[0]]


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/rerank", {"query": "", "documents": ["a"]}, 400, "query: text is empty"),
        ("/rerank", {"query": LONG, "documents": ["a"]}, 413, "the query has"),
        ("/rerank", {"query": "a", "documents": []}, 400, "no document; send at least one"),
        ("/rerank", {"query": "a", "documents": ["b", " "]}, 400, "$.documents[1]: text is empty"),
        ("/rerank", {"query": "a", "documents": ["b", 3]}, 400, "$.documents[1]"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, 400, "top_n is 0"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_k": 1}, 400, "top_k"),
        ("/rerank", {"query": "a", "documents": ["b"], "model": "embedder"}, 501, "reranker"),
        ("/rerank", {"query": "a", "texts": ["b"] * 21}, 400, "21 documents; the limit is 20"),
        ("/rerank", {"query": "a", "texts": ["b", ""]}, 400, "$.texts[1]: text is empty"),
        ("/predict", {"inputs": []}, 400, "no text; send at least one"),
        ("/predict", {"inputs": ["a", "b", "c"]}, 400, "3 texts"),
        ("/predict", {"inputs": [["a"], []]}, 400, "$.inputs[1]"),
        ("/predict", {"inputs": [["a"], ["b", ""]]}, 400, "$.inputs[1]: text is empty"),
        ("/predict", {"inputs": [["a"], [" ", "b"]]}, 400, "$.inputs[1]: text is empty"),
        ("/classify", {"text": "", "model": "tagger"}, 400, "$.text: text is empty"),
        ("/classify", {"texts": ["a", " "], "model": "tagger"}, 400, "$.texts[1]: text is empty"),
        ("/classify", {"text": "a"}, 501, "classifier, tagger"),
        ("/classify", {"text": "a", "model": "reranker"}, 501, "classifier, tagger"),
        ("/v1/rerank", {"query": "a", "documents": [{"title": "b"}]}, 400, "$.documents[0]"),
        ("/v1/rerank", {"query": "a", "documents": ["b", 3]}, 400, "$.documents[1]"),
        ("/v2/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, 400, "top_n is -1"),
        (
            "/v1/rerank",
            {"query": "a", "documents": ["b"], "rank_fields": ["x"]},
            400,
            "rank_fields",
        ),
        (
            "/v1/rerank",
            {"query": "a", "documents": ["b", LONG], "max_chunks_per_doc": 1},
            400,
            "it has",
        ),
        (
            "/v2/rerank",
            {"query": "a", "documents": [LONG], "max_tokens_per_doc": 9},
            400,
            "not cut",
        ),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "model": "x"}, 404, "no model 'x' here"),
        ("/embeddings", {"text": "a", "model": "reranker"}, 501, "embedder"),
        ("/rerank", {"query": "a", "documents": ["b", PICTURE]}, 501, "$.documents[1]: this is a"),
        ("/v2/rerank", {"query": "a", "documents": [PICTURE]}, 501, "$.documents[0]: this is a"),
        ("/classify", {"text": PICTURE, "model": "tagger"}, 501, "$.text: this is a picture"),
        ("/predict", {"inputs": [["a"], [PICTURE]]}, 501, "$.inputs[1]: this is a picture"),
        ("/v1/embeddings", {"input": "a", "model": "tagger"}, 501, "not_supported"),
    ],
)
def test_bad_requests(path: str, body: Any, status: int, says: str, scoring: Server) -> None:
    if path == "/predict":
        body = {**body, "model": "classifier"}
    response = scoring.post(path, body)
    assert response.status_code == status and says in response.text, response.text


def test_top_n_that_is_no_number(scoring: Server) -> None:
    for path in ("/rerank", "/v1/rerank"):
        for value in ("NaN", "1.5", '"2"'):
            body = f'{{"query": "a", "documents": ["b"], "top_n": {value}}}'
            response = scoring.post(
                path, content=body, headers={"Content-Type": "application/json"}
            )
            assert refusal(response, 400)


def test_unknown_fields_of_others_are_named(scoring: Server) -> None:
    body = {"query": "a", "documents": ["b"], "truncation": True}
    assert scoring.post("/v1/rerank", body).headers["X-Ignored-Fields"] == "truncation"


def test_what_the_service_tells_of_its_models(scoring: Server) -> None:
    models = {each["id"]: each for each in good(scoring.client.get("/v1/models"))["data"]}
    tasks = {name: each["task"] for name, each in models.items()}
    assert tasks == {
        "embedder": "embed",
        "reranker": "rerank",
        "classifier": "classify",
        "tagger": "classify",
    }
    assert models["classifier"]["labels"] == ["bad", "fair", "good"]
    assert models["reranker"]["certificate"]["tau"] >= 0.999
    listed = good(scoring.client.get("/api/tags"))["models"]
    assert [each["name"] for each in listed] == ["embedder:latest"]
    assert good(scoring.client.get("/info"))["model_type"].keys() == {"embedding"}


def test_a_service_whose_default_is_a_classifier(scorers: pathlib.Path) -> None:
    models = scorers / "classifiers"
    models.mkdir()
    (models / "classifier").symlink_to(scorers / "models" / "classifier")
    with serve(models, PRECISION="fp32") as server:
        info = good(server.client.get("/info"))
        labels = {"0": "bad", "1": "fair", "2": "good"}
        assert info["model_type"]["classifier"]["id2label"] == labels
        assert good(server.post("/", {"inputs": QUERY})) == good(
            server.post("/predict", {"inputs": QUERY})
        )
        assert "no model here can" in refusal(server.post("/embeddings", {"text": "a"}), 501)


def test_wrong_scores_are_not_served(scorers: pathlib.Path) -> None:
    bundle = bundles.read(scorers / "models" / "reranker")
    assert bundle.manifest.scorer
    bundle.manifest.probe.vector[0] += bundle.manifest.scorer.spread * 0.01
    queue = Queue(max_batch_size=64, max_batch_tokens=4096, max_queue_tokens=1 << 30, threads=1)
    queue.start()
    try:
        with pytest.raises(BelowFloor, match="probe text is off by 0.010"):
            main.load_scorer(bundle, Settings(inference_threads=1, precision="fp32"), queue)
    finally:
        queue.close()
