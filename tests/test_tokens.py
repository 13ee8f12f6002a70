"""tokens.py: special tokens, and words that have the tokenizer's own ids. On the real tokenizer."""

import itertools
import pathlib

import numpy as np
import pytest
from conftest import NAME
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Encoding, Tokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

import tokens
from chunks import Chunker
from engine.bundle import Bundle, read
from engine.errors import BundleError, InvalidInput
from tokens import TextTokenizer, Words, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(models_dir: pathlib.Path) -> Tokenizer:
    return load_tokenizer(read(models_dir / NAME))[0]


def test_a_damaged_tokenizer_is_named(models_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    manifest = read(models_dir / NAME).manifest
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="tokenizer.json cannot be read"):
        load_tokenizer(Bundle(tmp_path, manifest))


def template(tokenizer: Tokenizer, single: str) -> Tokenizer:
    """The tokenizer with other special tokens around a text."""
    changed = Tokenizer.from_str(tokenizer.to_str())
    changed.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single=single, special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )
    return changed


def test_special_tokens_are_those_of_the_template(tokenizer: Tokenizer) -> None:
    for single, expected in (
        ("[CLS] $A [SEP]", [101, 7, 8, 102]),
        ("$A [SEP]", [7, 8, 102]),
        ("[CLS] [CLS] $A", [101, 101, 7, 8]),
    ):
        made = TextTokenizer(template(tokenizer, single))
        assert made.with_special_tokens(np.array([7, 8])).tolist() == expected
        assert made.special_tokens == len(expected) - 2


def test_a_template_of_another_form_is_refused(tokenizer: Tokenizer) -> None:
    class Other:
        def encode(self, text: str, add_special_tokens: bool = True) -> Encoding:
            return tokenizer.encode(text[::-1] if add_special_tokens else text * 2)

    with pytest.raises(BundleError, match="not a prefix and a suffix"):
        TextTokenizer(Other())  # type: ignore[arg-type]


def test_no_token_at_all_is_refused(tokenizer: Tokenizer) -> None:
    bare = TextTokenizer(template(tokenizer, "$A"))
    assert bare.with_special_tokens(np.array([7])).tolist() == [7]
    with pytest.raises(InvalidInput, match="finds no token in the text"):
        bare.with_special_tokens(np.array([], np.int64))
    for text in ("", "   ", "\n"):
        with pytest.raises(InvalidInput, match="finds no token in the text"):
            Chunker(bare, 8).split(text)


# -- words


@pytest.fixture(
    scope="module",
    params=itertools.product([True, False], [None, True, False], [True, False]),
    ids="lowercase={0[0]},strip_accents={0[1]},clean_text={0[2]}".format,
)
def any_bert(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> Tokenizer:
    """A tokenizer with one of the normalizers that BERT's family has."""
    lowercase, strip_accents, clean_text = request.param
    changed = Tokenizer.from_str(tokenizer.to_str())
    changed.normalizer = BertNormalizer(  # type: ignore[assignment]
        lowercase=lowercase, strip_accents=strip_accents, clean_text=clean_text
    )
    return changed


@given(
    st.text(
        st.characters(min_codepoint=32, max_codepoint=126)
        | st.characters(min_codepoint=0xA0, max_codepoint=0xFF)
        | st.sampled_from("\n\r\t\v\f\x1c\x85"),
        max_size=60,
    )
    | st.lists(
        st.sampled_from(
            ["Paris", "don't", "x_y", "3.14", "U.S.", "$5", "e-mail", "antidisestab"]
            + ["café", "Übermensch", "naïve", "Straße", "ÆON", "é", "É", "São", "½", "4×4"]
        )
    ).map(" ".join)
)
@example("a" * 101 + " b")  # a word that is too long for the tokenizer
@example("é" * 101 + " b")
@example("  spaces   between  ")
@example("\n lines\r\nand\ttabs \n")
@example("a\vb\fc\x1cd\x85e\xa0f")  # what Python splits a text at, but not the tokenizer
@example("".join(map(chr, range(0xC0, 0x100))))
@example(" ".join(map(chr, range(0xC0, 0x100))))
def test_words_have_the_tokenizers_own_ids(any_bert: Tokenizer, text: str) -> None:
    known = Words(any_bert)
    for each in (text, "other " + text, text):  # beside other words they are the same, or again
        if (ids := known.ids(each)) is not None:
            encoding = any_bert.encode(each, add_special_tokens=False)
            assert np.frombuffer(ids, np.int64).tolist() == encoding.ids
            words = known.split(each)
            assert "".join(each[start:end] for start, end, _ in words) == "".join(each.split())
            assert [count for *_, count in words] == [
                len([*group]) for _, group in itertools.groupby(encoding.word_ids)
            ]


def test_a_text_of_plain_words_is_not_tokenised_as_a_whole(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The riverbeds run by Café Übermensch."
    expected = tokenizer.encode(text).ids
    chunker = Chunker(TextTokenizer(tokenizer), 256)
    monkeypatch.setattr(TextTokenizer, "encode", None)
    for _ in range(2):
        (chunk,) = chunker.split(text)
        assert chunk.token_ids.tolist() == expected
        assert (chunk.start, chunk.end) == (0, len(text))
    with pytest.raises(TypeError):
        chunker.split("the riverbeds \u4e00")


@pytest.mark.parametrize(
    "text", ["[SEP] in a text", "cafe\u0301", "\u00bd", "\u017bywiec", "two\vlines", "\x00"]
)
def test_what_is_not_plainly_words_is_left_to_the_tokenizer(
    tokenizer: Tokenizer, text: str
) -> None:
    for each in (text, f"river {text}", f"{text} river", f"a{text}b"):
        assert Words(tokenizer).ids(each) is None


def test_other_tokenizers_words_are_left_to_them(tokenizer: Tokenizer) -> None:
    other = Tokenizer.from_str(tokenizer.to_str())
    other.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    assert Words(other).ids("the river") is None
    added = Tokenizer.from_str(tokenizer.to_str())
    added.add_tokens(["river"])
    assert Words(added).ids("the river") is None


def test_the_words_kept_are_few(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_CACHED_WORDS", 3)
    words = Words(tokenizer)
    for text in ("a b c d e f a", "a, quaternion!", "f e d c b a", "a a a"):
        ids = words.ids(text)
        assert ids is not None
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert np.frombuffer(ids, np.int64).tolist() == expected
        assert len(words._cache) <= 3
    long = "a" * 65
    assert words.ids(long)
    assert long not in words._cache


def test_large_texts_are_left_to_the_tokenizer(tokenizer: Tokenizer) -> None:
    words = Words(tokenizer)
    assert words.ids("a" * tokens.LARGE_TEXT_CHARACTERS)
    assert words.ids("a" * (tokens.LARGE_TEXT_CHARACTERS + 1)) is None
