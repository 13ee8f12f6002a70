"""What a model's name stands for, in every dialect: aliases with prompts, the header X-Model, and
TRUNCATION=average. And OpenAI's token ids, since this service may take them.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import NAME
from servers import Server, serve
from test_dialects import ASK, READ, TEXTS, vector

from api import cl100k
from settings import CL100K_TABLE

SOURCE = f"sentence-transformers/{NAME}"
PROMPTS: dict[str | None, str] = {"query": "search for this: ", "passage": "a passage: "}
ASKING = "ask/minilm:latest"
ALIASES = f"{ASKING}={NAME}:query, ada={SOURCE}, *={NAME}:passage"


@pytest.fixture(scope="module")
def server(models_dir: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("prompted")
    bundle = folder / NAME
    shutil.copytree(models_dir / NAME, bundle, copy_function=os.symlink)
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    (bundle / "manifest.json").unlink()
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "prompts": PROMPTS}))
    options = {"MODEL_ALIASES": ALIASES, "TRUNCATION": "average", "PRECISION": "fp32"}
    with serve(folder, **options) as made:
        yield made
        assert "Traceback" not in made.log


def openai(server: Server, sent: Any, **more: Any) -> httpx.Response:
    return server.post("/v1/embeddings", {"input": sent, **more})


# Aliases


@pytest.mark.parametrize("name", ASK)
def test_an_alias_carries_its_prompt_into_every_dialect(server: Server, name: str) -> None:
    text = TEXTS["unicode"]
    plain = vector(server, name, text)
    for model, prompt in ((ASKING, "query"), ("anything", "passage"), ("ada", None)):
        aliased = vector(server, name, text, model=model)
        assert aliased @ server.embed(PROMPTS.get(prompt, "") + text) >= 0.9999
        assert (aliased @ plain < 0.99) == (prompt is not None)
        named = vector(server, name, text, model=model, prompt_name=prompt)
        assert named @ aliased >= 0.9999


def test_an_alias_carries_its_prompt_into_similarities_and_tokens(server: Server) -> None:
    inputs = {"source_sentence": "a cat", "sentences": ["a kitten", "a tax"]}
    aliased, named, plain = (
        server.post("/similarity", {"inputs": inputs, **more}).json()
        for more in ({"model": ASKING}, {"parameters": {"prompt_name": "query"}}, {})
    )
    assert np.allclose(aliased, named, atol=1e-5) and not np.allclose(aliased, plain, atol=1e-3)
    (tokens,) = server.post("/tokenize", {"inputs": "cat", "model": ASKING}).json()
    assert [token["text"] for token in tokens][1:-1] == ["search", "for", "this", ":", "cat"]


@pytest.mark.parametrize("name", ASK)
def test_another_prompt_beside_such_an_alias_is_refused(server: Server, name: str) -> None:
    for model in (ASKING, "anything"):
        other = "passage" if model == ASKING else "query"
        response = server.post(*ASK[name]("a cat", model=model, prompt_name=other))
        assert response.status_code == 400
        error = response.json()["error"]
        message = error["message"] if name == "openai" else error
        assert f"prompt_name is '{other}', but model '{model}' is an alias with the" in message
        assert name != "openai" or error["param"] == "prompt_name"
    response = server.post(*ASK[name]("a cat", model="ada", prompt_name="nope"))
    assert response.status_code == 400 and "passage, query" in response.text


def test_the_response_names_the_model_as_the_request_did(server: Server) -> None:
    for asked in (ASKING, "ada", "anything", "*", NAME, SOURCE):
        assert openai(server, "a", model=asked).json()["model"] == asked
    for more in ({}, {"model": None}):
        assert openai(server, "a", **more).json()["model"] == NAME


def test_aliases_are_listed_and_described(server: Server) -> None:
    listed = {model["id"]: model for model in server.client.get("/v1/models").json()["data"]}
    found = [(name, model["alias_of"], model["prompt_name"]) for name, model in listed.items()]
    assert found == [(NAME, None, None), (ASKING, NAME, "query"), ("ada", NAME, None)]
    for name, model in listed.items():
        assert server.client.get(f"/v1/models/{name}").json() == model
    whatever = server.client.get("/v1/models/gpt/9").json()
    assert whatever == {**listed["ada"], "id": "gpt/9", "prompt_name": "passage"}


# Which model made a vector


def test_every_response_that_embeds_names_the_bundle(server: Server) -> None:
    listed, *_ = server.client.get("/v1/models").json()["data"]
    version = f"{NAME}@{listed['fingerprint']}"
    for ask in ASK.values():
        for more in ({}, {"model": ASKING}, {"model": SOURCE}):
            assert server.post(*ask("a cat", **more)).headers["X-Model"] == version
    inputs = {"source_sentence": "a cat", "sentences": ["a kitten"]}
    assert server.post("/similarity", {"inputs": inputs}).headers["X-Model"] == version
    assert server.client.get("/health/ready").headers["X-Model"] == version
    assert server.client.get("/info").json()["fingerprint"] == listed["fingerprint"]
    assert "X-Model" not in server.client.get("/health").headers


def test_a_bundle_with_other_prompts_has_another_fingerprint(
    server: Server, service: Server
) -> None:
    responses = [each.post("/embeddings", {"text": "a"}) for each in (server, service)]
    names = [response.headers["X-Model"].partition("@") for response in responses]
    assert names[0][0] == names[1][0] == NAME and names[0][2] != names[1][2]


# TRUNCATION=average


@pytest.mark.parametrize("name", ["tei", "root"])
def test_truncate_has_no_effect(server: Server, name: str) -> None:
    text = TEXTS["long"]
    for more in ({}, {"truncate": True}, {"truncate": True, "truncation_direction": "Left"}):
        response = server.post(*ASK[name](text, **more))
        assert np.array(READ[name](response.json())) @ server.embed(text) >= 0.9999
        assert "X-Truncated" not in response.headers


# Token ids


ids = pytest.mark.skipif(not CL100K_TABLE.exists(), reason="needs `make api/cl100k_base.bin`")
HELLO = [9906, 11, 1917, 0]  # "Hello, world!", as OpenAI's documentation has it


@pytest.fixture(scope="module")
def encode() -> Any:
    """Text to ids, by bytes: the table has an id for each. Slow, and not as OpenAI cuts words."""
    sizes, starts, tokens = cl100k.Table(CL100K_TABLE).load()
    by_byte = {tokens[starts[at]]: at for at, size in enumerate(sizes) if size == 1}
    return lambda text: [by_byte[byte] for byte in text.encode()]


@ids
def test_token_ids_are_embedded_as_their_text(server: Server, encode: Any) -> None:
    texts = ["Hello, world!", *TEXTS.values()]
    lists = [HELLO, *map(encode, TEXTS.values())]
    expected = openai(server, texts).json()
    answer = openai(server, lists).json()
    assert answer == expected  # usage too: it counts the model's own tokens
    (one,) = openai(server, HELLO).json()["data"]
    assert one == openai(server, "Hello, world!").json()["data"][0]
    options = {"dimensions": 8, "encoding_format": "base64"}
    aliased = openai(server, [HELLO], model=ASKING, **options).json()["data"]
    assert aliased == openai(server, texts[0], prompt_name="query", **options).json()["data"]


@ids
def test_ids_that_were_cut_within_a_character_are_mended(server: Server, encode: Any) -> None:
    cat, emoji = encode("a cat"), encode("😀")
    for sent in (cat + emoji[:2], emoji[3:] + cat, emoji[1:] + cat + emoji[:3]):
        assert openai(server, [sent]).json() == openai(server, "a cat").json()


@ids
@pytest.mark.parametrize(
    "sent, says",
    [
        ([HELLO, HELLO, [0] * 17 + [100_257]], "$.input[2][17]: token id 100257 is a special"),
        ([HELLO, [1, -1]], "$.input[1][1]: token id -1 is out of range"),
        ([1, 2, 100_256], "$.input[2]: token id 100256 is out of range"),
        ([1, 2, 1 << 70], "$.input[2]: token id 1180591620717411303424 is out of range"),
        ([HELLO, []], "$.input[1]: text is empty"),
        ([[]], "$.input[0]: text is empty"),
        ([[220, 220]], "$.input[0]: text is empty or only white space"),
        ([HELLO, "a"], "$.input[1]: a text beside a list of token ids"),
        (["a", HELLO], "$.input[1]: a list of token ids beside a text"),
        ([1, "a"], "$.input[1]: a text beside a token id"),
        ([1, HELLO], "$.input[1]: a list of token ids beside a token id"),
        ([1, True], "$.input[1]"),
        ([[1, True]], "$.input[0][1]"),
        ([1, 2.5], "$.input[1]"),
        ([[1, None]], "$.input[0][1]"),
        ([[1, "2"]], "$.input[0][1]"),
        ([[[1]]], "$.input[0][0]"),
        ([HELLO] * 2049, "2049 texts; the limit is 2048 (MAX_INPUTS)"),
        ([[-1]] * 2049, "2049 texts; the limit is 2048"),  # too many for a look at each
    ],
    ids=lambda value: str(value)[:40],
)
def test_ids_that_stand_for_no_text_are_refused_with_their_place(
    server: Server, sent: Any, says: str
) -> None:
    response = openai(server, sent)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert says in error["message"] and error["param"] == "input"


@ids
def test_ids_cannot_stand_for_more_text_than_a_body_holds(server: Server) -> None:
    """Some ids stand for 64 bytes and more: a body of them would be ten times as large."""
    sizes, starts, tokens = cl100k.Table(CL100K_TABLE).load()
    visible = [at for at in range(len(sizes)) if not tokens[starts[at] : starts[at + 1]].isspace()]
    longest = max(visible, key=sizes.__getitem__)
    count = 33_554_432 // sizes[longest] // 2 + 1
    response = openai(server, [HELLO, [longest] * count, [longest] * count])
    assert response.status_code == 413
    error = response.json()["error"]
    assert "$.input[2]: the token ids up to here stand for" in error["message"]
    assert "MAX_BODY_SIZE" in error["message"] and error["param"] == "input"
    response = openai(server, [[longest] * (1_048_576 // sizes[longest] + 1)])
    assert response.status_code == 413 and "MAX_TEXT_SIZE" in response.json()["error"]["message"]
