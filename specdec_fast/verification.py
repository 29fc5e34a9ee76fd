"""Verification rules: from the target's scores and a proposal, how many draft tokens stay and what comes next.

Every rule is lossless: whatever the drafter proposed, the accepted tokens followed by the token drawn here have the
law of the target alone (``docs/verification.md`` has the proofs).

*match*. The target draws its own token ``t_i`` at each drafted position with a number of its own; the longest prefix
with ``t_i = x_i`` stays and the first different ``t_i`` is the next token. The output is the target's own draws, so its
law is the target's for any proposal.

*gumbel* is rule *match* with another way for the target to draw: the token that wins a race (:func:`reference.race`)
whose numbers hang on position and token alone. A drafter that races with the same numbers often has the same winner
(Daliri, Musco and Suresh, "Coupling without communication and drafter-invariant speculative decoding",
arXiv 2408.07978), and which tokens come out hangs on no drafter at all.

*token* (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). ``x_i`` drawn from q stays with probability
``min(1, p(x_i)/q(x_i))``; at the first rejection the next token is drawn from ``max(0, p - q)`` normalised. Then
``P(token = x) = min(p, q)(x) + (1 - sum min(p, q)) * max(0, p - q)(x) / sum max(0, p - q) = p(x)``, since
``1 - sum min(p, q) = sum max(0, p - q)``. After the last acceptance the bonus token is drawn from p.

*block* (Sun et al., arXiv 2403.10444) judges the whole draft at once and never keeps fewer tokens than *token* on
average: :mod:`specdec_fast.block`. Where a law is asked token by token, :mod:`specdec_fast.thinning` draws from the
residual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec_fast import reference, thinning
from specdec_fast.block import Block
from specdec_fast.lean_ops import Judging
from specdec_fast.proposal import DenseLaw, JoinedLaw, LazyLaw, Proposal
from specdec_fast.rule import Draws, Rule, Verdict, drafted
from specdec_fast.staging import staged
from specdec_fast.trees import Climbing

__all__ = [
    "Apart",
    "Block",
    "Draws",
    "Match",
    "Rule",
    "Token",
    "Verdict",
    "greedy_choice",
    "gumbel_choice",
    "rule_for",
    "sampled_choice",
]


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


def gumbel_choice(scores: Tensor, draws: Draws) -> Tensor:
    """The target's own draw at each of ``[R, n, V]`` by a race: ``[R, n]``."""
    return reference.race(reference.masses(scores), draws.race(*scores.shape[1:]).to(scores.device))


@dataclass(frozen=True)
class Match:
    """Sample and compare. Needs no q.

    Args:
        choose: how the target draws its own tokens: :func:`greedy_choice`, :func:`sampled_choice` or
            :func:`gumbel_choice`.
    """

    choose: Choice
    name: str = "match"

    def verify(self, scores: Tensor, proposal: Proposal, draws: Draws) -> Verdict:
        n = scores.shape[1]
        own = self.choose(scores, draws)
        tested = min(n, proposal.tokens.shape[1])
        if not tested:  # plain decoding: nothing to compare with
            return Verdict(torch.zeros_like(own[:, 0]), own[:, 0])
        count = staged(proposal.count, scores.device)
        # -1 on both sides (neither law is defined there) is no agreement
        equal = (proposal.tokens[:, :tested] == own[:, :tested]) & (own[:, :tested] >= 0)
        accepted = _leading(equal & drafted(count, tested))
        token = own.gather(1, accepted.clamp(max=n - 1).unsqueeze(1)).squeeze(1)
        return Verdict(accepted, torch.where(accepted < n, token, -1))


@dataclass(frozen=True)
class Token:
    """Rejection sampling, token by token."""

    name: str = "token"

    def verify(self, scores: Tensor, proposal: Proposal, draws: Draws) -> Verdict:
        n = scores.shape[1]
        tested = min(n, proposal.tokens.shape[1])
        count = staged(proposal.count, scores.device)
        if not tested:  # plain decoding: the next token comes from p
            none = torch.zeros_like(count)
            return Verdict(none, self._next_token(scores, proposal.law, none, none.bool(), draws))
        tokens, law = proposal.tokens[:, :tested], proposal.law
        log_q = law.log_q(proposal.tokens)[:, :tested]
        kept = reference.accept(reference.log_prob(scores[:, :tested], tokens), log_q, draws.accept(tested))
        accepted = _leading(kept & drafted(count, tested))
        rejected = accepted < count
        token = self._next_token(scores, law, accepted, rejected, draws)
        verdict = Verdict(accepted, torch.where(accepted < n, token, -1))
        if isinstance(law, LazyLaw):
            weight = torch.ones_like(log_q)
            return thinning.race(law, scores, tokens, log_q, weight, accepted, rejected & (token >= 0), verdict, draws)
        return verdict

    @staticmethod
    def _next_token(
        scores: Tensor, law: DenseLaw | LazyLaw, accepted: Tensor, rejected: Tensor, draws: Draws
    ) -> Tensor:
        """Draws from the residual where a draft token was rejected, from p where none was left: ``[R]``.

        A lazy law's residual is drawn elsewhere; here its rows get a token from p, -1 where p is not defined.
        """
        rows = torch.arange(scores.shape[0], device=scores.device)
        # Where an accepted token used up the scores, the draw below is void; its number is this position's own, so that
        # the next position's stays undrawn
        place = accepted.clamp(max=scores.shape[1] - 1)
        p = reference.masses(scores[rows, place])
        if not isinstance(law, LazyLaw) and bool(rejected.any()):
            position = torch.where(rejected, accepted, 0)
            rest = reference.residual(p, law.subtract_from(p, position))
            p = torch.where(rejected.unsqueeze(1), rest, p)
        return reference.draw(p, draws.residual(place))


@dataclass(frozen=True)
class Apart:
    """A rule that gives rows with laws of different kinds a call each.

    A law that is asked token by token draws the residual with numbers of its own, and a row's numbers must not hang on
    its neighbours; of the other kinds each has its own form in the operations.

    Args:
        rule: judges the rows.
    """

    rule: Rule

    @property
    def name(self) -> str:
        return self.rule.name

    def judging(self, proposal: Proposal, draws: Draws) -> Judging | None:
        """:meth:`specdec_fast.fused.Fused.judging` of a rule that has it."""
        asked = getattr(self.rule, "judging", None)
        return None if asked is None else asked(proposal, draws)

    @property
    def climbing(self) -> Climbing | None:
        """:meth:`specdec_fast.fused.Fused.climbing` of a rule that has it."""
        return getattr(self.rule, "climbing", None)

    def verify(self, scores: Tensor, proposal: Proposal, draws: Draws) -> Verdict:
        law = proposal.law
        if not isinstance(law, JoinedLaw):
            return self.rule.verify(scores, proposal, draws)
        accepted = torch.zeros(scores.shape[0], dtype=torch.long, device=scores.device)
        token = torch.zeros_like(accepted)
        for places, part in law.parts:
            accepted[places], token[places] = self.rule.verify(scores[places], part, draws.rows(places))
        return Verdict(accepted, token)


def rule_for(name: str, *, do_sample: bool) -> Rule:
    """The rule called ``name``.

    At T=0 the target's law is a point mass and every rule keeps exactly the tokens equal to its argmax: that is
    rule *match* with the argmax, which needs neither q nor a random number.
    """
    if not do_sample:
        return Match(greedy_choice)
    rules: dict[str, Rule] = {
        "match": Match(sampled_choice),
        "gumbel": Match(gumbel_choice, "gumbel"),
        "token": Token(),
        "block": Block(),
    }
    return rules[name]


def _leading(kept: Tensor) -> Tensor:
    """Length of the run of True at the start of each row."""
    return kept.long().cumprod(1).sum(1)
