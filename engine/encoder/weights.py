"""Reads a bundle's weights and lays them out for the C code."""

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.bundle import Bundle, Encoder, Modality, Preprocessing, weights_file
from engine.encoder.library import Kernels, Layer, Linear, Pointer, Weights, aligned
from engine.encoder.tensors import Tensors

_LAY_OUT = ctypes.CFUNCTYPE(None, Pointer, Pointer, ctypes.c_long, ctypes.c_long)
_STEP = 64  # a patch's values are padded to a multiple of it


class LaidOut:
    """The weights of a tower. `weights` is valid as long as this object lives.

    What is multiplied is copied, in the order in which it is read; C reads the rest in the file.
    """

    def __init__(
        self, bundle: Bundle, modality: Modality, encoder: Encoder, kernels: Kernels, *, int8: bool
    ) -> None:
        """Raises: BundleError when the bundle does not hold them."""
        self._kernels, self._int8, self._encoder = kernels, int8, encoder
        self._tensors = Tensors(bundle.file(weights_file(modality)))
        self._kept: list[object] = []  # C holds pointers to these
        self.distances = 0  # values of a head in the C code
        self.preprocessing = bundle.preprocessing() if encoder.patch else None
        self.patch_values = -(-3 * encoder.patch**2 // _STEP) * _STEP
        width, window = encoder.hidden, bundle.manifest.max_tokens
        positions = encoder.first_position + window
        made = Weights(ctypes.addressof(kernels), layers=self._layers(window))
        if encoder.norm_embeddings:
            made.norm = self._floats("norm", 2 * width)
        if encoder.norm_before:
            made.last = self._floats("last", 2 * width)
        if encoder.distances:
            made.distances = self._distances(2 * window - 1)
        if encoder.outputs:
            made.head = self._float_linear("head", encoder.outputs, width)
        if self.preprocessing:
            positions = patches(encoder, self.preprocessing) + 1
            made.patches = self._float_linear("patches", width, self.patch_values)
            made.pixels = self._pixels(self.preprocessing)
        else:
            words = self._tensors.get("words", np.float16, encoder.vocabulary, width)
            made.words = _address(words)
        if encoder.positions:
            made.positions = _address(self._tensors.get("positions", np.float16, positions, width))
        self.weights = made

    def _layers(self, window: int) -> int:
        encoder = self._encoder
        width, inner, heads = encoder.hidden, encoder.inner, encoder.heads * encoder.head
        linears = (
            ("qkv", heads + 2 * encoder.key_heads * encoder.head, width),
            ("out", width, heads),
            ("up", inner * (2 if encoder.gated else 1), width),
            ("down", width, inner),
        )
        size = 1 if self._int8 else self._kernels.activation_size  # of a value, in bytes
        # One array for all panels: numpy asks for huge pages, where the system has them.
        values = sum(rows * columns for _, rows, columns in linears)
        panels = aligned(encoder.layers * values * size)
        layers = (Layer * encoder.layers)()
        self._kept += [panels, layers]
        free = _address(panels)
        for number, layer in enumerate(layers):
            own = f"layers.{number}"
            for name, rows, columns in linears:
                setattr(layer, name, self._linear(f"{own}.{name}", rows, columns, free, self._int8))
                free += rows * columns * size
            if number or encoder.norm_first:
                layer.norm1 = self._floats(f"{own}.norm1", 2 * width)
            layer.norm2 = self._floats(f"{own}.norm2", 2 * width)
            if encoder.angles:
                name = f"angles.{encoder.angles[number]}"
                layer.angles = _address(self._tensors.get(name, np.float32, window, encoder.head))
            if encoder.norm_heads:
                layer.gains = self._floats(f"{own}.norm_heads", 2 * encoder.head)
            sight = encoder.sights[number]
            layer.behind = window if sight.behind is None else sight.behind
            layer.ahead = window if sight.ahead is None else sight.ahead
        return ctypes.addressof(layers)

    def _floats(self, name: str, length: int) -> int:
        """The address of a tensor of float32 values."""
        return _address(self._tensors.get(name, np.float32, length))

    def _keep(self, array: npt.NDArray[np.float32]) -> int:
        self._kept.append(array)
        return _address(array)

    def _linear(self, name: str, rows: int, columns: int, at: int, int8: bool) -> Linear:
        """Lay out a linear layer at an address: it makes `rows` values of `columns`."""
        get, scales = self._tensors.get, np.zeros(0, np.float32)
        bias = get(f"{name}.bias", np.float32, rows)
        if int8:
            weight = get(f"{name}.codes", np.int8, rows, columns)
            scales = get(f"{name}.scales", np.float32, rows)
        else:
            weight = get(f"{name}.weight", np.float16, rows, columns)
        if self._encoder.gated and name.endswith(".up"):
            weight, bias = self._interleaved(weight), self._interleaved(bias)
            scales = self._interleaved(scales) if int8 else scales
        lay_out = self._kernels.lay_out_int8 if int8 else self._kernels.lay_out
        _LAY_OUT(lay_out)(Pointer(at), Pointer(_address(weight)), rows, columns)
        return Linear(at, self._keep(bias), self._keep(scales))

    def _interleaved(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Rows so that the first half of a panel is of what is activated, the second of what that
        is multiplied with, which come one behind the other.
        """
        half = self._kernels.panel // 2
        pairs = rows.reshape(2, -1, half, *rows.shape[1:]).swapaxes(0, 1)
        return np.ascontiguousarray(pairs.reshape(rows.shape))

    def _float_linear(self, name: str, rows: int, columns: int) -> Linear:
        """The same, in memory of its own, and never in int8."""
        panels = aligned(rows * columns * self._kernels.activation_size)
        self._kept.append(panels)
        return self._linear(name, rows, columns, _address(panels), False)

    def _distances(self, count: int) -> int:
        """What is added for distances, of each head `count`; kernels read a panel behind them."""
        shares = self._tensors.get("distances", np.float32, self._encoder.heads, count)
        padded = np.pad(shares, ((0, 0), (0, self._kernels.panel)))
        self.distances = padded.shape[1]
        return self._keep(padded)

    def _pixels(self, preprocessing: Preprocessing) -> int:
        """Factors of a patch's values, and what is added, which make of pixels what the model's
        processor makes.
        """
        std = np.array(preprocessing.std)
        of_colours = np.stack([preprocessing.scale / std, -np.array(preprocessing.mean) / std])
        values = np.tile(of_colours.astype(np.float32), self._encoder.patch**2)
        return self._keep(np.pad(values, ((0, 0), (0, self.patch_values - values.shape[1]))))


def patches(encoder: Encoder, preprocessing: Preprocessing) -> int:
    """The number of a picture's patches."""
    return preprocessing.shape[0] // encoder.patch * encoder.across


def _address(array: npt.NDArray[np.generic]) -> int:
    return int(array.ctypes.data)
