"""engine/tenants.py: whose requests are next. tests/test_queue.py has the same with batches."""

from typing import Any, NamedTuple

from engine.quota import Quota, QuotaLimits
from engine.tenants import Tenant, Tenants

BATCH = 500


class Job(NamedTuple):
    tenant: Tenant
    tag: float = 0.0


def served(tenants: Tenants, tenant: Tenant, tokens: int) -> None:
    tenant.serve(tokens)
    tenants.served(tokens)


def test_a_tenant_is_made_once_and_has_its_quota() -> None:
    quota = Quota("app", QuotaLimits())
    tenants = Tenants({"app": quota})
    assert tenants.get("app").quota is quota and tenants.get("app") is tenants.get("app")
    assert tenants.find("other") is None
    assert tenants.get("other").quota is None and tenants.find("other") is tenants.get("other")


def test_what_waits_is_counted_by_tenant() -> None:
    tenants = Tenants({})
    app, other = tenants.get("app"), tenants.get("other")
    for tenant, tokens in ((app, 30), (app, 40), (other, 5)):
        tenants.enter(tenant, tokens, BATCH)
    assert (app.jobs, app.tokens, other.jobs, other.tokens) == (2, 70, 1, 5)
    served(tenants, app, 30)
    tenants.leave([app])
    assert (app.jobs, app.tokens) == (1, 40) and [*tenants.active] == [app, other]
    tenants.leave([app, other])
    assert not tenants.active


def test_the_tenant_served_least_is_next_then_its_requests_by_their_tags() -> None:
    tenants = Tenants({})
    one, two = tenants.get("one"), tenants.get("two")
    for tenant in (one, two):
        tenants.enter(tenant, 5000, BATCH)
    jobs = [Job(one, 2.0), Job(one, 1.0), Job(two, 9.0)]

    def order() -> list[Any]:
        return sorted(jobs, key=tenants.rank)

    assert order() == [Job(two, 9.0), Job(one, 1.0), Job(one, 2.0)]  # two may be ahead by a batch
    served(tenants, two, BATCH + 1)
    assert order() == [Job(one, 1.0), Job(one, 2.0), Job(two, 9.0)]
    tenants.leave([two])
    assert order()[-1] == Job(two, 9.0)  # nobody else: by their own tags


def test_a_tenant_that_was_away_has_no_more_than_a_batch_to_catch_up() -> None:
    tenants = Tenants({})
    steady, new = tenants.get("steady"), tenants.get("new")
    tenants.enter(steady, 10**6, BATCH)
    served(tenants, steady, 100_000)
    tenants.enter(new, 10**6, BATCH)
    assert steady.tag - new.tag == BATCH
    served(tenants, new, BATCH)
    assert new.tag == steady.tag


def test_a_tenant_keeps_what_it_had_beyond_its_share() -> None:
    tenants = Tenants({})
    steady, greedy = tenants.get("steady"), tenants.get("greedy")
    tenants.enter(steady, 10**6, BATCH)
    tenants.enter(greedy, 2000, BATCH)
    served(tenants, greedy, 2000)
    tenants.leave([greedy])
    tenants.enter(greedy, 2000, BATCH)
    assert greedy.tag - steady.tag == 2000 - BATCH


def test_requests_of_a_tenant_begin_where_its_clock_is() -> None:
    """It advances by what each of its requests was served, on average."""
    tenants = Tenants({})
    app = tenants.get("app")
    for _ in range(4):
        tenants.enter(app, 100, BATCH)
    served(tenants, app, 100)
    assert app.clock == 25.0
