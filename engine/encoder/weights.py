"""Reads a bundle's weights and lays them out for the C code."""

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.bundle import Bundle, Encoder, graph_file
from engine.encoder.library import Kernels, Layer, Linear, Pointer, Weights, aligned
from engine.errors import BundleError

# A token's embedding is the sum of its rows in these.
TABLES = ("word", "position", "token_type")
_SIZES = (ctypes.c_long, ctypes.c_long, ctypes.c_float)
_LAY_OUT = ctypes.CFUNCTYPE(None, Pointer, Pointer, *_SIZES)
_LAY_OUT_INT8 = ctypes.CFUNCTYPE(None, Pointer, Pointer, Pointer, *_SIZES)


class LaidOut:
    """The weights of a model. `weights` is valid as long as this object lives."""

    def __init__(self, bundle: Bundle, encoder: Encoder, kernels: Kernels, *, int8: bool) -> None:
        self._encoder, self._kernels, self._int8 = encoder, kernels, int8
        self._size = 1 if int8 else kernels.activation_size  # of a value, in bytes
        self._file = np.memmap(
            bundle.file(graph_file("text", "bf16")).with_suffix(".bin"), np.uint8, "r"
        )
        self._kept: list[object] = []  # C holds pointers to these
        width, inner = encoder.hidden, encoder.inner
        values = encoder.layers * (4 * width + 2 * inner) * width
        # One array for all panels: numpy asks for huge pages, where the system has them.
        self._panels = aligned(values * self._size)
        self._free = int(self._panels.ctypes.data)
        layers = (Layer * encoder.layers)()
        self._kept.append(layers)
        # Softmax takes powers of 2, so queries are scaled by log2(e).
        factor = encoder.query_factor * float(np.log2(np.e))
        for number, layer in enumerate(layers):
            own = f"encoder.layer.{number}"
            parts = [f"{own}.attention.self.{name}" for name in ("query", "key", "value")]
            layer.qkv = self._linear(width, width, parts, factor)
            layer.out = self._linear(width, width, [f"{own}.attention.output.dense"])
            layer.up = self._linear(inner, width, [f"{own}.intermediate.dense"])
            layer.down = self._linear(width, inner, [f"{own}.output.dense"])
            layer.norm1 = self._norm(f"{own}.attention.output")
            layer.norm2 = self._norm(f"{own}.output")
        positions = encoder.first_position + bundle.manifest.max_tokens
        rows = zip(TABLES, (encoder.vocabulary, positions, 1))
        tables = [
            self._address(f"embeddings.{name}_embeddings.weight", count * width)
            for name, count in rows
        ]
        self.weights = Weights(
            ctypes.addressof(kernels), *tables, self._norm("embeddings"), ctypes.addressof(layers)
        )

    def _start(self, tensor: str, values: int) -> int:
        """A tensor's offset. Raises: BundleError if the file does not hold so many values of it."""
        start = self._encoder.tensors.get(tensor, -1)
        if not 0 <= start <= len(self._file) - 2 * values:
            raise BundleError(f"{self._file.filename} does not hold {tensor}: bake the model again")
        return start

    def _address(self, tensor: str, values: int) -> int:
        return int(self._file.ctypes.data) + self._start(tensor, values)

    def _floats(self, length: int, tensors: Sequence[str], factor: float = 1.0) -> int:
        """Join float16 tensors of `length` values as float32; the first is multiplied by `factor`.

        Returns: their address.
        """
        starts = [self._start(name, length) for name in tensors]
        halves = [self._file[start : start + 2 * length].tobytes() for start in starts]
        joined = np.frombuffer(b"".join(halves), np.float16).astype(np.float32)
        joined[:length] *= np.float32(factor)
        return self._keep(joined)

    def _keep(self, array: npt.NDArray[np.float32]) -> int:
        self._kept.append(array)
        return int(array.ctypes.data)

    def _linear(self, rows: int, columns: int, names: Sequence[str], factor: float = 1.0) -> Linear:
        """Products of one input, computed as one; the first is multiplied by `factor`."""
        biases = self._floats(rows, [f"{name}.bias" for name in names], factor)
        scales = self._keep(np.zeros(rows * len(names), np.float32))
        made = Linear(self._free, biases, scales)
        for number, name in enumerate(names):
            source = Pointer(self._address(f"{name}.weight", rows * columns))
            size = ctypes.c_long(rows), ctypes.c_long(columns)
            by = ctypes.c_float(1 if number else factor)
            to = Pointer(self._free)
            if self._int8:
                scale = Pointer(scales + 4 * rows * number)
                _LAY_OUT_INT8(self._kernels.lay_out_int8)(to, scale, source, *size, by)
            else:
                _LAY_OUT(self._kernels.lay_out)(to, source, *size, by)
            self._free += rows * columns * self._size
        return made

    def _norm(self, name: str) -> int:
        names = f"{name}.LayerNorm.weight", f"{name}.LayerNorm.bias"
        return self._floats(self._encoder.hidden, names)
