"""How many tokens a row drafts in its next round.

A row's lookahead depends on its own history alone, never on a clock or another row, so that seeded results repeat.
"""

from __future__ import annotations

import functools
from typing import Protocol

__all__ = ["SCHEDULES", "Adaptive", "Constant", "Heuristic", "Lookahead", "lookahead_for"]

SCHEDULES = ("adaptive", "constant", "heuristic", "heuristic_transient")


class Lookahead(Protocol):
    """One lookahead a row."""

    def __getitem__(self, row: int) -> int:
        """Draft tokens of the row's next round, 0 included."""

    def update(self, row: int, drafted: int, accepted: int) -> None:
        """Learns from a round of a row."""


def lookahead_for(schedule: str, rows: int, initial: int, draft_cost: float) -> Lookahead:
    """The schedule of that name; see the classes for what the arguments mean."""
    if schedule == "adaptive":
        return Adaptive(rows, min(2 * initial, Adaptive.MOST), draft_cost)
    # heuristic and heuristic_transient differ in what outlives a call, and here nothing does
    return Constant(initial) if schedule == "constant" else Heuristic(rows, initial)


class Constant:
    """Always the same."""

    def __init__(self, initial: int):
        self._initial = initial

    def __getitem__(self, row: int) -> int:
        return self._initial

    def update(self, row: int, drafted: int, accepted: int) -> None:
        pass


class Heuristic:
    """Transformers' rule: two more after a round that accepted everything, one less after any other, at least one."""

    def __init__(self, rows: int, initial: int):
        self._next = [initial] * rows

    def __getitem__(self, row: int) -> int:
        return self._next[row]

    def update(self, row: int, drafted: int, accepted: int) -> None:
        if drafted:
            self._next[row] = self._next[row] + 2 if accepted == drafted else max(1, self._next[row] - 1)


class Adaptive:
    """The lookahead with the most expected tokens for its cost; none, with probes now and then, where none pays.

    With acceptance α a round of γ draft tokens commits ``(1 - α^(γ+1)) / (1 - α)`` tokens (Leviathan et al.,
    arXiv 2211.17192, equation 1) and costs ``1 + γ (draft_cost + SCORE_COST)`` target passes; γ = 0 is plain decoding.
    α is a row's own share of accepted among tested tokens, old rounds fading, drawn to a guess while there are few.

    Args:
        rows: how many rows.
        most: largest lookahead.
        draft_cost: one draft token's cost in target passes, frozen for the call.
    """

    SCORE_COST = 0.015  # one more position in a target pass; a few percent of it on CPUs, less on GPUs
    FADING = 0.93  # weight of a round after the next one: a memory of about 14 rounds
    GUESS, WEIGHT = 0.6, 3.0
    MOST = 64  # beyond it a draft hardly ever pays
    PROBE, LONGEST_WAIT = 2, 64  # tokens of a probe; rounds without speculation, doubled up to this

    def __init__(self, rows: int, most: int, draft_cost: float):
        self._accepted = [0.0] * rows
        self._tested = [0.0] * rows
        self._wait = [0] * rows
        self._waited = [0] * rows
        self._best = _best_lookahead(most, draft_cost + self.SCORE_COST)

    def __getitem__(self, row: int) -> int:
        rate = (self._accepted[row] + self.GUESS * self.WEIGHT) / (self._tested[row] + self.WEIGHT)
        best = self._best[round(rate * (len(self._best) - 1))]
        if best:
            return best
        return self.PROBE if self._waited[row] >= self._wait[row] else 0

    def update(self, row: int, drafted: int, accepted: int) -> None:
        if not drafted:
            self._waited[row] += 1
            return
        self._accepted[row] = self._accepted[row] * self.FADING + accepted
        self._tested[row] = self._tested[row] * self.FADING + min(accepted + 1, drafted)
        # Reached after every draft; it only matters where the next lookahead is none
        paid = accepted >= self.PROBE
        self._wait[row] = 4 if paid else min(max(2 * self._wait[row], 4), self.LONGEST_WAIT)
        self._waited[row] = 0


@functools.cache
def _best_lookahead(most: int, cost: float, steps: int = 100) -> list[int]:
    """The best lookahead for acceptance 0, 1/steps, ..., 1: a table, so that a round costs one look-up."""
    table = []
    for step in range(steps + 1):
        alpha = step / steps
        tokens, best, speed = 1.0, 0, 1.0
        for gamma in range(1, most + 1):
            tokens += alpha**gamma
            if tokens / (1 + gamma * cost) > speed:
                best, speed = gamma, tokens / (1 + gamma * cost)
        table.append(best)
    return table
