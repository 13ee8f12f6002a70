"""engine/native.py: the models' own vectors, and who gets them from OpenVINO."""

import gc
import os
import pathlib
import select
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer

import bake_model
import tiny_models as tiny
from conftest import NAME, WIDE
from embeddings import load_tokenizer
from engine import native
from engine.build import build
from engine.bundle import PARITY_FLOOR, Bundle, Manifest, Precision, read
from engine.choice import text_engine
from engine.native import NativeTextEngine, NativeThreads
from engine.openvino_backend import OpenVINOTextEngine

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

needs_the_cpu = pytest.mark.skipif(
    not native.available(), reason="this CPU has no AVX512-BF16, or has AMX as well"
)
PRECISIONS: tuple[Precision, ...] = ("bf16", "int8")


def cosines(a: Float32, b: Float32) -> Float32:
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    result: Float32 = (a * b).sum(axis=1) / lengths
    return result


def ids(count: int, seed: int = 0) -> Int64:
    """A text of so many tokens of all-MiniLM-L6-v2."""
    return np.random.default_rng([count, seed]).integers(1000, 30000, count)


# Architectures.


def sizes(tokenizer: Any, positions: int, heads: int = 2, **options: Any) -> dict[str, Any]:
    """Heads of 32, and the smallest that encoder.c takes; weights that make attention sharp."""
    wide = {"hidden_size": 64, "num_attention_heads": heads, "intermediate_size": 128}
    return tiny.sizes(tokenizer, positions, **{**wide, "initializer_range": 0.2, **options})


def taught(tokenizer: Any, model: Any) -> tiny.Made:
    """Biases are 0 and gains 1 before a model has learnt, which OpenVINO leaves out."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return tokenizer, model


def bert(**options: Any) -> Callable[[], tiny.Made]:
    def make() -> tiny.Made:
        tokenizer = tiny.trained(transformers.BertTokenizer, tiny.BERT_TOKENS)
        config = transformers.BertConfig(**sizes(tokenizer, tiny.WINDOW, **options))
        return taught(tokenizer, transformers.BertModel(config))

    return make


def of_roberta_kind(tokenizer_kind: Any, config_kind: Any, model_kind: Any) -> tiny.Made:
    tokenizer = tiny.trained(tokenizer_kind, tiny.ROBERTA_TOKENS)
    return taught(tokenizer, model_kind(config_kind(**sizes(tokenizer, tiny.WINDOW + 2))))


def roberta() -> tiny.Made:
    kinds = transformers.RobertaTokenizer, transformers.RobertaConfig, transformers.RobertaModel
    return of_roberta_kind(*kinds)


def xlm_roberta() -> tiny.Made:
    kinds = transformers.XLMRobertaConfig, transformers.XLMRobertaModel
    return of_roberta_kind(transformers.XLMRobertaTokenizer, *kinds)


def bake(folder: pathlib.Path, *options: str) -> Bundle:
    bake_model.main([str(folder), "--output", str(folder.parent / "models"), *options])
    return read(folder.parent / "models" / folder.name)


@needs_the_cpu
@pytest.mark.parametrize(
    ("make", "pooling", "width"),
    [
        (bert(), "mean", 64),
        (bert(heads=1), "cls", 64),  # a head of 64
        (bert(heads=4, hidden_size=128, intermediate_size=64), "mean", 128),
        (roberta, "mean", 64),
        (xlm_roberta, "cls", 64),
    ],
    ids=["bert", "wide heads", "narrow inside", "roberta", "xlm-roberta"],
)
def test_vectors_of_every_architecture(
    make: Callable[[], tiny.Made], pooling: str, width: int, tmp_path: pathlib.Path
) -> None:
    folder = tiny.save(tmp_path / "model", make, pooling, width=width)
    bundle = bake(folder)
    tokenizer, pad_id, pad_left = load_tokenizer(bundle)
    # The padding token within a text moves RoBERTa's positions, and no others.
    texts = [*tiny.TEXTS, "the river <pad> rose [PAD] after <pad> three days", ""]
    inputs = [np.array(tokenizer.encode(text).ids) for text in texts]
    assert len({len(each) for each in inputs}) > 5
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts)
    assert cosines(expected[1:], expected[:-1]).max() < 0.99, "too alike to tell right from wrong"
    for precision in PRECISIONS:
        engine = text_engine(bundle, precision, pad_id=pad_id, pad_left=pad_left, streams=1)
        assert isinstance(engine, NativeTextEngine) and engine.precision == precision
        assert cosines(engine.run(inputs), expected).min() >= PARITY_FLOOR[precision]


UNLIKE = {
    "another activation": (bert(hidden_act="gelu_new"), "mean"),
    "heads of 16": (bert(heads=4), "mean"),
    "another pooling": (bert(), "max"),
    "another architecture": (tiny.mpnet, "mean"),
    "inner sizes that are no multiple of 64": (bert(intermediate_size=96), "mean"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_is_computed_otherwise_is_left_to_openvino(name: str, tmp_path: pathlib.Path) -> None:
    make, pooling = UNLIKE[name]
    width = tiny.WIDTH if make is tiny.mpnet else 64
    bundle = bake(tiny.save(tmp_path / "model", make, pooling, width=width), "--precisions", "fp32")
    assert bundle.manifest.encoder is None


@needs_the_cpu
def test_a_model_whose_vectors_it_does_not_give_is_left_to_openvino(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.save(tmp_path / "model", bert(), width=64)
    right, kept = NativeThreads.give, []

    def wrong(self: NativeThreads, ticket: int, ids: Int64, *rest: Any) -> None:
        kept.append(ids[::-1].copy())
        right(self, ticket, kept[-1], *rest)

    def start(self: NativeTextEngine, *args: Any, **options: Any) -> NativeThreads:
        if self.precision == "int8":
            monkeypatch.setattr(NativeThreads, "give", wrong)
        return NativeThreads(self, *args, *options.values())

    monkeypatch.setattr(NativeTextEngine, "start", start)
    bundle = bake(folder)
    assert bundle.manifest.encoder is None
    assert set(bundle.manifest.parity) == {"fp32", "bf16", "int8"}
    assert "at int8 its vectors are not the model's own" in capsys.readouterr().err


# Calls.


@pytest.fixture(scope="module")
def bundle(models_dir: pathlib.Path) -> Bundle:
    return read(models_dir / WIDE)


@pytest.fixture(scope="module")
def exact(bundle: Bundle) -> OpenVINOTextEngine:
    """At fp32, compared with sentence-transformers elsewhere."""
    return OpenVINOTextEngine(bundle, "fp32", pad_id=0, pad_left=False, streams=2)


@pytest.fixture(scope="module", params=PRECISIONS)
def engine(request: Any, bundle: Bundle) -> NativeTextEngine:
    if not native.available():
        pytest.skip("not on this CPU")
    return NativeTextEngine(bundle, request.param, streams=3)


def test_texts_of_every_length_alone_and_in_company(
    engine: NativeTextEngine, exact: OpenVINOTextEngine
) -> None:
    inputs = [ids(length) for length in [*range(1, 50), 63, 64, 65, 127, 129, 511, 512]]
    expected = np.concatenate([exact.run([one]) for one in inputs])
    lone = np.concatenate([engine.run([one]) for one in inputs])
    assert lone.dtype == np.float32 and lone.shape == (len(inputs), 384)
    assert cosines(lone, expected).min() >= PARITY_FLOOR[engine.precision]
    # Nothing is padded, and each row is summed in the same order: not a bit changes.
    assert (engine.run(inputs[::-1])[::-1] == lone).all()


def test_a_call_on_all_cores_gives_the_same_and_its_helpers_end(bundle: Bundle) -> None:
    if not native.available():
        pytest.skip("not on this CPU")
    before = set(threading.enumerate())  # other engines may have some
    engine = NativeTextEngine(bundle, "int8", streams=3)
    engine.widen()
    inputs = [ids(length) for length in (1, 12, 100, 512)]
    expected = [engine.run([one]) for one in inputs]
    helpers = set(threading.enumerate()) - before
    assert len(helpers) == 2
    with ThreadPoolExecutor(4) as pool:  # one of them has the helpers, the others have not
        for _ in range(100):
            calls = [pool.submit(engine.run, [one], alone=True) for one in inputs]
            for call, vectors in zip(calls, expected):
                assert (call.result() == vectors).all()
    del engine, calls
    gc.collect()
    for thread in helpers:
        thread.join(10)
        assert not thread.is_alive()


def test_calls_from_many_threads_do_not_mix(engine: NativeTextEngine) -> None:
    inputs = [[ids(length), ids(7)] for length in range(1, 60)]
    expected = [engine.run(each) for each in inputs]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            for vectors, own in zip(pool.map(engine.run, inputs), expected):
                assert (vectors == own).all()


def test_memory_of_a_large_call_is_given_back(
    engine: NativeTextEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = engine.run([ids(9)])
    kept = engine._local.memory
    monkeypatch.setattr(native, "KEPT_MEMORY", len(kept))
    vectors = engine.run([ids(500)] * 3)
    assert engine._local.memory is kept
    assert (vectors == vectors[0]).all() and (engine.run([ids(9)]) == first).all()


@pytest.mark.parametrize("wrong", [[30522], [-1], [], [5] * 513])
def test_what_the_model_has_no_embedding_of(engine: NativeTextEngine, wrong: list[int]) -> None:
    with pytest.raises(ValueError, match="token"):
        engine.run([ids(3), np.array(wrong, np.int64)])
    assert np.isfinite(engine.run([ids(3)])).all()


# Its threads.


class Kitchen:
    """An engine's threads, and what a Batcher does with them."""

    def __init__(self, engine: NativeTextEngine, size: int = 64, tokens: int = 512) -> None:
        self.wake = os.eventfd(0)
        self.threads = engine.start(self.wake, max_batch_size=size, max_batch_tokens=tokens)
        self.vectors = np.zeros((200, engine.dimensions), np.float32)
        self.given = self.ended = 0
        self.kept: list[Int64] = []  # arrays are in use until their calls have ended

    def give(self, text: Int64, tag: float = 0.0, alone: bool = False) -> None:
        self.kept.append(text)
        self.threads.give(self.given, text, self.vectors, self.given, tag, alone)
        self.given += 1

    def called(self) -> int:
        """Wait until the threads have called. Returns: how often."""
        assert select.select([self.wake], [], [], 10)[0]
        return os.eventfd_read(self.wake)

    def calls(self) -> list[list[int]]:
        """Let them go, and wait for everything that was given."""
        self.threads.go()
        calls: list[list[int]] = []
        while self.ended < self.given:
            self.called()
            for tickets, seconds in self.threads.ended():
                assert seconds > 0
                calls.append(tickets)
                self.ended += len(tickets)
        return calls


@pytest.fixture
def kitchen() -> Iterator[Callable[..., Kitchen]]:
    made: list[Kitchen] = []

    def make(*args: Any) -> Kitchen:
        made.append(Kitchen(*args))
        return made[-1]

    yield make
    for one in made:
        one.threads.close()
        assert not any(thread.is_alive() for thread in one.threads._threads)
        os.close(one.wake)


Make = Callable[..., Kitchen]


def test_threads_give_what_calls_give(
    engine: NativeTextEngine, kitchen: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "KEPT_MEMORY", 0)  # of each call
    work, texts = kitchen(engine), [ids(length) for length in (*range(1, 60), 511, 512)]
    for text in texts:
        work.give(text)
    calls = work.calls()
    assert sorted(sum(calls, [])) == list(range(len(texts))) and len(calls) < len(texts)
    assert (work.vectors[: len(texts)] == engine.run(texts)).all()
    work.give(texts[7], alone=True)
    work.calls()
    assert (work.vectors[len(texts)] == work.vectors[7]).all()


def one_stream(bundle: Bundle) -> NativeTextEngine:
    if not native.available():
        pytest.skip("not on this CPU")
    return NativeTextEngine(bundle, "int8", streams=1)


def test_threads_take_the_smallest_tag_and_then_what_came_first(
    bundle: Bundle, kitchen: Make
) -> None:
    work = kitchen(one_stream(bundle), 1)
    for tag in (2.0, 1.0, 1.0):
        work.give(ids(5), tag)
    assert work.calls() == [[1], [2], [0]]


def test_calls_keep_to_their_size_and_their_tokens(bundle: Bundle, kitchen: Make) -> None:
    engine = one_stream(bundle)
    few, little = kitchen(engine, 3), kitchen(engine, 64, 100)
    for length in (10, 10, 10, 10, 90, 5, 200, 5):
        few.give(ids(length))
        little.give(ids(length))
    assert few.calls() == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert little.calls() == [[0, 1, 2, 3], [4, 5], [6], [7]]


def test_threads_share_what_there_is(bundle: Bundle, kitchen: Make) -> None:
    if not native.available():
        pytest.skip("not on this CPU")
    work = kitchen(NativeTextEngine(bundle, "int8", streams=2))
    for _ in range(12):
        work.give(ids(20))
    calls = work.calls()  # a third of 240 tokens, and of what is left or running then
    assert len(calls) >= 3 and max(map(len, calls)) == 4


def test_threads_take_little_ahead_and_call_when_they_want_more(
    bundle: Bundle, kitchen: Make
) -> None:
    work = kitchen(one_stream(bundle), 64, 512)
    takes = work.threads.takes
    refused = False
    while not takes(512):  # until the thread is there, and idle
        refused = True
    if refused:
        assert work.called() == 1
    work.give(ids(200))
    assert takes(256) and not takes(257)
    work.give(ids(256))
    assert takes(56) and not takes(57)
    work.threads.go()
    called = 0
    while called < 2:  # when the call has ended, and when there is none to begin
        called += work.called()
    assert work.threads.ended()[0][0] == [0, 1] and takes(512)


def test_threads_have_room_for_so_many_texts(bundle: Bundle, kitchen: Make) -> None:
    work = kitchen(one_stream(bundle), 2)
    while work.threads.takes(1):
        work.give(ids(1))
    assert work.given == 6
    with pytest.raises(RuntimeError, match="full"):
        work.threads.give(6, ids(1), work.vectors, 6, 0.0, False)
    work.calls()
    assert work.threads.takes(1)


@pytest.mark.parametrize("wrong", [[30522], [-1], [], [5] * 513])
def test_threads_are_not_given_what_has_no_embedding(
    engine: NativeTextEngine, kitchen: Make, wrong: list[int]
) -> None:
    work = kitchen(engine)
    with pytest.raises(ValueError, match="token"):
        work.give(np.array(wrong, np.int64))
    work.give(ids(3))
    work.calls()
    assert (work.vectors[0] == engine.run([ids(3)])[0]).all()


# The choice.


def test_which_engine_serves(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = native._NEEDED | {"avx2"}
    monkeypatch.setattr(native, "_cpu_flags", lambda: flags)
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    chosen = {wanted: native.choose(wanted, bundle) for wanted in ("auto", "bf16", "int8", "fp32")}
    assert chosen == {"auto": "bf16", "bf16": "bf16", "int8": "int8", "fp32": None}
    without = Bundle(bundle.path, Manifest(**manifest(bundle, precisions=["int8"])))
    assert native.choose("auto", without) is None and native.choose("int8", without) == "int8"
    other = Bundle(bundle.path, Manifest(**manifest(bundle, encoder=None)))
    assert native.choose("auto", other) is None
    for flag in native._NEEDED:
        flags = native._NEEDED - {flag}
        assert native.choose("auto", bundle) is None
    flags = native._NEEDED | {"amx_bf16"}
    assert native.choose("auto", bundle) is None
    flags = set(native._NEEDED)
    monkeypatch.setattr(native.platform, "machine", lambda: "aarch64")
    assert native.choose("auto", bundle) is None
    monkeypatch.undo()
    monkeypatch.setattr(native, "LIBRARY", pathlib.Path("/absent/encoder.so"))
    assert native.choose("auto", bundle) is None
    monkeypatch.undo()
    assert bool(native._cpu_flags() & {"fpu", "sse2"}) == (native.platform.machine() == "x86_64")


def manifest(bundle: Bundle, **changes: Any) -> dict[str, Any]:
    fields = bundle.manifest.__struct_fields__
    return {**{name: getattr(bundle.manifest, name) for name in fields}, **changes}


def test_without_the_library_openvino_serves_the_same(
    models_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = read(models_dir / NAME)
    inputs = [ids(20), ids(5)]

    def run() -> tuple[str, Float32]:
        engine = text_engine(bundle, "int8", pad_id=0, pad_left=False, streams=1)
        return engine.backend, engine.run(inputs)

    (ours, vectors), could = run(), native.available()
    monkeypatch.setattr(native, "LIBRARY", pathlib.Path("/absent/encoder.so"))
    other, same = run()
    assert other == "OpenVINO" and (ours != other) == could
    assert cosines(vectors, same).min() >= 0.99


def test_the_library_is_compiled_beside_the_one_in_use(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "encoder.so"
    made.write_bytes(b"an older one")
    with made.open("rb") as open_before:
        build(made)
        assert open_before.read() == b"an older one"
    assert made.read_bytes()[:4] == b"\x7fELF"
    assert list(tmp_path.iterdir()) == [made]
