"""Rewrite a text graph so that it costs less and gives the same vectors.

Masks (`shrink_masks`): a traced graph computes which token may attend to which with some fifty
operations on shapes and indices, as a tensor [batch, 1, length, length]. Where every token attends
to all real tokens of its text, `attention_mask` says the same: it is added to the scores as [batch,
1, 1, length].

Scales (`fold_scales`): the scores are multiplied by a constant. The weights that make the queries
are multiplied by it here, once.

Padding (`unpadded`): a batch of texts is padded to a rectangle of tokens, and a traced graph
computes all of it. Only attention needs the rectangle. Matrix products with weights, layer norms
and activations, nine tenths of the work, treat every token alone. In the unpadded graph these get
the real tokens only, one text after the other (Zeng et al., "Boosting distributed training
performance of the unpadded BERT model", 2022); in front of attention the rectangle is put back. The
graph gains two inputs, which engine/openvino_backend.py makes: `rows`, int32 [tokens], the places
of the real tokens in the flattened rectangle, and `places`, int32 [batch, length], the real token
at each place of the rectangle (any token at a place of padding).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov  # type: ignore[import-untyped]
from openvino import opset13 as ops

from engine.openvino_backend import unpadded_inputs

_QUERY, _MASK, _SCALE = 0, 3, 4  # inputs of ScaledDotProductAttention
_MOVING = ("Transpose", "Reshape")  # change no value
_PENALTY = 1e9  # subtracted from the score of a padded token
# Masks are looked at up to this length. One of 8192 x 8192 takes half a gigabyte, and the sample,
# which reaches to the window, is compared in any case.
_LONGEST = 8192
_EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
# Operations whose result for a token depends on that token of their inputs alone. The function that
# makes one has its name in lower case.
_TOKENWISE = ["Add", "Subtract", "Multiply", "Divide", "Power", "Sqrt", "Relu", "Sigmoid", "Swish"]
_TOKENWISE += ["Tanh", "MVN", "Gelu", "Convert"]
_ATTRIBUTES = {  # that their functions take, in this order
    "MVN": ["normalize_variance", "eps", "eps_mode"],
    "Gelu": ["approximation_mode"],
    "Convert": ["destination_type"],
}
_FEWEST_PRODUCTS = 2  # a graph with fewer gains nothing
_COMPARED = 8  # texts

Key = tuple[str, int]  # name of a node, number of its output


def shrink_masks(model: Any, window: int) -> bool:
    """Rewrite the masks of an OpenVINO model in place, if all of them are the same as
    `attention_mask`, both in short texts and at `window` tokens, or _LONGEST.

    Returns: whether the model was rewritten; otherwise it is unchanged.
    """
    attentions = [node for node in _attentions(model) if node.get_input_size() > _MASK]
    masks = {_key(node.input_value(_MASK)): node.input_value(_MASK) for node in attentions}
    if not masks:
        return False
    longest = np.ones((1, min(window, _LONGEST)), np.int64)
    half, short = longest.copy(), np.ones((2, min(16, window)), np.int64)
    half[:, longest.size // 2 :] = short[1, short.shape[1] // 2 :] = 0
    if not all(_is_attention_mask(model, each, [short, longest, half]) for each in masks.values()):
        return False
    real = ops.convert(model.input("attention_mask"), np.float32)
    hidden = ops.subtract(real, ops.constant(np.float32(1)))
    penalty = ops.multiply(hidden, ops.constant(np.float32(_PENALTY)))
    added = ops.unsqueeze(penalty, ops.constant(np.array([1, 2], np.int64)))
    for node in attentions:
        node.input(_MASK).replace_source_output(added.output(0))
    model.validate_nodes_and_infer_types()
    return True


def fold_scales(model: Any) -> int:
    """Rewrite the scales of an OpenVINO model in place, where queries are a product with weights
    and nothing else.

    Returns: how many scales were multiplied into weights.
    """
    folded = 0
    for node in _attentions(model):
        if node.get_input_size() <= _SCALE:
            continue
        factor, query = _constant(node.input_value(_SCALE)), node.input_value(_QUERY)
        while query.get_node().get_type_name() in _MOVING and _has_one_user(query):
            query = query.get_node().input_value(0)
        scaled = [query.get_node()]  # the product, or the sum with its bias and the product
        if scaled[0].get_type_name() == "Add":
            scaled.append(scaled[0].input_value(0).get_node())
        if factor is None or scaled[-1].get_type_name() != "MatMul":
            continue
        weights = [_constant(each.input_value(1)) for each in scaled]
        alone = all(_has_one_user(each.output(0)) for each in scaled)
        if not alone or any(values is None for values in weights):
            continue
        for each, values in zip(scaled, weights):
            new = ops.constant((values * factor).astype(np.float32))
            each.input(1).replace_source_output(new.output(0))
        node.input(_SCALE).replace_source_output(ops.constant(np.float32(1)).output(0))
        folded += 1
    model.validate_nodes_and_infer_types()
    return folded


def _attentions(model: Any) -> list[Any]:
    kind = "ScaledDotProductAttention"
    return [node for node in model.get_ordered_ops() if node.get_type_name() == kind]


def _is_attention_mask(model: Any, output: Any, masks: Sequence[Any]) -> bool:
    """Whether for each attention_mask, int64 [texts, length], `output` lets every real token attend
    to the real tokens of its text, and to no other, and adds nothing to their scores.
    """
    part = ov.Core().compile_model(ov.Model([output], model.get_parameters()), "CPU", _EXACT)
    # One after the other: a batch of them would take twice the memory.
    return all(_attends(part, mask) for mask in masks)


def _attends(part: Any, mask: Any) -> bool:
    """Whether the compiled `part` of a model makes of `mask` what `_is_attention_mask` asks for."""
    inputs = {name: np.zeros_like(mask) for each in part.inputs for name in each.names}
    inputs |= {"attention_mask": mask, "input_ids": np.full_like(mask, 5)}
    computed = part(inputs)[0]
    if computed.ndim != 4 or computed.shape[1] != 1:
        return False
    visible = computed if computed.dtype == bool else computed == 0
    hidden = ~computed if computed.dtype == bool else computed < -1e4
    real = mask.astype(bool)
    right = np.where(real[:, None, :], visible[:, 0], hidden[:, 0])  # of queries and keys
    # A mask may have one row for all queries.
    return bool(right[:, 0].all() if right.shape[1] == 1 else right[real].all())


def _constant(output: Any) -> Any:
    """The values of an output as float32, None when they are not constant."""
    node = output.get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node.get_data().astype(np.float32) if node.get_type_name() == "Constant" else None


def _has_one_user(output: Any) -> bool:
    return len(output.get_target_inputs()) == 1


def unpadded(graph: Any, tokenizer: Any, texts: Sequence[Any]) -> Any:
    """The unpadded graph if there is one and it gives the same vectors; else `graph` itself.

    Args:
        graph: an OpenVINO model of input_ids and attention_mask, both int64 [batch, length], and
            token_type_ids where it takes them.
        tokenizer: pads a batch.
        texts: texts, or pairs of them; the shortest are compared.
    """
    rewritten = graph.clone()
    if not unpad(rewritten):
        return graph
    shortest = sorted(texts, key=lambda text: len("".join(text)))[:_COMPARED]
    encodings = tokenizer.encode_batch(shortest)
    mask = np.array([encoding.attention_mask for encoding in encodings], np.int64)
    ids = np.array([encoding.ids for encoding in encodings], np.int64)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if any("token_type_ids" in each.names for each in graph.inputs):
        kinds = [encoding.type_ids for encoding in encodings]
        inputs["token_type_ids"] = np.array(kinds, np.int64)
    expected = ov.Core().compile_model(graph, "CPU", _EXACT)(inputs)[0]
    try:
        further = unpadded_inputs(mask)
        actual = ov.Core().compile_model(rewritten, "CPU", _EXACT)({**inputs, **further})[0]
    except RuntimeError:
        return graph  # `unpad` took another tensor for a batch of texts
    tolerance = 1e-4 * np.abs(expected).max()
    return rewritten if np.allclose(actual, expected, rtol=0, atol=tolerance) else graph


def unpad(model: Any) -> bool:
    """Rewrite an OpenVINO model in place. Shapes alone do not tell a batch of texts from another
    tensor with two free dimensions: the caller compares the vectors before and after.

    Returns: whether the model was rewritten; otherwise it is unchanged.
    """
    rows = _parameter("rows", [-1])
    places = _parameter("places", [-1, -1])
    first = ops.constant(np.int64(0))
    flat: dict[Key, Any] = {}  # the counterparts [tokens, width] of outputs [batch, length, width]
    rewritten, products = [], 0
    for node in model.get_ordered_ops():
        if node.get_output_size() != 1 or not _has_tokens(node.output(0)):
            continue
        inputs = node.input_values()
        if node.get_type_name() == "MatMul":
            if not _multiplies_weights(node):
                continue
            products += 1
            if _key(inputs[0]) not in flat:
                flat[_key(inputs[0])] = _real_tokens(inputs[0], rows, first)
            transposed = node.get_attributes()["transpose_b"]
            new = ops.matmul(flat[_key(inputs[0])], inputs[1], False, transposed)
        else:
            new = _tokenwise(node, inputs, flat)
            if new is None:
                continue
        flat[_key(node.output(0))] = new.output(0)
        rewritten.append(node)
    if products < _FEWEST_PRODUCTS:
        return False
    names = {node.get_friendly_name() for node in rewritten}
    for node in rewritten:
        users = node.output(0).get_target_inputs()
        others = [user for user in users if user.get_node().get_friendly_name() not in names]
        if others:
            rectangle = ops.gather(flat[_key(node.output(0))], places, first)
            for user in others:
                user.replace_source_output(rectangle.output(0))
    model.add_parameters([rows, places])
    model.validate_nodes_and_infer_types()
    return True


def _parameter(name: str, shape: list[int]) -> Any:
    made = ops.parameter(shape, np.int32, name=name)
    made.output(0).set_names({name})
    return made


def _real_tokens(output: Any, rows: Any, first: Any) -> Any:
    """The rows of [batch, length, width] that are real tokens, [tokens, width]."""
    width = output.get_partial_shape()[2].get_length()
    shape = ops.constant(np.array([-1, width], np.int64))
    return ops.gather(ops.reshape(output, shape, False), rows, first).output(0)


def _tokenwise(node: Any, inputs: Sequence[Any], flat: dict[Key, Any]) -> Any:
    """The flat counterpart of a node; None for one that mixes tokens, has an input with tokens but
    no flat one, or another input that may differ from token to token.
    """
    kind, with_tokens = node.get_type_name(), [each for each in inputs if _has_tokens(each)]
    if kind not in _TOKENWISE or any(_key(each) not in flat for each in with_tokens):
        return None
    arguments = []
    for each in inputs:
        if _key(each) in flat:
            arguments.append(flat[_key(each)])
            continue
        shape = each.get_partial_shape()
        if not _is_constant(each) or any(size.get_length() != 1 for size in list(shape)[:-1]):
            return None
        if len(shape) > 2:
            shape = [1, shape[len(shape) - 1].get_length()]
            each = ops.reshape(each, ops.constant(np.array(shape, np.int64)), False).output(0)
        arguments.append(each)
    if kind == "MVN":
        if inputs[1].get_node().get_data().tolist() not in ([-1], [2]):
            return None
        arguments[1] = ops.constant(np.array([-1], np.int64))
    attributes = [node.get_attributes()[name] for name in _ATTRIBUTES.get(kind, [])]
    lowered = [value.lower() if isinstance(value, str) else value for value in attributes]
    return getattr(ops, kind.lower())(*arguments, *lowered)


def _key(output: Any) -> Key:
    return output.get_node().get_friendly_name(), output.get_index()


def _has_tokens(output: Any) -> bool:
    """Whether its shape is [batch, length, width] with a fixed width."""
    shape = output.get_partial_shape()
    if shape.rank.is_dynamic or len(shape) != 3:
        return False
    return bool(shape[0].is_dynamic and shape[1].is_dynamic and shape[2].is_static)


def _multiplies_weights(node: Any) -> bool:
    tokens, weights = node.input_values()
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
        return all(map(_is_constant, node.input_values()))
    return bool(node.get_type_name() == "Constant")
