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
from chunks import Chunker
from engine import certificate
from engine.bundle import SAMPLE, Backend, Bundle, Parity, Precision
from engine.certificate import Compared
from engine.protocol import Engine
from engine.queue import Queue
from engine.pipeline import pools_at_the_end
from image_embeddings import ImageEmbedder
from limits import ImageLimits
from settings import load
from tokens import TextTokenizer, load_tokenizer

Float32 = npt.NDArray[np.float32]

BATCH = 8  # of sentence-transformers
ALONE = 8  # pictures that are also embedded each alone
SHORT_TEXT = 512  # characters; a longer one is not embedded once more to see what padding does


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
    some = sorted((text for text in texts if len(text) <= SHORT_TEXT), key=len)[::8]
    alone, batch = (_encode(model, some, size) for size in (1, len(some)))
    return float(certificate.cosines(alone, batch).min())


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
    """Write SAMPLE, with the default prompt's tokens in it.

    Raises: BakeError when serving could not make the model's own tokens.
    """
    texts, *pictures = samples
    save_sample(bundle, _served_ids(bundle, texts.inputs), samples)


def save_sample(
    bundle: Bundle, ids: Sequence[npt.NDArray[np.int64]], samples: Sequence[Sample]
) -> None:
    """Write SAMPLE, of which the texts are `ids` to an engine, shape (tokens,) each."""
    texts, *pictures = samples
    np.savez(
        bundle.file(SAMPLE),
        ids=np.concatenate(ids),
        lengths=np.array([len(each) for each in ids], np.int64),
        vectors=texts.expected,
        **{"pictures": each.expected for each in pictures},  # type: ignore[arg-type]
    )


def _served_ids(bundle: Bundle, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
    """Each text's token ids, shape (tokens,), as serving makes them. Raises: as `write_sample`."""
    manifest, (tokenizer, _, _) = bundle.manifest, load_tokenizer(bundle)
    prompt = manifest.prompts.get(manifest.default_prompt or "") or ""
    with refusing("serving cannot cut texts with it; bake a model with another tokenizer"):
        chunker, made = Chunker(TextTokenizer(tokenizer), manifest.max_tokens), []
        for text in texts:
            made.append(np.concatenate([chunk.token_ids for chunk in chunker.split(text, prompt)]))
            if made[-1].tolist() != tokenizer.encode(prompt + text).ids:
                raise ValueError(f"its tokenizer gives other ids for parts of {text[:40]!r}")
    return made


def thread_counts() -> list[int]:
    """The numbers of threads that are measured: one, and what serving uses here."""
    return sorted({1, load({}).inference_threads})


@contextmanager
def serving(threads: int, done: Callable[[int], None] = lambda tokens: None) -> Iterator[Queue]:
    """A queue with the default settings of the service. `done` is told the tokens of each batch."""
    defaults = load({})
    queue = Queue(
        max_batch_size=defaults.max_batch_size,
        max_batch_tokens=defaults.max_batch_tokens,
        max_queue_tokens=1 << 40,
        threads=threads,
    )
    queue.observe = lambda batch, *_: done(batch.tokens)
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
    brief = {threads: threads != max(counts) for threads in counts}
    done = windows.Progress(sum(certificate.work(texts, brief=each) for each in brief.values())).add
    for threads in counts:
        with serving(threads, done) as queue:
            # No name for the engine: it would be kept beside the next one, with all its memory.
            more: Any = {"brief": brief[threads], "done": done}
            found.append(certificate.measure(bundle, make(threads), queue, texts, **more))
    return certificate.merged(found)


def measure_pictures(bundle: Bundle, make: Callable[[int], Any], pictures: Sample) -> Parity:
    """The certificate over pictures, some of them alone too. Raises: BelowFloor."""
    threads = max(thread_counts())
    engine, count = make(threads), len(pictures.inputs)
    company, single = (Compared(bundle, pictures.expected) for _ in range(2))
    lone = range(0, count, -(-count // ALONE))
    progress = windows.Progress((count + len(lone)) * engine.preprocessing.tokens)
    with serving(threads, progress.add) as queue:
        embedder = ImageEmbedder(bundle, engine.preprocessing, engine, queue, ImageLimits())

        def embed(numbers: Sequence[int]) -> Float32:
            chosen = [pictures.inputs[number] for number in numbers]
            deadline = time.monotonic() + certificate.A_DAY
            found = embedder.embed(chosen, deadline=deadline)
            return np.stack([each.vector for each in found])

        company.add(range(count), embed(range(count)))
        for number in lone:
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
    error: Exception,
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
