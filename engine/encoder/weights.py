"""Reads a bundle's weights and lays them out for the C code."""

import ctypes

import numpy as np
import numpy.typing as npt

from engine.bundle import Bundle, Encoder, weights_file
from engine.encoder.library import Kernels, Layer, Linear, Pointer, Weights, aligned
from engine.encoder.tensors import Tensors

_LAY_OUT = ctypes.CFUNCTYPE(None, Pointer, Pointer, ctypes.c_long, ctypes.c_long)


class LaidOut:
    """The weights of a model. `weights` is valid as long as this object lives.

    What is multiplied is copied, in the order in which it is read; C reads the rest in the file.
    """

    def __init__(self, bundle: Bundle, encoder: Encoder, kernels: Kernels, *, int8: bool) -> None:
        """Raises: BundleError when the bundle does not hold them."""
        self._kernels, self._int8 = kernels, int8
        self._size = 1 if int8 else kernels.activation_size  # of a value, in bytes
        self._tensors = Tensors(bundle.file(weights_file("text")))
        self._kept: list[object] = []  # C holds pointers to these
        width, inner = encoder.hidden, encoder.inner
        values = encoder.layers * (4 * width + 2 * inner) * width
        # One array for all panels: numpy asks for huge pages, where the system has them.
        self._panels = aligned(values * self._size)
        self._free = int(self._panels.ctypes.data)
        layers = (Layer * encoder.layers)()
        self._kept.append(layers)
        for number, layer in enumerate(layers):
            own = f"layers.{number}"
            layer.qkv = self._linear(f"{own}.qkv", 3 * width, width)
            layer.out = self._linear(f"{own}.out", width, width)
            layer.up = self._linear(f"{own}.up", inner, width)
            layer.down = self._linear(f"{own}.down", width, inner)
            layer.norm1 = self._floats(f"{own}.norm1", 2 * width)
            layer.norm2 = self._floats(f"{own}.norm2", 2 * width)
        positions = encoder.first_position + bundle.manifest.max_tokens
        self.distances = 0  # values of a head in the C code
        distances = None
        if encoder.distances:
            # Kernels read a panel behind the last.
            spare = ((0, 0), (0, kernels.panel))
            size = encoder.heads, 2 * bundle.manifest.max_tokens - 1
            padded = np.pad(self._tensors.get("distances", np.float32, *size), spare)
            self._kept.append(padded)
            self.distances, distances = padded.shape[1], _address(padded)
        self.weights = Weights(
            ctypes.addressof(kernels),
            _address(self._tensors.get("words", np.float16, encoder.vocabulary, width)),
            _address(self._tensors.get("positions", np.float16, positions, width)),
            self._floats("norm", 2 * width) if encoder.norm_embeddings else None,
            self._floats("last", 2 * width) if encoder.norm_before else None,
            distances,
            ctypes.addressof(layers),
        )

    def _floats(self, name: str, length: int) -> int:
        """The address of a tensor of float32 values."""
        return _address(self._tensors.get(name, np.float32, length))

    def _linear(self, name: str, rows: int, columns: int) -> Linear:
        """Lay out a linear layer: its product has `rows` values for each of `columns`."""
        bias, scales = self._floats(f"{name}.bias", rows), 0
        if self._int8:
            weight = self._tensors.get(f"{name}.codes", np.int8, rows, columns)
            scales = self._floats(f"{name}.scales", rows)
            lay_out = _LAY_OUT(self._kernels.lay_out_int8)
        else:
            weight = self._tensors.get(f"{name}.weight", np.float16, rows, columns)
            lay_out = _LAY_OUT(self._kernels.lay_out)
        made = Linear(self._free, bias, scales)
        lay_out(Pointer(self._free), Pointer(_address(weight)), rows, columns)
        self._free += rows * columns * self._size
        return made


def _address(array: npt.NDArray[np.generic]) -> int:
    return int(array.ctypes.data)
