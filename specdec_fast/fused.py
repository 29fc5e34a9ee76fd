"""Rules and draws through the fused operations of :mod:`specdec_fast.ops`, where these can do them.

They read the same numbers from the same keys and return the same tokens as the plain code, but for numbers within
float error of an edge. The plain code stays for sources of numbers other than Philox (recorders, enumerators), for laws
the operations do not know, and as the truth.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from specdec_fast import ops, reference, sampling
from specdec_fast.dispatch import overload, runs_natively
from specdec_fast.lean_ops import Judging
from specdec_fast.proposal import CompactLaw, PointMass, ProjectedLaw, Proposal, SparseLaw
from specdec_fast.randomness import Philox, Purpose
from specdec_fast.rule import Draws, Rule, Verdict
from specdec_fast.staging import staged
from specdec_fast.trees import Climbing
from specdec_fast.verification import Match

__all__ = ["Fused", "confidence", "drafted_token", "draws_natively", "likeliest", "raced_token"]


@dataclass(frozen=True)
class Fused:
    """A rule, as one operation where there is one.

    Args:
        rule: does the rest.
        greedy: the target decodes at T=0.
        warpers: the target's, where ``scores`` come without them and :func:`specdec_fast.sampling.parameters` can say
            them.
    """

    rule: Rule
    greedy: bool = False
    warpers: LogitsProcessorList | None = None

    @property
    def name(self) -> str:
        return self.rule.name

    def judging(self, proposal: Proposal, draws: Draws) -> Judging | None:
        """The rule for an operation that scores a draft and judges it; None where that cannot."""
        known = self.rule.name in ops.RULES and proposal.told is not None and type(draws.source) is Philox
        if not known or not runs_natively("verify"):
            return None
        return Judging(*self._law(), ops.RULES[self.rule.name])

    @property
    def climbing(self) -> Climbing | None:
        """How the target judges trees, for an operation that does it; None where its rule has none."""
        drawn = self.rule.name == "block" and not self.greedy
        if not (self.greedy or drawn or self.rule.name == "gumbel") or not runs_natively("verify"):
            return None
        return Climbing(*self._law(), drawn)

    def _law(self) -> tuple[float, int, float, float]:
        """Temperature, top-k, top-p and min-p of the target."""
        if self.greedy:
            return 0.0, 0, 1.0, 0.0
        get = ((sampling.parameters(self.warpers) or {}) if self.warpers else {}).get
        return get("temperature", 1.0), int(get("top_k", 0)), get("top_p", 1.0), get("min_p", 0.0)

    def verify(self, scores: Tensor, proposal: Proposal, draws: Draws) -> Verdict:
        if self.rule.name == "gumbel":
            return self._raced(scores, proposal, draws)
        law = proposal.law
        if type(draws.source) is not Philox or type(law) not in (PointMass, CompactLaw, SparseLaw, ProjectedLaw):
            return self.rule.verify(self._processed(scores), proposal, draws)
        if self.greedy:
            own: list[Tensor | None] = [_zeros(scores.shape[0], scores.device)[1], None, None, None]
        else:
            own = self._parameters(scores)
        count = staged(proposal.count, scores.device)
        given: dict[str, Tensor | None] = {}
        if isinstance(law, CompactLaw):
            index = law.index.int() if law.index is not None and law.narrow is None else law.narrow
            given = {"draft_logits": law.scores, "index": index, "drawn": law.drawn, "logsumexp": law.logsumexp}
        elif isinstance(law, SparseLaw):
            given = {"sparse_ids": law.ids, "sparse_log_q": law.masses.log()}
        elif isinstance(law, ProjectedLaw):
            given = _projected(law, proposal.tokens.shape[1])
        # The operator itself: its arguments are right by construction, and a round has little time beside its passes
        accepted, token, _, status = overload("verify", scores, None)(
            scores,
            *own,
            proposal.tokens,
            count,
            given.get("kind"),
            given.get("draft_logits"),
            *(None, None, None, None),
            given.get("index"),
            given.get("drawn"),
            given.get("logsumexp"),
            given.get("sparse_ids"),
            given.get("sparse_log_q"),
            draws.seed,
            draws.start,
            draws.base,
            ops.RULES[self.rule.name],
            False,
        )
        if status.device.type == "cpu" and not any(status.tolist()):
            return Verdict(accepted, token)
        undefined = status.bitwise_and(int(ops.Status.TARGET)).bool()
        return Verdict(accepted, token.masked_fill(undefined, -1))

    def _raced(self, scores: Tensor, proposal: Proposal, draws: Draws) -> Verdict:
        """Rule *gumbel*: the target's own tokens by races."""
        if not draws_natively(draws, scores.device) or scores.dtype == torch.float64:
            return self.rule.verify(self._processed(scores), proposal, draws)
        rows, n, width = scores.shape
        key = [part.repeat_interleave(n) for part in (draws.seed, draws.start)]
        key[1] += torch.arange(draws.base, draws.base + n).repeat(rows)
        law = [None if part is None else part.repeat_interleave(n) for part in self._parameters(scores)]
        own = torch.ops.specdec_fast.race(scores.reshape(rows * n, width), *law, *key, None, 1)[0].view(rows, n)
        return Match(lambda *_: own, "gumbel").verify(scores, proposal, draws)

    def _parameters(self, scores: Tensor) -> list[Tensor | None]:
        """Temperature, top-k, top-p and min-p, ``[R]`` each or None."""
        usual = (sampling.parameters(self.warpers) or {}) if self.warpers else {}
        kinds = {"temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}
        return [
            scores.new_full(scores.shape[:1], usual[name], dtype=kind) if name in usual else None
            for name, kind in kinds.items()
        ]

    def _processed(self, scores: Tensor) -> Tensor:
        if not self.warpers:
            return scores
        empty = torch.zeros((scores.shape[0] * scores.shape[1], 1), dtype=torch.long, device=scores.device)
        return sampling.apply(self.warpers, empty, scores.flatten(0, 1)).view(scores.shape)


def _projected(law: ProjectedLaw, drafted: int) -> dict[str, Tensor | None]:
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
    given: dict[str, Tensor | None] = {
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


def draws_natively(draws: Draws, device: torch.device) -> bool:
    """Whether the native code may draw these numbers itself: Philox's, on the CPU, no other backend being asked for."""
    return type(draws.source) is Philox and device.type == "cpu" and runs_natively("sample")


def drafted_token(scores: Tensor, draws: Draws, step: int) -> tuple[Tensor, Tensor | None]:
    """The drafter's draw from ``scores [R, K]`` at a step: ``[R]`` int64, -1 where they are no law.

    With the logsumexp of the scores, ``[R]`` float64, where it is known.
    """
    if type(draws.source) is not Philox or scores.dtype == torch.float64:
        return reference.draw(reference.masses(scores), draws.draft(step).to(scores.device)), None
    place = scores.device
    offset = torch.full_like(draws.start, step, device=place)
    key = draws.seed.to(place), draws.start.to(place), offset, int(Purpose.DRAFT)
    token, _, logsumexp, status = overload("sample", scores, None)(scores, None, None, None, None, *key)
    return token.masked_fill_(status.bool(), -1), logsumexp


def raced_token(scores: Tensor, draws: Draws, step: int, names: Tensor | None) -> Tensor:
    """The winner of the race that the target will run, by a drafter's ``scores [R, K]``: ``[R]`` int64.

    -1 where they are no law.

    Args:
        names: ``[K]`` int64 target ids of the entries; None: their places.
    """
    if not draws_natively(draws, scores.device) or scores.dtype == torch.float64:
        tokens = torch.arange(scores.shape[1]) if names is None else names
        return reference.race(reference.masses(scores), draws.race_of(step, tokens).to(scores.device))
    ids = None if names is None else names.int()
    key = draws.seed, draws.start + step
    return torch.ops.specdec_fast.race(scores.contiguous(), None, None, None, None, *key, ids, 1)[0][:, 0]


def confidence(scores: Tensor, token: Tensor) -> list[float]:
    """The drafter's probability of ``token [R]`` under ``scores [R, K]``, 0 where they are no law: one a row.

    It decides whether to draft on and nothing else; summed in a fixed order, so that it does not hang on the batch.
    """
    if scores.dtype == torch.float64:
        return reference.log_prob(scores, token).exp().nan_to_num(0.0).tolist()
    zero, _ = _zeros(scores.shape[0], scores.device)
    key = zero, zero, None, int(Purpose.DRAFT)
    whole = overload("sample", scores, None)(scores, None, None, None, None, *key)[2].tolist()
    own = scores.gather(1, token.clamp(min=0).unsqueeze(1)).squeeze(1).tolist()
    masses = [math.exp(one - all_) for one, all_ in zip(own, whole, strict=True)]
    return [0.0 if math.isnan(mass) else mass for mass in masses]


def likeliest(scores: Tensor) -> Tensor:
    """The largest of ``scores [R, K]``, the first among equals: ``[R]`` int64."""
    if scores.dtype != torch.float32 or scores.device.type != "cpu":
        return scores.argmax(-1)
    zero, cold = _zeros(scores.shape[0], scores.device)
    # The operator itself: its arguments are right by construction, and this runs between any two passes of a drafter
    return overload("sample", scores, None)(scores, cold, None, None, None, zero, zero, None, int(Purpose.DRAFT))[0]


@functools.lru_cache(16)
def _zeros(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``[rows]`` int64 and float32; nothing writes into them."""
    return torch.zeros(rows, dtype=torch.long, device=device), torch.zeros(rows, device=device)
