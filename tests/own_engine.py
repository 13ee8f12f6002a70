"""Models for our own engine, as a bake writes them but without tracing them to OpenVINO as well,
and their vectors on every CPU family that this machine runs.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import tiny_models as tiny
import torch
import transformers
from safetensors.numpy import save_file
from sentence_transformers import SentenceTransformer

import bake_model
from bake import Options, encoder, pictures, rounding, source
from engine.bundle import PARITY_FLOOR, PREPROCESSING, Bundle, Manifest, Probe, weights_file
from engine.encoder import cpu
from engine.encoder.encoder_engine import EncoderEngine, _Tower

Float32 = npt.NDArray[np.float32]


def sizes(tokenizer: Any, positions: int, heads: int = 2, **options: Any) -> dict[str, Any]:
    """Heads of 32, and the smallest that it takes; weights that make attention sharp."""
    wide = {"hidden_size": 64, "num_attention_heads": heads, "intermediate_size": 128}
    return tiny.sizes(tokenizer, positions, **{**wide, "initializer_range": 0.2, **options})


def taught(tokenizer: Any, model: Any) -> tiny.Made:
    """Biases are 0 and gains 1 before a model has learnt, which OpenVINO leaves out."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        table = model.get_input_embeddings().weight
        table += 0.1 * torch.randn_like(table)  # the padding token's row is 0
    return tokenizer, model


def bert(**options: Any) -> Callable[[], tiny.Made]:
    def make() -> tiny.Made:
        tokenizer = tiny.trained(transformers.BertTokenizer, tiny.BERT_TOKENS)
        config = transformers.BertConfig(**sizes(tokenizer, tiny.WINDOW, **options))
        return taught(tokenizer, transformers.BertModel(config))

    return make


def loaded(folder: pathlib.Path) -> SentenceTransformer:
    """A model as the bake loads it."""
    model, _ = source.load(bake_model._parser().parse_args([str(folder)], Options()))
    assert isinstance(model, SentenceTransformer)
    return model


def described(model: SentenceTransformer, folder: pathlib.Path) -> Bundle | None:
    """A bundle of our own engine in `folder`; None for a model that it does not run."""
    folder.mkdir()
    preprocessing = pictures.read_processor(model) if "image" in model.modalities else None
    if preprocessing:
        (folder / PREPROCESSING).write_bytes(msgspec.json.encode(preprocessing))
    shape = preprocessing.shape if preprocessing else (0, 0)
    tokenizer = source.tokenizer(model, None)
    towers = encoder.describe(model, tokenizer, shape)
    if not towers:
        return None
    for modality, tower in towers.items():
        rounding.add_codes(model, tokenizer, modality, tower.weights, tower.inputs)
        save_file(tower.weights, folder / weights_file(modality))
    description = towers["text"].encoder
    manifest = Manifest(
        name=folder.name,
        source="",
        revision=None,
        created="",
        modalities=list(towers),
        dimensions=description.outputs or description.hidden,
        max_tokens=model.max_seq_length,
        normalized=False,
        similarity=None,
        prompts={},
        default_prompt=None,
        files={},
        versions={},
        probe=Probe("", []),
        parity={},
        encoder=description,
        image_encoder=towers["image"].encoder if preprocessing else None,
    )
    return Bundle(folder, manifest)


def check(
    bundle: Bundle, inputs: Sequence[Any], expected: Float32, kind: type[_Tower] = EncoderEngine
) -> None:
    """Compare the engine's vectors with `expected`, in company and alone."""
    for family in cpu.runnable():
        for precision in family.precisions:
            engine = kind(bundle, precision, streams=1, isa=family.name)
            assert (engine.precision, engine.isa) == (precision, family.name)
            company = engine.run(inputs)
            alone = np.concatenate([engine.run([one]) for one in inputs])
            # Nothing is padded, and each row is summed in the same order: not a bit changes.
            assert (company == alone).all()
            least = cosines(company, expected).min()
            assert least >= PARITY_FLOOR[precision], (family.name, precision, least)


def cosines(a: Float32, b: Float32) -> Float32:
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    result: Float32 = (a * b).sum(axis=1) / lengths
    return result
