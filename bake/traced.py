"""Make a bundle for OpenVINO, and for our own engine where it can: graphs and their certificate."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from safetensors.numpy import save_file

from bake import CannotTrace, Options, encoder, rounding, stage
from bake.export import compress, export, running, save, trace_pictures, trace_scores, trace_texts
from bake.parity import enter, leave_out, measure, save_sample, write_sample
from bake.samples import Sample
from engine.bundle import (
    SAMPLE,
    Backend,
    Bundle,
    Manifest,
    Precision,
    Preprocessing,
    graph_file,
    weights_file,
)
from engine.certificate import BelowFloor
from engine.choice import runs
from engine.encoder.encoder_engine import EncoderEngine, EncoderImageEngine
from engine.openvino_backend import OpenVINOImageEngine, OpenVINOTextEngine
from engine.protocol import Array, Engine
from tokens import load_tokenizer


def complete(
    bundle: Bundle,
    options: Options,
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    preprocessing: Preprocessing | None,
    note: Callable[[str], None],
) -> Manifest:
    """Trace, save and certify.

    Args:
        bundle: with its tokenizer, and PREPROCESSING where the model takes pictures.
        model: loses its weights.
        note: told what the user should know.

    Returns: the manifest, complete.
    Raises: as `certify`.
    """
    manifest = bundle.manifest
    trace = partial(trace_texts, model, tokenizer, samples[0].inputs)
    files = export("text", trace, bundle.path)
    if preprocessing:
        files += export("image", partial(trace_pictures, model, preprocessing), bundle.path)
    files += _describe(bundle, model, tokenizer, preprocessing)
    model.to("meta")  # give its memory back: what follows needs as much
    if "int8" in manifest.precisions:
        for modality in manifest.modalities:
            files += compress(modality, bundle.path)
    write_sample(bundle, samples)
    bundle.record([*files, SAMPLE])
    certify(bundle, options, samples, note)
    return manifest


def _describe(
    bundle: Bundle, model: Any, tokenizer: Any, preprocessing: Preprocessing | None
) -> list[str]:
    """Give our own engine a model that it can run. Returns: the names of the files."""
    shape = preprocessing.shape if preprocessing else (0, 0)
    towers = encoder.describe(model, tokenizer, shape)
    if found := towers.get("text"):
        bundle.manifest.encoder = found.encoder
    if found := towers.get("image"):
        bundle.manifest.image_encoder = found.encoder
    for modality, tower in towers.items():
        if "int8" in bundle.manifest.precisions:
            with stage(f"rounding weights of {modality}s to int8"):
                rounding.add_codes(model, tokenizer, modality, tower.weights, tower.inputs)
        save_file(tower.weights, bundle.file(weights_file(modality)))
    return list(map(weights_file, towers))


def complete_scorer(
    bundle: Bundle,
    options: Options,
    model: Any,
    tokenizer: Any,
    sample: Sample,
    ids: Sequence[Array],
    note: Callable[[str], None],
) -> Manifest:
    """As `complete`, of a CrossEncoder. Its weights are kept in float32 where fp16 changes its
    scores by too much.

    Args:
        ids: the sample's inputs, as engines take them.
    """
    scorer = bundle.manifest.scorer
    assert scorer
    with stage("tracing to OpenVINO"):
        graph = trace_scores(model, tokenizer, sample.inputs, scorer.types)
    save_sample(bundle, ids, [sample])
    for half in (True, False):
        files = save(graph, bundle.file(graph_file("text", "fp32")), half=half)
        if "int8" in bundle.manifest.precisions:
            files += compress("text", bundle.path)
        bundle.record([*files, SAMPLE])
        try:
            certify(bundle, options, [sample], note)
            break
        except BelowFloor as error:
            if not half:
                raise
            note(f"{error}; so its weights are kept in float32, in twice the space")
    return bundle.manifest


def certify(
    bundle: Bundle, options: Options, samples: Sequence[Sample], note: Callable[[str], None]
) -> None:
    """Fill the manifest's parities: each engine at every precision that was asked for and that this
    CPU runs. What is below its floor, or fails, is left out.

    Raises: CannotTrace when OpenVINO fails on the graphs at fp32; BelowFloor when its vectors are
        wrong there, which means the trace is; BakeError where a precision that was asked for by
        name is left out.
    """
    manifest = bundle.manifest
    for precision in list(manifest.precisions):
        for backend in bundle.backends(precision):
            if not runs(backend, precision):
                continue
            try:
                guard = running() if backend == "OpenVINO" else contextlib.nullcontext()
                what = "scores" if manifest.scorer else "vectors"
                with stage(f"checking {what} at {precision}{_OWN.get(backend, '')}"), guard:
                    parities = measure(bundle, makers(bundle, backend, precision), samples)
            except (BelowFloor, CannotTrace) as error:
                if backend == "OpenVINO" and precision == "fp32":
                    raise
                leave_out(bundle, backend, precision, error, options, note)
            else:
                enter(bundle, backend, precision, parities)
    manifest.precisions = [each for each in manifest.precisions if bundle.offers(each)]
    if "int8" in manifest.left_out.get("OpenVINO", {}):
        for modality in manifest.modalities:
            graph = bundle.file(graph_file(modality, "int8"))
            for path in (graph, graph.with_suffix(".bin")):
                path.unlink()
                del manifest.files[path.name]


_OWN: dict[Backend, str] = {"own engine": ", of our own engine"}


def makers(bundle: Bundle, backend: Backend, precision: Precision) -> list[Callable[[int], Engine]]:
    """What makes the engines of texts and of pictures, for a number of threads."""

    def text(threads: int) -> Engine:
        if backend == "own engine":
            return EncoderEngine(bundle, precision, streams=threads)
        _, pad_id, pad_left = load_tokenizer(bundle)
        pad: Any = {"pad_id": pad_id, "pad_left": pad_left}
        return OpenVINOTextEngine(bundle, precision, **pad, streams=threads)

    def image(threads: int) -> Engine:
        if backend == "own engine":
            return EncoderImageEngine(bundle, precision, streams=threads)
        return OpenVINOImageEngine(bundle, precision, streams=threads)

    return [image if each == "image" else text for each in bundle.manifest.modalities]
