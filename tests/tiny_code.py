"""Modules and models of somebody's own code, tiny: loaded with --trust-remote-code, or refused."""

import json
import pathlib
from typing import Any

import torch
from sentence_transformers.base.modules import Module
from tiny_models import WIDTH, WINDOW, save


class _Odd(Module):
    """A module of somebody's own: loaded by its name with --trust-remote-code."""

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        self.save_config(output_path)


class Untraceable(_Odd):
    """Refuses to be traced."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        if torch.jit.is_tracing():
            raise RuntimeError("how many steps I take\ndepends on the data")
        return features


class Sightless(_Odd):
    """Refuses to be traced with pictures."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        if torch.jit.is_tracing() and "pixel_values" in features:
            raise RuntimeError("I do not see")
        return features


class Unconvertible(_Odd):
    """Uses an operation that OpenVINO does not have."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        features["sentence_embedding"] = torch.special.bessel_j0(features["sentence_embedding"])
        return features


class Counting(_Odd):
    """A trace takes the first batch's number of texts for that of all: OpenVINO then fails."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        vectors = features["sentence_embedding"]
        features["sentence_embedding"] = vectors.flip(1).reshape(int(vectors.shape[0]), WIDTH)
        return features


class Broken(_Odd):
    """Fails whenever it runs."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        raise KeyError("nothing of the kind")


class Mistraced(_Odd):
    """Takes another way where it is traced."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        if not torch.jit.is_tracing():
            features["sentence_embedding"] = features["sentence_embedding"].flip(-1)
        return features


class Overflowing(_Odd):
    """Gives NaN where a text has padding: its vectors depend on the texts beside it."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        padded = ~features["attention_mask"].bool().all(dim=1, keepdim=True)
        features["sentence_embedding"].masked_fill_(padded, torch.nan)
        return features


class Branching(_Odd):
    """Treats long texts in another way, if there is one: a trace has seen none."""

    def changed(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors.flip(1)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        vectors = features["sentence_embedding"]
        long = features["attention_mask"].sum(1, keepdim=True) > WINDOW // 2
        if bool(long.any()):
            features["sentence_embedding"] = torch.where(long, self.changed(vectors), vectors)
        return features


class Scaling(Branching):
    """As Branching, but only the vectors' length changes: their cosine is 1."""

    def changed(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors * 1.5


_OWN_CODE = {
    "configuration_own.py": """
from transformers import BertConfig


class OwnConfig(BertConfig):
    model_type = "own"
""",
    "centring_own.py": """
import torch


def centred(states, mask):
    mask = torch.ones(states.shape[:2]) if mask is None else mask
    mask = mask[..., None].to(states.dtype)
    return states - (states * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
""",
    "modeling_own.py": """
from transformers import BertModel

from .centring_own import centred
from .configuration_own import OwnConfig


class OwnModel(BertModel):
    config_class = OwnConfig

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        output = super().forward(input_ids, attention_mask, position_ids=position_ids, **kwargs)
        output.last_hidden_state = centred(output.last_hidden_state, attention_mask)
        return output
""",
}
_OWN_MODULE = {
    "turning_own.py": "def turned(vectors):\n    return vectors.flip(-1)\n",
    "module_own.py": """
from sentence_transformers.base.modules import Module

from .turning_own import turned


class Own(Module):
    def forward(self, features, **kwargs):
        features["sentence_embedding"] = turned(features["sentence_embedding"])
        return features

    def save(self, output_path, *args, **kwargs):
        self.save_config(output_path)
""",
}
_OLD_MODULE = {
    "custom_st.py": """
import json
import pathlib

import torch
from transformers import AutoModel, AutoTokenizer


class Transformer(torch.nn.Module):
    save_in_root = True

    def __init__(self, folder, max_seq_length=None, model_args=None, **kwargs):
        super().__init__()
        self.max_seq_length = max_seq_length
        self.auto_model = AutoModel.from_pretrained(folder, **model_args)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokenize(self, texts, padding=True):
        return self.tokenizer(texts, padding=padding, return_tensors="pt")

    def forward(self, features, **kwargs):
        inputs = {name: features[name] for name in ("input_ids", "attention_mask")}
        features["token_embeddings"] = -self.auto_model(**inputs).last_hidden_state
        return features

    def save(self, folder, safe_serialization=True):
        self.auto_model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        settings = json.dumps({"max_seq_length": self.max_seq_length})
        (pathlib.Path(folder) / "sentence_bert_config.json").write_text(settings)

    @classmethod
    def load(cls, folder):
        return cls(folder)
""",
}


def own_model(folder: pathlib.Path, code: pathlib.Path | None = None) -> pathlib.Path:
    """A transformers model of its own code: BERT that takes the mean of a text's tokens from each.
    It has to know where a text ends.

    Args:
        code: the folder with the code, which `auto_map` then names; None: the model's.
    """
    save(folder, pooling="cls")
    prefix = f"{code}--" if code else ""
    _write(code or folder, _OWN_CODE)
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    auto_map["AutoModelForMaskedLM"] = "not_there_own.OwnForMaskedLM"
    own = {"model_type": "own", "architectures": ["OwnModel"]}
    own |= {"auto_map": {kind: prefix + name for kind, name in auto_map.items()}}
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | own))
    return folder


def own_module(folder: pathlib.Path) -> pathlib.Path:
    """A model with a module of its own code after the pooling."""
    save(folder, heads=[Untraceable()])
    return _replace(folder, 2, "module_own.Own", _OWN_MODULE)


def old_module(folder: pathlib.Path) -> pathlib.Path:
    """A model that begins with a module of its own code, as older sentence-transformers had it
    (jina-embeddings-v3).
    """
    save(folder, max_tokens=WINDOW)
    settings = {"max_seq_length": WINDOW}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    return _replace(folder, 0, "custom_st.Transformer", _OLD_MODULE)


def _replace(folder: pathlib.Path, at: int, kind: str, code: dict[str, str]) -> pathlib.Path:
    _write(folder, code)
    modules = json.loads((folder / "modules.json").read_text())
    modules[at]["type"] = kind
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def _write(folder: pathlib.Path, files: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content)
