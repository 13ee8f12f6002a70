"""Released clients with nothing set but base URL, key and model: they index 500 texts of 1,000
characters and find what is searched for. docs/clients.md has more of them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import huggingface_hub
import numpy as np
import ollama
import openai
import pytest
from conftest import NAME
from huggingface_hub.errors import HfHubHTTPError
from servers import KEY, Server

NOUNS = (
    "ferry baker comet lawyer tiger bridge violin glacier tractor senator orchard printer canoe "
    "dentist volcano ledger lantern beetle pilot saddle harbour carpet engine monk valley"
).split()
# Equal texts of a request are computed once, so that the test is quick.
TEXTS = [
    (f"The {noun} stands near the international headquarters of the administration. " * 15)[:1000]
    for noun in NOUNS * 20
]

Embed = Callable[[list[str]], Any]


@pytest.fixture(params=["openai", "huggingface_hub", "ollama"])
def embed(
    request: pytest.FixtureRequest, service: Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Embed]:
    """A client's call for many texts."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    if request.param == "openai":
        with openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY) as client:
            create = client.embeddings.create
            yield lambda texts: [each.embedding for each in create(model=NAME, input=texts).data]
    elif request.param == "huggingface_hub":
        yield huggingface_hub.InferenceClient(base_url=service.url, token=KEY).feature_extraction
    else:
        monkeypatch.setenv("OLLAMA_API_KEY", KEY)
        with ollama.Client(host=service.url) as client:
            yield lambda texts: client.embed(model=NAME, input=texts).embeddings


def test_index_and_search(embed: Embed, service: Server) -> None:
    assert len(TEXTS) == 500 and {*map(len, TEXTS)} == {1000}
    index = np.array(embed(TEXTS))
    assert index.shape == (500, 384)
    for row in (0, 499):
        assert index[row] @ np.array(service.embed(TEXTS[row])) >= 0.9999
    found = np.array(embed([f"Where is the {noun}?" for noun in NOUNS])) @ index.T
    assert [int(row) % 25 for row in found.argmax(axis=1)] == [*range(25)]


def test_more_texts_than_a_request_may_have(embed: Embed) -> None:
    """Each client shows the user the limit and the setting."""
    refusals = (openai.BadRequestError, HfHubHTTPError, ollama.ResponseError)
    with pytest.raises(refusals, match=r"2049 texts; the limit is 2048 \(MAX_INPUTS\)"):
        embed(["a"] * 2049)
