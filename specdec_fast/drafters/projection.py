"""Projection: a model drafts on its own vocabulary, and every token counts for the target tokens of its text.

The drafter draws d from its own law q and proposes M(d), the target tokens of its text
(:mod:`specdec_fast.token_map`), one after the other. The first has the law ``psi(t) = sum of q(d) over M_1(d) = t``:
nothing of q is thrown away but the tokens of which the target can say nothing. What is revealed behind a target token
is only whether d has text left, and the next law is conditional on that and on the tokens so far:

    psi(t | t_1 .. t_j, text left) = q{d : M_1..j(d) = t_1..t_j, M_j+1(d) = t} / q{d : M_1..j(d) = t_1..t_j, text left}

Where none is left, d itself is revealed and the drafter goes on from it. ``docs/projection.md`` proves that the output
is the target's under every rule.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from specdec_fast import reference
from specdec_fast.drafters.model import ModelWriter
from specdec_fast.fused import drafted_token, likeliest
from specdec_fast.proposal import Place, ProjectedLaw, Proposal
from specdec_fast.state import Rows
from specdec_fast.token_map import TokenMap
from specdec_fast.verification import Draws

__all__ = ["ProjectionDrafter", "ProjectionWriter"]


@dataclass
class Draft:
    """One row's draft as it grows.

    Args:
        room: how many more target tokens it may take.
        tokens: target ids.
        places: what the law of each was.
        sums: where the mass of each stands among all masses of the round.
    """

    room: int
    tokens: list[int] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)

    def add(self, token: int, place: Place, number: int) -> None:
        self.tokens.append(token)
        self.places.append(place)
        self.sums.append(number)
        self.room -= 1

    def end_behind(self, length: int) -> None:
        """Ends the draft behind so many tokens."""
        del self.tokens[length:], self.places[length:], self.sums[length:]
        self.room = 0


class ProjectionWriter(ModelWriter):
    """A :class:`ModelWriter` that writes until a row has target tokens enough; its choices are a map's entries."""

    def draft(
        self, table: TokenMap, active: list[int], limit: list[int], draws: Draws
    ) -> tuple[list[Draft], Tensor, Tensor]:
        """Draws drafter tokens until each row has ``limit`` target tokens.

        A draft may also end behind a token that is not sure enough to go on from, inside a text as well; what is left
        of the text is then dropped, unseen.

        Returns:
            one draft a row; the scores that drafter tokens were drawn from, ``[N, K]``; the masses of the target
            tokens, float64. Of an argmax drafter no scores, and masses only where its confidence counts.
        """
        drafts = [Draft(self._make_room(row, most)) for row, most in zip(active, limit, strict=True)]
        places = [r for r, draft in enumerate(drafts) if draft.room]
        if not places:
            none = torch.zeros(0, device=self.device)
            return drafts, none, none.double()
        scores, masses = self._draft(
            table, [active[r] for r in places], [drafts[r] for r in places], draws.rows(places)
        )
        return drafts, scores, masses

    def _draft(self, table: TokenMap, active: list[int], drafts: list[Draft], draws: Draws) -> tuple[Tensor, Tensor]:
        assert self._choices is not None
        logits = self._catch_up(active)
        kept, masses = [], []
        number = 0
        for row in active:
            self._drafted[row] = []
        for step in count():
            scores = self._scores(logits)
            drawn, whole = (likeliest(scores), None) if self.warpers is None else drafted_token(scores, draws, step)
            ranges: list[tuple[int, int, int]] = []
            for r, (draft, k) in enumerate(zip(drafts, drawn.tolist(), strict=True)):
                if draft.room:
                    ranges += _tell(draft, table, k, step * len(active) + r, number + len(ranges) // 2, r)
            if self.warpers is not None or self._watched:
                kept.append(scores)
                masses.append(_shares(scores, whole, ranges))
            if self._watched:
                self._end_unsure(active, drafts, number, masses[-1].tolist())
            number += len(ranges) // 2
            going = [int(draft.room > 0) for draft in drafts]
            if not any(going):
                break
            fed = self._choices[drawn.clamp(min=0)]
            for row, token, goes in zip(active, fed.tolist(), going, strict=True):
                if goes:
                    self._drafted[row].append(token)
            logits = self._runner.feed(active, fed.unsqueeze(1), going, going)[:, 0]
        return (torch.cat(kept), torch.cat(masses)) if kept else (logits[:0], logits.new_zeros(0).double())

    @property
    def _watched(self) -> bool:
        """Whether a draft may end behind a token because of its mass."""
        return bool(self._confidence) or self._watcher is not None

    def _end_unsure(self, active: list[int], drafts: list[Draft], first: int, masses: list[float]) -> None:
        """Ends drafts behind the first of their new tokens that is not sure enough to go on from.

        Args:
            first: number of the first new mass.
            masses: of the new tokens.
        """
        for row, draft in zip(active, drafts, strict=True):
            for i, number in enumerate(draft.sums):
                if number >= first and not self._goes_on(row, i + 1, masses[number - first]):
                    draft.end_behind(i + 1)
                    break

    def _goes_on(self, row: int, drafted: int, mass: float) -> bool:
        if self._watcher is None:
            return mass >= self._confidence
        return self._watcher.further(row, drafted, mass)


def _tell(draft: Draft, table: TokenMap, entry: int, lane: int, number: int, row: int) -> list[tuple[int, int, int]]:
    """Adds an entry's target tokens to a draft, as many as it takes.

    Returns:
        ranges of entries, two a token: of those that share it, and of those it was drawn from (empty: all).
    """
    if entry < 0:  # the drafter's scores were no distribution: no token, which no rule accepts
        draft.add(-1, Place(lane, 0, 0, len(table)), number)
        draft.room = 0
        return [(row, 0, 0), (row, 0, 0)]
    ranges = []
    begin, end = 0, 0
    for level, (token, low, inner, high) in enumerate(table.entry(entry)[: draft.room]):
        draft.add(token, Place(lane, level, begin, end if level else len(table)), number + level)
        ranges += [(row, low, high), (row, begin, end)]
        begin, end = inner, high
    return ranges


def _shares(scores: Tensor, whole: Tensor | None, ranges: list[tuple[int, int, int]]) -> Tensor:
    """Masses of ranges of entries: of each first one of a pair, as a share of the second's, empty standing for all.

    Args:
        scores: ``[R, K]`` float32.
        whole: ``[R]`` float64, the logarithm of the sum of each row's ``exp(scores)``; None: not known.
        ranges: row, low, high; an even number of them.

    Returns:
        ``[len(ranges) / 2]`` float64, NaN where a row is no law.
    """
    row, low, high = torch.tensor(ranges, device=scores.device).reshape(-1, 3).unbind(1)
    lengths = high - low
    begin = row * scores.shape[1] + low - (lengths.cumsum(0) - lengths)  # of each range, less the entries before it
    total = sum(end - first for _, first, end in ranges)
    index = begin.repeat_interleave(lengths, output_size=total) + torch.arange(total, device=scores.device)
    if whole is None or not bool(whole.isfinite().all()):
        weights = reference.masses(scores).view(-1)[index]
    else:  # few of a row's entries are asked for
        level = whole[row].repeat_interleave(lengths, output_size=total)
        weights = (scores.reshape(-1)[index].double() - level).exp()
    sums = torch.segment_reduce(weights, "sum", lengths=lengths).view(-1, 2)
    return sums[:, 0] / torch.where(lengths.view(-1, 2)[:, 1] > 0, sums[:, 1], 1.0)


class ProjectionDrafter:
    """Proposes the target tokens of what a model draws on its own vocabulary.

    Args:
        writer: the drafter model; its choices are the map's entries.
        table: what each of them stands for.
        device: of the target.
    """

    def __init__(self, writer: ProjectionWriter, table: TokenMap, device: torch.device):
        self._writer = writer
        self._table = table
        self._on_device = table.to(device)
        self._device = device

    @property
    def translate_seconds(self) -> float:
        return self._writer.translate_seconds

    def propose(self, rows: Rows, active: list[int], limit: list[int], draws: Draws) -> Proposal:
        self._writer.read(rows, active)
        drafts, scores, masses = self._writer.draft(self._table, active, limit, draws)
        proposal = Proposal.of_lists([draft.tokens for draft in drafts], self._device)
        if self._writer.warpers is None or not len(masses):
            return proposal
        width = proposal.tokens.shape[1]
        numbers = [draft.sums + [0] * (width - len(draft.sums)) for draft in drafts]
        log_mass = masses[torch.tensor(numbers, device=masses.device)].log().to(self._device)
        law = ProjectedLaw(scores.to(self._device), self._on_device, [draft.places for draft in drafts], log_mass)
        return Proposal(proposal.tokens, proposal.count, law)
