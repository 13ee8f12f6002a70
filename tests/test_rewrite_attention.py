"""bake/rewrite.py: the same vectors with small masks and scaled weights. On graphs small enough to
see through; test_bake_export.py has the architectures.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
import pytest
from baking import Baked

from bake import rewrite
from bake.rewrite import fold_scales, shrink_masks

WIDTH, HEADS = 8, 2
WINDOW = 24
LENGTHS = (5, WINDOW, 1, 18)
Mask = Callable[[Any, Any, Any, Any], Any]


@pytest.fixture
def ops() -> Any:
    from openvino import opset13

    return opset13


def graph(ops: Any, mask: Mask, *, rotated: bool = False) -> Any:
    """token ids and mask -> table -> attention -> masked sum over the tokens.

    Args:
        mask: makes attention's from `ops`, attention_mask as bool [batch, 1, 1, length], and the
            positions of queries [length, 1] and keys [length].
        rotated: whether queries are changed, token by token, after their product.
    """
    ids = ops.parameter([-1, -1], np.int64, name="input_ids")
    given = ops.parameter([-1, -1], np.int64, name="attention_mask")
    ids.output(0).set_names({"input_ids"})
    given.output(0).set_names({"attention_mask"})
    chance = np.random.default_rng(0)
    zero = ops.constant(np.int64(0))

    def random(*shape: int) -> Any:
        return ops.constant(chance.normal(size=shape).astype(np.float32))

    def axes(*numbers: int) -> Any:
        return ops.constant(np.array(numbers, np.int64))

    tokens = ops.gather(random(50, WIDTH), ids, zero)

    def heads(bias: bool) -> Any:
        made = ops.matmul(tokens, random(WIDTH, WIDTH), False, True)
        made = ops.add(made, random(1, 1, WIDTH)) if bias else made
        split = ops.reshape(made, axes(0, 0, HEADS, WIDTH // HEADS), True)
        return ops.transpose(split, axes(0, 2, 1, 3))

    length = ops.gather(ops.shape_of(ids), ops.constant(np.int64(1)), zero)
    keys = ops.range(zero, length, ops.constant(np.int64(1)), "i64")
    real = ops.unsqueeze(ops.convert(given, "boolean"), axes(1, 2))
    query = ops.sin(heads(True)) if rotated else heads(True)
    seen = ops.scaled_dot_product_attention(
        query,
        heads(False),
        heads(True),
        mask(ops, real, ops.unsqueeze(keys, axes(1)), keys),
        ops.constant(np.float32(0.3)),
        causal=False,
    )
    hidden = ops.reshape(ops.transpose(seen, axes(0, 2, 1, 3)), axes(0, 0, WIDTH), True)
    counted = ops.unsqueeze(ops.convert(given, np.float32), axes(2))
    return ov.Model([ops.reduce_sum(ops.multiply(hidden, counted), axes(1), False)], [ids, given])


def plain(ops: Any, real: Any, queries: Any, keys: Any) -> Any:
    return real


def pairs(ops: Any, real: Any, queries: Any, keys: Any) -> Any:
    """For every pair of tokens."""
    return ops.logical_and(real, ops.greater_equal(ops.add(queries, keys), queries))


def additive(ops: Any, real: Any, queries: Any, keys: Any) -> Any:
    worst = ops.constant(np.finfo(np.float32).min)
    return ops.select(pairs(ops, real, queries, keys), ops.constant(np.float32(0)), worst)


def causal(ops: Any, real: Any, queries: Any, keys: Any) -> Any:
    return ops.logical_and(real, ops.greater_equal(queries, keys))


def local(ops: Any, real: Any, queries: Any, keys: Any) -> Any:
    """Like `pairs` in short texts."""
    apart = ops.abs(ops.subtract(queries, keys))
    return ops.logical_and(real, ops.less(apart, ops.constant(np.int64(WINDOW - 2))))


def biased(ops: Any, real: Any, queries: Any, keys: Any) -> Any:
    """Like ALiBi."""
    apart = ops.convert(ops.abs(ops.subtract(queries, keys)), np.float32)
    return ops.subtract(additive(ops, real, queries, keys), apart)


def weak(ops: Any, real: Any, queries: Any, keys: Any) -> Any:
    """Padding is still seen a little."""
    zero, some = ops.constant(np.float32(0)), ops.constant(np.float32(-5))
    return ops.select(pairs(ops, real, queries, keys), zero, some)


def no_mask(ops: Any, real: Any, queries: Any, keys: Any) -> Any:
    return ops.logical_or(real, ops.greater_equal(ops.add(queries, keys), queries))


def run(model: Any) -> Any:
    ids = np.full((len(LENGTHS), WINDOW), 7, np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = np.arange(10 * row, 10 * row + length) % 50
        mask[row, :length] = 1
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled({"input_ids": ids, "attention_mask": mask})[0].copy()


def attention(model: Any) -> Any:
    (node,) = (
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "ScaledDotProductAttention"
    )
    return node


@pytest.mark.parametrize("mask", [plain, pairs, additive])
def test_a_mask_of_every_pair_becomes_one_of_every_token(ops: Any, mask: Mask) -> None:
    model = graph(ops, mask)
    expected = run(model)
    assert shrink_masks(model, WINDOW)
    shape = attention(model).input_value(3).get_partial_shape()
    assert [str(size) for size in shape] == ["?", "1", "1", "?"]
    assert not any(node.get_type_name() == "Range" for node in model.get_ordered_ops())
    np.testing.assert_allclose(run(model), expected, rtol=1e-5, atol=1e-5)


def test_masks_are_looked_at_up_to_a_length_and_rewritten_for_longer_windows(
    ops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrite, "_LONGEST", WINDOW)
    model = graph(ops, pairs)
    expected = run(model)
    assert shrink_masks(model, 1000 * WINDOW)
    assert np.allclose(run(model), expected, atol=1e-5)
    assert not shrink_masks(graph(ops, local), 1000 * WINDOW)


@pytest.mark.parametrize("mask", [causal, local, biased, weak, no_mask])
def test_a_mask_that_says_more_stays(ops: Any, mask: Mask) -> None:
    model = graph(ops, mask)
    expected, before = run(model), len(model.get_ordered_ops())
    assert not shrink_masks(model, WINDOW)
    assert len(model.get_ordered_ops()) == before
    np.testing.assert_array_equal(run(model), expected)


def test_what_only_longer_texts_than_the_window_would_show_does_not_matter(ops: Any) -> None:
    assert shrink_masks(graph(ops, local), WINDOW - 2)


def test_a_graph_without_attention_is_left_alone(ops: Any) -> None:
    ids = ops.parameter([-1, -1], np.int64, name="input_ids")
    model = ov.Model([ops.relu(ids)], [ids])
    assert not shrink_masks(model, WINDOW) and not fold_scales(model)


def test_scales_go_into_weights_and_bias(ops: Any) -> None:
    model = graph(ops, pairs)
    expected = run(model)
    assert fold_scales(model) == 1
    assert attention(model).input_value(4).get_node().get_data() == 1
    np.testing.assert_allclose(run(model), expected, rtol=1e-5, atol=1e-5)
    assert fold_scales(model) == 1  # by 1: the same again
    np.testing.assert_allclose(run(model), expected, rtol=1e-5, atol=1e-5)


def test_a_scale_stays_where_queries_are_no_mere_product(ops: Any) -> None:
    model = graph(ops, pairs, rotated=True)
    expected = run(model)
    assert fold_scales(model) == 0
    np.testing.assert_array_equal(run(model), expected)


def test_attention_gets_a_mask_of_every_token_and_nothing_to_scale(baked: Baked) -> None:
    kind = "ScaledDotProductAttention"
    nodes = ov.Core().read_model(baked.bundle.file("text.xml")).get_ordered_ops()
    attentions = [node for node in nodes if node.get_type_name() == kind]
    assert len(attentions) == 2
    for node in attentions:
        mask = node.input_value(3).get_partial_shape()
        assert [str(size) for size in mask] == ["?", "1", "1", "?"]
        scale = node.input_value(4).get_node()
        scale = scale.input_value(0).get_node() if scale.get_type_name() == "Convert" else scale
        assert scale.get_data() == 1
