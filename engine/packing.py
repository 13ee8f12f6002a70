"""Rewrites a text graph so that padding costs next to nothing. Used at bake only.

A batch of texts of different lengths is padded to a rectangle of tokens, and a traced graph
computes all of it. But only attention needs the rectangle; matrix products with weights, layer
norms and activations, nine tenths of the work, treat every token alone. Here these get the real
tokens only, packed one text after the other (Zeng et al., "Boosting distributed training
performance of the unpadded BERT model", 2022); in front of attention the rectangle is put back.

The graph gains two inputs: `rows`, int32 [tokens], where the real tokens are in the flattened
rectangle, and `places`, int32 [batch, length], which packed token stands at each place of it (any
for padding).
"""

import sys
from typing import Any

import numpy as np

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # see openvino_backend

from openvino import opset13 as ops  # type: ignore[import-untyped]  # noqa: E402

# What these give for a token depends on the same token of their inputs alone.
_TOKENWISE = {
    "Add": ops.add,
    "Subtract": ops.subtract,
    "Multiply": ops.multiply,
    "Divide": ops.divide,
    "Power": ops.power,
    "Sqrt": ops.sqrt,
    "Relu": ops.relu,
    "Sigmoid": ops.sigmoid,
    "Swish": ops.swish,
    "Tanh": ops.tanh,
}
_FEWEST_PRODUCTS = 2  # a graph with fewer has nothing that is worth it


def pack(model: Any) -> bool:
    """Rewrite an OpenVINO model in place.

    Shapes alone do not tell a batch of texts from other things with two free dimensions: the caller
    compares the vectors before and after.

    Returns: whether anything was found to rewrite; if not, the model is as it was.
    """
    rows = ops.parameter([-1], np.int32, name="rows")
    places = ops.parameter([-1, -1], np.int32, name="places")
    rows.output(0).set_names({"rows"})
    places.output(0).set_names({"places"})
    first = ops.constant(np.int64(0))
    packed: dict[tuple[str, int], Any] = {}

    def packed_form(output: Any) -> Any:
        if _key(output) not in packed:
            width = output.get_partial_shape()[2].get_length()
            flat = ops.reshape(output, ops.constant(np.array([-1, width], np.int64)), False)
            packed[_key(output)] = ops.gather(flat, rows, first).output(0)
        return packed[_key(output)]

    rewritten, products = [], 0
    for node in model.get_ordered_ops():
        if node.get_output_size() != 1 or not _has_tokens(node.output(0)):
            continue
        inputs = [node.input_value(index) for index in range(node.get_input_size())]
        kind = node.get_type_name()
        if kind == "MatMul":
            if not _multiplies_weights(node):
                continue
            products += 1
            weights_transposed = node.get_attributes()["transpose_b"]
            new = ops.matmul(packed_form(inputs[0]), inputs[1], False, weights_transposed)
        elif any(_has_tokens(each) and _key(each) not in packed for each in inputs):
            continue
        elif not any(_key(each) in packed for each in inputs):
            continue
        elif not (kind in ("MVN", "Gelu", "Convert") or kind in _TOKENWISE):
            continue
        else:
            result = _tokenwise(node, kind, inputs, packed)
            if result is None:
                continue
            new = result
        packed[_key(node.output(0))] = new.output(0)
        rewritten.append(node)
    if products < _FEWEST_PRODUCTS:
        return False
    names = {node.get_friendly_name() for node in rewritten}
    for node in rewritten:
        others = [
            each
            for each in node.output(0).get_target_inputs()
            if each.get_node().get_friendly_name() not in names
        ]
        if others:
            rectangle = ops.gather(packed[_key(node.output(0))], places, first)
            for each in others:
                each.replace_source_output(rectangle.output(0))
    model.add_parameters([rows, places])
    model.validate_nodes_and_infer_types()
    return True


def _tokenwise(node: Any, kind: str, inputs: list[Any], packed: dict[tuple[str, int], Any]) -> Any:
    """The packed counterpart of a node all of whose inputs with tokens are packed; None when it
    mixes tokens, or one of its other inputs may differ from token to token.
    """
    arguments = []
    for each in inputs:
        if _key(each) in packed:
            arguments.append(packed[_key(each)])
            continue
        shape = each.get_partial_shape()
        if not _is_constant(each) or any(size.get_length() != 1 for size in list(shape)[:-1]):
            return None
        if len(shape) > 2:
            shape = [1, shape[len(shape) - 1].get_length()]
            each = ops.reshape(each, ops.constant(np.array(shape, np.int64)), False).output(0)
        arguments.append(each)
    attributes = node.get_attributes()
    if kind == "MVN":
        axes = inputs[1].get_node().get_data().tolist()
        if axes not in ([-1], [2]):
            return None
        last = ops.constant(np.array([-1], np.int64))
        return ops.mvn(
            arguments[0],
            last,
            attributes["normalize_variance"],
            attributes["eps"],
            attributes["eps_mode"].lower(),
        )
    if kind == "Gelu":
        return ops.gelu(arguments[0], attributes["approximation_mode"].lower())
    if kind == "Convert":
        return ops.convert(arguments[0], attributes["destination_type"])
    return _TOKENWISE[kind](*arguments)


def _key(output: Any) -> tuple[str, int]:
    return output.get_node().get_friendly_name(), output.get_index()


def _has_tokens(output: Any) -> bool:
    """Whether it has the shape [batch, length, a width]."""
    shape = output.get_partial_shape()
    return (
        shape.rank.is_static
        and len(shape) == 3
        and shape[0].is_dynamic
        and shape[1].is_dynamic
        and shape[2].is_static
    )


def _multiplies_weights(node: Any) -> bool:
    tokens, weights = node.input_value(0), node.input_value(1)
    return (
        _has_tokens(tokens)
        and not node.get_attributes()["transpose_a"]
        and len(weights.get_partial_shape()) == 2
        and _is_constant(weights)
    )


def _is_constant(output: Any) -> bool:
    """Whether it is a constant, compressed or not."""
    node = output.get_node()
    if node.get_type_name() in ("Convert", "Multiply", "Subtract", "Reshape", "Transpose"):
        return all(_is_constant(node.input_value(i)) for i in range(node.get_input_size()))
    return bool(node.get_type_name() == "Constant")
