"""Our own engine for BERT's architecture, on x86 CPUs with AVX512-BF16 and -VNNI: the binding of
engine/encoder.c, which engine/build.py compiles.

OpenVINO runs everything else. It takes 1.3 times as long at bf16 and 1.7 times at int8 (MiniLM on
Zen 4), for a lone query twice as long: here nothing is padded, there are no shapes to infer, and
one layout of the weights suits calls of few tokens and of many.
"""

import ctypes
import pathlib
import platform
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.bundle import TEXT_GRAPH, Bundle, Encoder, Precision

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

LIBRARY = pathlib.Path(__file__).with_name("encoder.so")
# /proc/cpuinfo's names of what encoder.c is compiled for.
_NEEDED = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"}
_NEEDED |= {"abm", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
# OpenVINO makes use of it; which of the two is faster then has not been measured.
_LEFT_TO_OPENVINO = "amx_bf16"
# Working memory above this is given back after the call that needed it.
KEPT_MEMORY = 32_000_000
# Of the embeddings that a token's is the sum of.
TABLES = ("word", "position", "token_type")
_CREW = 256  # bytes, at least sizeof(Crew)
_TEXT = 64  # bytes, at least sizeof(Text)
_CALL_TEXTS = 256  # most texts in a call; more would gain nothing

_Pointer = ctypes.c_void_p


class _Shape(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in ("hidden", "heads", "inner", "layers", "first_position", "pad")
        ),
        ("first_token", ctypes.c_int32),
        ("int8", ctypes.c_int32),
        ("vocabulary", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
    ]


class _Linear(ctypes.Structure):
    _fields_ = [("weights", _Pointer), ("bias", _Pointer), ("scale", _Pointer)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Linear) for name in ("qkv", "out", "up", "down")),
        ("norm1", _Pointer),
        ("norm2", _Pointer),
    ]


class _Weights(ctypes.Structure):
    _fields_ = [(name, _Pointer) for name in ("words", "positions", "types", "norm", "layers")]


def available() -> bool:
    """Whether this machine should run it, and it has been compiled."""
    if platform.machine() != "x86_64" or not LIBRARY.exists():
        return False
    flags = _cpu_flags()
    return _NEEDED <= flags and _LEFT_TO_OPENVINO not in flags


def _cpu_flags() -> set[str]:
    """What the kernel lets programs use of this CPU."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            return next((set(line.split()) for line in lines if line.startswith("flags")), set())
    except OSError:
        return set()


def choose(wanted: str, bundle: Bundle) -> Precision | None:
    """The precision at which this engine serves a bundle where PRECISION is `wanted`; None where
    OpenVINO has to.
    """
    precision: Precision = "int8" if wanted == "int8" else "bf16"
    runs = wanted != "fp32" and bundle.manifest.encoder and bundle.offers(precision)
    return precision if runs and available() else None


class NativeTextEngine:
    """A bundle's text model, as a batching.Engine; `streams` calls run at a time, on one core each.
    Safe to call from any number of threads.
    """

    backend = "our own encoder"
    padding_cost = 0.0  # there is none
    # A call of one short query costs 6 % more than its part of a larger one; with four clients two
    # threads give 18 % more answers than with calls of 64.
    share = 32

    def __init__(self, bundle: Bundle, precision: Precision, *, streams: int) -> None:
        """Call it only where `choose` gives `precision`."""
        manifest, encoder = bundle.manifest, bundle.manifest.encoder
        assert encoder
        self.name, self.modality, self.dimensions = manifest.name, "text", manifest.dimensions
        self.precision, self.streams = precision, streams
        self._encoder, self._max_tokens = encoder, manifest.max_tokens
        self._library = library = ctypes.CDLL(str(LIBRARY))
        library.encoder_memory.restype = ctypes.c_long
        self._shape = _Shape(
            **{name: getattr(encoder, name) for name in ("hidden", "heads", "inner", "layers")},
            first_position=encoder.first_position,
            pad=-1 if encoder.pad is None else encoder.pad,
            first_token=encoder.pooling == "cls",
            int8=precision == "int8",
            vocabulary=encoder.vocabulary,
            window=manifest.max_tokens,
            epsilon=encoder.epsilon,
        )
        self._weights, self._kept = self._load(bundle, encoder)
        self._local = threading.local()
        self._crew = self._start_helpers()

    def _load(self, bundle: Bundle, encoder: Encoder) -> tuple[_Weights, list[object]]:
        """Returns: the weights laid out, and what has to live as long as they do."""
        file = np.memmap(bundle.file(TEXT_GRAPH["bf16"]).with_suffix(".bin"), np.uint8, "r")
        width, inner, int8 = encoder.hidden, encoder.inner, self._shape.int8
        value_size = 1 if int8 else 2
        # numpy asks for huge pages, where the system has them.
        packed = _aligned(encoder.layers * (4 * width + 2 * inner) * width * value_size)
        layers = (_Layer * encoder.layers)()
        kept: list[object] = [file, packed, layers]
        free = int(packed.ctypes.data)

        def at(name: str) -> int:
            return int(file.ctypes.data) + encoder.tensors[name]

        def vectors(length: int, *names: str, factor: float = 1.0) -> Float32:
            """One behind the other; `factor` is for the first."""
            starts = [encoder.tensors[name] for name in names]
            halves = [file[start : start + 2 * length].tobytes() for start in starts]
            joined = np.frombuffer(b"".join(halves), np.float16).astype(np.float32)
            joined[:length] *= np.float32(factor)
            kept.append(joined)
            return joined

        def linear(rows: int, columns: int, *names: str, factor: float = 1.0) -> _Linear:
            """Products that are computed as one; `factor` is for the first."""
            nonlocal free
            biases = vectors(rows, *(f"{name}.bias" for name in names), factor=factor)
            scales = np.zeros(len(biases), np.float32)
            kept.append(scales)
            made = _Linear(free, biases.ctypes.data, scales.ctypes.data)
            for number, name in enumerate(names):
                by = ctypes.c_float(1 if number else factor)
                source = _Pointer(at(f"{name}.weight")), ctypes.c_long(rows), ctypes.c_long(columns)
                if int8:
                    scale = _Pointer(scales.ctypes.data + 4 * rows * number)
                    self._library.encoder_pack_int8(_Pointer(free), scale, *source, by)
                else:
                    self._library.encoder_pack_bf16(_Pointer(free), *source, by)
                free += rows * columns * value_size
            return made

        def norm(name: str) -> int:
            names = f"{name}.LayerNorm.weight", f"{name}.LayerNorm.bias"
            return int(vectors(width, *names).ctypes.data)

        # Softmax is taken of powers of 2.
        factor = encoder.query_factor * float(np.log2(np.e))
        for number, layer in enumerate(layers):
            own = f"encoder.layer.{number}"
            parts = [f"{own}.attention.self.{name}" for name in ("query", "key", "value")]
            layer.qkv = linear(width, width, *parts, factor=factor)
            layer.out = linear(width, width, f"{own}.attention.output.dense")
            layer.up = linear(inner, width, f"{own}.intermediate.dense")
            layer.down = linear(width, inner, f"{own}.output.dense")
            layer.norm1, layer.norm2 = norm(f"{own}.attention.output"), norm(f"{own}.output")
        tables = [at(f"embeddings.{name}_embeddings.weight") for name in TABLES]
        return _Weights(*tables, norm("embeddings"), ctypes.addressof(layers)), kept

    def widen(self) -> None:
        """Its helpers are there from the start."""

    def _start_helpers(self) -> Bytes | None:
        """Calls that are alone run on all cores, which takes a short text about half the time.

        Returns: what they are called by; None where there is one core.
        """
        helpers = self.streams - 1
        if helpers < 1:
            return None
        crew = _aligned(_CREW)
        size, library = self._memory(0, self._max_tokens, helper=True), self._library
        # Not joined: what collects the garbage may hold a lock that ending a thread takes.
        weakref.finalize(self, lambda: library.encoder_dismiss(_pointer(crew)))

        def help_out() -> None:
            memory = _aligned(size)
            library.encoder_help(_pointer(crew), _pointer(memory))

        for number in range(helpers):
            threading.Thread(target=help_out, name=f"helper-{number}", daemon=True).start()
        return crew

    def run(self, inputs: Sequence[Int64], *, alone: bool = False) -> Float32:
        """Embed a batch of token id arrays, each of shape (length,), special tokens included.

        Returns: float32 of shape (len(inputs), dimensions): what the model's pipeline gives before
        a trailing Normalize.
        Raises: ValueError for what the model has no embedding of.
        """
        ids = np.concatenate(inputs).astype(np.int32)
        starts = np.zeros(len(inputs) + 1, np.int32)
        lengths = [len(each) for each in inputs]
        np.cumsum(lengths, out=starts[1:])
        longest = max(lengths)
        if min(lengths) < 1 or longest > self._max_tokens:
            raise ValueError(f"texts of {min(lengths)} to {longest} tokens")
        if ids.min() < 0 or ids.max() >= self._encoder.vocabulary:
            raise ValueError(f"token ids {ids.min()} to {ids.max()}")
        out = np.empty((len(inputs), self._encoder.hidden), np.float32)
        needed = self._memory(len(ids), longest)
        memory: Bytes | None = getattr(self._local, "memory", None)
        if memory is None or len(memory) < needed:
            memory = _aligned(needed)
            if needed <= KEPT_MEMORY:
                self._local.memory = memory
        self._library.encoder_run(
            ctypes.byref(self._shape),
            ctypes.byref(self._weights),
            _pointer(ids),
            _pointer(starts),
            len(inputs),
            _pointer(out),
            _pointer(memory),
            _pointer(self._crew) if alone and self._crew is not None else None,
            self.streams - 1,
        )
        return out

    def start(self, wake: int, *, max_batch_size: int, max_batch_tokens: int) -> "NativeThreads":
        """Start threads that make calls of what they are given; see batching.Threads."""
        return NativeThreads(self, wake, max_batch_size, max_batch_tokens)

    def _memory(self, tokens: int, longest: int, *, helper: bool = False) -> int:
        shape = ctypes.byref(self._shape)
        return int(self._library.encoder_memory(shape, tokens, longest, int(helper)))


class NativeThreads:
    """An engine's threads and the queue that they take texts from, as batching.Threads. They need
    Python's interpreter for nothing: what they find in the queue they begin at once, whatever the
    event loop is at.
    """

    def __init__(
        self, engine: NativeTextEngine, wake: int, max_batch_size: int, max_batch_tokens: int
    ) -> None:
        threads = engine.streams
        most = min(max_batch_size, _CALL_TEXTS)
        capacity = most * (threads + 2)
        # Calls so short that to let go of the interpreter would take longer.
        quick, library = ctypes.PyDLL(str(LIBRARY)), engine._library
        quick.encoder_queue_size.restype = ctypes.c_long
        self._queue = queue = _aligned(quick.encoder_queue_size(capacity))
        self._at = at = _pointer(queue)
        quick.encoder_queue_begin(
            at,
            ctypes.byref(engine._shape),
            ctypes.byref(engine._weights),
            _pointer(engine._crew) if engine._crew is not None else None,
            *(threads, engine.share, most, max_batch_tokens, capacity, wake),
        )
        self._put, self._takes, self._go = quick.encoder_put, quick.encoder_takes, quick.encoder_go
        self._put.argtypes = (
            *(_Pointer, _Pointer, ctypes.c_int, _Pointer),
            *(ctypes.c_int64, ctypes.c_double, ctypes.c_int),
        )
        self._take_ended, self._stop = quick.encoder_ended, quick.encoder_stop
        self._ended = (ctypes.c_int64 * (3 * capacity))()
        self._row = 4 * engine.dimensions

        def serve(*in_use: object) -> None:
            call = _aligned(most * _TEXT)
            library.encoder_serve(at, _pointer(call), ctypes.c_long(KEPT_MEMORY))

        self._threads = [
            threading.Thread(
                target=serve, args=(queue, engine), name=f"encoder-{number}", daemon=True
            )
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def takes(self, tokens: int) -> bool:
        """Whether a text of so many tokens should be given now: as little as keeps the threads from
        waiting, since what comes later and is as urgent can't overtake it.
        """
        return bool(self._takes(self._at, tokens))

    def give(
        self, ticket: int, ids: Int64, vectors: Float32, row: int, tag: float, alone: bool
    ) -> None:
        """Queue a text for the next calls, the smallest tag first; both arrays are in use until the
        ticket has come back.

        Raises: ValueError for what the model has no embedding of.
        """
        out = vectors.ctypes.data + self._row * row
        refusal = self._put(self._at, ids.ctypes.data, len(ids), out, ticket, tag, alone)
        if refusal == -1:
            raise ValueError(f"the model has no embedding of these {len(ids)} token ids")
        if refusal:
            raise RuntimeError("the queue is full")

    def go(self) -> None:
        """Wake the threads that what was given needs."""
        self._go(self._at)

    def ended(self) -> list[tuple[list[int], float]]:
        """The calls that have ended since the last time: the tickets of each, and its seconds, or
        less than 0 where it failed.
        """
        filled = self._take_ended(self._at, self._ended)
        numbers, calls, at = self._ended[:filled], [], 0
        while at < filled:
            texts, nanoseconds = numbers[at : at + 2]
            calls.append((numbers[at + 2 : at + 2 + texts], nanoseconds / 1e9))
            at += 2 + texts
        return calls

    def close(self) -> None:
        """End the threads, when they have ended the calls they are at."""
        self._stop(self._at)
        for thread in self._threads:
            thread.join()


def _pointer(array: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    return _Pointer(array.ctypes.data)


def _aligned(size: int) -> Bytes:
    """Zeros, at the beginning of a cache line."""
    memory = np.zeros(size + 63, np.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + size]
