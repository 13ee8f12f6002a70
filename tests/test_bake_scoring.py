"""bake/scoring.py and scores.py: rerankers and classifiers, baked and served, beside
sentence-transformers' and transformers' own scores.
"""

import contextlib
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import tiny_scorers
import torch
import transformers
from baking import FAR, bake, refusal
from sentence_transformers import CrossEncoder
from tiny_scorers import DOCUMENTS, QUERY

import bake_model
from engine import certificate
from engine.bundle import Bundle
from engine.errors import InputTooLarge, InvalidInput
from engine.openvino_backend import OpenVINOTextEngine
from engine.queue import Queue
from limits import TextLimits
from scores import Most, TextScorer
from tokens import load_tokenizer

PAIRS = [(QUERY, document) for document in DOCUMENTS]
LONG = "the river rose and the old bridge was closed to traffic. " * 12


@contextlib.contextmanager
def serving(bundle: Bundle) -> Iterator[TextScorer]:
    queue = Queue(max_batch_size=64, max_batch_tokens=4096, max_queue_tokens=1 << 30, threads=1)
    queue.start()
    try:
        tokenizer, pad_id, pad_left = load_tokenizer(bundle)
        engine = OpenVINOTextEngine(bundle, "fp32", pad_id=pad_id, pad_left=pad_left, streams=1)
        yield TextScorer(bundle, tokenizer, engine, queue, TextLimits())
    finally:
        queue.close()


def raw(scorer: TextScorer, inputs: Sequence[Any], **options: Any) -> Any:
    found = scorer.score(inputs, deadline=time.monotonic() + FAR, **options)
    return np.stack([each.raw for each in found])


def near(actual: Any, expected: Any) -> bool:
    """Within the certificate's floor."""
    spread = np.ptp(np.asarray(expected), axis=0).max()
    return bool(np.abs(np.asarray(actual) - expected).max() <= 1e-3 * spread)


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Bundle]:
    """A model's folder and its bundle."""
    folder = tmp_path_factory.mktemp("scorers")
    model = tiny_scorers.cross_encoder(folder / "reranker")
    return model, bake(model, folder / "models")


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm_roberta", "distilbert"])
def test_a_reranker_gives_sentence_transformers_scores(kind: str, tmp_path: pathlib.Path) -> None:
    folder = tiny_scorers.cross_encoder(tmp_path / "model", kind)
    bundle = bake(folder, tmp_path / "models")
    manifest = bundle.manifest
    assert (manifest.task, manifest.dimensions, manifest.modalities) == ("rerank", 1, ["text"])
    assert manifest.scorer and manifest.scorer.activation == "sigmoid"
    assert manifest.scorer.types == (kind == "bert")
    parity = manifest.parity["OpenVINO"]["fp32"]
    assert parity.minimum >= 0.999 and parity.tau and parity.tau >= 0.999
    own = CrossEncoder(str(folder), device="cpu")
    expected = own.predict(PAIRS, activation_fn=torch.nn.Identity())
    with serving(bundle) as scorer:
        together = raw(scorer, PAIRS)
        alone = np.concatenate([raw(scorer, [pair]) for pair in PAIRS])
        assert near(together[:, 0], expected) and near(alone[:, 0], expected)
        assert np.allclose(scorer.scores(together)[:, 0], own.predict(PAIRS), atol=2e-3)


@pytest.mark.parametrize(
    ("config", "activation"),
    [
        ({}, "softmax"),
        ({"problem_type": "multi_label_classification"}, "sigmoid"),
    ],
)
def test_a_classifier_gives_transformers_scores(
    config: dict[str, str], activation: str, tmp_path: pathlib.Path
) -> None:
    names = {0: "bad", 1: "fair", 2: "good"}
    more: Any = {"num_labels": 3, "id2label": names, **config}
    folder = tiny_scorers.plain(tmp_path / "model", "distilbert", **more)
    bundle = bake(folder, tmp_path / "models")
    assert bundle.manifest.task == "classify" and bundle.manifest.scorer
    assert bundle.manifest.scorer.labels == ["bad", "fair", "good"]
    assert bundle.manifest.scorer.activation == activation
    pipe: Any = transformers.pipeline("text-classification", str(folder), top_k=None)
    expected = [{each["label"]: each["score"] for each in row} for row in pipe(tiny.TEXTS)]
    with serving(bundle) as scorer:
        found = scorer.scores(raw(scorer, tiny.TEXTS))
    assert np.allclose(
        found, [[row[name] for name in names.values()] for row in expected], atol=2e-3
    )


def test_a_cross_encoder_with_labels_keeps_its_own_activation(tmp_path: pathlib.Path) -> None:
    folder = tiny_scorers.cross_encoder(tmp_path / "model", "bert", num_labels=3)
    bundle = bake(folder, tmp_path / "models")
    assert bundle.manifest.scorer and bundle.manifest.scorer.activation == "none"
    expected = CrossEncoder(str(folder), device="cpu").predict(PAIRS)
    with serving(bundle) as scorer:
        assert near(scorer.scores(raw(scorer, PAIRS)), expected)
        made = scorer.probabilities(raw(scorer, PAIRS))
    assert np.allclose(made.sum(axis=1), 1, atol=1e-6)


def test_a_long_document_has_the_score_of_its_best_chunk(reranker: Any) -> None:
    _, bundle = reranker
    with serving(bundle) as scorer:
        (found,) = scorer.rerank(QUERY, [LONG], deadline=time.monotonic() + FAR)
        pieces = [LONG[chunk.start : chunk.end] for chunk in found.chunks]
        assert len(pieces) > 2 and "".join(pieces) == LONG
        assert all(chunk.tokens <= bundle.manifest.max_tokens for chunk in found.chunks)
        each = raw(scorer, [(QUERY, piece) for piece in pieces])
        assert near(found.chunk_raw, each) and found.raw[0] == found.chunk_raw.max()
        cut = scorer.score([(QUERY, LONG)], deadline=time.monotonic() + FAR, truncate="right")
        kept = LONG[: cut[0].chunks[0].end]
        assert cut[0].chunks[0].truncated and near(cut[0].raw, raw(scorer, [(QUERY, kept)])[0])


def test_a_query_that_fills_the_window_is_refused(reranker: Any) -> None:
    _, bundle = reranker
    with serving(bundle) as scorer:
        with pytest.raises(InputTooLarge, match="leaves no room in the model's window of 64"):
            scorer.rerank(LONG, ["a"], deadline=time.monotonic() + FAR)
        with pytest.raises(InvalidInput, match="query: text is empty"):
            scorer.rerank(" ", ["a"], deadline=time.monotonic() + FAR)
        with pytest.raises(InvalidInput, match="no document"):
            scorer.rerank("a", [], deadline=time.monotonic() + FAR)
        with pytest.raises(InvalidInput, match="max_chunks_per_doc is 1") as info:
            most = Most(chunks=1)
            scorer.rerank("a", ["b", LONG], deadline=time.monotonic() + FAR, most=most)
        assert info.value.index == 1


def test_the_check_of_a_bundle_tells_how_near_its_scores_are(
    reranker: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _, bundle = reranker
    bake_model.main(["--check", str(bundle.path)])
    out = capsys.readouterr().out
    assert "holds: scores off by at most 0.000" in out and "Kendall's tau 1.0000" in out


def test_what_means_nothing_for_scores_is_refused(reranker: Any, tmp_path: pathlib.Path) -> None:
    folder, _ = reranker
    line = refusal(folder, tmp_path / "models", "--pooling", "mean")
    assert "it gives scores, not vectors: leave out --pooling" in line


def test_an_unknown_activation_is_refused(tmp_path: pathlib.Path) -> None:
    own = {"activation_fn": "torch.nn.modules.activation.Tanh"}
    folder = tiny_scorers.plain(tmp_path / "model", sentence_transformers=own)
    assert "its activation is Tanh: not supported" in refusal(folder, tmp_path / "models")


def test_rank_correlation_counts_what_differs_by_more_than_the_tolerance() -> None:
    expected = np.array([0.0, 1.0, 2.0, 2.05], np.float32)
    swapped = np.array([0.0, 2.0, 1.0, 3.0], np.float32)
    # Of six pairs, 2.0 and 2.05 are too near to count; of the other five, one is the other way.
    assert certificate.rank_correlation(expected, swapped, 0.1) == pytest.approx(3 / 5)
    assert certificate.rank_correlation(expected, swapped, 5.0) == 1.0


def test_nearness_of_what_is_no_number() -> None:
    expected = np.zeros((3, 2), np.float32)
    found = np.array([[0, 0.5], [np.nan, 0], [0, np.inf]], np.float32)
    assert certificate.nearness(found, expected, 2.0).tolist() == [0.75, -1, -1]
