"""Where a BERT's weights are in the file of its graph, for engine/native.py. Bake only."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.bundle import Encoder
from engine.encoder.weights import TABLES

# transformers' models that compute what engine/encoder.c does, and whether they count positions as
# RoBERTa does.
_MODELS = {
    "BertModel": False,
    "RobertaModel": True,
    "XLMRobertaModel": True,
    "CamembertModel": True,
}
_HALF = re.compile(r'<data element_type="f16" shape="([^"]*)" offset="(\d+)" size="(\d+)"')
# What of a model must be a multiple of what, for encoder.c's panels, groups and registers.
_MULTIPLES = {"head": 32, "hidden": 64, "inner": 64}


def describe(
    model: Any, pooling: str, window: int, tokens: int, graph: pathlib.Path
) -> Encoder | None:
    """What engine/native.py needs to know of a model, None for one that it cannot run.

    Args:
        model: of transformers.
        pooling: sentence-transformers' name of it.
        window: the most tokens of a text.
        tokens: one more than the largest id that the tokenizer gives.
        graph: the OpenVINO model as saved.
    """
    config = model.config
    kind = type(model)
    if not kind.__module__.startswith("transformers.models."):
        return None  # somebody's own, whatever it is called
    if kind.__name__ not in _MODELS or pooling not in ("mean", "cls"):
        return None
    roberta = _MODELS[kind.__name__]
    sizes = {
        "head": config.hidden_size // config.num_attention_heads,
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
    }
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    words, positions, _ = (state[f"embeddings.{name}_embeddings.weight"] for name in TABLES)
    first = config.pad_token_id + 1 if roberta else 0
    if (
        config.hidden_act != "gelu"
        or getattr(config, "position_embedding_type", "absolute") != "absolute"
        or getattr(config, "is_decoder", False)
        or any(size % _MULTIPLES[name] for name, size in sizes.items())
        or tokens > len(words)
        or first + window > len(positions)
    ):
        return None
    names = []
    norms = ["embeddings"]
    for number in range(config.num_hidden_layers):
        own = f"encoder.layer.{number}"
        products = ["attention.self.query", "attention.self.key", "attention.self.value"]
        products += ["attention.output.dense", "intermediate.dense", "output.dense"]
        for product in products:
            names += [f"{own}.{product}.weight", f"{own}.{product}.bias"]
        norms += [f"{own}.attention.output", f"{own}.output"]
    names += [f"{norm}.LayerNorm.{part}" for norm in norms for part in ("weight", "bias")]
    names += [f"embeddings.{name}_embeddings.weight" for name in TABLES]  # the largest last
    if any(name not in state for name in names):
        return None
    # engine/attention.py may have taken it into the weights.
    scale = sizes["head"] ** -0.5
    for folded, left in ((scale, 1.0), (1.0, scale)):
        tensors = _find({name: state[name] for name in names}, folded, graph)
        if tensors is not None:
            return Encoder(
                hidden=config.hidden_size,
                heads=config.num_attention_heads,
                inner=config.intermediate_size,
                layers=config.num_hidden_layers,
                epsilon=config.layer_norm_eps,
                vocabulary=len(words),
                first_position=first,
                pad=config.pad_token_id if roberta else None,
                pooling="mean" if pooling == "mean" else "cls",
                query_factor=left,
                tensors=tensors,
            )
    return None


def _find(
    wanted: Mapping[str, npt.NDArray[np.float32]], query_factor: float, graph: pathlib.Path
) -> dict[str, int] | None:
    """Byte offsets of tensors as float16, queries' multiplied; None unless all are there. Names
    are of no use: OpenVINO keeps few of them.
    """
    file = np.memmap(graph.with_suffix(".bin"), np.uint8, "r")
    places: dict[int, list[int]] = {}  # by size
    for _, offset, size in _HALF.findall(graph.read_text()):
        places.setdefault(int(size), []).append(int(offset))
    found: dict[str, int] = {}
    for name, values in wanted.items():
        if ".query." in name and query_factor != 1:
            values = values * np.float32(query_factor)
        with np.errstate(over="ignore"):
            content = values.astype(np.float16).tobytes()
        for offset in places.get(len(content), []):
            if file[offset : offset + len(content)].tobytes() == content:
                found[name] = offset
                break
        else:
            return None
    return found
