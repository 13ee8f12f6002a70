"""Rewrites a text graph so that what stands around its attention costs less. Used at bake only.

Masks: a traced graph works out which token may look at which with some fifty operations on shapes
and indices, as a tensor [batch, 1, length, length]. In a model whose tokens all see each other this
is the attention mask again, for every token: then `attention_mask` itself is given, as [batch, 1,
1, length], added to the scores.

Scales: the scores are scaled at run time, by a constant; the weights that queries are made with can
be scaled instead, once.
"""

import sys
from typing import Any

import numpy as np

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # see openvino_backend

import openvino as ov  # type: ignore[import-untyped]  # noqa: E402
from openvino import opset13 as ops  # noqa: E402

_ATTENTION = "ScaledDotProductAttention"
_QUERY, _MASK, _SCALE = 0, 3, 4  # its inputs
_HIDDEN = 1e9  # taken off a score
# Longer windows are not tried: their masks take more than half a gigabyte.
_LONGEST = 8192


def shrink_masks(model: Any, window: int) -> bool:
    """Rewrite an OpenVINO model in place, if every mask is `attention_mask` and nothing more: in
    short texts, and at `window` tokens, which no text exceeds.

    Returns: whether anything was rewritten; if not, the model is as it was.
    """
    attentions = [node for node in _attentions(model) if node.get_input_size() > _MASK]
    masks = {
        (output.get_node().get_friendly_name(), output.get_index()): output
        for output in (node.input_value(_MASK) for node in attentions)
    }
    if not masks or window > _LONGEST:
        return False
    for length in (min(16, window), window):
        mask = np.ones((2, length), np.int64)
        mask[1, length // 2 :] = 0
        if not all(_is_for_every_token(model, output, mask) for output in masks.values()):
            return False
    hidden = ops.subtract(
        ops.convert(model.input("attention_mask"), np.float32), ops.constant(np.float32(1))
    )
    added = ops.unsqueeze(
        ops.multiply(hidden, ops.constant(np.float32(_HIDDEN))),
        ops.constant(np.array([1, 2], np.int64)),
    )
    for node in attentions:
        node.input(_MASK).replace_source_output(added.output(0))
    model.validate_nodes_and_infer_types()
    return True


def fold_scales(model: Any) -> int:
    """Rewrite an OpenVINO model in place, where queries come straight from a product with weights.

    Returns: how many scales have gone into weights.
    """
    folded = 0
    for node in _attentions(model):
        if node.get_input_size() <= _SCALE:
            continue
        factor, source = _constant(node.input_value(_SCALE)), node.input_value(_QUERY)
        while source.get_node().get_type_name() in ("Transpose", "Reshape") and _is_for_one(source):
            source = source.get_node().input_value(0)
        scaled = [source.get_node()]  # product, and bias
        if scaled[0].get_type_name() == "Add":
            scaled.append(scaled[0].input_value(0).get_node())
        if factor is None or scaled[-1].get_type_name() != "MatMul":
            continue
        weights = [_constant(each.input_value(1)) for each in scaled]
        if any(values is None for values in weights) or not all(
            _is_for_one(each.output(0)) for each in scaled
        ):
            continue
        for each, values in zip(scaled, weights):
            new = ops.constant((values * factor).astype(np.float32))
            each.input(1).replace_source_output(new.output(0))
        node.input(_SCALE).replace_source_output(ops.constant(np.float32(1)).output(0))
        folded += 1
    model.validate_nodes_and_infer_types()
    return folded


def _attentions(model: Any) -> list[Any]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() == _ATTENTION]


def _is_for_every_token(model: Any, output: Any, mask: Any) -> bool:
    """Whether `output` lets each real token look at the real tokens of its text, and at no other,
    with nothing added to their scores.
    """
    part = ov.Model([output], model.get_parameters())
    inputs = {"attention_mask": mask, "input_ids": np.full_like(mask, 5)}
    given = ov.Core().compile_model(part, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(inputs)[0]
    if given.ndim != 4 or given.shape[1] != 1:
        return False
    seen = given if given.dtype == bool else given == 0
    barred = ~given if given.dtype == bool else given < -1e4
    for row, real in enumerate(mask.astype(bool)):
        at = row if given.shape[0] > 1 else 0
        mine = slice(None) if given.shape[2] == 1 else real
        if not (seen[at, 0, mine][:, real].all() and barred[at, 0, mine][:, ~real].all()):
            return False
    return True


def _constant(output: Any) -> Any:
    """Its values as float32, None when they are not constant."""
    node = output.get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node.get_data().astype(np.float32) if node.get_type_name() == "Constant" else None


def _is_for_one(output: Any) -> bool:
    return len(output.get_target_inputs()) == 1
