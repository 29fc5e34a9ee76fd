"""Rules and draws through the fused operations of :mod:`specdec_fast.ops`, where these can do them.

They read the same numbers from the same keys and return the same tokens as the plain code, but for numbers within
float error of an edge. The plain code stays for sources of numbers other than Philox (recorders, enumerators), for laws
the operations do not know, and as the truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec_fast import ops, reference
from specdec_fast.proposal import CompactLaw, PointMass, ProjectedLaw, Proposal, SparseLaw
from specdec_fast.randomness import Philox, Purpose
from specdec_fast.rule import Draws, Rule, Verdict

__all__ = ["Fused", "confidence", "drafted_token"]


@dataclass(frozen=True)
class Fused:
    """A rule, as one operation where there is one.

    Args:
        rule: does the rest.
        greedy: the target decodes at T=0.
    """

    rule: Rule
    greedy: bool = False

    @property
    def name(self) -> str:
        return self.rule.name

    def verify(self, scores: Tensor, proposal: Proposal, draws: Draws) -> Verdict:
        law = proposal.law
        given: dict[str, Any] = {"temperature": 0.0} if self.greedy else {}
        if type(draws.source) is not Philox or type(law) not in (PointMass, CompactLaw, SparseLaw, ProjectedLaw):
            return self.rule.verify(scores, proposal, draws)
        if isinstance(law, CompactLaw):
            index = None if law.index is None else law.index.int()
            given |= {"draft_logits": law.scores, "index": index, "drawn": law.drawn}
        elif isinstance(law, SparseLaw):
            given |= {"sparse_ids": law.ids, "sparse_log_q": law.masses.log()}
        elif isinstance(law, ProjectedLaw):
            given |= _projected(law, proposal.tokens.shape[1])
        count = torch.tensor(proposal.count, dtype=torch.long, device=scores.device)
        found = ops.verify(
            scores,
            proposal.tokens,
            count,
            rule=self.rule.name,
            seed=draws.seed,
            start=draws.start,
            base=draws.base,
            **given,
        )
        undefined = (found.status & ops.Status.TARGET) != 0
        return Verdict(found.accepted, torch.where(undefined, -1, found.token))


def _projected(law: ProjectedLaw, drafted: int) -> dict[str, Any]:
    """Arguments of ``verify`` for ``drafted`` positions of a projection.

    First tokens have the law of all entries, several of which stand for one id. Later tokens of a text have that of the
    few entries that agree with what has been told of it: told by their ids.
    """
    table, rows = law.table, len(law.places)
    lane = torch.zeros((rows, drafted), dtype=torch.long)
    kind = torch.full((rows, drafted), ops.LawKind.COMPACT, dtype=torch.int32)
    listed: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for row, places in enumerate(law.places):
        for i, (number, level, low, high) in enumerate(places):
            lane[row, i] = number
            if level:
                kind[row, i] = ops.LawKind.SPARSE
                ids, which = table.column(low, high, level).unique_consecutive(return_inverse=True)
                masses = reference.masses(law.scores[number, low:high])
                listed[row, i] = ids, masses.new_zeros(len(ids)).index_add_(0, which, masses).log()
    place = law.scores.device
    given: dict[str, Any] = {
        "kind": kind.to(place),
        "draft_logits": law.scores[lane.to(place)],
        "index": table.tokens[table.start[:-1]].int(),
    }
    if listed:
        width = max(len(ids) for ids, _ in listed.values())
        all_ids = torch.full((rows, drafted, width), -1, device=place)
        log_q = torch.zeros((rows, drafted, width), dtype=torch.float64, device=place)
        for (row, i), (ids, masses) in listed.items():
            all_ids[row, i, : len(ids)], log_q[row, i, : len(ids)] = ids, masses
        given |= {"sparse_ids": all_ids, "sparse_log_q": log_q}
    return given


def drafted_token(scores: Tensor, draws: Draws, step: int) -> Tensor:
    """The drafter's draw from ``scores [R, K]`` at a step: ``[R]`` int64, -1 where they are no law."""
    if type(draws.source) is not Philox or scores.dtype == torch.float64:
        return reference.draw(reference.masses(scores), draws.draft(step).to(scores.device))
    place = scores.device
    found = ops.sample(
        scores,
        seed=draws.seed.to(place),
        position=draws.start.to(place),
        offset=torch.full_like(draws.start, step, device=place),
        purpose=Purpose.DRAFT,
    )
    return torch.where(found.status != 0, -1, found.token)


def confidence(scores: Tensor, token: Tensor) -> list[float]:
    """The drafter's probability of ``token [R]`` under ``scores [R, K]``, 0 where they are no law: one a row.

    It decides whether to draft on and nothing else; summed in a fixed order, so that it does not hang on the batch.
    """
    if scores.dtype == torch.float64:
        return reference.log_prob(scores, token).exp().nan_to_num(0.0).tolist()
    zero = torch.zeros(scores.shape[0], dtype=torch.long, device=scores.device)
    whole = ops.sample(scores, seed=zero, position=zero, purpose=Purpose.DRAFT).logsumexp
    own = scores.gather(1, token.clamp(min=0).unsqueeze(1)).squeeze(1)
    return (own - whole).exp().nan_to_num(0.0).tolist()
