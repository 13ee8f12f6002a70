"""bake/rewrite.py: the same vectors without padding. On graphs small enough to see through;
test_bake_export.py has the architectures.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import engine.openvino_backend as backend
from bake.rewrite import unpad, unpadded

WIDTH = 8
LENGTHS = (5, 1, 3)


@pytest.fixture
def ops() -> Any:
    from openvino import opset13

    return opset13


def weights(ops: Any, seed: int) -> Any:
    values = np.random.default_rng(seed).normal(size=(WIDTH, WIDTH)).astype(np.float32)
    return ops.constant(values)


def graph(ops: Any, build: Any) -> Any:
    """token ids and mask -> table -> `build` -> masked sum over the tokens."""
    import openvino as ov

    ids = ops.parameter([-1, -1], np.int64, name="input_ids")
    mask = ops.parameter([-1, -1], np.int64, name="attention_mask")
    ids.output(0).set_names({"input_ids"})
    mask.output(0).set_names({"attention_mask"})
    table = np.random.default_rng(0).normal(size=(50, WIDTH)).astype(np.float32)
    tokens = ops.gather(ops.constant(table), ids, ops.constant(np.int64(0)))
    counted = ops.unsqueeze(ops.convert(mask, np.float32), ops.constant(np.int64(2)))
    hidden = build(tokens)
    summed = ops.reduce_sum(ops.multiply(hidden, counted), ops.constant(np.int64(1)), False)
    return ov.Model([summed], [ids, mask])


def layer(ops: Any, hidden: Any, seed: int) -> Any:
    """What stands between two attentions: product, bias, GELU, product, residual, norm."""
    bias = np.full((1, 1, WIDTH), 0.5, np.float32)
    inner = ops.add(ops.matmul(hidden, weights(ops, seed), False, True), ops.constant(bias))
    inner = ops.matmul(ops.gelu(inner, "erf"), weights(ops, seed + 1), False, False)
    last = ops.constant(np.array([-1], np.int64))
    return ops.mvn(ops.add(hidden, inner), last, True, 1e-6, "inside_sqrt")


def mixed(ops: Any, hidden: Any) -> Any:
    """Every token sees the others of its text, as attention has it."""
    scores = ops.softmax(ops.matmul(hidden, hidden, False, True), 2)
    return ops.matmul(scores, hidden, False, False)


def batch(lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    ids = np.full((len(lengths), max(lengths)), 7, np.int64)  # padding is no zero
    mask = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = np.arange(10 * row, 10 * row + length)
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


def run(model: Any, **further: Any) -> Any:
    import openvino as ov

    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    return ov.Core().compile_model(model, "CPU", exact)({**batch(), **further})[0]


def test_an_unpadded_graph_gives_the_same_vectors(ops: Any) -> None:
    model = graph(ops, lambda tokens: layer(ops, layer(ops, tokens, 1), 3))
    expected = run(model)
    assert unpad(model)
    assert [each.any_name for each in model.inputs][2:] == ["rows", "places"]
    actual = run(model, **backend.unpadded_inputs(batch()["attention_mask"]))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_products_get_the_real_tokens_only(ops: Any) -> None:
    model = graph(ops, lambda tokens: layer(ops, layer(ops, tokens, 1), 3))
    unpad(model)
    products = [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]
    assert len(products) == 4
    assert all(len(node.get_output_partial_shape(0)) == 2 for node in products)
    assert sum(node.get_type_name() == "Gather" for node in model.get_ordered_ops()) == 3


def test_what_mixes_tokens_gets_the_rectangle(ops: Any) -> None:
    import openvino as ov

    one_text = {"input_ids": np.arange(6)[None], "attention_mask": np.ones((1, 6), np.int64)}
    model = graph(ops, lambda tokens: layer(ops, mixed(ops, layer(ops, tokens, 1)), 3))
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    expected = ov.Core().compile_model(model, "CPU", exact)(one_text)[0]
    assert unpad(model)
    further = backend.unpadded_inputs(one_text["attention_mask"])
    actual = ov.Core().compile_model(model, "CPU", exact)({**one_text, **further})[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    rank3 = [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "MatMul" and len(node.get_output_partial_shape(0)) == 3
    ]
    assert len(rank3) == 2  # attention's own


def test_a_graph_without_products_is_left_alone(ops: Any) -> None:
    model = graph(ops, lambda tokens: ops.relu(tokens))
    before = len(model.get_ordered_ops())
    assert not unpad(model)
    assert len(model.inputs) == 2 and len(model.get_ordered_ops()) == before


class Padding:
    """A tokenizer whose texts have these lengths."""

    def __init__(self, lengths: Sequence[int] = LENGTHS) -> None:
        self.lengths = lengths

    class Encoding:
        def __init__(self, ids: Any, mask: Any) -> None:
            self.ids, self.attention_mask = ids.tolist(), mask.tolist()

    def encode_batch(self, texts: Any) -> list[Any]:
        both = batch(self.lengths)
        return [self.Encoding(*row) for row in zip(both["input_ids"], both["attention_mask"])]


@pytest.mark.parametrize("lengths", [LENGTHS, (3, 1, 2)], ids=["it-fails", "others"])
def test_the_bake_keeps_a_graph_as_it_is_when_unpadding_would_change_its_vectors(
    ops: Any, lengths: Sequence[int]
) -> None:
    """Two free dimensions need not be texts and tokens: here they are tokens and texts. The
    unpadded graph fails, or gives other vectors where there are as many tokens as texts.
    """
    turned = ops.constant(np.array([1, 0, 2], np.int64))

    def build(tokens: Any) -> Any:
        return ops.transpose(layer(ops, ops.transpose(tokens, turned), 1), turned)

    model = graph(ops, build)
    assert unpadded(model, Padding(lengths), ["a", "b", "c"]) is model
    good = graph(ops, lambda tokens: layer(ops, tokens, 1))
    assert len(unpadded(good, Padding(), ["a", "b", "c"]).inputs) == 4


@pytest.mark.parametrize("left", [False, True])
def test_the_further_inputs_say_where_tokens_are(left: bool) -> None:
    mask = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0]], np.int64)
    mask = mask[:, ::-1] if left else mask
    inputs = backend.unpadded_inputs(np.ascontiguousarray(mask))
    flat = mask.ravel()
    assert inputs["rows"][:6].tolist() == np.flatnonzero(flat).tolist()
    assert len(inputs["rows"]) == backend.TOKENS_STEP
    assert inputs["rows"].dtype == inputs["places"].dtype == np.int32
    assert inputs["places"].shape == mask.shape
    real = inputs["places"].ravel()[flat == 1]
    assert real.tolist() == list(range(6))
