"""A model for torch, on one or several devices: loaded, measured, computed. engine/torch_engine.py
decides on which devices and at which precision.
"""

import contextlib
import copy
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer

from engine.bundle import PARITY_FLOOR, TORCH_MODEL, Bundle, Parity, Precision, Torch
from engine.certificate import Compared, read_sample
from engine.errors import BundleError
from engine.packing import Packer, flash_runs, to_device
from engine.pipeline import Pipeline
from engine.protocol import Array, Float32
from engine.recording import Recordings

log = logging.getLogger(__name__)

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
# One call is computed while the next is prepared.
CALLS_PER_GPU = 2
# On a GPU, batches of so many tokens are timed when the service starts, of texts of BATCH_TEXT
# tokens, up to the first that takes LONG seconds: other requests wait for it. The largest batch is
# the first with FULL_SPEED of the best speed. None is split for other calls below the first with
# GOOD_SPEED.
BATCHES = tuple(1024 << power for power in range(8))
BATCH_TEXT = 128
LONG = 0.2
# CUDA's codes (driver_types.h): of what is refused before it runs, and of memory.
_OUT_OF_MEMORY, _HARMLESS = 2, (1, 9)
ALONE = 10.0  # seconds that an input without enough memory waits for the end of other calls
FULL_SPEED, GOOD_SPEED = 0.95, 0.8
CHECKED_TOKENS = 16_384  # of the sample, in a batch


class _Replica:
    """The model on one device."""

    def __init__(
        self,
        model: Any,
        device: torch.device,
        dtype: torch.dtype,
        *,
        window: int,
        packed: bool,
        stateful: bool,
        alone: bool,
    ) -> None:
        """`window`: tokens of the longest text. `stateful`: a call changes the model. `alone`: as
        the manifest has it.
        """
        self.device = device
        self.pipeline = Pipeline(model, dtype).to(device).eval()
        self._turn = threading.Lock() if stateful else contextlib.nullcontext()
        self._stateful, self._alone = stateful, alone
        self._packer = Packer(model[0], self.pipeline.pad_id, window) if packed else None
        self._recordings: Recordings | None = None
        self.running = 0  # calls
        self._streams: list[Any] = []

    @property
    def can_record(self) -> bool:
        """Whether calls can be recorded: the same operations for all texts, on a GPU."""
        # What leaves out a prompt's tokens waits for the device, which a recording cannot.
        still = self._stateful or self.pipeline.prompt_length
        return self._packer is not None and not still and self.device.type != "cpu"

    def record(self, most: int) -> list[int]:
        """Record calls of up to `most` tokens, where that pays, if they can be recorded.

        Returns: their sizes, in tokens.
        """
        if self._packer is None or not self.can_record:
            return []
        finish = self.pipeline.finish
        self._recordings = Recordings(self._packer, finish, self.device, self.texts, most)
        return self._recordings.sizes

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        """Around a call: on a GPU it has a stream of its own, so that calls overlap."""
        with self._turn, torch.inference_mode(), contextlib.ExitStack() as stack:
            if self.device.type == "cuda":
                stream = self._streams.pop() if self._streams else _stream(self.device)
                stack.callback(self._streams.append, stream)
                stack.enter_context(torch.cuda.stream(stream))
            yield

    def texts(self, inputs: Sequence[Array]) -> Float32:
        """Token ids of each text, shape (length,). Returns: shape (texts, dimensions)."""
        if self._alone and len(inputs) > 1:
            return np.concatenate([self.texts([ids]) for ids in inputs])
        if self._recordings and (vectors := self._recordings.texts(inputs)) is not None:
            return vectors
        with self._call():
            if self._packer:
                return _to_host(self.pipeline.finish(self._packer(inputs, self.device)))
            longest = max(len(ids) for ids in inputs)
            padded = np.full((2, len(inputs), longest), self.pipeline.pad_id, np.int64)
            padded[1] = 0
            for row, ids in enumerate(inputs):
                left = self.pipeline.pad_left
                span = slice(longest - len(ids), longest) if left else slice(0, len(ids))
                padded[0, row, span] = ids
                padded[1, row, span] = 1
            return _to_host(self.pipeline.texts(*to_device(padded, self.device)))

    def pictures(self, pixels: Float32) -> Float32:
        """Shape (pictures, 3, height, width). Returns: shape (pictures, dimensions)."""
        with self._call():
            return _to_host(self.pipeline.pictures(to_device(pixels, self.device)))


def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _to_host(vectors: torch.Tensor) -> Float32:
    """Waits for the device; other Python threads run meanwhile."""
    return np.asarray(vectors.float().cpu().numpy(), np.float32)


class Model:
    """A bundle's model on one device, or the same on several. Safe to call from any thread."""

    def __init__(
        self, bundle: Bundle, devices: Sequence[torch.device], precision: Precision, packed: bool
    ) -> None:
        """`packed`: compute texts without padding, where the devices can."""
        self.bundle, self.precision = bundle, precision
        self.device, dtype = devices[0], DTYPES[precision]
        on_cpu = self.device.type == "cpu"
        self.packed = packed and (on_cpu or all(flash_runs(each, dtype) for each in devices))
        model = _load(bundle, dtype)
        copies = [model, *(copy.deepcopy(model) for _ in devices[1:])]
        self._replicas = [
            _Replica(
                each,
                device,
                dtype,
                window=bundle.manifest.max_tokens,
                packed=self.packed,
                stateful=_stateful(bundle, model),
                alone=torch_of(bundle).alone,
            )
            for each, device in zip(copies, devices)
        ]
        self._recorded: list[list[int]] = [[] for _ in devices]
        self._ended = threading.Condition()  # of calls
        # As protocol.Engine has them.
        self.calls = 1 if on_cpu else CALLS_PER_GPU * len(devices)
        self.max_batch_tokens: int | None = None
        self.min_batch_tokens = 64
        self.measured: Parity | None = None  # on the GPU, at start

    @property
    def where(self) -> str:
        """The kind of device, for people."""
        if self.device.type == "cpu":
            return "cpu"
        count, name = len(self._replicas), torch.cuda.get_device_name(self.device)
        return name if count == 1 else f"{count} x {name}"

    def texts(self, inputs: Sequence[Array]) -> Float32:
        """As `_Replica.texts`. Raises: as `_run`."""
        return self._run(inputs, _Replica.texts)

    def pictures(self, pixels: Float32) -> Float32:
        """As `_Replica.pictures`. Raises: as `_run`."""
        return self._run(pixels, _Replica.pictures)

    def _run(
        self,
        inputs: Any,
        compute: Callable[[_Replica, Any], Float32],
        *,
        again: bool = True,
        part: bool = False,
    ) -> Float32:
        """Compute on the device with the fewest calls. Where its memory does not suffice, the batch
        is computed in two halves, and those that follow are smaller, unless this is a `part` of
        one; one input is computed `again` when no other call takes memory.

        Raises: RuntimeError when memory does not suffice for one input, or for another reason.
        """
        with self._ended:
            replica = min(self._replicas, key=lambda each: each.running)
            replica.running += 1
        try:
            return compute(replica, inputs)
        except RuntimeError as error:
            if not _out_of_memory(error):
                end_if_lost(error)
                raise
            if len(inputs) == 1 and not again:
                raise
        finally:
            with self._ended:
                replica.running -= 1
                self._ended.notify_all()
        # Here, where no exception holds the tensors of the call that failed.
        torch.cuda.empty_cache()
        if len(inputs) == 1:
            with self._ended:
                self._ended.wait_for(lambda: replica.running == 0, ALONE)
            return self._run(inputs, compute, again=False, part=True)
        with self._ended:
            if self.max_batch_tokens is not None and not part:
                self.max_batch_tokens = max(BATCHES[0], self.max_batch_tokens // 2)
                self.min_batch_tokens = min(self.min_batch_tokens, self.max_batch_tokens)
        log.warning(
            "out of memory on %s: a batch of %d inputs is computed in halves; batches have at most "
            "%s tokens from now on",
            self.where,
            len(inputs),
            self.max_batch_tokens,
        )
        half = len(inputs) // 2
        halves = inputs[:half], inputs[half:]
        return np.concatenate([self._run(each, compute, part=True) for each in halves])

    def measure(self) -> Parity:
        """Compare the vectors of the bundle's sample of texts with sentence-transformers' own, on
        each device: all in batches, some alone, and as many as each recorded call has room for.

        Returns: the certificate, without numbers of threads. Where the model does not normalise and
            the length of any vector is off by more than its precision allows, `minimum` is -1.
        Raises: BundleError when the sample cannot be read; what the model's code raises.
        """
        sample = read_sample(self.bundle)
        lengths = [len(ids) for ids in sample.ids]
        alone = [[at] for at in range(0, len(lengths), max(1, len(lengths) // 12))]
        company, single = (Compared(self.bundle, sample.expected) for _ in range(2))
        for replica, sizes in zip(self._replicas, self._recorded):
            full = [_filling(size, lengths) for size in sizes]
            for batch in filter(None, [*_batches(lengths), *alone, *full]):
                compared = company if len(batch) > 1 else single
                compared.add(batch, replica.texts([sample.ids[at] for at in batch]))
        lone = np.concatenate(single.cosines)
        found = np.concatenate([*company.cosines, lone])
        # As in engine/certificate.py: how far the lengths of vectors at this cosine may differ.
        most = math.sqrt(2 - 2 * PARITY_FLOOR[self.precision])
        smallest = float(found.min()) if max(company.apart, single.apart) <= most else -1.0
        return Parity(smallest, float(found.mean()), len(found), float(lone.min()), [])

    def record(self) -> None:
        """Record calls on each device, where that pays: up to the size that batches have without
        recordings. Small batches get faster, so `size_batches` has to come after this.
        """
        if not self._replicas[0].can_record:
            return
        most, *_ = self._sizes()
        self._recorded = [replica.record(most) for replica in self._replicas]
        log.info(
            "model %s on %s: calls of up to %d tokens are recorded",
            self.bundle.manifest.name,
            self.where,
            max(self._recorded[0], default=0),
        )

    def size_batches(self) -> None:
        """Choose the size of batches, by their time on the first device."""
        self.max_batch_tokens, self.min_batch_tokens, speed = self._sizes()
        log.info(
            "model %s on %s: %.0f tokens/s in batches of up to %d tokens",
            self.bundle.manifest.name,
            self.where,
            speed,
            self.max_batch_tokens,
        )

    def _sizes(self) -> tuple[int, int, float]:
        """Time batches on the first device, see BATCHES. Returns: the tokens of the largest batch,
        those below which none is split, and the best speed in tokens/s.
        """
        texts = read_sample(self.bundle).ids
        length = min(BATCH_TEXT, self.bundle.manifest.max_tokens)
        speeds: list[float] = []
        for tokens in BATCHES:
            batch = list(np.resize(np.concatenate(texts), (max(1, tokens // length), length)))
            try:
                seconds = min(_timed(self._replicas[0].texts, batch) for _ in range(3))
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                break
            speeds.append(tokens / seconds)
            if seconds >= LONG:
                break
        torch.cuda.empty_cache()
        best = max(speeds, default=0.0)
        reached = [speed / best for speed in speeds] or [1.0]
        largest, good = (
            BATCHES[next(at for at, share in enumerate(reached) if share >= wanted)]
            for wanted in (FULL_SPEED, GOOD_SPEED)
        )
        return largest, good, best


def _stateful(bundle: Bundle, model: torch.nn.Module) -> bool:
    """Whether a call may change the model, so that calls must not overlap: code of its own may do
    anything, and transformers computes the frequencies of these positions anew for long texts.
    """
    kinds = set()
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds |= set(kind.values() if isinstance(kind, dict) else [kind])  # a dict: by layer type
    return torch_of(bundle).code or bool(kinds & {"dynamic", "longrope"})


def torch_of(bundle: Bundle) -> Torch:
    assert bundle.manifest.torch
    return bundle.manifest.torch


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """All texts of these lengths, by their places, in batches of about CHECKED_TOKENS."""
    numbers = np.cumsum(lengths) // CHECKED_TOKENS
    return [np.flatnonzero(numbers == number).tolist() for number in range(numbers[-1] + 1)]


def _filling(tokens: int, lengths: Sequence[int]) -> list[int]:
    """The places of texts that have up to `tokens` together; if all have less, the longest again
    and again.
    """
    if sum(lengths) < tokens:
        longest = int(np.argmax(lengths))
        return [longest] * (tokens // lengths[longest])
    places = []
    for place, length in enumerate(lengths):
        if length <= tokens:
            places.append(place)
            tokens -= length
    return places


def _timed(call: Callable[[Any], object], argument: Any) -> float:
    started = time.perf_counter()
    call(argument)
    return time.perf_counter() - started


def _load(bundle: Bundle, dtype: torch.dtype) -> SentenceTransformer:
    """Raises: BundleError."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return SentenceTransformer(
            str(bundle.file(TORCH_MODEL)),
            device="cpu",
            local_files_only=True,
            trust_remote_code=torch_of(bundle).code,
            model_kwargs={"dtype": dtype},
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise BundleError(f"bundle {bundle.path}: its model cannot be loaded ({reason})") from None


def _out_of_memory(error: RuntimeError) -> bool:
    """Only torch's own allocations have an exception of their own for it."""
    return (
        isinstance(error, torch.OutOfMemoryError)
        or getattr(error, "error_code", 0) == _OUT_OF_MEMORY
        or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
        or "CUBLAS_STATUS_NOT_INITIALIZED" in str(error)  # no memory for a thread's first product
    )


def end_if_lost(error: RuntimeError) -> None:
    """After most errors on a GPU every further call fails. So the process ends, and gunicorn starts
    another.
    """
    harmless = getattr(error, "error_code", 0) in _HARMLESS
    if isinstance(error, torch.AcceleratorError) and not harmless:
        log.critical("the GPU failed, and this process ends: %s", error)
        logging.shutdown()
        os._exit(1)
