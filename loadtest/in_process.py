"""The engine in this process: how fast it is at best, and behind the embedder and the Queue as
`main` builds them.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import main
import settings as configuration
from api.service import Embedders
from embeddings import TextEmbedder, TextLimits
from engine.bundle import Bundle, Precision, discover
from engine.choice import text_engine
from engine.models import Models
from engine.openvino_backend import available_precisions
from engine.protocol import Engine
from engine.queue import Queue
from image_embeddings import ImageEmbedder
from loadtest.client import Result
from loadtest.loads import IMAGES, Load, exact_texts, images, texts
from loadtest.reference import Reference
from loadtest.report import Row, row
from loadtest.rounds import Progress, alternate, call_repeatedly, in_threads
from settings import Settings
from tokens import Int64, load_tokenizer

DEADLINE = 600.0  # seconds; nothing here should wait that long
TEXTS = 64  # of one length, sent in turn
REFERENCE = "sentence-transformers"
SAMPLE_TOKENS = 24_000  # of a load, for the ceiling: some seconds of work
Side = Callable[[int, float], Result]  # concurrency, seconds


def settings() -> Settings:
    """The service's configuration, from the environment. Raises: SettingsError."""
    return configuration.load(os.environ)


def default_bundle(options: Settings) -> Bundle:
    """The bundle that answers requests without `model`. Raises: BundleError, ModelNotFound."""
    bundles = discover(pathlib.Path(options.models_dir))
    return Models[object](bundles, options.embedding_model or None, options.aliases).bundle()


def make_queue(options: Settings) -> Queue:
    """As `main.create_app` makes it, not started."""
    return Queue(
        max_batch_size=options.max_batch_size,
        max_batch_tokens=options.max_batch_tokens,
        max_queue_tokens=options.max_queue_tokens,
        threads=options.inference_threads,
    )


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
        if not number and not self.batch_size:
            sizes = [1 << power for power in range(12) if 1 << power <= self.limits[0]]
            rates = {size: self.run(size, seconds / 2) for size in sizes}
            self.batch_size = max(rates, key=rates.__getitem__)
        return Result(self.run(self.batch_size, seconds) if number else 0.0)

    def alone(self, number: int, seconds: float) -> Result:
        """One text a call, one call at a time."""
        return Result(self.run(1, seconds, threads=1) if number else 0.0)

    def run(self, batch_size: int, seconds: float, threads: int | None = None) -> float:
        """Texts a second, from a call at a time in each thread; as many threads as usual or so
        many.
        """
        calls: Iterator[list[Int64]] = itertools.cycle(self.batches(batch_size))
        deadline = time.perf_counter() + seconds

        def caller() -> float:
            begun, chunks = time.perf_counter(), 0
            while time.perf_counter() < deadline:
                batch = next(calls)
                self.engine.run(batch)
                chunks += len(batch)
            return chunks / (time.perf_counter() - begun)

        return sum(in_threads(caller, threads or self.threads)) * self.texts_a_chunk


def ceilings(options: Settings, bundle: Bundle, loads: dict[str, Load]) -> dict[str, Ceiling]:
    """One for each load, all on one engine. Raises: BundleError, PrecisionUnavailable."""
    tokenizer, pad_id, pad_left = load_tokenizer(bundle)
    engine = text_engine(
        bundle,
        options.precision,
        isa=options.encoder_isa,
        pad_id=pad_id,
        pad_left=pad_left,
        streams=options.inference_threads,
    )
    limits = TextLimits(1 << 30, 1 << 30, 1 << 30)
    embedder = TextEmbedder(bundle, tokenizer, engine, make_queue(options), limits)
    made = {}
    for name, load in loads.items():
        chunks: list[list[Int64]] = []
        source, tokens = texts(load, seed=1), 0
        while tokens < SAMPLE_TOKENS:
            (pieces,) = embedder.chunk([next(source)])
            chunks.append([chunk.token_ids for chunk in pieces])
            tokens += sum(chunk.tokens for chunk in pieces)
        made[name] = Ceiling(engine, options, chunks)
    return made


def precisions(bundle: Bundle) -> list[Precision]:
    """The precisions that both this CPU and this bundle offer."""
    return [precision for precision in available_precisions() if bundle.offers(precision)]


def embedders(options: Settings, bundle: Bundle, queue: Queue) -> dict[str, Embedders]:
    """The bundle at each precision, all behind one Queue as `main` has it.

    Raises: BundleError.
    """
    made: dict[str, Embedders] = {}
    for precision in precisions(bundle):
        ours = dataclasses.replace(options, precision=precision)
        pictures = "image" in bundle.manifest.modalities
        made[precision] = Embedders(
            main.load_embedder(bundle, ours, queue),
            main.load_image_embedder(bundle, ours, queue) if pictures else None,
        )
    return made


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
    queue = make_queue(options)
    queue.start()
    made = embedders(options, bundle, queue)
    loads: list[int | None] = [*lengths]  # tokens; None for pictures
    if "image" in bundle.manifest.modalities:
        loads.append(None)
    progress, rows = Progress(len(loads) * len(concurrencies) * (rounds + 1)), []
    for tokens in loads:
        sides = _text_sides(bundle, made, reference, tokens) if tokens else {}
        sides = sides or _image_sides(made, reference)
        name = f"{tokens} tokens" if tokens else IMAGES
        for number in concurrencies:
            progress.doing = f"{name}, {number} at a time, "
            bound = {side: _at_concurrency(run, number) for side, run in sides.items()}
            results = alternate(bound, seconds, rounds, progress)
            for side, own in results.items():
                rates = row(side, name, number, own, results.get(REFERENCE, []))
                rows.append({**rates, "tokens": rates["rate"] * tokens if tokens else None})
    queue.close()
    progress.close()
    return rows


def _at_concurrency(run: Side, concurrency: int) -> Callable[[int, float], Result]:
    return lambda _, seconds: run(concurrency, seconds)


def _text_sides(
    bundle: Bundle, made: dict[str, Embedders], reference: Reference | None, tokens: int
) -> dict[str, Side]:
    tokenizer, _, _ = load_tokenizer(bundle)
    sent = exact_texts(lambda text: len(tokenizer.encode(text).ids), tokens, TEXTS)
    sides = {name: _side(each.texts, sent) for name, each in made.items()}
    if reference:
        split = next(iter(made.values())).texts.chunk
        pieces = [[text[c.start : c.end] for c in split([text])[0]] for text in sent]
        sides[REFERENCE] = functools.partial(reference.texts, pieces)
    return sides


def _image_sides(made: dict[str, Embedders], reference: Reference | None) -> dict[str, Side]:
    files = images(16)
    sides = {name: _side(each.images, files) for name, each in made.items() if each.images}
    if reference:
        sides[REFERENCE] = functools.partial(reference.images, files)
    return sides


def _side(embedder: TextEmbedder | ImageEmbedder, inputs: Sequence[Any]) -> Side:
    """A caller that embeds the inputs in turn, one a call."""

    def embed(number: int) -> None:
        one = inputs[number % len(inputs)]
        embedder.embed([one], deadline=time.monotonic() + DEADLINE)

    return functools.partial(call_repeatedly, embed)
