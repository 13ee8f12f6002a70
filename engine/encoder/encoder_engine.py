"""Our own engine for the transformers that bake/families.py names, on x86 CPUs from AVX2 on.

OpenVINO runs everything else. It takes 1.3 times as long at bf16 and 1.7 times at int8 (MiniLM, Zen
4), and twice as long for a single query: here nothing is padded, no shapes are inferred, and one
layout of the weights suits batches of few tokens and of many.
"""

import ctypes
import itertools
import math
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.bundle import PRECISIONS, Bundle, Encoder, Modality, Precision
from engine.encoder import cpu, library
from engine.encoder.library import Batch, Bytes, Pointer, Shape, aligned, pointer
from engine.encoder.weights import LaidOut, patches
from engine.protocol import Array, Engine, Float32, InputRefused

# Most tokens of a batch that is put before a thread is free; what comes later cannot overtake it.
# At 512, short texts beside long ones wait 240 ms in place of 100; at 128, texts of 128 tokens cost
# 4 % more (int8, MiniLM, two threads on Emerald Rapids).
AHEAD_TOKENS = 256

# encoder.h has the same numbers.
ACTIVATIONS = {"gelu": 1, "tanh gelu": 5, "quick gelu": 6, "relu": 7, "silu": 8}
GATED = 16
POOLINGS = ("mean", "first", "last", "first of")

_TOLD_OTHERWISE = ("pad", "pooling", "activation", "distances")  # in Encoder and in Shape

# Working memory above this many bytes is given back after the batch that needed it.
KEPT_MEMORY = 32_000_000


def runs(precision: Precision, isa: str = "auto") -> bool:
    """Whether this CPU runs this engine at a precision, with ENCODER_ISA=`isa`."""
    return library.LIBRARY.exists() and cpu.fastest(precision, isa) is not None


def choose(wanted: str, bundle: Bundle, isa: str = "auto") -> Precision | None:
    """The precision at which this engine serves a bundle for PRECISION=`wanted`; None when it
    cannot.

    Args:
        isa: ENCODER_ISA, the fastest CPU family that may be used, or "auto".
    """
    precisions = [each for each in PRECISIONS if each == wanted]
    if wanted == "auto":
        precisions = ["bf16", "fp32"]
        if isa == "auto" and cpu.slow_at_bf16():
            precisions.reverse()
        if _trusted_at_int8(bundle) and cpu.quick_at_int8(isa):
            precisions.insert(0, "int8")
    for precision in precisions:
        if "own engine" in bundle.backends(precision) and runs(precision, isa):
            return precision
    return None


def _trusted_at_int8(bundle: Bundle) -> bool:
    """Whether the bake found int8 exact enough for PRECISION=auto, with pictures too."""
    certificates = [bundle.manifest.parity]
    if "image" in bundle.manifest.modalities:
        certificates.append(bundle.manifest.image_parity)
    found = [each.get("own engine", {}).get("int8") for each in certificates]
    return all(parity is not None and parity.trusted for parity in found)


class _Tower(Engine):
    """One of a bundle's towers. Safe to call from any number of threads."""

    backend = "own engine"
    modality: Modality
    padding_cost = 0.0
    # A batch of one short query costs 6 % more than its part of a larger one; with four clients two
    # threads give 18 % more answers than with batches of 64 tokens (MiniLM, Zen 4).
    min_batch_tokens = 32

    def __init__(
        self, bundle: Bundle, precision: Precision, *, streams: int, isa: str = "auto"
    ) -> None:
        """Args:
            precision: what `choose` returned.
            streams: cores that a batch which is alone may use.
            isa: ENCODER_ISA, the fastest CPU family that may be used, or "auto".

        Raises: RuntimeError when the library is of another version; BundleError.
        """
        manifest, family = bundle.manifest, cpu.fastest(precision, isa)
        encoder = manifest.encoder if self.modality == "text" else manifest.image_encoder
        assert encoder and family
        self.isa = family.name
        self.name, self.dimensions, self.precision = manifest.name, manifest.dimensions, precision
        self.streams = streams
        self._library, self._quick = library.load()
        kernels = library.kernels(self._library, family.name)
        self._laid_out = LaidOut(bundle, self.modality, encoder, kernels, int8=precision == "int8")
        self._shape = self._make_shape(bundle, encoder)
        structures = self._shape, self._laid_out.weights
        self._addresses = [Pointer(ctypes.addressof(each)) for each in structures]
        self._local = threading.local()
        self._crew = self._start_helpers()
        self._crew_address = None if self._crew is None else self._crew.ctypes.data

    def _make_shape(self, bundle: Bundle, encoder: Encoder) -> Shape:
        same = [name for name, *_ in Shape._fields_ if hasattr(encoder, name)]
        shape = Shape(
            **{name: getattr(encoder, name) for name in same if name not in _TOLD_OTHERWISE},
            pad=-1 if encoder.pad is None else encoder.pad,
            pooling=POOLINGS.index(encoder.pooling),
            activation=ACTIVATIONS[encoder.activation] | (GATED if encoder.gated else 0),
            precision=PRECISIONS.index(self.precision),  # encoder.h has the same order
            window=bundle.manifest.max_tokens,
            distances=self._laid_out.distances,
        )
        if self._laid_out.preprocessing:
            shape.window = patches(encoder, self._laid_out.preprocessing) + 1
            shape.patch_values = self._laid_out.patch_values
        return shape

    def _start_helpers(self) -> Bytes | None:
        """A batch that is alone runs on all cores, in about half the time for a short text.

        Returns: the crew; None with one core.
        """
        helpers = self.streams - 1
        if helpers < 1:
            return None
        crew = library.crew_memory(self._library)
        size, own = self._quick.encoder_helper_memory(*self._addresses), self._library
        # Not joined: the garbage collector may hold a lock that the end of a thread needs.
        weakref.finalize(self, lambda: own.encoder_dismiss(pointer(crew)))

        def help_out() -> None:
            memory = aligned(size)
            own.encoder_help(pointer(crew), pointer(memory))

        for number in range(helpers):
            threading.Thread(target=help_out, name=f"helper-{number}", daemon=True).start()
        return crew

    def run(self, inputs: Sequence[Array], *, alone: bool = False) -> Float32:
        """Embed what `_read` takes.

        Returns: float32 of shape (len(inputs), dimensions): what the model's pipeline gives before
        a trailing Normalize.
        Raises: InputRefused for an input that the model cannot embed.
        """
        batch, arrays = self.batch(inputs, alone)
        refused = self._quick.encoder_check(ctypes.byref(batch))
        if refused >= 0:
            raise _refusal(inputs, refused)
        _, starts, out = arrays
        size = ctypes.c_int(int(starts[-1])), ctypes.c_int(int(np.diff(starts).max()))
        needed = self._quick.encoder_memory(*self._addresses, *size)
        memory: Bytes | None = getattr(self._local, "memory", None)
        if memory is None or len(memory) < needed:
            memory = aligned(needed)
            if needed <= KEPT_MEMORY:
                self._local.memory = memory
        self._library.encoder_run(ctypes.byref(batch), pointer(memory))
        return out

    def batch(
        self, inputs: Sequence[Array], alone: bool
    ) -> tuple[Batch, tuple[Array, npt.NDArray[np.int32], Float32]]:
        """What C gets, and the arrays that it reads and writes: inputs, starts and the vectors."""
        read, lengths = self._read(inputs)
        starts = np.array([0, *itertools.accumulate(lengths)], np.int32)
        out = np.empty((len(inputs), self.dimensions), np.float32)
        crew = self._crew_address if alone else None
        data = starts.ctypes.data, out.ctypes.data
        places = [read.ctypes.data if each == self.modality else None for each in ("text", "image")]
        batch = Batch(*self._addresses, *places, *data, crew, 0, len(inputs), self.streams - 1)
        return batch, (read, starts, out)

    def _read(self, inputs: Sequence[Array]) -> tuple[Array, Sequence[int]]:
        """What C reads, and how many tokens each input has."""
        raise NotImplementedError

    def start_threads(self, count: int, wake: int) -> "EncoderThreads":
        """Threads for every engine of this kind."""
        return EncoderThreads(count, wake)


class EncoderEngine(_Tower):
    """A bundle's tower of texts. Its inputs are token ids, int64 of shape (length,) each, special
    tokens included.
    """

    modality = "text"

    def _read(self, inputs: Sequence[Array]) -> tuple[Array, Sequence[int]]:
        return np.concatenate(inputs, dtype=np.int64), [len(each) for each in inputs]


class EncoderImageEngine(_Tower):
    """A bundle's tower of pictures. Its inputs are uint8 of shape (height, width, 3) each, prepared
    up to the crop.
    """

    modality = "image"

    def __init__(
        self, bundle: Bundle, precision: Precision, *, streams: int, isa: str = "auto"
    ) -> None:
        super().__init__(bundle, precision, streams=streams, isa=isa)
        assert self._laid_out.preprocessing
        self.preprocessing = self._laid_out.preprocessing

    def _read(self, inputs: Sequence[Array]) -> tuple[Array, Sequence[int]]:
        return np.stack(inputs, dtype=np.uint8), [self._shape.window] * len(inputs)


class EncoderThreads:
    """Threads that compute batches without Python's interpreter, as protocol.Threads: they begin
    the next batch at once, whatever the event loop is doing.
    """

    def __init__(self, count: int, wake: int) -> None:
        self._capacity = count + 1
        slow, quick = library.load()
        self._quick = quick
        self._fifo = fifo = aligned(quick.encoder_fifo_size(self._capacity))
        self._at = at = pointer(fifo)
        quick.encoder_fifo_begin(at, self._capacity, wake)
        self._in_use: dict[int, tuple[Batch, object]] = {}  # by number, with what C reads

        def serve() -> None:
            slow.encoder_serve(pointer(fifo), ctypes.c_long(KEPT_MEMORY))

        self._threads = [
            threading.Thread(target=serve, name=f"encoder-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def room(self) -> float:
        """See protocol.Threads. One batch is put ahead, so that no thread waits for Python."""
        if len(self._in_use) == self._capacity:
            return 0
        return AHEAD_TOKENS if len(self._in_use) == len(self._threads) else math.inf

    def put(self, number: int, engine: _Tower, inputs: Sequence[Array], alone: bool) -> Float32:
        """See protocol.Threads."""
        if len(self._in_use) == self._capacity:
            raise RuntimeError(f"{self._capacity} batches are here already")
        batch, arrays = engine.batch(inputs, alone)
        # First, since the batch may end before this returns.
        self._in_use[number] = batch, (engine, arrays)
        refused = self._quick.encoder_put(self._at, ctypes.byref(batch))
        if refused >= 0:
            del self._in_use[number]
            raise _refusal(inputs, refused)
        return arrays[-1]

    def ended(self) -> list[tuple[int, float | None]]:
        """See protocol.Threads."""
        in_use = list(self._in_use.items())
        ended = [(number, took) for number, (batch, _) in in_use if (took := batch.nanoseconds)]
        for number, _ in ended:
            del self._in_use[number]
        return [(number, None if took < 0 else took / 1e9) for number, took in ended]

    def close(self) -> None:
        """End the threads, once each has computed the batch it is at."""
        self._quick.encoder_stop(self._at)
        for thread in self._threads:
            thread.join()


def _refusal(inputs: Sequence[Array], index: int) -> InputRefused:
    length = len(inputs[index])
    return InputRefused(f"the model cannot embed text {index} of {length} token ids", index)
