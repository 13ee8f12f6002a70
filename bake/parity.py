"""The certificate: a bundle's vectors compared with sentence-transformers' own."""

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bake import BakeError, refusing, stage
from bake.samples import Sample
from bake.source import pools_at_the_end
from embeddings import TextEmbedder
from engine.bundle import PARITY_FLOOR, Bundle, Modality, Parity, Precision
from engine.encoder import encoder_engine
from engine.openvino_backend import OpenVINOImageEngine, OpenVINOTextEngine, available_precisions
from engine.queue import Queue
from image_embeddings import ImageEmbedder
from limits import ImageLimits, TextLimits
from tokens import load_tokenizer

Float32 = npt.NDArray[np.float32]

BATCH, BATCH_TOKENS = 8, 2048
A_DAY = 24 * 3600.0  # seconds


def reference(model: Any, inputs: Sequence[Any], what: str = "") -> Float32:
    """sentence-transformers' own vectors of texts, with the default prompt, or of PIL images.

    Raises: BakeError when the model's code fails, naming `what` it cannot embed.
    """
    size = min(BATCH, max(1, BATCH_TOKENS // model.max_seq_length))
    if pools_at_the_end(model):
        size = 1
    with refusing(f"sentence-transformers cannot embed {what}with it"):
        vectors = model.encode(list(inputs), batch_size=size, show_progress_bar=False)
    return np.asarray(vectors, np.float32)


def certify(bundle: Bundle, samples: Sequence[Sample]) -> None:
    """Fill the manifest's parities: every precision that was asked for and that this CPU runs.

    Raises: BakeError as `measure`.
    """
    manifest = bundle.manifest
    parities = {"text": manifest.parity, "image": manifest.image_parity}
    for precision in available_precisions():
        if precision in manifest.precisions:
            with stage(f"checking vectors at {precision}"):
                for sample in samples:
                    engine = _openvino(bundle, precision, sample.modality)
                    parities[sample.modality][precision] = measure(bundle, engine, sample)
    _certify_encoder(bundle, samples[0])


def _openvino(bundle: Bundle, precision: Precision, modality: Modality) -> Any:
    if modality == "image":
        return OpenVINOImageEngine(bundle, precision, streams=1)
    _, pad_id, pad_left = load_tokenizer(bundle)
    return OpenVINOTextEngine(bundle, precision, pad_id=pad_id, pad_left=pad_left, streams=1)


def _certify_encoder(bundle: Bundle, texts: Sample) -> None:
    """Where our own engine serves the bundle, keep the lower parity of the two engines. Where it
    gives other vectors, leave the model to OpenVINO.
    """
    manifest, parities = bundle.manifest, dict(bundle.manifest.parity)
    try:
        for precision, parity in parities.items():
            if encoder_engine.choose(precision, bundle):
                with stage(f"checking vectors at {precision}, of our own engine"):
                    engine = encoder_engine.EncoderEngine(bundle, precision, streams=1)
                    own = measure(bundle, engine, texts)
                parities[precision] = min(own, parity, key=lambda each: each.minimum)
    except BakeError as error:
        print(f"{error}: left to OpenVINO", file=sys.stderr)
        manifest.encoder = None
    else:
        manifest.parity = parities


def measure(bundle: Bundle, engine: Any, sample: Sample) -> Parity:
    """Compare an engine's vectors of the sample with the expected ones.

    Raises: BakeError below the floor of the engine's precision, or when the vectors' lengths differ
        by more than they can at that floor.
    """
    precision, floor = engine.precision, PARITY_FLOOR[engine.precision]
    actual, expected = _embed(bundle, engine, sample), sample.expected
    what = "vectors" if sample.modality == "text" else "pictures' vectors"
    wrong = f"at {precision} its {what} are not the model's own"
    rest = ",".join(other for other in bundle.manifest.precisions if other != precision)
    hint = "" if precision == "fp32" else f" (--precisions {rest} bakes it without)"
    lengths = np.linalg.norm(actual, axis=1), np.linalg.norm(expected, axis=1)
    cosines = (actual * expected).sum(axis=1) / np.maximum(lengths[0] * lengths[1], 1e-30)
    smallest = float(cosines.min())
    if not smallest >= floor:
        raise BakeError(f"{wrong}: smallest cosine {smallest:.5f}, at least {floor} needed{hint}")
    # Unit vectors at cosine c are sqrt(2 - 2c) apart. Lengths matter to models that do not
    # normalise: their similarity is the dot product.
    apart = float(np.abs(lengths[0] / lengths[1] - 1).max())
    if not apart <= math.sqrt(2 - 2 * floor):
        raise BakeError(f"{wrong}: their lengths are off by up to {apart:.2%}{hint}")
    return Parity(smallest, float(cosines.mean()), len(actual))


def _embed(bundle: Bundle, engine: Any, sample: Sample) -> Float32:
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
        embedded = embedder.embed(sample.inputs, deadline=time.monotonic() + A_DAY)
    finally:
        queue.close()
    return np.stack([result.vector for result in embedded])
