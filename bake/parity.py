"""The certificate: a bundle's vectors compared with sentence-transformers' own."""

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bake import BakeError, refusing, windows
from bake.samples import Sample
from embeddings import TextEmbedder
from engine.bundle import PARITY_FLOOR, Bundle, Parity, Precision
from engine.queue import Queue
from engine.torch_engine import pools_at_the_end
from image_embeddings import ImageEmbedder
from limits import ImageLimits, TextLimits
from tokens import load_tokenizer

Float32 = npt.NDArray[np.float32]

BATCH, BATCH_TOKENS = 8, 2048
A_DAY = 24 * 3600.0  # seconds


class BelowFloor(BakeError):
    """An engine's vectors are not the model's own."""


def reference(model: Any, inputs: Sequence[Any], what: str = "") -> Float32:
    """sentence-transformers' own vectors of texts, with the default prompt, or of PIL images.

    Raises: BakeError when the model's code fails, naming `what` it cannot embed, and when there is
        not enough memory.
    """
    size = 1 if pools_at_the_end(model) else BATCH
    with refusing(f"sentence-transformers cannot embed {what}with it"):
        return windows.embed(model, inputs, size)


def measure(
    bundle: Bundle, engine: Any, sample: Sample, requests: Sequence[Sequence[int]] | None = None
) -> Parity:
    """Compare an engine's vectors of the sample with the expected ones.

    Args:
        requests: the inputs of each request, by their numbers in the sample; None: one of them all.

    Raises: BelowFloor for the engine's precision, also when the vectors' lengths differ by more
        than they can at that floor.
    """
    requests = requests or [range(len(sample.inputs))]
    actual = _embed(bundle, engine, sample, requests)
    expected = sample.expected[[number for request in requests for number in request]]
    floor = PARITY_FLOOR[engine.precision]
    what = "vectors" if sample.modality == "text" else "pictures' vectors"
    wrong = f"at {engine.precision} its {what} are not the model's own"
    lengths = np.linalg.norm(actual, axis=1), np.linalg.norm(expected, axis=1)
    cosines = (actual * expected).sum(axis=1) / np.maximum(lengths[0] * lengths[1], 1e-30)
    smallest = float(cosines.min())
    if not smallest >= floor:
        raise BelowFloor(f"{wrong}: smallest cosine {smallest:.5f}, at least {floor} needed")
    # Unit vectors at cosine c are sqrt(2 - 2c) apart. Lengths matter to models that do not
    # normalise: their similarity is the dot product.
    apart = float(np.abs(lengths[0] / lengths[1] - 1).max())
    if not apart <= math.sqrt(2 - 2 * floor):
        raise BelowFloor(f"{wrong}: their lengths are off by up to {apart:.2%}")
    return Parity(smallest, float(cosines.mean()), len(sample.inputs))


def without(bundle: Bundle, precision: Precision) -> str:
    """The way out of a BelowFloor, for the end of its line; none from fp32."""
    rest = ",".join(other for other in bundle.manifest.precisions if other != precision)
    return "" if precision == "fp32" else f" (--precisions {rest} bakes it without)"


def _embed(
    bundle: Bundle, engine: Any, sample: Sample, requests: Sequence[Sequence[int]]
) -> Float32:
    """Embed the sample as serving does, in batches of mixed lengths."""
    queue = Queue(
        max_batch_size=BATCH, max_batch_tokens=BATCH_TOKENS, max_queue_tokens=1 << 40, threads=1
    )
    embedder: TextEmbedder | ImageEmbedder
    if sample.modality == "text":
        tokenizer, _, _ = load_tokenizer(bundle)
        embedder = TextEmbedder(bundle, tokenizer, engine, queue, TextLimits())
    else:
        embedder = ImageEmbedder(bundle, engine.preprocessing, engine, queue, ImageLimits())
    queue.start()
    try:
        return np.stack(
            [
                result.vector
                for request in requests
                for result in embedder.embed(
                    [sample.inputs[number] for number in request],
                    deadline=time.monotonic() + A_DAY,
                )
            ]
        )
    finally:
        queue.close()
