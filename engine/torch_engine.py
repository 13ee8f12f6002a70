"""The torch engine: runs a model as sentence-transformers does, on the CPU or on GPUs. Only for
bundles that were baked for it; serving imports torch for nothing else.
"""

import gc
import logging
import pathlib
import weakref
from collections.abc import Sequence

import numpy as np
import torch

from engine.bundle import PARITY_FLOOR, Bundle, Modality, Precision
from engine.errors import DeviceUnavailable, PrecisionUnavailable
from engine.protocol import Array, Engine, Float32
from engine.torch_model import DTYPES, Model, end_if_lost, torch_of

log = logging.getLogger(__name__)

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
    left_out = frozenset(bundle.manifest.left_out.get("torch", ()))  # grows, see engine/choice.py
    key = bundle.path, bundle.manifest.created, tuple(devices), precision, left_out, threads
    model = _opened.get(key)
    if model is None:
        open_on = _open_on_cpu if devices[0].type == "cpu" else _open_on_gpus
        torch.set_num_threads(threads if devices[0].type == "cpu" else 1)
        model = _opened[key] = open_on(bundle, devices, precision)
    return model


def _devices(wanted: str) -> list[torch.device]:
    """Raises: DeviceUnavailable."""
    # Without is_available, a GPU whose driver is too old for torch would count.
    count = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
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
    for precision in DTYPES:
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
        left_out = precision in bundle.manifest.left_out.get("torch", ())
        if wanted != precision and (wanted != "auto" or left_out):
            continue
        model, line = _try(bundle, devices, precision)
        tried.append(line)
        if model:
            model.size_batches()
            return model
        gc.collect()  # a model is in reference cycles
        torch.cuda.empty_cache()
    if not tried:
        raise PrecisionUnavailable(f"PRECISION={wanted}, but this GPU has no {wanted} arithmetic")
    raise PrecisionUnavailable(
        f"bundle {bundle.path}: its vectors are not the model's own here ({'; '.join(tried)}; at "
        f"least {', '.join(f'{PARITY_FLOOR[each]} at {each}' for each in candidates)} expected)"
    )


def _try(
    bundle: Bundle, devices: Sequence[torch.device], precision: Precision
) -> tuple[Model | None, str]:
    """Returns: the model, if its vectors are right on these GPUs; and what was found."""
    for packed in [True, False] if torch_of(bundle).packed else [False]:
        line = f"{precision}{'' if packed else ', padded'}"
        try:
            model = Model(bundle, devices, precision, packed)
            model.record()
            parity = model.measured = model.measure()
        except RuntimeError as error:
            end_if_lost(error)
            line += f": {' '.join(str(error).split())[:200]}"
            right = False
        else:
            line += (
                f" on {model.where}: smallest cosine {parity.minimum:.5f}, mean {parity.mean:.5f} "
                f"over {parity.cases} texts"
            )
            right = parity.minimum >= PARITY_FLOOR[precision]
        log.info("model %s, %s", bundle.manifest.name, line)
        if right:
            return model, line
    return None, line


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
        self.padding_cost = 0.0 if model.packed or torch_of(model.bundle).alone else 1.0

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
