"""Which engine embeds a bundle's texts: our own where it can, else OpenVINO."""

from typing import TYPE_CHECKING, Union

from engine import native
from engine.bundle import Bundle

if TYPE_CHECKING:
    from engine.openvino_backend import OpenVINOTextEngine


def text_engine(
    bundle: Bundle, wanted: str, *, pad_id: int, pad_left: bool, streams: int
) -> Union[native.NativeTextEngine, "OpenVINOTextEngine"]:
    """The fastest engine there is for PRECISION=`wanted`.

    Raises: PrecisionUnavailable when bf16 is asked of a CPU without it, or the bundle was baked
    without the graph that the precision runs.
    """
    precision = native.choose(wanted, bundle)
    if precision:
        return native.NativeTextEngine(bundle, precision, streams=streams)
    # Only now: the import takes as long as all of the other engine's start.
    from engine.openvino_backend import OpenVINOTextEngine, choose_precision

    precision = choose_precision(wanted, bundle)
    return OpenVINOTextEngine(bundle, precision, pad_id=pad_id, pad_left=pad_left, streams=streams)
