"""What holds of a bundle on this machine: its sample through every engine that may serve it."""

from bake import CannotTrace, describe
from bake.parity import measure
from bake.samples import Sample, sample_pictures
from engine.bundle import PRECISIONS, Backend, Bundle, Parity, Precision
from engine.certificate import BelowFloor, read_pictures, read_sample
from engine.choice import runs


def check_here(bundle: Bundle) -> tuple[dict[str, str], bool]:
    """Measure a bundle as its bake did.

    Returns: what there is to say of each precision and engine, and whether all that run here hold.
    Raises: BundleError, BakeError.
    """
    samples, rows, right = [Sample("text", [], read_sample(bundle).expected)], {}, True
    task = bundle.manifest.task
    if "image" in bundle.manifest.modalities:
        samples.append(Sample("image", sample_pictures(), read_pictures(bundle)))
    for precision in PRECISIONS:
        for backend, why in bundle.manifest.left_out.items():
            if precision in why:
                rows[f"{precision}, {backend}"] = f"left out by the bake: {why[precision]}"
        for backend in bundle.backends(precision):
            try:
                found = _measure(bundle, backend, precision, samples)
                said = f"holds: {describe(found, task)}" if found else "this CPU cannot run it"
            except (BelowFloor, CannotTrace) as error:
                said, right = f"does not hold: {error}", False
            rows[f"{precision}, {backend}"] = said
    return rows, right


def _measure(
    bundle: Bundle, backend: Backend, precision: Precision, samples: list[Sample]
) -> list[Parity]:
    """A certificate for each sample; none where this CPU cannot run the engine at `precision`.

    Raises: BelowFloor; CannotTrace where the engine fails; BakeError where its packages are not
        there.
    """
    if backend == "torch":
        from bake import untraced

        return untraced.certificates(bundle, precision, samples)
    from bake import traced
    from bake.export import running

    if not runs(backend, precision):
        return []
    with running():
        return measure(bundle, traced.makers(bundle, backend, precision), samples)
