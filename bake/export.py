"""Trace a model's towers to OpenVINO graphs and save them."""

import contextlib
import logging
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import nncf
import openvino as ov  # type: ignore[import-untyped]
import torch
from openvino.frontend.pytorch.ts_decoder import (  # type: ignore[import-untyped]
    TorchScriptPythonDecoder,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

from bake import CannotTrace, one_line, refusing, stage
from bake.rewrite import fold_scales, shrink_masks, unpadded
from engine.bundle import Modality, Preprocessing, graph_file
from engine.errors import EngineFailed
from engine.pipeline import Pipeline

_TRACING = {"text": "tracing to OpenVINO", "image": "tracing the image tower to OpenVINO"}
_COMPRESSING = {"text": "compressing weights to int8", "image": "compressing its weights to int8"}


class _Texts(Pipeline):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.texts(input_ids, attention_mask)


class _Scores(torch.nn.Module):
    """A CrossEncoder's modules, without its activation."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(model)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            features["token_type_ids"] = token_type_ids
        for part in self.parts:
            features = part(features)
        scores: torch.Tensor = features["scores"]
        return scores


class _Pictures(Pipeline):
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.pictures(pixel_values)


def trace_texts(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    """Trace the text tower to an OpenVINO model: input_ids and attention_mask, both int64 [batch,
    length], to float32 [batch, dimensions]. It is rewritten to cost less (bake/rewrite.py).

    Args:
        tokenizer, texts: as `rewrite.unpadded` takes them; the first two texts are traced.

    Raises: CannotTrace.
    """
    encodings = tokenizer.encode_batch(texts[:2])
    example = {
        "input_ids": torch.tensor([each.ids for each in encodings]),
        "attention_mask": torch.tensor([each.attention_mask for each in encodings]),
    }
    return _trace_texts(_Texts(model), example, model.max_seq_length, tokenizer, texts)


def trace_scores(model: Any, tokenizer: Any, texts: Sequence[Any], types: bool) -> Any:
    """Trace a CrossEncoder to an OpenVINO model: input_ids, attention_mask and, with `types`,
    token_type_ids, all int64 [batch, length], to raw scores, float32 [batch, labels]. Otherwise as
    `trace_texts`; a text may be a pair.
    """
    encodings = tokenizer.encode_batch(texts[:2])
    example = {
        "input_ids": torch.tensor([each.ids for each in encodings]),
        "attention_mask": torch.tensor([each.attention_mask for each in encodings]),
    }
    if types:
        example["token_type_ids"] = torch.tensor([each.type_ids for each in encodings])
    return _trace_texts(_Scores(model), example, model.max_seq_length, tokenizer, texts)


def _trace_texts(
    pipeline: torch.nn.Module,
    example: dict[str, torch.Tensor],
    window: int,
    tokenizer: Any,
    texts: Sequence[Any],
) -> Any:
    graph = _trace(pipeline, example, [-1, -1], ov.Type.i64, "code")
    with running():
        shrink_masks(graph, window)
        fold_scales(graph)
        return unpadded(graph, tokenizer, texts)


def trace_pictures(model: Any, preprocessing: Preprocessing) -> Any:
    """Trace the image tower to an OpenVINO model: pixel_values, float32 [batch, 3, height, width],
    to float32 [batch, dimensions].

    Raises: as `trace_texts`.
    """
    example = {"pixel_values": torch.zeros(2, 3, *preprocessing.shape)}
    shape = [-1, 3, *preprocessing.shape]
    return _trace(_Pictures(model), example, shape, ov.Type.f32, "image code")


def _trace(
    pipeline: torch.nn.Module, example: dict[str, Any], shape: Any, kind: Any, code: str
) -> Any:
    """Trace with inputs of the example's names, each of `shape` and `kind`. A refusal names
    `code`.
    """
    inputs = [(name, ov.PartialShape(shape), kind) for name in example]
    refusal = refusing(f"its {code} cannot be traced to OpenVINO", CannotTrace)
    with refusal, torch.no_grad(), _broadcast_masks(), warnings.catch_warnings():
        # The tracer warns of every Python branch; the certificate tells whether one matters.
        warnings.simplefilter("ignore")
        # The tracer's own check would trace again: a fifth of a small model's bake.
        once = {"check_trace": False}
        decoder = TorchScriptPythonDecoder(
            pipeline.eval(), example_input=example, trace_kwargs=once
        )
        return ov.convert_model(decoder, example_input=example, input=inputs)


@contextlib.contextmanager
def _broadcast_masks() -> Iterator[None]:
    """Within it, transformers makes attention masks by broadcasting. Where an architecture has a
    mask function of its own (EmbeddingGemma: Gemma3 that looks both ways) it would use vmap, which
    cannot be traced.
    """
    ALL_MASK_ATTENTION_FUNCTIONS["eager"] = lambda **options: eager_mask(
        **{**options, "use_vmap": False}
    )
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["eager"]


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Within it, OpenVINO runs a graph. Its errors become CannotTrace."""
    try:
        yield
    except (RuntimeError, EngineFailed) as error:
        raise CannotTrace(f"{one_line(error)}: OpenVINO cannot run its graph") from error


def export(modality: Modality, trace: Callable[[], Any], folder: pathlib.Path) -> list[str]:
    """Trace one tower and write its graph into a bundle's folder. Weights are kept in fp16, which
    has half the size at cosine 1.00000.

    Returns: the names of the files.
    """
    with stage(_TRACING[modality]):
        return save(trace(), folder / graph_file(modality, "fp32"))


def compress(modality: Modality, folder: pathlib.Path) -> list[str]:
    """Write the graph once more, with weights in int8 with one scale an output channel; activations
    are quantised at run time.

    Returns: the names of the files.
    """
    with stage(_COMPRESSING[modality]), open(os.devnull, "w") as nowhere:
        nncf.set_log_level(logging.ERROR)
        with contextlib.redirect_stdout(nowhere):
            graph = ov.Core().read_model(folder / graph_file(modality, "fp32"))
            small = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
        return save(small, folder / graph_file(modality, "int8"))


def save(graph: Any, path: pathlib.Path, half: bool = True) -> list[str]:
    """Write a graph, its weights in fp16 with `half`. Returns: the names of the files."""
    ov.save_model(graph, path, compress_to_fp16=half)
    return [path.name, path.with_suffix(".bin").name]
