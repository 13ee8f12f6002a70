"""Chooses the engine that computes a bundle: torch where it was baked for it; else our own where it
can; else OpenVINO.

Engines are imported only where they are chosen: that takes as long as the rest of a start.
"""

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar

from engine.bundle import PRECISIONS, Backend, Bundle, Precision
from engine.certificate import BelowFloor
from engine.encoder import encoder_engine
from engine.errors import DeviceUnavailable, PrecisionUnavailable
from engine.protocol import Engine

E = TypeVar("E", bound=Any)
T = TypeVar("T")

log = logging.getLogger(__name__)

_CODE = "HF_MODULES_CACHE"  # where transformers copies a model's code to, to import it


def runs(backend: Backend, precision: Precision) -> bool:
    """Whether this machine runs an engine at a precision. True for torch: what its device can do is
    known only when a model is opened.
    """
    if backend == "torch":
        return True
    if backend == "own engine":
        return encoder_engine.runs(precision)
    from engine.openvino_backend import available_precisions

    return precision in available_precisions()


def precisions(bundle: Bundle) -> list[Precision]:
    """Those at which this machine serves a bundle."""
    return [each for each in PRECISIONS if any(runs(it, each) for it in bundle.backends(each))]


def text_engine(
    bundle: Bundle,
    wanted: str,
    *,
    pad_id: int,
    pad_left: bool,
    streams: int,
    isa: str = "auto",
    device: str = "auto",
) -> Engine:
    """The fastest engine for PRECISION=`wanted`, ENCODER_ISA=`isa` and DEVICE=`device`.

    Raises: PrecisionUnavailable for a precision that this machine does not have, or that the bundle
    was baked without; DeviceUnavailable; BundleError.
    """
    if bundle.manifest.torch:
        engine: Engine = _torch().TorchTextEngine(_open(bundle, wanted, streams, device))
        return engine
    _check_for_cpu(bundle, wanted, device)
    precision = encoder_engine.choose(wanted, bundle, isa)
    if precision:
        return encoder_engine.EncoderEngine(bundle, precision, streams=streams, isa=isa)
    from engine.openvino_backend import OpenVINOTextEngine, choose_precision

    precision = choose_precision(wanted, bundle)
    return OpenVINOTextEngine(bundle, precision, pad_id=pad_id, pad_left=pad_left, streams=streams)


def image_engine(
    bundle: Bundle, wanted: str, *, streams: int, isa: str = "auto", device: str = "auto"
) -> Any:
    """The engine for pictures, with their `preprocessing`. Arguments, raises: as `text_engine`."""
    if bundle.manifest.torch:
        return _torch().TorchImageEngine(_open(bundle, wanted, streams, device))
    _check_for_cpu(bundle, wanted, device)
    precision = encoder_engine.choose(wanted, bundle, isa)
    if precision:
        return encoder_engine.EncoderImageEngine(bundle, precision, streams=streams, isa=isa)
    from engine.openvino_backend import OpenVINOImageEngine, choose_precision

    return OpenVINOImageEngine(bundle, choose_precision(wanted, bundle), streams=streams)


def right_engine(
    bundle: Bundle, wanted: str, make: Callable[[], E], check: Callable[[E], T]
) -> tuple[E, T]:
    """The engine that `make` chooses for PRECISION=`wanted`, and what `check` returns for it. For
    `auto`, an engine whose vectors are wrong on this machine is left out of the bundle, in memory,
    and `make` chooses another.

    Raises: BelowFloor, as `check` does for a wrong engine, when PRECISION names its precision or no
        other engine is left; what else `make` and `check` raise.
    """
    wrong: BelowFloor | None = None
    while True:
        try:
            engine = make()
        except PrecisionUnavailable:
            if wrong:
                raise wrong from None
            raise
        try:
            return engine, check(engine)
        except BelowFloor as error:
            left_out = bundle.manifest.left_out.setdefault(engine.backend, {})
            if wanted != "auto" or engine.precision in left_out:
                raise
            left_out[engine.precision] = str(error)
            log.warning(
                "model %s: its %ss are served without %s at %s: the vectors are wrong on this "
                "machine (%s)",
                *(bundle.manifest.name, engine.modality, engine.backend, engine.precision, error),
            )
            wrong = BelowFloor(str(error))  # a new one: its traceback does not hold the engine
            del engine  # before the next one takes memory


def _check_for_cpu(bundle: Bundle, wanted: str, device: str) -> None:
    hint = f"but bundle {bundle.manifest.name} was baked for CPUs; bake it with --engine torch"
    if device.startswith("cuda"):
        raise DeviceUnavailable(f"DEVICE={device}, {hint}")
    if wanted == "fp16":
        raise PrecisionUnavailable(f"PRECISION=fp16 is for GPUs, {hint}")


def _torch() -> Any:
    """engine.torch_engine, imported so that it asks no network, and keeps a model's code where a
    container without a home folder can write.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Freed memory of one size can be used for another: sizes of batches differ.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # Threads that spin for work take time from those that serve requests: 20 % of the speed.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Else torch compiles some products with Triton, for which a container has no C compiler.
    os.environ.setdefault("TORCH_DISABLE_NATIVE_JIT", "1")
    try:
        tempfile.gettempdir()
    except FileNotFoundError:  # a read-only root: torch wants a folder when it is imported
        tempfile.tempdir = "/dev/shm"
    if _CODE not in os.environ:
        folder = tempfile.mkdtemp(prefix="model-code-")
        os.environ[_CODE] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    import engine.torch_engine

    return engine.torch_engine


def _open(bundle: Bundle, wanted: str, threads: int, device: str) -> Any:
    return _torch().open_model(bundle, device=device, precision=wanted, threads=threads)
