"""The binding of encoder.so: the structures of encoder.h, and memory for C."""

import ctypes
import pathlib

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

LIBRARY = pathlib.Path(__file__).with_name("encoder.so")
_CACHE_LINE = 64
Pointer = ctypes.c_void_p


_SIZES = ("hidden", "heads", "inner", "layers", "key_heads", "head")
_NUMBERS = ("first_position", "pad", "pooling", "pooled", "precision", "vocabulary", "window")
_OPTIONS = ("rms", "activation", "norm_before")
_PICTURES = ("patch", "across", "patch_values")


class Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in (*_SIZES, *_NUMBERS, *_OPTIONS)),
        *((name, ctypes.c_int32) for name in (*_PICTURES, "outputs", "distances")),
        ("epsilon", ctypes.c_float),
    ]


class Linear(ctypes.Structure):
    _fields_ = [(name, Pointer) for name in ("weights", "bias", "scale")]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, Linear) for name in ("qkv", "out", "up", "down")),
        *((name, Pointer) for name in ("norm1", "norm2", "angles", "gains")),
        *((name, ctypes.c_int32) for name in ("behind", "ahead")),
    ]


class Weights(ctypes.Structure):
    _fields_ = [
        *((name, Pointer) for name in ("kernels", "words", "positions")),
        *((name, Pointer) for name in ("norm", "last", "distances", "pixels")),
        *((name, Linear) for name in ("patches", "head")),
        ("layers", Pointer),
    ]


class Batch(ctypes.Structure):
    _fields_ = [
        *((name, Pointer) for name in ("shape", "weights", "ids", "pixels", "starts")),
        *((name, Pointer) for name in ("out", "crew")),
        ("nanoseconds", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("texts", "helpers")),
    ]


class Kernels(ctypes.Structure):
    """What a CPU family exports."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("activation_size", "code_size", "panel")),
        *((name, Pointer) for name in ("product", "attend", "rows", "turn")),
        *((name, Pointer) for name in ("attention_memory", "embed", "unfold", "pool")),
        *((name, Pointer) for name in ("lay_out", "lay_out_int8")),
        *((name, Pointer) for name in ("activate", "softmax", "rotate")),
    ]


STRUCTURES: tuple[type[ctypes.Structure], ...] = (Shape, Linear, Layer, Weights, Batch)


def load() -> tuple[ctypes.CDLL, ctypes.PyDLL]:
    """The library twice: its functions release the interpreter's lock, or keep it because they take
    less time than that would.

    Raises: RuntimeError when it was compiled from other structures than these.
    """
    library, quick = ctypes.CDLL(str(LIBRARY)), ctypes.PyDLL(str(LIBRARY))
    for name in ("encoder_memory", "encoder_helper_memory", "encoder_fifo_size"):
        getattr(quick, name).restype = ctypes.c_long
    layout = []
    for structure in STRUCTURES:
        layout.append(ctypes.sizeof(structure))
        layout += [getattr(structure, name).offset for name, *_ in structure._fields_]
    layout += [ctypes.sizeof(Kernels), Kernels.panel.offset, Kernels.lay_out.offset]
    try:
        compiled = (ctypes.c_int32 * (1 + len(layout))).in_dll(quick, "encoder_layout")
        same = list(compiled) == [len(layout), *layout]
    except ValueError:  # no such symbol
        same = False
    if not same:
        raise RuntimeError(f"{LIBRARY} is of another version: run python -m engine.encoder.build")
    return library, quick


def kernels(library: ctypes.CDLL, family: str) -> Kernels:
    """The kernels of a CPU family, which this CPU has to have."""
    return Kernels.in_dll(library, f"encoder_{family}")


def crew_memory(library: ctypes.CDLL) -> Bytes:
    """Memory for a crew, see encoder.h."""
    return aligned(ctypes.c_int32.in_dll(library, "encoder_crew_size").value)


def pointer(array: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    return Pointer(array.ctypes.data)


def aligned(size: int) -> Bytes:
    """`size` zero bytes that begin at a cache line."""
    memory = np.zeros(size + _CACHE_LINE - 1, np.uint8)
    offset = -memory.ctypes.data % _CACHE_LINE
    return memory[offset : offset + size]
