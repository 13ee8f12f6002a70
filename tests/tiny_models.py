"""Tiny SentenceTransformers models with random weights, one architecture each, as their makers
assemble them: the tokenizer's kind, special tokens and padding side are the real ones'.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Module, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# Threads that spin for work as small as this cost ten times the work on shared cores.
torch.set_num_threads(1)

WIDTH = 32
WINDOW = 64
# Weights as large as this make attention sharp: vectors of different texts point elsewhere, and a
# wrong mask, position or padding shows.
SPREAD = 0.3

# From one token to nearly WINDOW.
TEXTS = [
    "a",
    "What is deep learning?",
    "Die Straßenbahn fährt heute nur bis zum Hauptbahnhof.",
    "naïve café — ½ ℃ 🚀👩‍👩‍👧‍👦",
    "機械学習モデルは規則性を見つけ出す。",
    "def mean(xs):\n    return sum(xs) / len(xs)  # all the days, as deep as the river, heavy rain",
]
CORPUS = [
    *TEXTS,
    "The river rose after three days of rain; the old bridge was closed to traffic.",
    "What does deep learning learn? What is the mean of all the days? query: passage:",
    "Поезд отправляется с третьего пути в половине восьмого утра.",
]

BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
Made = tuple[Any, Any]  # tokenizer, transformers model


def trained(kind: Any, specials: list[str], template: str | None = None, **options: Any) -> Any:
    """A tokenizer of class `kind` whose vocabulary is learnt from CORPUS."""
    backend = kind().backend_tokenizer
    if isinstance(backend.model, models.WordPiece):
        return kind(vocab=pieces(backend, specials), **options)
    trainer = backend.model.get_trainer()
    trainer.vocab_size, trainer.special_tokens = 700, specials
    trainer.show_progress = False
    if "ByteLevel" in str(backend.pre_tokenizer):
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    if hasattr(trainer, "unk_token"):
        trainer.unk_token = next(token for token in specials if "unk" in token.lower())
    # Word by word: Gemma's would learn a whole sentence as one token.
    backend.train_from_iterator([" " + word for text in CORPUS for word in text.split()], trainer)
    learnt = json.loads(backend.to_str())["model"]
    if isinstance(learnt["vocab"], list):
        options["vocab"] = [tuple(piece) for piece in learnt["vocab"]]
    else:
        options["vocab"] = learnt["vocab"]
    if "merges" in learnt:
        options["merges"] = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = kind(**options)
    if template:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template,
            special_tokens=[
                (token, tokenizer.convert_tokens_to_ids(token))
                for token in template.split()
                if token != "$A"
            ],
        )
    return tokenizer


def pieces(backend: Tokenizer, specials: list[str]) -> dict[str, int]:
    """A vocabulary for WordPiece: CORPUS's words in parts of four characters, and each character.

    WordPiece's trainer makes another one each time, as it takes what is as frequent in any order;
    and the same weights with another vocabulary are another model.
    """
    found = set()
    for text in CORPUS:
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(
            backend.normalizer.normalize_str(text)
        ):
            for size in (1, 4):
                parts = [word[at : at + size] for at in range(0, len(word), size)]
                found |= {parts[0], *(f"##{part}" for part in parts[1:])}
    return {token: number for number, token in enumerate([*specials, *sorted(found)])}


def byte_level(**tokens: str) -> Any:
    """ModernBERT's tokenizer: byte-level BPE with BERT's special tokens, of no class of its own."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=BERT_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        **tokens,
    )


def sizes(tokenizer: Any, positions: int = WINDOW, **options: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": positions,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": SPREAD,
        **options,
    }


def bert(tokenizer: Any = None) -> Made:
    tokenizer = tokenizer or trained(transformers.BertTokenizer, BERT_TOKENS)
    return tokenizer, transformers.BertModel(transformers.BertConfig(**sizes(tokenizer)))


def coarse_bert() -> Made:
    """Its first feature is always 0: what a head that weighs it by much makes of it, only int8
    changes.
    """
    tokenizer, model = bert()
    norm = model.encoder.layer[-1].output.LayerNorm
    with torch.no_grad():
        norm.weight[0] = norm.bias[0] = 0
    return tokenizer, model


def coarse_head() -> Dense:
    """int8 has one scale a row: next to a weight of 1000 the others are rounded to nothing."""
    weight = torch.rand(24, WIDTH, generator=torch.Generator().manual_seed(0)) - 0.5
    weight[:, 0] = 1000
    return Dense(WIDTH, 24, bias=False, activation_function=None, init_weight=weight)


def roberta(**options: Any) -> Made:
    tokenizer = trained(transformers.RobertaTokenizer, ROBERTA_TOKENS, **options)
    # Position ids start at pad_token_id + 1: two rows of the table are never used.
    config = transformers.RobertaConfig(**sizes(tokenizer, WINDOW + 2))
    return tokenizer, transformers.RobertaModel(config)


def roberta_left() -> Made:
    """Its positions count what is not the pad token: on the left, a wrong pad id moves them all."""
    return roberta(padding_side="left")


def xlm_roberta() -> Made:
    tokenizer = trained(transformers.XLMRobertaTokenizer, ROBERTA_TOKENS)
    config = transformers.XLMRobertaConfig(**sizes(tokenizer, WINDOW + 2))
    return tokenizer, transformers.XLMRobertaModel(config)


def mpnet() -> Made:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"]
    tokenizer = trained(transformers.MPNetTokenizer, tokens)
    config = transformers.MPNetConfig(**sizes(tokenizer, WINDOW + 2))
    return tokenizer, transformers.MPNetModel(config)


def distilbert() -> Made:
    tokenizer = trained(transformers.BertTokenizer, BERT_TOKENS)
    config = transformers.DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=WIDTH,
        hidden_dim=64,
        n_layers=2,
        n_heads=2,
        max_position_embeddings=WINDOW,
        initializer_range=SPREAD,
    )
    return tokenizer, transformers.DistilBertModel(config)


def fnet() -> Made:
    """It mixes all positions, and knows no mask."""
    tokenizer = trained(transformers.BertTokenizer, BERT_TOKENS)
    return tokenizer, transformers.FNetModel(transformers.FNetConfig(**sizes(tokenizer)))


def modernbert() -> Made:
    tokenizer = byte_level(pad_token="[PAD]")
    marks = dict(bos_token_id=2, cls_token_id=2, eos_token_id=3, sep_token_id=3)
    config = transformers.ModernBertConfig(
        **sizes(tokenizer), **marks, local_attention=16, global_attn_every_n_layers=2
    )
    return tokenizer, transformers.ModernBertModel(config)


def deberta() -> Made:
    tokens = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    tokenizer = trained(transformers.DebertaV2Tokenizer, tokens)
    config = transformers.DebertaV2Config(  # as microsoft/deberta-v3-base
        **sizes(tokenizer),
        type_vocab_size=0,
        relative_attention=True,
        position_biased_input=False,
        position_buckets=16,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
    )
    return tokenizer, transformers.DebertaV2Model(config)


def t5() -> Made:
    tokenizer = trained(transformers.T5Tokenizer, ["<pad>", "</s>", "<unk>"], extra_ids=0)
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2
    )
    config.architectures = ["T5EncoderModel"]
    return tokenizer, transformers.T5EncoderModel(config)


def qwen3() -> Made:
    """As Qwen3-Embedding: causal, padded on the left, <|endoftext|> after the text."""
    tokenizer = trained(
        transformers.Qwen2Tokenizer,
        ["<|endoftext|>", "<|im_end|>"],
        template="$A <|endoftext|>",
        padding_side="left",
    )
    config = transformers.Qwen3Config(**sizes(tokenizer), num_key_value_heads=1, head_dim=16)
    return tokenizer, transformers.Qwen3Model(config)


def gemma3(bidirectional: bool = False, padding_side: str = "left") -> Made:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = trained(
        transformers.GemmaTokenizer,
        ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *byte_tokens],
        template="<bos> $A <eos>",
        padding_side=padding_side,
    )
    config = transformers.Gemma3TextConfig(
        **sizes(tokenizer),
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        use_bidirectional_attention=bidirectional,
    )
    return tokenizer, transformers.Gemma3TextModel(config)


def embedding_gemma() -> Made:
    """Gemma3 that looks both ways, padded on the right."""
    return gemma3(bidirectional=True, padding_side="right")


def save(
    folder: pathlib.Path,
    make: Callable[[], Made] = bert,
    pooling: Any = "mean",
    *,
    heads: Sequence[Module] = (),
    width: int = WIDTH,
    normalize: bool = True,
    include_prompt: bool = True,
    max_tokens: int | None = None,
    prompts: dict[str, str] | None = None,
    default_prompt: str | None = None,
) -> pathlib.Path:
    """Assemble a model of some width and save it to `folder`. `heads` go between pooling and
    Normalize.
    """
    torch.manual_seed(0)
    tokenizer, model = make()
    if max_tokens is not None:
        tokenizer.model_max_length = max_tokens
    parts = folder.with_name(folder.name + "-parts")
    model.save_pretrained(parts)
    tokenizer.save_pretrained(parts)
    modules = [
        Transformer(str(parts)),
        Pooling(width, pooling, include_prompt=include_prompt),
        *heads,
        *([Normalize()] if normalize else []),
    ]
    SentenceTransformer(
        modules=modules, device="cpu", prompts=prompts, default_prompt_name=default_prompt
    ).save(str(folder), create_model_card=False)
    return folder
