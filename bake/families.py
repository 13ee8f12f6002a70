"""The architectures of transformers that our own engine runs: the names of their parts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names of modules: embeddings first, then those of a layer."""

    words: str
    positions: str
    types: str | None
    norm: str | None  # of embeddings
    layers: str
    qkv: tuple[str, ...]
    out: str
    norm1: str
    up: str
    down: str
    norm2: str
    # Layers norm their inputs, and the last one's output has a norm of this name; else they norm
    # their sums with their outputs.
    last: str | None = None
    # The padding token has the position of its own id and is not counted, as in RoBERTa.
    counts: bool = False
    # What is added to a score for the distance from the query to the key, of a model with a window:
    # shape (heads, 2 * window - 1), the distance 1 - window first.
    distances: Callable[[Any, int], Float32] | None = None


def _of_mpnet(model: Any, window: int) -> Float32:
    encoder = model.encoder
    buckets = encoder.relative_position_bucket(torch.arange(1 - window, window))
    shares: Float32 = encoder.relative_attention_bias(buckets).T.detach().float().numpy()
    return shares


_BERT = Family(
    words="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
    types="embeddings.token_type_embeddings",
    norm="embeddings.LayerNorm",
    layers="encoder.layer",
    qkv=tuple(f"attention.self.{name}" for name in ("query", "key", "value")),
    out="attention.output.dense",
    norm1="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    norm2="output.LayerNorm",
)
_ROBERTA = replace(_BERT, counts=True)
_DISTILBERT = replace(
    _BERT,
    types=None,
    layers="transformer.layer",
    qkv=tuple(f"attention.{name}_lin" for name in "qkv"),
    out="attention.out_lin",
    norm1="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    norm2="output_layer_norm",
)
_MPNET = replace(
    _ROBERTA,
    types=None,
    qkv=tuple(f"attention.attn.{name}" for name in "qkv"),
    out="attention.attn.o",
    norm1="attention.LayerNorm",
    distances=_of_mpnet,
)

_ROBERTA_BEFORE = replace(
    _ROBERTA,
    norm1="attention.LayerNorm",
    norm2="intermediate.LayerNorm",
    last="LayerNorm",
)

FAMILIES = {
    "BertModel": _BERT,
    "CamembertModel": _ROBERTA,
    "Data2VecTextModel": _ROBERTA,
    "DistilBertModel": _DISTILBERT,
    "MPNetModel": _MPNET,
    "RobertaModel": _ROBERTA,
    "RobertaPreLayerNormModel": _ROBERTA_BEFORE,
    "XLMRobertaModel": _ROBERTA,
}


def find(model: Any) -> Family | None:
    """The family of a model of transformers; None for one that our own engine does not run."""
    kind = type(model)
    # Somebody's own class may bear the same name.
    if not kind.__module__.startswith("transformers.models."):
        return None
    return FAMILIES.get(kind.__name__)
