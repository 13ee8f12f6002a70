"""engine/encoder: the models' own vectors, and who gets them from OpenVINO."""

import ctypes
import gc
import math
import os
import pathlib
import select
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import own_engine
import pytest
import tiny_models as tiny
from conftest import NAME, WIDE

import bake_model
from engine import bundle as bundles
from engine.bundle import PARITY_FLOOR, Bundle, Manifest, Parity, Precision, read
from engine.choice import text_engine
from engine.encoder import cpu, encoder_engine, library
from engine.encoder.build import build
from engine.encoder.encoder_engine import AHEAD_TOKENS, EncoderEngine, EncoderThreads
from engine.openvino_backend import OpenVINOTextEngine, available_precisions
from engine.protocol import InputRefused
from settings import Settings

# Coverage takes a sixth of its time; other tests cover the same lines.
pytestmark = pytest.mark.no_cover

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

needs_the_cpu = pytest.mark.skipif(
    cpu.fastest("fp32") is None, reason="this CPU is not x86-64 with AVX2"
)
CASES = [(family.name, precision) for family in cpu.FAMILIES for precision in family.precisions]
# Those that are the fastest here.
PRECISIONS: list[Precision] = [each for each in PARITY_FLOOR if cpu.fastest(each)]


def cosines(a: Float32, b: Float32) -> Float32:
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    result: Float32 = (a * b).sum(axis=1) / lengths
    return result


def ids(count: int, seed: int = 0) -> Int64:
    """A text of so many tokens of all-MiniLM-L6-v2."""
    return np.random.default_rng([count, seed]).integers(1000, 30000, count)


def bake(folder: pathlib.Path, *options: str) -> Bundle:
    bake_model.main([str(folder), "--output", str(folder.parent / "models"), *options])
    return read(folder.parent / "models" / folder.name)


@needs_the_cpu
def test_a_model_whose_vectors_it_does_not_give_is_left_to_openvino(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.save(tmp_path / "model", own_engine.bert(), width=64)
    right = EncoderThreads.put

    def wrong(
        self: EncoderThreads, number: int, engine: EncoderEngine, inputs: list[Int64], alone: bool
    ) -> Float32:
        if engine.precision == "int8":
            inputs = [each[::-1] for each in inputs]
        return right(self, number, engine, inputs, alone)

    monkeypatch.setattr(EncoderThreads, "put", wrong)
    bundle = bake(folder)
    assert bundle.manifest.encoder and list(bundle.manifest.left_out) == ["own engine"]
    assert list(bundle.manifest.left_out["own engine"]) == ["int8"]
    assert encoder_engine.choose("int8", bundle) is None
    assert encoder_engine.choose("fp32", bundle) == "fp32"
    assert set(bundle.manifest.parity["OpenVINO"]) == set(available_precisions())
    assert "at int8 its vectors are not the model's own" in capsys.readouterr().err


# Calls.


@pytest.fixture(scope="module")
def bundle(models_dir: pathlib.Path) -> Bundle:
    return read(models_dir / WIDE)


@pytest.fixture(scope="module")
def exact(bundle: Bundle) -> OpenVINOTextEngine:
    """At fp32, compared with sentence-transformers elsewhere."""
    return OpenVINOTextEngine(bundle, "fp32", pad_id=0, pad_left=False, streams=2)


def made(bundle: Bundle, precision: Precision, *, streams: int, isa: str = "auto") -> EncoderEngine:
    if cpu.fastest(precision, isa) is None:
        pytest.skip(f"this CPU has no kernels for {precision}")
    return EncoderEngine(bundle, precision, streams=streams, isa=isa)


# The portable kernels take a second for a text of 512 tokens: one precision of them has to do here.
SERVED = [case for case in CASES if case != ("portable", "int8")]


@pytest.fixture(scope="module", params=SERVED, ids="-".join)
def engine(request: Any, bundle: Bundle) -> EncoderEngine:
    name, precision = request.param
    if name not in [family.name for family in cpu.runnable()]:
        pytest.skip(f"this CPU has no {name}")
    return made(bundle, precision, streams=3, isa=name)


def few_of(engine: EncoderEngine, lengths: Sequence[int]) -> Sequence[int]:
    """All of them, or every fifth for the portable kernels."""
    return lengths[::5] if engine.isa == "portable" else lengths


def test_texts_of_every_length_alone_and_in_company(
    engine: EncoderEngine, exact: OpenVINOTextEngine
) -> None:
    inputs = [ids(length) for length in few_of(engine, [*range(1, 50), 63, 64, 65, 127, 129, 512])]
    expected = np.concatenate([exact.run([one]) for one in inputs])
    lone = np.concatenate([engine.run([one]) for one in inputs])
    assert lone.dtype == np.float32 and lone.shape == (len(inputs), 384)
    assert cosines(lone, expected).min() >= PARITY_FLOOR[engine.precision]
    # Nothing is padded, and each row is summed in the same order: not a bit changes.
    assert (engine.run(inputs[::-1])[::-1] == lone).all()


def test_a_call_on_all_cores_gives_the_same_and_its_helpers_end(bundle: Bundle) -> None:
    before = set(threading.enumerate())  # other engines may have some
    engine = made(bundle, "int8", streams=3)
    engine.widen()
    inputs = [ids(length) for length in (1, 12, 100, 512)]
    expected = [engine.run([one]) for one in inputs]
    helpers = set(threading.enumerate()) - before
    assert len(helpers) == 2
    with ThreadPoolExecutor(4) as pool:  # one of them has the helpers, the others have not
        for _ in range(25):
            calls = [pool.submit(engine.run, [one], alone=True) for one in inputs]
            for call, vectors in zip(calls, expected):
                assert (call.result() == vectors).all()
    del engine, calls
    gc.collect()
    for thread in helpers:
        thread.join(10)
        assert not thread.is_alive()


def test_calls_from_many_threads_do_not_mix(engine: EncoderEngine) -> None:
    inputs = [[ids(length), ids(7)] for length in few_of(engine, range(1, 60))]
    expected = [engine.run(each) for each in inputs]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            for vectors, own in zip(pool.map(engine.run, inputs), expected):
                assert (vectors == own).all()


def test_memory_of_a_large_call_is_given_back(
    engine: EncoderEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = engine.run([ids(9)])
    kept = engine._local.memory
    monkeypatch.setattr(encoder_engine, "KEPT_MEMORY", len(kept))
    vectors = engine.run([ids(500)] * 3)
    assert engine._local.memory is kept
    assert (vectors == vectors[0]).all() and (engine.run([ids(9)]) == first).all()


@pytest.mark.parametrize("wrong", [[30522], [-1], [], [5] * 513])
def test_what_the_model_has_no_embedding_of(engine: EncoderEngine, wrong: list[int]) -> None:
    with pytest.raises(InputRefused, match="token") as refused:
        engine.run([ids(3), np.array(wrong, np.int64), ids(4)])
    assert refused.value.index == 1
    assert np.isfinite(engine.run([ids(3)])).all()


# Its threads.


class Line:
    """An engine's threads, and what the queue does with them."""

    def __init__(self, count: int) -> None:
        self.wake = os.eventfd(0)
        self.threads = EncoderThreads(count, self.wake)
        self.order: list[int] = []  # of the batches that have ended

    def put(self, number: int, engine: EncoderEngine, *texts: Int64, alone: bool = False) -> Any:
        return self.threads.put(number, engine, texts, alone)

    def wait(self, batches: int) -> None:
        while len(self.order) < batches:
            assert select.select([self.wake], [], [], 30)[0]
            os.eventfd_read(self.wake)
            for number, seconds in self.threads.ended():
                assert seconds and seconds > 0
                self.order.append(number)


@pytest.fixture
def line() -> Iterator[Callable[[int], Line]]:
    made: list[Line] = []

    def make(count: int) -> Line:
        made.append(Line(count))
        return made[-1]

    yield make
    for one in made:
        one.threads.close()
        assert not any(thread.is_alive() for thread in one.threads._threads)
        os.close(one.wake)


Make = Callable[[int], Line]


def test_threads_give_what_run_gives(
    engine: EncoderEngine, line: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_engine, "KEPT_MEMORY", 0)  # of each batch
    work = line(2)
    lengths = few_of(engine, range(1, 60)), [256 if engine.isa == "portable" else 512], [9]
    batches = [[ids(length) for length in each] for each in lengths]
    vectors = [work.put(number, engine, *batch) for number, batch in enumerate(batches)]
    work.wait(3)
    alone = work.put(3, engine, ids(20), alone=True)
    work.wait(4)
    for got, batch in zip([*vectors, alone], [*batches, [ids(20)]]):
        assert (got == engine.run(batch)).all()


def test_a_thread_computes_batches_in_order(bundle: Bundle, line: Make) -> None:
    engine, work = made(bundle, "int8", streams=1), line(1)
    for number in range(20):
        work.put(number, engine, *[ids(3 + number % 5)] * 3)
        work.wait(number)  # so that two are there
    work.wait(20)
    assert work.order == [*range(20)]


def test_engines_share_threads(bundle: Bundle, line: Make) -> None:
    engines = [made(bundle, precision, streams=1) for precision in PRECISIONS[:2]]
    work = line(1)
    vectors = [work.put(number, engine, ids(40)) for number, engine in enumerate(engines)]
    work.wait(2)
    for got, engine in zip(vectors, engines):
        assert (got == engine.run([ids(40)])).all()


def test_threads_keep_what_they_use_and_no_more(bundle: Bundle, line: Make) -> None:
    engine, work = made(bundle, "int8", streams=1), line(1)
    texts = [ids(50)]
    expected, gone = engine.run(texts), weakref.ref(engine)
    vectors = work.put(0, engine, *texts)
    del engine, texts
    work.wait(1)
    assert (vectors == expected).all()
    gc.collect()
    assert gone() is None and not work.threads._in_use


def test_threads_have_room_for_one_batch_more_than_they_are(bundle: Bundle, line: Make) -> None:
    engine, work = made(bundle, "int8", streams=1), line(2)
    room = []
    for number in range(3):
        room.append(work.threads.room())
        work.put(number, engine, ids(5))
    assert [*room, work.threads.room()] == [math.inf, math.inf, AHEAD_TOKENS, 0]
    with pytest.raises(RuntimeError, match="3 batches are here already"):
        work.put(3, engine, ids(5))
    work.wait(3)
    work.put(4, engine, ids(5))
    work.wait(4)


@pytest.mark.parametrize("wrong", [[30522], [-1], [1 << 32], [], [5] * 513])
def test_threads_are_not_given_what_has_no_embedding(
    engine: EncoderEngine, line: Make, wrong: list[int]
) -> None:
    work = line(1)
    with pytest.raises(InputRefused, match="token") as refused:
        work.put(0, engine, ids(3), np.array(wrong, np.int64))
    assert refused.value.index == 1 and not work.threads._in_use
    vectors = work.put(1, engine, ids(3))
    work.wait(1)
    assert (vectors == engine.run([ids(3)])).all()


@needs_the_cpu
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Batch(ctypes.Structure):
        _fields_ = [*library.Batch._fields_[1:], library.Batch._fields_[0]]

    library.load()
    monkeypatch.setattr(library, "STRUCTURES", (*library.STRUCTURES[:-1], Batch))
    with pytest.raises(RuntimeError, match="another version: run python -m engine.encoder.build"):
        library.load()
    monkeypatch.setattr(library, "STRUCTURES", library.STRUCTURES[:-1])
    with pytest.raises(RuntimeError, match="another version"):
        library.load()


# The choice.


WANTED = ("auto", "fp32", "bf16", "int8")
OURS = {"auto": "fp32", "fp32": "fp32", "bf16": None, "int8": "int8"}
WITH_BF16 = {**OURS, "auto": "bf16", "bf16": "bf16"}


def chosen(bundle: Bundle, isa: str = "auto") -> dict[str, Precision | None]:
    return {wanted: encoder_engine.choose(wanted, bundle, isa) for wanted in WANTED}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Pretend that this CPU has the instructions of a family and no more."""

    def has(name: str) -> None:
        needs = cpu.FAMILIES[cpu.NAMES.index(name)].needs
        monkeypatch.setattr(cpu, "_cpu_flags", lambda: set(needs))

    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu, "_tiles_allowed", lambda: True)
    monkeypatch.setattr(cpu, "_cpuinfo", lambda field: "vendor_id : AuthenticAMD")
    return has


def test_which_precision_serves(bundle: Bundle, pretend: Callable[[str], None]) -> None:
    for name in ("avx2", "avxvnni", "avx512", "vnni"):
        pretend(name)
        assert chosen(bundle) == OURS
    for name in ("bf16", "amx"):
        pretend(name)
        assert chosen(bundle) == WITH_BF16
        assert chosen(bundle, "vnni") == OURS
    pretend("portable")  # OpenVINO is faster, unless the user insists
    assert chosen(bundle) == dict.fromkeys(WANTED)
    assert chosen(bundle, "portable") == OURS
    pretend("amx")
    without = Bundle(bundle.path, Manifest(**manifest(bundle, precisions=["int8", "fp32"])))
    assert chosen(without) == OURS
    other = Bundle(bundle.path, Manifest(**manifest(bundle, encoder=None)))
    assert chosen(other) == dict.fromkeys(WANTED)


@pytest.mark.parametrize(
    ("minimum", "mean", "auto"),
    [(0.9995, 0.9998, "int8"), (0.9994, 0.9999, "bf16"), (0.9996, 0.9997, "bf16")],
)
def test_auto_takes_int8_that_is_exact_enough(
    bundle: Bundle, pretend: Callable[[str], None], minimum: float, mean: float, auto: Precision
) -> None:
    pretend("bf16")
    parity = {"own engine": {"int8": Parity(minimum, mean, 330, minimum, [1])}}
    other = Bundle(bundle.path, Manifest(**manifest(bundle, parity=parity)))
    assert chosen(other) == {**WITH_BF16, "auto": auto}
    both = Manifest(**manifest(other, modalities=["text", "image"]))  # pictures have no certificate
    assert encoder_engine.choose("auto", Bundle(bundle.path, both)) == "bf16"
    both.image_parity = {"own engine": {"int8": Parity(minimum, mean, 330, minimum, [1])}}
    assert encoder_engine.choose("auto", Bundle(bundle.path, both)) == auto
    pretend("avx512")  # where int8 is as fast as fp32
    assert chosen(other) == OURS
    left_out = {"own engine": {"int8": "it is wrong here"}}
    other = Bundle(bundle.path, Manifest(**manifest(bundle, parity=parity, left_out=left_out)))
    pretend("bf16")
    assert chosen(other)["auto"] == "bf16"


def test_the_setting_takes_every_family() -> None:
    (field,) = [each for each in fields(Settings) if each.name == "encoder_isa"]
    assert field.metadata["choices"] == ("auto", *cpu.NAMES)


def test_which_family_computes(pretend: Callable[[str], None]) -> None:
    def fastest(precision: Precision, limit: str = "auto") -> str:
        family = cpu.fastest(precision, limit)
        return family.name if family else "none"

    pretend("amx")
    assert [fastest(each) for each in bundles.PRECISIONS] == ["avx512", "amx", "amx"]
    assert [fastest(each, "bf16") for each in bundles.PRECISIONS] == ["avx512", "bf16", "bf16"]
    assert [fastest(each, "vnni") for each in bundles.PRECISIONS] == ["avx512", "none", "vnni"]
    assert [fastest(each, "avx512") for each in bundles.PRECISIONS] == ["avx512", "none", "avx512"]
    assert [fastest(each, "avx2") for each in bundles.PRECISIONS] == ["avx2", "none", "avx2"]
    assert [fastest(each, "portable") for each in bundles.PRECISIONS] == [
        "portable",
        "none",
        "portable",
    ]
    pretend("avxvnni")
    assert [fastest(each) for each in bundles.PRECISIONS] == ["avx2", "none", "avxvnni"]
    assert [fastest(each, "amx") for each in bundles.PRECISIONS] == ["avx2", "none", "avxvnni"]


def test_elsewhere_openvino_serves(
    bundle: Bundle, pretend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend("amx")
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    assert chosen(bundle) == dict.fromkeys(WANTED)
    monkeypatch.undo()
    monkeypatch.setattr(library, "LIBRARY", pathlib.Path("/absent/encoder.so"))
    assert chosen(bundle) == dict.fromkeys(WANTED)
    monkeypatch.undo()
    assert cpu._cpuinfo("no such field") == ""
    on_x86 = cpu.platform.machine() == "x86_64"
    assert bool(cpu._cpu_flags() & {"fpu", "sse2"}) == on_x86


def test_amx_that_linux_does_not_give(
    bundle: Bundle, pretend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend("amx")
    monkeypatch.setattr(cpu, "_tiles_allowed", lambda: False)
    family = cpu.fastest("bf16")
    assert family and family.name == "bf16"
    assert chosen(bundle) == WITH_BF16
    # Intel's AVX512-BF16 is slower than its fp32.
    monkeypatch.setattr(cpu, "_cpuinfo", lambda field: "vendor_id : GenuineIntel")
    assert chosen(bundle) == {**WITH_BF16, "auto": "fp32"}
    assert chosen(bundle, "bf16") == WITH_BF16  # for measurements


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

    (ours, vectors), could = run(), cpu.fastest("int8") is not None
    monkeypatch.setattr(library, "LIBRARY", pathlib.Path("/absent/encoder.so"))
    other, same = run()
    assert other == "OpenVINO" and (ours != other) == could
    assert cosines(vectors, same).min() >= 0.99


def test_the_library_is_compiled_beside_the_one_in_use(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.encoder.build.FAMILIES", cpu.FAMILIES[-1:])  # one is quicker
    made = tmp_path / "encoder.so"
    made.write_bytes(b"an older one")
    with made.open("rb") as open_before:
        build(made)
        assert open_before.read() == b"an older one"
    assert made.read_bytes()[:4] == b"\x7fELF"
    assert list(tmp_path.iterdir()) == [made]
