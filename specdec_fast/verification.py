"""Verification rules: from the target's scores and a proposal, how many draft tokens stay and what comes next.

Both rules are lossless: whatever the drafter proposed, the accepted tokens followed by the token drawn here have the
law of the target alone.

*match*. The target draws its own token ``t_i`` at each drafted position with a number of its own; the longest prefix
with ``t_i = x_i`` stays and the first different ``t_i`` is the next token. The output is the target's own draws, so its
law is the target's for any proposal.

*token* (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). ``x_i`` drawn from q stays with probability
``min(1, p(x_i)/q(x_i))``; at the first rejection the next token is drawn from ``max(0, p - q)`` normalised. Then
``P(token = x) = min(p, q)(x) + (1 - sum min(p, q)) * max(0, p - q)(x) / sum max(0, p - q) = p(x)``, since
``1 - sum min(p, q) = sum max(0, p - q)``. After the last acceptance the bonus token is drawn from p.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from specdec_fast import reference
from specdec_fast.proposal import Law, Proposal
from specdec_fast.randomness import Purpose, UniformSource

__all__ = ["Draws", "Match", "Rule", "Token", "Verdict", "greedy_choice", "rule_for", "sampled_choice"]


@dataclass(frozen=True)
class Draws:
    """The random numbers of one round: a view of the source at each row's seed and committed length.

    Args:
        source: where the numbers come from.
        seed: ``[R]`` int64.
        start: ``[R]`` int64, committed tokens at the start of the round (padding not counted).
        base: drafted position that offset 0 of a call stands for (verification of one position at a time).
    """

    source: UniformSource
    seed: Tensor
    start: Tensor
    base: int = 0

    def draft(self, offset: int) -> Tensor:
        """For drafting position ``offset``: ``[R]``."""
        return self._uniform(torch.full_like(self.start, offset), Purpose.DRAFT)

    def accept(self, positions: int) -> Tensor:
        """For the acceptance tests: ``[R, positions]``."""
        return self._uniform(self._offsets(positions), Purpose.ACCEPT)

    def residual(self, offset: Tensor) -> Tensor:
        """For the token behind the last accepted one, residual or bonus: ``offset`` and result ``[R]``."""
        return self._uniform(offset + self.base, Purpose.RESIDUAL)

    def target(self, positions: int) -> Tensor:
        """For the target's own draws, keyed by absolute position and nothing else: ``[R, positions]``."""
        place = self.start.unsqueeze(1) + self._offsets(positions)
        return self.source.uniform(self.seed.unsqueeze(1), place, torch.zeros_like(place), Purpose.TARGET)

    def at(self, base: int) -> Draws:
        """The same round, offsets counted from drafted position ``base``."""
        return Draws(self.source, self.seed, self.start, base)

    def rows(self, places: list[int]) -> Draws:
        """The numbers of some rows."""
        if len(places) == self.seed.shape[0]:
            return self
        return Draws(self.source, self.seed[places], self.start[places], self.base)

    def _offsets(self, positions: int) -> Tensor:
        return torch.arange(self.base, self.base + positions, device=self.start.device).unsqueeze(0)

    def _uniform(self, offset: Tensor, purpose: Purpose) -> Tensor:
        seed, start = (self.seed, self.start) if offset.ndim == 1 else (self.seed[:, None], self.start[:, None])
        return self.source.uniform(seed, start, offset, purpose)


class Verdict(NamedTuple):
    """What a rule decided: ``accepted [R]`` draft tokens stay, then comes ``token [R]``, both int64.

    ``token`` is -1 where the row has no defined next token: every score given was used up by an accepted draft token
    (verification of one position at a time), or the target's scores hold a NaN or forbid every token.
    """

    accepted: Tensor
    token: Tensor


class Rule(Protocol):
    @property
    def name(self) -> str:
        """As ``verification`` names it."""

    def verify(self, scores: Tensor, proposal: Proposal, draws: Draws) -> Verdict:
        """Verifies the first ``n`` positions of a proposal.

        Args:
            scores: ``[R, n, V]`` the target's processed scores: row i is its law after i draft tokens. With
                ``n = count + 1`` the round ends here for sure; a smaller ``n`` may use up all scores.
            proposal: ``R`` rows, draft counts at most ``n``.
            draws: the numbers of this round.
        """


Choice = Callable[[Tensor, Draws], Tensor]


def greedy_choice(scores: Tensor, draws: Draws) -> Tensor:
    """The target's token at each of ``[R, n, V]`` at T=0: ``[R, n]``."""
    token = scores.argmax(-1)
    peak = scores.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    return torch.where(peak.isnan() | (peak == -torch.inf), -1, token)


def sampled_choice(scores: Tensor, draws: Draws) -> Tensor:
    """The target's own draw at each of ``[R, n, V]``: ``[R, n]``."""
    rows, n, width = scores.shape
    weights = reference.masses(scores).view(rows * n, width)
    return reference.draw(weights, draws.target(n).reshape(-1)).view(rows, n)


@dataclass(frozen=True)
class Match:
    """Sample and compare. Needs no q.

    Args:
        choose: how the target draws its own tokens: :func:`greedy_choice` or :func:`sampled_choice`.
    """

    choose: Choice
    name: str = "match"

    def verify(self, scores: Tensor, proposal: Proposal, draws: Draws) -> Verdict:
        n = scores.shape[1]
        own = self.choose(scores, draws)
        tested = min(n, proposal.tokens.shape[1])
        if not tested:  # plain decoding: nothing to compare with
            return Verdict(torch.zeros_like(own[:, 0]), own[:, 0])
        count = torch.tensor(proposal.count, dtype=torch.long, device=scores.device)
        # -1 on both sides (neither law is defined there) is no agreement
        equal = (proposal.tokens[:, :tested] == own[:, :tested]) & (own[:, :tested] >= 0)
        accepted = _leading(equal & _drafted(count, tested))
        token = own.gather(1, accepted.clamp(max=n - 1).unsqueeze(1)).squeeze(1)
        return Verdict(accepted, torch.where(accepted < n, token, -1))


@dataclass(frozen=True)
class Token:
    """Rejection sampling, token by token."""

    name: str = "token"

    def verify(self, scores: Tensor, proposal: Proposal, draws: Draws) -> Verdict:
        n = scores.shape[1]
        tested = min(n, proposal.tokens.shape[1])
        count = torch.tensor(proposal.count, dtype=torch.long, device=scores.device)
        if tested:
            tokens = proposal.tokens[:, :tested]
            log_p = reference.log_prob(scores[:, :tested], tokens)
            log_q = proposal.law.log_q(proposal.tokens)[:, :tested]
            kept = reference.accept(log_p, log_q, draws.accept(tested))
            accepted = _leading(kept & _drafted(count, tested))
        else:
            accepted = torch.zeros_like(count)
        token = self._next_token(scores, proposal.law, accepted, accepted < count, draws)
        return Verdict(accepted, torch.where(accepted < n, token, -1))

    @staticmethod
    def _next_token(scores: Tensor, law: Law, accepted: Tensor, rejected: Tensor, draws: Draws) -> Tensor:
        """Draws from the residual where a draft token was rejected, from p where none was left: ``[R]``."""
        rows = torch.arange(scores.shape[0], device=scores.device)
        # Where an accepted token used up the scores, the draw below is void; its number is this position's own, so that
        # the next position's stays undrawn
        place = accepted.clamp(max=scores.shape[1] - 1)
        p = reference.masses(scores[rows, place])
        if bool(rejected.any()):
            position = torch.where(rejected, accepted, 0)
            rest = reference.residual(p, law.subtract_from(p, position))
            p = torch.where(rejected.unsqueeze(1), rest, p)
        return reference.draw(p, draws.residual(place))


def rule_for(name: str, *, do_sample: bool) -> Rule:
    """The rule called ``name``.

    At T=0 the target's law is a point mass and every rule keeps exactly the tokens equal to its argmax: that is
    rule *match* with the argmax, which needs neither q nor a random number.
    """
    if not do_sample:
        return Match(greedy_choice)
    rules: dict[str, Rule] = {"match": Match(sampled_choice), "token": Token()}
    return rules[name]


def _drafted(count: Tensor, tested: int) -> Tensor:
    return torch.arange(tested, device=count.device).unsqueeze(0) < count.unsqueeze(1)


def _leading(kept: Tensor) -> Tensor:
    """Length of the run of True at the start of each row."""
    return kept.long().cumprod(1).sum(1)
