"""bake/rounding.py: weights at int8."""

import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt
import own_engine as own
import pytest
import tiny_models as tiny
import torch
from baking import bake
from safetensors.numpy import load_file

from bake import rounding
from engine.bundle import Bundle
from engine.encoder import cpu


def hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


@pytest.mark.parametrize(("width", "size"), [(64, 64), (128, 128), (192, 64), (384, 128)])
def test_rotation_keeps_products(width: int, size: int) -> None:
    rows, others = torch.randn(5, width), torch.randn(7, width)
    expected = (rows.view(5, -1, size) @ hadamard(size)).view(5, width)
    torch.testing.assert_close(rounding.rotated(rows), expected)
    torch.testing.assert_close(
        rounding.rotated(rows) @ rounding.rotated(others).T, rows @ others.T, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("width", [64, 320])
def test_what_a_layer_gives_changes_less_than_by_rounding_to_nearest(width: int) -> None:
    weight = torch.randn(48, width)
    inputs = torch.randn(4000, 12) @ torch.randn(12, width) + 0.1 * torch.randn(4000, width)
    codes, scales = rounding.rounded(weight, rounding._inverse(inputs.T @ inputs / len(inputs)))
    assert codes.dtype == torch.int8 and codes.abs().max() <= 127
    assert scales.shape == (48,) and scales.dtype == torch.float32
    nearest = weight.abs().amax(1, keepdim=True) / 127
    plain = (weight / nearest).round() * nearest

    def error(rounded: torch.Tensor) -> float:
        return float((inputs @ (rounded - weight).T).square().mean())

    assert error(codes * scales[:, None]) < 0.4 * error(plain)
    # Near the weights all the same: what lies in no input's direction is rounded as it is.
    assert (codes * scales[:, None] - weight).abs().max() < 4 * nearest.max()


def test_rows_and_inputs_without_values() -> None:
    weight = torch.randn(4, 64)
    weight[1] = 0
    codes, scales = rounding.rounded(weight, rounding._inverse(torch.zeros(64, 64)))
    assert not codes[1].any() and torch.isfinite(scales).all()
    assert (codes * scales[:, None] - weight).abs().max() <= 0.51 * scales.max()


def test_second_moments_are_means_over_texts() -> None:
    layer = torch.nn.Linear(64, 2)
    texts = [torch.randn(1, 3, 64), torch.randn(1, 50, 64)]
    with rounding._moments([layer]) as moments:
        for text in texts:
            layer(text)
    layer(texts[0])  # not counted
    rows = [rounding.rotated(text[0]) for text in texts]
    torch.testing.assert_close(moments[layer], sum(each.T @ each / len(each) for each in rows))


def test_texts_are_of_prose_and_of_all_of_the_vocabulary() -> None:
    tokenizer, _ = own.bert()()
    texts = rounding.texts(tokenizer.backend_tokenizer)
    assert texts == rounding.texts(tokenizer.backend_tokenizer)
    assert len(texts) > rounding.PASSAGES and all(text.strip() for text in texts)
    ids = {each for text in texts for each in tokenizer(text).input_ids}
    assert len(ids) > 0.9 * len(tokenizer.get_vocab())


def baked(folder: pathlib.Path, precisions: str) -> tuple[Bundle, dict[str, npt.NDArray[Any]]]:
    """A bundle, and the weights of our own engine."""
    tiny.save(folder / "model", own.bert(), "mean", width=64)
    bundle = bake(folder / "model", folder / "models", "--precisions", precisions)
    return bundle, load_file(bundle.file("text.safetensors"))


def test_codes_of_a_model(tmp_path: pathlib.Path) -> None:
    """Each linear layer's codes times its scales are about its rotated weights."""
    bundle, held = baked(tmp_path, "fp32,int8")
    names = [name.removesuffix(".codes") for name in held if name.endswith(".codes")]
    assert bundle.manifest.encoder and len(names) == 4 * bundle.manifest.encoder.layers
    for name in names:
        codes, scales = held[f"{name}.codes"], held[f"{name}.scales"]
        weight = held[f"{name}.weight"]
        assert codes.dtype == np.int8 and codes.shape == weight.shape
        exact = rounding.rotated(torch.from_numpy(weight.astype(np.float32))).numpy()
        off = np.abs(codes * scales[:, None] - exact)
        assert off.mean() < scales.max() and off.max() < 6 * scales.max()
    if cpu.fastest("int8"):
        parity = bundle.manifest.parity["own engine"]["int8"]
        assert parity.minimum > 0.999 and parity.nearest is not None


def test_a_bundle_without_int8_has_no_codes(tmp_path: pathlib.Path) -> None:
    _, held = baked(tmp_path, "fp32")
    assert "layers.0.up.weight" in held and not any("codes" in name for name in held)
