"""What a SentenceTransformer computes of token ids and of pixels: for the torch engine, and for the
bake, which traces it.
"""

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import StaticEmbedding


class Pipeline(torch.nn.Module):
    """A SentenceTransformer's modules up to a trailing Normalize."""

    def __init__(self, model: SentenceTransformer, dtype: torch.dtype = torch.float32) -> None:
        """`dtype`: of the first module. The others (pooling and what follows) are cheap, and stay
        exact in float32.
        """
        super().__init__()
        parts = list(model)
        if isinstance(parts[-1], Normalize):
            del parts[-1]
        if isinstance(parts[0], StaticEmbedding):
            parts[0] = _Table(parts[0])
        for part in parts[1:]:
            part.float()
        self.parts, self.dtype = torch.nn.ModuleList(parts), dtype
        # CLIP pools at the first of its end tokens, and pads with the same token; which of several
        # equal values is the largest, a graph does not define. Nothing after the first end token
        # has any effect: clear it.
        self.end = model.tokenizer.eos_token_id if _model_type(model) == "clip" else None
        self.counts_positions = pools_at_the_end(model)
        # A StaticEmbedding's tokenizer has neither.
        self.pad_id = getattr(model.tokenizer, "pad_token_id", 0)
        side = getattr(model.tokenizer, "padding_side", "right")
        self.pad_left = self.counts_positions or side == "left"
        self.prompt_length = _prompt_left_out(model)

    def embed(self, features: dict[str, Any]) -> torch.Tensor:
        """The vectors of features that the first module takes."""
        return self.finish(self.parts[0](features))

    def finish(self, features: dict[str, Any]) -> torch.Tensor:
        """The vectors of features that the first module gave."""
        if self.dtype != torch.float32:
            for name in ("token_embeddings", "sentence_embedding"):
                if name in features:
                    features[name] = features[name].float()
        if self.prompt_length:
            features["prompt_length"] = self.prompt_length
        for part in self.parts[1:]:
            features = part(features)
        vectors: torch.Tensor = features["sentence_embedding"]
        return vectors

    def texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Both int64, shape (texts, length). Returns: shape (texts, dimensions)."""
        if self.end is not None:
            ends = (input_ids == self.end).long()
            input_ids = input_ids * (ends.cumsum(1) - ends < 1)
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.counts_positions:
            features["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return self.embed(features)

    def pictures(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Shape (pictures, 3, height, width). Returns: shape (pictures, dimensions)."""
        return self.embed({"pixel_values": pixel_values.to(self.dtype), "modality": "image"})


def pools_at_the_end(model: Any) -> bool:
    """Whether the text tower takes its last position for the text's vector, be it padding or not.

    SigLIP's does. Its vectors are right for a text alone; a batch gives the same when it is padded
    on the left, masked, and its positions count from the text's beginning.
    """
    return _model_type(model).startswith("siglip")


def _model_type(model: Any) -> str:
    """transformers' name of the architecture; empty for a StaticEmbedding."""
    return str(getattr(model.config, "model_type", ""))


def _prompt_left_out(model: Any) -> int:
    """How many tokens at a text's beginning the pooling leaves out: its bundle has one prompt."""
    prompt = model.prompts.get(model.default_prompt_name)
    if not prompt or all(getattr(part, "include_prompt", True) for part in model):
        return 0
    return int(model.preprocess(["a"], prompt=prompt)["prompt_length"])


class _Table(torch.nn.Module):
    """sentence-transformers' StaticEmbedding for padded texts: the mean of the tokens' vectors."""

    def __init__(self, static: StaticEmbedding) -> None:
        super().__init__()
        rows, width = static.embedding.weight.shape
        self.table = torch.nn.Embedding(rows, width, _weight=static.embedding.weight.detach())

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        mask = features["attention_mask"].unsqueeze(-1).to(self.table.weight.dtype)
        total = (self.table(features["input_ids"]) * mask).sum(1)
        return {"sentence_embedding": total / mask.sum(1).clamp(min=1)}
