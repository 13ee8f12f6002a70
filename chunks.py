"""Where a long text is cut: chunks of near-equal length that fit the model's window."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import numpy as np
from tokenizers import Encoding

from engine.errors import InvalidInput
from tokens import Int64, TextTokenizer

Side = Literal["left", "right"]

# Share of a chunk's length that a cut may move away from an equal split, to fall between words.
CHUNK_SLACK = 0.25
_SPACE = re.compile(r"\s")
# By token position: where the token before it ends and the token after it begins, in code points of
# prompt and text.
Gaps = Mapping[int, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a text as the engine gets it."""

    # Offsets in Unicode code points into the text as sent; a text's chunks cover it without gaps.
    start: int
    end: int
    token_ids: Int64  # shape (tokens,), with special tokens and prompt
    truncated: bool = False  # whether the rest of the text was dropped

    @property
    def tokens(self) -> int:
        return len(self.token_ids)


class Chunker:
    """Splits texts into chunks of one model's window. Safe to call from any number of threads."""

    def __init__(self, tokenizer: TextTokenizer, window: int) -> None:
        """`window` is the most tokens of a chunk, special tokens and prompt included."""
        self.tokenizer, self.window = tokenizer, window

    def split(self, text: str, prompt: str = "", truncate: Side | None = None) -> list[Chunk]:
        """The chunks of a text, with `prompt` before each of them.

        A text over the window is split at word borders. `truncate` drops one of its ends instead.

        Raises: InvalidInput when the prompt alone fills the window, or there is no token at all.
        """
        tokenizer, whole = self.tokenizer, prompt + text
        room = self.window - tokenizer.special_tokens
        if (ids := tokenizer.encode_words(whole)) is not None:
            if len(ids) <= room:
                return [Chunk(0, len(text), tokenizer.with_special_tokens(ids))]
            if not truncate and (chunks := self._split_words(text, prompt, ids)):
                return chunks
        encoding = tokenizer.encode(whole)
        if len(encoding) <= room:
            ids = np.array(encoding.ids, np.int64)
            return [Chunk(0, len(text), tokenizer.with_special_tokens(ids))]
        return self._split_encoding(text, prompt, encoding, truncate)

    def _split_encoding(
        self, text: str, prompt: str, encoding: Encoding, truncate: Side | None
    ) -> list[Chunk]:
        """The chunks of a text from the tokens of `prompt + text`, which exceed the window."""
        ids, spans = np.array(encoding.ids, np.int64), encoding.offsets
        # Tokens of the prompt. One that reaches into the text is the text's: BPE joins the space
        # before a word to the word.
        head = sum(end <= len(prompt) for _, end in spans) if prompt else 0
        room = self.window - self.tokenizer.special_tokens - head
        if room < 1:
            raise InvalidInput(f"the prompt alone fills the model's window of {self.window} tokens")
        total = len(ids) - head
        if truncate == "right":
            end = spans[head + room - 1][1] - len(prompt)
            return self._chunks([0, room], [0, end], ids, head, truncated=True)
        if truncate == "left":
            start = max(0, spans[-room][0] - len(prompt))
            cuts = [total - room, total]
            return self._chunks(cuts, [start, len(text)], ids, head, truncated=True)
        whole, spans, words = prompt + text, spans[head:], encoding.word_ids[head:]
        gaps = {at: (end, start) for at, ((_, end), (start, _)) in enumerate(pairwise(spans), 1)}
        cuts = cut(total, room, _borders(whole, gaps, words))
        return self._chunks(cuts, _places(whole, len(prompt), cuts, gaps), ids, head)

    def _split_words(self, text: str, prompt: str, ids: Int64) -> list[Chunk] | None:
        """The chunks of a text from the words of `prompt + text` and their token ids, which exceed
        the window. None if a cut, or the text's beginning, is inside a word: only the tokenizer
        knows which characters each of a word's tokens covers.
        """
        whole = prompt + text
        words = self.tokenizer.words.split(whole)
        spans = [(start, end) for start, end, _ in words]
        sizes = [tokens for _, _, tokens in words]
        ahead = sum(end <= len(prompt) for _, end in spans) if prompt else 0  # words of the prompt
        head = sum(sizes[:ahead])  # tokens of the prompt
        room = self.window - self.tokenizer.special_tokens - head
        if room < 1 or spans[ahead][0] < len(prompt):
            return None
        borders = zip(accumulate(sizes[ahead:]), pairwise(spans[ahead:]))
        gaps = {at: (end, start) for at, ((_, end), (start, _)) in borders}
        spaced = [at for at, (end, start) in gaps.items() if end < start]
        cuts = cut(len(ids) - head, room, [spaced, list(gaps)])
        if not gaps.keys() >= {*cuts[1:-1]}:
            return None
        return self._chunks(cuts, _places(whole, len(prompt), cuts, gaps), ids, head)

    def _chunks(
        self,
        cuts: Sequence[int],
        places: Sequence[int],
        ids: Int64,
        head: int,
        truncated: bool = False,
    ) -> list[Chunk]:
        """Chunks between `cuts` of the ids after the prompt's `head`, and `places` of the text."""
        prompt, ids, make = ids[:head], ids[head:], self.tokenizer.with_special_tokens
        return [
            Chunk(start, end, make(np.concatenate((prompt, ids[first:last]))), truncated)
            for (first, last), (start, end) in zip(pairwise(cuts), pairwise(places))
        ]


def cut(tokens: int, room: int, borders: Sequence[Sequence[int]]) -> list[int]:
    """Split `tokens` tokens into as few chunks of at most `room` as borders between words allow, as
    equal in length as they allow. Only words of more tokens than that are cut, into as few pieces.

    Args:
        borders: ascending positions for cuts, each list with those of the one before: after spaces,
            between words, between characters.

    Returns: ascending positions, the first 0 and the last `tokens`; chunk i is
        [result[i], result[i + 1]).
    """
    spaces, *levels = borders
    return _split(0, tokens, room, [*levels, range(1, tokens)], spaces)


def _split(
    start: int,
    end: int,
    room: int,
    levels: Sequence[Sequence[int]],
    preferred: Sequence[int] = (),
) -> list[int]:
    """Positions from `start` to `end`, at most `room` apart: of the first of `levels`, and of the
    next ones only between two that are too far from each other.
    """
    coarse, *finer = levels
    inside = coarse[bisect_right(coarse, start) : bisect_left(coarse, end)]
    allowed = []
    for first, last in pairwise([start, *inside, end]):
        if last - first <= room:
            allowed.append(first)
        else:
            allowed += _split(first, last, room, finer)[:-1]
    return _near_equal([*allowed, end], room, preferred)


def _near_equal(allowed: Sequence[int], room: int, preferred: Sequence[int]) -> list[int]:
    """The fewest of `allowed` that are at most `room` apart, its first and last among them, near an
    equal split; one of `preferred` where it is within CHUNK_SLACK.
    """
    end = allowed[-1]
    earliest = [end]  # by number of chunks: where the end begins that fits into so many
    while earliest[-1] > allowed[0]:
        earliest.append(allowed[bisect_left(allowed, earliest[-1] - room)])
    cuts = [allowed[0]]
    for left in range(len(earliest) - 1, 1, -1):
        start, equal = cuts[-1], (end - cuts[-1]) / left
        low, high = earliest[left - 1], start + room
        target = min(max(round(start + equal), low), high)
        lowest = max(low, round(start + equal * (1 - CHUNK_SLACK)))
        highest = min(high, round(start + equal * (1 + CHUNK_SLACK)))
        near = _nearest(preferred, target, lowest, highest) or _nearest(allowed, target, low, high)
        cuts += near
    return [*cuts, end]


def _nearest(positions: Sequence[int], target: int, low: int, high: int) -> list[int]:
    """The position nearest to `target` of those from `low` to `high`, if there is one."""
    at = bisect_left(positions, target)
    beside = [each for each in positions[max(0, at - 1) : at + 1] if low <= each <= high]
    return sorted(beside, key=lambda each: abs(each - target))[:1]


def _borders(whole: str, gaps: Gaps, words: Sequence[int | None]) -> list[list[int]]:
    """The token positions in `gaps` where a text may be cut, as `cut` takes them. A position is
    left out if the tokens beside it share a character. `words` are the tokens' word numbers.
    """
    every = [at for at, (end, start) in gaps.items() if end <= start]
    # Byte-level tokenizers join the space before a word to the word: the next character counts too.
    spaced = [at for at in every if _SPACE.search(whole, gaps[at][0], gaps[at][1] + 1)]
    apart = {*spaced}
    return [spaced, [at for at in every if words[at] != words[at - 1] or at in apart], every]


def _places(whole: str, ahead: int, cuts: Sequence[int], gaps: Gaps) -> list[int]:
    """Code points of a text, which follows a prompt of `ahead` in `whole`, from 0 to its end. A cut
    is at the first white space in its gap: a character that the tokenizer drops (a combining mark)
    stays with its word.
    """
    places = [0]
    for end, start in map(gaps.__getitem__, cuts[1:-1]):
        space = _SPACE.search(whole, end, start)
        places.append((space.start() if space else max(end, start)) - ahead)
    return [*places, len(whole) - ahead]
