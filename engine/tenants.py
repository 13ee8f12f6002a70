"""Whose requests are next: tenants (API keys) share the engine equally, whatever each has waiting.

A tenant's tag is the tokens it was served, counted from a clock that advances at the speed of one
tenant's fair share. The smallest tag is next. A tenant that has had less than its share may be
ahead by one batch when it comes, so its short requests are next. Within a tenant, requests share in
the same way: see queue.py.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.quota import Quota

# The tenant of the service's own requests, such as the probe of a model that loads while others
# serve. They are never refused. No key can have this name.
SERVICE = "(the service)"

_tag = operator.attrgetter("tag")
_tenant_first = operator.attrgetter("tenant.tag", "tag")


@dataclass(eq=False, slots=True)
class Tenant:
    """Whose requests share: in the service, those of one API key."""

    name: str | None = None
    quota: Quota | None = None
    jobs: int = 0  # requests with inputs that wait
    tokens: int = 0  # that wait
    tag: float = -math.inf  # tokens served, on the clock of the tenants
    clock: float = 0.0  # of its own requests' shares
    relief: float | None = None  # after a refusal: waiting tokens of the queue at which that ends
    batch: int = 0  # most tokens of a batch of the engine whose request was refused
    never_refused: bool = False  # SERVICE

    def serve(self, tokens: int) -> None:
        """A batch takes so many of its waiting tokens."""
        self.tokens -= tokens
        self.tag += tokens
        self.clock += tokens / self.jobs


class Tenants:
    """All tenants of a queue. Not thread-safe but for `get` and `find`."""

    def __init__(self, quotas: Mapping[str | None, Quota]) -> None:
        """`quotas`: what tenants may use at most, by name."""
        self._known: dict[str | None, Tenant] = {
            name: Tenant(name, quota) for name, quota in quotas.items()
        }
        self._known[SERVICE] = Tenant(never_refused=True)
        self.active: dict[Tenant, None] = {}  # those with inputs that wait
        self._clock = 0.0
        self.find = self._known.get  # None for a tenant that has not had a request yet

    def get(self, name: str | None) -> Tenant:
        return self._known.get(name) or self._known.setdefault(name, Tenant(name))

    def enter(self, tenant: Tenant, tokens: int, batch: int) -> None:
        """A request of so many tokens joins the queue. `batch`: the most tokens of a batch."""
        if not tenant.jobs:
            tenant.tag = max(tenant.tag, self._clock - (batch if self.active else 0))
            self.active[tenant] = None
        tenant.jobs += 1
        tenant.tokens += tokens

    def leave(self, tenants: Iterable[Tenant]) -> None:
        """A request of each has nothing waiting any more."""
        for tenant in tenants:
            tenant.jobs -= 1
            if not tenant.jobs:
                del self.active[tenant]

    def served(self, tokens: int) -> None:
        """A batch of so many tokens was taken. To be called before `leave`: tenants whose last
        waiting tokens it took still count as active.
        """
        self._clock += tokens / len(self.active)

    @property
    def rank(self) -> Callable[[Any], Any]:
        """The sort key of jobs: the least is next."""
        return _tag if len(self.active) == 1 else _tenant_first
