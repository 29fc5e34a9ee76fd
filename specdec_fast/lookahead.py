"""How many tokens a row drafts in its next round.

A row's lookahead depends on its own history alone, never on a clock or another row, so that seeded results repeat.
"""

from __future__ import annotations

__all__ = ["SCHEDULES", "Lookahead"]

SCHEDULES = ("constant", "heuristic", "heuristic_transient")


class Lookahead:
    """The schedules of Transformers, for each row on its own.

    Args:
        rows: how many rows.
        initial: draft tokens of the first round (``num_assistant_tokens``).
        schedule: ``constant``, or ``heuristic``: two more after a round that accepted everything, one less after any
            other, never below one. ``heuristic_transient`` is the same here, since nothing outlives a call.
    """

    def __init__(self, rows: int, initial: int, schedule: str):
        self._next = [initial] * rows
        self._constant = schedule == "constant"

    def __getitem__(self, row: int) -> int:
        return self._next[row]

    def update(self, row: int, drafted: int, accepted: int) -> None:
        """Learns from a round of a row."""
        if self._constant or drafted == 0:
            return
        self._next[row] = self._next[row] + 2 if accepted == drafted else max(1, self._next[row] - 1)
