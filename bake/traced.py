"""Make a bundle for OpenVINO, and for our own engine where it can: graphs and their certificate."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from bake import BakeError, encoder, stage
from bake.export import export, running, trace_pictures, trace_texts
from bake.parity import BelowFloor, measure, without
from bake.samples import Sample
from engine.bundle import Bundle, Manifest, Modality, Parity, Precision, Preprocessing, graph_file
from engine.encoder import encoder_engine
from engine.openvino_backend import OpenVINOImageEngine, OpenVINOTextEngine, available_precisions
from tokens import load_tokenizer


def complete(
    bundle: Bundle,
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    preprocessing: Preprocessing | None,
) -> Manifest:
    """Trace, save and certify.

    Args:
        bundle: with its tokenizer, and PREPROCESSING where the model takes pictures.

    Returns: the manifest, complete.
    Raises: CannotTrace; BakeError below a precision's floor.
    """
    manifest = bundle.manifest
    trace = partial(trace_texts, model, tokenizer, samples[0].inputs)
    files = export("text", trace, bundle.path, manifest.precisions)
    if preprocessing:
        trace = partial(trace_pictures, model, preprocessing)
        files += export("image", trace, bundle.path, manifest.precisions)
    bundle.record(files)
    graph = bundle.file(graph_file("text", "fp32"))
    manifest.encoder = encoder.describe(model, tokenizer, graph)
    certify(bundle, samples)
    return manifest


def certify(bundle: Bundle, samples: Sequence[Sample]) -> None:
    """Fill the manifest's parities: every precision that was asked for and that this CPU runs.

    Raises: CannotTrace when OpenVINO fails on the graphs; BakeError below a precision's floor.
    """
    manifest = bundle.manifest
    parities = {"text": manifest.parity, "image": manifest.image_parity}
    for precision in available_precisions():
        if precision in manifest.precisions:
            with stage(f"checking vectors at {precision}"):
                for sample in samples:
                    parities[sample.modality][precision] = _measure(bundle, precision, sample)
    _certify_encoder(bundle, samples[0])


def _measure(bundle: Bundle, precision: Precision, sample: Sample) -> Parity:
    try:
        with running():
            return measure(bundle, _openvino(bundle, precision, sample.modality), sample)
    except BelowFloor as error:
        untraced = (
            "; its code may branch where a trace cannot follow: --engine torch runs it untraced"
            if precision == "fp32"
            else without(bundle, precision)
        )
        raise BakeError(f"{error}{untraced}") from None


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
    except BelowFloor as error:
        print(f"{error}: left to OpenVINO", file=sys.stderr)
        manifest.encoder = None
    else:
        manifest.parity = parities
