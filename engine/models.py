"""The models a process serves, by name: loading, ready, or failed."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from engine.bundle import Bundle
from engine.errors import ModelNotFound, ModelNotReady

T = TypeVar("T")


class Models(Generic[T]):
    """Bundles, and what `load` makes of each. `T` is whatever answers for a loaded model (an
    embedder).
    """

    def __init__(
        self,
        bundles: Sequence[Bundle],
        default: str | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        """Args:
            default: name of the model that answers requests that name none; None means the first
                bundle.
            aliases: further names, each with the model it stands for.

        Raises: ModelNotFound when `default` or an alias names no bundle.
        """
        self.bundles = {bundle.manifest.name: bundle for bundle in bundles}
        self._names = {bundle.manifest.source: name for name, bundle in self.bundles.items()}
        self._names |= {name: name for name in self.bundles}
        for alias, name in (aliases or {}).items():
            self._names[alias] = self._resolve(name)
        self.default = self._resolve(default or next(iter(self.bundles)))
        self._loaded: dict[str, T] = {}
        self._changed = threading.Condition()
        self._stopped = False

    def _resolve(self, name: str) -> str:
        try:
            return self._names[name]
        except KeyError:
            raise ModelNotFound(
                f"no model {name!r} here; there is: {', '.join(sorted(self.bundles))}"
            ) from None

    def load(self, load: Callable[[Bundle], T]) -> None:
        """Load every model, the default first. Whatever `load` raises passes through."""
        for name in sorted(self.bundles, key=lambda name: name != self.default):
            loaded = load(self.bundles[name])
            with self._changed:
                self._loaded[name] = loaded
                self._changed.notify_all()

    def stop(self) -> None:
        """Let nobody wait for a model any longer."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def ready(self) -> bool:
        """Whether every model is loaded."""
        return len(self._loaded) == len(self.bundles)

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
            with self._changed:
                self._changed.wait_for(
                    lambda: name in self._loaded or self._stopped,
                    max(0.0, deadline - time.monotonic()),
                )
                loaded = self._loaded.get(name)
            if loaded is None:
                raise ModelNotReady(f"model {name} is still loading")
        return loaded
