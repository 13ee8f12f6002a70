"""The engine in this process: how fast it is at best, and behind the embedder and the Queue as
`main` builds them.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import main
import settings as configuration
from api.service import Embedders
from embeddings import TextEmbedder
from engine.bundle import Bundle, Precision
from engine.choice import precisions
from engine.protocol import Engine
from image_embeddings import ImageEmbedder
from loadtest.client import Result
from loadtest.loads import IMAGES, LOADS, exact_texts, images, texts
from loadtest.reference import Reference
from loadtest.report import Row, compare
from loadtest.rounds import Side, call_repeatedly
from settings import Settings
from tokens import Int64, load_tokenizer

DEADLINE = 600.0  # seconds; nothing here should wait that long
TEXTS = 64  # of one length, sent in turn
PICTURES = 16
REFERENCE = "sentence-transformers"
SAMPLE_TOKENS = 24_000  # of a load, for the ceiling: some seconds of work


def settings() -> Settings:
    """The service's configuration, from the environment, without a limit to waiting.

    Raises: SettingsError.
    """
    return dataclasses.replace(configuration.load(os.environ), max_queue_seconds=math.inf)


def default_bundle(options: Settings) -> Bundle:
    """The bundle that answers requests without `model`. Raises: BundleError, ModelNotFound."""
    return main.make_models(options).bundle()


class Ceiling:
    """One load on the engine alone: no HTTP, no queue, texts tokenised ahead, perfect batches."""

    def __init__(self, engine: Engine, options: Settings, chunks: list[list[Int64]]):
        """`chunks` are each text's, as the embedder splits it."""
        self.engine, self.threads = engine, options.inference_threads
        self.texts_a_chunk = len(chunks) / sum(map(len, chunks))
        self.chunks = sorted(itertools.chain(*chunks), key=len)
        self.limits = options.max_batch_size, options.max_batch_tokens
        self.batch_size = 0  # the best, once `best` has looked for it

    def batches(self, most: int) -> list[list[Int64]]:
        """The chunks in batches of at most `most`, each of near-equal lengths, in random order. As
        in the Queue, a batch of several chunks keeps within MAX_BATCH_TOKENS.
        """
        batches: list[list[Int64]] = [[]]
        for chunk in self.chunks:
            size = len(batches[-1]) + 1
            if size > most or (size > 1 and len(chunk) * size > self.limits[1]):
                batches.append([])
            batches[-1].append(chunk)
        random.Random(0).shuffle(batches)
        return batches

    def best(self, number: int, seconds: float) -> Result:
        """All cores, at the best batch size. Round 0 looks for it among the powers of two."""
        if number:
            return self.run(self.batch_size, seconds)
        sizes = [1 << power for power in range(self.limits[0].bit_length())]
        rates = {size: self.run(size, seconds / 2).rate for size in sizes}
        self.batch_size = max(rates, key=rates.__getitem__)
        return Result(0.0)

    def run(self, batch_size: int, seconds: float) -> Result:
        """Texts a second, from a call at a time in each thread."""
        batches = self.batches(batch_size)

        def call(number: int) -> int:
            batch = batches[number % len(batches)]
            self.engine.run(batch)
            return len(batch)

        result = call_repeatedly(call, self.threads, seconds)
        return result._replace(rate=result.rate * self.texts_a_chunk)


def ceilings(options: Settings, bundle: Bundle, names: Iterable[str]) -> dict[str, Ceiling]:
    """One for each of LOADS named, all on one engine. Raises: BundleError, PrecisionUnavailable."""
    with contextlib.closing(main.make_queue(options)) as queue:  # for the probe of the bundle
        queue.start()
        embedder = main.load_embedder(bundle, options, queue)
    made = {}
    for name in names:
        chunks: list[list[Int64]] = []
        source, tokens = texts(LOADS[name], seed=1), 0
        while tokens < SAMPLE_TOKENS:
            (pieces,) = embedder.chunk([next(source)])
            chunks.append([chunk.token_ids for chunk in pieces])
            tokens += sum(chunk.tokens for chunk in pieces)
        made[name] = Ceiling(embedder.engine, options, chunks)
    return made


class Kind(NamedTuple):
    """Texts of one length, or pictures."""

    name: str
    tokens: int | None  # of each text
    embedders: Mapping[Precision, TextEmbedder | ImageEmbedder]
    inputs: Sequence[Any]
    parts: Sequence[Sequence[str | bytes]]  # the same inputs for sentence-transformers


def speed(
    options: Settings,
    bundle: Bundle,
    reference: Reference | None,
    lengths: Sequence[int],
    concurrencies: Sequence[int],
    seconds: float,
    rounds: int,
) -> list[Row]:
    """Texts of exactly so many tokens, and pictures where the model takes them, by so many callers
    at a time, at every precision. Their ratio is to sentence-transformers, which gets the same
    chunks, and those of all callers in one call.

    Raises: BundleError; ValueError for a length that this tokenizer cannot make.
    """
    made: dict[Precision, Embedders] = {}
    rows = []
    with contextlib.closing(main.make_queue(options)) as queue:
        queue.start()
        for precision in precisions(bundle):
            ours = dataclasses.replace(options, precision=precision)
            made[precision] = main.load_embedders(bundle, ours, queue)
        for kind, number in itertools.product(_kinds(bundle, made, lengths), concurrencies):
            sides: list[tuple[str, Side]] = [
                (precision, _embed(embedder, kind.inputs, number))
                for precision, embedder in kind.embedders.items()
            ]
            if reference:
                sides.append((REFERENCE, _encode(reference, kind.parts, number)))
            for row in compare(kind.name, number, sides, reference is not None, seconds, rounds):
                tokens = row["rate"] * kind.tokens if kind.tokens else None
                rows.append({**row, "tokens": tokens})
    return rows


def _kinds(
    bundle: Bundle, made: Mapping[Precision, Embedders], lengths: Sequence[int]
) -> Iterator[Kind]:
    tokenizer, _, _ = load_tokenizer(bundle)
    embedders = {precision: each.embedder for precision, each in made.items()}
    for tokens in lengths:
        sent = exact_texts(lambda text: len(tokenizer.encode(text).ids), tokens, TEXTS)
        split = next(iter(embedders.values())).chunk
        parts = [[text[c.start : c.end] for c in split([text])[0]] for text in sent]
        yield Kind(f"{tokens} tokens", tokens, embedders, sent, parts)
    if "image" in bundle.manifest.modalities:
        files = images(PICTURES)
        pictures = {precision: each.images for precision, each in made.items() if each.images}
        yield Kind(IMAGES, None, pictures, files, [[file] for file in files])


def _embed(embedder: TextEmbedder | ImageEmbedder, inputs: Sequence[Any], threads: int) -> Side:
    """Callers that embed the inputs in turn, one a call."""

    def embed(number: int) -> int:
        one = inputs[number % len(inputs)]
        embedder.embed([one], deadline=time.monotonic() + DEADLINE)
        return 1

    return lambda _, seconds: call_repeatedly(embed, threads, seconds)


def _encode(reference: Reference, parts: Sequence[Sequence[str | bytes]], concurrency: int) -> Side:
    return lambda _, seconds: reference.encode(parts, concurrency, seconds)
