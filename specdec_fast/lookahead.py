"""How many tokens a row drafts in its next round.

A row's lookahead depends on its own history and on a table frozen for the call, never on a clock or another row, so
that seeded results repeat. ``docs/lookahead.md`` says what :class:`Adaptive` optimises and why ending a draft early is
lossless.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from specdec_fast.costs import Costs, Outlook

__all__ = [
    "SCHEDULES",
    "Adaptive",
    "Constant",
    "Heuristic",
    "Lookahead",
    "Row",
    "best_lookahead",
    "by_confidence",
    "lookahead_for",
]

SCHEDULES = ("adaptive", "constant", "heuristic", "heuristic_transient")


class Lookahead(Protocol):
    """One lookahead a row."""

    watches: bool
    """Whether a drafter that knows how sure it is should ask :meth:`further` behind every token."""

    def __getitem__(self, row: int) -> int:
        """Draft tokens of the row's next round at most, 0 included."""

    def further(self, row: int, drafted: int, confidence: float) -> bool:
        """Whether to draft another token behind one of this probability. The token itself stays, whatever it is.

        Args:
            drafted: tokens of the row's draft so far, at least 1.
            confidence: the drafter's probability of the newest one.
        """

    def update(self, row: int, drafted: int, accepted: int) -> None:
        """Learns from a round of a row."""


def lookahead_for(
    schedule: str,
    rows: int,
    initial: int,
    outlook: Outlook,
    *,
    unread: Sequence[int] = (),
    horizon: int = 64,
    watched: bool = False,
) -> Lookahead:
    """The schedule of that name; see the classes for what the arguments mean."""
    if schedule == "adaptive":
        most = min(3 * initial, Adaptive.MOST)
        return Adaptive(rows, most, outlook, unread=unread, horizon=horizon, watched=watched)
    # heuristic and heuristic_transient differ in what outlives a call, and here nothing does
    return Constant(initial) if schedule == "constant" else Heuristic(rows, initial)


class Constant:
    """Always the same."""

    watches = False

    def __init__(self, initial: int):
        self._initial = initial

    def __getitem__(self, row: int) -> int:
        return self._initial

    def further(self, row: int, drafted: int, confidence: float) -> bool:
        return True

    def update(self, row: int, drafted: int, accepted: int) -> None:
        pass


class Heuristic:
    """Transformers' rule: two more after a round that accepted everything, one less after any other, at least one."""

    watches = False

    def __init__(self, rows: int, initial: int):
        self._next = [initial] * rows

    def __getitem__(self, row: int) -> int:
        return self._next[row]

    def further(self, row: int, drafted: int, confidence: float) -> bool:
        return True

    def update(self, row: int, drafted: int, accepted: int) -> None:
        if drafted:
            self._next[row] = self._next[row] + 2 if accepted == drafted else max(1, self._next[row] - 1)


def best_lookahead(acceptance: Sequence[float], costs: Costs, least: int = 0) -> tuple[int, float]:
    """The lookahead with the most expected tokens for its cost, and how many tokens a unit of cost that is.

    With a_i the acceptance of position i given that the positions before it were accepted, a round of γ draft tokens
    commits ``1 + a_1 + a_1 a_2 + ... + a_1 ... a_γ`` tokens and costs ``costs.round(γ)``.

    Args:
        acceptance: a_1, a_2, ...; no lookahead is longer.
        least: smallest lookahead considered.
    """
    return _best(acceptance, [costs.round(gamma) for gamma in range(len(acceptance) + 1)], least)


def _best(acceptance: Sequence[float], rounds: Sequence[float], least: int = 0) -> tuple[int, float]:
    """:func:`best_lookahead` from what a round of 0, 1, .. draft tokens costs."""
    tokens, reach = 1.0, 1.0
    best, speed = 0, 1 / rounds[0] if not least else 0.0
    for gamma, accepted in enumerate(acceptance, 1):
        reach *= accepted
        tokens += reach
        if gamma >= least and tokens / rounds[gamma] > speed:
            best, speed = gamma, tokens / rounds[gamma]
    return best, speed


class Adaptive:
    """The lookahead with the most expected tokens for its cost, draft by draft; never much more than plain decoding.

    The expected acceptance of a position is the row's own count, old rounds fading, drawn to what is known of the
    position from earlier calls times how well this row does; the expected acceptance of a drawn token is counted by the
    drafter's confidence in the same way. A draft ends where going on is expected to cost more than it brings at the
    row's best speed. What speculation may lose is held down by an account in units of cost: a row begins with a credit
    of a few plain rounds, every token adds ``ALLOWANCE`` of one, a round of speculation adds what it saved and takes
    what it lost, and no round is begun whose worst case is not covered.

    Args:
        rows: how many rows.
        most: largest lookahead.
        outlook: costs, and acceptance in earlier calls.
        unread: tokens of each row's prompt, which a drafter has to read before its first draft.
        horizon: tokens a row may still write.
        watched: whether the drafter asks :meth:`further` behind every token.
    """

    MOST = 64  # beyond it a draft hardly ever pays
    CREDIT, SHARE, LARGEST = 1.0, 0.01, 6.0  # plain rounds: at once, for every token that may come, and at most
    SAVED = 1.5  # plain rounds, which are enough for a try
    ALLOWANCE, CAP = 0.015, 12.0  # plain rounds for every token written; of what was saved, so much may be lost again
    REMEMBERED, SOON = 16.0, 128  # tested tokens from which earlier calls are believed; tokens a pause looks ahead
    GUESS, GUESSED = 0.6, 2.0  # acceptance of an unknown pair, and how many tested tokens that is worth
    ROW, POSITION, SURE = 4.0, 5.0, 6.0  # ... that what is drawn to is worth: for a row, a position, a confidence
    FADING, IDLE = 0.96, 0.995  # weight of what was counted after the next count of its kind, and after any round
    STEPS = 8  # of confidence
    PATIENCE = 2  # doublings at most of the wait for another try

    def __init__(
        self,
        rows: int,
        most: int,
        outlook: Outlook,
        *,
        unread: Sequence[int] = (),
        horizon: int = 64,
        watched: bool = False,
    ):
        self.watches = self._goes_on = watched
        self._costs = costs = outlook.costs
        self._most = most
        self._plain = costs.round(0)
        self._round = self._rounds(costs)
        self._prior = _profile(outlook.tested, outlook.accepted, most, self.GUESS, self.GUESSED)
        known = outlook.tested[0] if outlook.tested else 0.0
        self._row_weight = self.ROW + min(known, 2 * self.ROW)
        self._sure_prior = self._hopes(outlook)
        credit = min(self.CREDIT + self.SHARE * horizon, self.LARGEST) * self._plain
        failed = 0
        if known >= self.REMEMBERED:
            best, speed = _best(self._prior, self._round)
            credit += self._promise(speed, horizon)
            failed = 0 if best else self.PATIENCE
        self._known = [*outlook.tested[:most], *[0.0] * (most - len(outlook.tested))]
        self._rows = [Row(most, self.STEPS, credit, horizon, failed) for _ in range(rows)]
        for own, tokens in zip(self._rows, unread, strict=False):
            own.unread = tokens
        self.tested, self.accepted = [0.0] * most, [0.0] * most
        self.sure_tested, self.sure_accepted = [0.0] * self.STEPS, [0.0] * self.STEPS

    def _promise(self, speed: float, horizon: int) -> float:
        """Half of what this speed saves soon, beside plain decoding."""
        return 0.5 * max(self._plain - 1 / speed, 0.0) * min(max(horizon, 0), self.SOON)

    # What is expected ------------------------------------------------------------------------------------------------

    def _acceptance(self, own: Row) -> list[float]:
        """The expected acceptance of each position, given that those before it were accepted."""
        hoped = 0.0
        for t, p in zip(own.tested, self._prior, strict=True):
            hoped += t * p
        # How well the row does beside what was expected of it
        usual = self._row_weight * self._prior[0]
        factor = (sum(own.accepted) + usual) / (hoped + usual)
        own.factor = factor
        weight = self.POSITION
        result = []
        for a, t, p in zip(own.accepted, own.tested, self._prior, strict=True):
            hope = p * factor
            result.append((a + weight * (hope if hope < 0.99 else 0.99)) / (t + weight))
        return result

    def __getitem__(self, row: int) -> int:
        own = self._rows[row]
        if own.stale:
            self._choose(own)
        return own.limit

    def _choose(self, own: Row) -> None:
        own.stale, own.limit, own.reach = False, 0, 1.0
        own.sure.clear()
        own.expected = self._acceptance(own)
        # The drafter reads what it has missed; an ordinary round's few tokens are part of its start
        own.catch_up = self._costs.read * max(own.unread - self._most - 1, 0)
        affordable = self._affordable(own.balance - own.catch_up)
        best, own.speed = _best(own.expected, self._round)
        if best and own.catch_up <= self._promise(own.speed, own.horizon):
            # A draft that turns out sure may go on
            own.limit = min(max(best + 1, 2 * best) if self._goes_on else best, affordable, self._most)
        elif affordable:
            probe, speed = _best(own.expected, self._round, 1)
            loss = self._round[probe] * max(1 - speed * self._plain, 0.0) + own.catch_up
            # Each try that brought nothing makes the next one wait longer; the most that can be saved is enough for one
            saving = min(loss * 2**own.failed, max(loss, self.SAVED * self._plain))
            if own.saved >= saving or (self._hopeful(own) and own.balance >= 2 * loss):
                own.limit = min(probe, affordable)

    def _hopeful(self, own: Row) -> bool:
        """Whether drafting would pay if acceptance were a standard deviation better than it looks.

        What earlier calls have tested counts half: a text may be another kind.
        """
        better = [
            min(a + (a * (1 - a) / (t + k / 2 + self.POSITION)) ** 0.5, 0.99)
            for a, t, k in zip(own.expected, own.tested, self._known, strict=True)
        ]
        best, speed = _best(better, self._round)
        return best > 0 and own.catch_up <= self._promise(speed, own.horizon)

    def _affordable(self, balance: float) -> int:
        """The longest draft whose loss is covered if nothing of it is accepted."""
        for gamma in range(self._most, 0, -1):
            if self._round[gamma] - self._plain <= balance:
                return gamma
        return 0

    def further(self, row: int, drafted: int, confidence: float) -> bool:
        own = self._rows[row]
        step = min(int(confidence * self.STEPS), self.STEPS - 1) if confidence > 0 else 0
        own.sure.append(step)
        if drafted >= own.limit:
            return False
        own.reach *= self._sure_acceptance(own, step)
        return own.reach > self._worth(own, drafted)

    def _worth(self, own: Row, drafted: int) -> float:
        """Where the draft so far is accepted more often, further tokens bring more than they cost at the best speed."""
        reach, gained, least = 1.0, 0.0, float("inf")
        rounds, expected, speed, spent = self._round, own.expected, own.speed, self._round[drafted]
        for more in range(drafted, own.limit):
            reach *= expected[more]
            gained += reach
            if gained > 0:
                cost = speed * (rounds[more + 1] - spent) / gained
                if cost < least:
                    least = cost
        return least

    def stops(self, row: int) -> tuple[list[float], list[float]]:
        """:meth:`further` in numbers, for a drafter that cannot ask: the row's next draft as its limit was chosen.

        Returns:
            the acceptance of a token by the step of its confidence; and for drafts of 1, 2, .. tokens, up to the limit,
            what the product of those of its tokens must exceed for it to go on.
        """
        own = self._rows[row]
        sure = [self._sure_acceptance(own, step) for step in range(self.STEPS)]
        return sure, [self._worth(own, drafted) for drafted in range(1, own.limit + 1)]

    def saw(self, row: int, steps: Sequence[int]) -> None:
        """Takes note of the confidence of each token of a draft that was ended by :meth:`stops`."""
        self._rows[row].sure = list(steps)

    def _sure_acceptance(self, own: Row, step: int) -> float:
        prior = min(self._sure_prior[step] * own.factor, 0.99)
        return (own.sure_accepted[step] + self.SURE * prior) / (own.sure_tested[step] + self.SURE)

    def _rounds(self, costs: Costs) -> list[float]:
        """What a round costs by its lookahead."""
        return [costs.round(gamma) for gamma in range(self._most + 1)]

    def _hopes(self, outlook: Outlook) -> list[float]:
        """The expected acceptance of a token by the step of its confidence."""
        hopes = [0.35 + 0.6 * (step + 0.5) / self.STEPS for step in range(self.STEPS)]
        return by_confidence(outlook, hopes, 8.0)

    # What happened ---------------------------------------------------------------------------------------------------

    def update(self, row: int, drafted: int, accepted: int) -> None:
        own = self._rows[row]
        own.stale = True
        committed = accepted + 1
        own.unread += committed
        own.horizon -= committed
        own.balance += self.ALLOWANCE * committed * self._plain
        own.saved = min(own.saved + self.ALLOWANCE * committed * self._plain, self.SAVED * self._plain)
        for counts in (own.tested, own.accepted, own.sure_tested, own.sure_accepted):
            counts[:] = [self.IDLE * count for count in counts]
        if not drafted:
            if own.limit:  # tried, and nothing came of it
                own.balance -= self._round[1] - self._plain + own.catch_up
                own.unread = committed
            return
        gain = committed * self._plain - self._spent(own, drafted) - own.catch_up
        own.balance = min(own.balance + gain, self.CAP * self._plain)
        own.saved = 0.0
        own.failed = 0 if accepted else min(own.failed + 1, self.PATIENCE)
        own.unread = committed
        for i in range(min(accepted + 1, drafted, self._most)):
            stays = float(i < accepted)
            own.tested[i] = self.FADING * own.tested[i] + 1
            own.accepted[i] = self.FADING * own.accepted[i] + stays
            self.tested[i] += 1
            self.accepted[i] += stays
        # A drafter whose tokens are not the target's has a confidence for each of its own
        written = len(own.sure)
        kept = accepted if written == drafted else accepted * written // drafted
        for i, step in enumerate(own.sure[: min(kept + 1, written)]):
            stays = float(i < kept)
            own.sure_tested[step] = self.FADING * own.sure_tested[step] + 1
            own.sure_accepted[step] = self.FADING * own.sure_accepted[step] + stays
            self.sure_tested[step] += 1
            self.sure_accepted[step] += stays

    def _spent(self, own: Row, drafted: int) -> float:
        """What the round at hand has cost."""
        return self._costs.round(drafted)


class Row:
    """What is known of one row."""

    def __init__(self, most: int, steps: int, credit: float, horizon: int, failed: int):
        self.balance = credit
        self.failed = failed  # doublings of the wait for another try
        self.saved = 0.0  # of the allowance since the last draft: what a probe may lose
        self.unread = 0
        self.horizon = horizon
        self.tested, self.accepted = [0.0] * most, [0.0] * most
        self.sure_tested, self.sure_accepted = [0.0] * steps, [0.0] * steps
        # Of the round at hand
        self.stale = True
        self.limit = 0
        self.expected: list[float] = []
        self.factor = 1.0
        self.speed = 0.0
        self.catch_up = 0.0
        self.reach = 1.0
        self.sure: list[int] = []


def _profile(tested: Sequence[float], accepted: Sequence[float], most: int, guess: float, weight: float) -> list[float]:
    """The acceptance of each position in earlier calls, drawn to that of the position before it."""
    result, before = [], guess
    for i in range(most):
        t, a = (tested[i], accepted[i]) if i < len(tested) else (0.0, 0.0)
        before = (a + weight * before) / (t + weight)
        result.append(before)
    return result


def by_confidence(outlook: Outlook, hopes: Sequence[float], weight: float) -> list[float]:
    """The acceptance of a token by its confidence in earlier calls, drawn to what is hoped of each step."""
    result = []
    for step, hope in enumerate(hopes):
        known = step < len(outlook.sure_tested)
        t, a = (outlook.sure_tested[step], outlook.sure_accepted[step]) if known else (0.0, 0.0)
        result.append((a + weight * hope) / (t + weight))
    return result
