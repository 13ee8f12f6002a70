"""The binding of encoder.so: the structures of encoder.h, and memory for C."""

import ctypes
import pathlib

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

LIBRARY = pathlib.Path(__file__).with_name("encoder.so")
_CACHE_LINE = 64
Pointer = ctypes.c_void_p


class Shape(ctypes.Structure):
    _fields_ = [
        ("hidden", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("inner", ctypes.c_int32),
        ("layers", ctypes.c_int32),
        ("first_position", ctypes.c_int32),
        ("pad", ctypes.c_int32),
        ("first_token", ctypes.c_int32),
        ("int8", ctypes.c_int32),
        ("vocabulary", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
    ]


class Linear(ctypes.Structure):
    _fields_ = [("weights", Pointer), ("bias", Pointer), ("scale", Pointer)]


class Layer(ctypes.Structure):
    _fields_ = [
        ("qkv", Linear),
        ("out", Linear),
        ("up", Linear),
        ("down", Linear),
        ("norm1", Pointer),
        ("norm2", Pointer),
    ]


class Weights(ctypes.Structure):
    _fields_ = [
        ("words", Pointer),
        ("positions", Pointer),
        ("types", Pointer),
        ("norm", Pointer),
        ("layers", Pointer),
    ]


class Batch(ctypes.Structure):
    _fields_ = [
        ("shape", Pointer),
        ("weights", Pointer),
        ("ids", Pointer),
        ("starts", Pointer),
        ("out", Pointer),
        ("crew", Pointer),
        ("number", ctypes.c_int64),
        ("texts", ctypes.c_int32),
        ("helpers", ctypes.c_int32),
    ]


class Ended(ctypes.Structure):
    _fields_ = [("number", ctypes.c_int64), ("nanoseconds", ctypes.c_int64)]


STRUCTURES: tuple[type[ctypes.Structure], ...] = (Shape, Linear, Layer, Weights, Batch, Ended)


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
    try:
        compiled = (ctypes.c_int32 * (1 + len(layout))).in_dll(quick, "encoder_layout")
        same = list(compiled) == [len(layout), *layout]
    except ValueError:  # no such symbol
        same = False
    if not same:
        raise RuntimeError(f"{LIBRARY} is of another version: run python -m engine.encoder.build")
    return library, quick


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
