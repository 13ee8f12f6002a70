"""A bundle's vectors compared with sentence-transformers' own, by the engines that serve it."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from bake import BakeError, Options, refusing, windows
from bake.samples import Sample
from engine import certificate
from engine.bundle import SAMPLE, Backend, Bundle, Parity, Precision
from engine.certificate import BelowFloor, Compared
from engine.protocol import Engine
from engine.queue import Queue
from engine.pipeline import pools_at_the_end
from image_embeddings import ImageEmbedder
from limits import ImageLimits
from settings import load
from tokens import load_tokenizer

Float32 = npt.NDArray[np.float32]

BATCH = 8  # of sentence-transformers
ALONE = 8  # pictures that are also embedded each alone


def reference(model: Any, inputs: Sequence[Any], what: str = "", alone: bool = False) -> Float32:
    """sentence-transformers' own vectors of texts, with the default prompt, or of PIL images.

    Args:
        alone: embed each without others beside it.

    Raises: BakeError when the model's code fails, naming `what` it cannot embed, and when there is
        not enough memory.
    """
    size = 1 if alone or pools_at_the_end(model) else BATCH
    with _refusing(model, what):
        return windows.embed(model, inputs, size)


def in_company(model: Any, texts: Sequence[str]) -> float:
    """The smallest cosine of a text's vector in a batch to the same text's alone, as
    sentence-transformers gives both: less than 1 where padding changes them (ConvBERT, CNN).

    Raises: as `reference`.
    """
    if pools_at_the_end(model):  # its engines mask the padding
        return 1.0
    some = sorted(texts, key=len)[: len(texts) // 2 : 10]
    alone, batch = (_encode(model, some, size) for size in (1, len(some)))
    lengths = np.linalg.norm(alone, axis=1) * np.linalg.norm(batch, axis=1)
    return float(((alone * batch).sum(axis=1) / np.maximum(lengths, 1e-30)).min())


def _encode(model: Any, texts: Sequence[str], size: int) -> Float32:
    """In batches of `size`."""
    with _refusing(model):
        vectors = model.encode(list(texts), batch_size=size, show_progress_bar=False)
    return np.asarray(vectors, np.float32)


def _refusing(model: Any, what: str = "") -> contextlib.AbstractContextManager[None]:
    chain = ", ".join(type(module).__name__ for module in model)
    return refusing(
        f"sentence-transformers itself fails to embed {what}with its modules ({chain}); mend the "
        "model's folder, or bake another"
    )


def write_sample(bundle: Bundle, samples: Sequence[Sample]) -> None:
    """Write SAMPLE, with the default prompt's tokens in it."""
    tokenizer, _, _ = load_tokenizer(bundle)
    manifest, (texts, *pictures) = bundle.manifest, samples
    prompt = manifest.prompts.get(manifest.default_prompt or "") or ""
    ids = [tokenizer.encode(prompt + text).ids for text in texts.inputs]
    np.savez(
        bundle.file(SAMPLE),
        ids=np.concatenate(ids).astype(np.int64),
        lengths=np.array([len(each) for each in ids], np.int64),
        vectors=texts.expected,
        **{"pictures": each.expected for each in pictures},  # type: ignore[arg-type]
    )


def thread_counts() -> list[int]:
    """The numbers of threads that are measured: one, and what serving uses here."""
    return sorted({1, load({}).inference_threads})


@contextmanager
def serving(threads: int) -> Iterator[Queue]:
    """A queue with the default settings of the service."""
    defaults = load({})
    queue = Queue(
        max_batch_size=defaults.max_batch_size,
        max_batch_tokens=defaults.max_batch_tokens,
        max_queue_tokens=1 << 40,
        threads=threads,
    )
    queue.start()
    try:
        yield queue
    finally:
        queue.close()


def measure_texts(
    bundle: Bundle, make: Callable[[int], Engine], counts: Sequence[int] | None = None
) -> Parity:
    """The certificate over the bundle's sample of texts.

    Args:
        make: an engine for a number of threads.
        counts: numbers of threads; None: `thread_counts`.

    Raises: BelowFloor, BundleError.
    """
    counts, texts, found = counts or thread_counts(), certificate.read_sample(bundle), []
    for threads in counts:
        with serving(threads) as queue:
            brief = threads != max(counts)
            found.append(certificate.measure(bundle, make(threads), queue, texts, brief=brief))
    return certificate.merged(found)


def measure_pictures(bundle: Bundle, make: Callable[[int], Any], pictures: Sample) -> Parity:
    """The certificate over pictures, some of them alone too. Raises: BelowFloor."""
    threads = max(thread_counts())
    engine, count = make(threads), len(pictures.inputs)
    company, single = (Compared(bundle, pictures.expected) for _ in range(2))
    with serving(threads) as queue:
        embedder = ImageEmbedder(bundle, engine.preprocessing, engine, queue, ImageLimits())

        def embed(numbers: Sequence[int]) -> Float32:
            chosen = [pictures.inputs[number] for number in numbers]
            deadline = time.monotonic() + certificate.A_DAY
            found = embedder.embed(chosen, deadline=deadline)
            return np.stack([each.vector for each in found])

        company.add(range(count), embed(range(count)))
        for number in range(0, count, -(-count // ALONE)):
            single.add([number], embed([number]))
    return certificate.certify(bundle, engine, company, single, threads)


def measure(
    bundle: Bundle,
    makers: Sequence[Callable[[int], Any]],
    samples: Sequence[Sample],
    counts: Sequence[int] | None = None,
) -> list[Parity]:
    """A certificate for each sample.

    Args:
        makers: for each sample, as `measure_texts` takes them; `counts` too.

    Raises: BelowFloor, BundleError.
    """
    parities = [measure_texts(bundle, makers[0], counts)]
    return parities + [
        measure_pictures(bundle, make, sample) for make, sample in zip(makers[1:], samples[1:])
    ]


def enter(
    bundle: Bundle, backend: Backend, precision: Precision, parities: Sequence[Parity]
) -> None:
    """Write what `measure` returned to the manifest."""
    manifest = bundle.manifest
    manifest.parity.setdefault(backend, {})[precision] = parities[0]
    for parity in parities[1:]:
        manifest.image_parity.setdefault(backend, {})[precision] = parity


def leave_out(
    bundle: Bundle,
    backend: Backend,
    precision: Precision,
    error: BelowFloor,
    options: Options,
    note: Callable[[str], None],
) -> None:
    """Leave out a precision of an engine, and say so.

    Raises: BakeError where it was asked for by name and no other engine would serve it everywhere.
    """
    manifest = bundle.manifest
    if options.precisions and backend != "own engine":
        rest = ",".join(other for other in manifest.precisions if other != precision)
        raise BakeError(f"{error} (--precisions {rest} bakes it without)") from None
    manifest.left_out.setdefault(backend, {})[precision] = str(error)
    note(f"{error}: left out")
