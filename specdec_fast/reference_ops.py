"""The ops of :mod:`specdec_fast.ops` in plain PyTorch and float64: what every backend must return.

Each function takes the arguments of its op's schema in order; meanings and shapes are in :mod:`specdec_fast.ops`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec_fast import reference
from specdec_fast.randomness import Philox, Purpose

__all__ = ["compressed_rows", "process", "project", "range_sums", "sample", "softmax", "verify"]

_philox = Philox()


@torch.no_grad()
def process(
    logits: Tensor, temperature: Tensor | None, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Tensor:
    """Scores whose softmax is the law: temperature and filters applied, what they drop at ``-inf``.

    Args:
        logits: ``[N, V]``.
        temperature, top_k, top_p, min_p: ``[N]``, or None.

    Returns:
        ``[N, V]`` float32, a new tensor. Rows at temperature 0 hold 0 at their argmax; undefined rows are all NaN.
    """
    raw = logits.float()
    scores = raw.clone() if temperature is None else raw / torch.where(temperature == 0, 1, temperature).unsqueeze(1)
    if top_k is not None:
        width = scores.shape[1]
        rank = torch.where(top_k > 0, top_k, width).clamp(max=width).long()
        smallest = scores.sort(dim=1, descending=True).values.gather(1, rank.unsqueeze(1) - 1)
        scores.masked_fill_(scores < smallest, -torch.inf)
    if top_p is not None:
        ascending, order = scores.sort(dim=1, stable=True)
        edges = _weights(ascending).cumsum(1)
        dropped = (edges <= (1 - top_p.double()).unsqueeze(1) * edges[:, -1:]) & (top_p < 1).unsqueeze(1)
        dropped[:, -1] = False
        scores.masked_fill_(torch.zeros_like(dropped).scatter_(1, order, dropped), -torch.inf)
    if min_p is not None:
        floor = scores.amax(1).double() + min_p.double().clamp(max=1).log()
        scores.masked_fill_((scores.double() < floor.unsqueeze(1)) & (min_p > 0).unsqueeze(1), -torch.inf)
    if temperature is not None:
        certain = torch.full_like(scores, -torch.inf).scatter_(1, raw.argmax(1, keepdim=True), 0.0)
        scores = torch.where((temperature == 0).unsqueeze(1), certain, scores)
    return scores.masked_fill_(_undefined(raw).unsqueeze(1), torch.nan)


@torch.no_grad()
def sample(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor,
    position: Tensor,
    offset: Tensor | None,
    purpose: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = process(logits, temperature, top_k, top_p, min_p)
    offset = torch.zeros_like(position) if offset is None else offset
    token = reference.draw(reference.masses(scores), _philox.uniform(seed, position, offset, Purpose(purpose)))
    undefined = token < 0
    token = token.clamp(min=0)
    normaliser = scores.double().logsumexp(1)
    if temperature is not None:
        normaliser = torch.where((temperature == 0) & ~undefined, logits.amax(1).double(), normaliser)
    return token, reference.log_prob(scores, token), normaliser, undefined.int()


@torch.no_grad()
def softmax(
    logits: Tensor, temperature: Tensor | None, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Tensor:
    return reference.masses(process(logits, temperature, top_k, top_p, min_p))


@torch.no_grad()
def project(q: Tensor, row_start: Tensor, column: Tensor) -> Tensor:
    length = row_start[1:] - row_start[:-1]
    stands_for = torch.repeat_interleave(torch.arange(length.shape[0], device=q.device), length.long())
    return q.new_zeros((q.shape[0], length.shape[0]), dtype=torch.float64).index_add_(
        1, stands_for, q.double()[:, column.long()]
    )


def compressed_rows(index: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The map of :func:`specdec_fast.ops.project` from one target id a drafter token.

    Args:
        index: ``[K]`` integers; an id outside ``[0, width)`` stands for no target token.
        width: target entries, V.

    Returns:
        ``row_start [V + 1]`` and ``column``, int32; a row's drafter ids ascend.
    """
    inside = (index >= 0) & (index < width)
    column = torch.where(inside, index, width).sort(stable=True).indices[: int(inside.sum())]
    length = torch.bincount(index[inside].long(), minlength=width)
    return torch.cat([length.new_zeros(1), length.cumsum(0)]).int(), column.int()


@torch.no_grad()
def range_sums(q: Tensor, order: Tensor | None, low: Tensor, high: Tensor) -> Tensor:
    masses = q.double() if order is None else q.double()[:, order.long()]
    edges = torch.nn.functional.pad(masses.cumsum(1), (1, 0))
    ends = [edges.gather(1, end.clamp(0, masses.shape[1])) for end in (low, high)]
    return (ends[1] - ends[0]).clamp(min=0)


@torch.no_grad()
def verify(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    tokens: Tensor,
    count: Tensor,
    kind: Tensor | None,
    draft_logits: Tensor | None,
    draft_temperature: Tensor | None,
    draft_top_k: Tensor | None,
    draft_top_p: Tensor | None,
    draft_min_p: Tensor | None,
    index: Tensor | None,
    drawn: Tensor | None,
    draft_logsumexp: Tensor | None,
    sparse_ids: Tensor | None,
    sparse_log_q: Tensor | None,
    seed: Tensor,
    start: Tensor,
    base: int,
    rule: int,
    log_probs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = _process(logits, temperature, top_k, top_p, min_p)
    rows, positions, _ = scores.shape
    tested = min(positions, tokens.shape[1])
    tokens, count = tokens[:, :tested], count.clamp(0, tokens.shape[1])
    round_ = _Round(scores, tokens, count, seed, start, base)
    if rule == 0:
        accepted, token, drafterless = round_.match(round_.own())
    else:
        compact = None if draft_logits is None else (draft_temperature, draft_top_k, draft_top_p, draft_min_p)
        law = _Law(tokens, _kinds(kind, tokens, draft_logits, draft_temperature, sparse_ids), index)
        if compact is not None:
            law.scores = _process(draft_logits[:, :tested], *compact)  # type: ignore[index]
            law.drawn = drawn[:, :tested] if drawn is not None else tokens if index is None else None
        if sparse_ids is not None and sparse_log_q is not None:
            law.ids, law.log_mass = sparse_ids[:, :tested], sparse_log_q[:, :tested]
        accepted, token, drafterless = (round_.token if rule == 1 else round_.block)(law)
        if temperature is not None:
            certain = round_.match(scores.argmax(-1))
            accepted, token, drafterless = (
                torch.where(temperature == 0, *pair)
                for pair in zip(certain, (accepted, token, drafterless), strict=True)
            )
    status = ((token < 0) & (accepted < positions)).int() + 2 * drafterless.int()
    token = torch.where(accepted < positions, token.clamp(min=0), -1)
    return (
        accepted,
        token,
        round_.log_probs(accepted, token) if log_probs else status.new_empty(rows, 0).double(),
        status,
    )


def _process(logits: Tensor, *parameters: Tensor | None) -> Tensor:
    """:func:`process` of ``[B, P, V]``, parameters ``[B]``."""
    rows, positions, width = logits.shape
    each = [None if p is None else p.repeat_interleave(positions) for p in parameters]
    return process(logits.reshape(rows * positions, width), *each).view(rows, positions, width)


def _undefined(scores: Tensor) -> Tensor:
    """Where scores ``[..., V]`` are no law, ``[...]`` bool."""
    peak = scores.amax(-1)
    return peak.isnan() | (peak == -torch.inf)


def _weights(scores: Tensor) -> Tensor:
    """The softmax without its denominator, ``[N, V]`` float64; the largest is 1."""
    peak = scores.amax(1, keepdim=True).double()
    return torch.where(peak == torch.inf, (scores == torch.inf).double(), (scores.double() - peak).exp())


def _kinds(
    kind: Tensor | None,
    tokens: Tensor,
    draft_logits: Tensor | None,
    draft_temperature: Tensor | None,
    sparse_ids: Tensor | None,
) -> Tensor:
    """The kind of every position's law, ``[B, tested]``."""
    if kind is None:
        usual = 1 if draft_logits is not None else 2 if sparse_ids is not None else 0
        kind = torch.full_like(tokens, usual)
    kind = kind[:, : tokens.shape[1]]
    known = (kind == 1) & (draft_logits is not None) | (kind == 2) & (sparse_ids is not None)
    if draft_temperature is not None:
        known &= (draft_temperature != 0).unsqueeze(1) | (kind != 1)
    return torch.where(known, kind, 0)


@dataclass
class _Law:
    """The law of each drafted position; ``scores``, ``drawn``, ``ids`` and ``log_mass`` where its kind needs them."""

    tokens: Tensor
    kind: Tensor
    index: Tensor | None
    scores: Tensor | None = None
    drawn: Tensor | None = None
    ids: Tensor | None = None
    log_mass: Tensor | None = None

    def log_q(self) -> Tensor:
        """``log q`` of the tokens drafted, ``[B, tested]`` float64."""
        result = torch.zeros(self.tokens.shape, dtype=torch.float64, device=self.tokens.device)
        if self.scores is not None:
            result = torch.where(self.kind == 1, self._compact_log_q(self.scores), result)
        if self.ids is not None and self.log_mass is not None:
            same = (self.ids == self.tokens.unsqueeze(-1)) & (self.ids >= 0)
            listed = torch.where(same, self.log_mass, -torch.inf).amax(-1)
            result = torch.where(self.kind == 2, listed, result)
        return result

    def _compact_log_q(self, scores: Tensor) -> Tensor:
        if self.drawn is not None:
            return reference.log_prob(scores, self.drawn)
        assert self.index is not None
        stands_for = self.index == self.tokens.unsqueeze(-1)
        return torch.where(stands_for, reference.masses(scores), 0.0).sum(-1).log()

    def subtract_from(self, p: Tensor, position: Tensor) -> Tensor:
        """``p - q`` at one position a row, ``[B, V]``; ``p`` is overwritten."""
        rows, width = torch.arange(p.shape[0], device=p.device), p.shape[1]
        kind = self.kind[rows, position].unsqueeze(1)
        _subtract(p, self.tokens[rows, position].unsqueeze(1), (kind == 0).double())
        if self.scores is not None:
            q = reference.masses(self.scores[rows, position])
            ids = torch.arange(q.shape[1], device=p.device) if self.index is None else self.index.long()
            inside = (ids >= 0) & (ids < width)
            p.index_add_(1, ids[inside], torch.where(kind == 1, q, 0.0)[:, inside], alpha=-1)
        if self.ids is not None and self.log_mass is not None:
            _subtract(p, self.ids[rows, position], torch.where(kind == 2, self.log_mass[rows, position].exp(), 0.0))
        return p


def _subtract(p: Tensor, ids: Tensor, q: Tensor) -> None:
    inside = (ids >= 0) & (ids < p.shape[1])
    p.scatter_add_(1, torch.where(inside, ids, 0), -torch.where(inside, q, 0.0))


@dataclass(frozen=True)
class _Round:
    """One call of ``verify``: the target's processed scores ``[B, P, V]``, the drafts, and the round's numbers.

    Rules return ``accepted [B]``, the token behind ``[B]`` (-1 where its law is undefined) and whether a residual had
    to do without the drafter's law ``[B]``.
    """

    scores: Tensor
    tokens: Tensor
    count: Tensor
    seed: Tensor
    start: Tensor
    base: int

    def own(self) -> Tensor:
        """The target's own draws, ``[B, P]``."""
        rows, positions, width = self.scores.shape
        place = self.start.unsqueeze(1) + self._offsets(positions)
        u = _philox.uniform(self.seed.unsqueeze(1), place, torch.zeros_like(place), Purpose.TARGET)
        weights = reference.masses(self.scores).view(rows * positions, width)
        return reference.draw(weights, u.reshape(-1)).view(rows, positions)

    def match(self, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = torch.where(_undefined(self.scores), -1, own)
        equal = (self.tokens == own[:, : self.tokens.shape[1]]) & (self.tokens >= 0)
        accepted = self._leading(equal)
        return accepted, _at(own, accepted), torch.zeros_like(accepted, dtype=torch.bool)

    def token(self, law: _Law) -> tuple[Tensor, Tensor, Tensor]:
        log_p = reference.log_prob(self.scores[:, : self.tokens.shape[1]], self.tokens)
        accepted = self._leading(reference.accept(log_p, law.log_q(), self._accept()))
        p = reference.masses(_row(self.scores, accepted))
        return self._next(p, accepted, law, accepted < self._drafted_count())

    def block(self, law: _Law) -> tuple[Tensor, Tensor, Tensor]:
        positions, tested = self.scores.shape[1], self.tokens.shape[1]
        defined = ~_undefined(self.scores) | (self._offsets(positions) - self.base >= self.count.unsqueeze(1))
        end = torch.minimum(defined.long().cumprod(1).sum(1), self.count)
        if not tested:
            return self._next(reference.masses(self.scores[:, 0]), end, law, end < 0)
        log_p = reference.log_prob(self.scores[:, :tested], self.tokens)
        weight, coins = reference.block_weights(log_p, law.log_q()), self._accept()
        accepted = torch.zeros_like(end)
        for i in range(1, tested + 1):
            place = torch.full_like(end, i)
            wins = coins[:, i - 1] < weight[:, i]
            open_ = i < end
            if bool(open_.any()):
                rest = self._rest(reference.masses(_row(self.scores, place)), weight[:, i], law, place)[0].sum(1)
                wins = torch.where(open_, coins[:, i - 1] < reference.block_chance(weight[:, i], rest), wins)
            accepted = torch.where(wins & (i <= end), i, accepted)
        p = reference.masses(_row(self.scores, accepted))
        return self._next(p, accepted, law, accepted < end, _at(weight, accepted))

    def log_probs(self, accepted: Tensor, token: Tensor) -> Tensor:
        """``log p`` of what was kept and of the next token, ``[B, P]``, -1 behind."""
        positions = self.scores.shape[1]
        padded = torch.nn.functional.pad(self.tokens, (0, positions - self.tokens.shape[1]))
        place = self._offsets(positions) - self.base
        last = accepted.unsqueeze(1)
        log_p = reference.log_prob(self.scores, torch.where(place == last, token.unsqueeze(1), padded))
        return torch.where(place <= last, log_p, -1.0)

    def _next(
        self, p: Tensor, accepted: Tensor, law: _Law, rejected: Tensor, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draws from the residual where a draft token was rejected, from ``p`` elsewhere."""
        place = accepted.clamp(max=self.scores.shape[1] - 1)
        drafterless = torch.zeros_like(rejected)
        if bool(rejected.any()):
            rest, drafterless = self._rest(p, weight, law, torch.where(rejected, place, 0))
            p = torch.where((rejected & (rest.sum(1) > 0)).unsqueeze(1), rest, p)
            drafterless &= rejected & ~_undefined(_row(self.scores, place))
        u = _philox.uniform(self.seed, self.start, place + self.base, Purpose.RESIDUAL)
        return accepted, reference.draw(p, u), drafterless

    @staticmethod
    def _rest(p: Tensor, weight: Tensor | None, law: _Law, place: Tensor) -> tuple[Tensor, Tensor]:
        """``max(0, w p - q)``, ``[B, V]``, and where q is undefined, so that ``w p`` stands, ``[B]``."""
        weighted = p.clone() if weight is None else weight.unsqueeze(1) * p
        position = place.clamp(max=max(law.tokens.shape[1] - 1, 0))
        rest = law.subtract_from(weighted.clone(), position).clamp(min=0)
        usable = rest.sum(1).isfinite()
        return torch.where(usable.unsqueeze(1), rest, weighted), ~usable

    def _accept(self) -> Tensor:
        seed, start = self.seed.unsqueeze(1), self.start.unsqueeze(1)
        return _philox.uniform(seed, start, self._offsets(self.tokens.shape[1]), Purpose.ACCEPT)

    def _offsets(self, positions: int) -> Tensor:
        return torch.arange(self.base, self.base + positions, device=self.start.device).unsqueeze(0)

    def _drafted_count(self) -> Tensor:
        return self.count.clamp(max=self.tokens.shape[1])

    def _leading(self, kept: Tensor) -> Tensor:
        """How many drafted positions are kept before the first that is not, ``[B]``."""
        drafted = self._offsets(self.tokens.shape[1]) - self.base < self.count.unsqueeze(1)
        return (kept & drafted).long().cumprod(1).sum(1)


def _at(values: Tensor, place: Tensor) -> Tensor:
    """``values [B, n]`` at one place a row, the last where there is none: ``[B]``."""
    return values.gather(1, place.clamp(max=values.shape[1] - 1).unsqueeze(1)).squeeze(1)


def _row(scores: Tensor, place: Tensor) -> Tensor:
    """``scores [B, P, V]`` at one place a row, the last where there is none: ``[B, V]``."""
    return scores[torch.arange(scores.shape[0], device=scores.device), place.clamp(max=scores.shape[1] - 1)]
