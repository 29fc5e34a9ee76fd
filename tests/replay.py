"""One round of verification, enumerated: the production rule replayed under every way a draft can fare.

A number a rule asks for falls into one of finitely many cells, cut at acceptance ratios and at cumulative sums.
Each combination of cells is a row here, weighted by its size; its numbers come from a source that looks them up.
A block of accepted tokens and the next one, continued by the target alone to γ+1 tokens, must have the target's law.
"""

import torch
from laws import Problem, inside, total_variation

from specdec_fast import reference
from specdec_fast.proposal import CompactLaw, PointMass, Proposal
from specdec_fast.randomness import Philox, Purpose
from specdec_fast.verification import Draws

INF = float("inf")
NAN = float("nan")
EXACT = 1e-8  # what moving a number into its cell by a billionth of the cell costs, with a margin


class Lookup:
    """Numbers read from a table by row (its seed), offset and trial; a number nobody laid out is NaN."""

    def __init__(self, numbers):
        self.numbers = numbers

    def uniform(self, seed, position, offset, purpose, trial=0):
        seed, place = torch.broadcast_tensors(seed, position + offset)
        return self.numbers[purpose][seed, place, trial]


def draws_of(source, rows):
    return Draws(source, torch.arange(rows), torch.zeros(rows, dtype=torch.long))


class Asked:
    """A compact law that tells the mass of one token at a time, and of none twice."""

    def __init__(self, dense, width):
        self.log_q, self._dense, self._width = dense.log_q, dense, width
        psi = torch.zeros(*dense.scores.shape[:2], max(width, dense.scores.shape[-1]), dtype=torch.float64)
        psi[..., slice(dense.scores.shape[-1]) if dense.index is None else dense.index] = reference.masses(dense.scores)
        self._psi, self.asked = psi.tolist(), set()

    def mass(self, row, position, token):
        assert 0 <= token < self._width and (row, position, token) not in self.asked
        self.asked.add((row, position, token))
        return self._psi[row][position][token]

    def at(self, position):
        return Asked(self._dense.at(position), self._width)


def replay(problem, rule, ways, *, ask=False):
    """Runs a rule on every way every draft can fare, all in one batch; returns blocks and their weights.

    ``ask``: the law is one that is asked token by token.
    """
    plan = [
        (chosen, tokens, count, spans, weight * chance)
        for chosen, tokens, weight, count in problem.drafts()
        for spans, chance in ways(problem, tokens, count)
    ]
    gamma, rows = problem.gamma, 3 * len(plan)
    scores = torch.zeros(rows, gamma + 1, problem.width)
    laws = torch.zeros(rows, gamma, problem.q[0].shape[-1] if gamma else 1)
    drawn = torch.zeros(rows, gamma, dtype=torch.long)
    tokens = torch.zeros(rows, gamma, dtype=torch.long)
    count, weights = [], []
    shape = (rows, gamma + 2, problem.width + 1)
    numbers = {purpose: torch.full(shape, NAN, dtype=torch.float64) for purpose in Purpose}
    unread = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for purpose in (Purpose.ACCEPT, Purpose.TARGET):  # drawn for all positions at once, whether or not they are reached
        numbers[purpose][:] = unread
    for n, (chosen, drafted, stop, spans, weight) in enumerate(plan):
        for where in range(3):
            row = 3 * n + where
            for i in range(gamma + 1):
                scores[row, i] = problem.p[i][problem.clip(drafted[:i])]
                if i < gamma:
                    laws[row, i] = problem.q[i][problem.clip(drafted[:i])]
            if gamma:
                drawn[row] = torch.tensor(chosen)
                tokens[row] = torch.tensor(drafted)
            for purpose, offset, span, *trial in spans:
                numbers[purpose][row, offset, trial[0] if trial else 0] = inside(span, where)
            count.append(stop)
            weights.append(weight / 3)
    law = CompactLaw(laws, problem.index, drawn) if gamma else PointMass(tokens)
    if ask and gamma:
        law = Asked(law, problem.width)
    verdict = rule.verify(scores, Proposal(tokens, count, law), draws_of(Lookup(numbers), rows))
    blocks = {}
    for row, weight in enumerate(weights):
        accepted, token = int(verdict.accepted[row]), int(verdict.token[row])
        assert 0 <= accepted <= count[row] and 0 <= token < problem.width
        block = (*plan[row // 3][1][:accepted], token)
        blocks[block] = blocks.get(block, 0.0) + weight
    return blocks


def distance(problem, rule, ways, **arguments):
    """Total variation of a round, continued by the target, from the target's own law."""
    return total_variation(problem.completed(replay(problem, rule, ways, **arguments)), problem.joint())


def mean_accepted(blocks):
    """Accepted draft tokens, on average."""
    return sum(weight * (len(block) - 1) for block, weight in blocks.items())


def tables(width, columns, gamma, seed, *, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    p = [torch.randn(*[width] * (i + 1), generator=generator) * spread for i in range(gamma + 1)]
    q = [torch.randn(*[width] * i, columns, generator=generator) * spread for i in range(gamma)]
    return p, q


def one_hot(shape, generator):
    scores = torch.full(shape, -INF)
    place = torch.randint(shape[-1], shape[:-1], generator=generator)
    return scores.scatter_(-1, place.unsqueeze(-1), 0.0)


def random_problem(width=4, gamma=2, seed=0):
    return Problem(*tables(width, width, gamma, seed))


def same_law():
    p, _ = tables(4, 4, 2, 1)
    return Problem(p, p[:2])


def disjoint_supports():
    p, q = tables(4, 4, 2, 2)
    for scores in p:
        scores[..., :2] = -INF
    for scores in q:
        scores[..., 2:] = -INF
    return Problem(p, q)


def certain_drafter():
    p, _ = tables(4, 4, 2, 3)
    generator = torch.Generator().manual_seed(3)
    return Problem(p, [one_hot((4,), generator), one_hot((4, 4), generator)])


def certain_target():
    _, q = tables(4, 4, 2, 4)
    generator = torch.Generator().manual_seed(4)
    return Problem([one_hot((4,) * (i + 1), generator) for i in range(3)], q)


def target_with_gaps():
    """p(x) = 0 under q(x) > 0, and the other way round, at every position."""
    p, q = tables(4, 4, 2, 5)
    for scores in p:
        scores[..., 1] = -INF
    for scores in q:
        scores[..., 2] = -INF
    return Problem(p, q)


def one_entry_left():
    """q = p but for mass taken from one token: the residual has a single entry."""
    p, _ = tables(4, 4, 2, 6)
    q = [scores.clone() for scores in p[:2]]
    for scores in q:
        scores[..., 0] = -INF
    return Problem(p, q)


def compact():
    """An index map that skips target tokens (TLI)."""
    return Problem(*tables(6, 3, 2, 7), index=torch.tensor([0, 3, 4]))


def compact_one():
    return Problem(*tables(5, 1, 2, 8), index=torch.tensor([4]))


def narrower_drafter():
    return Problem(*tables(5, 3, 2, 9))


def wider_drafter():
    """A padded drafter head: ids the target does not have are drawn and rejected."""
    return Problem(*tables(3, 5, 2, 10))


def long_draft():
    return Problem(*tables(3, 3, 3, 11))


def confident_stop():
    """A draft ends behind an improbable token, which stays."""
    return Problem(*tables(4, 4, 3, 12), stop=lambda prefix, mass: mass < 0.3)


def stop_by_text():
    """Ragged counts that depend on the tokens drawn, all of which stay."""
    return Problem(*tables(4, 4, 2, 13), stop=lambda prefix, mass: prefix[-1] >= 2)


def no_draft():
    return Problem(*tables(4, 4, 0, 14))


def large_scores():
    return Problem(*tables(4, 4, 2, 15, spread=25.0))


PROBLEMS = (
    random_problem,
    same_law,
    disjoint_supports,
    certain_drafter,
    certain_target,
    target_with_gaps,
    one_entry_left,
    compact,
    compact_one,
    narrower_drafter,
    wider_drafter,
    long_draft,
    confident_stop,
    stop_by_text,
    no_draft,
    large_scores,
)


def random_supports(seed, width, gamma, compacted):
    """Laws with holes anywhere, on part of the vocabulary or all of it."""
    generator = torch.Generator().manual_seed(seed)
    columns = 1 + int(torch.randint(width, (), generator=generator)) if compacted else width
    p, q = tables(width, columns, gamma, seed)
    for scores in (*p, *q):
        holes = torch.rand(scores.shape, generator=generator) < 0.4
        holes.scatter_(-1, torch.randint(scores.shape[-1], (*scores.shape[:-1], 1), generator=generator), False)
        scores[holes] = -INF
    index = torch.randperm(width, generator=generator)[:columns].sort().values if compacted else None
    return Problem(p, q, index)


def philox_draws(rows, start=0):
    return Draws(Philox(), torch.arange(rows), torch.full((rows,), start))


def compact_proposal(scores, index=None, count=None, seed=1):
    rows, gamma, _ = scores.shape
    drawn = torch.stack(
        [reference.draw(reference.masses(scores[:, i]), philox_draws(rows, seed).draft(i)) for i in range(gamma)], 1
    )
    tokens = drawn if index is None else index[drawn]
    return Proposal(tokens, count or [gamma] * rows, CompactLaw(scores, index, drawn))
