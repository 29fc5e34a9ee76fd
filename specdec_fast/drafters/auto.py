"""Chooses among drafters by running acceptance, row by row and round by round.

All candidates are lossless, and which of them drafts a row's next round is decided by that row's committed text and by
how many draft tokens of its earlier rounds stayed, before anything of the round is drawn. So given the past every round
is one round of one lossless method (``docs/auto.md``), and a row does not notice what the others do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from specdec_fast.drafters.base import Drafter
from specdec_fast.proposal import Proposal
from specdec_fast.state import Rows
from specdec_fast.verification import Draws

__all__ = ["AutoDrafter", "Candidate", "History"]


@dataclass(frozen=True)
class Candidate:
    """A drafter that may be tried.

    Args:
        method: its name in the statistics.
        build: makes it, for all rows; called when a first row tries it.
        hope: the acceptance expected of it before it has been tried.
        handicap: what a round's cost beyond another's is worth, in acceptance.
    """

    method: str
    build: Callable[[], Drafter]
    hope: float = 0.5
    handicap: float = 0.0


class History:
    """What a row knows of the candidates, and which of them drafts next.

    The acceptance of a candidate is the share of accepted among tested draft tokens of this row, old rounds fading,
    drawn to what was hoped for while there are few. The row stays with its candidate until that one has been tested
    enough, then leaves it where another one is worth more by a margin: its acceptance less its handicap. An untried one
    is worth what is hoped for, so it gets its turn only where the present one does clearly worse than that.

    Args:
        candidates: the row begins with the first.
    """

    FADING = 0.98  # weight of a round after the next one of the same candidate: a memory of about 50 rounds
    WEIGHT = 4.0
    MARGIN = 0.05
    LEAST = 16  # tokens tested before a candidate is left

    def __init__(self, candidates: Sequence[Candidate]):
        self.current = 0
        self.changes = 0
        self.accepted = [0.0] * len(candidates)
        self.tested = [0.0] * len(candidates)
        self._candidates = candidates
        self._since = 0  # tokens tested since the last change

    def worth(self, candidate: int) -> float:
        """The acceptance of a candidate as far as it is known, less its handicap."""
        own = self._candidates[candidate]
        known = (self.accepted[candidate] + own.hope * self.WEIGHT) / (self.tested[candidate] + self.WEIGHT)
        return known - own.handicap

    def learn(self, drafted: int, accepted: int) -> None:
        """Takes note of a round in which the present candidate drafted, and decides who drafts the next one."""
        here, tested = self.current, min(accepted + 1, drafted)
        self.accepted[here] = self.accepted[here] * self.FADING + accepted
        self.tested[here] = self.tested[here] * self.FADING + tested
        self._since += tested
        if self._since < self.LEAST:
            return
        best = max(range(len(self.tested)), key=self.worth)
        if self.worth(best) > self.worth(here) + self.MARGIN:
            self.current, self._since = best, 0
            self.changes += 1


@dataclass
class _Row:
    """One row: its history, and its last round.

    Args:
        history: of the candidates.
        length: tokens committed at the start of the last round.
        drafted: tokens it drafted.
    """

    history: History
    length: int = 0
    drafted: int = 0


@dataclass
class AutoDrafter:
    """Lets each row draft with the candidate that its history names.

    A candidate reads a row's text from the beginning when the row first tries it.

    Args:
        candidates: the one to begin with comes first.
        rows: how many rows.
    """

    candidates: Sequence[Candidate]
    rows: int
    _made: dict[int, Drafter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._rows = [_Row(History(self.candidates)) for _ in range(self.rows)]

    @property
    def translate_seconds(self) -> float:
        return sum(drafter.translate_seconds for drafter in self._made.values())

    def propose(self, rows: Rows, active: list[int], limit: list[int], draws: Draws) -> Proposal:
        chosen = self.choose(rows, active)
        parts = []
        for candidate in sorted(set(chosen)):
            if candidate not in self._made:
                self._made[candidate] = self.candidates[candidate].build()
            places = [r for r, own in enumerate(chosen) if own == candidate]
            own_rows, own_limit = [active[r] for r in places], [limit[r] for r in places]
            parts.append((places, self._made[candidate].propose(rows, own_rows, own_limit, draws.rows(places))))
        proposal = parts[0][1] if len(parts) == 1 else Proposal.joined(parts)
        for row, count in zip(active, proposal.count, strict=True):
            self.note(row, len(rows.tokens[row]), count)
        return proposal

    def choose(self, rows: Rows, active: list[int]) -> list[int]:
        """Who drafts each row's next round; learns from what was committed since its last one.

        That is the tokens that stayed and one more.
        """
        for row in active:
            own = self._rows[row]
            if own.drafted:
                stayed = len(rows.tokens[row]) - own.length - 1
                own.history.learn(own.drafted, min(stayed, own.drafted))
                own.drafted = 0
        return [self._rows[row].history.current for row in active]

    def note(self, row: int, length: int, drafted: int) -> None:
        """Takes note of a round that begins behind so many tokens of a row, and of how many it drafted."""
        self._rows[row].length, self._rows[row].drafted = length, drafted

    def summary(self) -> str:
        """What the running acceptance has changed, for the statistics; empty where it changed nothing."""
        moved = [own.history for own in self._rows if own.history.changes]
        if not moved:
            return ""
        accepted, last = [], []
        for c, candidate in enumerate(self.candidates):
            tested = sum(history.tested[c] for history in moved)
            if tested:
                share = sum(history.accepted[c] for history in moved) / tested
                accepted.append(f"{candidate.method} {share:.0%}")
            ended = sum(history.current == c for history in moved)
            if ended:
                last.append(f"{candidate.method} in {ended}")
        return (
            f"the running acceptance changed the method in {len(moved)} of {self.rows} rows "
            f"(accepted of late: {', '.join(accepted)}; at the end: {', '.join(last)})"
        )
