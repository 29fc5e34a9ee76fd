"""What a drafter hands over: draft tokens in target ids, and the law they were drawn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specdec_fast import reference

__all__ = ["CompactLaw", "Law", "PointMass", "Proposal"]


class Law(Protocol):
    """The law q of every draft token, given the tokens before it. ``R`` rows, ``G`` draft positions."""

    def log_q(self, tokens: Tensor) -> Tensor:
        """``log q`` of the tokens drafted, ``[R, G]`` float64."""

    def subtract_from(self, p: Tensor, position: Tensor) -> Tensor:
        """``p - q`` at one position a row; ``p`` is ``[R, V]`` float64, ``position`` ``[R]`` int64 in ``[0, G)``."""

    def at(self, position: int) -> Law:
        """The law of one position, ``G = 1`` (none left: ``G = 0``)."""


@dataclass(frozen=True)
class PointMass:
    """Every token was certain before it was compared (text re-tokenised, prompt lookup, a drafter at T=0).

    Args:
        tokens: ``[R, G]`` int64.
    """

    tokens: Tensor

    def log_q(self, tokens: Tensor) -> Tensor:
        return torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)

    def subtract_from(self, p: Tensor, position: Tensor) -> Tensor:
        token = self.tokens.gather(1, position.unsqueeze(1))
        inside = (token >= 0) & (token < p.shape[1])
        return p.scatter_add(1, torch.where(inside, token, 0), -inside.double())

    def at(self, position: int) -> Law:
        return PointMass(self.tokens[:, position : position + 1])


@dataclass(frozen=True)
class CompactLaw:
    """Softmax over a compact vocabulary, each entry of which stands for one target token.

    Args:
        scores: ``[R, G, K]`` float, after temperature and filters.
        index: ``[K]`` int64 ascending target ids, or None where entry ``k`` is target id ``k``.
        drawn: ``[R, G]`` int64, the entry drawn at each position.
    """

    scores: Tensor
    index: Tensor | None
    drawn: Tensor

    def log_q(self, tokens: Tensor) -> Tensor:
        return reference.log_prob(self.scores, self.drawn)

    def subtract_from(self, p: Tensor, position: Tensor) -> Tensor:
        rows = torch.arange(p.shape[0], device=p.device)
        q = reference.masses(self.scores[rows, position])
        if self.index is None:
            # A padded drafter head may be wider than the target's: no target token stands there, so nothing to subtract
            q = q[:, : p.shape[1]]
        return reference.subtract_at(p, q, self.index)

    def at(self, position: int) -> Law:
        one = slice(position, position + 1)
        return CompactLaw(self.scores[:, one], self.index, self.drawn[:, one])


@dataclass(frozen=True)
class Proposal:
    """Draft tokens of one round, left-aligned.

    Args:
        tokens: ``[R, G]`` int64 target ids; what lies behind a row's count is never looked at.
        count: ``[R]`` how many tokens each row drafted, on the host.
        law: the law they were drawn from.
    """

    tokens: Tensor
    count: list[int]
    law: Law

    def at(self, position: int) -> Proposal:
        """One drafted position, as a proposal of at most one token a row."""
        one = slice(position, position + 1)
        return Proposal(self.tokens[:, one], [int(position < c) for c in self.count], self.law.at(position))

    @classmethod
    def of_lists(cls, drafts: list[list[int]], device: torch.device) -> Proposal:
        """A proposal of certain tokens from one list a row."""
        width = max((len(draft) for draft in drafts), default=0)
        tokens = torch.tensor([draft + [0] * (width - len(draft)) for draft in drafts], dtype=torch.long)
        tokens = tokens.reshape(len(drafts), width).to(device)
        return cls(tokens, [len(draft) for draft in drafts], PointMass(tokens))
