"""bake/windows.py: no matrix of window x window, memory that is checked, time left."""

import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
import transformers
from baking import cosines, refusal
from sentence_transformers import SentenceTransformer
from torch.utils._python_dispatch import TorchDispatchMode

from bake import BakeError, windows

LENGTH = 2048


def xlm_roberta() -> tiny.Made:
    tokenizer = tiny.trained(transformers.XLMRobertaTokenizer, tiny.ROBERTA_TOKENS)
    config = transformers.XLMRobertaConfig(**tiny.sizes(tokenizer, LENGTH + 2))
    return tokenizer, transformers.XLMRobertaModel(config)


def bert() -> tiny.Made:
    tokenizer = tiny.trained(transformers.BertTokenizer, tiny.BERT_TOKENS)
    config = transformers.BertConfig(**tiny.sizes(tokenizer, LENGTH))
    return tokenizer, transformers.BertModel(config)


def gemma2() -> tiny.Made:
    """It says that it can compute attention in blocks, but refuses when it runs (softcap)."""
    tokenizer, _ = tiny.gemma3()
    config = transformers.Gemma2Config(
        **tiny.sizes(tokenizer), num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16
    )
    return tokenizer, transformers.Gemma2Model(config)


def load(folder: pathlib.Path, make: Any, **options: Any) -> Any:
    """As the bake does."""
    tiny.save(folder, make, **options)
    return SentenceTransformer(
        str(folder), device="cpu", model_kwargs={"attn_implementation": "eager"}
    )


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, Sequence) else [made]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return made


@pytest.mark.parametrize("make", [xlm_roberta, bert])
def test_no_matrix_of_length_by_length_is_made(make: Any, tmp_path: pathlib.Path) -> None:
    model = load(tmp_path / "model", make, max_tokens=LENGTH)
    text = "river " * LENGTH
    with Largest() as eager:
        expected = model.encode([text, *tiny.TEXTS])
    with Largest() as blocks:
        found = windows.embed(model, [text, *tiny.TEXTS], 1)
    assert eager.elements >= LENGTH**2 > 4 * blocks.elements
    assert cosines(found, expected).min() >= 0.999999
    assert model[0].model.config._attn_implementation == "eager"  # to be traced


@pytest.mark.parametrize("make", [gemma2, tiny.deberta])
def test_a_model_that_cannot_compute_in_blocks_is_embedded_all_the_same(
    make: Any, tmp_path: pathlib.Path
) -> None:
    model = load(tmp_path / "model", make)
    with windows.blockwise_attention(model) as able:
        assert not able
    assert cosines(windows.embed(model, tiny.TEXTS, 2), model.encode(tiny.TEXTS)).min() >= 0.999999


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield load(tmp_path_factory.mktemp("tiny") / "model", xlm_roberta, max_tokens=LENGTH)


def test_vectors_come_in_the_order_of_the_texts(model: Any) -> None:
    expected = model.encode(tiny.TEXTS)
    for size in (1, 4):
        found = windows.embed(model, tiny.TEXTS, size)
        assert found.dtype == np.float32 and np.allclose(found, expected, atol=1e-5)


def test_the_time_left_is_told(
    model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    windows.embed(model, tiny.TEXTS, 1)
    assert not capsys.readouterr().err  # it takes less than a second
    monkeypatch.setattr(windows, "TOLD_EVERY", 0)
    progress = windows.Progress(4)
    progress._started -= 30
    for _ in range(4):
        progress.add(1)
    assert capsys.readouterr().err == " 25%, 90 s left … 50%, 30 s left … 75%, 10 s left …"


def test_memory_is_checked_before_it_is_taken(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    window = model.max_seq_length
    weights = windows.needed_memory(model, 0, True)
    half = windows.needed_memory(model, window // 2, True)
    monkeypatch.setattr(windows, "free_memory", lambda: half)
    says = f"to bake it with a window of {window} tokens takes .* GB .*--max-tokens {window // 2} "
    with pytest.raises(BakeError, match=says):
        windows.check_memory(model, blockwise=True)
    model.max_seq_length = window // 2
    windows.check_memory(model, blockwise=True)
    with pytest.raises(BakeError, match=f"--max-tokens {window // 4} "):
        windows.check_memory(model, blockwise=False)  # scores of every head
    model.max_seq_length = window
    monkeypatch.setattr(windows, "free_memory", lambda: weights)
    with pytest.raises(BakeError, match="a smaller window is not enough .*: use a larger machine"):
        windows.check_memory(model, blockwise=True)


def test_free_memory_is_less_than_the_machines() -> None:
    text = pathlib.Path("/proc/meminfo").read_text()
    (total,) = re.findall(r"MemTotal: +(\d+) kB", text)
    assert 1e6 < windows.free_memory() < int(total) * 1024


def test_a_bake_without_enough_memory_says_so_and_writes_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save(tmp_path / "model", xlm_roberta, max_tokens=LENGTH)
    monkeypatch.setattr(windows, "free_memory", lambda: 1.0)
    line = refusal(folder, tmp_path / "models")
    assert "2048 tokens takes about" in line and "--max-tokens" in line
