"""server/spread.py: who holds more than its part."""

from server.spread import Spread


def test_a_lone_worker_never_holds_too_many() -> None:
    spread = Spread(1)
    spread.hold(1, 500)
    assert spread.excess(1) <= 0


def test_the_excess_is_over_the_fewest_and_an_eighth() -> None:
    spread = Spread(3)
    for age, held in ((1, 16), (2, 20), (3, 17)):
        spread.hold(age, held)
    assert [spread.excess(age) for age in (1, 2, 3)] == [-2, 2, -1]


def test_a_worker_that_has_left_counts_no_more() -> None:
    spread = Spread(2)
    spread.hold(1, 9)
    spread.hold(2, 0)
    assert spread.excess(1) == 9
    spread.leave(2)
    assert spread.excess(1) < 1


def test_workers_that_follow_one_another_have_room() -> None:
    spread = Spread(2)
    for age in range(1, 100):
        spread.hold(age, age)
        assert spread.excess(age) <= 1
        spread.leave(age)
