"""What a long window costs a bake: attention without a matrix of window x window, memory that is
checked before it is taken, and how much time is left.
"""

import contextlib
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel

from bake import BakeError

Float32 = npt.NDArray[np.float32]

TOLD_EVERY = 20.0  # seconds
BATCH_CHARACTERS = 8192  # of several texts, as if all were as long as the longest
FLOAT = 4  # bytes
# Copies of the weights beside the loaded model, as float32: an engine's, or nncf's (which took 2.4
# GB for XLM-R of 4 layers of 1024, with 1.26 GB of weights).
COPIES = 2
# Tensors of the width of a token that are held at once, of hidden and of inner size.
HIDDEN, INNER = 12, 3
# Matrices of float32 of length x length: of each head where attention is not computed in blocks,
# and masks of all heads.
SCORES, MASKS = 3, 4
SMALLEST_WINDOW = 128  # that is offered


def embed(model: Any, inputs: Sequence[Any], size: int) -> Float32:
    """sentence-transformers' own vectors, shape (len(inputs), dimensions).

    Args:
        inputs: texts, which get the default prompt, or PIL images.
        size: most inputs of a batch.

    Raises: BakeError when a text of the whole window needs more memory than is free; what the
        model's code raises.
    """
    costs = [len(each) if isinstance(each, str) else 1 for each in inputs]
    left = sorted(range(len(inputs)), key=lambda number: -costs[number])
    progress = Progress(sum(costs))
    vectors: dict[int, Float32] = {}
    with blockwise_attention(model) as blockwise:
        check_memory(model, blockwise)
        while left:
            count = min(size, max(1, BATCH_CHARACTERS // max(1, costs[left[0]])))
            batch, left = left[:count], left[count:]
            found = model.encode([inputs[number] for number in batch], show_progress_bar=False)
            vectors |= dict(zip(batch, found))
            progress.add(sum(costs[number] for number in batch))
    return np.stack([vectors[number] for number in range(len(inputs))]).astype(np.float32)


@contextlib.contextmanager
def blockwise_attention(model: Any) -> Iterator[bool]:
    """Within it, the model computes attention in blocks (SDPA, as sentence-transformers does by
    default), if it can. It was loaded with eager attention, which can be traced. Yields: whether it
    can.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    try:
        for part in parts:
            part.set_attn_implementation("sdpa")
        model.encode("a", show_progress_bar=False)  # some refuse only then (Gemma2: softcap)
        able = all(part.config._attn_implementation == "sdpa" for part in parts)
    except Exception:
        able = False
    try:
        if not able:
            _eager(parts)
        yield able
    finally:
        _eager(parts)


def _eager(parts: Sequence[PreTrainedModel]) -> None:
    for part in parts:
        part.set_attn_implementation("eager")


def check_memory(model: Any, blockwise: bool) -> None:
    """Raises: BakeError when a text of the whole window needs more memory than is free."""
    window, free = int(model.max_seq_length), free_memory()
    if needed_memory(model, window, blockwise) <= free:
        return
    smaller = window
    while smaller > SMALLEST_WINDOW and needed_memory(model, smaller, blockwise) > free:
        smaller //= 2
    line = (
        f"to bake it with a window of {window} tokens takes about "
        f"{needed_memory(model, window, blockwise) / 1e9:.1f} GB of memory beside the model, and "
        f"{free / 1e9:.1f} GB are free; "
    )
    if needed_memory(model, smaller, blockwise) > free:
        raise BakeError(
            f"{line}a smaller window is not enough (--max-tokens): use a larger machine"
        )
    raise BakeError(f"{line}--max-tokens {smaller} would fit")


def needed_memory(model: Any, window: int, blockwise: bool) -> float:
    """Bytes that the rest of a bake takes at most, about."""
    weights = COPIES * FLOAT * float(sum(each.numel() for each in model.parameters()))
    if model.config is None:
        return weights
    config = model.config.get_text_config()
    hidden = getattr(config, "hidden_size", 0)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    # T5 and MPNet have a matrix of position biases for each head.
    biased = any(name.endswith("relative_attention_bias") for name, _ in model.named_modules())
    scores = 0 if blockwise and not biased else SCORES * getattr(config, "num_attention_heads", 1)
    return weights + float(
        FLOAT * window * (HIDDEN * hidden + INNER * inner + (MASKS + scores) * window)
    )


def free_memory() -> float:
    """Bytes that this process may still take: of the machine, or of its control group."""
    fields = dict(
        line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines()
    )
    free = int(fields["MemAvailable"].split()[0]) * 1024.0
    with contextlib.suppress(OSError, ValueError):
        group = pathlib.Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(cached["inactive_file"]))
    return free


class Progress:
    """Says on stderr how much of a stage is done, and how long the rest will take."""

    def __init__(self, total: float) -> None:
        self._total, self._done = total, 0.0
        self._started = self._said = time.perf_counter()

    def add(self, done: float) -> None:
        """`done` more of the total is done."""
        self._done += done
        now = time.perf_counter()
        left = (now - self._started) * (self._total / self._done - 1)
        if now - self._said >= TOLD_EVERY and left >= 1:
            self._said = now
            said = f" {self._done / self._total:.0%}, {left:.0f} s left …"
            print(said, end="", file=sys.stderr, flush=True)
