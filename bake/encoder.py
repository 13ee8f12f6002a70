"""Which models our own engine (engine/encoder) runs, and where their weights are in the file of the
graph.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from bake.source import modules
from engine.bundle import Encoder

# transformers' models that compute what engine/encoder does; some count positions like RoBERTa.
_ROBERTAS = ("RobertaModel", "XLMRobertaModel", "CamembertModel")
_MODELS = ("BertModel", *_ROBERTAS)
_PLAIN = {"method": "forward", "method_output_name": "last_hidden_state"}
_HALF = re.compile(r'<data element_type="f16" shape="([^"]*)" offset="(\d+)" size="(\d+)"')
# The encoder's tiles need the width of a head to be a multiple of 32, the other widths of 64.
_HEAD_STEP, _WIDTH_STEP = 32, 64


def describe(model: Any, tokenizer: Any, graph: pathlib.Path) -> Encoder | None:
    """What our own engine needs to know of a model; None for one that it cannot run.

    Args:
        model: a SentenceTransformer.
        graph: the OpenVINO model of its text tower, as saved.
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
    if (
        not _runs(config)
        or largest_id >= config.vocab_size
        or first + model.max_seq_length > config.max_position_embeddings
    ):
        return None
    # bake/rewrite.py has multiplied the query's weights by the scale.
    scale = np.float32((config.hidden_size // config.num_attention_heads) ** -0.5)
    state = {
        name: value.numpy() * scale if ".query." in name else value.numpy()
        for name, value in bert.state_dict().items()
        if not name.startswith("pooler.")
    }
    tensors = _find(state, graph)
    if tensors is None:
        return None
    return Encoder(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        inner=config.intermediate_size,
        layers=config.num_hidden_layers,
        epsilon=config.layer_norm_eps,
        vocabulary=config.vocab_size,
        first_position=first,
        pad=config.pad_token_id if roberta else None,
        pooling="mean" if pooling == "mean" else "cls",
        query_factor=1.0,
        tensors=tensors,
    )


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


def _find(
    wanted: Mapping[str, npt.NDArray[np.float32]], graph: pathlib.Path
) -> dict[str, int] | None:
    """Byte offsets of tensors as float16, None unless all are found. They are found by content:
    OpenVINO keeps few of their names.
    """
    file = np.memmap(graph.with_suffix(".bin"), np.uint8, "r")
    places: dict[int, list[int]] = {}  # offsets by size, both in bytes
    for _, offset, size in _HALF.findall(graph.read_text()):
        places.setdefault(int(size), []).append(int(offset))
    found: dict[str, int] = {}
    for name, values in wanted.items():
        with np.errstate(over="ignore"):
            content = values.astype(np.float16).tobytes()
        for offset in places.get(len(content), []):
            if file[offset : offset + len(content)].tobytes() == content:
                found[name] = offset
                break
        else:
            return None
    return found
