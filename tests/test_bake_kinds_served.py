"""Kinds of models besides the usual transformer and pooling: what is served is the model's own."""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
import transformers
from baking import bake, cosines, refusal, serves
from safetensors.numpy import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import (
    CNN,
    Pooling,
    StaticEmbedding,
)
from test_bake_torch import TORCH, check

# Coverage takes a sixth of its time, and tests of the bake without this mark cover its lines.
no_cover = pytest.mark.no_cover

WINDOW = ("--max-tokens", str(tiny.WINDOW))


def static(folder: pathlib.Path, normalize: bool = False) -> pathlib.Path:
    torch.manual_seed(0)
    table = StaticEmbedding(tiny.byte_level(pad_token="[PAD]"), embedding_dim=16)
    modules = [table, *([Normalize()] if normalize else [])]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    return folder


def model2vec(folder: pathlib.Path) -> pathlib.Path:
    """As model2vec saves it: a row for each distinct vector, and a weight for each token."""
    static(folder, normalize=True)
    random = np.random.default_rng(0)
    rows = StaticEmbedding.load(str(folder)).num_embeddings
    tensors = {
        "embeddings": random.normal(size=(50, 16)).astype(np.float32),
        "mapping": random.integers(0, 50, rows),
        "weights": random.uniform(0.1, 1, rows),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def headed_static(folder: pathlib.Path) -> pathlib.Path:
    torch.manual_seed(0)
    table = StaticEmbedding(tiny.bert()[0], embedding_dim=16)
    model = SentenceTransformer(modules=[table, Dense(16, 24)], device="cpu")
    model.save(str(folder), create_model_card=False)
    return folder


@no_cover
@pytest.mark.parametrize("make", [static, model2vec, headed_static])
@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_a_table_of_tokens_is_served(
    make: Callable[[pathlib.Path], pathlib.Path], engine: str, tmp_path: pathlib.Path
) -> None:
    folder = make(tmp_path / "model")
    bundle = bake(folder, tmp_path / "models", "--engine", engine)
    assert bundle.manifest.max_tokens == 8192
    assert serves(bundle, SentenceTransformer(str(folder), device="cpu").encode(tiny.TEXTS))


def without_prompt(folder: pathlib.Path, **options: Any) -> pathlib.Path:
    return tiny.save(folder, include_prompt=False, **options)


PROMPTS = {"query": "What is the mean of it? ", "passage": "the river "}


@pytest.mark.parametrize("engine", ["openvino", "torch"])
@pytest.mark.parametrize(
    ("make", "pooling"),
    [(tiny.bert, "mean"), (tiny.roberta_left, "mean"), (tiny.modernbert, "cls")],
)
def test_a_prompt_is_left_out_of_the_pooling(
    make: Callable[[], tiny.Made], pooling: str, engine: str, tmp_path: pathlib.Path
) -> None:
    folder = without_prompt(tmp_path / "model", make=make, pooling=pooling, prompts=PROMPTS)
    line = refusal(folder, tmp_path / "models", *WINDOW)
    assert "(include_prompt: false; it has query, passage)" in line
    model = SentenceTransformer(str(folder), device="cpu")
    for name in ("query", "document") if make is tiny.bert else ("query",):
        options = ("--default-prompt", name, "--name", name, "--engine", engine, *WINDOW)
        bundle = bake(folder, tmp_path / "models", *options)
        assert [*bundle.manifest.prompts] == [name]
        expected = model.encode(tiny.TEXTS, prompt_name=name)
        assert serves(bundle, expected) and serves(bundle, expected, name)
        included = SentenceTransformer(str(folder), device="cpu")
        included[1].include_prompt = True
        other = included.encode(tiny.TEXTS, prompt_name=name)
        assert (cosines(other, expected).min() < 0.9999) == (name == "query")


def test_without_any_prompt_nothing_is_left_out(tmp_path: pathlib.Path) -> None:
    folder = without_prompt(tmp_path / "model")
    bundle = bake(folder, tmp_path / "models")
    assert serves(bundle, SentenceTransformer(str(folder), device="cpu").encode(tiny.TEXTS))


def gpt2() -> tiny.Made:
    """As published: no token to pad with."""
    tokenizer = tiny.trained(transformers.GPT2Tokenizer, ["<|endoftext|>"])
    assert tokenizer.pad_token is None
    sizes = {"n_embd": tiny.WIDTH, "n_layer": 2, "n_head": 2, "n_positions": tiny.WINDOW}
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), initializer_range=tiny.SPREAD, **sizes
    )
    return tokenizer, transformers.GPT2Model(config)


def unpadded_bert() -> tiny.Made:
    tokenizer = tiny.byte_level()
    return tokenizer, tiny.bert(tiny.byte_level(pad_token="[PAD]"))[1]


def unpadded_qwen3() -> tiny.Made:
    tokenizer, model = tiny.qwen3()
    tokenizer.pad_token, tokenizer.eos_token = None, "<|im_end|>"
    return tokenizer, model


@pytest.mark.parametrize(
    ("make", "pooling"),
    [(gpt2, "mean"), (gpt2, "lasttoken"), (unpadded_bert, "cls"), (unpadded_qwen3, "lasttoken")],
)
def test_a_tokenizer_without_padding_token(
    make: Callable[[], tiny.Made], pooling: str, tmp_path: pathlib.Path
) -> None:
    """sentence-transformers itself cannot embed with it: the same model with one is compared."""
    folder = tiny.save(tmp_path / "model", make, pooling)
    model = SentenceTransformer(str(folder), device="cpu")
    with pytest.raises(Exception, match="padding token"):
        model.encode(tiny.TEXTS)
    model.tokenizer.pad_token = model.tokenizer.eos_token or "[UNK]"
    expected = np.stack([model.encode(text) for text in tiny.TEXTS])
    for more in ((), TORCH):
        assert serves(bake(folder, tmp_path / "models", *WINDOW, *more), expected)


def adapted(folder: pathlib.Path) -> pathlib.Path:
    """A model with a LoRA adapter whose weights are not 0."""
    peft = pytest.importorskip("peft")
    base = tiny.save(folder.with_name("base"))
    model = SentenceTransformer(str(base), device="cpu")
    config = peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=["query", "value"])
    model.add_adapter(config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save(str(folder), create_model_card=False)
    return folder


def test_an_adapter_is_merged(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = adapted(tmp_path / "model")
    model = SentenceTransformer(str(folder), device="cpu")
    expected = model.encode(tiny.TEXTS)
    base = SentenceTransformer(str(tmp_path / "base"), device="cpu")
    assert cosines(base.encode(tiny.TEXTS), expected).max() < 0.999
    for more in ((), TORCH):
        bundle = bake(folder, tmp_path / "models", *more)
        assert "its adapter (PEFT) is merged into its weights" in capsys.readouterr().out
        assert serves(bundle, expected)
        assert not list(bundle.path.rglob("adapter*"))


def convbert() -> tiny.Made:
    tokenizer = tiny.trained(transformers.BertTokenizer, tiny.BERT_TOKENS)
    sizes = tiny.sizes(tokenizer, embedding_size=tiny.WIDTH, head_ratio=2)
    return tokenizer, transformers.ConvBertModel(transformers.ConvBertConfig(**sizes))


def reformer() -> tiny.Made:
    """It pads texts longer than a chunk to a multiple of it: short ones give nothing away."""
    tokenizer = tiny.trained(transformers.XLMRobertaTokenizer, tiny.ROBERTA_TOKENS)
    sizes = tiny.sizes(tokenizer, attention_head_size=16, axial_pos_embds=False)
    config = transformers.ReformerConfig(
        **sizes, feed_forward_size=64, attn_layers=["local"] * 2, local_attn_chunk_length=16
    )
    return tokenizer, transformers.ReformerModel(config)


def convolving(folder: pathlib.Path) -> pathlib.Path:
    bert = SentenceTransformer(str(tiny.save(folder.with_name("bert"))), device="cpu")[0]
    modules = [bert, CNN(tiny.WIDTH, 16, [1, 3, 5]), Pooling(48)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    return folder


@pytest.mark.parametrize(
    "make",
    [
        convolving,
        lambda folder: tiny.save(folder, convbert),
        lambda folder: tiny.save(folder, tiny.fnet),
        lambda folder: tiny.save(folder, reformer),
    ],
    ids=["cnn", "convbert", "fnet", "reformer"],
)
def test_what_depends_on_padding_is_computed_alone(
    make: Callable[[pathlib.Path], pathlib.Path],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = make(tmp_path / "model")
    model = SentenceTransformer(str(folder), device="cpu")
    alone = np.stack([model.encode(text) for text in tiny.TEXTS])
    assert cosines(model.encode(tiny.TEXTS), alone).min() < 0.99
    bundle = bake(folder, tmp_path / "models", *WINDOW)
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert "its vectors depend on padding: " in text and "Each text is computed alone" in text
    assert bundle.manifest.torch and bundle.manifest.torch.alone
    check(bundle, alone)
    for options in (("--engine", "openvino"), ("--precisions", "int8")):
        line = refusal(folder, tmp_path / "models", *WINDOW, *options)
        assert "its vectors depend on padding: " in line and "only --engine torch does" in line


def longformer() -> tiny.Made:
    """It pads each text itself, by as much as its length asks for: a trace by as much for all."""
    tokenizer = tiny.trained(transformers.RobertaTokenizer, tiny.ROBERTA_TOKENS)
    config = transformers.LongformerConfig(
        **tiny.sizes(tokenizer, tiny.WINDOW + 2), attention_window=16
    )
    return tokenizer, transformers.LongformerModel(config)


@no_cover
def test_what_a_trace_gets_wrong_is_baked_for_torch(tmp_path: pathlib.Path) -> None:
    folder = tiny.save(tmp_path / "model", longformer)
    bundle = bake(folder, tmp_path / "models", *WINDOW)
    assert bundle.manifest.torch
    check(bundle, SentenceTransformer(str(folder), device="cpu").encode(tiny.TEXTS))
