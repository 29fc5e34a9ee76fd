"""What a drafter hands over: draft tokens in target ids, and the law they were drawn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from specdec_fast import reference
from specdec_fast.lean_ops import Told
from specdec_fast.memory import Memory
from specdec_fast.staging import moved
from specdec_fast.token_map import TokenMap
from specdec_fast.trees import Tree

__all__ = [
    "CompactLaw",
    "DenseLaw",
    "JoinedLaw",
    "Law",
    "LazyLaw",
    "Place",
    "PointMass",
    "ProjectedLaw",
    "Proposal",
    "SparseLaw",
    "padded",
]


class Law(Protocol):
    """The law q of every draft token, given the tokens before it and what else has been revealed by then.

    ``R`` rows, ``G`` draft positions.
    """

    def log_q(self, tokens: Tensor) -> Tensor:
        """``log q`` of the tokens drafted, ``[R, G]`` float64."""

    def at(self, position: int) -> Law:
        """The law of one position, ``G = 1`` (none left: ``G = 0``)."""


class DenseLaw(Law, Protocol):
    """A law that is known for the whole vocabulary."""

    def subtract_from(self, p: Tensor, position: Tensor) -> Tensor:
        """``p - q`` at one position a row; ``p`` is ``[R, V]`` float64, ``position`` ``[R]`` int64 in ``[0, G)``.

        ``p`` need not sum to 1.
        """

    def at(self, position: int) -> DenseLaw: ...


@runtime_checkable
class LazyLaw(Law, Protocol):
    """A law that costs work for each token it is asked about (string-level rejection sampling)."""

    def mass(self, row: int, position: int, token: int) -> float:
        """``q(token)`` at one position of one row, float64 in ``[0, 1]``, for any target id."""

    def at(self, position: int) -> LazyLaw: ...


@dataclass(frozen=True)
class PointMass:
    """Every token was certain before it was compared (text re-tokenised, prompt lookup, a drafter at T=0).

    Args:
        tokens: ``[R, G]`` int64.
    """

    tokens: Tensor

    def log_q(self, tokens: Tensor) -> Tensor:
        return torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)

    def subtract_from(self, p: Tensor, position: Tensor) -> Tensor:
        token = self.tokens.gather(1, position.unsqueeze(1))
        inside = (token >= 0) & (token < p.shape[1])
        return p.scatter_add(1, torch.where(inside, token, 0), -inside.double())

    def at(self, position: int) -> PointMass:
        return PointMass(self.tokens[:, position : position + 1])


@dataclass(frozen=True)
class CompactLaw:
    """Softmax over a compact vocabulary, each entry of which stands for one target token.

    Args:
        scores: ``[R, G, K]`` float, after temperature and filters.
        index: ``[K]`` int64 ascending target ids, or None where entry ``k`` is target id ``k``.
        drawn: ``[R, G]`` int64, the entry drawn at each position.
        narrow: ``index`` in int32, as the operations take it; None: made where needed.
        logsumexp: ``[R, G]`` float64 of the scores, where it is known.
    """

    scores: Tensor
    index: Tensor | None
    drawn: Tensor
    narrow: Tensor | None = None
    logsumexp: Tensor | None = None

    def log_q(self, tokens: Tensor) -> Tensor:
        return reference.log_prob(self.scores, self.drawn)

    def subtract_from(self, p: Tensor, position: Tensor) -> Tensor:
        rows = torch.arange(p.shape[0], device=p.device)
        q = reference.masses(self.scores[rows, position])
        if self.index is None:
            # A padded drafter head may be wider than the target's: no target token stands there, so nothing to subtract
            q = q[:, : p.shape[1]]
        return reference.subtract_at(p, q, self.index)

    def at(self, position: int) -> CompactLaw:
        one = slice(position, position + 1)
        sums = None if self.logsumexp is None else self.logsumexp[:, one]
        return CompactLaw(self.scores[:, one], self.index, self.drawn[:, one], self.narrow, sums)


class Place(NamedTuple):
    """Where a target token stands in a drafter token's text, and what had been revealed of that one by then.

    Args:
        lane: which drafter token it was, a row of :class:`ProjectedLaw` ``scores``.
        level: how many target tokens of its text came before.
        low, high: the entries that agree with those and have text left; all of them at level 0.
    """

    lane: int
    level: int
    low: int
    high: int


@dataclass(frozen=True)
class ProjectedLaw:
    """Softmax over drafter tokens, told as the target tokens of their text (projection, ``docs/projection.md``).

    The law of a position: the drafter tokens that agree with what has been revealed, renormalised, each at the token
    of its text that stands there.

    Args:
        scores: ``[N, K]`` float, after temperature and filters, of each drafter token drawn.
        table: what the K drafter tokens stand for.
        places: of each row's positions, lists on the host.
        log_mass: ``[R, G]`` float64, of the tokens drafted.
    """

    scores: Tensor
    table: TokenMap
    places: list[list[Place]]
    log_mass: Tensor

    def log_q(self, tokens: Tensor) -> Tensor:
        return self.log_mass

    def subtract_from(self, p: Tensor, position: Tensor) -> Tensor:
        result = p.clone()
        rows, lanes = [], []
        for row, i in enumerate(position.tolist()):
            if i >= len(self.places[row]):  # behind a row's own draft
                continue
            lane, level, low, high = self.places[row][i]
            if level:
                q = reference.masses(self.scores[lane, low:high])
                result[row] = p[row].index_add(0, self.table.column(low, high, level), q, alpha=-1)
            else:
                rows.append(row)
                lanes.append(lane)
        if rows:
            q = self.table.head_masses(reference.masses(self.scores[lanes]))
            result[rows] = reference.subtract_at(p[rows], q, self.table.heads)
        return result

    def at(self, position: int) -> ProjectedLaw:
        one = slice(position, position + 1)
        return ProjectedLaw(self.scores, self.table, [places[one] for places in self.places], self.log_mass[:, one])


@dataclass(frozen=True)
class SparseLaw:
    """A law on a few target tokens, those it names.

    Args:
        ids: ``[R, G, N]`` int64, none twice at one position; -1: no token.
        masses: ``[R, G, N]`` float64 their probabilities.
    """

    ids: Tensor
    masses: Tensor

    def log_q(self, tokens: Tensor) -> Tensor:
        drawn = (self.ids == tokens.unsqueeze(-1)) & (self.ids >= 0)
        return torch.where(drawn, self.masses, 0.0).sum(-1).log()

    def subtract_from(self, p: Tensor, position: Tensor) -> Tensor:
        rows = torch.arange(p.shape[0], device=p.device)
        ids, masses = self.ids[rows, position], self.masses[rows, position]
        inside = (ids >= 0) & (ids < p.shape[1])
        return p.scatter_add(1, torch.where(inside, ids, 0), -torch.where(inside, masses, 0.0))

    def at(self, position: int) -> SparseLaw:
        one = slice(position, position + 1)
        return SparseLaw(self.ids[:, one], self.masses[:, one])

    @classmethod
    def of_lists(cls, laws: list[list[dict[int, float]]], device: torch.device) -> SparseLaw:
        """From one list a row of what each position's tokens weigh."""
        shape = len(laws), max(map(len, laws), default=0), max((len(law) for row in laws for law in row), default=0)
        ids, masses = torch.full(shape, -1, dtype=torch.long), torch.zeros(shape, dtype=torch.float64)
        for r, row in enumerate(laws):
            for g, law in enumerate(row):
                ids[r, g, : len(law)] = torch.tensor(list(law))
                masses[r, g, : len(law)] = torch.tensor(list(law.values()), dtype=torch.float64)
        return cls(ids.to(device), masses.to(device))


class Proposal:
    """Draft tokens of one round, left-aligned.

    Args:
        tokens: ``[R, G]`` int64 target ids; what lies behind a row's count is never looked at.
        count: ``[R]`` how many tokens each row drafted, on the host.
        law: the law they were drawn from; one with a ``mass`` is verified lazily.
    """

    told: Told | None = None
    """The same for operations that judge it, where the drafter had it on the host."""

    tree: Tree | None = None
    """Drafts that branch; the tokens are then each row's way from first child to first child."""

    def __init__(self, tokens: Tensor, count: list[int], law: DenseLaw | LazyLaw):
        self.count = count
        self._tokens: Tensor | None = tokens
        self._law: DenseLaw | LazyLaw | None = law
        self._device = tokens.device

    def memories(self) -> list[tuple[list[int], Memory]]:
        """Who is to be told what the target says of these drafts: places of rows, and their memory."""
        if self.told is not None:
            return [] if self.told.memory is None else [(list(range(len(self.count))), self.told.memory)]
        parts = self._law.parts if isinstance(self._law, JoinedLaw) else ()
        return [([places[r] for r in own], memory) for places, part in parts for own, memory in part.memories()]

    @classmethod
    def of_told(cls, told: Told, count: list[int], device: torch.device) -> Proposal:
        """A proposal whose tensors are made where somebody asks for them.

        Args:
            told: rows may have lists of any lengths, as long as their count at least.
            device: of the tensors.
        """
        self = cls.__new__(cls)
        self.told, self.count = told, count
        self._tokens, self._law, self._device = None, None, device
        return self

    @property
    def tokens(self) -> Tensor:
        if self._tokens is None:
            assert self.told is not None
            self._tokens = padded(self.told.tokens, self._device)
        return self._tokens

    @property
    def law(self) -> DenseLaw | LazyLaw:
        if self._law is None:
            assert self.told is not None
            _, drawn, laws, index, _ = self.told
            if laws is None:
                self._law = PointMass(self.tokens)
            else:
                width, place, sums = self.tokens.shape[1], self._device, laws.logsumexp
                entries = self.tokens if drawn is None else padded(drawn, place)
                ids, narrow = (None, None) if index is None else (index.ids, index.narrow)
                sums = None if sums is None else sums[:, :width].to(place)
                self._law = CompactLaw(laws.scores[:, :width].to(place), ids, entries, narrow, sums)
        return self._law

    def on_host(self) -> list[list[int]]:
        """The tokens as lists, ``[R][G]``, a row's own count at least."""
        return self.tokens.tolist() if self.told is None else self.told.tokens

    def at(self, position: int) -> Proposal:
        """One drafted position, as a proposal of at most one token a row."""
        one = slice(position, position + 1)
        return Proposal(self.tokens[:, one], [int(position < c) for c in self.count], self.law.at(position))

    @classmethod
    def of_lists(cls, drafts: list[list[int]], device: torch.device) -> Proposal:
        """A proposal of certain tokens from one list a row."""
        return cls.of_told(Told(drafts), [len(draft) for draft in drafts], device)

    @classmethod
    def of_tree(cls, tree: Tree, device: torch.device) -> Proposal:
        """A proposal of certain tokens that branch."""
        self = cls.of_lists(tree.chains(), device)
        self.tree = tree
        return self

    @classmethod
    def joined(cls, parts: list[tuple[list[int], Proposal]]) -> Proposal:
        """One proposal of several, each for some of the rows.

        Args:
            parts: places of rows, and their proposal; every row in exactly one of them.
        """
        rows = sum(len(places) for places, _ in parts)
        width = max(part.tokens.shape[1] for _, part in parts)
        tokens = parts[0][1].tokens.new_zeros((rows, width))
        count = [0] * rows
        for places, part in parts:
            tokens[places, : part.tokens.shape[1]] = part.tokens
            for place, drafted in zip(places, part.count, strict=True):
                count[place] = drafted
        return cls(tokens, count, JoinedLaw(tuple(parts)))


def padded(lists: list[list[int]], device: torch.device) -> Tensor:
    """Lists of any lengths as ``[R, longest]`` int64, filled up with 0."""
    width = max(map(len, lists), default=0)
    lines = [line + [0] * (width - len(line)) for line in lists]
    return moved(torch.tensor(lines, dtype=torch.long, device="cpu").reshape(len(lists), width), device)


@dataclass(frozen=True)
class JoinedLaw:
    """Rows that were drafted by laws of different kinds.

    Args:
        parts: places of rows, and their proposal.
    """

    parts: tuple[tuple[list[int], Proposal], ...]

    def log_q(self, tokens: Tensor) -> Tensor:
        result = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
        for places, part in self.parts:
            result[places, : part.tokens.shape[1]] = part.law.log_q(part.tokens)
        return result

    def subtract_from(self, p: Tensor, position: Tensor) -> Tensor:
        result = p.clone()
        for places, part in self.parts:
            width = part.tokens.shape[1]
            if width:  # else nothing was drafted there
                law = part.law
                assert not isinstance(law, LazyLaw), "rows whose laws are asked token by token are verified apart"
                result[places] = law.subtract_from(p[places], position[places].clamp(max=width - 1))
        return result

    def at(self, position: int) -> JoinedLaw:
        return JoinedLaw(tuple((places, part.at(position)) for places, part in self.parts))
