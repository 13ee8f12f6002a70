"""Texts of different lengths side by side in one row, without padding, for the torch engine.

A transformer treats every token by itself, except in attention. So a batch may be one row of all
texts' tokens, if positions count from each text's beginning and attention stays within each text.
transformers lets an attention function be registered that does so ("attention interface"); it
hands no mask to it.
"""

import inspect
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

ATTENTION = "packed"  # what the attention function is called in transformers
TOKENS = "token_embeddings"  # and the transformer's result in sentence-transformers
_FLASH_DTYPES = (torch.float16, torch.bfloat16)


class Texts(NamedTuple):
    """Where the texts of a row are."""

    ends: torch.Tensor  # int32, shape (texts + 1,): 0, and where each text ends
    longest: int  # no text has more tokens
    lengths: list[int]


_row = threading.local()  # its `texts` are those of the call that this thread computes


def can_pack(model: Any) -> bool:
    """Whether the texts of a SentenceTransformer may be computed so, by its architecture. Whether
    its vectors stay the same has to be measured.
    """
    first, *others = model
    return (
        isinstance(first, Transformer)
        and first.modality_config.get("text", {}).get("method") == "forward"
        and first.module_output_name == TOKENS
        and first.model.is_backend_compatible()
        and "position_ids" in inspect.signature(first.model.forward).parameters
        and all(type(module) in (Pooling, Dense, Normalize) for module in others)
    )


def flash_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device has the attention kernel for texts of different lengths."""
    return (
        device.type == "cuda"
        and dtype in _FLASH_DTYPES
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


class Row(NamedTuple):
    """Texts side by side, on a device."""

    tokens: torch.Tensor  # int64, shape (3, 1, tokens): ids, positions, each token's text
    texts: Texts


class Packer:
    """Runs the transformer of a SentenceTransformer for texts in one row."""

    def __init__(self, transformer: Transformer, pad_id: int, window: int) -> None:
        """`window`: tokens of the longest text. Raises: ValueError when transformers cannot give
        the model another attention.
        """
        transformer.model.set_attn_implementation(ATTENTION)
        self.transformer, self.pad_id, self.window = transformer, pad_id, window
        self._first = _first_position(transformer.model)

    def arrays(self, inputs: Sequence[Any], tokens: int = 0, texts: int = 0) -> tuple[Any, Any]:
        """What makes a Row of token ids, each int64 of shape (length,). To have at least `tokens`
        and `texts`, it is filled up with a text of padding and with empty ones.

        Returns: the tokens, and where each text ends, as NumPy arrays.
        """
        lengths = np.array([len(ids) for ids in inputs])
        used, number = int(lengths.sum()), len(inputs)
        ends = np.full(max(texts, number) + 1, max(tokens, used), np.int32)
        ends[: number + 1] = 0, *np.cumsum(lengths)
        row = np.full((3, 1, ends[-1]), [[[self.pad_id]], [[self._first]], [[number]]], np.int64)
        np.concatenate(inputs, out=row[0, 0, :used])
        row[1, 0, :used] = self._positions(row[0, 0, :used], np.repeat(ends[:number], lengths))
        row[2, 0, :used] = np.repeat(np.arange(number), lengths)
        return row, ends

    def _positions(self, ids: Any, starts: Any) -> Any:
        """Of tokens; `starts`: where the text of each begins."""
        places = np.arange(len(ids)) - starts
        if self._first == 0:
            return places
        # RoBERTa: a padding token has its own id as its position, wherever it is in a text, and is
        # not counted.
        padding = ids == self._first - 1
        before = np.concatenate([[0], np.cumsum(padding)])
        counted = places - (before[:-1] - before[starts])
        return np.where(padding, self._first - 1, counted + self._first)

    def run(self, row: Row) -> Any:
        """What the transformer makes of the tokens, shape (1, tokens, width)."""
        _row.texts = row.texts
        try:
            ids, positions, _ = row.tokens
            features = self.transformer({"input_ids": ids, "position_ids": positions})
        finally:
            del _row.texts
        return features[TOKENS]

    def __call__(self, inputs: Sequence[Any], device: torch.device) -> dict[str, Any]:
        """The features of texts for sentence-transformers' Pooling, see `features`."""
        tokens, ends = self.arrays(inputs)
        longest = max(len(ids) for ids in inputs)
        texts = Texts(to_device(ends, device), longest, np.diff(ends).tolist())
        row = Row(to_device(tokens, device), texts)
        return features(self.run(row), row, len(inputs), ends[-1])


def features(embeddings: torch.Tensor, row: Row, texts: int, tokens: int) -> dict[str, Any]:
    """What sentence-transformers' Pooling takes for texts without padding: the first `texts` of a
    row, which have `tokens` together.

    Args:
        embeddings: what the transformer made of the row.
    """
    return {
        TOKENS: embeddings[:, :tokens],
        "cu_seq_lens_q": row.texts.ends[: texts + 1],
        "seq_idx": row.tokens[2, :, :tokens],
    }


def to_device(array: "np.ndarray[Any, Any]", device: torch.device) -> torch.Tensor:
    """A copy on the device. The GPU fetches it by itself while this thread goes on."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _first_position(model: torch.nn.Module) -> int:
    """Of a text's first token. RoBERTa and its kin count from the padding's id + 1; theirs is the
    learned table beside a padding index.
    """
    for module in model.modules():
        padding = getattr(module, "padding_idx", None)
        table = getattr(module, "position_embeddings", None)
        if isinstance(padding, int) and isinstance(table, torch.nn.Embedding):
            return padding + 1
    return 0


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each text, as transformers' attention interface.

    Args:
        query, key, value: shape (1, heads, tokens, width); key and value may have fewer heads.
        sliding_window: as transformers hands it to FlashAttention: a token sees this many tokens to
            each side, itself among them.

    Returns: shape (1, tokens, heads, width).
    Raises: NotImplementedError for an option that changes the result.
    """
    unknown = [
        name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None
    ]
    if attention_mask is not None or unknown:
        raise NotImplementedError(f"packed attention with {unknown or 'a mask'}")
    causal = bool(module.is_causal if is_causal is None else is_causal)
    texts, grouped = _row.texts, query.shape[1] != key.shape[1]
    if query.is_cuda:
        longest = texts.longest
        left = -1 if sliding_window is None else sliding_window - 1
        result = varlen_attn(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            texts.ends,
            texts.ends,
            longest,
            longest,
            scale=scaling,
            window_size=(left, 0 if causal else left),
            enable_gqa=grouped,
        )
        assert isinstance(result, torch.Tensor)
        return result[None], None
    attended = [
        scaled_dot_product_attention(
            each_query,
            each_key,
            each_value,
            attn_mask=_window(each_query.shape[2], sliding_window, causal),
            is_causal=causal and sliding_window is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        for each_query, each_key, each_value in zip(
            *(torch.split(each, texts.lengths, 2) for each in (query, key, value))
        )
    ]
    return torch.cat(attended, 2).transpose(1, 2).contiguous(), None


def _window(length: int, size: int | None, causal: bool) -> torch.Tensor | None:
    """Which tokens see which, shape (length, length); None for no window."""
    if size is None:
        return None
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = distance.abs() < size
    return seen & (distance >= 0) if causal else seen


AttentionInterface.register(ATTENTION, _attend)
