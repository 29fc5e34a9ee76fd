"""What the engine asks of a drafter."""

from __future__ import annotations

from typing import Protocol

from specdec_fast.proposal import Proposal
from specdec_fast.state import Rows
from specdec_fast.verification import Draws

__all__ = ["Drafter"]


class Drafter(Protocol):
    """Proposes draft tokens in target ids and says by what law it drew them.

    A drafter reads ``rows.tokens`` and keeps what state it likes; whatever it proposes, the output is the target's.
    """

    @property
    def translate_seconds(self) -> float:
        """Time spent so far on turning text from one tokenizer's ids into the other's."""

    def propose(self, rows: Rows, active: list[int], limit: list[int], draws: Draws) -> Proposal:
        """Drafts for the active rows.

        Args:
            rows: every row's committed text.
            active: the ``R`` rows to draft for.
            limit: how many tokens each of them may draft at most, 0 included.
            draws: this round's numbers, ``R`` rows.

        Returns:
            ``R`` rows on the target's device.
        """
