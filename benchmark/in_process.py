"""The engine in this process: what it can do at best, and what it does behind embedder and Batcher
as `main` builds them.
"""

import itertools
import os
import pathlib
import random
import threading
import time
from collections.abc import Callable, Iterator

import settings as configuration
from benchmark.loads import Load, texts
from benchmark.traffic import Result
from embeddings import Int64, TextEmbedder, TextLimits, load_tokenizer
from engine.batching import Batch, Batcher
from engine.bundle import Bundle, discover
from engine.models import Models
from engine.openvino_backend import OpenVINOTextEngine, choose_precision
from settings import Settings

DEADLINE = 600.0  # seconds; nothing here should wait that long
SAMPLE_TOKENS = 24_000  # of a load, for the ceiling: some seconds' work


def settings() -> Settings:
    """The service's configuration, as the environment has it. Raises: SettingsError."""
    return configuration.load(os.environ)


def default_bundle(options: Settings) -> Bundle:
    """The bundle that answers requests without `model`. Raises: BundleError, ModelNotFound."""
    bundles = discover(pathlib.Path(options.models_dir))
    return Models[object](bundles, options.embedding_model or None, options.aliases).bundle()


class CountingBatcher(Batcher):
    """The service's Batcher; it also sums up what it handed out."""

    tokens = padded_tokens = 0

    def next_batch(self) -> Batch | None:
        batch = super().next_batch()
        if batch:
            with self._lock:
                self.tokens += batch.tokens
                self.padded_tokens += batch.padded_tokens
        return batch


def batcher(options: Settings) -> CountingBatcher:
    """As `main.create_app` makes it, not started."""
    return CountingBatcher(
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
        own = []
        while done < deadline:
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

    def __init__(self, engine: OpenVINOTextEngine, options: Settings, chunks: list[list[Int64]]):
        """`chunks` are each text's, as the embedder splits it."""
        self.engine, self.threads = engine, options.inference_threads
        self.texts_a_chunk = len(chunks) / sum(map(len, chunks))
        self.chunks = sorted(itertools.chain(*chunks), key=len)
        self.limits = options.max_batch_size, options.max_batch_tokens
        self.batch_size = 0  # the best, once `choose` has looked for it

    def batches(self, most: int) -> list[list[Int64]]:
        """The chunks in batches of at most so many, each of near-equal lengths, in random order.
        As the Batcher has it, one of several chunks keeps MAX_BATCH_TOKENS.
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


def ceilings(options: Settings, bundle: Bundle, loads: dict[str, Load]) -> dict[str, Ceiling]:
    """One for each load, all on one engine. Raises: BundleError, PrecisionUnavailable."""
    tokenizer, pad_id, pad_left = load_tokenizer(bundle)
    engine = OpenVINOTextEngine(
        bundle,
        choose_precision(options.precision, bundle),
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
