"""No drafter: every round scores one position, which is plain decoding."""

from __future__ import annotations

import torch

from specdec_fast.proposal import Proposal
from specdec_fast.state import Rows
from specdec_fast.verification import Draws

__all__ = ["NoDrafter"]


class NoDrafter:
    """Proposes nothing."""

    translate_seconds = 0.0

    def __init__(self, device: torch.device):
        self._device = device

    def propose(self, rows: Rows, active: list[int], limit: list[int], draws: Draws) -> Proposal:
        return Proposal.of_lists([[] for _ in active], self._device)
