"""The engine in this process: what it can do at best, and what it does behind embedder and Queue
as `main` builds them.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import main
import settings as configuration
from api.service import Embedders
from benchmark.loads import IMAGES, LOADS, Load, exact_texts, images, texts
from benchmark.plain import Plain
from benchmark.report import Progress, Row, row
from benchmark.traffic import Result, alternate
from embeddings import TextEmbedder, TextLimits
from engine.protocol import Batch, Engine
from engine.queue import Queue
from engine.bundle import Bundle, Precision, discover
from engine.models import Models
from engine.choice import text_engine
from engine.openvino_backend import available_precisions
from image_embeddings import ImageEmbedder
from settings import Settings
from tokens import Int64, load_tokenizer

DEADLINE = 600.0  # seconds; nothing here should wait that long
TEXTS = 64  # of one length, sent in turn
PLAIN = "sentence-transformers"
SAMPLE_TOKENS = 24_000  # of a load, for the ceiling: some seconds' work


def settings() -> Settings:
    """The service's configuration, as the environment has it. Raises: SettingsError."""
    return configuration.load(os.environ)


def default_bundle(options: Settings) -> Bundle:
    """The bundle that answers requests without `model`. Raises: BundleError, ModelNotFound."""
    bundles = discover(pathlib.Path(options.models_dir))
    return Models[object](bundles, options.embedding_model or None, options.aliases).bundle()


class CountingQueue(Queue):
    """The service's Queue; it also sums up what engines have computed."""

    def __init__(self, **limits: Any) -> None:
        super().__init__(**limits)
        self.tokens = self.padded_tokens = 0
        self.observe = self._count

    def _count(self, batch: Batch, seconds: float, failed: bool) -> None:
        with self._lock:
            self.tokens += batch.tokens
            self.padded_tokens += batch.padded_tokens


def batcher(options: Settings) -> CountingQueue:
    """As `main.create_app` makes it, not started."""
    return CountingQueue(
        max_batch_size=options.max_batch_size,
        max_batch_tokens=options.max_batch_tokens,
        max_queue_tokens=options.max_queue_tokens,
        threads=options.inference_threads,
    )


def drive(embed: Callable[[int], None], company: int, seconds: float) -> Result:
    """Call `embed` with 0, 1, 2 … from `company` threads at once for some seconds.

    Returns: calls a second, each thread's own taken over the time it was at it.
    """
    numbers, latencies, rates = itertools.count(), [], []
    deadline = time.perf_counter() + seconds

    def caller() -> None:
        begun = done = time.perf_counter()
        own: list[float] = []
        while not own or done < deadline:
            sent = done
            embed(next(numbers))
            done = time.perf_counter()
            own.append((done - sent) * 1e3)
        latencies.extend(own)
        rates.append(len(own) / (done - begun))

    in_threads(caller, company)
    return Result(sum(rates), tuple(latencies), 0)


def in_threads(work: Callable[[], None], number: int) -> None:
    """Run `work` in so many threads and wait for them. Raises: the first error of any."""
    errors: list[Exception] = []

    def guarded() -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Ceiling:
    """One load on the engine alone: no HTTP, no queue, its texts tokenised ahead, in perfect
    batches.
    """

    def __init__(self, engine: Engine, options: Settings, chunks: list[list[Int64]]):
        """`chunks` are each text's, as the embedder splits it."""
        self.engine, self.threads = engine, options.inference_threads
        self.texts_a_chunk = len(chunks) / sum(map(len, chunks))
        self.chunks = sorted(itertools.chain(*chunks), key=len)
        self.limits = options.max_batch_size, options.max_batch_tokens
        self.batch_size = 0  # the best, once `choose` has looked for it

    def batches(self, most: int) -> list[list[Int64]]:
        """The chunks in batches of at most so many, each of near-equal lengths, in random order.
        As the Queue has it, one of several chunks keeps MAX_BATCH_TOKENS.
        """
        batches: list[list[Int64]] = [[]]
        for chunk in self.chunks:
            size = len(batches[-1]) + 1
            if size > most or (size > 1 and len(chunk) * size > self.limits[1]):
                batches.append([])
            batches[-1].append(chunk)
        random.Random(0).shuffle(batches)
        return batches

    def choose(self, seconds: float) -> None:
        """Find the best batch size, of the powers of two within the limits."""
        sizes = [1 << power for power in range(12) if 1 << power <= self.limits[0]]
        rates = {}
        for size in sizes:
            rates[size] = self.run(size, seconds / 2)
        self.batch_size = max(rates, key=rates.__getitem__)

    def run(self, batch_size: int, seconds: float, threads: int | None = None) -> float:
        """Texts a second on all cores, a call at a time for each stream."""
        calls: Iterator[list[Int64]] = itertools.cycle(self.batches(batch_size))
        rates, deadline = [], time.perf_counter() + seconds

        def caller() -> None:
            begun, chunks = time.perf_counter(), 0
            while time.perf_counter() < deadline:
                batch = next(calls)
                self.engine.run(batch)
                chunks += len(batch)
            rates.append(chunks / (time.perf_counter() - begun))

        in_threads(caller, threads or self.threads)
        return sum(rates) * self.texts_a_chunk


def precisions(bundle: Bundle) -> list[Precision]:
    """What this CPU and this bundle offer."""
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


def padding(
    options: Settings, bundle: Bundle, pairs: Sequence[tuple[str, int]], seconds: float
) -> list[Row]:
    """Of the tokens that the engine computes under a load, how many are padding: counted in the
    Queue's own batches, while so many threads embed.
    """
    progress, rows = Progress(len(pairs)), []
    for name, company in pairs:
        progress(f"{name} from {company} threads")
        queue, load = batcher(options), LOADS[name]
        queue.start()
        embedder = main.load_embedder(bundle, options, queue)
        queue.tokens = queue.padded_tokens = 0  # without the probe
        source = texts(load, seed=1)
        requests = [list(itertools.islice(source, load.texts)) for _ in range(512)]
        result = drive(_embed(embedder, requests), company, seconds * load.times)
        queue.close()
        rows.append(
            {
                "load": f"{name}-c{company}",
                "rate": result.rate * load.texts,
                "real_tokens": queue.tokens,
                "padded_tokens": queue.padded_tokens,
                "wasted": 1 - queue.tokens / queue.padded_tokens,
            }
        )
    progress.close()
    return rows


def _embed(embedder: TextEmbedder, requests: Sequence[Sequence[str]]) -> Callable[[int], None]:
    def call(number: int) -> None:
        embedder.embed(requests[number % len(requests)], deadline=time.monotonic() + DEADLINE)

    return call


def _embed_images(embedder: ImageEmbedder, files: Sequence[bytes]) -> Callable[[int], None]:
    def call(number: int) -> None:
        file = files[number % len(files)]
        embedder.embed([file], deadline=time.monotonic() + DEADLINE)

    return call


def speed(
    options: Settings,
    bundle: Bundle,
    plain: Plain | None,
    lengths: Sequence[int],
    companies: Sequence[int],
    seconds: float,
    rounds: int,
) -> list[Row]:
    """Texts of exactly so many tokens, and pictures where the model takes them, one at a time and
    in company, at every precision; with their ratio to sentence-transformers, which gets the same
    chunks, and its company in one call.

    Raises: BundleError; ValueError for a length that this tokenizer cannot make.
    """
    queue = batcher(options)
    queue.start()
    made = embedders(options, bundle, queue)
    tokenizer, _, _ = load_tokenizer(bundle)
    pictures = "image" in bundle.manifest.modalities
    names = [f"{tokens} tokens" for tokens in lengths] + [IMAGES] * pictures
    progress, rows = Progress(len(names) * len(companies) * (rounds + 1)), []
    for at, name in enumerate(names):
        sides: dict[str, Callable[[int, float], Result]] = {}
        tokens = lengths[at] if at < len(lengths) else None
        if tokens:
            sent = exact_texts(lambda text: len(tokenizer.encode(text).ids), tokens, TEXTS)
            for precision, (texts_embedder, _) in made.items():
                call = _embed(texts_embedder, [[text] for text in sent])
                sides[precision] = functools.partial(drive, call)
            cut = next(iter(made.values())).texts.chunk
            pieces = [[text[c.start : c.end] for c in cut([text])[0]] for text in sent]
            if plain:
                sides[PLAIN] = functools.partial(plain.texts, pieces)
        else:
            files = images(16)
            for precision, (_, image_embedder) in made.items():
                assert image_embedder
                sides[precision] = functools.partial(drive, _embed_images(image_embedder, files))
            if plain:
                sides[PLAIN] = functools.partial(plain.images, files)
        for company in companies:
            results = _rounds(sides, company, seconds, rounds, progress, name)
            for side, own in results.items():
                rates = row(side, name, company, own, results.get(PLAIN, []))
                rows.append({**rates, "tokens": rates["rate"] * tokens if tokens else None})
    queue.close()
    progress.close()
    return rows


def _rounds(
    sides: Mapping[str, Callable[[int, float], Result]],
    company: int,
    seconds: float,
    rounds: int,
    progress: Progress,
    name: str,
) -> dict[str, list[Result]]:
    results: dict[str, list[Result]] = {side: [] for side in sides}

    def one(side: str, number: int) -> None:
        result = sides[side](company, seconds if number else min(0.5, seconds))
        results[side] += [result] if number else []

    progress.doing = f"{name}, {company} at a time, "
    alternate([functools.partial(one, side) for side in sides], rounds, progress)
    return results


def ceilings(options: Settings, bundle: Bundle, loads: dict[str, Load]) -> dict[str, Ceiling]:
    """One for each load, all on one engine. Raises: BundleError, PrecisionUnavailable."""
    tokenizer, pad_id, pad_left = load_tokenizer(bundle)
    engine = text_engine(
        bundle,
        options.precision,
        pad_id=pad_id,
        pad_left=pad_left,
        streams=options.inference_threads,
    )
    limits = TextLimits(1 << 30, 1 << 30, 1 << 30)
    embedder = TextEmbedder(bundle, tokenizer, engine, batcher(options), limits)
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
