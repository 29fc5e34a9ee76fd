"""Projection on the device: drafter tokens drawn one behind the other and told as the target tokens of their text.

The law is that of ``docs/projection.md``, whose words are used here. A draft step draws an entry of the map; its target
tokens take the next positions of the row's draft, as many as there is room for. A first token has the law of all
entries (``COMPACT``, several entries to an id); a later one that of the few ids that may follow what has been told,
listed with their masses (``SPARSE``). Those lists hang on the map alone: :func:`device_tables` makes them once.

Where the draft steps have a fixed number there are as many of them as the draft has positions, since each gives one
target token at least; what the last ones draw is then never told, and their passes can be skipped.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec_fast import ops
from specdec_fast.device_law import DeviceLaw
from specdec_fast.device_round import Begun, DeviceWriter, Draft, Drawn, State
from specdec_fast.ops import LawKind
from specdec_fast.round_ops import draft_begin
from specdec_fast.static_runner import StaticRunner
from specdec_fast.token_map import TokenMap

__all__ = ["DeviceProjection", "device_tables"]

_made: weakref.WeakKeyDictionary[TokenMap, dict[str, Tensor]] = weakref.WeakKeyDictionary()


def device_tables(table: TokenMap) -> dict[str, Tensor]:
    """A map as :class:`DeviceProjection` takes it, made once.

    With f the place of a token among all tokens of the map (``table.tokens``), and *what may follow* the different
    tokens that entries with the same tokens before it have there:

    Returns:
        ``index [K]`` int32, first tokens; ``choices [K]``, the drafter's ids; ``tokens [F]`` and ``start [K + 1]`` of
        the map; ``low, high [F]``, the entries that share a token and those before it; ``inner, end [F]``, the entries
        among which it was told, all of them for a first token; ``first, number [F]``, where in the lists below what may
        follow begins, and how many those are (0 for a first token); ``next_id, next_low, next_high [C]``, the lists:
        ids, and the entries behind each.
    """
    if table not in _made:
        _made[table] = _tables(table)
    return _made[table]


def _tables(table: TokenMap) -> dict[str, Tensor]:
    tokens, start, groups = (part.cpu().numpy() for part in (table.tokens, table.start, table.groups))
    entry = np.repeat(np.arange(len(table)), np.diff(start))
    place = np.arange(len(tokens))
    level = place - start[entry]
    later = np.flatnonzero(level > 0)
    inner, end = np.zeros_like(place), np.full_like(place, len(table))
    inner[later], end[later] = groups[later - 1, 1], groups[later - 1, 2]
    # A token is listed where the first entry that shares it has it; sorted by level, lists are contiguous
    listed = later[groups[later, 0] == entry[later]]
    listed = listed[np.lexsort((entry[listed], level[listed]))]
    rank = np.zeros_like(place)
    rank[listed] = np.arange(len(listed))
    first, number = np.zeros_like(place), np.zeros_like(place)
    first[later] = rank[start[inner[later]] + level[later]]
    last = groups[start[end[later] - 1] + level[later], 0]
    number[later] = rank[start[last] + level[later]] - first[later] + 1
    arrays = {
        "tokens": tokens,
        "start": start,
        "low": groups[:, 0],
        "high": groups[:, 2],
        "inner": inner,
        "end": end,
        "first": first,
        "number": number,
        "next_id": tokens[listed],
        "next_low": groups[listed, 0],
        "next_high": groups[listed, 2],
    }
    made = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays.items()}
    return {"index": table.tokens[table.start[:-1]].int().cpu(), "choices": table.drafter_ids.cpu(), **made}


class DeviceProjection(DeviceWriter):
    """A model that drafts on its own vocabulary, told as target tokens.

    Args:
        tables: of :func:`device_tables`, and ``picks`` where its head computes logits in the order of its own ids.
        most: the longest list of what may follow.
        runner, law, named: as for :class:`DeviceWriter`.
    """

    def __init__(self, runner: StaticRunner, law: DeviceLaw, *, tables: dict[str, Tensor], most: int, **named: Any):
        own: dict[str, Any] = {name: tables[name] for name in ("index", "choices", "picks") if name in tables}
        super().__init__(runner, law, **own, **named)
        self._tables = tables
        self._most = most

    @property
    def ends_early(self) -> bool:
        return self._most > 0 or super().ends_early

    def draft(self, state: State, gamma: int, begun: Begun, law_wanted: bool) -> Draft:
        """Reads what is new of each row's text, then draws and tells until the drafts are full."""
        tail, text = self._tail(state)
        count, *first = draft_begin(text, begun.room, tail.shape[1], self.runner.positions)
        tables = self._tables
        place = torch.arange(gamma, device=text.device)
        told = torch.zeros_like(count).unsqueeze(1)  # target tokens of the steps so far
        tokens = where = lane = told.expand(-1, gamma)
        steps: list[Drawn] = []
        sure, reach = torch.zeros_like(tokens), torch.ones_like(state.sure[:, :1])

        def goes_on() -> Tensor:
            return (told.squeeze(1) < count).any() | state.whole

        for drawn in self._steps(state, gamma, begun.committed, (tail, *first), text, goes_on):
            known, nothing = drawn.entry.clamp(min=0), (drawn.entry < 0).unsqueeze(1)
            begin = tables["start"][known].unsqueeze(1)
            length = torch.where(nothing, 1, tables["start"][known + 1].unsqueeze(1) - begin)
            here = (place >= told) & (place < told + length)
            its = begin + (place - told).clamp(min=0).minimum(length - 1)
            tokens = torch.where(here, torch.where(nothing, -1, tables["tokens"][its]), tokens)
            where, lane = torch.where(here, its, where), torch.where(here, len(steps), lane)
            steps.append(drawn)
            ends = here & nothing  # no rule accepts what is no token
            if self._confidence or self.watched:
                mass = torch.where(nothing, 0.0, self._shares(drawn.scores, its))
                on = mass >= self._confidence
                if self.watched:
                    scale = state.sure.shape[1]
                    bins = (mass.nan_to_num(0.0) * scale).long().clamp(max=scale - 1)
                    sure = torch.where(here, bins, sure)
                    accepted = torch.where(here, state.sure.gather(1, bins), 1.0).cumprod(1)
                    on = reach * accepted > state.worth[:, :gamma]
                    reach = reach * accepted[:, -1:]
                ends = ends | (here & ~on)
            count = torch.minimum(count, torch.where(ends, place + 1, gamma).amin(1))
            told = told + length
            if self.eager and not bool(goes_on()):
                break
        read = self._read(steps)
        assert read is not None
        own = torch.nn.functional.pad(read, (0, gamma - len(steps)), value=-1)
        draft = Draft(tokens, count, own=own, sure=sure if self.watched else None)
        return draft if not law_wanted or self.law.greedy else self._with_law(draft, steps, where, lane)

    def _shares(self, scores: Tensor, its: Tensor) -> Tensor:
        """The mass of tokens among those that might have been told in their place.

        Args:
            scores: ``[B, K]``.
            its: ``[B, G]``, places of tokens of the map.

        Returns:
            ``[B, G]`` float64.
        """
        q = ops.softmax(scores, **({} if self.law.greedy else self.parameters))  # type: ignore[arg-type]
        bounds = [
            torch.cat([self._tables[a][its], self._tables[b][its]], 1) for a, b in (("low", "inner"), ("high", "end"))
        ]
        masses, whole = ops.range_sums(q, *bounds).chunk(2, 1)
        return masses / whole

    def _with_law(self, draft: Draft, steps: list[Drawn], where: Tensor, lane: Tensor) -> Draft:
        """A draft with the law of each position.

        Args:
            where: ``[B, G]``, the place of each token among those of the map.
            lane: ``[B, G]``, the step it was drawn in.
        """
        tables = self._tables
        rows, gamma = lane.shape
        stacked = torch.stack([drawn.scores for drawn in steps], 1)
        logits = stacked.gather(1, lane.unsqueeze(2).expand(-1, -1, stacked.shape[2]))
        logsumexp = torch.stack([drawn.logsumexp for drawn in steps], 1).gather(1, lane)
        draft = draft._replace(logits=logits, logsumexp=logsumexp)
        if not self._most:  # no entry has a second token
            return draft
        number = tables["number"][where]
        kind = torch.where(number > 0, int(LawKind.SPARSE), int(LawKind.COMPACT)).int()
        listed = torch.arange(self._most, device=where.device)
        follow = (tables["first"][where].unsqueeze(2) + listed).clamp(max=len(tables["next_id"]) - 1)
        each = {name: values.unsqueeze(1).expand(-1, gamma).flatten() for name, values in self.parameters.items()}
        q = ops.softmax(logits.flatten(0, 1), **each)  # type: ignore[arg-type]
        low, high = (
            torch.cat([tables[whole][where].unsqueeze(2), tables[part][follow]], 2).flatten(0, 1)
            for whole, part in (("inner", "next_low"), ("end", "next_high"))
        )
        masses = ops.range_sums(q, low, high).view(rows, gamma, -1)
        there = listed < number.unsqueeze(2)
        ids = torch.where(there, tables["next_id"][follow], -1)
        log_q = torch.where(there, masses[..., 1:].log() - masses[..., :1].log(), -torch.inf)
        return draft._replace(kind=kind, ids=ids, log_q=log_q)
