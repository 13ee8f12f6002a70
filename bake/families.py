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
    causal: bool = False  # no token sees those behind it
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

CLIP_TEXT = Family(
    words="embeddings.token_embedding",
    positions="embeddings.position_embedding",
    types=None,
    norm=None,
    layers="encoder.layers",
    qkv=tuple(f"self_attn.{name}_proj" for name in "qkv"),
    out="self_attn.out_proj",
    norm1="layer_norm1",
    up="mlp.fc1",
    down="mlp.fc2",
    norm2="layer_norm2",
    last="final_layer_norm",
    causal=True,
)
# transformers spells it so.
CLIP_VISION = replace(CLIP_TEXT, norm="pre_layrnorm", last="post_layernorm", causal=False)

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


def _of_transformers(model: Any) -> str:
    """The name of transformers' own class; somebody's own may bear the same name."""
    kind = type(model)
    return kind.__name__ if kind.__module__.startswith("transformers.models.") else ""


def find(model: Any) -> Family | None:
    """The family of a model of transformers; None for one that our own engine does not run."""
    return FAMILIES.get(_of_transformers(model))


def is_clip(part: Any) -> bool:
    """Whether a module of sentence-transformers is CLIP, and gives both towers' projections."""
    methods = {
        modality: config.get("method")
        for modality, config in getattr(part, "modality_config", {}).items()
        if isinstance(config, dict)
    }
    return (
        _of_transformers(getattr(part, "model", None)) == "CLIPModel"
        and methods.get("text") == "get_text_features"
        and methods.get("image") == "get_image_features"
    )
