"""Bake options that serving obeys: prompts, and the layer norm before a cut."""

import pathlib
import time
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from test_embeddings import embedder_for

import bake_model
from embeddings import TextEmbedder
from engine.bundle import Bundle, read
from engine.queue import Queue

TEXT = "What is deep learning?"
LONG = "the river rose after three days of rain " * 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model with a prompt of its own that does not normalise, nor has values around 0."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)  # with it the vectors' mean is so far from 0 that a layer norm shows
    heads = [Dense(tiny_models.WIDTH, 48)]
    prompts = {"own": "learning: "}
    return tiny_models.save(folder, heads=heads, normalize=False, prompts=prompts)


def bake(source: pathlib.Path, *options: str) -> Bundle:
    output = source.parent / "models"
    common = ["--output", str(output), "--name", "tiny", "--precisions", "fp32"]
    bake_model.main([str(source), *common, *options])
    return read(output / "tiny")


@pytest.fixture
def bundle(source: pathlib.Path) -> Bundle:
    """Baked once with every option."""
    folder = source.parent / "models" / "tiny"
    if not folder.exists():
        prompts = ["--prompt", "query=query: ", "--prompt", "passage=a=b "]
        bake(source, *prompts, "--default-prompt", "query", "--layer-norm")
    return read(folder)


def embed(bundle: Bundle, *texts: str, **options: Any) -> list[Any]:
    queue = Queue(max_batch_size=4, max_batch_tokens=512, max_queue_tokens=10**6, threads=1)
    queue.start()
    try:
        embedder: TextEmbedder = embedder_for(bundle, queue)
        return embedder.embed(texts, deadline=time.monotonic() + 60, **options)
    finally:
        queue.close()


def cosine(one: Any, other: Any) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_prompts_are_added_and_one_is_the_default(source: pathlib.Path, bundle: Bundle) -> None:
    manifest = bundle.manifest
    added = {"own": "learning: ", "query": "query: ", "passage": "a=b "}
    assert manifest.prompts.items() >= added.items() and manifest.default_prompt == "query"
    model = SentenceTransformer(str(source), device="cpu")
    for name, prompt in ((None, "query: "), *added.items()):
        (result,) = embed(bundle, TEXT, prompt_name=name)
        assert cosine(result.vector, model.encode(prompt + TEXT)) >= 0.9999
    assert cosine(embed(bundle, TEXT)[0].vector, model.encode(TEXT)) < 0.9999


def test_a_default_that_is_no_prompt(source: pathlib.Path) -> None:
    with pytest.raises(SystemExit, match="--default-prompt nope: it has no such prompt .*own"):
        bake(source, "--default-prompt", "nope")


@pytest.mark.parametrize("argument", ["query", "=text"])
def test_a_prompt_of_another_form(
    source: pathlib.Path, argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bake(source, "--prompt", argument)
    assert f"'{argument}' is not of the form NAME=TEXT" in capsys.readouterr().err


@pytest.mark.parametrize("normalize", [True, False])
def test_a_layer_norm_goes_before_the_cut(bundle: Bundle, normalize: bool) -> None:
    """As nomic-embed-text-v1.5's model card does it in torch."""
    assert bundle.manifest.layer_norm
    (whole,) = embed(bundle, LONG)
    assert len(whole.chunks) > 1
    (cut,) = embed(bundle, LONG, dimensions=16, normalize=normalize)
    for vector, expected in (
        (cut.vector, whole.vector),
        *zip(cut.chunk_vectors, whole.chunk_vectors),
    ):
        normed = torch.nn.functional.layer_norm(torch.tensor(expected), (len(expected),))[:16]
        if normalize:
            normed = torch.nn.functional.normalize(normed, dim=0)
        assert np.allclose(vector, normed.numpy(), atol=1e-5)
    assert cosine(cut.vector, whole.vector[:16]) < 0.9999


def test_no_cut_no_layer_norm(bundle: Bundle) -> None:
    everything = bundle.manifest.dimensions
    (whole,), (all_of_it,) = embed(bundle, TEXT), embed(bundle, TEXT, dimensions=everything)
    assert np.array_equal(whole.vector, all_of_it.vector)
    bundle.manifest.layer_norm = False
    (cut,) = embed(bundle, TEXT, dimensions=16)
    assert np.array_equal(cut.vector, whole.vector[:16])
