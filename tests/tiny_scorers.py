"""Tiny rerankers and classifiers with random weights, as sentence-transformers and transformers
save them.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import tiny_models as tiny
import torch
import transformers
from sentence_transformers import CrossEncoder

# By name: what makes the tokenizer and the configuration, and transformers' class.
_KINDS: dict[str, tuple[Callable[[], tiny.Made], str]] = {
    "bert": (tiny.bert, "BertForSequenceClassification"),
    "roberta": (tiny.roberta, "RobertaForSequenceClassification"),
    "xlm_roberta": (tiny.xlm_roberta, "XLMRobertaForSequenceClassification"),
    "distilbert": (tiny.distilbert, "DistilBertForSequenceClassification"),
}
QUERY = "What is deep learning?"
DOCUMENTS = [*tiny.TEXTS, "Deep learning is what the mean of all the days learns."]


def plain(folder: pathlib.Path, kind: str = "bert", **config: Any) -> pathlib.Path:
    """Save a …ForSequenceClassification of transformers to `folder`.

    Args:
        config: further fields of its configuration, such as num_labels.
    """
    torch.manual_seed(0)
    make, name = _KINDS[kind]
    tokenizer, base = make()
    settings = base.config
    settings.update({"num_labels": 1, **config})
    model = getattr(transformers, name)(settings)
    tokenizer.model_max_length = tiny.WINDOW
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def cross_encoder(folder: pathlib.Path, kind: str = "bert", **config: Any) -> pathlib.Path:
    """Save a CrossEncoder of sentence-transformers to `folder`."""
    parts = plain(folder.with_name(folder.name + "-parts"), kind, **config)
    CrossEncoder(str(parts), device="cpu").save(str(folder))
    return folder
