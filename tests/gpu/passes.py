"""Forward passes in this process, in a loop: what a service can reach at most."""

import gc
import itertools
import os
import pathlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from engine import bundle as bundles
from engine.torch_engine import TorchTextEngine, open_model

Row = dict[str, Any]
# Gives the tokenizer and so many texts of the same number of tokens.
Source = Callable[[int], tuple[Tokenizer, list[str]]]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ON_CPU = 4096  # tokens in a batch
FORWARD = tuple(8192 << power for power in range(4))  # tokens in a batch


def engine(
    path: pathlib.Path, device: str, precision: str, source: Source, seconds: float
) -> list[Row]:
    """The engine's own calls, one and two at a time, with token ids that are ready."""
    gc.collect()
    threads = os.cpu_count() or 1
    model = open_model(bundles.read(path), device=device, precision=precision, threads=threads)
    run, best = TorchTextEngine(model).run, model.max_batch_tokens or ON_CPU
    length = len(_ids(source(1))[0])
    ids = _ids(source(max(64, 4 * best // length)))
    rows = []
    for factor, calls in itertools.product((0.5, 1, 2), (1, 2)):
        size = max(1, int(best * factor) // length)
        parts = itertools.cycle([ids[at : at + size] for at in range(0, len(ids), size)])
        rate = _rate(lambda: len(run(next(parts))), seconds, calls)
        rows.append(_row("engine", model.precision, size, calls, rate))
    return rows


def plain(
    folder: pathlib.Path,
    device: str,
    precision: str,
    window: int,
    source: Source,
    sizes: Sequence[int],
    seconds: float,
) -> list[Row]:
    """sentence-transformers: only its forward pass, over full batches that are on the device and
    whose vectors stay there; and `encode` from texts, with batches of `sizes` texts.
    """
    gc.collect()
    model = SentenceTransformer(
        str(folder),
        device=device,
        local_files_only=True,
        model_kwargs={"dtype": DTYPES[precision]},
    )
    model.max_seq_length = window
    length = len(_ids(source(1))[0])
    rows = []
    for tokens in FORWARD if device != "cpu" else [ON_CPU]:
        size = max(1, tokens // length)
        batch = torch.tensor(np.array(_ids(source(size)))).to(device)
        mask = torch.ones_like(batch)

        def forward() -> int:
            with torch.inference_mode():
                model.forward({"input_ids": batch, "attention_mask": mask})
            return size

        rows.append(_row("forward", precision, size, 1, _rate(forward, seconds, 1)))
    for size in sizes:
        _, texts = source(4 * size)

        def encode() -> int:
            return len(model.encode(texts, batch_size=size, show_progress_bar=False))

        rows.append(_row("encode", precision, size, 1, _rate(encode, seconds, 1)))
    return rows


def _row(how: str, precision: str, batch: int, calls: int, rate: float) -> Row:
    return {"how": how, "precision": precision, "batch": batch, "calls": calls, "texts/s": rate}


def _ids(found: tuple[Tokenizer, list[str]]) -> list[Any]:
    tokenizer, texts = found
    return [np.array(each.ids, np.int64) for each in tokenizer.encode_batch(texts)]


def _rate(call: Callable[[], int], seconds: float, calls: int) -> float:
    """What calls return, summed up, by the second, with so many calls at a time. The device is
    waited for at the end, and every tenth of `seconds` so that it is never far behind.
    """
    for _ in range(3):
        call()
    _finish()
    done, started = [0] * calls, time.perf_counter()

    def repeat(at: int) -> None:
        waited = started
        while (now := time.perf_counter()) < started + seconds:
            done[at] += call()
            if now > waited + seconds / 10:
                _finish()
                waited = now

    threads = [threading.Thread(target=repeat, args=(at,)) for at in range(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _finish()
    return sum(done) / (time.perf_counter() - started)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
