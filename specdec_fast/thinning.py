"""The residual of a law that is asked token by token (:class:`~specdec_fast.proposal.LazyLaw`), drawn exactly.

With p the target's law at a position, ψ the proposal's and w in (0, 1] a weight (1 under rule *token*, the block weight
p_i under rule *block*), one *race* ends with token t in proportion to ``max(0, w p(t) - ψ(t))`` and is lost in
proportion to ``1 - w``. Won races are therefore

    P(won) = R / (R + 1 - w),  R = Σ max(0, w p - ψ),        P(t | won) = max(0, w p(t) - ψ(t)) / R.

Thinning does it: lose with probability ``1 - w``, else draw t from p and win with probability
``max(0, 1 - ψ(t) / (w p(t)))``, else try again; a trial decides with probability ``1 - w + R``. Here no trial repeats a
question: S holds the tokens whose ψ has been looked at, and a trial draws from

    1 - w  for a loss,    max(0, w p(t) - ψ(t))  for t in S,    w p(t)  for t outside S,

normalised by their sum Z. A loss or a token of S ends the race. A token outside S is looked at, wins with probability
``max(0, 1 - ψ(t) / (w p(t)))``, and else joins S and the next trial follows.

Proof. Whatever S is, one trial ends with a loss with probability ``(1 - w) / Z`` and with t with probability
``max(0, w p(t) - ψ(t)) / Z``: for t in S at once, for t outside as ``w p(t) / Z`` times the chance to win. So given
that a trial ends the race, the result has the law above, and that law does not depend on S. Every trial has numbers of
its own, and which S it meets is decided by those before. The race ends: S grows with each trial that does not end it,
and when S holds every token with p(t) > 0 the next trial ends it for certain, so no cap is needed. Where Z is 0 (w = 1
and ψ = p: a rejection that only rounding brings about) the token comes from p.

Cost. A race is run with probability ``1 - w + R`` (rule *token*: a rejection, ``Σ max(0, p - ψ)``; rule *block*: see
``docs/verification.md``), and plain thinning takes ``1 / (1 - w + R)`` trials on average: at most one ψ looked at for
each position tested, on average, and fewer here.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from specdec_fast import reference
from specdec_fast.proposal import LazyLaw
from specdec_fast.rule import Draws, Verdict

__all__ = ["race"]


def race(
    law: LazyLaw,
    scores: Tensor,
    tokens: Tensor,
    log_q: Tensor,
    weight: Tensor,
    first: Tensor,
    lost: Tensor,
    verdict: Verdict,
    draws: Draws,
) -> Verdict:
    """Races at positions ``first, first - 1, ...`` of some rows until one is won there.

    Args:
        law: of the proposal.
        scores: ``[R, n, V]`` the target's.
        tokens, log_q: ``[R, G]`` the draft and ``log ψ`` of it, which need no look any more.
        weight: ``[R, >= G]`` float64, w of each position: 1 at the last one that can be reached.
        first: ``[R]`` where a row starts.
        lost: ``[R]`` rows to do.
        verdict: of the other rows.
        draws: the numbers of this round.

    Returns:
        ``verdict`` with the position won and its winner in the rows done.
    """
    accepted, token = verdict.accepted.clone(), verdict.token.clone()
    for row in lost.nonzero().squeeze(1).tolist():
        own = draws.rows([row])
        for position in range(int(first[row]), -1, -1):
            w = float(weight[row, position])
            if w == 0:
                continue
            seen, mass = _known(law, row, position, int(tokens[row, position]), float(log_q[row, position].exp()))
            winner = _race(w, reference.masses(scores[row, position]), mass, seen, own, position)
            if winner is not None:
                accepted[row], token[row] = position, winner
                break
    return Verdict(accepted, token)


Mass = Callable[[int], float]


def _known(law: LazyLaw, row: int, position: int, drafted: int, psi: float) -> tuple[dict[int, float], Mass]:
    """The ψ that needs no look, and the one that does."""
    if not psi > 0:  # not the law of this token: the drafter's scores were none, and there is nothing to subtract
        return {}, lambda token: 0.0
    return {drafted: psi}, lambda token: law.mass(row, position, token)


def _race(weight: float, p: Tensor, mass: Mass, seen: dict[int, float], draws: Draws, position: int) -> int | None:
    """One race: the winner, or None where it is lost (never with ``weight`` 1).

    Args:
        weight: w in (0, 1].
        p: ``[V]`` float64 that sum to 1.
        mass: ψ of one token.
        seen: tokens whose ψ is known beforehand; an id outside ``[0, V)`` does no harm.
        draws: the numbers of one row.
        position: its offset in the round.
    """
    width = p.shape[0]
    bound = p.new_empty(1, width + 1)
    bound[0, :width] = weight * p
    bound[0, width] = 1 - weight
    settled = {width}
    for token, psi in seen.items():
        if 0 <= token < width:
            bound[0, token] = max(0.0, float(bound[0, token]) - psi)
            settled.add(token)
    trial = 0
    while True:
        u = draws.candidate(position, trial)
        token = int(reference.draw(bound, u))
        if token < 0:
            return int(reference.draw(p.unsqueeze(0), u))
        if token in settled:
            return None if token == width else token
        whole = float(bound[0, token])
        rest = max(0.0, whole - mass(token))
        if bool(draws.thinning(position, trial) < rest / whole):
            return token
        bound[0, token] = rest
        settled.add(token)
        trial += 1
