"""The models a process serves, by name: loading, ready, or failed."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from engine.bundle import Bundle
from engine.errors import ModelNotFound, ModelNotReady, WrongAlias
from engine.protocol import Event

T = TypeVar("T")

ANY = "*"  # the alias that every name stands for which is no other's


class Target(NamedTuple):
    """What a model's name stands for."""

    asked: str  # the name; for requests without one, the default model's
    bundle: Bundle
    fingerprint: str  # the bundle's
    version: str  # the model and its bundle, such as "all-MiniLM-L6-v2@0123456789ab"
    prompt: str | None = None  # name of the prompt that an alias carries
    alias: bool = False


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
            aliases: further names of models, each with what it stands for: a model, or
                "model:prompt". The alias ANY takes every name that is no other's.
            event: makes what a caller waits for.

        Raises: ModelNotFound when `default` names no bundle; WrongAlias, also for a default that is
        an alias with a prompt: requests that name no model would not get that prompt.
        """
        self.bundles = {bundle.manifest.name: bundle for bundle in bundles}
        prints = {name: bundle.fingerprint() for name, bundle in self.bundles.items()}
        named = {
            getattr(bundle.manifest, key): Target(
                getattr(bundle.manifest, key), bundle, prints[name], f"{name}@{prints[name]}"
            )
            for key in ("source", "name")  # a name comes before the same source
            for name, bundle in self.bundles.items()
        }
        # Aliases last: one may be the source of two bundles, and says which is meant.
        self._targets = named | {
            alias: self._aliased(alias, meant, named) for alias, meant in (aliases or {}).items()
        }
        self.default = self._find_default(default or next(iter(self.bundles)))
        self._loaded: dict[str, T] = {}
        self._event = event
        self._lock = threading.Lock()
        self._waiting: list[Event] = []  # set at every change
        self._stopped = False
        self.warming = False  # warm-up requests are running, so `ready` is false

    def _find_default(self, name: str) -> str:
        if not self.knows(name):
            raise ModelNotFound(self._unknown(name), field="model")
        target = self.resolve(name)
        if target.prompt is not None:
            raise WrongAlias(
                f"EMBEDDING_MODEL={name}: this alias has the prompt {target.prompt!r}, and the "
                f"default model takes none; name {target.bundle.manifest.name}, or an alias "
                "without a prompt"
            )
        return target.bundle.manifest.name

    def _aliased(self, alias: str, meant: str, named: Mapping[str, Target]) -> Target:
        """What an alias stands for. A colon begins a prompt's name only where the whole is no
        model: names may have colons.

        Raises: WrongAlias.
        """
        if alias in self.bundles:
            raise WrongAlias(f"MODEL_ALIASES: {alias}={meant}: there is a model {alias!r} itself")
        if target := named.get(meant):
            return target._replace(asked=alias, alias=True)
        model, _, prompt = meant.rpartition(":")
        target = named.get(model)
        if target is None:
            raise WrongAlias(f"MODEL_ALIASES: {alias}={meant}: {self._unknown(model or meant)}")
        prompts = target.bundle.manifest.prompts
        if prompt not in prompts:
            raise WrongAlias(
                f"MODEL_ALIASES: {alias}={meant}: model {model} has no prompt {prompt!r}; it has: "
                f"{', '.join(sorted(prompts)) or 'none'}"
            )
        return target._replace(asked=alias, alias=True, prompt=prompt)

    def _unknown(self, name: str) -> str:
        return f"no model {name!r} here; there is: {', '.join(sorted(self.bundles))}"

    @property
    def take_pictures(self) -> bool:
        """Whether any model takes pictures."""
        return any("image" in bundle.manifest.modalities for bundle in self.bundles.values())

    @property
    def aliases(self) -> list[Target]:
        """The aliases, without ANY."""
        return [target for name, target in self._targets.items() if target.alias and name != ANY]

    def knows(self, name: str) -> bool:
        """Whether this is a model's name, its source or an alias other than ANY."""
        return name in self._targets and name != ANY

    def resolve(self, name: str | None = None) -> Target:
        """What a name, source or alias stands for; the default model for None.

        Raises: ModelNotFound.
        """
        name = self.default if name is None else name
        if (target := self._targets.get(name)) and name != ANY:
            return target
        if target := self._targets.get(ANY):
            return target._replace(asked=name)
        raise ModelNotFound(self._unknown(name), field="model")

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

    def loaded(self, target: Target) -> bool:
        """Whether `wait` would return at once."""
        return target.bundle.manifest.name in self._loaded

    def bundle(self, name: str | None = None) -> Bundle:
        """The bundle of a model by name, source or alias; of the default model for None.

        Raises: ModelNotFound.
        """
        return self.resolve(name).bundle

    def get(self, name: str | None, deadline: float) -> T:
        """The loaded model of this name, source or alias; the default model for None.

        Raises: ModelNotFound at once; ModelNotReady as `wait` does.
        """
        return self.wait(self.resolve(name), deadline)

    def wait(self, target: Target, deadline: float) -> T:
        """The loaded model, waited for until `deadline` (`time.monotonic`).

        Raises: ModelNotReady when it is still loading at the deadline, or at `stop`.
        """
        name = target.bundle.manifest.name
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
