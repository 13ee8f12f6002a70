"""What a text's embedding is: tokens -> chunks -> vectors -> mean -> normalise. Knows no HTTP."""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from chunks import Chunk, Chunker, Side
from engine import spans
from engine.bundle import Bundle, Manifest
from engine.errors import InvalidInput
from engine.protocol import Engine
from engine.queue import Queue
from limits import TextLimits
from tokens import Int64, TextTokenizer, Token, tokens_of

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """A text's vector and what it was made of."""

    vector: Float32  # shape (dimensions,)
    chunks: list[Chunk]
    chunk_vectors: Float32  # shape (len(chunks), dimensions)

    @property
    def tokens(self) -> int:
        """Tokens the engine computed for this text."""
        return sum(chunk.tokens for chunk in self.chunks)


class VectorCache:
    """The vectors of the chunks used last. Safe to call from any number of threads.

    Args:
        size: most vectors that are kept; each takes 4 bytes a dimension, and about 300 more.
        observe: called with the number of hits and of misses of each `get`.
    """

    def __init__(self, size: int, observe: Callable[[int, int], None] = lambda *_: None) -> None:
        self._size, self._observe = size, observe
        self._vectors: OrderedDict[tuple[str, bytes], Float32] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, model: str, keys: Collection[bytes]) -> dict[bytes, Float32]:
        """The cached vectors, each of shape (dimensions,), by key: a chunk's token ids as bytes."""
        cached, found = self._vectors, {}
        with self._lock:
            for key in keys:
                if (vector := cached.get((model, key))) is not None:
                    cached.move_to_end((model, key))
                    found[key] = vector
        self._observe(len(found), len(keys) - len(found))
        return found

    def put(self, model: str, vectors: Mapping[bytes, Float32]) -> None:
        """Cache vectors by key, and drop those not used for longest."""
        with self._lock:
            for key, vector in vectors.items():
                self._vectors[model, key] = vector.copy()
            while len(self._vectors) > self._size:
                self._vectors.popitem(last=False)


def compute_chunks(
    engine: Engine,
    queue: Queue,
    cache: VectorCache | None,
    chunks: Sequence[Int64],
    deadline: float,
    gone: Callable[[], bool] | None,
    tenant: str | None,
) -> Float32:
    """An engine's vectors of chunks' token ids, shape (len(chunks), dimensions). Equal chunks are
    computed once, cached ones not at all. Other arguments and errors are `Queue.submit`'s.
    """
    if len(chunks) == 1 and cache is None:
        return queue.submit(engine, chunks, [len(chunks[0])], deadline, gone, tenant)
    keys = [ids.tobytes() for ids in chunks]
    inputs = dict(zip(keys, chunks))
    vectors = cache.get(engine.name, inputs) if cache else {}
    missing = {key: ids for key, ids in inputs.items() if key not in vectors}
    costs = [len(ids) for ids in missing.values()]
    computed = queue.submit(engine, [*missing.values()], costs, deadline, gone, tenant)
    new = dict(zip(missing, computed))
    if cache:
        cache.put(engine.name, new)
    vectors |= new
    return np.stack([vectors[key] for key in keys])


class Truncation(NamedTuple):
    """What becomes of a request's `truncate`."""

    honoured: bool = True  # else a long text is averaged over its chunks as any other
    observe: Callable[[int], None] = lambda _: None  # gets the number of a request's texts cut


class TextEmbedder:
    """Embeds texts with one model. Safe to call from any number of threads."""

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: Tokenizer,
        engine: Engine,
        queue: Queue,
        limits: TextLimits,
        cache: VectorCache | None = None,
        truncation: Truncation = Truncation(),
    ) -> None:
        self.manifest, self.limits = bundle.manifest, limits
        self.engine = engine
        self._chunk_vectors = partial(compute_chunks, engine, queue, cache)
        self._truncation = truncation
        self._tokenizer = TextTokenizer(tokenizer)
        self._chunker = Chunker(self._tokenizer, self.manifest.max_tokens)

    @property
    def precision(self) -> str:
        return self.engine.precision

    def widen(self) -> None:
        """Prepare the engine for calls that have all cores to themselves."""
        self.engine.widen()

    def embed(
        self,
        texts: Sequence[str],
        *,
        deadline: float,
        gone: Callable[[], bool] | None = None,
        tenant: str | None = None,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate: Side | None = None,
        limits: TextLimits | None = None,
    ) -> list[TextEmbedding]:
        """Embed texts, each alone.

        A text longer than the model's window is split into chunks of near-equal length at word
        borders. Its vector is the mean of the chunks' vectors as the model gives them, normalised
        again where the model normalises.

        Args:
            deadline: when to give up, on the clock of `time.monotonic`.
            gone: whether the caller has gone, as `Queue.submit` takes it.
            tenant: with whose requests it shares the queue.
            prompt_name: one of the model's prompts, put before every chunk; None means its default.
            dimensions: keep this many leading values (Matryoshka models; of the layer norm, if the
                manifest says so), and normalise again where the vector was normalised; None: as
                many as the manifest says.
            normalize: whether vectors have length 1; None does as the model does.
            truncate: drop what exceeds the window on this side instead of splitting the text, if
                that is honoured.
            limits: in place of the embedder's own.

        Returns: one TextEmbedding a text, in order.
        Raises: InvalidInput, InputTooLarge, and what `Queue.submit` raises.
        """
        manifest = self.manifest
        dimensions = checked_dimensions(dimensions, manifest)
        split = partial(
            self.chunk, texts, prompt_name=prompt_name, truncate=truncate, limits=limits
        )
        chunks = spans.timed(spans.TOKENISE, split, len(texts))
        inputs = [chunk.token_ids for pieces in chunks for chunk in pieces]
        computed = self._chunk_vectors(inputs, deadline, gone, tenant)
        unit = manifest.normalized if normalize is None else normalize
        chunk_vectors = shorten_and_scale(computed, dimensions, unit, manifest.layer_norm)
        vectors = chunk_vectors
        if len(computed) > len(texts):
            if unit and manifest.normalized:  # the mean is of what the model gives
                computed = unit_vectors(computed)
            counts = [len(pieces) for pieces in chunks]
            means = np.add.reduceat(computed, np.cumsum([0, *counts[:-1]]), axis=0)
            means /= np.array(counts, np.float32)[:, None]
            vectors = shorten_and_scale(means, dimensions, unit, manifest.layer_norm)
        results, end = [], 0
        for row, pieces in enumerate(chunks):
            start, end = end, end + len(pieces)
            results.append(TextEmbedding(vectors[row], pieces, chunk_vectors[start:end]))
        return results

    def similarities(
        self,
        sentences: Sequence[str],
        source: str,
        *,
        deadline: float,
        gone: Callable[[], bool] | None = None,
        tenant: str | None = None,
        prompt_name: str | None = None,
        truncate: Side | None = None,
    ) -> list[float]:
        """Cosine of each sentence to `source`. Other arguments and errors are `embed`'s."""
        if not sentences:
            raise InvalidInput("no sentence to compare with; send at least one")
        try:
            embedded = self.embed(
                [*sentences, source],
                deadline=deadline,
                gone=gone,
                tenant=tenant,
                prompt_name=prompt_name,
                normalize=True,
                truncate=truncate,
            )
        except InvalidInput as error:
            if error.index == len(sentences):
                message = f"source_sentence: {error}"
                raise type(error)(message, field="source_sentence") from None
            raise
        vectors = np.stack([embedding.vector for embedding in embedded])
        return [float(cosine) for cosine in vectors[:-1] @ vectors[-1]]

    def tokenize(
        self, texts: Sequence[str], *, prompt_name: str | None = None, add_special_tokens: bool
    ) -> list[list[Token]]:
        """Each text's tokens and its prompt's, uncut. Raises: InvalidInput, InputTooLarge."""
        self.limits.check(texts)
        prompt = self._prompt(prompt_name)
        results, total = [], 0
        for index, text in enumerate(texts):
            encoding = self._tokenizer.encode(prompt + text, add_special_tokens)
            total += len(encoding)
            self.limits.check_tokens(total, index)
            results.append(tokens_of(encoding, text, prompt))
        return results

    def chunk(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = None,
        truncate: Side | None = None,
        limits: TextLimits | None = None,
    ) -> list[list[Chunk]]:
        """Each text's chunks. Raises: InvalidInput, InputTooLarge, at the first wrong text."""
        limits = limits or self.limits
        limits.check(texts)
        prompt = self._prompt(prompt_name)
        truncate = truncate if self._truncation.honoured else None
        results, total = [], 0
        for index, text in enumerate(texts):
            try:
                pieces = self._chunker.split(text, prompt, truncate)
            except InvalidInput as error:
                error.index = index
                raise
            total += sum(chunk.tokens for chunk in pieces)
            limits.check_tokens(total, index)
            results.append(pieces)
        if truncate and (cut := sum(pieces[0].truncated for pieces in results)):
            self._truncation.observe(cut)
        return results

    def _prompt(self, name: str | None) -> str:
        prompts = self.manifest.prompts
        if name is None:
            name = self.manifest.default_prompt
        elif name not in prompts:
            known = ", ".join(sorted(prompts)) or "none"
            message = f"prompt_name is {name!r}; this model has: {known}"
            raise InvalidInput(message, field="prompt_name")
        return "" if name is None else prompts.get(name, "")


def checked_dimensions(dimensions: int | None, manifest: Manifest) -> int | None:
    """What the model's vectors are cut to: `dimensions`, or else its default.

    Raises: InvalidInput unless they can be cut to it.
    """
    if dimensions is not None and not 1 <= dimensions <= manifest.dimensions:
        message = f"dimensions is {dimensions}; this model takes 1 to {manifest.dimensions}"
        raise InvalidInput(message, field="dimensions")
    return manifest.default_dimensions if dimensions is None else dimensions


def shorten_and_scale(
    vectors: Float32, dimensions: int | None, unit: bool, layer_norm: bool = False
) -> Float32:
    """Rows cut to `dimensions` (of their layer norm, if `layer_norm`), of length 1 if `unit`."""
    if dimensions is not None and dimensions < vectors.shape[1]:
        vectors = (_layer_norm(vectors) if layer_norm else vectors)[:, :dimensions]
    return unit_vectors(vectors) if unit else vectors


def unit_vectors(vectors: Float32) -> Float32:
    """Scale rows to length 1, as torch.nn.functional.normalize does (zeros stay zeros)."""
    if len(vectors) == 1:  # most requests are one text: half the calls into NumPy
        vector = vectors[0]
        return vectors / max(math.sqrt(vector.dot(vector)), 1e-12)
    lengths = np.sqrt(np.vecdot(vectors, vectors))[:, None]
    scaled: Float32 = vectors / np.maximum(lengths, np.float32(1e-12))
    return scaled


def _layer_norm(vectors: Float32) -> Float32:
    """torch.nn.functional.layer_norm of whole rows, without weights and with its epsilon."""
    centred = vectors - vectors.mean(axis=1, keepdims=True)
    deviations = np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    return np.asarray(centred / deviations, np.float32)
