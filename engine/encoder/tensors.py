"""Reads a bundle's named tensors, which are in the safetensors format
(https://github.com/huggingface/safetensors#format): the header's length in 8 bytes, the header in
JSON, the values.
"""

import pathlib
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from engine.errors import BundleError

_TYPES = {"F16": np.float16, "F32": np.float32, "I8": np.int8}


class _Place(msgspec.Struct):
    """What the header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]  # from the end of the header on


class Tensors:
    """A file of named tensors. It is mapped, not read: what is never used takes no memory, and
    processes share what is.
    """

    def __init__(self, path: pathlib.Path) -> None:
        """Raises: BundleError when it is no such file."""
        self._path = path
        try:
            self._file = np.memmap(path, np.uint8, "r")
            self._start = 8 + int.from_bytes(self._file[:8].tobytes(), "little")
            header = self._file[8 : self._start].tobytes()
            self._places = msgspec.json.decode(header, type=dict[str, _Place])
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} holds no tensors ({error}): bake the model again") from None

    def get(self, name: str, dtype: type[np.generic], *shape: int) -> npt.NDArray[Any]:
        """A tensor, in the mapped file.

        Raises: BundleError unless the file holds it with this type and shape.
        """
        place = self._places.get(name)
        if place and _TYPES.get(place.dtype) is dtype and place.shape == shape:
            first, end = place.data_offsets
            values = self._file[self._start + first : self._start + end].view(dtype)
            if values.size == np.prod(shape):
                return values.reshape(shape)
        wanted = " x ".join(map(str, shape))
        raise BundleError(
            f"{self._path} does not hold {name} as {wanted} {dtype.__name__}: bake the model again"
        )
