"""Schedules: what a row drafts next, from its own history alone."""

import pytest

from specdec_fast.lookahead import SCHEDULES, lookahead_for


def run(accepting: float, rounds: int, *, cost: float, initial: int = 5) -> list[int]:
    """Lookaheads of one row whose drafts keep a fixed share of their tokens, spread evenly."""
    lookahead = lookahead_for("adaptive", 1, initial, cost)
    used, owed = [], 0.0
    for _ in range(rounds):
        gamma = lookahead[0]
        used.append(gamma)
        owed += accepting * gamma
        accepted = min(int(owed), gamma)
        owed -= accepted
        lookahead.update(0, gamma, accepted)
    return used


def test_a_good_drafter_drafts_more_and_a_bad_one_less():
    good, fair = run(0.95, 60, cost=0.05), run(0.3, 60, cost=0.05)
    assert min(good[20:]) >= 7 and max(good) <= 10
    assert max(fair[20:]) <= 3


def test_a_hopeless_drafter_is_left_alone_but_for_rare_probes():
    used = run(0.0, 400, cost=0.3)
    assert sum(gamma > 0 for gamma in used[20:]) <= 12
    assert any(used[200:])  # and is tried again


def test_a_drafter_that_gets_better_is_taken_up_again():
    lookahead = lookahead_for("adaptive", 1, 5, 0.3)
    for _ in range(50):
        lookahead.update(0, lookahead[0], 0)
    taken = 0
    for _ in range(300):
        gamma = lookahead[0]
        taken += gamma
        lookahead.update(0, gamma, gamma)
    assert taken > 500


def test_rows_do_not_see_each_other():
    one, two = lookahead_for("adaptive", 1, 5, 0.1), lookahead_for("adaptive", 2, 5, 0.1)
    for accepted in (3, 0, 1, 2, 0, 0, 1):
        assert one[0] == two[0]
        one.update(0, 4, accepted)
        two.update(0, 4, accepted)
        two.update(1, 4, 4 - accepted)
    assert one[0] == two[0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_starts_near_what_was_asked(schedule: str):
    assert 1 <= lookahead_for(schedule, 1, 4, 0.05)[0] <= 8
