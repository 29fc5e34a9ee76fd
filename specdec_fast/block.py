"""Block verification (Sun et al., arXiv 2403.10444, algorithm 2): the draft is judged as a whole.

With x_1 … x_L a row's draft, p(· | x^i) the target's law behind i of its tokens, ψ_i the law that x_i was drawn from
given what had been revealed by then, and ψ_{L+1} = 0:

    p_0 = 1,    p_i = min(1, p_{i-1} p(x_i | x^{i-1}) / ψ_i(x_i))                     the weights,
    R_i = Σ_t max(0, p_i p(t | x^i) - ψ_{i+1}(t)),    h_i = R_i / (R_i + 1 - p_i)      (0/0 counts as 1).

A coin η_i is thrown for each i; τ, the number of accepted tokens, is the largest i with η_i < h_i, and 0 if there is
none. The next token is drawn from ``max(0, p_τ p(· | x^τ) - ψ_{τ+1})`` normalised. At i = L nothing is subtracted:
R_L = h_L = p_L, and the bonus token comes from p.

The output has the target's law, and never fewer draft tokens stay on average than under rule *token*:
``docs/verification.md`` has the proofs. In short: P(τ >= i | x^i) = p_i and P(τ = i | x^i) = R_i, so

    P(x^i drafted and kept, then t) = ψ(x^i) · (ψ_{i+1}(t) p_{i+1} + R_i · max(0, p_i p(t) - ψ_{i+1}(t)) / R_i)
                                    = ψ(x^i) · (min(ψ_{i+1}(t), p_i p(t)) + max(0, p_i p(t) - ψ_{i+1}(t)))
                                    = ψ(x^i) p_i · p(t) = P(x^i drafted and kept) · p(t).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec_fast import reference, thinning
from specdec_fast.proposal import DenseLaw, LazyLaw, Proposal
from specdec_fast.rule import Draws, Verdict, drafted, undefined
from specdec_fast.staging import staged

__all__ = ["Block"]


@dataclass(frozen=True)
class Block:
    """Block verification. It must see a row's whole draft: given one position at a time it is rule *token*."""

    name: str = "block"

    def verify(self, scores: Tensor, proposal: Proposal, draws: Draws) -> Verdict:
        n = scores.shape[1]
        tested = min(n, proposal.tokens.shape[1])
        end = _end(scores, staged(proposal.count, scores.device))
        if not tested:  # plain decoding: the next token comes from p
            return _bonus(scores, end).verdict(n, draws)
        law = proposal.law
        log_p = reference.log_prob(scores[:, :tested], proposal.tokens[:, :tested])
        log_q = law.log_q(proposal.tokens)[:, :tested]
        weight, coins = reference.block_weights(log_p, log_q), draws.accept(tested)
        lost = (end > 0) & ~(_coin(coins, end) < _at(weight, end))
        if isinstance(law, LazyLaw):
            # Races in place of coins: P(won) = h_i, and the winner is the residual's draw. The largest i comes first
            verdict = _bonus(scores, end).verdict(n, draws)
            return thinning.race(law, scores, proposal.tokens, log_q, weight, end - 1, lost, verdict, draws)
        if not bool(lost.any()):
            return _bonus(scores, end).verdict(n, draws)
        return self._descend(scores, law, weight, end, lost, coins).verdict(n, draws)

    @classmethod
    def _descend(cls, scores: Tensor, law: DenseLaw, weight: Tensor, end: Tensor, lost: Tensor, coins: Tensor) -> _Next:
        """The largest position whose coin wins, from each row's last but one downwards, and its residual.

        Rows go down in step, each at its own position; those that have won stay where they are.
        """
        steps = torch.arange(weight.shape[1], device=weight.device)
        # Where the weight is 0 nothing can win: the next place below that has any
        stands = torch.where(weight > 0, steps, 0).cummax(1).values
        place = end
        while True:
            place = torch.where(lost, _at(stands, (place - 1).clamp(min=0)), place)
            p = reference.masses(_row(scores, place))
            rest = cls._rest(p, law, _at(weight, place), place, place < end)
            won = _coin(coins, place) < reference.block_chance(_at(weight, place), rest.sum(-1))
            lost = lost & ~won & (place > 0)
            if not bool(lost.any()):
                return _Next(reference.residual(p, rest), place)

    @staticmethod
    def _rest(p: Tensor, law: DenseLaw, weight: Tensor, place: Tensor, before_end: Tensor) -> Tensor:
        """``max(0, w p - ψ)`` behind ``place`` tokens, ``[R, V]``; ``w p`` at a row's end."""
        weighted = weight.unsqueeze(1) * p
        rest = law.subtract_from(weighted, torch.where(before_end, place, 0)).clamp(min=0)
        # Where the drafter's scores were no law, nothing can be subtracted
        usable = before_end.unsqueeze(1) & rest.sum(-1, keepdim=True).isfinite()
        return torch.where(usable, rest, weighted)


@dataclass(frozen=True)
class _Next:
    """What a row's next token is drawn from, ``[R, V]``, and behind how many accepted ones, ``[R]``."""

    weights: Tensor
    place: Tensor

    def verdict(self, n: int, draws: Draws) -> Verdict:
        token = reference.draw(self.weights, draws.residual(self.place.clamp(max=n - 1)))
        return Verdict(self.place, torch.where(self.place < n, token, -1))


def _bonus(scores: Tensor, end: Tensor) -> _Next:
    """What comes behind whole drafts."""
    return _Next(reference.masses(_row(scores, end)), end)


def _end(scores: Tensor, count: Tensor) -> Tensor:
    """How long each draft is: it ends where the target's scores are no law, for the row has no next token there."""
    n = scores.shape[1]
    sound = ~undefined(scores) | ~drafted(count, n)
    return torch.minimum(sound.long().cumprod(1).sum(1), count)


def _coin(coins: Tensor, place: Tensor) -> Tensor:
    """The coin of a place, ``[R]``: that of the last token it keeps. Place 0 needs none, its chance is 1."""
    return _at(coins, (place - 1).clamp(min=0))


def _at(values: Tensor, place: Tensor) -> Tensor:
    """``values [R, n]`` at one place a row: ``[R]``."""
    return values.gather(1, place.unsqueeze(1)).squeeze(1)


def _row(scores: Tensor, place: Tensor) -> Tensor:
    """``scores [R, n, V]`` at one place a row; the last one where they are used up: ``[R, V]``."""
    rows = torch.arange(scores.shape[0], device=scores.device)
    return scores[rows, place.clamp(max=scores.shape[1] - 1)]
