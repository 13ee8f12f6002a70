"""chunks.py: where a long text is cut, on texts of our own and the real model's tokenizer."""

import pathlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tiny_clip
import tiny_models as tiny
from conftest import NAME
from hypothesis import example, given
from hypothesis import strategies as st
from test_embeddings import ROOM, SPECIALS, TEXTS, WINDOW, WORD, words

import chunks
from chunks import Chunk, Chunker, cut
from engine.bundle import read
from engine.errors import InvalidInput
from tokens import TextTokenizer, load_tokenizer

PROMPTS = {None: "", "short": "query: ", "odd": "in", "long": "to find what answers "}


@pytest.fixture(scope="module")
def chunker(models_dir: pathlib.Path) -> Chunker:
    return Chunker(TextTokenizer(load_tokenizer(read(models_dir / NAME))[0]), WINDOW)


# -- where a text is cut ------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [11, 12, 19, 20, 21, 99, 100, 101, 1234])
def test_cuts_are_near_equal_fit_and_are_as_few_as_can_be(tokens: int) -> None:
    every = list(range(1, tokens))
    cuts = cut(tokens, 10, [every, every, every])
    sizes = np.diff(cuts)
    assert cuts[0] == 0 and cuts[-1] == tokens
    assert len(sizes) == -(-tokens // 10)
    assert sizes.max() <= 10 and sizes.max() - sizes.min() <= 1


def test_one_token_over_the_window_makes_two_halves() -> None:
    every = list(range(1, 11))
    assert cut(11, 10, [every, every, every]) in ([0, 5, 11], [0, 6, 11])


def test_a_cut_moves_to_the_nearest_word_border_within_the_slack() -> None:
    assert cut(16, 10, [[3, 7, 12], [3, 7, 8, 12], list(range(1, 16))]) == [0, 7, 16]


def test_white_space_is_better_than_another_border_and_that_better_than_none() -> None:
    everywhere = list(range(1, 16))
    assert cut(16, 10, [[], [7], everywhere]) == [0, 7, 16]
    assert cut(16, 10, [[], [], everywhere]) == [0, 8, 16]
    assert cut(16, 10, [[], [], []]) == [0, 8, 16]


def test_a_chunk_more_is_made_where_that_spares_a_word() -> None:
    # 20 tokens in chunks of 10 could only be cut at 10, inside a word.
    assert cut(20, 10, [[6, 13], [6, 13], list(range(1, 20))]) == [0, 6, 13, 20]


def test_many_chunks_more_are_made_where_that_spares_words() -> None:
    words = list(range(0, 600, 6))  # two of them are too long for a chunk of 10
    assert cut(600, 10, [words[1:], words[1:], list(range(1, 600))]) == [*words, 600]


def test_a_word_longer_than_a_chunk_is_cut_into_no_more_pieces_than_it_needs() -> None:
    # Words of 9, 12 and 9 tokens: three chunks would cut the second twice.
    borders = [9, 21]
    assert cut(30, 10, [borders, borders, list(range(1, 30))]) == [0, 9, 15, 21, 30]
    # Its characters end after 8 and 12 of its tokens: two pieces of at most 10 would cut one.
    assert cut(20, 10, [[], [], [8, 12]]) in ([0, 8, 12, 20], [0, 8, 16, 20])


def test_random_cuts_fit_are_as_few_as_can_be_and_spare_every_word_that_fits() -> None:
    random = np.random.default_rng(1)
    for _ in range(500):
        tokens, room = int(random.integers(2, 400)), int(random.integers(1, 50))
        spaces = sorted(set(random.integers(1, tokens, size=tokens // 5).tolist()))
        cuts = cut(tokens, room, [spaces[::2], spaces, list(range(1, tokens))])
        sizes = np.diff(cuts)
        assert cuts[0] == 0 and cuts[-1] == tokens
        assert sizes.min() >= 1 and sizes.max() <= room
        words = list(pairwise([0, *spaces, tokens]))
        for first, last in words:
            assert sum(first < at < last for at in cuts) == -(-(last - first) // room) - 1
        # Put each word into the chunk before it where it fits.
        most, last = 1, 0
        for first, end in words:
            pieces = -(-(end - first) // room)
            if pieces > 1:
                most, last = most + pieces + 1, end
            elif end - last > room:
                most, last = most + 1, first
        assert len(sizes) <= most


def test_the_slack_is_how_far_a_cut_may_move_to_fall_after_a_space(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = list(range(1, 16))
    borders = [[5], every, every]  # an equal split of 16 tokens is at 8
    assert cut(16, 12, borders) == [0, 8, 16]
    monkeypatch.setattr(chunks, "CHUNK_SLACK", 0.4)
    assert cut(16, 12, borders) == [0, 5, 16]


# -- every kind of tokenizer --------------------------------------------------------------------

TOKENIZERS: dict[str, Callable[[], Any]] = {
    "wordpiece": lambda: tiny.bert()[0],
    "byte-level bpe": lambda: tiny.roberta()[0],
    "byte-level bpe, of no class": lambda: tiny.byte_level(pad_token="[PAD]"),
    "unigram": lambda: tiny.xlm_roberta()[0],
    "unigram, T5": lambda: tiny.t5()[0],
    "bpe with byte fallback": lambda: tiny.gemma3()[0],
    "bpe with word ends": tiny_clip.tokenizer,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> TextTokenizer:
    return TextTokenizer(TOKENIZERS[request.param]().backend_tokenizer)


@given(
    parts=st.lists(
        st.sampled_from(["river", "a", "naïve", "Поезд", "机", "🚀", "antidisestablishment"])
        | st.text("abcé", min_size=1, max_size=40),
        min_size=1,
        max_size=60,
    ),
    room=st.integers(4, 40),
)
@example(parts=["bridge", "mountains"] * 40, room=8)
@example(parts=["a" * 300, "b", "c" * 9], room=8)
def test_words_are_cut_only_where_they_do_not_fit(
    tokenizer: TextTokenizer, parts: list[str], room: int
) -> None:
    text, head = " ".join(parts), tokenizer.special_tokens
    pieces = Chunker(tokenizer, room + head).split(text)
    assert [piece.start for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]
    assert pieces[-1].end == len(text)
    assert max(piece.tokens for piece in pieces) <= room + head
    encoding = tokenizer.encode(text)
    bare = [piece.token_ids for piece in map(partial(inner, tokenizer), pieces)]
    assert np.concatenate(bare).tolist() == encoding.ids
    starts, at, whole = {piece.start for piece in pieces}, 0, True
    for part in parts:
        # Its own, and that of the space before it, where the tokenizer gives it one.
        tokens = sum(
            end > max(at - 1, 0) and start < at + len(part) for start, end in encoding.offsets
        )
        inside = sum(at < start < at + len(part) for start in starts)
        if tokens <= room:
            assert not inside, (part, tokens)
        else:
            whole = False
            # Two code points at most share their tokens here, so a piece may miss three of them.
            assert inside <= -(-tokens // (room - 3)) - 1, (part, tokens)
        at += len(part) + 1
    if whole:  # then each piece's tokens are those of its own text
        for piece, ids in zip(pieces, bare):
            assert tokenizer.encode(text[piece.start : piece.end]).ids == ids.tolist()


def inner(tokenizer: TextTokenizer, chunk: Chunk) -> Chunk:
    """Without its special tokens."""
    empty = tokenizer.with_special_tokens(np.array([], np.int64))
    before = len(tokenizer._prefix)
    ids = chunk.token_ids[before : len(chunk.token_ids) - len(empty) + before]
    return replace(chunk, token_ids=ids)


# -- chunks of real texts -----------------------------------------------------------------------


def test_a_text_that_fills_the_window_is_one_chunk(chunker: Chunker) -> None:
    (chunk,) = chunker.split(words(ROOM))
    assert (chunk.start, chunk.end, chunk.tokens) == (0, len(words(ROOM)), WINDOW)


def test_a_text_one_token_over_the_window_becomes_two_halves(chunker: Chunker) -> None:
    first, second = chunker.split(words(ROOM + 1))
    assert {first.tokens, second.tokens} == {ROOM // 2 + SPECIALS, ROOM // 2 + 1 + SPECIALS}


def test_words_stay_whole_and_dropped_marks_stay_with_their_word(chunker: Chunker) -> None:
    for name in ("english", "combining", "emoji", "arabic", "code"):
        text = TEXTS[name]
        for chunk in chunker.split(text)[1:]:
            assert text[chunk.start].isspace(), (name, text[chunk.start - 3 : chunk.start + 3])


def test_without_spaces_words_of_the_tokenizer_stay_whole(chunker: Chunker) -> None:
    for name in ("chinese", "japanese"):
        chunks = chunker.split(TEXTS[name])
        for chunk in chunks:
            (alone,) = chunker.split(TEXTS[name][chunk.start : chunk.end])
            assert alone.token_ids.tolist() == chunk.token_ids.tolist()


@pytest.mark.parametrize("text", ["a" * 600, "一 " * 600])
def test_a_prompt_that_fills_the_window(chunker: Chunker, text: str) -> None:
    with pytest.raises(InvalidInput, match="the prompt alone fills the model's window of 256"):
        chunker.split(text, f"{WORD} " * ROOM)


# -- texts of plain words


@pytest.fixture(scope="module")
def both(models_dir: pathlib.Path) -> tuple[Chunker, Chunker]:
    """One that looks at words, and one that leaves every text to the tokenizer."""
    tokenizers = [TextTokenizer(load_tokenizer(read(models_dir / NAME))[0]) for _ in range(2)]
    tokenizers[1].words._usable = False
    return Chunker(tokenizers[0], WINDOW), Chunker(tokenizers[1], WINDOW)


def split(chunker: Chunker, window: int, text: str, prompt: str | None) -> list[object]:
    chunks = Chunker(chunker.tokenizer, window).split(text, PROMPTS[prompt])
    return [(chunk.start, chunk.end, chunk.token_ids.tolist()) for chunk in chunks]


@given(
    text=st.lists(
        st.sampled_from(
            ["river", "a", "antidisestablishmentarianism", "café", "x_y", "...", "(", "7"]
        )
        | st.text("ab .-é", max_size=12),
        min_size=1,
        max_size=60,
    ).map(" ".join),
    window=st.integers(8, 40),
    prompt=st.sampled_from([None, "short", "odd", "long"]),
)
@example(text="a" * 100, window=8, prompt=None)
@example(text="a" * 100 + " b", window=8, prompt="short")
@example(text="river " * 30, window=8, prompt="long")
def test_long_texts_of_plain_words_have_the_chunks_that_the_tokenizer_gives(
    both: tuple[Chunker, Chunker], text: str, window: int, prompt: str | None
) -> None:
    if text.strip():
        found, expected = (split(chunker, window, text, prompt) for chunker in both)
        assert found == expected


def test_long_texts_of_plain_words_are_not_tokenised_as_a_whole(
    chunker: Chunker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextTokenizer, "encode", None)
    for prompt in (None, "short", "long"):
        assert len(split(chunker, 20, "The river, a mountain. " * 20, prompt)) > 5
    for text, prompt in (("a" * 100, None), ("river " * 30, "odd")):  # a cut, a border in a word
        with pytest.raises(TypeError):
            split(chunker, 20, text, prompt)
