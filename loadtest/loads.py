"""What is sent: random texts, all different, and pictures, in the requests of a dialect."""

import base64
import bisect
import io
import itertools
import json
import os
import random
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

# Common English words and a tail of rare ones; about 1.28 tokens each for BERT's tokenizer.
WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or "
    "had an they which one you were all her she there would their we him been has when who will no "
    "more if out so said what up its about into than them can only other new some could time these "
    "two may then do first any my now such like our over man me even most made after also did many "
    "before must through back years where much your way well down should because each just those "
    "people how too little state good very make world still own see men work long get here between "
    "both life being under never day same another know while last might us great old year off come "
    "since against go came right used take three small water house music river mountain history "
    "science energy market company city school student teacher doctor paper report result system "
    "number model search query answer question document language translation network computer "
    "program service price order customer payment delivery garden kitchen window forest animal "
    "horse bird weather winter summer morning photosynthesis electromagnetic jurisprudence "
    "archipelago Kierkegaard mitochondrial quaternion cryptography Reykjavik hyperparameter "
    "bougainvillea tokenization embeddings PostgreSQL Kubernetes antidisestablishment nanometre "
    "Übermensch café microservice backpropagation saxophone rheumatology Wollstonecraft isothermal "
    "polymerase sesquipedalian"
).split()
IMAGES = "image-640x480"

Dialect = Literal["native", "openai", "tei"]
DIALECTS: tuple[Dialect, ...] = ("native", "openai", "tei")


class Load(NamedTuple):
    """One kind of request, and how it is usually measured."""

    fewest: int  # words a text
    most: int
    connections: tuple[int, ...]
    texts: int = 1  # a request
    times: int = 1  # a round lasts so many times as long, for enough responses from slow loads


LOADS = {
    "query": Load(8, 18, (1, 16, 64)),
    "passage": Load(90, 120, (1, 16)),
    "mixed": Load(4, 200, (16,), times=2),
    "long": Load(380, 420, (4,), times=2),
    "batch32": Load(4, 120, (4,), texts=32, times=4),
}
STREAM = Load(390, 390, (1,), texts=100, times=8)  # about 490 tokens a text


class Target(NamedTuple):
    """A service and the dialect of the requests to it."""

    url: str
    dialect: Dialect = "native"
    path: str | None = None  # instead of the dialect's own route
    model: str = "model"  # sent where the dialect requires a model's name

    def request(self, texts: Sequence[str]) -> bytes:
        """A whole HTTP request. In the native dialect a single text goes to /embeddings."""
        if self.dialect == "openai":
            return self._post("/v1/embeddings", {"model": self.model, "input": texts})
        if self.dialect == "tei":
            return self._post("/embed", {"inputs": texts})
        if len(texts) == 1:
            return self._post("/embeddings", {"text": texts[0]})
        return self._post("/embeddings/batch", {"texts": texts})

    def image_request(self, file: bytes) -> bytes:
        """A whole HTTP request with one JPEG. Raises: ValueError for a dialect without pictures."""
        if self.dialect == "tei":
            raise ValueError("this dialect has no pictures")
        if self.dialect == "native":
            return self._send("/embeddings/image", "image/jpeg", file)
        uri = "data:image/jpeg;base64," + base64.b64encode(file).decode()
        body = {"model": self.model, "input": [uri], "modality": "image"}
        return self._post("/v1/embeddings", body)

    def _post(self, path: str, body: object) -> bytes:
        return self._send(path, "application/json", json.dumps(body, ensure_ascii=False).encode())

    def _send(self, path: str, content_type: str, body: bytes) -> bytes:
        address = urllib.parse.urlsplit(self.url)
        head = (
            f"POST {address.path.rstrip('/')}{self.path or path} HTTP/1.1\r\n"
            f"Host: {address.netloc}\r\nContent-Type: {content_type}\r\n"
            f"X-API-Key: {key()}\r\nAuthorization: Bearer {key()}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


def key() -> str:
    """The first of the keys that a service started from here takes."""
    return os.environ.get("VECTOR_EMBEDDER_API_KEY", "abc123").partition(",")[0].strip()


def usual(only: Sequence[str], connections: Sequence[int] | None = None) -> list[tuple[str, int]]:
    """Loads and numbers of connections in the order in which they are measured.

    Args:
        only: some of them, as `query` or as `query-c16`; all if empty.
        connections: for every load, instead of its own.
    """
    return [
        (name, number)
        for name, load in LOADS.items()
        for number in connections or load.connections
        if not only or name in only or f"{name}-c{number}" in only
    ]


def texts(load: Load, seed: int) -> Iterator[str]:
    """Endless texts, all different; the same seed gives the same."""
    source = random.Random(seed)
    while True:
        yield " ".join(source.choices(WORDS, k=source.randint(load.fewest, load.most)))


def requests(target: Target, load: Load, seed: int) -> Iterator[bytes]:
    """Endless requests, as bytes."""
    source = texts(load, seed)
    while True:
        yield target.request(list(itertools.islice(source, load.texts)))


def image_requests(target: Target) -> Iterator[bytes]:
    """Endless requests of one picture each; 16 pictures in turn."""
    return itertools.cycle([target.image_request(file) for file in images(16)])


def exact_texts(count: Callable[[str], int], tokens: int, number: int) -> list[str]:
    """Texts of exactly so many tokens.

    Args:
        count: the tokens of a text, special tokens included.

    Raises: ValueError where no text of these words has exactly so many tokens.
    """
    source, found = random.Random(tokens), []
    for _ in range(8 * number):
        words = source.choices(WORDS, k=tokens)
        lengths = range(1, tokens + 1)
        fit = bisect.bisect_right(lengths, tokens, key=lambda some: count(" ".join(words[:some])))
        missing = tokens - count(" ".join(words[:fit]))
        text = " ".join(words[:fit] + ["the"] * missing)
        if text and count(text) == tokens:
            found.append(text)
        if len(found) == number:
            return found
    raise ValueError(f"this tokenizer makes no texts of exactly {tokens} tokens")


def images(number: int) -> list[bytes]:
    """JPEGs of 640 x 480 pixels with smooth shapes, so that they compress as photographs do."""
    source = np.random.default_rng(0)
    files = []
    for _ in range(number):
        coarse = Image.fromarray(source.integers(0, 256, (60, 80, 3)).astype(np.uint8))
        file = io.BytesIO()
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
        files.append(file.getvalue())
    return files
