"""The certificate: whether an engine gives sentence-transformers' vectors or scores on this
machine, computed as serving computes them. The bake measures it. The service measures the engines
that the CPU of the bake could not run, when it starts.
"""

import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.bundle import PARITY_FLOOR, SAMPLE, SCORE_FLOOR, TAU_FLOOR, Bundle, Parity
from engine.errors import BundleError
from engine.protocol import Array, Engine, Float32
from engine.queue import Queue
from engine.tenants import SERVICE

# What is computed beside the whole sample at once, where the queue makes full batches of texts of
# like lengths: every third text in requests of MIXED of very different lengths; pairs of the PAIRED
# shortest; each alone, of the SHORTEST and of ALONE others, since engines have other code for small
# shapes. A text of more than LONG tokens has a batch to itself in any case.
MIXED, PAIRED, SHORTEST, ALONE, LONG = 8, 16, 24, 12, 512
A_DAY = 24 * 3600.0  # seconds
NEAREST = 10  # texts that a search would find, see Parity.nearest
SAME = 1e-6  # difference of cosines below which texts are as near


class BelowFloor(BundleError):
    """An engine's vectors or scores are not the model's own."""


@dataclass(frozen=True)
class Texts:
    """A bundle's sample of texts, or of pairs of them."""

    ids: list[Array]  # int64, shape (tokens,) each, as engines take them
    expected: Float32  # shape (texts, dimensions)


def read_sample(bundle: Bundle) -> Texts:
    """Raises: BundleError."""
    ids, lengths, vectors = _read(bundle, ["ids", "lengths", "vectors"])
    return Texts(np.split(ids, np.cumsum(lengths)[:-1]), vectors)


def read_pictures(bundle: Bundle) -> Float32:
    """The vectors of bake/samples.py's pictures. Raises: BundleError."""
    vectors: Float32 = _read(bundle, ["pictures"])[0]
    return vectors


def _read(bundle: Bundle, names: Sequence[str]) -> list[npt.NDArray[Any]]:
    try:
        with bundle.file(SAMPLE).open("rb") as file, np.load(file, allow_pickle=False) as saved:
            return [saved[name] for name in names]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise BundleError(f"bundle {bundle.path}: {SAMPLE} cannot be read ({error})") from None


def _plan(texts: Texts, brief: bool) -> tuple[list[list[int]], list[int]]:
    """The numbers of the texts that are computed in company, a list for each request, and alone."""
    order = sorted(range(len(texts.ids)), key=lambda number: len(texts.ids[number]))
    short = [number for number in order if len(texts.ids[number]) <= LONG]
    requests = [short[::4] + order[len(short) :][:1] if brief else order]
    mixed = short[::3]
    step = -(-len(mixed) // MIXED)
    requests += [mixed[first::step] for first in range(step if not brief else 0)]
    requests += [short[first : first + 2] for first in range(0, min(PAIRED, len(short)), 2)]
    alone = short[:SHORTEST] + short[SHORTEST :: max(1, len(short[SHORTEST:]) // ALONE)]
    return requests, alone


def longest(texts: Texts, *, brief: bool = False) -> int:
    """The number of tokens of the longest text that `measure` computes."""
    requests, _ = _plan(texts, brief)
    return max(len(texts.ids[number]) for numbers in requests for number in numbers)


def work(texts: Texts, *, brief: bool = False) -> int:
    """The number of tokens that `measure` has the engine compute."""
    requests, alone = _plan(texts, brief)
    lone = alone if brief else [*alone, *alone]
    numbers = [number for request in [*requests, lone] for number in request]
    return sum(len(texts.ids[number]) for number in numbers)


def measure(
    bundle: Bundle,
    engine: Engine,
    queue: Queue,
    texts: Texts,
    *,
    brief: bool = False,
    done: Callable[[int], None] = lambda tokens: None,
) -> Parity:
    """Compare an engine's vectors of texts with the expected ones: in company, in the batches that
    the queue makes, and alone.

    Args:
        engine: not widened yet; it is afterwards, unless `brief`.
        queue: started, with the settings of the service.
        brief: measure less: for an engine that was measured with other numbers of threads, and at
            the start of a service. Of texts of more than LONG tokens, only the shortest is
            computed, which has fewer than 4 * LONG in the samples that the bake makes.
        done: told the tokens of each text that was computed alone; of the others, `Queue.observe`
            is told.

    Raises: BelowFloor for the engine's precision; what `Queue.submit` raises.
    """
    requests, alone = _plan(texts, brief)
    company = Compared(bundle, texts.expected)
    for numbers in requests:
        ids = [texts.ids[number] for number in numbers]
        deadline = time.monotonic() + A_DAY
        costs = [len(each) for each in ids]
        company.add(numbers, queue.submit(engine, ids, costs, deadline, tenant=SERVICE))
    single = Compared(bundle, texts.expected)
    for wide in (True,) if brief else (False, True):
        if wide and not brief:
            engine.widen()
        for number in alone:
            single.add([number], engine.run([texts.ids[number]], alone=wide))
            done(len(texts.ids[number]))
    return certify(bundle, engine, company, single, queue.threads)


def cosines(left: Float32, right: Float32) -> Float32:
    """The cosine of each row of `left` to the same row of `right`. NaN is -1 here: `NaN < floor` is
    false, so that it would pass for a right vector.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # they end in NaN, or in 0
        lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        found = (left * right).sum(axis=1) / np.maximum(lengths, 1e-30)
    finite: Float32 = np.nan_to_num(found, nan=-1.0, posinf=-1.0, neginf=-1.0)
    return finite


def nearness(left: Float32, right: Float32, spread: float) -> Float32:
    """1 less the largest difference in each row, as a share of `spread`; at least -1, also for NaN.
    Both float32, shape (rows, labels).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        found = 1 - np.abs(left - right).max(axis=1) / np.float32(spread)
    return np.asarray(np.maximum(np.nan_to_num(found, nan=-1.0), -1.0), np.float32)


def rank_correlation(expected: Float32, actual: Float32, least: float) -> float:
    """Kendall's tau-a of two lists of scores, over pairs of which the expected scores differ by at
    least `least`: the pairs in the same order less those in another, as a share of all; 1 where
    there is no such pair.
    """
    differences = np.subtract.outer(expected, expected)
    counted = differences >= least
    if not counted.any():
        return 1.0
    return float(np.sign(np.subtract.outer(actual, actual)[counted]).mean())


class Compared:
    """Vectors or raw scores beside the expected ones."""

    def __init__(self, bundle: Bundle, expected: Float32) -> None:
        """`expected`: sentence-transformers' own, shape (inputs, dimensions)."""
        self._normalized, self._expected = bundle.manifest.normalized, expected
        self._actual: dict[int, Float32] = {}  # of whole samples
        self._scorer = bundle.manifest.scorer
        self.cosines: list[Float32] = []  # of scores: `nearness`
        self.scores: list[tuple[Float32, Float32]] = []  # expected and actual
        self.apart = (
            0.0  # how far lengths are off at most, as a share; models that normalise have 0
        )

    def add(self, numbers: Sequence[int], actual: Float32) -> None:
        """The engine's vectors or scores of the inputs of these numbers."""
        expected = self._expected[list(numbers)]
        if self._scorer:
            self.cosines.append(nearness(actual, expected, self._scorer.spread))
            self.scores.append((expected, actual.copy()))
            return
        self._actual |= dict(zip(numbers, actual))
        lengths = np.linalg.norm(actual, axis=1), np.linalg.norm(expected, axis=1)
        self.cosines.append(cosines(actual, expected))
        if not self._normalized:
            self.apart = max(self.apart, float(np.abs(lengths[0] / lengths[1] - 1).max()))

    def nearest(self) -> float | None:
        """See Parity.nearest; None unless all of the sample was compared."""
        count = len(self._expected)
        if count <= NEAREST + 1 or len(self._actual) < count:
            return None
        index = _unit(self._expected)
        own, found = (
            rows @ index.T
            for rows in (index, _unit(np.stack([self._actual[at] for at in range(count)])))
        )
        for scores in (own, found):
            np.fill_diagonal(scores, -np.inf)
        least = np.sort(own, axis=1)[:, -NEAREST, None] - SAME
        first = np.argsort(-found, axis=1)[:, :NEAREST]
        return float((np.take_along_axis(own, first, axis=1) >= least).mean())


def _unit(rows: Float32) -> Float32:
    scaled: Float32 = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    return scaled


def certify(
    bundle: Bundle, engine: Engine, company: Compared, single: Compared, threads: int
) -> Parity:
    """The certificate of what was compared. Raises: BelowFloor, also when the vectors' lengths
    differ by more than they can at that floor.
    """
    together, alone = np.concatenate(company.cosines), np.concatenate(single.cosines)
    if bundle.manifest.scorer:
        return _certify_scores(bundle, engine, company, single, threads)
    floor, every = PARITY_FLOOR[engine.precision], np.concatenate([together, alone])
    what = "vectors" if engine.modality == "text" else "pictures' vectors"
    wrong = f"at {engine.precision} its {what} are not the model's own"
    if not every.min() >= floor:
        raise BelowFloor(
            f"{wrong}: smallest cosine {every.min():.5f} ({engine.backend}, threads: {threads}; "
            f"alone {alone.min():.5f}, in company {together.min():.5f}), at least {floor} needed"
        )
    # Unit vectors at cosine c are sqrt(2 - 2c) apart. Lengths matter to models that do not
    # normalise: their similarity is the dot product.
    apart = max(company.apart, single.apart)
    if not apart <= (2 - 2 * floor) ** 0.5:
        raise BelowFloor(f"{wrong}: their lengths are off by up to {apart:.2%} ({engine.backend})")
    minimum, mean, smallest = map(float, (every.min(), every.mean(), alone.min()))
    return Parity(minimum, mean, len(every), smallest, [threads], company.nearest())


def _certify_scores(
    bundle: Bundle, engine: Engine, company: Compared, single: Compared, threads: int
) -> Parity:
    """As `certify`."""
    assert bundle.manifest.scorer
    together, alone = np.concatenate(company.cosines), np.concatenate(single.cosines)
    every, precision = np.concatenate([together, alone]), engine.precision
    floor, wrong = SCORE_FLOOR[precision], f"at {precision} its scores are not the model's own"
    if not every.min() >= floor:
        raise BelowFloor(
            f"{wrong}: off by up to {1 - every.min():.5f} of their spread ({engine.backend}, "
            f"threads: {threads}; alone {1 - alone.min():.5f}, in company "
            f"{1 - together.min():.5f}), at most {1 - floor:.3f} allowed"
        )
    tau = None
    if bundle.manifest.task == "rerank":
        least = (1 - floor) * bundle.manifest.scorer.spread
        both = zip(*company.scores, *single.scores)
        expected, actual = (np.concatenate(each)[:, 0] for each in both)
        tau = rank_correlation(expected, actual, least)
        if not tau >= TAU_FLOOR[precision]:
            raise BelowFloor(
                f"{wrong}: their order differs (Kendall's tau {tau:.4f}, {engine.backend}), at "
                f"least {TAU_FLOOR[precision]} needed"
            )
    return Parity(
        minimum=float(every.min()),
        mean=float(every.mean()),
        cases=len(every),
        alone=float(alone.min()),
        threads=[threads],
        tau=tau,
    )


def merged(parities: Sequence[Parity]) -> Parity:
    """One certificate of several numbers of threads."""
    cases = sum(each.cases for each in parities)
    return Parity(
        minimum=min(each.minimum for each in parities),
        mean=sum(each.mean * each.cases for each in parities) / cases,
        cases=cases,
        alone=min(each.alone for each in parities),
        threads=sorted({count for each in parities for count in each.threads}),
        nearest=min((each.nearest for each in parities if each.nearest is not None), default=None),
        tau=min((each.tau for each in parities if each.tau is not None), default=None),
    )
