"""Schedules: what a row drafts next, from its own history and a frozen table. Costs and acceptance are made up."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from specdec_fast.costs import Costs, Outlook, constant_costs
from specdec_fast.lookahead import SCHEDULES, Adaptive, best_lookahead, lookahead_for

MOST = 15
FLAT = Costs(tuple(20 + 0.4 * i for i in range(17)), step=1.0, start=0.5, read=0.1)
STEEP = Costs((11, 17, 21, 24, 28, 31, 30, 30, 30, 30, 30, 30, 30, 30, 31, 31), step=0.8, start=0.5, read=0.06)
DEAR = Costs((36, 40, 43, 46, 49, 52, 55, 58, 61, 64, 67, 70, 73, 76, 79, 82), step=12, start=3, read=0.7)


@dataclass
class World:
    """A row whose draft tokens are accepted by chance.

    Args:
        costs: what rounds really take.
        chance: from tokens written and the position in a draft to the acceptance of that position.
        sure: draws how sure the drafter is of a token, and the acceptance of a token it is that sure of.
        prompt: tokens to read before the first draft.
    """

    costs: Costs
    chance: Callable[[int, int], float] = lambda written, place: 0.0
    sure: Callable[[random.Random], tuple[float, float]] | None = None
    prompt: int = 40

    def run(self, lookahead, tokens: int, seed: int = 0) -> tuple[float, list[int]]:
        """Cost a token in plain rounds, and what each round drafted."""
        numbers = random.Random(seed)
        written, cost, unread, used = 0, 0.0, self.prompt, []
        while written < tokens:
            most, fates = lookahead[0], []
            while len(fates) < most:
                confidence, chance = (0.0, self.chance(written, len(fates)))
                if self.sure is not None:
                    confidence, chance = self.sure(numbers)
                fates.append(numbers.random() < chance)
                if lookahead.watches and not lookahead.further(0, len(fates), confidence):
                    break
            accepted = fates.index(False) if False in fates else len(fates)
            cost += self.costs.round(len(fates))
            if fates:
                cost += self.costs.read * max(unread - MOST - 1, 0)
                unread = 0
            unread += accepted + 1
            written += accepted + 1
            lookahead.update(0, len(fates), accepted)
            used.append(len(fates))
        return cost / written / self.costs.round(0), used

    def speed(self, tokens: int, runs: int = 12, constant: int | None = None, outlook: Outlook | None = None) -> float:
        """Mean speed beside plain decoding, adaptive or at a constant lookahead."""
        costs = []
        for seed in range(runs):
            own = (
                lookahead_for("constant", 1, constant, Outlook(self.costs))
                if constant is not None
                else self.adaptive(tokens, outlook)
            )
            costs.append(self.run(own, tokens, seed)[0])
        return runs / sum(costs)

    def adaptive(self, tokens: int, outlook: Outlook | None = None) -> Adaptive:
        known = outlook or Outlook(self.costs)
        watched = self.sure is not None
        return Adaptive(1, MOST, known, unread=[self.prompt], horizon=tokens, watched=watched)

    def best(self, tokens: int) -> float:
        """The speed of the best constant lookahead, plain decoding included."""
        return max(1.0, *(self.speed(tokens, constant=gamma) for gamma in range(1, MOST + 1)))


def even(share: float) -> Callable[[int, int], float]:
    return lambda written, place: share


def falling(written: int, place: int) -> float:
    return (0.9, 0.75, 0.5, 0.3)[min(place, 3)]


@pytest.mark.parametrize("costs", [FLAT, STEEP, DEAR], ids=["flat", "steep", "dear"])
@pytest.mark.parametrize(
    "chance", [even(0.0), even(0.3), even(0.6), even(0.85), falling], ids=["0", ".3", ".6", ".85", "falls"]
)
def test_it_is_nearly_as_fast_as_the_best_constant_lookahead(costs, chance):
    world = World(costs, chance)
    # What is lost is the finding out: a few rounds
    assert world.speed(400) > 0.93 * world.best(400)


@pytest.mark.parametrize("costs", [FLAT, STEEP, DEAR], ids=["flat", "steep", "dear"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6])
def test_no_run_is_much_slower_than_plain_decoding(costs, share):
    for tokens in (64, 256):
        world = World(costs, even(share))
        slowest = max(world.run(world.adaptive(tokens), tokens, seed)[0] for seed in range(20))
        # The account: the allowance, and the credit spread over the tokens
        credit = min(Adaptive.CREDIT + Adaptive.SHARE * tokens, Adaptive.LARGEST)
        assert slowest <= 1 + Adaptive.ALLOWANCE + credit / tokens + 1e-9


def test_the_account_holds_whatever_happens():
    """Fates chosen against the row: it accepts until it drafts far, then nothing."""
    world = World(FLAT, lambda written, place: float(written % 37 < 20 and place < 3))
    slowest = max(world.run(world.adaptive(300), 300, seed)[0] for seed in range(20))
    credit = min(Adaptive.CREDIT + Adaptive.SHARE * 300, Adaptive.LARGEST)
    assert slowest <= 1 + Adaptive.ALLOWANCE + credit / 300 + 1e-9


def test_a_pair_known_to_be_hopeless_is_hardly_tried():
    known = Outlook(STEEP, tested=(40.0, 2.0), accepted=(2.0, 0.0))
    world = World(STEEP, even(0.05))
    _, used = world.run(world.adaptive(64, known), 64)
    assert sum(used) <= 1
    _, used = world.run(world.adaptive(2000, known), 2000)
    assert 1 <= sum(gamma > 0 for gamma in used) <= 60  # and is tried again now and then


def test_tries_that_bring_nothing_become_rarer():
    """Where a try costs little the allowance would pay for one every few tokens; all of them together cost 1 %."""
    cheap = Costs(tuple(7 + 0.05 * i for i in range(17)), step=0.04, start=0.4, read=0.01, rest=0.2)
    known = Outlook(cheap, tested=(64.0,), accepted=(0.0,))
    world = World(cheap, even(0.0))
    cost, used = world.run(world.adaptive(96, known), 96)
    assert 1 <= sum(gamma > 0 for gamma in used) <= 10
    assert cost < 1.01


def test_a_pair_known_to_be_good_starts_at_full_length():
    known = Outlook(FLAT, tested=(60.0,) * 10, accepted=(54.0,) * 10)
    assert World(FLAT, even(0.9)).adaptive(64, known)[0] >= 8
    assert World(FLAT, even(0.9)).adaptive(64)[0] <= 5


def test_a_drafter_that_gets_better_is_taken_up_again():
    world = World(FLAT, lambda written, place: 0.02 if written < 150 else 0.9)
    assert world.speed(500) > 1.35
    assert world.speed(500) > world.best(500)


def test_positions_count_one_by_one():
    """The first two tokens of a draft are certain, the third is hopeless."""
    world = World(FLAT, lambda written, place: float(place < 2))
    _, used = world.run(world.adaptive(400), 400)
    assert set(used[30:]) == {2, 3} and used[30:].count(2) > 0.7 * len(used[30:])  # the third is tried now and then


def sharp(numbers: random.Random) -> tuple[float, float]:
    confidence = numbers.betavariate(1.2, 0.6)
    return confidence, min(0.1 + 0.9 * confidence, 0.98)


def blind(numbers: random.Random) -> tuple[float, float]:
    return numbers.random(), 0.7


def test_a_draft_ends_where_the_drafter_is_unsure():
    world = World(DEAR, sure=sharp)
    assert world.speed(1000) > 1.02 * world.best(1000)  # no constant lookahead can do that


def test_a_confidence_that_says_nothing_is_not_believed():
    world = World(FLAT, sure=blind)
    assert world.speed(600) > 0.93 * world.best(600)


def test_a_long_text_to_read_is_not_read_for_a_few_tokens():
    world = World(DEAR, even(0.9), prompt=2000)
    _, used = world.run(world.adaptive(24), 24)
    assert not any(used)


def test_rows_do_not_see_each_other():
    one, two = (lookahead_for("adaptive", rows, 5, Outlook(constant_costs(100, 10))) for rows in (1, 2))
    for accepted in (3, 0, 1, 2, 0, 0, 1):
        assert one[0] == two[0]
        one.update(0, 4, accepted)
        two.update(0, 4, accepted)
        two.update(1, 4, 4 - accepted)
    assert one[0] == two[0]


def test_asking_twice_changes_nothing():
    lookahead = lookahead_for("adaptive", 1, 5, Outlook(FLAT))
    assert lookahead[0] == lookahead[0] > 0


def test_the_best_lookahead_weighs_tokens_against_cost():
    costs = Costs((1.0, 1.1, 1.2, 1.3), step=0.1)
    # 1 -> 1; (1 + .4) / 1.2; (1 + .4 + .16) / 1.4; (1 + .4 + .16 + .064) / 1.6
    assert best_lookahead([0.4, 0.4, 0.4], costs) == (1, pytest.approx(1.4 / 1.2))
    assert best_lookahead([0.9, 0.9, 0.0], costs) == (2, pytest.approx(2.71 / 1.4))
    assert best_lookahead([0.1, 0.9], costs) == (0, 1.0)
    assert best_lookahead([0.1, 0.9], costs, 1)[0] == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_starts_near_what_was_asked(schedule: str):
    assert 1 <= lookahead_for(schedule, 1, 4, Outlook(constant_costs(100, 5)))[0] <= 8


def test_what_ends_a_draft_can_be_told_in_numbers():
    """A drafter that multiplies what ``stops`` gives decides as one that asks ``further`` behind every token."""
    numbers = random.Random(0)
    asked, told = (Adaptive(1, 12, Outlook(STEEP), watched=True) for _ in range(2))
    lengths = set()
    for _ in range(200):
        limit = asked[0]
        assert told[0] == limit
        confidences = [numbers.random() for _ in range(limit)]
        length = next((i for i, mass in enumerate(confidences, 1) if not asked.further(0, i, mass)), limit)
        sure, worth = told.stops(0)
        steps = [int(mass * Adaptive.STEPS) for mass in confidences]
        reach, drafted = 1.0, limit
        for i in range(limit):
            reach *= sure[steps[i]]
            if not reach > worth[i]:
                drafted = i + 1
                break
        assert drafted == length and len(worth) == limit
        told.saw(0, steps[:drafted])
        accepted = numbers.randrange(drafted + 1)
        for lookahead in (asked, told):
            lookahead.update(0, drafted, accepted)
        lengths.add(limit - length)
    assert len(lengths) > 2
