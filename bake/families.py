"""The architectures of transformers that our own engine runs: the names of their parts."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.bundle import Sight

Float32 = npt.NDArray[np.float32]

ALL = "all"  # the name of angles that all layers have


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names of modules: embeddings first, then those of a layer."""

    words: str
    positions: str | None
    types: str | None
    norm: str | None  # of embeddings
    layers: str
    qkv: tuple[str, ...]
    out: str
    norm1: str
    gate: str | None = None  # its products are activated and multiplied with those of `up`
    up: str
    down: str
    norm2: str
    # Layers norm their inputs, and the last one's output has a norm of this name; else they norm
    # their sums with their outputs.
    last: str | None = None
    causal: bool = False  # no token sees those behind it
    gated: bool = False  # `up` makes twice as many products: the first half is activated
    rotary: str | None = None  # what gives cosines and sines for positions
    norm_heads: tuple[str, ...] = ()  # norms of queries and keys
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

_NOMIC = Family(
    words="embeddings.word_embeddings",
    positions=None,
    types="embeddings.token_type_embeddings",
    norm="embeddings.LayerNorm",
    layers="layers",
    qkv=CLIP_TEXT.qkv,
    out="self_attn.o_proj",
    norm1="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    norm2="post_mlp_layernorm",
    rotary="rotary_emb",
)
_MODERNBERT = Family(
    words="embeddings.tok_embeddings",
    positions=None,
    types=None,
    norm="embeddings.norm",
    layers="layers",
    qkv=("attn.Wqkv",),
    out="attn.Wo",
    norm1="attn_norm",
    gated=True,
    up="mlp.Wi",
    down="mlp.Wo",
    norm2="mlp_norm",
    last="final_norm",
    rotary="rotary_emb",
)
_LLAMA = replace(
    _NOMIC,
    words="embed_tokens",
    types=None,
    norm=None,
    norm1="input_layernorm",
    norm2="post_attention_layernorm",
    last="norm",
    causal=True,
)
_QWEN3 = replace(_LLAMA, norm_heads=("self_attn.q_norm", "self_attn.k_norm"))

FAMILIES = {
    "BertModel": _BERT,
    "CamembertModel": _ROBERTA,
    "Data2VecTextModel": _ROBERTA,
    "DistilBertModel": _DISTILBERT,
    "EuroBertModel": replace(_LLAMA, causal=False),
    "GteModel": _NOMIC,
    "LlamaModel": _LLAMA,
    "MistralModel": _LLAMA,
    "ModernBertModel": _MODERNBERT,
    "NomicBertModel": _NOMIC,
    "Qwen2Model": _LLAMA,
    "Qwen3Model": _QWEN3,
    "MPNetModel": _MPNET,
    "RobertaModel": _ROBERTA,
    "RobertaPreLayerNormModel": _ROBERTA_BEFORE,
    "XLMRobertaModel": _ROBERTA,
}


def heads_of(config: Any) -> tuple[int, int, int]:
    """The numbers of heads of queries and of keys, and the width of one."""
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, head


def layer_types(config: Any) -> list[str]:
    """transformers' names of the layers' attention."""
    window = getattr(config, "sliding_window", None)
    same = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    return getattr(config, "layer_types", None) or same


def sights(config: Any, causal: bool) -> tuple[Sight, ...]:
    """How far the tokens of each layer see."""
    ahead = 0 if causal else None
    made = {"full_attention": Sight(None, ahead)}
    if reach := getattr(config, "sliding_window", None):
        made["sliding_attention"] = Sight(reach - 1, 0) if causal else Sight(reach, reach)
    return tuple(made[kind] for kind in layer_types(config))


def tables(model: Any, family: Family, window: int) -> dict[str, Float32] | None:
    """For each kind of layer that has angles of its own: cosines of head / 2 angles, then their
    sines, shape (window, head). None where our own engine does not turn queries and keys so.
    """
    if family.rotary is None:
        return {}
    config, rotary = model.config, model.get_submodule(family.rotary)
    # The angles of some kinds depend on the length of the text.
    if any(kind in str(config.rope_parameters) for kind in ("dynamic", "longrope")):
        return None
    own = "layer_type" in inspect.signature(rotary.forward).parameters
    made, places = {}, torch.arange(window)[None]
    for name in sorted(set(layer_types(config))) if own else [ALL]:
        with torch.no_grad():
            parts = rotary(torch.zeros(1), places, *([name] if own else []))
        cosines, sines = (part[0].float().numpy() for part in parts)
        half = heads_of(config)[2] // 2
        if cosines.shape[1] != 2 * half or not np.array_equal(cosines[:, :half], cosines[:, half:]):
            return None
        made[name] = np.concatenate([cosines[:, :half], sines[:, :half]], axis=1)
    return made


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
