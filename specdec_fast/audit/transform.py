"""Sampled tokens turned into numbers that are uniform and independent if, and only if, the tokens have their law.

Rosenblatt (1952), randomised for discrete laws: with the tokens of a law in a fixed order, F(t) the mass up to token t,
and v uniform on (0, 1), the number ``u = F(t) - v p(t)`` is uniform; taken with the law behind the sample's own tokens,
the numbers of a sample are independent. The order is by mass, the most probable token first, so that a sampler that
favours or neglects probable tokens moves ``u`` one way. This reaches every position of a sample, whatever the
vocabulary, and samples of all prompts can be counted together.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from specdec_fast.audit.law import SHAPES, Scorer

__all__ = ["BINS", "Grid", "add_samples", "empty_grids"]

BINS = 4
CHUNK = 64  # prefixes of one forward pass
LOOKED_AT = 64  # samples of a prompt behind which the law is computed in every shape


class Grid:
    """Counts of ``(u_j, u_{j+1})`` in ``BINS²`` equal squares, and the masses that other shapes would give them."""

    def __init__(self) -> None:
        self.counts = np.zeros((BINS, BINS))
        self.moved = {shape: np.zeros((BINS, BINS)) for shape in SHAPES}
        self._looked_at = 0

    def add(self, first: np.ndarray, second: np.ndarray) -> None:
        """Counts pairs of numbers ``[N]``."""
        places = [np.minimum((numbers * BINS).astype(int), BINS - 1) for numbers in (first, second)]
        np.add.at(self.counts, tuple(places), 1)

    def look(self, shares: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Adds the masses ``[n, BINS]`` of the two positions' bins in every shape, for some of the samples."""
        for shape, (first, second) in shares.items():
            self.moved[shape] += np.einsum("na,nb->ab", first, second)
        self._looked_at += len(next(iter(shares.values()))[0])

    @property
    def spread(self) -> float:
        """Total variation between the law used and that of another shape, over the squares."""
        return max(float(np.abs(self._masses(shape) - 1 / BINS**2).sum() / 2) for shape in SHAPES)

    @property
    def noncentrality(self) -> float:
        """What the law of another shape adds to the statistic for each sample, at most."""
        return max(float(((self._masses(shape) - 1 / BINS**2) ** 2).sum() * BINS**2) for shape in SHAPES)

    def _masses(self, shape: str) -> np.ndarray:
        return self.moved[shape] / self._looked_at if self._looked_at else np.full((BINS, BINS), 1 / BINS**2)


def empty_grids(tokens: int) -> list[Grid]:
    """One for each two neighbouring positions."""
    return [Grid() for _ in range(tokens - 1)]


def add_samples(
    grids: list[Grid], scorer: Scorer, samples: list[list[int]], random: np.random.Generator, *, exact: bool
) -> None:
    """Counts the samples of one prompt.

    Args:
        samples: their new tokens; behind an end token nothing matters.
        random: of v, and of which prefixes are looked at in every shape.
        exact: the model's type is exact enough that the shapes need no look.
    """
    tokens = len(grids) + 1
    # Behind its end a sample has no choice, as under a law of one outcome: u is v
    numbers = random.random((len(samples), tokens))
    shares = {shape: np.full((len(samples), tokens, BINS), 1 / BINS) for shape in SHAPES}
    looked_at = set() if exact else set(random.permutation(len(samples))[:LOOKED_AT].tolist())
    for position in range(tokens):
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, sample in enumerate(samples):
            if not scorer.ends.intersection(sample[:position]):
                groups[tuple(sample[:position])].append(index)
        prefixes = list(groups)
        for first in range(0, len(prefixes), CHUNK):
            chunk = prefixes[first : first + CHUNK]
            laws = scorer.law(chunk, SHAPES[1])
            cumulated = _Cumulated(laws)
            for row, prefix in enumerate(chunk):
                members = groups[prefix]
                new = torch.tensor([samples[index][position] for index in members])
                numbers[members, position] = cumulated.numbers(row, new, torch.from_numpy(numbers[members, position]))
            rows = [row for row, prefix in enumerate(chunk) if looked_at.intersection(groups[prefix])]
            if not rows:
                continue
            for shape in SHAPES:
                law = scorer.law([chunk[row] for row in rows], shape)
                for row, masses in zip(rows, law, strict=True):
                    members = sorted(looked_at.intersection(groups[chunk[row]]))
                    shares[shape][members, position] = cumulated.shares(row, masses)
    scorer.forget()
    some = sorted(looked_at)
    for position, grid in enumerate(grids):
        grid.add(numbers[:, position], numbers[:, position + 1])
        if some:
            grid.look({shape: (part[some, position], part[some, position + 1]) for shape, part in shares.items()})


class _Cumulated:
    """Laws ``[n, V]`` with their tokens in the order of their mass."""

    def __init__(self, laws: Tensor):
        width = max(1, int((laws > 0).sum(1).max()))
        self._masses, self._tokens = laws.topk(width)
        self._upto = self._masses.cumsum(1)
        self._width = laws.shape[1]

    def numbers(self, row: int, tokens: Tensor, v: Tensor) -> np.ndarray:
        """``u`` of tokens ``[m]`` drawn from one of the laws; 1 of a token without mass."""
        place = torch.full((self._width,), -1, dtype=torch.long)
        place[self._tokens[row]] = torch.arange(self._tokens.shape[1])
        index = place[tokens]
        u = self._upto[row][index] - v * self._masses[row][index]
        return torch.where(index < 0, 1.0, u / self._upto[row, -1]).clamp(0, 1).numpy()

    def shares(self, row: int, law: Tensor) -> np.ndarray:
        """What another law gives to the bins of this one: ``[BINS]``."""
        upto = self._upto[row] / self._upto[row, -1]
        start = torch.cat([upto.new_zeros(1), upto[:-1]])
        length = (upto - start).clamp(min=1e-300)
        masses = law[self._tokens[row]]
        found = []
        for k in range(BINS):
            inside = (upto.clamp(max=(k + 1) / BINS) - start.clamp(min=k / BINS)).clamp(min=0) / length
            found.append(float((masses * inside).sum()))
        found[-1] += max(0.0, 1.0 - sum(found))  # tokens that only the other law has
        return np.array(found)
