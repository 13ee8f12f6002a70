"""chunks.py: where a long text is cut, on texts of our own and the real model's tokenizer."""

import pathlib

import numpy as np
import pytest
from conftest import NAME
from hypothesis import example, given
from hypothesis import strategies as st
from test_embeddings import ROOM, SPECIALS, TEXTS, WINDOW, WORD, words

import chunks
from chunks import Chunker, cut
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
    cuts = cut(tokens, 10, [every, [], every])
    sizes = np.diff(cuts)
    assert cuts[0] == 0 and cuts[-1] == tokens
    assert len(sizes) == -(-tokens // 10)
    assert sizes.max() <= 10 and sizes.max() - sizes.min() <= 1


def test_one_token_over_the_window_makes_two_halves() -> None:
    assert cut(11, 10, [list(range(1, 11)), [], []]) in ([0, 5, 11], [0, 6, 11])


def test_a_cut_moves_to_the_nearest_word_border_within_the_slack() -> None:
    assert cut(16, 10, [[3, 7, 12], [8], list(range(1, 16))]) == [0, 7, 16]


def test_white_space_is_better_than_another_border_and_that_better_than_none() -> None:
    everywhere = list(range(1, 16))
    assert cut(16, 10, [[], [7], everywhere]) == [0, 7, 16]
    assert cut(16, 10, [[], [], everywhere]) == [0, 8, 16]
    assert cut(16, 10, [[], [], []]) == [0, 8, 16]


def test_a_chunk_more_is_made_where_that_spares_a_word() -> None:
    # 20 tokens in chunks of 10 could only be cut at 10, inside a word.
    assert cut(20, 10, [[6, 13], [], list(range(1, 20))]) == [0, 6, 13, 20]


def test_random_cuts_always_fit() -> None:
    random = np.random.default_rng(1)
    for _ in range(500):
        tokens, room = int(random.integers(2, 400)), int(random.integers(1, 50))
        spaces = sorted(set(random.integers(1, tokens, size=tokens // 5).tolist()))
        cuts = cut(tokens, room, [spaces, [], list(range(1, tokens))])
        sizes = np.diff(cuts)
        assert cuts[0] == 0 and cuts[-1] == tokens
        assert sizes.min() >= 1 and sizes.max() <= room
        assert len(sizes) <= -(-tokens // room) + 1


def test_the_slack_is_how_far_a_cut_may_move(monkeypatch: pytest.MonkeyPatch) -> None:
    borders = [[5], [], list(range(1, 16))]  # an equal split of 16 tokens is at 8
    assert cut(16, 12, borders) == [0, 8, 16]
    monkeypatch.setattr(chunks, "CHUNK_SLACK", 0.4)
    assert cut(16, 12, borders) == [0, 5, 16]


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
