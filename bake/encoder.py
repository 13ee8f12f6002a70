"""Which models our own engine (engine/encoder) runs: their description, and their weights by the
names that engine/encoder/weights.py reads.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from bake.source import modules
from engine.bundle import Encoder

Float32 = npt.NDArray[np.float32]
Weights = dict[str, npt.NDArray[Any]]  # what is multiplied and embeddings float16, else float32

# transformers' models that compute what engine/encoder does; some count positions like RoBERTa.
_ROBERTAS = ("RobertaModel", "XLMRobertaModel", "CamembertModel")
_MODELS = ("BertModel", *_ROBERTAS)
_PLAIN = {"method": "forward", "method_output_name": "last_hidden_state"}
# The encoder's tiles need the width of a head to be a multiple of 32, the other widths of 64.
_HEAD_STEP, _WIDTH_STEP = 32, 64
_ATTENTION = [f"attention.self.{name}" for name in ("query", "key", "value")]


def describe(model: Any, tokenizer: Any) -> tuple[Encoder, Weights] | None:
    """What our own engine needs to know of a model, and its weights; None for a model that it
    cannot run.

    Args:
        model: a SentenceTransformer.
    """
    parts, _ = modules(model)
    if [type(part) for part in parts] != [Transformer, Pooling]:
        return None
    pooling = str(parts[1].pooling_mode)
    if not parts[1].include_prompt:
        return None
    if pooling not in ("mean", "cls") or parts[0].modality_config["text"] != _PLAIN:
        return None
    bert, kind = parts[0].model, type(parts[0].model)
    # Somebody's own class may bear the same name.
    if not kind.__module__.startswith("transformers.models.") or kind.__name__ not in _MODELS:
        return None
    config, roberta = bert.config, kind.__name__ in _ROBERTAS
    first = config.pad_token_id + 1 if roberta else 0
    largest_id = max(tokenizer.get_vocab(with_added_tokens=True).values())
    positions = first + model.max_seq_length
    if (
        not _runs(config)
        or largest_id >= config.vocab_size
        or positions > config.max_position_embeddings
    ):
        return None
    weights = _weights(bert, positions)
    if not all(np.isfinite(values).all() for values in weights.values()):
        return None  # too large for float16
    encoder = Encoder(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        inner=config.intermediate_size,
        layers=config.num_hidden_layers,
        epsilon=config.layer_norm_eps,
        vocabulary=config.vocab_size,
        first_position=first,
        pad=config.pad_token_id if roberta else None,
        pooling="mean" if pooling == "mean" else "cls",
    )
    return encoder, weights


def _runs(config: Any) -> bool:
    """Whether engine/encoder can run a BERT of this configuration."""
    return (
        config.hidden_act == "gelu"
        and getattr(config, "position_embedding_type", "absolute") == "absolute"
        and not getattr(config, "is_decoder", False)
        and config.hidden_size // config.num_attention_heads % _HEAD_STEP == 0
        and config.hidden_size % _WIDTH_STEP == 0
        and config.intermediate_size % _WIDTH_STEP == 0
    )


def _weights(bert: Any, positions: int) -> Weights:
    """The weights of a BERT, of its position embeddings the first `positions`: those are used."""
    state = {name: value.float().numpy() for name, value in bert.state_dict().items()}
    config = bert.config
    # Every token has the first type, so that the sum of both is one table.
    table = state["embeddings.position_embeddings.weight"][:positions]
    table = table + state["embeddings.token_type_embeddings.weight"][0]
    made: Weights = {
        "words": _half(state["embeddings.word_embeddings.weight"]),
        "positions": _half(table),
        "norm": _norm(state, "embeddings.LayerNorm"),
    }
    # Softmax takes powers of 2.
    factor = math.log2(math.e) / math.sqrt(config.hidden_size // config.num_attention_heads)
    for number in range(config.num_hidden_layers):
        theirs, ours = f"encoder.layer.{number}.", f"layers.{number}."
        linears = {
            "qkv": [theirs + name for name in _ATTENTION],
            "out": [theirs + "attention.output.dense"],
            "up": [theirs + "intermediate.dense"],
            "down": [theirs + "output.dense"],
        }
        for name, sources in linears.items():
            made |= _linear(state, ours + name, sources, factor if name == "qkv" else 1.0)
        made[ours + "norm1"] = _norm(state, theirs + "attention.output.LayerNorm")
        made[ours + "norm2"] = _norm(state, theirs + "output.LayerNorm")
    return made


def _linear(
    state: Mapping[str, Float32], name: str, sources: list[str], factor: float
) -> dict[str, npt.NDArray[Any]]:
    """Products of one input, joined to one: a row of `weight` gives a value. The first is
    multiplied by `factor`.
    """
    weights = [state[f"{source}.weight"] for source in sources]
    biases = [state[f"{source}.bias"] for source in sources]
    weights[0], biases[0] = weights[0] * np.float32(factor), biases[0] * np.float32(factor)
    return {
        f"{name}.weight": _half(np.concatenate(weights)),
        f"{name}.bias": np.concatenate(biases),
    }


def _norm(state: Mapping[str, Float32], name: str) -> Float32:
    """Gains, then biases."""
    return np.concatenate([state[f"{name}.weight"], state[f"{name}.bias"]])


def _half(values: Float32) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return values.astype(np.float16)
