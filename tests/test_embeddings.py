"""embeddings.py: vectors of texts and their chunks; options, limits, cache. On the real model."""

import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import NAME

from chunks import CHUNK_SLACK
from embeddings import TextEmbedder, Truncation, VectorCache
from engine.bundle import Bundle, read
from engine.errors import InputTooLarge, InvalidInput
from engine.openvino_backend import OpenVINOTextEngine
from engine.protocol import Engine
from engine.queue import Queue
from limits import TextLimits
from tokens import load_tokenizer

WINDOW, SPECIALS = 256, 2
ROOM = WINDOW - SPECIALS
LIMITS = TextLimits(max_texts=1000, max_text_bytes=1 << 20, max_request_tokens=20_000)
WORD = "river"  # one token


def embedder_for(
    bundle: Bundle, batcher: Queue, limits: TextLimits = LIMITS, **options: Any
) -> TextEmbedder:
    tokenizer, pad_id, pad_left = load_tokenizer(bundle)
    engine = OpenVINOTextEngine(bundle, "fp32", pad_id=pad_id, pad_left=pad_left, streams=1)
    return TextEmbedder(bundle, tokenizer, engine, batcher, limits, **options)


@pytest.fixture(scope="module")
def batcher() -> Iterator[Queue]:
    made = Queue(max_batch_size=16, max_batch_tokens=512, max_queue_tokens=10**6, threads=1)
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def embedder(models_dir: pathlib.Path, batcher: Queue) -> TextEmbedder:
    return embedder_for(read(models_dir / NAME), batcher)


@pytest.fixture(scope="module")
def prompted(models_dir: pathlib.Path, batcher: Queue) -> TextEmbedder:
    """The same model with prompts in its manifest."""
    bundle = read(models_dir / NAME)
    bundle.manifest.prompts = {"query": "search for this: ", "plain": "", "long": "word " * 300}
    bundle.manifest.default_prompt = "query"
    return embedder_for(bundle, batcher)


def embed(embedder: TextEmbedder, *texts: str, **options: Any) -> list[Any]:
    return embedder.embed(texts, deadline=time.monotonic() + 60, **options)


def unit(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def words(count: int) -> str:
    return " ".join([WORD] * count)


# -- chunks of real texts -----------------------------------------------------------------------


TEXTS = {
    "english": "The river rose after three days of rain; the old bridge was closed. " * 40,
    "german": "Donaudampfschifffahrtsgesellschaftskapitän trifft Straßenbahnschaffnerin. " * 30,
    "emoji": "🚀 Launch day! 🎉👩‍👩‍👧‍👦 can't wait 😂😂 #release " * 40,
    "combining": "cafe\u0301 Zu\u0308rich re\u0301sume\u0301 " * 150,
    "chinese": "自然语言处理让计算机能够理解人类的文字。" * 30,
    "japanese": "機械学習モデルは大量のデータから規則性を見つけ出す。" * 30,
    "arabic": "تُستخدم الشبكات العصبية في ترجمة النصوص بين اللغات. " * 30,
    "code": "def f(xs):\n\treturn [x**2 for x in xs if x != 0]  # comment\n\n" * 30,
    "spaces": "  many     spaces \t\r\n and\u00a0odd\u2003ones " * 60,
    "no spaces": "antidisestablishmentarianism" * 3 + "," + "abc," * 400,
    "ligatures": "ﬁnancial oﬃce ½ ℃ Ⅷ " * 80,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_chunks_cover_the_text_are_near_equal_and_embed_as_their_own_text(
    embedder: TextEmbedder, sentence_transformer: Any, text: str
) -> None:
    (result,) = embed(embedder, text)
    chunks = result.chunks
    assert len(chunks) >= 2
    assert [chunk.start for chunk in chunks] == [0] + [chunk.end for chunk in chunks[:-1]]
    assert chunks[-1].end == len(text)
    sizes = [chunk.tokens - SPECIALS for chunk in chunks]
    mean = sum(sizes) / len(sizes)
    assert max(sizes) <= ROOM
    assert max(abs(size - mean) for size in sizes) <= 2 * CHUNK_SLACK * mean + 1
    # What the engine computed for a chunk is what sentence-transformers computes for its text.
    expected = sentence_transformer.encode([text[chunk.start : chunk.end] for chunk in chunks])
    assert ((result.chunk_vectors * unit(expected)).sum(axis=1) >= 0.9999).all()
    assert result.vector @ unit(expected.mean(axis=0)) >= 0.9999


def test_a_text_of_5000_tokens_is_the_normalised_mean_of_its_chunks(
    embedder: TextEmbedder, sentence_transformer: Any
) -> None:
    text = " ".join(f"{phrase[:60]} {number}" for number in range(50) for phrase in TEXTS.values())
    (result,) = embed(embedder, text)
    assert sum(chunk.tokens - SPECIALS for chunk in result.chunks) >= 5000
    pieces = [text[chunk.start : chunk.end] for chunk in result.chunks]
    expected = unit(sentence_transformer.encode(pieces).mean(axis=0))
    assert result.vector @ expected >= 0.9999
    assert np.linalg.norm(result.vector) == pytest.approx(1, abs=1e-6)


def test_alone_or_in_company_a_text_has_the_same_vector(embedder: TextEmbedder) -> None:
    texts = [words(count) + " and company" for count in (1, 2, 3, 50, 51, 250, 300, 700)]
    together = embed(embedder, *texts)
    for text, result in zip(texts, together):
        (alone,) = embed(embedder, text)
        assert alone.vector @ result.vector >= 0.99999


def test_tokens_are_counted_as_computed(embedder: TextEmbedder) -> None:
    one, two = embed(embedder, words(3), words(ROOM + 1))
    assert one.tokens == 3 + SPECIALS
    assert two.tokens == ROOM + 1 + 2 * SPECIALS


# -- options ------------------------------------------------------------------------------------


def test_normalize_false_gives_the_vector_before_the_models_normalize(
    embedder: TextEmbedder,
) -> None:
    (raw,) = embed(embedder, "a raw vector", normalize=False)
    (normal,) = embed(embedder, "a raw vector")
    length = np.linalg.norm(raw.vector)
    assert abs(length - 1) > 0.01
    assert np.allclose(raw.vector / length, normal.vector, atol=1e-6)


def test_dimensions_cut_and_normalise_again(embedder: TextEmbedder) -> None:
    (whole,) = embed(embedder, "cut me")
    (part,) = embed(embedder, "cut me", dimensions=64)
    assert part.vector.shape == (64,)
    assert np.allclose(part.vector, unit(whole.vector[:64]), atol=1e-6)
    (raw,) = embed(embedder, "cut me", dimensions=64, normalize=False)
    assert np.linalg.norm(raw.vector) != pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("dimensions", [0, -1, 385])
def test_dimensions_out_of_range(embedder: TextEmbedder, dimensions: int) -> None:
    message = f"dimensions is {dimensions}; this model takes 1 to 384"
    with pytest.raises(InvalidInput, match=message) as info:
        embed(embedder, "x", dimensions=dimensions)
    assert (info.value.field, info.value.index) == ("dimensions", None)


def test_truncate_is_the_one_way_to_ask_for_a_cut(
    embedder: TextEmbedder, sentence_transformer: Any
) -> None:
    text = TEXTS["english"]
    (result,) = embed(embedder, text, truncate="right")
    (chunk,) = result.chunks
    assert chunk.tokens == WINDOW and 0 < chunk.end < len(text)
    assert result.vector @ sentence_transformer.encode(text) >= 0.9999  # it cuts there too


def test_the_left_side_can_be_cut_too(embedder: TextEmbedder) -> None:
    text = f"winter {words(400)} summer"
    (right,) = embed(embedder, text, truncate="right")
    (left,) = embed(embedder, text, truncate="left")
    for result, kept in (
        (right, text[: right.chunks[0].end]),
        (left, text[left.chunks[0].start :]),
    ):
        assert len(kept.split()) == ROOM == result.tokens - SPECIALS
        assert result.vector @ embed(embedder, kept)[0].vector >= 0.9999
    assert (right.chunks[0].start, left.chunks[0].end) == (0, len(text))


def test_what_was_cut_is_reported(models_dir: pathlib.Path, batcher: Queue) -> None:
    seen: list[int] = []
    cutting = embedder_for(
        read(models_dir / NAME), batcher, truncation=Truncation(True, seen.append)
    )
    full, long = words(ROOM), words(ROOM + 1)
    for side in ("right", "left"):
        results = embed(cutting, full, long, "x", TEXTS["emoji"], truncate=side)
        assert [result.chunks[0].truncated for result in results] == [False, True, False, True]
    cutting.similarities([long, "x"], long, deadline=time.monotonic() + 60, truncate="right")
    assert seen == [2, 2, 2]
    embed(cutting, long)
    embed(cutting, full, truncate="right")
    assert seen == [2, 2, 2]


def test_truncate_has_no_effect_where_it_is_not_honoured(
    embedder: TextEmbedder, models_dir: pathlib.Path, batcher: Queue
) -> None:
    seen: list[int] = []
    averaging = embedder_for(
        read(models_dir / NAME), batcher, truncation=Truncation(False, seen.append)
    )
    text = TEXTS["english"]
    (whole,) = embed(embedder, text)
    for side in (None, "left", "right"):
        (result,) = embed(averaging, text, truncate=side)
        assert np.array_equal(result.vector, whole.vector)
    assert embed(embedder, text, truncate="right")[0].vector @ whole.vector < 0.999
    assert seen == []


def test_a_prompt_goes_before_every_chunk_and_counts_in_no_offset(
    prompted: TextEmbedder, sentence_transformer: Any
) -> None:
    text, prompt = TEXTS["english"], "search for this: "
    (result,) = embed(prompted, text, prompt_name="query")
    chunks = result.chunks
    assert chunks[0].start == 0 and chunks[-1].end == len(text)
    assert max(chunk.tokens for chunk in chunks) <= WINDOW
    pieces = [prompt + text[chunk.start : chunk.end] for chunk in chunks]
    expected = sentence_transformer.encode(pieces)
    assert ((result.chunk_vectors * expected).sum(axis=1) >= 0.9999).all()


def test_the_default_prompt_applies_unless_another_is_named(
    prompted: TextEmbedder, sentence_transformer: Any
) -> None:
    expected = sentence_transformer.encode(["search for this: x", "x"])
    (default,), (plain,) = embed(prompted, "x"), embed(prompted, "x", prompt_name="plain")
    assert default.vector @ expected[0] >= 0.9999
    assert plain.vector @ expected[1] >= 0.9999


def test_unknown_and_oversized_prompts_are_refused(
    embedder: TextEmbedder, prompted: TextEmbedder
) -> None:
    message = "prompt_name is 'nope'; this model has: long, plain, query"
    with pytest.raises(InvalidInput, match=message) as info:
        embed(prompted, "x", prompt_name="nope")
    assert (info.value.field, info.value.index) == ("prompt_name", None)
    message = "the prompt alone fills the model's window of 256"
    with pytest.raises(InvalidInput, match=message) as info:
        embed(prompted, "x", "一 y", prompt_name="long")
    assert (info.value.field, info.value.index) == (None, 0)


# -- limits -------------------------------------------------------------------------------------


def test_blank_texts_are_refused_by_index(embedder: TextEmbedder) -> None:
    for blank in ("", " ", "\t\n", "\u00a0\u2003\u3000"):
        with pytest.raises(InvalidInput, match="empty or only white space") as info:
            embed(embedder, "fine", blank)
        assert (info.value.field, info.value.index) == (None, 1)


def test_no_texts_and_too_many(models_dir: pathlib.Path, batcher: Queue) -> None:
    embedder = embedder_for(read(models_dir / NAME), batcher, TextLimits(2, 100, 100))
    with pytest.raises(InvalidInput, match="no text"):
        embed(embedder)
    with pytest.raises(InvalidInput, match=r"3 texts; the limit is 2 \(MAX_INPUTS\)"):
        embed(embedder, "a", "b", "c")
    more = TextLimits(3, 100, 100, "OTHER")
    assert len(embed(embedder, "a", "b", "c", limits=more)) == 3
    with pytest.raises(InvalidInput, match=r"4 texts; the limit is 3 \(OTHER\)"):
        embed(embedder, *"abcd", limits=more)


def test_text_size_is_counted_in_bytes(models_dir: pathlib.Path, batcher: Queue) -> None:
    embedder = embedder_for(read(models_dir / NAME), batcher, TextLimits(2, 8, 100))
    embed(embedder, "12345678", "éééé")
    for text in ("123456789", "ééééé"):
        with pytest.raises(InputTooLarge, match=r"bytes; the limit is 8 \(MAX_TEXT_SIZE\)"):
            embed(embedder, text)


def test_request_tokens_are_bounded_over_all_texts(
    models_dir: pathlib.Path, batcher: Queue
) -> None:
    embedder = embedder_for(read(models_dir / NAME), batcher, TextLimits(10, 10_000, 600))
    embed(embedder, words(296), words(296))  # two chunks each: 296 and 4 special tokens
    embed(embedder, words(594))  # three chunks: 594 and 6
    with pytest.raises(InputTooLarge, match=r"(?s)601 tokens up to here.*600.*MAX_REQUEST_TOKENS"):
        embed(embedder, words(595))
    with pytest.raises(InputTooLarge) as info:
        embed(embedder, words(200), words(200), words(200))
    assert info.value.index == 2


def test_a_text_the_tokenizer_drops_whole_still_has_a_vector(
    embedder: TextEmbedder, sentence_transformer: Any
) -> None:
    (result,) = embed(embedder, "\u0000\u200b")
    assert result.vector @ sentence_transformer.encode("\u0000\u200b") >= 0.9999


# -- what the dialects ask beside vectors --------------------------------------------------------


def test_similarities_are_cosines_in_order(embedder: TextEmbedder) -> None:
    vectors = [result.vector for result in embed(embedder, "a cat", "a kitten", "taxes")]
    cosines = embedder.similarities(["a kitten", "taxes"], "a cat", deadline=time.monotonic() + 60)
    assert np.allclose(cosines, [vectors[0] @ vectors[1], vectors[0] @ vectors[2]], atol=1e-4)
    with pytest.raises(InvalidInput, match="empty") as info:
        embedder.similarities(["a", ""], "b", deadline=0)
    assert info.value.index == 1
    with pytest.raises(InputTooLarge, match="source_sentence: text has") as info:
        embedder.similarities(["a", "b"], "x" * (1 << 21), deadline=0)
    assert (info.value.field, info.value.index) == ("source_sentence", None)


def test_tokens_stand_for_the_text_as_sent(prompted: TextEmbedder) -> None:
    text = "naïve 😀 river"
    (tokens,) = prompted.tokenize([text], prompt_name="query", add_special_tokens=True)
    assert (tokens[0].text, tokens[0].special, tokens[-1].special) == ("[CLS]", True, True)
    ahead = [token for token in tokens[1:-1] if token.start is None]
    own = [token for token in tokens if token.start is not None]
    assert "".join(token.text for token in ahead) == "searchforthis:"
    assert [text[token.start : token.stop] for token in own] == [token.text for token in own]
    (chunk,) = embed(prompted, text, prompt_name="query")[0].chunks
    assert [token.id for token in tokens] == chunk.token_ids.tolist()


def test_tokens_have_the_same_limits(embedder: TextEmbedder) -> None:
    with pytest.raises(InputTooLarge, match="MAX_REQUEST_TOKENS") as info:
        embedder.tokenize([words(19_990), words(20)], add_special_tokens=False)
    assert info.value.index == 1


# -- what is not computed twice


class Counting(Engine):
    """An engine that counts what it is given."""

    def __init__(self, engine: OpenVINOTextEngine) -> None:
        self.engine, self.computed = engine, 0
        self.name, self.dimensions = engine.name, engine.dimensions
        self.precision, self.padding_cost = engine.precision, engine.padding_cost
        self.min_batch_tokens = engine.min_batch_tokens
        self.backend, self.modality = engine.backend, engine.modality

    def run(self, inputs: Any, *, alone: bool = False) -> Any:
        self.computed += len(inputs)
        return self.engine.run(inputs, alone=alone)

    def widen(self) -> None:
        self.engine.widen()


@pytest.fixture(scope="module")
def counting(models_dir: pathlib.Path) -> Counting:
    bundle = read(models_dir / NAME)
    _, pad_id, pad_left = load_tokenizer(bundle)
    return Counting(OpenVINOTextEngine(bundle, "fp32", pad_id=pad_id, pad_left=pad_left, streams=2))


def counted(
    models_dir: pathlib.Path, batcher: Queue, engine: Counting, cache: VectorCache | None = None
) -> TextEmbedder:
    bundle = read(models_dir / NAME)
    engine.computed = 0
    return TextEmbedder(bundle, load_tokenizer(bundle)[0], engine, batcher, LIMITS, cache)


def test_equal_texts_of_a_request_are_computed_once(
    models_dir: pathlib.Path, batcher: Queue, counting: Counting, embedder: TextEmbedder
) -> None:
    texts = ["one", "two", "one", "three", "two", "one", words(ROOM * 2), words(ROOM * 2)]
    once = embed(counted(models_dir, batcher, counting), *texts)
    assert counting.computed == 4  # and the long text's two chunks are equal
    for text, result in zip(texts, once):
        alone = embed(embedder, text)[0]
        assert result.vector @ alone.vector == pytest.approx(1, abs=1e-5)
        assert result.tokens == alone.tokens


def test_the_cache_answers_what_was_asked_before(
    models_dir: pathlib.Path, batcher: Queue, counting: Counting
) -> None:
    seen: list[tuple[int, int]] = []
    cache = VectorCache(2, lambda hits, misses: seen.append((hits, misses)))
    embedder = counted(models_dir, batcher, counting, cache)
    first = embed(embedder, "one")[0]
    again = embed(embedder, "one")[0]
    assert counting.computed == 1 and (first.vector == again.vector).all()
    embed(embedder, "two", "one", "two")
    assert counting.computed == 2
    embed(embedder, "one")
    embed(embedder, "three")  # "two" was not asked for as lately as "one"
    embed(embedder, "one")
    assert counting.computed == 3
    embed(embedder, "two")
    assert counting.computed == 4
    assert seen == [(0, 1), (1, 0), (1, 1), (1, 0), (0, 1), (1, 0), (0, 1)]


def test_a_cached_vector_is_nobodys_to_change(
    models_dir: pathlib.Path, batcher: Queue, counting: Counting
) -> None:
    embedder = counted(models_dir, batcher, counting, VectorCache(10))
    expected = embed(embedder, "one")[0].vector.copy()
    embed(embedder, "one")[0].vector[:] = 0
    embed(embedder, "one", dimensions=10)
    assert (embed(embedder, "one")[0].vector == expected).all()


def test_an_engine_on_all_cores_gives_the_same_vectors(counting: Counting) -> None:
    ids = [np.arange(1000, 1020, dtype=np.int64)]
    narrow = counting.engine.run(ids, alone=True)
    counting.widen()
    wide = counting.engine.run(ids, alone=True)
    assert counting.engine._wide is not counting.engine._graph
    np.testing.assert_allclose(wide, narrow, atol=1e-5)


def test_heavy_weights_are_not_held_twice(
    models_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.openvino_backend.WIDE_WEIGHTS", 10_000_000)
    bundle = read(models_dir / NAME)
    engine = OpenVINOTextEngine(bundle, "fp32", pad_id=0, pad_left=False, streams=2)
    engine.widen()
    assert engine._wide is engine._graph
