"""bake/encoder.py: the description and weights that our own engine gets, and of which models."""

import pathlib
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
import transformers
from baking import bake
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer

from engine.bundle import Bundle, Encoder
from engine.encoder.tensors import Tensors
from engine.errors import BundleError

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
def test_the_bundle_holds_a_description_and_named_weights(
    make: Any, pad: int | None, tmp_path: pathlib.Path
) -> None:
    bundle, encoder = baked(tmp_path, make)
    assert encoder and encoder.pad == pad and encoder.first_position == (pad + 1 if pad else 0)
    assert (encoder.hidden, encoder.heads, encoder.inner, encoder.layers) == (WIDTH, 2, 64, 2)
    assert "text.safetensors" in bundle.manifest.files
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")[0].model
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    held = load_file(bundle.file("text.safetensors"))
    of_layers = ("qkv.weight", "qkv.bias", "out.weight", "norm1", "up.bias", "down.weight", "norm2")
    assert {"words", "positions", "norm", *(f"layers.1.{name}" for name in of_layers)} <= set(held)
    assert held["words"].dtype == np.float16
    own, layer = "layers.1.", "encoder.layer.1."
    words = state["embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(held["words"], words.astype(np.float16))
    parts = [state[f"{layer}attention.self.{name}.bias"] for name in ("query", "key", "value")]
    parts[0] = parts[0] * np.log2(np.e) * HEAD**-0.5  # softmax in powers of 2
    np.testing.assert_allclose(held[own + "qkv.bias"], np.concatenate(parts), rtol=1e-6)
    norm = [state[f"{layer}output.LayerNorm.{name}"] for name in ("weight", "bias")]
    np.testing.assert_array_equal(held[own + "norm2"], np.concatenate(norm))
    types = state["embeddings.token_type_embeddings.weight"]
    places = state["embeddings.position_embeddings.weight"][: len(held["positions"])] + types[0]
    np.testing.assert_array_equal(held["positions"], places.astype(np.float16))


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("tensors") / "a.safetensors"
    save_file({"half": np.ones((2, 3), np.float16), "whole": np.arange(4, dtype=np.float32)}, path)
    return path


def test_tensors_are_read_in_place(tensors: pathlib.Path) -> None:
    whole = Tensors(tensors).get("whole", np.float32, 4)
    assert whole.tolist() == [0, 1, 2, 3] and not whole.flags.owndata and not whole.flags.writeable


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [("none", np.float16, (2, 3)), ("half", np.float32, (2, 3)), ("half", np.float16, (3, 2))],
)
def test_a_tensor_that_is_not_there(
    tensors: pathlib.Path, name: str, dtype: Any, shape: tuple[int, ...]
) -> None:
    with pytest.raises(BundleError, match=f"does not hold {name} as {shape[0]} x .* bake .* again"):
        Tensors(tensors).get(name, dtype, *shape)


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\x02" + bytes(7) + b"[]", bytes(100)])
def test_what_is_no_file_of_tensors(content: bytes, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "text.safetensors"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="holds no tensors .* bake the model again"):
        Tensors(path)


def test_a_file_that_ends_early(tensors: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(tensors.read_bytes()[:-8])
    with pytest.raises(BundleError, match="does not hold"):
        for name, dtype, shape in (("half", np.float16, (2, 3)), ("whole", np.float32, (4,))):
            Tensors(path).get(name, dtype, *shape)


def test_a_model_that_the_engine_cannot_run_has_no_weights_for_it(tmp_path: pathlib.Path) -> None:
    bundle, encoder = baked(tmp_path, bert, "max")
    assert encoder is None and "text.safetensors" not in bundle.manifest.files
