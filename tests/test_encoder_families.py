"""engine/encoder: which architectures it runs, and that it gives their vectors."""

import pathlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import own_engine as own
import pytest
import tiny_clip
import tiny_models as tiny
import torch
import transformers
import zoo_models as models

import image_embeddings
from engine.bundle import Bundle
from engine.encoder import cpu
from engine.encoder.encoder_engine import EncoderImageEngine

# Coverage takes a sixth of its time; other tests cover the same lines.
pytestmark = pytest.mark.no_cover

needs_the_cpu = pytest.mark.skipif(
    cpu.fastest("fp32") is None, reason="this CPU is not x86-64 with AVX2"
)


def of_roberta_kind(tokenizer_kind: Any, config_kind: Any, model_kind: Any) -> tiny.Made:
    tokenizer = tiny.trained(tokenizer_kind, tiny.ROBERTA_TOKENS)
    return own.taught(tokenizer, model_kind(config_kind(**own.sizes(tokenizer, tiny.WINDOW + 2))))


def roberta() -> tiny.Made:
    kinds = transformers.RobertaTokenizer, transformers.RobertaConfig, transformers.RobertaModel
    return of_roberta_kind(*kinds)


def xlm_roberta() -> tiny.Made:
    kinds = transformers.XLMRobertaConfig, transformers.XLMRobertaModel
    return of_roberta_kind(transformers.XLMRobertaTokenizer, *kinds)


def norm_before() -> tiny.Made:
    kinds = transformers.RobertaPreLayerNormConfig, transformers.RobertaPreLayerNormModel
    return of_roberta_kind(transformers.RobertaTokenizer, *kinds)


def distilbert() -> tiny.Made:
    tokenizer = tiny.trained(transformers.BertTokenizer, tiny.BERT_TOKENS)
    config = transformers.DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=64,
        hidden_dim=128,
        n_layers=2,
        n_heads=2,
        max_position_embeddings=tiny.WINDOW,
        initializer_range=0.2,
    )
    return own.taught(tokenizer, transformers.DistilBertModel(config))


def mpnet() -> tiny.Made:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"]
    tokenizer = tiny.trained(transformers.MPNetTokenizer, tokens)
    config = transformers.MPNetConfig(**own.sizes(tokenizer, tiny.WINDOW + 2))
    model = transformers.MPNetModel(config)
    with torch.no_grad():
        model.encoder.relative_attention_bias.weight.normal_(0, 2)
    return own.taught(tokenizer, model)


def of(
    name: str, words: Callable[[], Any] = models.wordpiece, **options: Any
) -> Callable[[], tiny.Made]:
    """`name`Model of own.sizes."""

    def make() -> tiny.Made:
        tokenizer = words()
        config = getattr(transformers, f"{name}Config")(
            **own.sizes(tokenizer, tiny.WINDOW, **options)
        )
        return own.taught(tokenizer, getattr(transformers, f"{name}Model")(config))

    return make


LOCAL: Any = {"local_attention": 16, "global_attn_every_n_layers": 2, "num_hidden_layers": 3}
# Weights that make attention sharp are too much for bf16 in models whose norms have no biases.
FEW: Any = {"num_key_value_heads": 1, "initializer_range": 0.1}


def too_large() -> tiny.Made:
    tokenizer, model = own.bert()()
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] = 70_000
    return tokenizer, model


MODELS = {
    "bert": (own.bert(), "mean", 64),
    "wide heads": (own.bert(heads=1), "cls", 64),  # a head of 64
    "narrow inside": (own.bert(heads=4, hidden_size=128, intermediate_size=64), "mean", 128),
    "roberta": (roberta, "mean", 64),
    "xlm-roberta": (xlm_roberta, "cls", 64),
    "tanh gelu": (own.bert(hidden_act="gelu_new"), "lasttoken", 64),
    "quick gelu": (own.bert(hidden_act="quick_gelu"), "mean", 64),
    "relu": (own.bert(hidden_act="relu"), "mean", 64),
    "silu": (own.bert(hidden_act="silu"), "mean", 64),
    "norm before": (norm_before, "mean", 64),
    "distilbert": (distilbert, "mean", 64),
    "mpnet": (mpnet, "mean", 64),
    "nomic": (of("NomicBert"), "mean", 64),
    "gte": (of("Gte", initializer_range=0.1), "cls", 64),
    "modernbert": (of("ModernBert", models.modernbert, **LOCAL), "mean", 64),
    "eurobert": (of("EuroBert", models.modernbert, **FEW), "mean", 64),
    "llama": (of("Llama", **FEW), "lasttoken", 64),
    "mistral": (of("Mistral", **FEW, sliding_window=9), "mean", 64),
    "qwen2": (of("Qwen2", models.qwen, **FEW), "lasttoken", 64),
    "qwen3": (of("Qwen3", models.qwen, **FEW, head_dim=64), "lasttoken", 64),
}


@needs_the_cpu
@pytest.mark.parametrize("name", MODELS)
def test_vectors_of_every_architecture(name: str, tmp_path: pathlib.Path) -> None:
    make, pooling, width = MODELS[name]
    model = own.loaded(tiny.save(tmp_path / "model", make, pooling, width=width, normalize=False))
    bundle = own.described(model, tmp_path / "bundle")
    assert bundle
    # The padding token within a text moves RoBERTa's positions, and no others.
    texts = [*tiny.TEXTS, "the river <pad> rose [PAD] after <pad> three days", ""]
    inputs = [np.array(model.tokenizer(text)["input_ids"]) for text in texts]
    assert len({len(each) for each in inputs}) > 5
    expected = model.encode(texts, batch_size=len(texts))
    assert own.cosines(expected[1:], expected[:-1]).max() < 0.99, "too alike to tell"
    own.check(bundle, inputs, expected)
    assert own.cosines(expected, model.encode(texts, batch_size=1)).min() > 0.9999


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Bundle]:
    folder = tmp_path_factory.mktemp("clip")
    # A patch of 3 * 8 * 8 values needs no padding; one of 12 has 432 values, and needs some.
    tiny_clip.save(folder / "model", trained=False, image_size=48, patch_size=12)
    model = own.loaded(folder / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.1 if parameter.ndim == 1 else 0.05) * torch.randn_like(parameter)
    bundle = own.described(model, folder / "bundle")
    assert bundle and bundle.manifest.modalities == ["text", "image"]
    return model, bundle


@needs_the_cpu
def test_clip_texts(clip: tuple[Any, Bundle]) -> None:
    model, bundle = clip
    texts = [tiny_clip.caption(*kind) for kind in tiny_clip.KINDS[::3]] + ["a", "red " * 60]
    texts += ["a red<|endoftext|> square is not seen"]
    inputs = [np.array(model.tokenizer(text)["input_ids"]) for text in texts]
    expected = model.encode(texts, batch_size=1)
    assert own.cosines(expected[1:], expected[:-1]).min() < 0.98
    own.check(bundle, inputs, expected)


@needs_the_cpu
def test_clip_pictures(clip: tuple[Any, Bundle]) -> None:
    model, bundle = clip
    chance = random.Random(0)
    images = [tiny_clip.picture(*kind, chance) for kind in tiny_clip.KINDS[::5]]
    steps = bundle.preprocessing()
    inputs = [image_embeddings.preprocess(image, steps) for image in images]
    pixels = torch.from_numpy(steps.normalize(np.stack(inputs)))
    with torch.no_grad():
        expected = model[0].model.get_image_features(pixels).pooler_output.numpy()
    assert own.cosines(expected[1:], expected[:-1]).min() < 0.98
    own.check(bundle, inputs, expected, EncoderImageEngine)


UNLIKE = {
    "another activation": (own.bert(hidden_act="mish"), "mean"),
    "heads of 16": (own.bert(heads=4), "mean"),
    "another pooling": (own.bert(), "max"),
    "another architecture": (tiny.deberta, "mean"),
    "inner sizes that are no multiple of 64": (own.bert(intermediate_size=96), "mean"),
    "weights too large for float16": (too_large, "mean"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_is_computed_otherwise_is_left_to_openvino(name: str, tmp_path: pathlib.Path) -> None:
    make, pooling = UNLIKE[name]
    width = tiny.WIDTH if make is tiny.deberta else 64
    model = own.loaded(tiny.save(tmp_path / "model", make, pooling, width=width))
    assert own.described(model, tmp_path / "bundle") is None
