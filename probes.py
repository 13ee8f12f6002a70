"""What a loaded model has to give again before it serves: its probe's vector or scores, and its
sample where the bake could not run the engine.
"""

import logging
import time
from typing import Any

import numpy as np

from embeddings import Float32
from engine import certificate
from engine.bundle import PARITY_FLOOR, SCORE_FLOOR, Bundle
from engine.protocol import Engine
from engine.queue import Queue
from engine.tenants import SERVICE

log = logging.getLogger("main")

PROBE_TIMEOUT = 60  # seconds; a short REQUEST_TIMEOUT must not end the start on a busy machine


def of_the_service(bundle: Bundle) -> dict[str, Any]:
    """Options of the service's own call of an embedder."""
    deadline, whole = time.monotonic() + PROBE_TIMEOUT, bundle.manifest.dimensions
    return {"deadline": deadline, "tenant": SERVICE, "dimensions": whole}


def certify(bundle: Bundle, engine: Engine, queue: Queue) -> None:
    """Measure an engine that the machine of the bake could not run at this precision, over the
    bundle's sample.

    Raises: BelowFloor when its vectors are not the model's own.
    """
    if engine.measured or engine.precision in bundle.manifest.parity.get(engine.backend, {}):
        return
    sample = certificate.read_sample(bundle)
    try:
        found = certificate.measure(bundle, engine, queue, sample, brief=True)
    except certificate.BelowFloor as error:
        raise certificate.BelowFloor(
            f"bundle {bundle.path}: {error}; set another PRECISION"
        ) from None
    engine.measured = found
    log.info(
        "model %s: the bake could not run %s at %s, so its sample was computed here: smallest "
        "cosine %.5f, mean %.5f over %d vectors of texts of up to %d tokens",
        bundle.manifest.name,
        engine.backend,
        engine.precision,
        found.minimum,
        found.mean,
        found.cases,
        certificate.longest(sample, brief=True),
    )


def check_probe(
    bundle: Bundle, engine: Engine, what: str, expected: list[float], actual: Float32
) -> float:
    """Returns: the cosine, or the nearness of scores. Raises: BelowFloor when it is below the
    precision's floor.
    """
    if scorer := bundle.manifest.scorer:
        rows = actual[None], np.array([expected], np.float32)
        near, least = float(certificate.nearness(*rows, scorer.spread)[0]), SCORE_FLOOR
        if not near >= least[engine.precision]:
            raise certificate.BelowFloor(
                f"bundle {bundle.path}: at {engine.precision} its {what} is off by "
                f"{1 - near:.5f} of the scores' spread, at most "
                f"{1 - least[engine.precision]:.3f} allowed; bake it again on this kind of machine"
            )
        return near
    lengths = float(np.linalg.norm(expected) * np.linalg.norm(actual))
    cosine = float(np.array(expected, np.float32) @ actual) / lengths if lengths else 0.0
    precision, floor = engine.precision, PARITY_FLOOR[engine.precision]
    if not cosine >= floor:
        raise certificate.BelowFloor(
            f"bundle {bundle.path}: at {precision} its {what} is off (cosine {cosine:.5f}, "
            f"at least {floor} expected); bake it again on this kind of machine"
        )
    return cosine


def say_what_int8_costs(bundle: Bundle, engine: Engine) -> None:
    """Log how near an engine at int8 is to the model's own vectors, or scores."""
    parity = engine.measured or bundle.manifest.parity.get(engine.backend, {}).get("int8")
    if engine.precision != "int8" or not parity:
        return
    log.info(
        "model %s at int8: smallest %s to the model's own %.5f, mean %.5f%s",
        bundle.manifest.name,
        "nearness of scores" if bundle.manifest.scorer else "cosine of vectors",
        parity.minimum,
        parity.mean,
        (
            ""
            if parity.nearest is None
            else f"; {parity.nearest:.1%} of the nearest ten texts stay so"
        ),
    )
