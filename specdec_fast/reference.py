"""Pure-PyTorch operations on rows of scores: the definition of what every faster backend must return.

Everything is computed in float64, so that the drawn law is the law of the given scores to about 1e-15 and not the
law of a rounded copy of them. Shapes: ``N`` rows, ``V`` entries a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "accept",
    "block_chance",
    "block_weights",
    "draw",
    "log_prob",
    "masses",
    "race",
    "residual",
    "subtract_at",
    "traverse",
]


def masses(scores: Tensor) -> Tensor:
    """Probabilities of each row: softmax in float64.

    Args:
        scores: ``[..., V]`` logits of any float type; ``-inf`` is a forbidden entry, ``+inf`` one that leaves no mass
            for finite entries (several share it equally).

    Returns:
        ``[..., V]`` float64 that sum to 1. A row with a NaN, or with nothing but ``-inf``, is all NaN.
    """
    scores = scores.double()
    peak = scores.amax(-1, keepdim=True)
    weights = torch.where(peak == torch.inf, (scores == torch.inf).double(), (scores - peak).exp())
    return weights / weights.sum(-1, keepdim=True)


def log_prob(scores: Tensor, tokens: Tensor) -> Tensor:
    """log p of one token a row.

    Args:
        scores: ``[..., V]`` logits.
        tokens: ``[...]`` int64. An id outside ``[0, V)`` has probability 0.

    Returns:
        ``[...]`` float64.
    """
    scores = scores.double()
    inside = (tokens >= 0) & (tokens < scores.shape[-1])
    picked = scores.gather(-1, torch.where(inside, tokens, 0).unsqueeze(-1)).squeeze(-1)
    result = picked - scores.logsumexp(-1)
    # inf - inf: the entry has all (or an equal share of) the mass of the row
    peak = scores.amax(-1)
    shared = -(scores == torch.inf).sum(-1).double().log()
    result = torch.where(peak == torch.inf, torch.where(picked == torch.inf, shared, -torch.inf), result)
    return torch.where(inside, result, -torch.inf)


def accept(log_p: Tensor, log_q: Tensor, u: Tensor) -> Tensor:
    """The acceptance test of speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1).

    Accepts with probability ``min(1, p/q)``. The inequality is strict and ``u`` lies strictly inside (0, 1): a token
    with ``p = 0`` is never accepted, one with ``q = 0`` cannot have been drawn and is not accepted either.

    Args:
        log_p, log_q, u: ``[...]`` float64, of one shape.

    Returns:
        ``[...]`` bool.
    """
    return (log_p > u.log() + log_q) & (log_q > -torch.inf)


def block_weights(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The weights of block verification (Sun et al., arXiv 2403.10444): ``p_0 = 1, p_i = min(1, p_{i-1} p/q)``.

    A token with ``p = 0``, one with ``q = 0`` (it cannot have been drawn) and one whose law is not defined (NaN) has
    weight 0, and so has everything behind it.

    Args:
        log_p, log_q: ``[N, G]`` float64, of the tokens drafted.

    Returns:
        ``[N, G + 1]`` float64 in ``[0, 1]``.
    """
    log_ratio = torch.where(log_q > -torch.inf, log_p - log_q, -torch.inf).nan_to_num(nan=-torch.inf)
    weights = [torch.ones_like(log_ratio[:, 0])]
    log_weight = torch.zeros_like(weights[0])
    for step in log_ratio.unbind(1):
        log_weight = (log_weight + step).clamp(max=0)
        weights.append(log_weight.exp())
    return torch.stack(weights, 1)


def block_chance(weight: Tensor, rest: Tensor) -> Tensor:
    """How likely block verification stops at a position once it is asked (the same): ``R / (R + 1 - p_i)``; 0/0 is 1.

    Args:
        weight: ``[N]`` float64, ``p_i``.
        rest: ``[N]`` float64, ``R = sum max(0, p_i p - q)``.
    """
    whole = rest + (1 - weight)
    return torch.where(whole > 0, rest / whole, 1.0)


def subtract_at(p: Tensor, q: Tensor, index: Tensor | None) -> Tensor:
    """``p - q`` where ``q`` lives on a compact vocabulary.

    Args:
        p: ``[N, V]`` float64.
        q: ``[N, K]`` float64.
        index: ``[K]`` int64, the entry of ``p`` each column of ``q`` stands for (no entry twice), or None: the first
            ``K`` entries.

    Returns:
        ``[N, V]`` float64, a new tensor.
    """
    result = p.clone()
    if index is None:
        result[:, : q.shape[1]] -= q
    else:
        result.scatter_add_(1, index.expand(q.shape), -q)  # many times faster on a CPU than index_add_
    return result


def residual(p: Tensor, difference: Tensor) -> Tensor:
    """What is left to draw from after a rejection: ``max(0, p - q)``, not normalised.

    Where that is zero everywhere or not finite (possible only through rounding, since a rejection has probability
    ``sum max(0, p - q)``), the row falls back on ``p``.

    Args:
        p, difference: ``[N, V]`` float64, ``difference`` being ``p - q``.
    """
    rest = difference.clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    usable = (total > 0) & total.isfinite()
    return torch.where(usable, rest, p)


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """One entry a row by the inverse of the cumulative sum, with one uniform number a row.

    Args:
        weights: ``[N, V]`` float64, not negative, not necessarily normalised.
        u: ``[N]`` float64 strictly inside (0, 1).

    Returns:
        ``[N]`` int64; an entry of weight 0 is never drawn. ``-1`` where the row holds a NaN or no mass at all.
    """
    if weights.shape[-1] == 0:
        return weights.new_full(weights.shape[:1], -1, dtype=torch.long)
    edges = weights.cumsum(-1)
    total = edges[:, -1]
    # u * total may round up to total: the largest number below it still finds the last entry with mass
    level = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(edges, level.unsqueeze(-1), right=True).squeeze(-1)
    return torch.where(total > 0, token.clamp(max=weights.shape[-1] - 1), -1)


def race(weights: Tensor, u: Tensor) -> Tensor:
    """One entry a row, with a number for each: the one whose exponential time, at the rate of its weight, ends first.

    The minimum of exponential times with rates ``w`` is that of entry x with probability ``w(x) / sum w`` (the
    Gumbel-max trick in another form: minus the log of such a time is ``log w`` plus Gumbel noise).

    Args:
        weights: ``[..., V]`` float64, not negative, not necessarily normalised.
        u: ``[..., V]`` float64 strictly inside (0, 1).

    Returns:
        ``[...]`` int64; an entry of weight 0 never wins. ``-1`` where the row holds a NaN or no mass at all.
    """
    times = torch.where(weights == 0, torch.inf, -torch.log1p(-u) / weights)
    first = times.min(-1)
    return torch.where(first.values < torch.inf, first.indices, -1)  # NaN is not below


def traverse(
    p: Tensor, q: Tensor, tokens: Sequence[int], parents: Sequence[int], stays: Callable[[int, float], bool]
) -> tuple[list[int], Tensor]:
    """Block verification on a tree whose nodes are draws without replacement (``docs/trees.md``).

    Children are judged in the order in which they were drawn, each with all that is behind it before the next: a child
    x gets the weight ``min(1, f(x) / q(x))``, f being what is left of the target's law (of mass w, the node's own
    weight) and q the drafter's law of what was not drawn before. If it is rejected, ``max(0, f - q)`` is left, divided
    by its sum and ``1 - w``. A node whose children are all rejected stays with what its weight has become. On a chain
    this is block verification (Sun et al., arXiv 2403.10444); the order, from the leaves to the root, is that of
    traversal verification (Weng et al., arXiv 2505.12398).

    Args:
        p: ``[1 + N, V]`` float64, the target's law behind the text and behind each node.
        q: ``[1 + N, V]`` float64, the drafter's. Behind a node without children it is not looked at.
        tokens, parents: ``[N]``; a node stands behind its parent (-1: the text) and behind the siblings drawn before.
        stays: whether the coin of a node (its place) that wins with a chance wins; asked at most once for each.

    Returns:
        the nodes that stay, one behind the other, and ``[V]`` the law of the token behind them.
    """
    passed: list[int] = []

    def visit(node: int, weight: float) -> Tensor | None:
        left, undrawn = weight * p[node + 1], q[node + 1].clone()
        for child in (i for i, parent in enumerate(parents) if parent == node):
            own, token = undrawn / undrawn.sum(), tokens[child]
            chance = min(float(left[token] / own[token]), 1.0) if own[token] > 0 else 0.0
            if (found := visit(child, chance)) is not None:
                passed.insert(0, child)
                return found
            less = (left - own).clamp(min=0)
            whole = float(less.sum()) + (1 - weight)
            # Nothing is left only where a rejection has no chance, and so by rounding
            left, weight = (less / whole, float(less.sum()) / whole) if whole > 0 else (p[node + 1], 1.0)
            undrawn[token] = 0
        return left / left.sum() if node < 0 or stays(node, weight) else None

    law = visit(-1, 1.0)
    assert law is not None
    return passed, law
