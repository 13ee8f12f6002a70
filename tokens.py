"""The tokenizer: text to token ids, the special tokens around them, and the word cache."""

import contextlib
import copy
import os
import re
import string
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from engine.bundle import TOKENIZER, Bundle
from engine.errors import BundleError, InvalidInput
from engine.protocol import TYPE_BITS

# A text is tokenised in its request's thread; the tokenizers' own thread pool would contend.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

Int64 = npt.NDArray[np.int64]

# Tokenising takes about 130 bytes of memory per byte of text. Each model tokenises texts of more
# characters than this one at a time, without the word cache.
LARGE_TEXT_CHARACTERS = 65_536
# The word cache is emptied when it holds this many entries. It takes 5 MB then, 23 MB at most.
MAX_CACHED_WORDS = 32_768
# What has more characters than this is not cached, which bounds the cache's memory.
MAX_CACHED_WORD_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a text."""

    id: int
    text: str
    special: bool
    # Code points of the text as sent; None for special tokens and the prompt's tokens.
    start: int | None
    stop: int | None


def load_tokenizer(bundle: Bundle) -> tuple[Tokenizer, int, bool]:
    """The bundle's tokenizer, its padding id, whether it pads on the left. Raises: BundleError."""
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


class TextTokenizer:
    """A tokenizer, its special tokens and word cache. Safe to call from any number of threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises: BundleError for special tokens that are not a prefix and a suffix."""
        self._tokenizer = tokenizer
        self._type = 0  # of the text's tokens, in the bits above TYPE_BITS
        self._surround(*map(_array, _special_tokens(tokenizer)))
        self._large_text = threading.Lock()
        self.words = Words(tokenizer)

    def _surround(self, prefix: Int64, suffix: Int64) -> None:
        """Set what stands around the tokens of every chunk."""
        self._prefix, self._suffix = prefix, suffix
        self.special_tokens = len(prefix) + len(suffix)

    def encode(self, text: str, add_special_tokens: bool = False) -> Encoding:
        """Tokenise any text."""
        with self._large_text if len(text) > LARGE_TEXT_CHARACTERS else contextlib.nullcontext():
            # encode() holds the GIL (0.6 s for 1 MB); encode_batch() releases it.
            return self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_words(self, text: str) -> Int64 | None:
        """Token ids of a text by the word cache, shape (tokens,). None where only `encode` can
        tell.
        """
        ids = self.words.ids(text)
        return None if ids is None else np.frombuffer(ids, np.int64)

    def with_special_tokens(self, ids: Int64) -> Int64:
        """Token ids as the engine takes them, shape (tokens,). Raises: InvalidInput for none."""
        whole = np.concatenate((self._prefix, ids + self._type, self._suffix))
        if not len(whole):
            raise InvalidInput("this model's tokenizer finds no token in the text")
        return whole


class PairTokenizer(TextTokenizer):
    """A tokenizer of pairs of texts, and of texts alone, for models that give scores."""

    def __init__(self, tokenizer: Tokenizer, *, types: bool) -> None:
        """`types`: the model takes token types.

        Raises: BundleError where a pair is not the first text and then the second, with special
        tokens around each.
        """
        super().__init__(tokenizer)
        pair = tokenizer.encode("a", "a")
        places = [[at for at, of in enumerate(pair.sequence_ids) if of == n] for n in (0, 1)]
        (first, *_), (second, *_) = places
        end, stop = places[0][-1] + 1, places[1][-1] + 1
        plain = tokenizer.encode("a", add_special_tokens=False).ids
        if not pair.ids[first:end] == pair.ids[second:stop] == plain or second < end:
            raise BundleError("the tokenizer's pairs are not a text after the other")
        kinds = _array(pair.type_ids if types else [0] * len(pair.ids)) << TYPE_BITS
        whole = _array(pair.ids) + kinds
        self._before, self._between, self._after = whole[:first], whole[end:second], whole[stop:]
        self._first_type, self._second_type = int(kinds[first]), int(kinds[second])

    def beside(self, first: str) -> TextTokenizer:
        """A tokenizer of texts that are the second of a pair: to it, the first text and its special
        tokens are special tokens of the second.
        """
        ids = self.encode_words(first)
        if ids is None:
            ids = _array(self.encode(first).ids)
        second = copy.copy(self)
        second._type = self._second_type
        before = (self._before, ids + self._first_type, self._between)
        second._surround(np.concatenate(before), self._after)
        return second


def _array(ids: Sequence[int]) -> Int64:
    return np.array(ids, np.int64)


def _special_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids before and after a text. Raises: BundleError for a template of another form."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return whole[:at], whole[at + len(plain) :]
    raise BundleError("the tokenizer's special tokens are not a prefix and a suffix")


def tokens_of(encoding: Encoding, text: str, prompt: str) -> list[Token]:
    """The tokens of `prompt + text`, which was encoded, with their offsets in `text`."""
    whole, ahead, tokens = prompt + text, len(prompt), []
    for id, name, special, (start, stop) in zip(
        encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets
    ):
        if special:
            tokens.append(Token(id, name, True, None, None))
        elif prompt and stop <= ahead:
            tokens.append(Token(id, whole[start:stop], False, None, None))
        else:
            first, last = max(0, start - ahead), stop - ahead
            tokens.append(Token(id, whole[start:stop], False, first, last))
    return tokens


class Words:
    """Token ids of words, from a cache. Safe to call from any number of threads.

    A BERT tokenizer tokenises each word independently of its neighbours, so the ids of a text are
    those of its words. Looking them up takes a twentieth of the tokenizer's time. Only for texts of
    printable ASCII and western European letters, where splitting into words is simple.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        marks = _marks(tokenizer)
        self._cache = _Cache(tokenizer, marks)
        self._usable = (
            isinstance(tokenizer.normalizer, BertNormalizer)
            and isinstance(tokenizer.pre_tokenizer, BertPreTokenizer)
            and isinstance(tokenizer.model, WordPiece)
            and not any(mark.isalnum() or mark.isspace() for mark in marks)
        )

    def ids(self, text: str) -> bytes | None:
        """The ids of a text's tokens, as int64; None if only the tokenizer can tell."""
        if not self._usable or len(text) > LARGE_TEXT_CHARACTERS:
            return None
        for space in "\n\r\t":  # a search by regular expression would take ten times as long
            text = text.replace(space, " ")
        try:
            return b"".join(map(self._cache.__getitem__, text.split(" ")))
        except _NotPlain:
            return None

    def split(self, text: str) -> list[tuple[int, int, int]]:
        """Start and end of each word in characters, and its tokens, of a text that has `ids`."""
        words = _WORD.finditer(text)
        return [(*word.span(), len(self._cache[word[0]]) // _ID_BYTES) for word in words]


_ID_BYTES = np.dtype(np.int64).itemsize
_LETTER = "A-Za-zÀ-ÖØ-öø-ÿ0-9"
_WORD = re.compile(rf"[{_LETTER}]+|[!-~]")


def _marks(tokenizer: Tokenizer) -> set[str]:
    """The first character of each added token, such as [SEP], which is not split into words. Texts
    that contain one are left to the tokenizer.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    return {case(token.content[:1]) for token in added for case in (str.lower, str.upper)}


class _NotPlain(Exception):
    """The tokenizer may split this otherwise."""


class _Cache(dict[str, bytes]):
    """The token ids of words, and of what stands between two spaces; those of a new one are
    computed. Raises: _NotPlain.
    """

    def __init__(self, tokenizer: Tokenizer, marks: set[str]) -> None:
        """`marks`: characters that leave a text to the tokenizer."""
        self._normalizer, self._model = tokenizer.normalizer, tokenizer.model
        plain = re.escape("".join(sorted({*string.printable[:95]} - marks)))
        self._plain = re.compile(f"[{plain}{_LETTER}]*")

    def __missing__(self, piece: str) -> bytes:
        if not self._plain.fullmatch(piece):
            raise _NotPlain
        words = _WORD.findall(piece)
        if words == [piece]:
            tokens = self._model.tokenize(self._normalizer.normalize_str(piece))
            ids = _array([token.id for token in tokens]).tobytes()
        else:
            ids = b"".join(map(self.__getitem__, words))
        if len(self) >= MAX_CACHED_WORDS:
            self.clear()
        if len(piece) <= MAX_CACHED_WORD_CHARACTERS:
            self[piece] = ids
        return ids
