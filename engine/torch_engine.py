"""The torch engine: runs a model as sentence-transformers does, on the CPU or on GPUs. Only for
bundles that were baked for it; serving imports torch for nothing else.
"""

import contextlib
import copy
import logging
import os
import pathlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize

from engine.bundle import PARITY_FLOOR, TORCH_MODEL, Bundle, Modality, Parity, Precision
from engine.certificate import read_sample
from engine.errors import BundleError, DeviceUnavailable, PrecisionUnavailable
from engine.packing import Packer, flash_runs, to_device
from engine.protocol import Array, Engine, Float32
from engine.recording import Recordings

log = logging.getLogger(__name__)
T = TypeVar("T")

_DTYPES: dict[Precision, torch.dtype] = {
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
ALONE = 10.0  # seconds that an input without enough memory waits for the end of other calls
FULL_SPEED, GOOD_SPEED = 0.95, 0.8
CHECKED_TOKENS = 16_384  # of the sample, in a batch


class Pipeline(torch.nn.Module):
    """A SentenceTransformer's modules up to a trailing Normalize."""

    def __init__(self, model: SentenceTransformer, dtype: torch.dtype = torch.float32) -> None:
        """`dtype`: of the first module. The others (pooling and what follows) are cheap, and stay
        exact in float32.
        """
        super().__init__()
        parts = list(model)
        if isinstance(parts[-1], Normalize):
            del parts[-1]
        for part in parts[1:]:
            part.float()
        self.parts, self.dtype = torch.nn.ModuleList(parts), dtype
        # CLIP pools at the first of its end tokens, and pads with the same token; which of several
        # equal values is the largest, a graph does not define. Nothing after the first end token
        # has any effect: clear it.
        self.end = model.tokenizer.eos_token_id if model.config.model_type == "clip" else None
        self.counts_positions = pools_at_the_end(model)
        self.pad_id = model.tokenizer.pad_token_id
        self.pad_left = self.counts_positions or model.tokenizer.padding_side == "left"

    def embed(self, features: dict[str, Any]) -> torch.Tensor:
        """The vectors of features that the first module takes."""
        return self.finish(self.parts[0](features))

    def finish(self, features: dict[str, Any]) -> torch.Tensor:
        """The vectors of features that the first module gave."""
        if self.dtype != torch.float32:
            for name in ("token_embeddings", "sentence_embedding"):
                if name in features:
                    features[name] = features[name].float()
        for part in self.parts[1:]:
            features = part(features)
        vectors: torch.Tensor = features["sentence_embedding"]
        return vectors

    def texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Both int64, shape (texts, length). Returns: shape (texts, dimensions)."""
        if self.end is not None:
            ends = (input_ids == self.end).long()
            input_ids = input_ids * (ends.cumsum(1) - ends < 1)
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.counts_positions:
            features["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return self.embed(features)

    def pictures(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Shape (pictures, 3, height, width). Returns: shape (pictures, dimensions)."""
        return self.embed({"pixel_values": pixel_values.to(self.dtype), "modality": "image"})


def pools_at_the_end(model: Any) -> bool:
    """Whether the text tower takes its last position for the text's vector, be it padding or not.

    SigLIP's does. Its vectors are right for a text alone; a batch gives the same when it is padded
    on the left, masked, and its positions count from the text's beginning.
    """
    return str(model.config.model_type).startswith("siglip")


class _Replica:
    """The model on one device."""

    def __init__(
        self, model: Any, device: torch.device, dtype: torch.dtype, window: int, packed: bool
    ) -> None:
        """`window`: tokens of the longest text."""
        self.device = device
        self.pipeline = Pipeline(model, dtype).to(device).eval()
        self._packer = Packer(model[0], self.pipeline.pad_id, window) if packed else None
        self._recordings: Recordings | None = None
        self.running = 0  # calls
        self._streams: list[Any] = []

    def record(self) -> list[int]:
        """Record calls of some sizes, where that pays. Returns: the sizes, in tokens."""
        if self._packer is None or self.device.type == "cpu":
            return []
        finish = self.pipeline.finish
        self._recordings = Recordings(self._packer, finish, self.device, self.texts)
        return self._recordings.sizes

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        """Around a call: on a GPU it has a stream of its own, so that calls overlap."""
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            if self.device.type == "cuda":
                stream = self._streams.pop() if self._streams else _stream(self.device)
                stack.callback(self._streams.append, stream)
                stack.enter_context(torch.cuda.stream(stream))
            yield

    def texts(self, inputs: Sequence[Array]) -> Float32:
        """Token ids of each text, shape (length,). Returns: shape (texts, dimensions)."""
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
        self.device, dtype = devices[0], _DTYPES[precision]
        on_cpu = self.device.type == "cpu"
        self.packed = packed and (on_cpu or all(flash_runs(each, dtype) for each in devices))
        model = _load(bundle, dtype)
        copies = [model, *(copy.deepcopy(model) for _ in devices[1:])]
        self._replicas = [
            _Replica(each, device, dtype, bundle.manifest.max_tokens, self.packed)
            for each, device in zip(copies, devices)
        ]
        self._ended = threading.Condition()  # of calls
        # As protocol.Engine has them.
        self.calls = 1 if on_cpu else CALLS_PER_GPU * len(devices)
        self.max_batch_tokens: int | None = None
        self.measured: Parity | None = None
        self.min_batch_tokens = 64

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
        self, inputs: Any, compute: Callable[[_Replica, Any], Float32], again: bool = True
    ) -> Float32:
        """Compute on the device with the fewest calls. Where its memory does not suffice, the batch
        is computed in two halves, and those that follow are smaller; one input is computed `again`
        when no other call takes memory.

        Raises: RuntimeError when memory does not suffice for one input, or for another reason.
        """
        with self._ended:
            replica = min(self._replicas, key=lambda each: each.running)
            replica.running += 1
        try:
            return compute(replica, inputs)
        except RuntimeError as error:
            if not _out_of_memory(error):
                _end_if_lost(error)
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
            return self._run(inputs, compute, again=False)
        with self._ended:
            if self.max_batch_tokens is not None:
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
        return np.concatenate(
            [self._run(inputs[:half], compute), self._run(inputs[half:], compute)]
        )

    def measure(self) -> Parity:
        """Compare the vectors of the bundle's sample, in batches and some alone, with
        sentence-transformers' own.
        """
        sample = read_sample(self.bundle)
        texts, expected = sample.ids, sample.expected
        alone = range(0, len(texts), max(1, len(texts) // 12))
        actual, batch, tokens = [], list[Array](), 0
        for ids in [*texts, None]:
            if batch and (ids is None or tokens + len(ids) > CHECKED_TOKENS):
                actual.append(self.texts(batch))
                batch, tokens = [], 0
            if ids is not None:
                batch.append(ids)
                tokens += len(ids)
        actual += [self.texts([texts[at]]) for at in alone]
        cosines = _cosines(np.concatenate(actual), np.concatenate([expected, expected[alone]]))
        smallest = float(cosines[len(texts) :].min())
        return Parity(float(cosines.min()), float(cosines.mean()), len(cosines), smallest, [])

    def record(self) -> None:
        """Record calls on each device, where that pays."""
        sizes = [replica.record() for replica in self._replicas][0]
        log.info(
            "model %s on %s: calls of up to %d tokens are recorded",
            self.bundle.manifest.name,
            self.where,
            max(sizes, default=0),
        )

    def size_batches(self) -> None:
        """Time batches on the first device, see BATCHES."""
        texts = read_sample(self.bundle).ids
        length = min(BATCH_TEXT, self.bundle.manifest.max_tokens)
        speeds: list[float] = []
        for tokens in BATCHES:
            batch = list(np.resize(np.concatenate(texts), (max(1, tokens // length), length)))
            try:
                seconds = min(_timed(self._replicas[0].texts, batch) for _ in range(3))
            except torch.OutOfMemoryError:
                break
            speeds.append(tokens / seconds)
            if seconds >= LONG:
                break
        torch.cuda.empty_cache()
        reached = [speed / max(speeds, default=1) for speed in speeds] or [1.0]
        self.max_batch_tokens, self.min_batch_tokens = (
            BATCHES[next(at for at, share in enumerate(reached) if share >= wanted)]
            for wanted in (FULL_SPEED, GOOD_SPEED)
        )
        log.info(
            "model %s on %s: %.0f tokens/s in batches of up to %d tokens",
            self.bundle.manifest.name,
            self.where,
            max(speeds, default=0),
            self.max_batch_tokens,
        )


def _timed(call: Callable[[Any], object], argument: Any) -> float:
    started = time.perf_counter()
    call(argument)
    return time.perf_counter() - started


def _load(bundle: Bundle, dtype: torch.dtype) -> SentenceTransformer:
    """Raises: BundleError."""
    assert bundle.manifest.torch
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return SentenceTransformer(
            str(bundle.file(TORCH_MODEL)),
            device="cpu",
            local_files_only=True,
            trust_remote_code=bundle.manifest.torch.code,
            model_kwargs={"dtype": dtype},
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise BundleError(f"bundle {bundle.path}: its model cannot be loaded ({reason})") from None


def _cosines(actual: Float32, expected: Float32) -> Float32:
    """Of rows. What is not finite has cosine -1."""
    lengths = np.linalg.norm(actual, axis=1) * np.linalg.norm(expected, axis=1)
    cosines: Float32 = (actual * expected).sum(axis=1) / np.maximum(lengths, 1e-30)
    return np.nan_to_num(cosines, nan=-1.0, posinf=-1.0, neginf=-1.0)


def _out_of_memory(error: RuntimeError) -> bool:
    """cuBLAS has no exception of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or "_ALLOC_FAILED" in str(error)


def _end_if_lost(error: RuntimeError) -> None:
    """After an error on a GPU that is not about memory, every further call fails. So the process
    ends, and gunicorn starts another.
    """
    if isinstance(error, torch.AcceleratorError):
        log.critical("the GPU failed, and this process ends: %s", error)
        logging.shutdown()
        os._exit(1)


_opened: "weakref.WeakValueDictionary[tuple[object, ...], Model]" = weakref.WeakValueDictionary()


def open_model(bundle: Bundle, *, device: str, precision: str, threads: int) -> Model:
    """Load a model, or find it where its other modality's engine has loaded it.

    On a GPU, PRECISION=auto takes the first of fp16, bf16 and fp32 that gives the vectors of the
    bundle's sample.

    Args:
        device, precision: as DEVICE and PRECISION.
        threads: cores that a call uses on the CPU.

    Raises: DeviceUnavailable, PrecisionUnavailable, BundleError.
    """
    devices = _devices(device)
    key = bundle.path, bundle.manifest.created, tuple(devices), precision, threads
    model = _opened.get(key)
    if model is None:
        open_on = _open_on_cpu if devices[0].type == "cpu" else _open_on_gpus
        torch.set_num_threads(threads if devices[0].type == "cpu" else 1)
        model = _opened[key] = open_on(bundle, devices, precision)
    return model


def _devices(wanted: str) -> list[torch.device]:
    """Raises: DeviceUnavailable."""
    count = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cpu" or (wanted == "auto" and not count):
        return [torch.device("cpu")]
    _, _, number = wanted.partition(":")
    if int(number or 0) >= count:
        there = f"there are {count}" if count else "there is none, or its driver is too old"
        raise DeviceUnavailable(f"DEVICE={wanted}, but torch does not see that GPU: {there}")
    return [torch.device("cuda", each) for each in ([int(number)] if number else range(count))]


def _open_on_cpu(bundle: Bundle, devices: Sequence[torch.device], wanted: str) -> Model:
    assert bundle.manifest.torch
    if wanted == "auto":
        wanted = "bf16" if bundle.offers("bf16") and _has_amx() else "fp32"
    for precision in _DTYPES:
        if precision == wanted and precision != "fp16" and bundle.offers(precision):
            return Model(bundle, devices, precision, bundle.manifest.torch.packed)
    why = "it needs a GPU" if wanted == "fp16" else "the bundle was baked without it"
    offered = ", ".join(bundle.manifest.precisions)
    raise PrecisionUnavailable(
        f"PRECISION={wanted}, but for bundle {bundle.manifest.name} on the CPU there is {offered}: "
        f"{why}"
    )


def _has_amx() -> bool:
    """Whether bf16 is faster than fp32 on this CPU, in torch."""
    try:
        return "amx_bf16" in pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _open_on_gpus(bundle: Bundle, devices: Sequence[torch.device], wanted: str) -> Model:
    assert bundle.manifest.torch
    if wanted == "int8":
        raise PrecisionUnavailable(
            f"PRECISION=int8, but bundle {bundle.manifest.name} is served on a GPU, by torch; use "
            "auto, fp16, bf16 or fp32"
        )
    candidates: list[Precision] = ["fp16", "bf16", "fp32"]
    if any(torch.cuda.get_device_capability(each) < (8, 0) for each in devices):
        candidates.remove("bf16")
    tried = []
    for precision in candidates:
        if wanted not in ("auto", precision):
            continue
        model = Model(bundle, devices, precision, bundle.manifest.torch.packed)
        model.record()
        parity = model.measured = model.measure()
        tried.append(
            f"{precision} on {model.where}: smallest cosine {parity.minimum:.5f}, mean "
            f"{parity.mean:.5f} over {parity.cases} texts"
        )
        log.info("model %s, %s", bundle.manifest.name, tried[-1])
        if parity.minimum >= PARITY_FLOOR[precision]:
            model.size_batches()
            return model
        del model
        torch.cuda.empty_cache()
    if not tried:
        raise PrecisionUnavailable(f"PRECISION={wanted}, but this GPU has no {wanted} arithmetic")
    raise PrecisionUnavailable(
        f"bundle {bundle.path}: its vectors are not the model's own here ({'; '.join(tried)}; at "
        f"least {', '.join(f'{PARITY_FLOOR[each]} at {each}' for each in candidates)} expected)"
    )


class _TorchEngine(Engine):
    backend = "torch"
    modality: Modality
    padding_cost = 1.0

    def __init__(self, model: Model) -> None:
        manifest = model.bundle.manifest
        self.name, self.dimensions, self.precision = (
            manifest.name,
            manifest.dimensions,
            model.precision,
        )
        self.isa, self.calls, self.model = model.where, model.calls, model
        self.measured = model.measured

    @property
    def max_batch_tokens(self) -> int | None:  # type: ignore[override]  # it falls
        return self.model.max_batch_tokens

    @property
    def min_batch_tokens(self) -> int:  # type: ignore[override]
        return self.model.min_batch_tokens


class TorchTextEngine(_TorchEngine):
    modality = "text"

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.padding_cost = 0.0 if model.packed else 1.0

    def run(self, inputs: Sequence[Array], *, alone: bool = False) -> Float32:
        """Embed token id arrays, each int64 of shape (length,), special tokens included.

        Returns: float32 of shape (len(inputs), dimensions): what the model's pipeline gives before
        a trailing Normalize.
        Raises: torch.OutOfMemoryError for one input that the device's memory has no room for.
        """
        return self.model.texts(inputs)


class TorchImageEngine(_TorchEngine):
    modality = "image"

    def __init__(self, model: Model) -> None:
        """Raises: BundleError."""
        super().__init__(model)
        self.preprocessing = model.bundle.preprocessing()

    def run(self, inputs: Sequence[Array], *, alone: bool = False) -> Float32:
        """Embed pictures, each uint8 of shape (height, width, 3), prepared up to the crop.

        Returns, raises: as `TorchTextEngine.run`.
        """
        return self.model.pictures(self.preprocessing.normalize(np.stack(inputs)))
