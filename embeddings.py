"""What an embedding is: text -> tokens -> chunks -> vectors -> mean -> normalise. Knows no HTTP."""

import bisect
import contextlib
import itertools
import math
import os
import re
import string
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from engine.protocol import Engine
from engine.queue import Queue
from engine.bundle import TOKENIZER, Bundle
from engine.errors import BundleError, InputTooLarge, InvalidInput

# A text is tokenised in the thread that asked for it; the tokenizers' own pool would contend.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

Side = Literal["left", "right"]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

# Tokenising costs about 130 bytes of memory per byte of text, so texts larger than this take turns.
LARGE_TEXT_BYTES = 65_536
# A chunk border may move this far from an equal split, as a share of the chunk, to fall between
# words.
BORDER_SLACK = 0.25
_LATIN_1 = "".join(map(chr, range(256)))
_SPACES = np.array([code for code in range(0x3001) if chr(code).isspace()], np.uint32)


@dataclass(frozen=True, slots=True)
class TextLimits:
    max_texts: int  # a request
    max_text_bytes: int  # one text, as UTF-8
    max_request_tokens: int  # all chunks of a request, special tokens and prompts included


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a text as the engine gets it."""

    # Offsets in Unicode code points into the text as sent; a text's chunks cover it without gaps.
    start: int
    end: int
    token_ids: Int64  # shape (tokens,), with special tokens and prompt

    @property
    def tokens(self) -> int:
        return len(self.token_ids)


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


@dataclass(frozen=True, slots=True)
class Token:
    """What the tokenizer made of a piece of text."""

    id: int
    text: str
    special: bool
    # Code points of the text as sent; None for special tokens and for a prompt's.
    start: int | None
    stop: int | None


def load_tokenizer(bundle: Bundle) -> tuple[Tokenizer, int, bool]:
    """Returns: the bundle's tokenizer, its pad id, and whether it pads on the left."""
    try:
        tokenizer = Tokenizer.from_file(str(bundle.file(TOKENIZER)))
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError(f"bundle {bundle.path}: {TOKENIZER} cannot be read ({error})") from None
    padding = tokenizer.padding
    if padding is None:
        raise BundleError(f"bundle {bundle.path}: {TOKENIZER} states no padding; bake it again")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, padding["pad_id"], padding["direction"] == "left"


class Words:
    """The token ids of words, each looked up or made alone: a tokenizer of BERT's kind finds those
    of a word without looking at its neighbours. That takes a tenth of the time that it takes the
    tokenizer. Only for texts of printable ASCII and western European letters, in which it is plain
    what a word is. Safe to call from any number of threads.
    """

    _MANY, _LONG = 16_384, 64  # words that are kept, and characters of them; some 3 MB, 8 at most
    _LETTERS = "A-Za-zÀ-ÖØ-öø-ÿ"
    _WORD = re.compile(rf"[{_LETTERS}0-9]+|[!-~]")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._joined = np.zeros(256, np.bool_)  # of a character, whether it joins its neighbours
        self._joined[[ord(each) for each in re.findall(f"[{self._LETTERS}0-9]", _LATIN_1)]] = True
        self._normalizer, self._model = tokenizer.normalizer, tokenizer.model
        self._lowercase = bool(getattr(self._normalizer, "lowercase", False))
        # A text with one of these may hold an added token, such as [SEP], which is no word.
        added = tokenizer.get_added_tokens_decoder().values()
        marks = {case(token.content[:1]) for token in added for case in (str.lower, str.upper)}
        plain = re.escape("".join(sorted({*string.printable[:95]} - marks)))
        self._plain = re.compile(f"[{plain}{self._LETTERS}]*")
        self._known: dict[str, list[int]] = {}
        self._usable = (
            isinstance(self._normalizer, BertNormalizer)
            and isinstance(tokenizer.pre_tokenizer, BertPreTokenizer)
            and isinstance(self._model, WordPiece)
            and not any(mark.isalnum() or mark.isspace() for mark in marks)
        )

    def split(self, text: str) -> list[str] | None:
        """The words of a text; None where that has to be left to the tokenizer."""
        if not self._usable or not self._plain.fullmatch(text):
            return None
        return self._WORD.findall(text.lower() if self._lowercase else text)

    def spans(self, text: str) -> tuple[Int64, Int64]:
        """Where the words begin and where they end that `split` found, each of shape (words,)."""
        codes = np.frombuffer(text.encode("latin-1"), np.uint8)
        within, joined = codes != ord(" "), self._joined[codes]
        borders = ~(joined[1:] & joined[:-1])
        starts, ends = within.copy(), within
        starts[1:] &= borders
        ends[:-1] &= borders
        return np.flatnonzero(starts), np.flatnonzero(ends) + 1

    def ids(self, words: Sequence[str]) -> list[int]:
        """The token ids of words one after the other."""
        known = self._known
        try:
            return [id for word in words for id in known[word]]
        except KeyError:
            return [*itertools.chain.from_iterable(self.by_word(words))]

    def by_word(self, words: Sequence[str]) -> list[list[int]]:
        """The token ids of each word."""
        known, found = self._known, []
        for word in words:
            ids = known.get(word)
            if ids is None:
                tokens = self._model.tokenize(self._normalizer.normalize_str(word))
                ids = [token.id for token in tokens]
                if len(known) >= self._MANY:
                    known.clear()
                if len(word) <= self._LONG:
                    known[word] = ids
            found.append(ids)
        return found


class VectorCache:
    """The vectors of the chunks of text asked for last, for traffic that repeats itself. Safe to
    call from any number of threads.
    """

    def __init__(self, size: int, observe: Callable[[int, int], None] = lambda *_: None) -> None:
        """Args:
        size: most vectors that are kept; one takes its dimensions times 4 bytes, and some 300.
        observe: told how many vectors of a request were here and how many were not.
        """
        self._size, self._observe = size, observe
        self._vectors: OrderedDict[tuple[str, bytes], Float32] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, model: str, keys: Sequence[bytes]) -> list[Float32 | None]:
        """The vectors of token ids (as bytes) that are here, each of shape (dimensions,)."""
        with self._lock:
            found = [self._vectors.get((model, key)) for key in keys]
            for key, vector in zip(keys, found):
                if vector is not None:
                    self._vectors.move_to_end((model, key))
        hits = sum(vector is not None for vector in found)
        self._observe(hits, len(keys) - hits)
        return found

    def put(self, model: str, keys: Sequence[bytes], vectors: Float32) -> None:
        """Keep vectors, shape (len(keys), dimensions), in place of those not asked for longest."""
        with self._lock:
            for key, vector in zip(keys, vectors):
                self._vectors[model, key] = vector.copy()
            while len(self._vectors) > self._size:
                self._vectors.popitem(last=False)


class TextEmbedder:
    """Embeds texts with one model. Safe to call from any number of threads."""

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: Tokenizer,
        engine: Engine,
        batcher: Queue,
        limits: TextLimits,
        cache: VectorCache | None = None,
    ) -> None:
        self.manifest = bundle.manifest
        self.limits = limits
        self._tokenizer, self._engine, self._batcher = tokenizer, engine, batcher
        self._cache = cache
        self._large_text = threading.Lock()
        self._prefix, self._suffix = _special_tokens(tokenizer)
        self._first, self._last = self._prefix.tolist(), self._suffix.tolist()
        self._words = Words(tokenizer)
        self._prompts = {name: prompt for name, prompt in self.manifest.prompts.items() if prompt}

    @property
    def precision(self) -> str:
        return self._engine.precision

    def widen(self) -> None:
        """Prepare the engine for calls that have all cores to themselves."""
        self._engine.widen()

    def embed(
        self,
        texts: Sequence[str],
        *,
        deadline: float,
        gone: Callable[[], bool] | None = None,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate: Side | None = None,
    ) -> list[TextEmbedding]:
        """Embed texts, each alone.

        A text longer than the model's window is split into chunks of near-equal length at word
        borders. Its vector is the mean of the chunks' vectors as the model gives them, normalised
        again where the model normalises.

        Args:
            deadline: when to give up, on the clock of `time.monotonic`.
            gone: whether nobody waits for the vectors any more, as `Queue.submit` takes it.
            prompt_name: one of the model's prompts, put before every chunk; None means the model's
                default.
            dimensions: keep this many leading values (Matryoshka models), and normalise what is
                left. Where the manifest says so, a cut is of the vectors' layer norm.
            normalize: overrides whether vectors have length 1; None does as the model does.
            truncate: drop what passes the window on this side instead of splitting the text.

        Returns: one TextEmbedding a text, in order.
        Raises: InvalidInput, InputTooLarge, and what `Queue.submit` raises.
        """
        if dimensions is not None and not 1 <= dimensions <= self.manifest.dimensions:
            raise InvalidInput(
                f"dimensions is {dimensions}; this model takes 1 to {self.manifest.dimensions}"
            )
        chunks = self.chunk(texts, prompt_name=prompt_name, truncate=truncate)
        flat = [chunk.token_ids for pieces in chunks for chunk in pieces]
        vectors = self._compute(flat, deadline, gone)
        unit = self.manifest.normalized if normalize is None else normalize
        if unit and self.manifest.normalized:
            vectors = unit_vectors(vectors)
        averaged = len(flat) > len(texts)
        means = vectors
        if averaged:
            starts = np.cumsum([0] + [len(pieces) for pieces in chunks[:-1]])
            means = np.add.reduceat(vectors, starts, axis=0)
            means /= np.array([[len(pieces)] for pieces in chunks], np.float32)
        shortened = dimensions is not None and dimensions < self.manifest.dimensions
        if shortened:
            if self.manifest.layer_norm:
                means, vectors = _layer_norm(means), _layer_norm(vectors)
            means, vectors = means[:, :dimensions], vectors[:, :dimensions]
        if unit and (averaged or shortened or not self.manifest.normalized):
            means, vectors = unit_vectors(means), unit_vectors(vectors)
        results, at = [], 0
        for row, pieces in enumerate(chunks):
            results.append(TextEmbedding(means[row], pieces, vectors[at : at + len(pieces)]))
            at += len(pieces)
        return results

    def _compute(
        self, chunks: Sequence[Int64], deadline: float, gone: Callable[[], bool] | None
    ) -> Float32:
        """The engine's vector of each chunk's token ids, shape (len(chunks), dimensions); equal
        chunks are computed once, and those in the cache not at all.
        """
        if len(chunks) == 1 and self._cache is None:
            costs = [len(chunks[0])]
            return self._batcher.submit(self._engine, chunks, costs, deadline, gone)
        by_key = {ids.tobytes(): ids for ids in chunks}
        keys = list(by_key)
        vectors = np.empty((len(keys), self._engine.dimensions), np.float32)
        missing = list(range(len(keys)))
        if self._cache is not None:
            found = self._cache.get(self._engine.name, keys)
            missing = [at for at, vector in enumerate(found) if vector is None]
            for at, vector in enumerate(found):
                if vector is not None:
                    vectors[at] = vector
        inputs = [by_key[keys[at]] for at in missing]
        costs = [len(ids) for ids in inputs]
        vectors[missing] = self._batcher.submit(self._engine, inputs, costs, deadline, gone)
        if self._cache is not None:
            self._cache.put(self._engine.name, [keys[at] for at in missing], vectors[missing])
        places = {key: at for at, key in enumerate(keys)}
        return vectors[[places[ids.tobytes()] for ids in chunks]]

    def similarities(
        self,
        sentences: Sequence[str],
        source: str,
        *,
        deadline: float,
        gone: Callable[[], bool] | None = None,
        prompt_name: str | None = None,
        truncate: Side | None = None,
    ) -> list[float]:
        """Cosine of each sentence to `source`; the other arguments are `embed`'s.

        Raises: what `embed` raises; an index is a sentence's.
        """
        if not sentences:
            raise InvalidInput("no sentence to compare with; send at least one")
        try:
            embedded = self.embed(
                [*sentences, source],
                deadline=deadline,
                gone=gone,
                prompt_name=prompt_name,
                normalize=True,
                truncate=truncate,
            )
        except InvalidInput as error:
            if error.index == len(sentences):
                raise type(error)(f"source_sentence: {error}") from None
            raise
        vectors = np.stack([embedding.vector for embedding in embedded])
        cosines: list[float] = (vectors[:-1] @ vectors[-1]).tolist()
        return cosines

    def tokenize(
        self, texts: Sequence[str], *, prompt_name: str | None = None, add_special_tokens: bool
    ) -> list[list[Token]]:
        """The tokens of each text and of the prompt before it, without any cut.

        Raises: InvalidInput, InputTooLarge.
        """
        self._check(texts)
        prompt = self._prompt(prompt_name)
        results, total = [], 0
        for index, text in enumerate(texts):
            whole = prompt + text
            encoding, ids = self._encode(whole, add_special_tokens)
            total = self._add_tokens(total, len(ids), index)
            tokens = []
            for id, name, special, (start, stop) in zip(
                encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets
            ):
                if special:
                    tokens.append(Token(id, name, True, None, None))
                    continue
                piece, start, stop = whole[start:stop], start - len(prompt), stop - len(prompt)
                own = not prompt or stop > 0
                tokens.append(
                    Token(id, piece, False, max(0, start) if own else None, stop if own else None)
                )
            results.append(tokens)
        return results

    def chunk(
        self,
        texts: Sequence[str],
        *,
        prompt_name: str | None = None,
        truncate: Side | None = None,
    ) -> list[list[Chunk]]:
        """Tokenise texts, each once, and split those that pass the window.

        Raises: InvalidInput, InputTooLarge; nothing past the first culprit is tokenised.
        """
        self._check(texts)
        prompt = self._prompt(prompt_name)
        results, tokens = [], 0
        for index, text in enumerate(texts):
            pieces = self._split(text, prompt, truncate, index)
            tokens = self._add_tokens(tokens, sum(chunk.tokens for chunk in pieces), index)
            results.append(pieces)
        return results

    def _check(self, texts: Sequence[str]) -> None:
        limits = self.limits
        if not texts:
            raise InvalidInput("no text; send at least one")
        if len(texts) > limits.max_texts:
            raise InvalidInput(
                f"{len(texts)} texts; the limit is {limits.max_texts} (MAX_TEXTS_PER_BATCH)"
            )
        for index, text in enumerate(texts):
            if not text or text.isspace():
                raise InvalidInput("text is empty or only white space", index)
            size = len(text) if text.isascii() else len(text.encode())
            if size > limits.max_text_bytes:
                raise InputTooLarge(
                    f"text has {size} bytes; the limit is {limits.max_text_bytes} (MAX_TEXT_SIZE)",
                    index,
                )

    def _add_tokens(self, total: int, tokens: int, index: int) -> int:
        total += tokens
        if total > self.limits.max_request_tokens:
            raise InputTooLarge(
                f"{total} tokens up to here; a request may have {self.limits.max_request_tokens} "
                "(MAX_REQUEST_TOKENS)",
                index,
            )
        return total

    def _prompt(self, name: str | None) -> str:
        if name is None:
            name = self.manifest.default_prompt
            return self._prompts.get(name, "") if name else ""
        if name not in self.manifest.prompts:
            known = ", ".join(sorted(self.manifest.prompts)) or "none"
            raise InvalidInput(f"prompt_name is {name!r}; this model has: {known}")
        return self._prompts.get(name, "")

    def _split(self, text: str, prompt: str, truncate: Side | None, index: int) -> list[Chunk]:
        room = self.manifest.max_tokens - len(self._prefix) - len(self._suffix)
        whole = prompt + text
        if len(whole) <= LARGE_TEXT_BYTES and (words := self._words.split(whole)):
            known = self._words.ids(words)
            if len(known) <= room:
                ids = np.array([*self._first, *known, *self._last], np.int64)
                return [Chunk(0, len(text), ids)]
            if not truncate and (chunks := self._cut_between_words(text, prompt, words, known)):
                return chunks
        encoding, ids = self._encode(whole)
        if len(ids) <= room:
            return [Chunk(0, len(text), self._with_specials(ids, index))]
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        # The prompt's own tokens; one that reaches into the text (BPE joins the space between them)
        # is the text's.
        ahead = int(np.searchsorted(offsets[:, 1], len(prompt), "right")) if prompt else 0
        head, ids, offsets = ids[:ahead], ids[ahead:], np.maximum(offsets[ahead:] - len(prompt), 0)
        room -= ahead
        if room < 1:
            raise InvalidInput(
                f"the prompt alone fills the model's window of {self.manifest.max_tokens} tokens",
                index,
            )
        if truncate:
            kept = slice(None, room) if truncate == "right" else slice(-room, None)
            start = 0 if truncate == "right" else int(offsets[kept][0, 0])
            end = int(offsets[kept][-1, 1]) if truncate == "right" else len(text)
            token_ids = np.concatenate([head, ids[kept]])
            return [Chunk(start, end, self._with_specials(token_ids, index))]
        cuts = cut(len(ids), room, borders(text, encoding.word_ids[ahead:], offsets))
        chunks, start = [], 0
        for begin, end in zip(cuts, cuts[1:]):
            stop = (
                len(text)
                if end == len(ids)
                else _gap(text, int(offsets[end - 1, 1]), int(offsets[end, 0]))
            )
            token_ids = self._with_specials(np.concatenate([head, ids[begin:end]]), index)
            chunks.append(Chunk(start, stop, token_ids))
            start = stop
        return chunks

    def _cut_between_words(
        self, text: str, prompt: str, words: Sequence[str], ids: Sequence[int]
    ) -> list[Chunk] | None:
        """The chunks of a text from the words of its prompt and its own, and all their token ids.
        None where a cut, or the text's beginning, falls into a word: what its tokens stand for has
        to be asked of the tokenizer.
        """
        starts, ends = self._words.spans(prompt + text)
        starts, ends = starts - len(prompt), ends - len(prompt)
        ahead = int(np.searchsorted(ends, 0, "right"))  # words of the prompt's own
        stops = np.cumsum([len(each) for each in self._words.by_word(words)])  # of their tokens
        head = int(stops[ahead - 1]) if ahead else 0
        room = self.manifest.max_tokens - len(self._first) - len(self._last) - head
        if room < 1 or starts[ahead] < 0 or ahead == len(words) - 1:
            return None
        starts, ends, stops = starts[ahead + 1 :], ends[ahead:-1], stops[ahead:-1] - head
        cuts = cut(len(ids) - head, room, [stops[starts > ends].tolist(), stops.tolist()])
        inner = np.searchsorted(stops, cuts[1:-1])
        if stops[np.minimum(inner, len(stops) - 1)].tolist() != cuts[1:-1]:
            return None
        places = [0, *(_gap(text, int(ends[at]), int(starts[at])) for at in inner), len(text)]
        first, own = np.split(np.array(ids, np.int64), [head])
        return [
            Chunk(start, end, np.concatenate([self._prefix, first, part, self._suffix]))
            for start, end, part in zip(places, places[1:], np.split(own, cuts[1:-1]))
        ]

    def _encode(self, text: str, add_special_tokens: bool = False) -> tuple[Encoding, Int64]:
        with self._large_text if len(text) > LARGE_TEXT_BYTES else contextlib.nullcontext():
            # encode() holds the GIL (0.6 s for 1 MB); encode_batch() lets go of it.
            (encoding,) = self._tokenizer.encode_batch(
                [text], add_special_tokens=add_special_tokens
            )
        return encoding, np.array(encoding.ids, np.int64)

    def _with_specials(self, ids: Int64, index: int) -> Int64:
        if not len(ids) + len(self._prefix) + len(self._suffix):
            raise InvalidInput("this model's tokenizer finds no token in the text", index)
        return np.concatenate([self._prefix, ids, self._suffix])


def cut(tokens: int, room: int, borders: Sequence[Sequence[int]]) -> list[int]:
    """Split `tokens` tokens into chunks of at most `room`, as near to equal in length as the
    borders allow.

    Args:
        borders: ascending token positions where a cut may fall, the best kind first, as `borders`
            gives them.

    Returns: ascending positions, the first 0 and the last `tokens`; chunk i is
        [result[i], result[i + 1]).

    As few chunks as fit are tried first. If one of their borders would fall inside a word although
    another chunk's worth of slack could avoid it, one chunk more is made.
    """
    fewest = -(-tokens // room)
    cuts, between_words = _cut_into(fewest, tokens, room, borders)
    if not between_words and fewest < tokens:
        more, between_words = _cut_into(fewest + 1, tokens, room, borders)
        if between_words:
            return more
    return cuts


def _cut_into(
    count: int, tokens: int, room: int, borders: Sequence[Sequence[int]]
) -> tuple[list[int], bool]:
    """Returns: the cuts, and whether all of them fall between words."""
    cuts, between_words = [0], True
    for left in range(count, 1, -1):
        start = cuts[-1]
        equal = (tokens - start) / left
        low = max(start + 1, tokens - (left - 1) * room, round(start + equal * (1 - BORDER_SLACK)))
        high = min(start + room, tokens - left + 1, round(start + equal * (1 + BORDER_SLACK)))
        target = min(max(round(start + equal), low), high)
        found = (
            (kind, _closest(positions, target, low, high)) for kind, positions in enumerate(borders)
        )
        kind, at = next(
            ((kind, at) for kind, at in found if at is not None), (len(borders), target)
        )
        between_words = between_words and kind < 2
        cuts.append(at)
    return [*cuts, tokens], between_words


def _closest(positions: Sequence[int], target: int, low: int, high: int) -> int | None:
    """The member of an ascending sequence nearest to `target` within [low, high], or None."""
    at = bisect.bisect_left(positions, target)
    near = [
        int(position) for position in positions[max(0, at - 1) : at + 1] if low <= position <= high
    ]
    return min(near, key=lambda position: abs(position - target), default=None)


def borders(text: str, words: Sequence[int | None], offsets: Int64) -> list[Sequence[int]]:
    """Where a text may be cut, as ascending token positions, the best kind first.

    Args:
        words: the tokenizer's number of the word each token belongs to.
        offsets: shape (tokens, 2), code points of `text` that each token stands for.

    Returns: positions that follow white space; where the tokenizer begins another word (languages
        without spaces, punctuation); and where at least no character is split over two tokens.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    spaces_before = np.concatenate([[0], np.cumsum(np.isin(codes, _SPACES))])
    ends, starts = offsets[:-1, 1], offsets[1:, 0]
    # Byte-level tokenizers count the space before a word as the word's own: look at its first
    # character too.
    first = np.minimum(starts + 1, len(text))
    whole = starts >= ends
    spaced = whole & (spaces_before[first] > spaces_before[np.minimum(ends, first)])
    numbers = np.array([-1 if word is None else word for word in words], np.int64)
    kinds = spaced, whole & (numbers[1:] != numbers[:-1]), whole
    return [(np.flatnonzero(kind) + 1).tolist() for kind in kinds]


def _gap(text: str, end: int, start: int) -> int:
    """Where one chunk's text ends and the next begins, between the token ending at `end` and the
    one from `start`.

    At the first white space, so that what the tokenizer dropped (a combining mark) stays with the
    word it belongs to.
    """
    for at in range(end, start):
        if text[at].isspace():
            return at
    return max(end, start)


def _special_tokens(tokenizer: Tokenizer) -> tuple[Int64, Int64]:
    """The ids that the tokenizer's template puts before and after a text.

    Raises: BundleError for a template that does more than that.
    """
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return np.array(whole[:at], np.int64), np.array(whole[at + len(plain) :], np.int64)
    raise BundleError("the tokenizer's special tokens are not a prefix and a suffix")


def unit_vectors(vectors: Float32) -> Float32:
    """Scale rows to length 1, as torch.nn.functional.normalize does (zeros stay zeros)."""
    if len(vectors) == 1:  # most requests are one text: half of the calls
        vector = vectors[0]
        return vectors / max(math.sqrt(vector.dot(vector)), 1e-12)
    lengths = np.sqrt(np.vecdot(vectors, vectors))[:, None]
    scaled: Float32 = vectors / np.maximum(lengths, np.float32(1e-12))
    return scaled


def _layer_norm(vectors: Float32) -> Float32:
    """What torch.nn.functional.layer_norm does to whole rows, without weights and with its eps."""
    centred = vectors - vectors.mean(axis=1, keepdims=True)
    scaled: Any = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    return np.ascontiguousarray(scaled, np.float32)
