"""Models with random weights and the shapes of well-known ones, in folders as the hub has them."""

import json
import pathlib
import sys
from typing import Any, Literal, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from loadtest.loads import LOADS, texts

VOCABULARY = 4000  # entries of the byte-level tokenizer that is learnt here, of generated text
Row = dict[str, Any]
ROPE = 1_000_000.0
END = "<|endoftext|>"


class Shape(NamedTuple):
    pooling: Literal["mean", "cls", "lasttoken"]
    sizes: dict[str, int]
    window: int = 512  # tokens
    normalize: bool = True
    causal: bool = False


def _bert(layers: int, hidden: int, heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }


QWEN3 = {
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151_669,
    "max_position_embeddings": 32_768,
}
SHAPES = {
    "minilm-l6": Shape("mean", _bert(6, 384, 12)),
    "e5-base": Shape("mean", _bert(12, 768, 12)),
    "mxbai-large": Shape("cls", _bert(24, 1024, 16), normalize=False),
    "qwen3-0.6b": Shape("lasttoken", QWEN3, window=1024, causal=True),
}
# Instead of the shape's own: everything can be tried in seconds on a CPU.
TINY = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
TINY_QWEN3 = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "vocab_size": 4000}


def make(folder: pathlib.Path, name: str, word_pieces: pathlib.Path, tiny: bool = False) -> None:
    """Write one model.

    Args:
        name: of SHAPES.
        word_pieces: BERT's tokenizer.json.
    """
    import torch
    import transformers

    shape = SHAPES[name]
    sizes = shape.sizes | (TINY if tiny else {})
    torch.manual_seed(0)
    if shape.causal:
        sizes |= TINY_QWEN3 if tiny else {}
        config = transformers.Qwen3Config(**sizes, rope_theta=ROPE)
        model: Any = transformers.Qwen3Model(config).to(torch.bfloat16)
        tokenizer = learn_bytes()
    else:
        tokenizer = Tokenizer.from_file(str(word_pieces))
        vocabulary = tokenizer.get_vocab_size()
        model = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=vocabulary))
    model.save_pretrained(folder)
    if shape.causal:  # where transformers 4 looks for it
        saved = json.loads((folder / "config.json").read_bytes())
        (folder / "config.json").write_text(json.dumps({**saved, "rope_theta": ROPE}, indent=1))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.save(str(folder / "tokenizer.json"))
    for file, content in _descriptions(shape, sizes["hidden_size"]).items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(content, indent=1))


def learn_bytes() -> Tokenizer:
    """Qwen's kind of tokenizer, with a vocabulary learnt from generated text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    source = texts(LOADS["passage"], seed=0)
    tokenizer.train_from_iterator((next(source) for _ in range(1000)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer


def _descriptions(shape: Shape, dimensions: int) -> dict[str, Any]:
    """The files beside weights and tokenizer, with the names that models on the hub have in them:
    old and new releases of sentence-transformers read them.
    """
    if shape.causal:
        special: Row = {
            "tokenizer_class": "Qwen2Tokenizer",
            "padding_side": "left",
            "eos_token": END,
        }
        special |= {"pad_token": END, "unk_token": None}
    else:
        special = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "unk_token": "[UNK]"}
        special |= {f"{each}_token": f"[{each.upper()}]" for each in ("pad", "cls", "sep", "mask")}
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modes = {"cls": "cls_token", "mean": "mean_tokens", "lasttoken": "lasttoken"}
    return {
        "tokenizer_config.json": {**special, "model_max_length": shape.window},
        "sentence_bert_config.json": {"max_seq_length": shape.window, "do_lower_case": False},
        "modules.json": [
            {
                "idx": at,
                "name": str(at),
                "path": path,
                "type": f"sentence_transformers.models.{kind}",
            }
            for at, (path, kind) in enumerate(modules[: 3 if shape.normalize else 2])
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": dimensions,
            **{f"pooling_mode_{mode}": mode == modes[shape.pooling] for mode in modes.values()},
        },
    }


if __name__ == "__main__":  # FOLDER NAME WORD_PIECES [tiny]
    make(pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]), "tiny" in sys.argv[4:])
