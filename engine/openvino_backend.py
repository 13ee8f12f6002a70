"""The OpenVINO engines: token ids or pixels in, embeddings out, on this machine's CPU."""

import sys
import threading
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

# At its import OpenVINO would tell Google Analytics of it, from a process that it forks: no network
# at run time, and such a child was seen to hang and to hold up a shutdown. Without this module
# OpenVINO uses its own stub.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import openvino as ov  # type: ignore[import-untyped]  # noqa: E402

from engine.bundle import IMAGE_GRAPH, TEXT_GRAPH, Bundle, Precision  # noqa: E402
from engine.errors import PrecisionUnavailable  # noqa: E402

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

# Activations are quantised in groups of this many values, each with its own scale. Measured on
# all-MiniLM-L6-v2 (Zen 4): 64 keeps cos >= 0.995 at 9 400-10 480 tokens/s a core; 32 gives 8 240;
# 128 is no faster and falls to 0.991.
DYNAMIC_QUANTIZATION_GROUP_SIZE = 64

# What a padded token costs in a packed graph, where attention alone computes it, as a share of a
# real one: eight texts of 8 to 250 tokens, 941 in all and padded to 1777, take 1.2 times as long as
# 941 without padding (MiniLM, Zen 4, bf16).
PACKED_PADDING_COST = 0.2

# Bytes of a graph's weights up to which a second copy is worth its memory (twice as much at fp32):
# MiniLM has 45 MB, a model of BERT's base size 220.
WIDE_WEIGHTS = 100_000_000

# A packed graph's tokens, and the length that attention sees, are rounded up to multiples of these.
# OpenVINO keeps what it prepares for each size that it meets, so fewer are faster (2-7 %) and take
# less memory. At lengths of multiples of 16 it is 1-5 % faster than at those of 8 or 32.
TOKENS_STEP, LENGTH_STEP = 8, 16

_HINTS: dict[Precision, dict[str, object]] = {
    "fp32": {"INFERENCE_PRECISION_HINT": "f32"},
    "bf16": {"INFERENCE_PRECISION_HINT": "bf16"},
    "int8": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": DYNAMIC_QUANTIZATION_GROUP_SIZE},
}


def has_bf16() -> bool:
    """Whether this CPU computes in bf16 natively (AVX512-BF16, AMX or Arm's BF16); elsewhere
    OpenVINO emulates it.
    """
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def available_precisions() -> list[Precision]:
    """What this CPU can run."""
    return ["fp32", "bf16", "int8"] if has_bf16() else ["fp32", "int8"]


def choose_precision(wanted: str, bundle: Bundle | None = None) -> Precision:
    """Turn PRECISION into what this CPU runs: `auto` is bf16 where the CPU has it and the bundle
    was baked for it, else fp32.

    Raises: PrecisionUnavailable when bf16 is asked of a CPU without it: better no start than a
    silent fallback.
    """
    if wanted == "auto":
        offered = bundle is None or bundle.offers("bf16")
        return "bf16" if offered and has_bf16() else "fp32"
    if wanted == "bf16" and not has_bf16():
        raise PrecisionUnavailable(
            "PRECISION=bf16, but this CPU has no bf16 arithmetic; use auto, fp32 or int8"
        )
    return wanted  # type: ignore[return-value]  # settings.py lets nothing else through


def packing(mask: Int64) -> dict[str, Int32]:
    """The further inputs of a packed graph (engine/packing.py), from the mask of shape (batch,
    length).
    """
    flat = mask.ravel()
    real = np.flatnonzero(flat)
    # What is added to the real tokens is a token that no place refers to.
    rows = np.zeros(_round_up(len(real), TOKENS_STEP), np.int32)
    rows[: len(real)] = real
    # Padding stands for the real token before it, or for the first.
    places = np.maximum(flat.cumsum() - 1, 0).astype(np.int32)
    return {"rows": rows, "places": places.reshape(mask.shape)}


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


class _Graph:
    """One of a bundle's graphs, compiled for `streams` calls at a time that share `threads` cores.

    Safe to call from any number of threads; each thread keeps an inference request of its own.
    """

    def __init__(
        self, bundle: Bundle, graph: str, precision: Precision, streams: int, threads: int
    ) -> None:
        """Raises: PrecisionUnavailable when the bundle was baked without the graph that `precision`
        runs.
        """
        if not bundle.offers(precision):
            raise PrecisionUnavailable(
                f"PRECISION={precision}, but bundle {bundle.manifest.name} was baked without it; "
                "bake it again"
            )
        hints = dict(_HINTS[precision])
        if precision == "int8":
            # 5-20 % faster than f32 around the int8 products, at the same cosine.
            hints["INFERENCE_PRECISION_HINT"] = "bf16" if has_bf16() else "f32"
        self._compiled = ov.Core().compile_model(
            str(bundle.file(graph)),
            "CPU",
            {
                **hints,
                "NUM_STREAMS": streams,
                "INFERENCE_NUM_THREADS": threads,
                # Two processes that pin their threads pin them to the same cores and run at half
                # speed.
                "ENABLE_CPU_PINNING": False,
            },
        )
        self._requests = threading.local()
        self.packed = len(self._compiled.inputs) > 2  # see engine/packing.py

    def infer(self, inputs: Mapping[str, Int64 | Int32 | Float32]) -> Float32:
        """The graph's one output for named inputs. An engine makes its first call while it is
        built.

        That call sets up statics in OpenVINO's binding, under a C++ guard that lets go of the GIL:
        two first calls at once were seen to wait for each other for ever, the GIL held.
        """
        request: ov.InferRequest | None = getattr(self._requests, "request", None)
        if request is None:
            request = self._requests.request = self._compiled.create_infer_request()
        # Not as an argument of infer: it would copy them, and takes twice as long about it.
        for name, array in inputs.items():
            request.set_tensor(name, ov.Tensor(array, shared_memory=True))
        request.infer(share_outputs=True)
        return np.array(
            request.get_output_tensor(0).data, np.float32
        )  # a copy: the tensor is reused by the next call


class OpenVINOTextEngine:
    """A bundle's text graph, as a batching.Engine; `streams` calls run at a time, on one core each.
    Safe to call from any number of threads.
    """

    backend = "OpenVINO"
    share = 64

    def __init__(
        self,
        bundle: Bundle,
        precision: Precision,
        *,
        pad_id: int,
        pad_left: bool,
        streams: int,
    ) -> None:
        """Raises: PrecisionUnavailable when the bundle was baked without the graph that `precision`
        runs.
        """
        self.name, self.modality = bundle.manifest.name, "text"
        self.precision = precision
        self.dimensions = bundle.manifest.dimensions
        self.streams = streams
        self._pad_id, self._pad_left = pad_id, pad_left
        self._max_tokens = bundle.manifest.max_tokens
        self._graph = _Graph(bundle, TEXT_GRAPH[precision], precision, streams, streams)
        self.padding_cost = PACKED_PADDING_COST if self._graph.packed else 1.0
        self.run([np.array([pad_id], np.int64)])
        self._widen = partial(_Graph, bundle, TEXT_GRAPH[precision], precision, 1, streams)
        self._wide = self._graph
        weights = bundle.file(TEXT_GRAPH[precision]).with_suffix(".bin")
        self._weights = weights.stat().st_size

    def widen(self) -> None:
        """Make calls that are alone run on all cores, which takes a short text about half the time
        and a second copy of the weights: for models up to WIDE_WEIGHTS. Not part of the start.
        """
        if self.streams > 1 and self._weights <= WIDE_WEIGHTS:
            wide = self._widen()
            wide.infer(self._inputs([np.array([self._pad_id], np.int64)]))
            self._wide = wide

    def run(self, inputs: Sequence[Int64], *, alone: bool = False) -> Float32:
        """Embed a batch of token id arrays, each of shape (length,), special tokens included.

        Returns: float32 of shape (len(inputs), dimensions): what the model's pipeline gives before
        a trailing Normalize. Padding goes to the tokenizer's own side with its own id, and is
        masked.
        """
        return (self._wide if alone else self._graph).infer(self._inputs(inputs))

    def _inputs(self, inputs: Sequence[Int64]) -> dict[str, Int64 | Int32]:
        longest = max(len(ids) for ids in inputs)
        if self._graph.packed:
            longest = max(longest, min(_round_up(longest, LENGTH_STEP), self._max_tokens))
        token_ids = np.full((len(inputs), longest), self._pad_id, np.int64)
        mask = np.zeros((len(inputs), longest), np.int64)
        for row, ids in enumerate(inputs):
            span = slice(longest - len(ids), longest) if self._pad_left else slice(0, len(ids))
            token_ids[row, span] = ids
            mask[row, span] = 1
        named: dict[str, Int64 | Int32] = {"input_ids": token_ids, "attention_mask": mask}
        if self._graph.packed:
            named |= packing(mask)
        return named


class OpenVINOImageEngine:
    """A bundle's image graph, as a batching.Engine; `streams` calls run at a time, on one core
    each. Safe to call from any number of threads.
    """

    def __init__(self, bundle: Bundle, precision: Precision, *, streams: int) -> None:
        """Raises: PrecisionUnavailable when the bundle was baked without the graph that `precision`
        runs; BundleError.
        """
        self.name, self.modality = bundle.manifest.name, "image"
        self.precision = precision
        self.dimensions = bundle.manifest.dimensions
        self.preprocessing = bundle.preprocessing()
        self.padding_cost = 1.0  # pictures are of one size
        self.share = 64
        self._graph = _Graph(bundle, IMAGE_GRAPH[precision], precision, streams, streams)

    def run(self, inputs: Sequence[UInt8], *, alone: bool = False) -> Float32:
        """Embed a batch of pictures, each of shape (height, width, 3), prepared up to the crop.

        They wait in the queue as bytes: as float32 they would take four times the memory.

        Returns: float32 of shape (len(inputs), dimensions): what the model's pipeline gives before
        a trailing Normalize.
        """
        return self._graph.infer({"pixel_values": self.preprocessing.normalize(np.stack(inputs))})
