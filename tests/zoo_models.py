"""Architectures for tests/zoo_kinds.py, tiny, with random weights and their makers' tokenizers."""

import json
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import test_bake_kinds_served as served
import tiny_models as tiny
import torch
import transformers
from conftest import packaged
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import (
    CNN,
    LSTM,
    Pooling,
    WeightedLayerPooling,
)

Encode = Callable[[Any, str], Any]

WIDTH, WINDOW = 64, tiny.WINDOW  # heads of 32: the least that the service's own engine takes
SIZES = {"hidden_size": WIDTH, "intermediate_size": 128, "initializer_range": 0.2}
# A model of RoBERTa's kin does not use the positions up to its padding's id.
ROBERTA_POSITIONS = WINDOW + 2
POOL_LAST = {"pooling": "lasttoken"}
UNSTATED = ("--max-tokens", str(WINDOW))  # for a model that states no window


@dataclass(frozen=True)
class Kind:
    """A kind of model: how it is made, and how it is baked."""

    make: Callable[[pathlib.Path], pathlib.Path]  # into a folder, which may hold others beside it
    options: Sequence[str] = ()
    # sentence-transformers' vector of one text as the bundle should give it; None where that takes
    # more than the model as it is.
    encode: Encode | None = lambda model, text: model.encode(text)


# -- tokenizers, as the makers of the architectures have them


def wordpiece() -> Any:
    return tiny.trained(transformers.BertTokenizer, tiny.BERT_TOKENS)


def unigram() -> Any:
    return tiny.trained(transformers.XLMRobertaTokenizer, tiny.ROBERTA_TOKENS)


def byte_pairs() -> Any:
    return tiny.trained(transformers.RobertaTokenizer, tiny.ROBERTA_TOKENS)


def gpt2() -> Any:
    return tiny.trained(transformers.GPT2Tokenizer, ["<|endoftext|>"])


def neox() -> Any:
    return tiny.trained(transformers.GPTNeoXTokenizer, ["<|endoftext|>", "<|padding|>"])


def opt() -> Any:
    """Of OPT: </s> begins a text."""
    special = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return tiny.trained(
        transformers.GPT2Tokenizer, ["</s>", "<pad>", "<unk>"], template="</s> $A", **special
    )


def llama() -> Any:
    """Without a token to pad with, as published."""
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    return tiny.trained(
        transformers.LlamaTokenizer, ["<unk>", "<s>", "</s>", *letters], template="<s> $A"
    )


def qwen() -> Any:
    return tiny.qwen3()[0]


def gemma() -> Any:
    return tiny.gemma3()[0]


def t5() -> Any:
    return tiny.trained(transformers.T5Tokenizer, ["<pad>", "</s>", "<unk>"], extra_ids=0)


def modernbert() -> Any:
    return tiny.byte_level(pad_token="[PAD]")


def albert() -> Any:
    tokens = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    return tiny.trained(transformers.AlbertTokenizer, tokens)


def camembert() -> Any:
    tokens = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>"]
    return tiny.trained(
        transformers.CamembertTokenizer, [*tokens, "<mask>"], template="<s> $A </s>"
    )


def deberta() -> Any:
    tokens = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    return tiny.trained(transformers.DebertaTokenizer, tokens, template="[CLS] $A [SEP]")


def big_bird() -> Any:
    tokens = ["<pad>", "</s>", "<s>", "<unk>", "[SEP]", "[CLS]", "[MASK]"]
    return tiny.trained(transformers.BigBirdTokenizer, tokens, template="[CLS] $A [SEP]")


def rembert() -> Any:
    tokens = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    return tiny.trained(transformers.RemBertTokenizer, tokens, template="[CLS] $A [SEP]")


def funnel() -> Any:
    tokens = ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>", "<s>", "</s>"]
    return tiny.trained(transformers.FunnelTokenizer, tokens)


def xlnet() -> Any:
    """It pads on the left and ends a text with <sep> <cls>."""
    tokens = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>"]
    return tiny.trained(
        transformers.XLNetTokenizer, tokens, template="$A <sep> <cls>", padding_side="left"
    )


# -- architectures


def transformer(name: str, words: Callable[[], Any], /, **options: Any) -> Callable[[], tiny.Made]:
    """`name`Model with the sizes of this file and `options` of its configuration."""

    def make() -> tiny.Made:
        tokenizer = words()
        sizes = {**tiny.sizes(tokenizer, **SIZES), **options}
        config = getattr(transformers, f"{name}Config")(**sizes)
        return tokenizer, uneven(getattr(transformers, f"{name}Model")(config))

    return make


def uneven(model: Any) -> Any:
    """OpenVINO leaves out biases of 0 and gains of 1, which trained models do not have."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def saved(make: Callable[[], tiny.Made], **options: Any) -> Callable[[pathlib.Path], pathlib.Path]:
    """A SentenceTransformer of it: as tiny.save saves it. `heads` are made when it is."""
    heads = options.pop("heads", list)

    def save(folder: pathlib.Path) -> pathlib.Path:
        torch.manual_seed(0)
        width = options.get("width", WIDTH)
        return tiny.save(folder, make, **{**options, "heads": heads(), "width": width})

    return save


def of(name: str, words: Callable[[], Any], *bake: str, save: Any = {}, **options: Any) -> Kind:
    """A Kind of an architecture, pooled by the mean and normalised unless `save` says otherwise."""
    return Kind(saved(transformer(name, words, **options), **save), bake)


def causal(name: str, words: Callable[[], Any], *bake: str, **options: Any) -> Kind:
    """A Kind of a model that generates text, pooled at the last token."""
    # sentence-transformers embeds nothing with a tokenizer that has no padding token.
    encode = Kind.encode if words in (qwen, gemma, opt) else None
    make = transformer(name, words, **options)
    return Kind(saved(make, **POOL_LAST), bake, encode)


def pooled(pooling: Any, **options: Any) -> Kind:
    """BERT with another pooling or other modules."""
    return Kind(saved(transformer("Bert", wordpiece), pooling=pooling, **options))


BERT = transformer("Bert", wordpiece)
ROBERTA = transformer("Roberta", byte_pairs, max_position_embeddings=ROBERTA_POSITIONS)
T5 = {"d_model": WIDTH, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2}
BART = {
    "d_model": WIDTH,
    "init_std": 0.2,
    **{
        f"{part}_{size}": 2
        for part in ("encoder", "decoder")
        for size in ("layers", "attention_heads")
    },
    **{f"{part}_ffn_dim": 128 for part in ("encoder", "decoder")},
}
GPT = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": WINDOW}
GROUPED = {"num_key_value_heads": 1}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}


def t5_encoder(name: str, words: Callable[[], Any] = t5, **options: Any) -> Kind:
    """The encoder alone, which is what sentence-transformers loads of it."""

    def make() -> tiny.Made:
        tokenizer = words()
        sizes = {**T5, "vocab_size": len(tokenizer), **options}
        config = getattr(transformers, f"{name}Config")(**sizes)
        config.architectures = [f"{name}EncoderModel"]
        return tokenizer, getattr(transformers, f"{name}EncoderModel")(config)

    return Kind(saved(make), UNSTATED)


def sized(name: str, words: Callable[[], Any], **options: Any) -> Kind:
    """A Kind of an architecture whose configuration takes only its own names of sizes."""

    def make() -> tiny.Made:
        tokenizer = words()
        sizes = {"vocab_size": len(tokenizer), "d_model": WIDTH, "n_head": 2, "d_inner": 128}
        config = getattr(transformers, f"{name}Config")(**sizes, **options)
        return tokenizer, getattr(transformers, f"{name}Model")(config)

    return Kind(saved(make), UNSTATED)


def bert_generation() -> tiny.Made:
    tokenizer = wordpiece()
    config = transformers.BertGenerationConfig(**tiny.sizes(tokenizer, **SIZES))
    return tokenizer, transformers.BertGenerationEncoder(config)


def canine() -> tiny.Made:
    config = transformers.CanineConfig(**SIZES, num_hidden_layers=2, num_attention_heads=2)
    return transformers.CanineTokenizer(), transformers.CanineModel(config)


def bytes_t5() -> Any:
    return transformers.ByT5Tokenizer()


def layered(folder: pathlib.Path) -> pathlib.Path:
    """A weighted mean of all layers' tokens."""
    tiny.save(folder.with_name("base"), BERT, width=WIDTH)
    options = {"config_kwargs": {"output_hidden_states": True}}
    first = Transformer(str(folder.with_name("base")), **options)
    modules = [first, WeightedLayerPooling(WIDTH, 2, 0), Pooling(WIDTH)]
    return whole(folder, modules)


def recurrent(folder: pathlib.Path) -> pathlib.Path:
    first = Transformer(str(tiny.save(folder.with_name("base"), BERT, width=WIDTH)))
    return whole(folder, [first, LSTM(WIDTH, 32), Pooling(WIDTH)])


def convolving(folder: pathlib.Path) -> pathlib.Path:
    first = Transformer(str(tiny.save(folder.with_name("base"), BERT, width=WIDTH)))
    return whole(folder, [first, CNN(WIDTH, 16, [1, 3, 5]), Pooling(48)])


def whole(folder: pathlib.Path, modules: Sequence[Any], **options: Any) -> pathlib.Path:
    model = SentenceTransformer(modules=modules, device="cpu", **options)
    model.save(str(folder), create_model_card=False)
    return folder


def real(folder: pathlib.Path) -> pathlib.Path:
    return packaged()


def large(folder: pathlib.Path, layers: int = 24) -> pathlib.Path:
    """BGE-M3's shape: 568 million weights. It takes a minute and 5 GB to make."""
    tokenizer = unigram()
    pieces = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    pieces = [tuple(piece) for piece in pieces]
    pieces[4:4] = [(f"▁{number:06x}", -20.0) for number in range(250_001 - len(pieces))]
    tokenizer = transformers.XLMRobertaTokenizer(vocab=pieces, model_max_length=8192)
    config = transformers.XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=8194,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    model = uneven(transformers.XLMRobertaModel(config, add_pooling_layer=False))
    return tiny.save(folder, lambda: (tokenizer, model), "cls", width=1024)


QUERY = {"query": "query: ", "passage": "passage: "}
ROUTE = ("--route", "query", *UNSTATED)
PROMPT = ("--default-prompt", "query", *UNSTATED)


def instructed(folder: pathlib.Path) -> pathlib.Path:
    return served.without_prompt(folder, make=BERT, width=WIDTH, prompts=QUERY)


def with_prompt(model: Any, text: str) -> Any:
    return model.encode(text, prompt_name="query")


def as_query(model: Any, text: str) -> Any:
    return model.encode_query(text)


def head() -> list[Any]:
    return [Dense(WIDTH, 48)]
