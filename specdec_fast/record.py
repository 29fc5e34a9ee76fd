"""What a call keeps of scores and logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Record", "by_step"]


@dataclass
class Record:
    """Scores and logits of every committed token, kept where the caller asked for them: one list of ``[V]`` a row."""

    scores: list[list[Tensor]] | None = None
    logits: list[list[Tensor]] | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is kept."""
        return self.scores is None and self.logits is None

    def add(self, row: int, scores: Tensor, logits: Tensor | None) -> None:
        """Keeps ``[n, V]`` of a row."""
        # Copies: views would keep the scores of rejected tokens alive as well
        if self.scores is not None:
            self.scores[row].extend(scores.clone().unbind(0))
        if self.logits is not None and logits is not None:
            self.logits[row].extend(logits.clone().unbind(0))


def by_step(kept: list[list[Tensor]] | None) -> tuple[Tensor, ...] | None:
    """Scores as ``generate`` returns them: one ``[B, V]`` a step."""
    return None if kept is None else tuple(torch.stack(step) for step in zip(*kept, strict=True))
