"""bake/kinds.py: what is refused by name, and what is decided where a model leaves it open."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
import transformers
from baking import bake, cosines, embed, refusal, serving
from safetensors.numpy import save_file
from sentence_transformers import (
    CrossEncoder,
    MultiVectorEncoder,
    SentenceTransformer,
    SparseEncoder,
)
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import (
    CNN,
    BoW,
    Pooling,
    StaticEmbedding,
    WordEmbeddings,
)
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling
from test_bake_torch import TORCH, check

from embeddings import TextEmbedder
from engine.bundle import Bundle
from engine.queue import Queue
from engine.torch_engine import TorchTextEngine, open_model
from limits import TextLimits
from tokens import load_tokenizer

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


def cross_encoder(folder: pathlib.Path) -> pathlib.Path:
    plain(folder, "BertForSequenceClassification")
    CrossEncoder(str(folder), device="cpu").save(str(folder / "saved"))
    return folder / "saved"


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
        (cross_encoder, CROSS),
        (sparse, SPARSE),
        (untyped(sparse), SPARSE),
        (multi_vector, MULTI),
        (untyped(multi_vector), MULTI),
        (pylate, MULTI),
        (colbert, MULTI),
        (named("ColPaliForRetrieval"), MULTI),
        (named("BertForSequenceClassification"), "it is a classifier or reranker "),
        (named("XLMRobertaForSequenceClassification"), "it is a classifier or reranker "),
        (named("JinaForRanking"), "it is a classifier or reranker "),
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
    for route, encode in (("query", model.encode_query), ("document", model.encode_document)):
        options = ("--route", route, "--name", route, *WINDOW)
        for more in ((), TORCH):
            bundle = bake(folder, tmp_path / "models", *options, *more)
            assert f"only its route {route} is baked" in capsys.readouterr().out
            assert same(bundle, encode(tiny.TEXTS))


def test_a_route_of_a_model_without_any(bare: pathlib.Path, tmp_path: pathlib.Path) -> None:
    line = refusal(bare, tmp_path / "models", "--route", "query")
    assert line.endswith(": it has no routes; leave out --route")


def same(bundle: Bundle, expected: Any, prompt: str | None = None) -> bool:
    """Whether what is served of tiny.TEXTS, in company and alone, is `expected`."""
    if not bundle.manifest.torch:
        with serving(bundle) as (embedder, _):
            return agree(embedder, expected, prompt)
    tokenizer, _, _ = load_tokenizer(bundle)
    engine = TorchTextEngine(open_model(bundle, device="cpu", precision="fp32", threads=1))
    queue = Queue(max_batch_size=64, max_batch_tokens=4096, max_queue_tokens=1 << 30, threads=1)
    queue.start()
    try:
        embedder = TextEmbedder(bundle, tokenizer, engine, queue, TextLimits())
        return agree(embedder, expected, prompt)
    finally:
        queue.close()


def agree(embedder: TextEmbedder, expected: Any, prompt: str | None) -> bool:
    company = embed(embedder, tiny.TEXTS, prompt)
    alone = np.concatenate([embed(embedder, [text], prompt) for text in tiny.TEXTS])
    return all(cosines(vectors, expected).min() >= 0.9999 for vectors in (company, alone))


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


@pytest.mark.parametrize("make", [static, model2vec, headed_static])
@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_a_table_of_tokens_is_served(
    make: Callable[[pathlib.Path], pathlib.Path], engine: str, tmp_path: pathlib.Path
) -> None:
    folder = make(tmp_path / "model")
    bundle = bake(folder, tmp_path / "models", "--engine", engine)
    assert bundle.manifest.max_tokens == 8192
    assert same(bundle, SentenceTransformer(str(folder), device="cpu").encode(tiny.TEXTS))


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
    for name in ("query", "document"):
        options = ("--default-prompt", name, "--name", name, "--engine", engine, *WINDOW)
        bundle = bake(folder, tmp_path / "models", *options)
        assert [*bundle.manifest.prompts] == [name]
        expected = model.encode(tiny.TEXTS, prompt_name=name)
        assert same(bundle, expected) and same(bundle, expected, name)
        included = SentenceTransformer(str(folder), device="cpu")
        included[1].include_prompt = True
        other = included.encode(tiny.TEXTS, prompt_name=name)
        assert (cosines(other, expected).min() < 0.9999) == (name == "query")


def test_without_any_prompt_nothing_is_left_out(tmp_path: pathlib.Path) -> None:
    folder = without_prompt(tmp_path / "model")
    bundle = bake(folder, tmp_path / "models")
    assert same(bundle, SentenceTransformer(str(folder), device="cpu").encode(tiny.TEXTS))


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
        assert same(bake(folder, tmp_path / "models", *WINDOW, *more), expected)


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
        assert same(bundle, expected)
        assert not list(bundle.path.rglob("adapter*"))


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


def convbert() -> tiny.Made:
    tokenizer = tiny.trained(transformers.BertTokenizer, tiny.BERT_TOKENS)
    sizes = tiny.sizes(tokenizer, embedding_size=tiny.WIDTH, head_ratio=2)
    return tokenizer, transformers.ConvBertModel(transformers.ConvBertConfig(**sizes))


def fnet() -> tiny.Made:
    """It mixes all positions, and knows no mask."""
    tokenizer = tiny.trained(transformers.BertTokenizer, tiny.BERT_TOKENS)
    sizes = tiny.sizes(tokenizer)
    return tokenizer, transformers.FNetModel(transformers.FNetConfig(**sizes))


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
        lambda folder: tiny.save(folder, fnet),
    ],
    ids=["cnn", "convbert", "fnet"],
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


def test_a_wrong_trace_says_that_torch_needs_none(tmp_path: pathlib.Path) -> None:
    folder = tiny.save(tmp_path / "model", longformer)
    line = refusal(folder, tmp_path / "models", *WINDOW)
    assert line.endswith(" where a trace cannot follow: --engine torch runs it untraced")
    bundle = bake(folder, tmp_path / "models", *WINDOW, *TORCH)
    check(bundle, SentenceTransformer(str(folder), device="cpu").encode(tiny.TEXTS))
