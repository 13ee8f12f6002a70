"""What the scores of a text, or of a pair of texts, are: tokens -> chunks -> raw scores -> the best
or the mean -> activation. Knows no HTTP.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from chunks import Chunk, Chunker, Side
from embeddings import Float32, Truncation, VectorCache, compute_chunks
from engine import spans
from engine.bundle import ScoreActivation, Bundle
from engine.errors import InputTooLarge, InvalidInput
from engine.protocol import Engine
from engine.queue import Queue
from limits import TextLimits
from tokens import PairTokenizer, Token, tokens_of

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class TextScores:
    """The raw scores of a text or a pair, and what they were made of."""

    raw: Float32  # shape (labels,)
    chunks: list[Chunk]  # of the text, or of the second text of a pair
    chunk_raw: Float32  # shape (len(chunks), labels)

    @property
    def tokens(self) -> int:
        """Tokens the engine computed for this input."""
        return sum(chunk.tokens for chunk in self.chunks)


class Most(NamedTuple):
    """Bounds of a text, or of the second text of a pair, that other services cut it to. Here it is
    refused: nothing is cut unless `truncate` asks for it.
    """

    tokens: int | None = None  # its own, without those of the first text and special tokens
    chunks: int | None = None
    names: tuple[str, str] = ("max_tokens_per_doc", "max_chunks_per_doc")  # of the options

    def check(self, chunks: Sequence[Chunk], around: int, index: int) -> None:
        """Raises: InvalidInput for chunks that have more, `around` tokens of each not counted."""
        tokens = sum(chunk.tokens - around for chunk in chunks)
        counts = (self.tokens, tokens, "tokens"), (self.chunks, len(chunks), "chunks")
        for name, (limit, count, noun) in zip(self.names, counts):
            if limit is not None and count > limit:
                raise InvalidInput(
                    f"it has {count} {noun}, and {name} is {limit}: documents are not cut here; "
                    f"leave {name} out, or send less of it",
                    index,
                )


class TextScorer:
    """Scores texts and pairs with one model. Safe to call from any number of threads."""

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
        """Raises: BundleError for one that gives no scores."""
        self.manifest, self.limits, self.engine = bundle.manifest, limits, engine
        assert bundle.manifest.scorer
        self.scorer = bundle.manifest.scorer
        self._truncation = truncation
        self._chunk_scores = partial(compute_chunks, engine, queue, cache)
        self._tokenizer = PairTokenizer(tokenizer, types=self.scorer.types)

    @property
    def precision(self) -> str:
        return self.engine.precision

    def widen(self) -> None:
        """Prepare the engine for calls that have all cores to themselves."""
        self.engine.widen()

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        deadline: float,
        gone: Callable[[], bool] | None = None,
        tenant: str | None = None,
        truncate: Side | None = None,
        limits: TextLimits | None = None,
        most: Most = Most(),
    ) -> list[TextScores]:
        """Score documents for a query, each as the second text of a pair.

        Arguments and errors are `score`'s. What is wrong with the query has `field` "query".
        """
        limits = limits or self.limits
        limits.check_count(len(documents), "document")
        try:
            limits.check([query])
        except InvalidInput as error:
            raise type(error)(f"query: {error}", field="query") from None
        pairs = [(query, document) for document in documents]
        waiting: Any = {"deadline": deadline, "gone": gone, "tenant": tenant}
        return self.score(pairs, **waiting, truncate=truncate, limits=limits, most=most)

    def score(
        self,
        inputs: Sequence[str | Pair],
        *,
        deadline: float,
        gone: Callable[[], bool] | None = None,
        tenant: str | None = None,
        truncate: Side | None = None,
        limits: TextLimits | None = None,
        most: Most = Most(),
    ) -> list[TextScores]:
        """Score texts, or pairs of them, each alone.

        A text, or the second text of a pair, that is longer than what the window leaves is split
        into chunks at word borders, each beside the whole first text. A reranker's score is its
        best chunk's; of a classifier, each label's raw score is the mean of the chunks'.

        Args:
            deadline: when to give up, on the clock of `time.monotonic`.
            gone: whether the caller has gone, as `Queue.submit` takes it.
            tenant: with whose requests it shares the queue.
            truncate: drop what exceeds the window on this side instead of splitting, if that is
                honoured.
            limits: in place of the scorer's own.
            most: what the caller takes an input to have; one that has more is refused.

        Returns: one TextScores an input, in order.
        Raises: InvalidInput, InputTooLarge, and what `Queue.submit` raises.
        """
        split = partial(self._chunk, inputs, truncate, limits or self.limits, most)
        chunks = spans.timed(spans.TOKENISE, split, len(inputs))
        flat = [chunk.token_ids for pieces in chunks for chunk in pieces]
        computed = self._chunk_scores(flat, deadline, gone, tenant)
        best, results, end = self.manifest.task == "rerank", [], 0
        for pieces in chunks:
            start, end = end, end + len(pieces)
            raw = computed[start:end]
            whole = raw.max(axis=0) if best else raw.mean(axis=0)
            results.append(TextScores(whole, pieces, raw))
        return results

    def _chunk(
        self, inputs: Sequence[str | Pair], truncate: Side | None, limits: TextLimits, most: Most
    ) -> list[list[Chunk]]:
        """Each input's chunks. Raises: InvalidInput, InputTooLarge, at the first wrong input."""
        limits.check([each if isinstance(each, str) else each[1] for each in inputs])
        truncate = truncate if self._truncation.honoured else None
        chunkers: dict[str | None, Chunker] = {}
        results, total = [], 0
        for index, each in enumerate(inputs):
            first, text = (None, each) if isinstance(each, str) else each
            try:
                if first not in chunkers:
                    chunkers[first] = self._chunker(first, limits)
                pieces = chunkers[first].split(text, "", truncate)
            except InvalidInput as error:
                error.index = index
                raise
            most.check(pieces, chunkers[first].tokenizer.special_tokens, index)
            total += sum(chunk.tokens for chunk in pieces)
            limits.check_tokens(total, index)
            results.append(pieces)
        if truncate and (cut := sum(pieces[0].truncated for pieces in results)):
            self._truncation.observe(cut)
        return results

    def _chunker(self, first: str | None, limits: TextLimits) -> Chunker:
        """Splits texts beside the first text of a pair.

        Raises: InvalidInput for a wrong first text; InputTooLarge if it leaves no room for them.
        """
        window = self.manifest.max_tokens
        if first is None:
            return Chunker(self._tokenizer, window)
        limits.check([first])
        tokenizer = self._tokenizer.beside(first)
        if tokenizer.special_tokens >= window:
            what = "the query" if self.manifest.task == "rerank" else "the first text"
            raise InputTooLarge(
                f"{what} has {tokenizer.special_tokens} tokens, special tokens included, which "
                f"leaves no room in the model's window of {window}: shorten it"
            )
        return Chunker(tokenizer, window)

    def tokenize(
        self, texts: Sequence[str], *, prompt_name: str | None = None, add_special_tokens: bool
    ) -> list[list[Token]]:
        """Each text's tokens, uncut. Raises: InvalidInput, InputTooLarge."""
        if prompt_name is not None:
            message = f"prompt_name is {prompt_name!r}; this model has: none"
            raise InvalidInput(message, field="prompt_name")
        self.limits.check(texts)
        results, total = [], 0
        for index, text in enumerate(texts):
            encoding = self._tokenizer.encode(text, add_special_tokens)
            total += len(encoding)
            self.limits.check_tokens(total, index)
            results.append(tokens_of(encoding, text, ""))
        return results

    def scores(self, raw: Float32) -> Float32:
        """Raw scores, the labels along the last axis, as the model itself gives them."""
        return activate(raw, self.scorer.activation)

    def probabilities(self, raw: Float32) -> Float32:
        """Raw scores, the labels along the last axis, as numbers from 0 to 1: as the model's own
        activation gives them, or, where it has none, by sigmoid for one label and softmax for
        several.
        """
        own = self.scorer.activation
        if own == "none":
            own = "sigmoid" if len(self.scorer.labels) == 1 else "softmax"
        return activate(raw, own)


def activate(raw: Float32, activation: ScoreActivation) -> Float32:
    """Raw scores through an activation, the labels along the last axis."""
    wide = raw.astype(np.float64)
    if activation == "sigmoid":
        wide = 0.5 * (1 + np.tanh(0.5 * wide))  # of no overflow, unlike 1 / (1 + exp(-x))
    elif activation == "softmax":
        wide = np.exp(wide - wide.max(axis=-1, keepdims=True))
        wide /= wide.sum(axis=-1, keepdims=True)
    return wide.astype(np.float32)
