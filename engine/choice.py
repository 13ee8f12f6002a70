"""Chooses the engine that embeds a bundle's texts: our own where it can, else OpenVINO."""

from engine.bundle import Bundle
from engine.encoder import encoder_engine
from engine.protocol import Engine


def text_engine(
    bundle: Bundle, wanted: str, *, pad_id: int, pad_left: bool, streams: int, isa: str = "auto"
) -> Engine:
    """The fastest engine for PRECISION=`wanted` and ENCODER_ISA=`isa`.

    Raises: PrecisionUnavailable for bf16 on a CPU without it, or when the bundle was baked without
    the graph that the precision runs.
    """
    precision = encoder_engine.choose(wanted, bundle, isa)
    if precision:
        return encoder_engine.EncoderEngine(bundle, precision, streams=streams, isa=isa)
    # Imported only here: that takes as long as the rest of this engine's start.
    from engine.openvino_backend import OpenVINOTextEngine, choose_precision

    precision = choose_precision(wanted, bundle)
    return OpenVINOTextEngine(bundle, precision, pad_id=pad_id, pad_left=pad_left, streams=streams)
