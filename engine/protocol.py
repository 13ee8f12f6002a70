"""The types that the queue, the engines and their callers share."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engine.bundle import Backend, Parity, Precision
from engine.errors import EmbedderError
from engine.spans import Recording
from engine.tenants import Tenant

Float32 = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

# Engines of scorers take a token's id in the lower bits of a number and its type in those above.
TYPE_BITS = 32


class InputRefused(ValueError):
    """The model cannot embed one input of a batch; `index` is its place."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


class Event(Protocol):
    """What a request waits for: a `threading.Event`, or what an event loop uses in its place."""

    def set(self) -> None: ...

    def is_set(self) -> bool: ...

    def wait(self, timeout: float) -> bool: ...


class Threads(Protocol):
    """The threads of one backend. They compute batches in the order in which these were put. The
    queue calls these methods one at a time.
    """

    def room(self) -> float:
        """Most tokens of a batch that may be put now, unless it is one input; 0 for none."""

    def put(self, number: int, engine: Any, inputs: Sequence[Array], alone: bool) -> Float32:
        """Queue a batch; `engine` is of this backend.

        Returns: where the vectors are once the batch has ended.
        Raises: InputRefused, and then has queued nothing.
        """

    def ended(self) -> list[tuple[int, float | None]]:
        """The batches that have ended since the last call: number and seconds, None if it
        failed.
        """

    def close(self) -> None:
        """End the threads."""


class Engine(Protocol):
    """Turns a list of arrays into one vector each. Called from several threads."""

    name: str  # the model's
    modality: str
    precision: Precision
    backend: Backend  # the kind of engine, also for the log and for /info
    isa: str | None = None  # the instruction set that it computes with; None if it does not tell
    dimensions: int
    padding_cost: float  # of a padded token, as a share of a real one
    min_batch_tokens: int  # no batch is made smaller to leave work for other threads
    max_batch_tokens: int | None = None  # of a batch of several inputs; None: the queue's limits
    measured: Parity | None = None  # on this machine, since it was opened
    calls: int | None = None  # calls of `run` that it takes at a time; None: one for each core

    def run(self, inputs: Sequence[Array], *, alone: bool = False) -> Float32:
        """Compute a batch. With `alone`, nothing else is computed, so it may use all cores.

        Returns: float32 of shape (len(inputs), dimensions).
        """

    def widen(self) -> None:
        """Prepare for batches that are alone. Called once, after the service is ready."""
        return None

    def start_threads(self, count: int, wake: int) -> Threads | None:
        """Start threads for all engines of this backend. They write to the eventfd `wake` when a
        batch has ended. None: Python threads call `run`.
        """
        return None


@dataclass(eq=False, slots=True)
class Job:
    """The inputs of one request, in ascending order of cost, and where their vectors go."""

    tenant: Tenant
    engine: Engine
    inputs: list[Array]
    costs: list[int]
    rows: list[int]  # inputs[i] belongs to vectors[rows[i]]
    vectors: Float32
    deadline: float
    done: Event
    submitted: float  # on the queue's clock, as `deadline`
    gone: Callable[[], bool] | None = None
    threads: Threads | None = None  # that will compute it
    began: float = 0.0  # on the tenant's clock
    free: int = 0  # tokens that may be served before they count
    served: int = 0  # tokens that a batch has taken
    running: int = 0  # inputs in batches that have not ended
    first: float = math.inf  # when the first of its batches began; known once that has ended
    error: EmbedderError | None = None
    trace: Recording | None = None  # of its request

    @property
    def tag(self) -> float:
        return self.began + (self.served if self.served > self.free else 0)

    def take(self, at: int) -> tuple["Job", int, Array]:
        """Move input `at` from waiting to running."""
        self.served += self.costs.pop(at)
        self.running += 1
        return self, self.rows.pop(at), self.inputs.pop(at)


@dataclass(slots=True)
class Batch:
    """The inputs of one engine call."""

    engine: Engine
    entries: list[tuple[Job, int, Array]]
    tokens: int  # without padding
    padded_tokens: int  # with the part of the padding that is computed
    alone: bool  # nothing else is computed or waits
    served: list[Job] = field(default_factory=list)  # requests that this batch completed

    @property
    def inputs(self) -> list[Array]:
        return [array for _, _, array in self.entries]
