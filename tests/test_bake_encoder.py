"""bake/encoder.py: where the weights are that our own engine reads, and which models it gets."""

import pathlib
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
import transformers
from baking import bake
from sentence_transformers import SentenceTransformer

from engine.bundle import Bundle, Encoder

WIDTH, HEAD = 64, 32  # the least that encoder.c takes
SIZES = {"hidden_size": WIDTH, "max_position_embeddings": tiny.WINDOW + 2}


def made(tokenizer_kind: Any, specials: list[str], config: Any, model: Any, **changes: Any) -> Any:
    tokenizer = tiny.trained(tokenizer_kind, specials)
    transformer = model(config(**tiny.sizes(tokenizer) | SIZES | changes))
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim == 1:  # OpenVINO leaves out biases of 0 and gains of 1
                parameter += 0.1 * torch.randn_like(parameter)
    return tokenizer, transformer


def bert(**changes: Any) -> tiny.Made:
    kinds = transformers.BertConfig, transformers.BertModel
    return made(transformers.BertTokenizer, tiny.BERT_TOKENS, *kinds, **changes)


def roberta() -> tiny.Made:
    kinds = transformers.RobertaConfig, transformers.RobertaModel
    return made(transformers.RobertaTokenizer, tiny.ROBERTA_TOKENS, *kinds)


def xlm_roberta() -> tiny.Made:
    kinds = transformers.XLMRobertaConfig, transformers.XLMRobertaModel
    return made(transformers.XLMRobertaTokenizer, tiny.ROBERTA_TOKENS, *kinds)


def baked(folder: pathlib.Path, make: Any, pooling: str = "mean") -> tuple[Bundle, Encoder | None]:
    tiny.save(folder / "model", make, pooling, width=WIDTH)
    bundle = bake(folder / "model", folder / "models")
    return bundle, bundle.manifest.encoder


@pytest.mark.parametrize(("make", "pad"), [(bert, None), (roberta, 1), (xlm_roberta, 1)])
def test_the_weights_are_where_the_manifest_says(
    make: Any, pad: int | None, tmp_path: pathlib.Path
) -> None:
    bundle, encoder = baked(tmp_path, make)
    assert encoder and encoder.pad == pad and encoder.first_position == (pad + 1 if pad else 0)
    assert (encoder.hidden, encoder.heads, encoder.inner, encoder.layers) == (WIDTH, 2, 64, 2)
    assert encoder.query_factor == 1
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")[0].model
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    assert encoder.tensors.keys() == {name for name in state if not name.startswith("pooler.")}
    data = bundle.file("text.bin").read_bytes()
    for name, offset in encoder.tensors.items():
        expected = state[name] * np.float32(HEAD**-0.5 if ".query." in name else 1)
        found = np.frombuffer(data, np.float16, expected.size, offset)
        np.testing.assert_array_equal(found, expected.astype(np.float16).ravel(), name)


def narrow() -> tiny.Made:
    return bert(num_attention_heads=4)


def other_activation() -> tiny.Made:
    return bert(hidden_act="relu")


@pytest.mark.parametrize(
    ("make", "pooling"), [(narrow, "mean"), (other_activation, "mean"), (bert, "max")]
)
def test_what_the_engine_cannot_run_is_left_to_openvino(
    make: Any, pooling: str, tmp_path: pathlib.Path
) -> None:
    assert baked(tmp_path, make, pooling)[1] is None
