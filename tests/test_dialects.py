"""All dialects over one core: the same vectors, prompts, chunks."""

import base64
import io
import os
import pathlib
import random
import shutil
from typing import Any

import numpy as np
import pytest
import tiny_clip
from conftest import NAME, WIDE
from servers import Server, serve

TEXTS = {
    "short": "What is deep learning?",
    "unicode": "Größe 😀 cafe\u0301 ﬁne 機械学習",
    "long": "the river rose after three days of rain; " * 120,
}
ASK = {
    "native": lambda text, **more: ("/embeddings", {"text": text, **more}),
    "batch": lambda text, **more: ("/embeddings/batch", {"texts": [text], **more}),
    "openai": lambda text, **more: ("/v1/embeddings", {"input": text, **more}),
    "tei": lambda text, **more: ("/embed", {"inputs": text, **more}),
    "root": lambda text, **more: ("/", {"inputs": text, **more}),
    "plain": lambda text, **more: ("/embed", {"text": text, **more}),
    "ollama": lambda text, **more: ("/api/embed", {"input": text, "truncate": False, **more}),
}
READ = {
    "native": lambda answer: answer["embeddings"][0],
    "batch": lambda answer: answer["embeddings"][0][0],
    "openai": lambda answer: answer["data"][0]["embedding"],
    "tei": lambda answer: answer[0],
    "root": lambda answer: answer[0],
    "plain": lambda answer: answer,
    "ollama": lambda answer: answer["embeddings"][0],
}


def vector(service: Server, name: str, text: str, **more: Any) -> Any:
    response = service.post(*ASK[name](text, **more))
    assert response.status_code == 200, response.text
    return np.array(READ[name](response.json()))


def unit(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("more", [{}, {"model": WIDE, "dimensions": 64, "prompt_name": "query"}])
def test_vectors_agree(service: Server, text: str, more: dict[str, Any]) -> None:
    vectors = np.array([vector(service, name, text, **more) for name in ASK])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (vectors @ vectors.T).min() >= 0.9999


def test_two_models_side_by_side(service: Server, sentence_transformer: Any) -> None:
    """They differ in their window only, which shows in a long text."""
    text, own = "the river rose. " * 100, sentence_transformer.max_seq_length
    for window, model in ((256, NAME), (512, WIDE)):
        sentence_transformer.max_seq_length = window
        expected = sentence_transformer.encode(text)
        short = sentence_transformer.encode("a cat")
        for name in ("tei", "root", "ollama"):
            cut = vector(service, name, text, model=model, truncate=True)
            assert cut @ expected >= 0.9999
        for name in ASK:
            assert vector(service, name, "a cat", model=model) @ short >= 0.9999
    sentence_transformer.max_seq_length = own


def test_a_model_of_texts_and_one_of_pictures_side_by_side(
    models_dir: pathlib.Path,
    clip_models_dir: pathlib.Path,
    sentence_transformer: Any,
    clip_transformer: Any,
    tmp_path: pathlib.Path,
) -> None:
    for bundle in (models_dir / NAME, clip_models_dir / "tiny-clip"):
        shutil.copytree(bundle, tmp_path / bundle.name, copy_function=os.symlink)
    file = io.BytesIO()
    drawn = tiny_clip.picture("red", "circle", random.Random(7))
    drawn.save(file, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    with serve(tmp_path, PRECISION="fp32", EMBEDDING_MODEL=NAME) as server:
        for name in ASK:
            expected = sentence_transformer.encode("a red circle")
            assert unit(vector(server, name, "a red circle")) @ expected >= 0.9999
            expected = unit(clip_transformer.encode("a red circle"))
            asked = vector(server, name, "a red circle", model="tiny-clip")
            assert unit(asked) @ expected >= 0.9999
        seen = unit(clip_transformer.encode(drawn))
        answer = server.post("/embeddings/image", {"image": uri, "model": "tiny-clip"})
        assert unit(np.array(answer.json()["embeddings"][0])) @ seen >= 0.9999
        body = {"input": [uri, uri], "model": "tiny-clip", "modality": "image"}
        answer = server.post("/v1/embeddings", body)
        vectors = np.array([entry["embedding"] for entry in answer.json()["data"]])
        assert (unit(vectors) @ seen).min() >= 0.9999
        assert answer.json()["usage"]["total_tokens"] > 0
        answer = server.post("/v1/embeddings", {**body, "input": [uri, "no picture"]})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "input"
        assert answer.json()["error"]["message"].startswith("$.input[1]: ")
        answer = server.post("/v1/embeddings", {**body, "prompt_name": "query"})
        assert answer.status_code == 400 and "are for texts" in answer.json()["error"]["message"]
        answer = server.post("/embeddings/image", {"image": uri})  # the default takes texts only
        assert answer.status_code == 501
        listed = {entry["id"]: entry for entry in server.client.get("/v1/models").json()["data"]}
        assert listed[NAME]["modalities"] == ["text"] and listed[NAME]["dimensions"] == 384
        assert listed["tiny-clip"]["modalities"] == ["text", "image"]
        assert listed["tiny-clip"]["max_tokens"] == 77


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("form", ["float", "base64"])
def test_chunks_on_the_native_routes(service: Server, text: str, form: str) -> None:
    def read(sent: Any) -> Any:
        return np.frombuffer(base64.b64decode(sent), "<f4") if form == "base64" else np.array(sent)

    body = {"chunks": True, "encoding_format": form, "prompt_name": "query"}
    one = service.post("/embeddings", {"text": text, **body}).json()
    two = service.post("/embeddings/batch", {"texts": ["a", text], **body}).json()
    assert one.keys() == two.keys() == {"embeddings", "chunks"}
    assert len(one["chunks"]) == 1 and [len(chunks) for chunks in two["chunks"]][0] == 1
    for vector, chunks in (
        (one["embeddings"][0], one["chunks"][0]),
        (two["embeddings"][1][0], two["chunks"][1]),
    ):
        assert chunks[0]["start"] == 0 and chunks[-1]["end"] == len(text)
        assert all(one["end"] == two["start"] for one, two in zip(chunks, chunks[1:]))
        assert all(0 < chunk["tokens"] <= 256 for chunk in chunks)
        mean = np.mean([read(chunk["embedding"]) for chunk in chunks], axis=0)
        assert np.allclose(mean / np.linalg.norm(mean), read(vector), atol=1e-5)
    assert (len(one["chunks"][0]) > 1) == (len(text) > 1000)


def test_chunks_only_when_asked_for(service: Server) -> None:
    for asked in (False, None):
        assert service.post("/embeddings", {"text": "a", "chunks": asked}).json().keys() == {
            "embeddings"
        }
    response = service.post("/embeddings", {"text": "a", "chunks": 1})
    assert response.status_code == 400 and "$.chunks" in response.json()["error"]
    response = service.post("/embeddings", {"text": "a", "encoding_format": "hex"})
    assert response.status_code == 400 and "$.encoding_format" in response.json()["error"]
