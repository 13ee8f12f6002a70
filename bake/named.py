"""A model's weights for our own engine, by the names that engine/encoder/weights.py reads."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bake.families import Family, Float32, heads_of, tables

Weights = dict[str, npt.NDArray[Any]]  # what is multiplied and embeddings float16, else float32

_LOG2_E = math.log2(math.e)  # softmax takes powers of 2


def of_texts(model: Any, family: Family, positions: int, window: int) -> Weights:
    """The weights of a tower of texts, of its position embeddings the first `positions`: those are
    used.
    """
    words = values(model.get_submodule(family.words).weight)
    table = None
    if family.positions:
        table = values(model.get_submodule(family.positions).weight)[:positions]
    types = model.get_submodule(family.types) if family.types else None
    if types is not None:  # every token has the first, so that the sum of two tables is one
        first = values(types.weight)[0]
        words, table = (words + first, None) if table is None else (words, table + first)
    made = {"words": half(words), **of_layers(model, family, window)}
    if table is not None:
        made["positions"] = half(table)
    if family.distances:
        made["distances"] = family.distances(model, window) * np.float32(_LOG2_E)
    return made


def of_pictures(model: Any, family: Family) -> Weights:
    """The weights of a tower of pictures. A patch is a row of values: by its rows, then by their
    pixels, then by colours, and zeros up to a multiple of 64.
    """
    embeddings = model.embeddings
    kernel = values(embeddings.patch_embedding.weight)
    patch = kernel.transpose(0, 2, 3, 1).reshape(len(kernel), -1)
    table = values(model.get_submodule(family.positions).weight).copy()
    table[0] += values(embeddings.class_embedding)
    if embeddings.patch_embedding.bias is not None:
        table[1:] += values(embeddings.patch_embedding.bias)
    return {
        "patches.weight": half(np.pad(patch, ((0, 0), (0, -patch.shape[1] % 64)))),
        "patches.bias": np.zeros(len(kernel), np.float32),
        "positions": half(table),
        **of_layers(model, family, len(table)),
    }


def of_layers(model: Any, family: Family, window: int) -> Weights:
    """The weights of all that comes behind the embeddings."""
    made: Weights = {}
    for name, source in (("norm", family.norm), ("last", family.last)):
        if source:
            made[name] = _norm(model, source)
    for name, table in (tables(model, family, window) or {}).items():
        made[f"angles.{name}"] = table
    heads, _, head = heads_of(model.config)
    factor = _LOG2_E / math.sqrt(head)
    for number in range(model.config.num_hidden_layers):
        theirs, ours = f"{family.layers}.{number}.", f"layers.{number}."
        qkv, up = [theirs + name for name in family.qkv], [theirs + family.up]
        if family.norm_heads:  # the queries' norm would undo a factor before it
            gains = [
                values(model.get_submodule(theirs + name).weight) for name in family.norm_heads
            ]
            gains[0] = gains[0] * np.float32(factor)
            made[ours + "norm_heads"] = np.concatenate(gains)
            made |= _linear(model, ours + "qkv", qkv)
        else:
            made |= _linear(model, ours + "qkv", qkv, heads * head, factor)
        if family.gate:
            up.insert(0, theirs + family.gate)
        made |= _linear(model, ours + "out", [theirs + family.out])
        made |= _linear(model, ours + "up", up)
        made |= _linear(model, ours + "down", [theirs + family.down])
        for name, source in (("norm1", family.norm1), ("norm2", family.norm2)):
            if not isinstance(model.get_submodule(theirs + source), torch.nn.Identity):
                made[ours + name] = _norm(model, theirs + source)
    return made


def inputs(model: Any, family: Family) -> dict[str, Any]:
    """For each linear layer of `of_layers`, a module of the model that gets its input."""
    firsts = {"qkv": family.qkv[0], "out": family.out, "up": family.up, "down": family.down}
    return {
        f"layers.{number}.{name}": model.get_submodule(f"{family.layers}.{number}.{first}")
        for number in range(model.config.num_hidden_layers)
        for name, first in firsts.items()
    }


def head(name: str, linear: Any) -> Weights:
    """The weights of a linear layer without others beside it."""
    return {f"{name}.weight": half(values(linear.weight)), f"{name}.bias": _bias(linear)}


def fit(weights: Weights) -> Weights | None:
    """The weights as safetensors writes them, which writes what is not contiguous in the order of
    its memory; None where one is too large for float16.
    """
    if not all(np.isfinite(each).all() for each in weights.values()):
        return None
    return {name: np.ascontiguousarray(each) for name, each in weights.items()}


def _linear(
    model: Any, name: str, sources: Sequence[str], scaled: int = 0, factor: float = 1.0
) -> Weights:
    """Products of one input, joined to one: a row of `weight` gives a value. The first `scaled` are
    multiplied by `factor`.
    """
    parts = [model.get_submodule(source) for source in sources]
    weight = np.concatenate([values(part.weight) for part in parts])
    bias = np.concatenate([_bias(part) for part in parts])
    weight[:scaled] *= np.float32(factor)
    bias[:scaled] *= np.float32(factor)
    return {f"{name}.weight": half(weight), f"{name}.bias": bias}


def _bias(part: Any) -> Float32:
    """Zeros where there is none."""
    none = getattr(part, "bias", None) is None
    return np.zeros(len(part.weight), np.float32) if none else values(part.bias)


def _norm(model: Any, name: str) -> Float32:
    """Gains, then biases."""
    norm = model.get_submodule(name)
    return np.concatenate([values(norm.weight), _bias(norm)])


def values(tensor: Any) -> Float32:
    """A parameter's."""
    found: Float32 = tensor.detach().float().numpy()
    return found


def half(exact: Float32) -> npt.NDArray[np.float16]:
    """Infinite where a value is too large."""
    with np.errstate(over="ignore"):
        return exact.astype(np.float16)
