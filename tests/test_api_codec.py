"""api/codec.py, where no request over HTTP shows it."""

import gc
from collections.abc import Iterator

import pytest

from api.codec import decode, read_json
from api.schemas import OpenAIEmbedRequest
from server.messages import HttpError, Request


@pytest.fixture
def collections() -> Iterator[list[str]]:
    """The garbage collections that begin."""
    begun = list[str]()

    def note(phase: str, _: object) -> None:
        if phase == "start":
            begun.append(phase)

    gc.collect()
    gc.callbacks.append(note)
    yield begun
    gc.callbacks.remove(note)
    assert gc.isenabled()


def request(body: bytes) -> Request:
    return Request("POST", "/v1/embeddings", "/v1/embeddings", body=body, length=len(body))


@pytest.mark.parametrize("item", [b"[]", b"[1]", b"[1,2]"])
@pytest.mark.parametrize("more", [b"", b',"unknown":1'])
def test_a_body_is_decoded_without_collections(
    item: bytes, more: bytes, collections: list[str]
) -> None:
    body = b'{"input":[' + b",".join([item] * 50_000) + b"]" + more + b"}"
    assert len(read_json(request(body), OpenAIEmbedRequest).input) == 50_000
    assert len(collections) <= 3  # one when each decoding has ended, and not one for each 700 lists


@pytest.mark.parametrize(
    "body", [b"{", b'{"input":1}', b"\xff", b'{"input":' + b"[" * 5000, b'{"input":["\xed\xa0"]}']
)
def test_collections_go_on_after_a_body_that_is_refused(
    body: bytes, collections: list[str]
) -> None:
    with pytest.raises(HttpError):
        decode(body, OpenAIEmbedRequest)
    assert gc.isenabled()
