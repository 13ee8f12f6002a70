"""The models a process serves, by name: loading, ready, or failed."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from engine.bundle import Bundle
from engine.errors import ModelNotFound, ModelNotReady
from engine.protocol import Event

T = TypeVar("T")


class Models(Generic[T]):
    """Bundles, and the object of type `T` (an embedder) that `load` makes from each."""

    def __init__(
        self,
        bundles: Sequence[Bundle],
        default: str | None = None,
        aliases: Mapping[str, str] | None = None,
        event: Callable[[], Event] = threading.Event,
    ) -> None:
        """Args:
            default: name of the model for requests that name none; None means the first bundle.
            aliases: further names of models.
            event: makes what a caller waits for.

        Raises: ModelNotFound when `default` or an alias names no bundle.
        """
        self.bundles = {bundle.manifest.name: bundle for bundle in bundles}
        self._names = {bundle.manifest.source: name for name, bundle in self.bundles.items()}
        self._names |= {name: name for name in self.bundles}
        for alias, name in (aliases or {}).items():
            self._names[alias] = self._resolve(name)
        self.default = self._resolve(default or next(iter(self.bundles)))
        self._loaded: dict[str, T] = {}
        self._event = event
        self._lock = threading.Lock()
        self._waiting: list[Event] = []  # set at every change
        self._stopped = False
        self.warming = False  # warm-up requests are running, so `ready` is false

    def _resolve(self, name: str) -> str:
        try:
            return self._names[name]
        except KeyError:
            raise ModelNotFound(
                f"no model {name!r} here; there is: {', '.join(sorted(self.bundles))}",
                field="model",
            ) from None

    def load(self, load: Callable[[Bundle], T]) -> None:
        """Load every model, the default first. Whatever `load` raises passes through."""
        for name in sorted(self.bundles, key=lambda name: name != self.default):
            loaded = load(self.bundles[name])
            self._loaded[name] = loaded
            self._tell()

    def stop(self) -> None:
        """End all waiting for a model: `get` raises ModelNotReady from now on."""
        self._stopped = True
        self._tell()

    def _tell(self) -> None:
        """Wake all callers that wait, to look again."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for event in waiting:
            event.set()

    @property
    def ready(self) -> bool:
        """Whether every model is loaded and warm."""
        return len(self._loaded) == len(self.bundles) and not self.warming

    def loaded(self, name: str | None) -> bool:
        """Whether `get` would return at once.

        Raises: ModelNotFound.
        """
        return self.bundle(name).manifest.name in self._loaded

    def bundle(self, name: str | None = None) -> Bundle:
        """The bundle of a model by name, source or alias; of the default model for None.

        Raises: ModelNotFound.
        """
        return self.bundles[self._resolve(self.default if name is None else name)]

    def get(self, name: str | None, deadline: float) -> T:
        """The loaded model, waited for until `deadline` (`time.monotonic`).

        Raises: ModelNotFound at once; ModelNotReady when it is still loading at the deadline, or at
        `stop`.
        """
        name = self.bundle(name).manifest.name
        loaded = self._loaded.get(name)
        if loaded is None:
            return self._wait(name, deadline)
        return loaded

    def _wait(self, name: str, deadline: float) -> T:
        while True:
            event = self._event()
            with self._lock:
                self._waiting.append(event)
            # Looked up after the event is registered, so that no load is missed.
            loaded = self._loaded.get(name)
            if loaded is not None:
                return loaded
            if self._stopped or not event.wait(max(0.0, deadline - time.monotonic())):
                raise ModelNotReady(f"model {name} is still loading")
