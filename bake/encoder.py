"""Which models our own engine (engine/encoder) runs: their description, and their weights by the
names that engine/encoder/weights.py reads.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from bake import families
from bake.families import Family, Float32
from bake.source import modules
from engine.bundle import Activation, Encoder, Pooled

Weights = dict[str, npt.NDArray[Any]]  # what is multiplied and embeddings float16, else float32

_PLAIN = {"method": "forward", "method_output_name": "last_hidden_state"}
# The encoder's tiles need the width of a head to be a multiple of 32, the other widths of 64.
_HEAD_STEP, _WIDTH_STEP = 32, 64
# By transformers' names.
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "tanh gelu",
    "gelu_fast": "tanh gelu",
    "gelu_accurate": "tanh gelu",
    "gelu_python_tanh": "tanh gelu",
    "gelu_pytorch_tanh": "tanh gelu",
    "quick_gelu": "quick gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_POOLINGS: dict[str, Pooled] = {"mean": "mean", "cls": "first", "lasttoken": "last"}
_LOG2_E = math.log2(math.e)  # softmax takes powers of 2


class Described(NamedTuple):
    """A model that our own engine runs."""

    encoder: Encoder
    weights: Weights
    # For each linear layer in `weights`, a module of the model that gets the same input.
    inputs: dict[str, Any]


def describe(model: Any, tokenizer: Any) -> Described | None:
    """What our own engine needs to know of a model; None for a model that it cannot run.

    Args:
        model: a SentenceTransformer.
    """
    parts, _ = modules(model)
    if [type(part) for part in parts] != [Transformer, Pooling]:
        return None
    pooling = _POOLINGS.get(str(parts[1].pooling_mode))
    if not parts[1].include_prompt or pooling is None:
        return None
    own, family = parts[0].model, families.find(parts[0].model)
    if family is None or parts[0].modality_config["text"] != _PLAIN or not _runs(own):
        return None
    first = own.embeddings.padding_idx + 1 if family.counts else 0
    largest_id = max(tokenizer.get_vocab(with_added_tokens=True).values())
    positions = first + model.max_seq_length
    vocabulary = len(own.get_submodule(family.words).weight)
    if largest_id >= vocabulary or positions > len(own.get_submodule(family.positions).weight):
        return None
    weights, inputs = _weights(own, family, positions, model.max_seq_length)
    if not all(np.isfinite(values).all() for values in weights.values()):
        return None  # too large for float16
    up = own.get_submodule(f"{family.layers}.0.{family.up}")
    encoder = Encoder(
        hidden=own.config.hidden_size,
        heads=own.config.num_attention_heads,
        inner=len(up.weight),
        layers=own.config.num_hidden_layers,
        epsilon=own.get_submodule(family.norm or family.last).eps,
        vocabulary=vocabulary,
        first_position=first,
        pad=first - 1 if family.counts else None,
        activation=_ACTIVATIONS[_activation(own.config)],
        norm_embeddings=family.norm is not None,
        norm_before=family.last is not None,
        pooling=pooling,
        distances=family.distances is not None,
    )
    return Described(encoder, weights, inputs) if encoder.inner % _WIDTH_STEP == 0 else None


def _runs(model: Any) -> bool:
    """Whether engine/encoder can run a model of its families of this configuration."""
    config = model.config
    return (
        _activation(config) in _ACTIVATIONS
        and getattr(config, "position_embedding_type", "absolute") == "absolute"
        and not getattr(config, "is_decoder", False)
        and config.hidden_size // config.num_attention_heads % _HEAD_STEP == 0
        and config.hidden_size % _WIDTH_STEP == 0
    )


def _activation(config: Any) -> str:
    """transformers' name of it; empty where it is a function of somebody's own."""
    name = getattr(config, "hidden_act", getattr(config, "activation", ""))
    return name if isinstance(name, str) else ""


def _weights(
    model: Any, family: Family, positions: int, window: int
) -> tuple[Weights, dict[str, Any]]:
    """A model's weights, of its position embeddings the first `positions`: those are used.

    Returns: also the inputs, see Described.
    """
    table = _values(model.get_submodule(family.positions).weight)[:positions]
    if family.types:  # every token has the first, so that the sum of both is one table
        table = table + _values(model.get_submodule(family.types).weight)[0]
    made: Weights = {
        "words": _half(_values(model.get_submodule(family.words).weight)),
        "positions": _half(table),
    }
    for name, source in (("norm", family.norm), ("last", family.last)):
        if source:
            made[name] = _norm(model, source)
    if family.distances:
        made["distances"] = family.distances(model, window) * np.float32(_LOG2_E)
    config, inputs = model.config, dict[str, Any]()
    factor = _LOG2_E / math.sqrt(config.hidden_size // config.num_attention_heads)
    for number in range(config.num_hidden_layers):
        theirs, ours = f"{family.layers}.{number}.", f"layers.{number}."
        linears = {
            "qkv": [theirs + name for name in family.qkv],
            "out": [theirs + family.out],
            "up": [theirs + family.up],
            "down": [theirs + family.down],
        }
        for name, sources in linears.items():
            inputs[ours + name] = model.get_submodule(sources[0])
            made |= _linear(model, ours + name, sources, factor if name == "qkv" else 1.0)
        made[ours + "norm1"] = _norm(model, theirs + family.norm1)
        made[ours + "norm2"] = _norm(model, theirs + family.norm2)
    # safetensors writes an array that is not contiguous in the order of its memory.
    return {name: np.ascontiguousarray(values) for name, values in made.items()}, inputs


def _linear(model: Any, name: str, sources: Sequence[str], factor: float) -> Weights:
    """Products of one input, joined to one: a row of `weight` gives a value. The first is
    multiplied by `factor`.
    """
    parts = [model.get_submodule(source) for source in sources]
    weights = [_values(part.weight) for part in parts]
    biases = [_values(part.bias) for part in parts]
    weights[0], biases[0] = weights[0] * np.float32(factor), biases[0] * np.float32(factor)
    return {
        f"{name}.weight": _half(np.concatenate(weights)),
        f"{name}.bias": np.concatenate(biases),
    }


def _norm(model: Any, name: str) -> Float32:
    """Gains, then biases."""
    norm = model.get_submodule(name)
    return np.concatenate([_values(norm.weight), _values(norm.bias)])


def _values(tensor: Any) -> Float32:
    values: Float32 = tensor.detach().float().numpy()
    return values


def _half(values: Float32) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return values.astype(np.float16)
