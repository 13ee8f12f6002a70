"""bake/kinds.py: what is refused by name, and what is decided where a model leaves it open."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_clip
import tiny_models as tiny
import torch
import transformers
from baking import bake, refusal, serves
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import (
    BoW,
    Pooling,
    WordEmbeddings,
)
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling
from test_bake_torch import TORCH, check

from bake import BakeError, one_line
from bake.pictures import read_processor

WINDOW = ("--max-tokens", str(tiny.WINDOW))


def plain(folder: pathlib.Path, kind: str = "BertModel", config: str = "BertConfig") -> Any:
    """A folder of transformers, as `kind` saves it."""
    torch.manual_seed(0)
    tokenizer = tiny.trained(transformers.BertTokenizer, tiny.BERT_TOKENS)
    sizes = tiny.sizes(tokenizer)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit(folder: pathlib.Path, file: str, **changes: Any) -> pathlib.Path:
    """Change a file's entries; None takes one away."""
    path = folder / file
    content = {**json.loads(path.read_text()), **changes} if path.exists() else changes
    path.write_text(json.dumps({key: each for key, each in content.items() if each is not None}))
    return folder


def causal(folder: pathlib.Path) -> pathlib.Path:
    """A CrossEncoder that has the scores of the tokens "yes" and "no"."""
    plain(folder)
    edit(folder, "config.json", architectures=["Qwen3ForCausalLM"])
    return edit(folder, "config_sentence_transformers.json", model_type="CrossEncoder")


def sparse(folder: pathlib.Path) -> pathlib.Path:
    plain(folder, "BertForMaskedLM")
    modules = [MLMTransformer(str(folder)), SpladePooling()]
    SparseEncoder(modules=modules, device="cpu").save(str(folder / "saved"))
    return folder / "saved"


def multi_vector(folder: pathlib.Path) -> pathlib.Path:
    plain(folder)
    MultiVectorEncoder(str(folder), device="cpu").save(str(folder / "saved"))
    return folder / "saved"


def untyped(make: Callable[[pathlib.Path], pathlib.Path]) -> Callable[..., pathlib.Path]:
    """As versions before 5 saved it: without its type."""
    return lambda folder: edit(make(folder), "config_sentence_transformers.json", model_type=None)


def pylate(folder: pathlib.Path) -> pathlib.Path:
    tiny.save(folder)
    name = "config_sentence_transformers.json"
    return edit(folder, name, model_type=None, query_length=32, document_length=180)


def colbert(folder: pathlib.Path) -> pathlib.Path:
    return edit(plain(folder), "config.json", architectures=["HF_ColBERT"])


def generative(folder: pathlib.Path) -> pathlib.Path:
    torch.manual_seed(0)
    tokenizer, model = tiny.qwen3()
    transformers.Qwen3ForCausalLM(model.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def named(architecture: str) -> Callable[[pathlib.Path], pathlib.Path]:
    return lambda folder: edit(plain(folder), "config.json", architectures=[architecture])


CROSS, SPARSE, MULTI = "it is a CrossEncoder ", "it is a SparseEncoder ", "it is a multi-vector "
TEXT = "it is a model that generates text "


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (causal, CROSS),
        (sparse, SPARSE),
        (untyped(sparse), SPARSE),
        (multi_vector, MULTI),
        (untyped(multi_vector), MULTI),
        (pylate, MULTI),
        (colbert, MULTI),
        (named("ColPaliForRetrieval"), MULTI),
        (named("JinaForRanking"), "it is a reranker of a form of its own "),
        (named("BertForTokenClassification"), "it is a classifier of tokens "),
        (named("BertForQuestionAnswering"), "it is made for another task "),
        (generative, TEXT),
        (named("GPT2LMHeadModel"), TEXT),
        (named("T5ForConditionalGeneration"), TEXT),
    ],
)
def test_what_gives_no_vectors_is_refused_by_name(
    make: Callable[[pathlib.Path], pathlib.Path], says: str, tmp_path: pathlib.Path
) -> None:
    folder = make(tmp_path / "model")
    line = refusal(folder, tmp_path / "models")
    assert f": {says}" in line and "bake a SentenceTransformer model instead" in line


def test_what_was_trained_to_embed_by_its_last_token(tmp_path: pathlib.Path) -> None:
    folder = generative(tmp_path / "model")
    line = refusal(folder, tmp_path / "models")
    assert "say how with --pooling (most often lasttoken)" in line
    bundle = bake(folder, tmp_path / "models", *TORCH, "--pooling", "lasttoken")
    check(bundle, pooled(folder, "lasttoken"))


def pooled(folder: pathlib.Path, pooling: Any) -> Any:
    first = Transformer(str(folder))
    model = SentenceTransformer(modules=[first, Pooling(tiny.WIDTH, pooling)], device="cpu")
    return model.encode(tiny.TEXTS)


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
def test_without_pooling_the_mean_is_assumed_and_said(
    kind: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = plain(tmp_path / "model", kind)
    bundle = bake(folder, tmp_path / "models", *TORCH)
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert "it states no pooling: mean is assumed, as sentence-transformers does" in text
    check(bundle, pooled(folder, "mean"))


@pytest.mark.parametrize("pooling", ["cls", "max", "lasttoken", "mean"])
def test_the_pooling_that_was_asked_for(
    pooling: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = plain(tmp_path / "model")
    bundle = bake(folder, tmp_path / "models", *TORCH, "--pooling", pooling)
    assert "assumed" not in capsys.readouterr().out
    check(bundle, pooled(folder, pooling))


def test_a_model_s_own_pooling_is_kept(bare: pathlib.Path, tmp_path: pathlib.Path) -> None:
    line = refusal(bare, tmp_path / "models", "--pooling", "cls")
    assert line.endswith(": it has a pooling of its own; leave out --pooling")


def test_modules_without_pooling_can_be_given_one(tmp_path: pathlib.Path) -> None:
    plain(tmp_path / "plain")
    modules = [Transformer(str(tmp_path / "plain")), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "model"))
    line = refusal(tmp_path / "model", tmp_path / "models")
    assert line.endswith(": no module makes one vector of a text's tokens; say how with --pooling")
    bundle = bake(tmp_path / "model", tmp_path / "models", *TORCH, "--pooling", "cls")
    assert bundle.manifest.normalized
    expected = pooled(tmp_path / "plain", "cls")
    check(bundle, expected / np.linalg.norm(expected, axis=1)[:, None])


def routed(folder: pathlib.Path, after: bool = True) -> pathlib.Path:
    """A Router behind a shared transformer, or in front, with a prompt for queries."""
    torch.manual_seed(1)
    base = list(SentenceTransformer(str(tiny.save(folder.with_name("base"))), device="cpu"))[:2]
    other = list(SentenceTransformer(str(folder.with_name("base")), device="cpu"))[:2]
    heads = [[Dense(tiny.WIDTH, 24)], [Dense(tiny.WIDTH, 24)]]
    if after:
        modules = [*base, Router.for_query_document(*heads), Normalize()]
    else:
        both = [*base, *heads[0]], [*other, *heads[1]]
        modules = [Router.for_query_document(*both), Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu", prompts={"query": "query: "})
    model.save(str(folder), create_model_card=False)
    return folder


@pytest.mark.parametrize("after", [True, False])
def test_a_route_is_chosen_not_taken(
    after: bool, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = routed(tmp_path / "model", after)
    line = refusal(folder, tmp_path / "models")
    assert "it has a Router with the routes query, document: choose one with --route" in line
    line = refusal(folder, tmp_path / "models", "--route", "passage")
    assert "--route passage is none of them" in line
    model = SentenceTransformer(str(folder), device="cpu")
    for route, encode, engine in (
        ("query", model.encode_query, "openvino"),
        ("document", model.encode_document, "torch"),
    ):
        options = ("--route", route, "--name", route, "--engine", engine, *WINDOW)
        bundle = bake(folder, tmp_path / "models", *options)
        assert f"only its route {route} is baked" in capsys.readouterr().out
        assert serves(bundle, encode(tiny.TEXTS))


def test_a_route_of_a_model_without_any(bare: pathlib.Path, tmp_path: pathlib.Path) -> None:
    line = refusal(bare, tmp_path / "models", "--route", "query")
    assert line.endswith(": it has no routes; leave out --route")


def words(folder: pathlib.Path) -> pathlib.Path:
    tokenizer = WhitespaceTokenizer(["river", "rain", "days"])
    modules = [WordEmbeddings(tokenizer, np.eye(3, 8, dtype=np.float32)), Pooling(8)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    return folder


def bag(folder: pathlib.Path) -> pathlib.Path:
    modules = [BoW(["river", "rain", "days"]), Dense(3, 8)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    return folder


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (words, "it begins with WordEmbeddings (its modules: WordEmbeddings, Pooling), not with"),
        (bag, "it begins with BoW (its modules: BoW, Dense), not with a transformer or a table"),
    ],
)
def test_models_of_whole_words(
    make: Callable[[pathlib.Path], pathlib.Path], says: str, tmp_path: pathlib.Path
) -> None:
    line = refusal(make(tmp_path / "model"), tmp_path / "models")
    assert says in line and "distil it into a StaticEmbedding (model2vec)" in line


def picture_model(folder: pathlib.Path, model: Any, processor: Any) -> pathlib.Path:
    """As it is assembled for pictures alone."""
    model.save_pretrained(folder / "plain")
    processor.save_pretrained(folder / "plain")
    modules = [Transformer(str(folder / "plain")), Pooling(tiny.WIDTH, "cls")]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "saved"))
    return folder / "saved"


SEEING = {
    "hidden_size": tiny.WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


def vit(folder: pathlib.Path) -> pathlib.Path:
    model = transformers.ViTModel(transformers.ViTConfig(**SEEING, intermediate_size=64))
    size = {"height": 32, "width": 32}
    return picture_model(folder, model, transformers.ViTImageProcessorPil(size=size))


def dino(folder: pathlib.Path) -> pathlib.Path:
    model = transformers.Dinov2Model(transformers.Dinov2Config(**SEEING))
    size = {"height": 32, "width": 32}
    processor = transformers.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    return picture_model(folder, model, processor)


@pytest.mark.parametrize("make", [vit, dino])
def test_models_of_pictures_alone(
    make: Callable[[pathlib.Path], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    line = refusal(make(tmp_path / "model"), tmp_path / "models")
    assert ": it takes no texts (but image): not supported; bake a model of texts, or of" in line


def naflex(folder: pathlib.Path) -> pathlib.Path:
    """SigLIP 2 whose pictures keep their shapes."""
    words = tiny_clip.tokenizer()
    both = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    text = {"vocab_size": len(words), "projection_size": 64, "pad_token_id": 1, "eos_token_id": 1}
    config = transformers.Siglip2Config(
        text_config={**both, **text, "bos_token_id": 0, "num_hidden_layers": 1},
        vision_config={**both, "num_hidden_layers": 1, "num_patches": 16, "patch_size": 16},
    )
    transformers.Siglip2Model(config).save_pretrained(folder / "plain")
    processor = transformers.Siglip2ImageProcessorPil(patch_size=16, max_num_patches=16)
    transformers.Siglip2Processor(processor, words).save_pretrained(folder / "plain")
    first = Transformer(str(folder / "plain"))
    SentenceTransformer(modules=[first], device="cpu").save(str(folder / "saved"))
    return folder / "saved"


def test_pictures_that_keep_their_shapes(tmp_path: pathlib.Path) -> None:
    with pytest.raises(BakeError) as caught:
        read_processor(SentenceTransformer(str(naflex(tmp_path)), device="cpu"))
    assert str(caught.value) == (
        "its pictures keep their own shapes (NaFlex): not supported; bake a model whose pictures "
        "all get one shape, such as CLIP, or the variant of SigLIP 2 with a fixed resolution"
    )


def test_a_refusal_is_one_line_with_its_cause() -> None:
    openvino = (
        "Exception from src/inference/src/cpp/core.cpp:110:\nCheck 'a == b' failed at "
        "src/core/shape.cpp:12:\nWhile validating node 'opset1::Add':\nArgument shapes differ.\n"
    )
    assert one_line(RuntimeError(openvino)) == "Argument shapes differ"
    assert one_line(KeyError("size")) == "there is no 'size'"
    assert one_line(ValueError()) == "ValueError"
    told = "Please pass the argument `trust_remote_code=True`\nto run it"
    assert one_line(ValueError(told)) == "Please pass the argument --trust-remote-code to run it"
