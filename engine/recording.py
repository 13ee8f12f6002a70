"""Recorded calls of a transformer on a GPU (CUDA graphs).

To start a transformer's 100 to 600 operations on a GPU takes Python 3 to 40 ms, whatever their
size; the work for a short text takes 0.2 to 4 ms. A recording starts them all at once. It has a
fixed size, so there are several, and texts are filled up with padding to the next. For large
batches the GPU's work takes longer than their start, but the start keeps Python's threads from
reading and answering requests: a recording serves those that nearly fill it.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from engine.packing import Packer, Row, Texts, features, to_device
from engine.protocol import Array, Float32

log = logging.getLogger(__name__)

# In tokens. Texts are filled up by half at most, from 2048 tokens on by a third.
SIZES = tuple(32 << power for power in range(6))
SIZES += tuple(size << power for power in range(6) for size in (2048, 3072)) + (131_072,)
# A recording that is at least GAIN times as fast as the call itself is for every batch that it has
# room for; another only for batches of at least the share FILLED of its size. One that is less than
# SLOWER times as fast is not kept.
GAIN, FILLED, SLOWER = 1.25, 0.9, 0.95
# Attention takes time for each text that a recording has room for, be it there or not.
SMALL, TOKENS_OF_A_TEXT = 16384, 64
TIMED = 5  # calls, of which the fastest counts


@dataclass
class Room:
    """What a recording is for."""

    size: int  # most tokens
    texts: int  # most texts
    least: int = 0  # tokens


def full(size: int, window: int, token: int) -> list[Array]:
    """Texts of up to `window` tokens, and nearly equal lengths, that have `size` together."""
    return np.array_split(np.full(size, token), -(-size // window))


R = TypeVar("R", bound=Room)


def fitting(made: Sequence[R], tokens: int, texts: int) -> R | None:
    """The first of the recordings, in order of size, with room for so many tokens and texts; None
    if there is none, or it is for more tokens.
    """
    for each in made:
        if each.size >= tokens and each.texts >= texts:
            return each if each.least <= tokens else None
    return None


class _Recording(Room):
    """The transformer's call for a row of `size` tokens and up to `texts` texts."""

    def __init__(self, packer: Packer, size: int, device: torch.device, pool: Any) -> None:
        texts = size // (16 if size <= SMALL else TOKENS_OF_A_TEXT)
        super().__init__(size, max(texts, -(-size // packer.window)) + 8)
        tokens, ends = packer.arrays([np.array([packer.pad_id])], size, self.texts + 1)
        longest = min(size, packer.window)
        self.row = Row(to_device(tokens, device), Texts(to_device(ends, device), longest, []))
        for _ in range(2):  # libraries prepare themselves in the first calls
            packer.run(self.row)
        stream = torch.cuda.current_stream(device)
        stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        # Other models may compute meanwhile, in other threads.
        with torch.cuda.graph(self.graph, pool, stream, capture_error_mode="thread_local"):
            self.embeddings = packer.run(self.row)


class Recordings:
    """The recorded calls of one model on one device. Safe to call from any thread."""

    def __init__(
        self,
        packer: Packer,
        finish: Callable[[dict[str, Any]], torch.Tensor],
        device: torch.device,
        call: Callable[[Sequence[Array]], Float32],
        most: int,
    ) -> None:
        """Args:
        finish: makes vectors of the features that the transformer gave.
        call: computes texts without recordings.
        most: tokens of a recording.
        """
        self._packer, self._finish, self._device = packer, finish, device
        self._lock = threading.Lock()
        # One stream for all keeps their calls in order: they share memory.
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._made: list[_Recording] = []
        pool = torch.cuda.graph_pool_handle()
        for size in SIZES:
            if size > most:
                break
            texts = full(size, packer.window, packer.pad_id)
            try:
                with torch.inference_mode(), torch.cuda.stream(self._stream):
                    self._made.append(_Recording(packer, size, device, pool))
                faster = _seconds(call, texts) / _seconds(self.texts, texts)
            except RuntimeError as error:  # such as an operation that cannot be recorded
                self._made = [made for made in self._made if made.size < size]
                log.info("calls of %d tokens cannot be recorded: %s", size, error)
                break
            if faster < GAIN:
                self._made[-1].least = int(FILLED * size)
            if faster < SLOWER:
                del self._made[-1]

    @property
    def sizes(self) -> list[int]:
        """In tokens."""
        return [made.size for made in self._made]

    def texts(self, inputs: Sequence[Array]) -> Float32 | None:
        """The vectors of token ids, each int64 of shape (length,); None for texts that no recording
        has room for.
        """
        tokens = sum(len(ids) for ids in inputs)
        recording = fitting(self._made, tokens, len(inputs))
        if recording is None:
            return None
        row, count = recording.row, len(inputs)
        arrays = self._packer.arrays(inputs, recording.size, recording.texts + 1)
        pinned = [torch.from_numpy(array).pin_memory() for array in arrays]
        with torch.inference_mode(), torch.cuda.stream(self._stream), self._lock:
            row.tokens.copy_(pinned[0], non_blocking=True)
            row.texts.ends.copy_(pinned[1], non_blocking=True)
            recording.graph.replay()
            vectors = self._finish(features(recording.embeddings, row, count, tokens))
            result = torch.empty(vectors.shape, dtype=torch.float32, pin_memory=True)
            result.copy_(vectors, non_blocking=True)
            done = self._stream.record_event()
        done.synchronize()
        return np.array(result.numpy(), np.float32)


def _seconds(call: Callable[[Sequence[Array]], object], texts: Sequence[Array]) -> float:
    times = []
    for _ in range(TIMED):
        started = time.perf_counter()
        call(texts)
        times.append(time.perf_counter() - started)
    return min(times)
