"""The OpenVINO engines: token ids or pixels in, embeddings out, on this machine's CPU."""

import sys
import threading
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

# When it is imported, OpenVINO reports to Google Analytics from a process that it forks. There is
# no network at run time, and the child was seen to hang and to delay a shutdown. Without this
# module OpenVINO uses its own stub.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import openvino as ov  # type: ignore[import-untyped]  # noqa: E402

from engine.bundle import Bundle, Modality, Precision, graph_file  # noqa: E402
from engine.errors import PrecisionUnavailable  # noqa: E402
from engine.protocol import TYPE_BITS, Engine, Float32  # noqa: E402

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

# Activations are quantised in groups of this many values, each with its own scale. Measured on
# all-MiniLM-L6-v2 (Zen 4): 64 keeps cos >= 0.995 at 9 400-10 480 tokens/s a core; 32 gives 8 240;
# 128 is no faster and falls to 0.991.
DYNAMIC_QUANTIZATION_GROUP_SIZE = 64

# The cost of a padded token as a share of a real one, in an unpadded graph, where only attention
# computes it: eight texts of 8 to 250 tokens, 941 in all and padded to 1777, take 1.2 times as long
# as 941 without padding (MiniLM, Zen 4, bf16).
UNPADDED_PADDING_COST = 0.2

# A second copy is made of weights up to this many bytes (at fp32 it takes twice as many in memory).
# MiniLM has 45 MB, a model of BERT-base's size 220 MB.
WIDE_WEIGHTS = 100_000_000

# The number of tokens in an unpadded graph, and the length that attention sees, are rounded up to
# multiples of these. OpenVINO prepares and keeps something for each size it meets, so fewer sizes
# are faster (2-7 %) and take less memory. Lengths in steps of 16 are 1-5 % faster than in steps of
# 8 or 32.
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
    """The precisions that this CPU can run."""
    return ["fp32", "bf16", "int8"] if has_bf16() else ["fp32", "int8"]


def choose_precision(wanted: str, bundle: Bundle | None = None) -> Precision:
    """Turn PRECISION into one that this CPU runs: `auto` is bf16 where the CPU has it and the
    bundle was baked for it, else fp32.

    Raises: PrecisionUnavailable for bf16 on a CPU without it: a service that does not start is
    better than a silent fallback.
    """
    if wanted == "auto":
        offered = bundle is None or "OpenVINO" in bundle.backends("bf16")
        return "bf16" if offered and has_bf16() else "fp32"
    if wanted == "bf16" and not has_bf16():
        raise PrecisionUnavailable(
            "PRECISION=bf16, but this CPU has no bf16 arithmetic; use auto, fp32 or int8"
        )
    return wanted  # type: ignore[return-value]  # settings.py lets nothing else through


def unpadded_inputs(mask: Int64) -> dict[str, Int32]:
    """The two further inputs of an unpadded graph, from the mask of shape (batch, length): `rows`,
    where the real tokens are in the flattened mask, and `places`, which of them stands at each
    place of it.
    """
    flat = mask.ravel()
    real = np.flatnonzero(flat)
    # The rows beyond the real tokens are computed, but no place refers to them.
    rows = np.zeros(_round_up(len(real), TOKENS_STEP), np.int32)
    rows[: len(real)] = real
    # Padding refers to the real token before it, or to the first.
    places = np.maximum(flat.cumsum() - 1, 0).astype(np.int32)
    return {"rows": rows, "places": places.reshape(mask.shape)}


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


class _Graph:
    """One of a bundle's graphs, compiled for `streams` calls at a time that share `threads` cores.

    Safe to call from any number of threads; each thread keeps an inference request of its own.
    """

    def __init__(
        self, bundle: Bundle, modality: Modality, precision: Precision, streams: int, threads: int
    ) -> None:
        """Raises: PrecisionUnavailable when the bundle was baked without the graph that `precision`
        runs.
        """
        if "OpenVINO" not in bundle.backends(precision):
            raise bundle.refusal("OpenVINO", precision)
        hints = dict(_HINTS[precision])
        if precision == "int8":
            # 5-20 % faster than f32 around the int8 products, at the same cosine.
            hints["INFERENCE_PRECISION_HINT"] = "bf16" if has_bf16() else "f32"
        self._compiled = ov.Core().compile_model(
            str(bundle.file(graph_file(modality, precision))),
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
        names = {name for each in self._compiled.inputs for name in each.names}
        self.unpadded = "rows" in names  # see `unpadded_inputs`
        self.typed = "token_type_ids" in names

    def infer(self, inputs: Mapping[str, Int64 | Int32 | Float32]) -> Float32:
        """The graph's one output for named inputs.

        An engine makes its first call while it is built. That call sets up statics in OpenVINO's
        binding under a C++ guard that releases the GIL: two first calls at once were seen to
        deadlock.
        """
        request: ov.InferRequest | None = getattr(self._requests, "request", None)
        if request is None:
            request = self._requests.request = self._compiled.create_infer_request()
        # As an argument of infer they would be copied, which takes twice as long.
        for name, array in inputs.items():
            request.set_tensor(name, ov.Tensor(array, shared_memory=True))
        request.infer(share_outputs=True)
        # A copy, since the next call reuses the tensor.
        return np.array(request.get_output_tensor(0).data, np.float32)


class _OpenVINOEngine(Engine):
    """One of a bundle's graphs; `streams` calls run at a time, on one core each. Safe to call from
    any number of threads.
    """

    backend = "OpenVINO"
    modality: Modality
    min_batch_tokens = 64
    padding_cost = 1.0  # of no effect on pictures: all have one size

    def __init__(self, bundle: Bundle, precision: Precision, *, streams: int) -> None:
        """Raises: PrecisionUnavailable when the bundle was baked without the graph that `precision`
        runs; BundleError.
        """
        self.name, self.dimensions = bundle.manifest.name, bundle.manifest.dimensions
        self.bundle, self.precision, self.streams = bundle, precision, streams
        self._graph = _Graph(bundle, self.modality, precision, streams, streams)


class OpenVINOTextEngine(_OpenVINOEngine):
    modality = "text"

    def __init__(
        self, bundle: Bundle, precision: Precision, *, pad_id: int, pad_left: bool, streams: int
    ) -> None:
        super().__init__(bundle, precision, streams=streams)
        self._pad_id, self._pad_left = pad_id, pad_left
        self._max_tokens = bundle.manifest.max_tokens
        self.padding_cost = UNPADDED_PADDING_COST if self._graph.unpadded else 1.0
        self._wide = self._graph
        self.run([np.array([pad_id], np.int64)])

    def widen(self) -> None:
        """Compile the graph once more, for batches that are alone: they run on all cores, in about
        half the time for a short text. It costs a second copy of the weights, so larger models than
        WIDE_WEIGHTS do without.
        """
        weights = self.bundle.file(graph_file("text", self.precision)).with_suffix(".bin")
        if self.streams > 1 and weights.stat().st_size <= WIDE_WEIGHTS:
            wide = _Graph(self.bundle, "text", self.precision, 1, self.streams)
            wide.infer(self._inputs([np.array([self._pad_id], np.int64)]))
            self._wide = wide

    def run(self, inputs: Sequence[Int64], *, alone: bool = False) -> Float32:
        """Embed token id arrays, each of shape (length,), special tokens included. They are padded
        on the tokenizer's side with its padding id, and masked. Of a scorer, types of tokens stand
        above TYPE_BITS.

        Returns: float32 of shape (len(inputs), dimensions): what the model's pipeline gives before
        a trailing Normalize; of a scorer, raw scores.
        """
        return (self._wide if alone else self._graph).infer(self._inputs(inputs))

    def _inputs(self, inputs: Sequence[Int64]) -> dict[str, Int64 | Int32]:
        longest = max(len(ids) for ids in inputs)
        if self._graph.unpadded:
            longest = max(longest, min(_round_up(longest, LENGTH_STEP), self._max_tokens))
        token_ids = np.full((len(inputs), longest), self._pad_id, np.int64)
        mask = np.zeros((len(inputs), longest), np.int64)
        for row, ids in enumerate(inputs):
            span = slice(longest - len(ids), longest) if self._pad_left else slice(0, len(ids))
            token_ids[row, span] = ids
            mask[row, span] = 1
        named: dict[str, Int64 | Int32] = {"input_ids": token_ids, "attention_mask": mask}
        if self._graph.typed:
            named["input_ids"] = token_ids & ((1 << TYPE_BITS) - 1)
            named["token_type_ids"] = token_ids >> TYPE_BITS
        if self._graph.unpadded:
            named |= unpadded_inputs(mask)
        return named


class OpenVINOImageEngine(_OpenVINOEngine):
    modality = "image"

    def __init__(self, bundle: Bundle, precision: Precision, *, streams: int) -> None:
        super().__init__(bundle, precision, streams=streams)
        self.preprocessing = bundle.preprocessing()

    def run(self, inputs: Sequence[UInt8], *, alone: bool = False) -> Float32:
        """Embed pictures, each of shape (height, width, 3), prepared up to the crop. They wait in
        the queue as bytes: as float32 they would take four times the memory.

        Returns: float32 of shape (len(inputs), dimensions): what the model's pipeline gives before
        a trailing Normalize.
        """
        return self._graph.infer({"pixel_values": self.preprocessing.normalize(np.stack(inputs))})
