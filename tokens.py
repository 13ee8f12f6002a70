"""The tokenizer: text to token ids, the special tokens around them, and the word cache."""

import contextlib
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

# A text is tokenised in its request's thread; the tokenizers' own thread pool would contend.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

Int64 = npt.NDArray[np.int64]

# Tokenising takes about 130 bytes of memory per byte of text. Each model tokenises texts of more
# characters than this one at a time, without the word cache.
LARGE_TEXT_CHARACTERS = 65_536
# The word cache is emptied when it holds this many words. It takes 3 MB then, 8 MB at most.
MAX_CACHED_WORDS = 16_384
# Words of more characters than this are not cached, which bounds the cache's memory.
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
        self._prefix, self._suffix = _special_tokens(tokenizer)
        self._large_text = threading.Lock()
        self.special_tokens = len(self._prefix) + len(self._suffix)  # added to every chunk
        self.words = Words(tokenizer)

    def encode(self, text: str, add_special_tokens: bool = False) -> Encoding:
        """Tokenise any text."""
        with self._large_text if len(text) > LARGE_TEXT_CHARACTERS else contextlib.nullcontext():
            # encode() holds the GIL (0.6 s for 1 MB); encode_batch() releases it.
            return self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def with_special_tokens(self, ids: Sequence[int]) -> Int64:
        """Token ids as the engine takes them, shape (tokens,). Raises: InvalidInput for none."""
        whole = np.array([*self._prefix, *ids, *self._suffix], np.int64)
        if not len(whole):
            raise InvalidInput("this model's tokenizer finds no token in the text")
        return whole


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
    those of its words. Looking them up takes a tenth of the tokenizer's time. Only for texts of
    printable ASCII and western European letters, where splitting into words is simple.
    """

    _WORD_CHARACTER = "A-Za-zÀ-ÖØ-öø-ÿ0-9"
    _WORD = re.compile(rf"[{_WORD_CHARACTER}]+|[!-~]")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.ids = _WordIds(tokenizer)
        self._lowercase = bool(getattr(tokenizer.normalizer, "lowercase", False))
        # An added token such as [SEP] is not split into words. Texts that contain the first
        # character of one are left to the tokenizer.
        added = tokenizer.get_added_tokens_decoder().values()
        marks = {case(token.content[:1]) for token in added for case in (str.lower, str.upper)}
        plain = re.escape("".join(sorted({*string.printable[:95]} - marks)))
        self._plain = re.compile(f"[{plain}{self._WORD_CHARACTER}]*")
        self._usable = (
            isinstance(tokenizer.normalizer, BertNormalizer)
            and isinstance(tokenizer.pre_tokenizer, BertPreTokenizer)
            and isinstance(tokenizer.model, WordPiece)
            and not any(mark.isalnum() or mark.isspace() for mark in marks)
        )

    def split(self, text: str) -> list[str] | None:
        """The words of a text; None if only the tokenizer can split it."""
        if self._usable and len(text) <= LARGE_TEXT_CHARACTERS and self._plain.fullmatch(text):
            return self._WORD.findall(text.lower() if self._lowercase else text)
        return None

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Start and end of each word that `split` finds, in characters."""
        return [word.span() for word in self._WORD.finditer(text)]


class _WordIds(dict[str, list[int]]):
    """The token ids of each word; those of a new word are computed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._normalizer, self._model = tokenizer.normalizer, tokenizer.model

    def __missing__(self, word: str) -> list[int]:
        tokens = self._model.tokenize(self._normalizer.normalize_str(word))
        ids = [token.id for token in tokens]
        if len(self) >= MAX_CACHED_WORDS:
            self.clear()
        if len(word) <= MAX_CACHED_WORD_CHARACTERS:
            self[word] = ids
        return ids
