"""A bake from the first stage to the last."""

import datetime
import importlib.metadata
import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from bake import BakeError, Options, encoder, pictures, source, stage
from bake.export import export, trace_pictures, trace_texts
from bake.parity import certify, reference
from bake.samples import PROBE_TEXT, Sample, beginning, sample_pictures, sample_texts
from engine import bundle as bundles
from engine.bundle import Bundle, Manifest, Probe, graph_file
from image_embeddings import probe_picture

TEXTS = 120  # in the sample
PACKAGES = ("sentence-transformers", "transformers", "torch", "openvino", "tokenizers", "nncf")


def bake(options: Options) -> Bundle:
    """Make one bundle.

    Returns: the bundle, in its place.
    Raises: BakeError, EmbedderError; nothing is left behind.
    """
    with stage(f"loading {options.model}"):
        model = source.load(options)
        tokenizer = source.tokenizer(model, options.tokenizer)
        prompt, window = model.prompts.get(model.default_prompt_name) or "", model.max_seq_length
        texts = [beginning(PROBE_TEXT, tokenizer, prompt, window)]
        texts += sample_texts(tokenizer, prompt, window, TEXTS - 1)
        source.check_tokenizer(model, tokenizer, texts)
    with stage("embedding the sample with sentence-transformers"):
        samples = [Sample("text", texts, reference(model, texts))]
    preprocessing = None
    if "image" in model.modalities:
        with stage("embedding pictures with sentence-transformers"):
            preprocessing = pictures.read_processor(model)
            files = [probe_picture(), *sample_pictures()]
            pictures.check_processor(model, preprocessing, files)
            expected = reference(model, pictures.opened(model, files), "pictures ")
            samples.append(Sample("image", files, expected))
            if expected.shape[1] != samples[0].expected.shape[1]:
                raise BakeError("its texts and its pictures have vectors of different lengths")

    def fill(folder: pathlib.Path) -> Manifest:
        tokenizer.save(str(folder / bundles.TOKENIZER))
        files = [bundles.TOKENIZER]
        trace = partial(trace_texts, model, tokenizer, texts)
        files += export("text", trace, folder, options.precisions)
        if preprocessing:
            trace = partial(trace_pictures, model, preprocessing)
            files += export("image", trace, folder, options.precisions)
            steps = msgspec.json.format(msgspec.json.encode(preprocessing), indent=1)
            (folder / bundles.PREPROCESSING).write_bytes(steps)
            files.append(bundles.PREPROCESSING)
        manifest = _manifest(options, model, samples)
        manifest.files = {name: bundles.fingerprint(folder / name) for name in files}
        manifest.encoder = encoder.describe(model, tokenizer, folder / graph_file("text", "fp32"))
        certify(Bundle(folder, manifest), samples)
        return manifest

    return bundles.write(options.output, options.name, fill)


def _manifest(options: Options, model: Any, samples: Sequence[Sample]) -> Manifest:
    """All that is known before the bundle's files are."""
    probes = {sample.modality: sample.expected[0].tolist() for sample in samples}
    return Manifest(
        name=options.name,
        source=options.source or source.origin(options.model),
        revision=getattr(model[0].config, "_commit_hash", None),  # None for a folder
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        modalities=list(probes),
        dimensions=len(probes["text"]),
        max_tokens=model.max_seq_length,
        normalized=source.modules(model)[1],
        layer_norm=options.layer_norm,
        similarity=model.similarity_fn_name,
        prompts={key: prompt for key, prompt in model.prompts.items() if prompt is not None},
        default_prompt=model.default_prompt_name,
        files={},
        versions={package: importlib.metadata.version(package) for package in PACKAGES},
        probe=Probe(samples[0].inputs[0], probes["text"]),
        precisions=options.precisions,
        parity={},
        image_probe=probes.get("image"),
    )
