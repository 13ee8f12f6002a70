"""Which models our own engine (engine/encoder) runs, and their description."""

from typing import Any, NamedTuple

import torch
from msgspec import structs
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from bake import families, named
from bake.families import Family
from bake.source import modules
from engine.bundle import Activation, Encoder, Modality, Pooled

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


class Described(NamedTuple):
    """A tower that our own engine runs."""

    encoder: Encoder
    weights: named.Weights
    inputs: dict[str, Any]  # see named.inputs


def describe(model: Any, tokenizer: Any, shape: tuple[int, int]) -> dict[Modality, Described]:
    """What our own engine needs to know of a model's towers, and their weights; nothing for a model
    that it cannot run.

    Args:
        model: a SentenceTransformer.
        shape: height and width of a picture, for a model that takes any.
    """
    parts, _ = modules(model)
    largest_id = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if families.is_clip(parts[0]) and len(parts) == 1:
        return _clip(model, tokenizer, largest_id, shape)
    if [type(part) for part in parts] != [Transformer, Pooling]:
        return {}
    pooling = _POOLINGS.get(str(parts[1].pooling_mode))
    own, family = parts[0].model, families.find(parts[0].model)
    if family is None or pooling is None or not parts[1].include_prompt:
        return {}
    if parts[0].modality_config["text"] != _PLAIN:
        return {}
    return _found({"text": _texts(own, family, model.max_seq_length, largest_id, pooling=pooling)})


def _found(towers: dict[Modality, Described | None]) -> dict[Modality, Described]:
    """All towers, or none."""
    found: dict[Modality, Described] = {name: tower for name, tower in towers.items() if tower}
    return found if len(found) == len(towers) else {}


def _clip(
    model: Any, tokenizer: Any, largest_id: int, shape: tuple[int, int]
) -> dict[Modality, Described]:
    clip, end = model[0].model, model[0].model.text_model.eos_token_id
    if end == 2:  # as transformers: then the largest id ends a text
        end = largest_id
    ends: Any = {"pooling": "first of", "pooled": end}
    of_text = _texts(clip.text_model, families.CLIP_TEXT, model.max_seq_length, largest_id, **ends)
    of_image = _pictures(clip.vision_model, families.CLIP_VISION, shape)
    towers: dict[Modality, Described | None] = {
        "text": _projected(of_text, clip.text_projection),
        "image": _projected(of_image, clip.visual_projection),
    }
    return _found(towers)


def _texts(
    own: Any, family: Family, window: int, largest_id: int, **pooling: Any
) -> Described | None:
    """A tower of texts without a head."""
    first = own.embeddings.padding_idx + 1 if family.counts else 0
    vocabulary = len(own.get_submodule(family.words).weight)
    if family.positions and first + window > len(own.get_submodule(family.positions).weight):
        return None
    if not _runs(own, family) or largest_id >= vocabulary:
        return None
    weights = named.fit(named.of_texts(own, family, first + window, window))
    if weights is None:
        return None
    encoder = Encoder(
        **_layers(own, family),
        vocabulary=vocabulary,
        first_position=first,
        pad=first - 1 if family.counts else None,
        distances=family.distances is not None,
        **pooling,
    )
    return Described(encoder, weights, named.inputs(own, family))


def _pictures(own: Any, family: Family, shape: tuple[int, int]) -> Described | None:
    """A tower of pictures without a head. Its first token is the class."""
    patches = own.embeddings.patch_embedding
    patch, (height, width) = patches.kernel_size[0], shape
    positions = len(own.get_submodule(family.positions).weight)
    if (
        not _runs(own, family)
        or patches.stride != patches.kernel_size
        or height % patch + width % patch
        or height // patch * (width // patch) + 1 != positions
    ):
        return None
    weights = named.fit(named.of_pictures(own, family))
    if weights is None:
        return None
    encoder = Encoder(
        **_layers(own, family), vocabulary=0, patch=patch, across=width // patch, pooling="first"
    )
    return Described(encoder, weights, named.inputs(own, family))


def _projected(tower: Described | None, linear: Any) -> Described | None:
    """A tower with a linear layer behind it."""
    weights = named.fit(named.head("head", linear))
    if tower is None or weights is None or len(linear.weight) % _HEAD_STEP:
        return None
    projected = structs.replace(tower.encoder, outputs=len(linear.weight))
    return tower._replace(encoder=projected, weights=tower.weights | weights)


def _layers(own: Any, family: Family) -> dict[str, Any]:
    """The fields of an Encoder that say what is behind the embeddings."""
    config, norm = own.config, own.get_submodule(family.norm or family.last)
    heads, key_heads, head = families.heads_of(config)
    first = own.get_submodule(f"{family.layers}.0.{family.norm1}")
    angles = families.tables(own, family, 1) or {}
    types = families.layer_types(config)
    return {
        "hidden": config.hidden_size,
        "heads": heads,
        "key_heads": key_heads,
        "head": head,
        "inner": _inner(own, family),
        "layers": config.num_hidden_layers,
        "epsilon": norm.eps if hasattr(norm, "eps") else norm.variance_epsilon,
        "rms": not isinstance(norm, torch.nn.LayerNorm),
        "activation": _ACTIVATIONS[_activation(config)],
        "gated": bool(family.gated or family.gate),
        "positions": family.positions is not None,
        "angles": tuple(each if each in angles else families.ALL for each in types if angles),
        "norm_heads": bool(family.norm_heads),
        "norm_embeddings": family.norm is not None,
        "norm_before": family.last is not None,
        "norm_first": not isinstance(first, torch.nn.Identity),
        "sights": families.sights(config, family.causal and getattr(config, "is_causal", True)),
    }


def _runs(model: Any, family: Family) -> bool:
    """Whether engine/encoder can run a model of its families of this configuration."""
    config = model.config
    heads, _, head = families.heads_of(config)
    return (
        _activation(config) in _ACTIVATIONS
        and getattr(config, "position_embedding_type", "absolute") == "absolute"
        and not getattr(config, "is_decoder", False)
        and head % _HEAD_STEP == 0
        and heads * head % _WIDTH_STEP == 0
        and config.hidden_size % _WIDTH_STEP == 0
        and _inner(model, family) % _WIDTH_STEP == 0
        and families.tables(model, family, 1) is not None
    )


def _inner(model: Any, family: Family) -> int:
    rows = len(model.get_submodule(f"{family.layers}.0.{family.up}").weight)
    return rows // 2 if family.gated else rows


def _activation(config: Any) -> str:
    """transformers' name of it; empty where it is a function of somebody's own."""
    names = ("hidden_act", "hidden_activation", "activation")
    name = next((getattr(config, each) for each in names if hasattr(config, each)), "")
    return name if isinstance(name, str) else ""
