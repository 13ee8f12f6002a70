"""engine/packing.py: texts in one row give what each gives alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine import packing

CPU = torch.device("cpu")
LENGTHS = [5, 1, 9, 3]


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.is_causal = causal


def dense(parts: Any, causal: bool, window: int | None, scale: float) -> Any:
    """Attention of one text by its definition. Each part: shape (heads, tokens, width)."""
    query, key, value = parts
    key, value = (each.repeat_interleave(len(query) // len(each), 0) for each in (key, value))
    scores = query @ key.transpose(1, 2) * scale
    distance = torch.arange(query.shape[1])[:, None] - torch.arange(query.shape[1])
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        hidden |= distance < 0
    if window is not None:
        hidden |= distance.abs() >= window
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ value


@pytest.mark.parametrize("heads", [4, 2], ids=["own keys", "shared keys"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_stays_within_each_text(causal: bool, window: int | None, heads: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, sum(LENGTHS), 8)
    key, value = (torch.randn(1, heads, sum(LENGTHS), 8) for _ in range(2))
    packing._row.texts = packing.Texts(torch.empty(0), max(LENGTHS), LENGTHS)
    attended, _ = packing._attend(
        Attention(causal), query, key, value, None, scaling=0.3, sliding_window=window
    )
    del packing._row.texts
    expected = [
        dense([each[0] for each in parts], causal, window, 0.3)
        for parts in zip(*(each.split(LENGTHS, 2) for each in (query, key, value)))
    ]
    torch.testing.assert_close(attended[0].transpose(0, 1), torch.cat(expected, 1))


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias"])
def test_what_would_change_the_result_is_refused(option: str) -> None:
    query = torch.zeros(1, 1, 1, 8)
    with pytest.raises(NotImplementedError, match=option):
        packing._attend(Attention(False), query, query, query, None, **{option: 1.0})
    with pytest.raises(NotImplementedError, match="a mask"):
        packing._attend(Attention(False), query, query, query, torch.zeros(1))


class Model(nn.Module):
    """What a Packer needs of a transformer; its result are the ids and positions it got."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.position_embeddings = nn.Embedding(9, 2)
        if padding is not None:
            self.padding_idx = padding

    def set_attn_implementation(self, name: str) -> None:
        self.attention = name


class Echo(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        both = torch.stack([features["input_ids"][0], features["position_ids"][0]], 1)
        return {packing.TOKENS: both[None]}


def packer(padding: int | None = None) -> packing.Packer:
    echo: Any = Echo(Model(padding))
    made = packing.Packer(echo, pad_id=7, window=9)
    assert echo.model.attention == packing.ATTENTION
    return made


@pytest.mark.parametrize(("padding", "first"), [(None, 0), (1, 2)], ids=["BERT", "RoBERTa"])
def test_positions_count_from_each_texts_beginning(padding: int | None, first: int) -> None:
    features = packer(padding)([np.array([11, 12, 13]), np.array([21])], CPU)
    assert features[packing.TOKENS][0].tolist() == [
        [11, first],
        [12, first + 1],
        [13, first + 2],
        [21, first],
    ]
    assert features["cu_seq_lens_q"].tolist() == [0, 3, 4]
    assert features["seq_idx"].tolist() == [[0, 0, 0, 1]]


def test_a_padding_token_in_a_text_has_its_own_position_and_is_not_counted() -> None:
    """As RoBERTa counts: a text may hold `<pad>` in its words."""
    features = packer(padding=1)([np.array([11, 1, 12]), np.array([1, 1, 21])], CPU)
    assert features[packing.TOKENS][0, :, 1].tolist() == [2, 1, 3, 1, 1, 2]


def test_a_row_is_filled_up_with_a_text_of_padding_and_with_empty_ones() -> None:
    """Recordings have fixed sizes: no token of the texts may see the padding."""
    row, ends = packer().arrays([np.array([11, 12]), np.array([21])], tokens=8, texts=5)
    assert row[0, 0].tolist() == [11, 12, 21, 7, 7, 7, 7, 7]
    assert row[1, 0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert ends.tolist() == [0, 2, 3, 8, 8, 8]
