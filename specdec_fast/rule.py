"""What a verification rule is given to draw with, what it says, and what the engine asks of it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from specdec_fast.proposal import Proposal
from specdec_fast.randomness import Purpose, UniformSource
from specdec_fast.staging import staged

__all__ = ["Draws", "Rule", "Verdict", "drafted", "undefined"]


class Draws:
    """The random numbers of one round: a view of the source at each row's seed and committed length.

    Args:
        source: where the numbers come from.
        seed: ``[R]`` int64.
        start: ``[R]`` int64, committed tokens at the start of the round (padding not counted).
        base: drafted position that offset 0 of a call stands for (verification of one position at a time).
        keys: seeds and starts as lists, where they are at hand; either may then be given as None, and becomes a
            tensor where one is asked for.
        device: of such tensors.
    """

    def __init__(
        self,
        source: UniformSource,
        seed: Tensor | None,
        start: Tensor | None,
        base: int = 0,
        *,
        keys: tuple[list[int], list[int]] | None = None,
        device: torch.device | None = None,
    ):
        assert keys is not None or (seed is not None and start is not None)
        self.source = source
        self.base = base
        self._seed, self._start, self._keys, self._device = seed, start, keys, device

    @property
    def seed(self) -> Tensor:
        """``[R]`` int64."""
        if self._seed is None:
            assert self._keys is not None
            self._seed = staged(self._keys[0], self._device)
        return self._seed

    @property
    def start(self) -> Tensor:
        """``[R]`` int64."""
        if self._start is None:
            assert self._keys is not None
            self._start = staged(self._keys[1], self._device)
        return self._start

    @property
    def keys(self) -> tuple[list[int], list[int]]:
        """Seeds and starts on the host."""
        if self._keys is None:
            self._keys = self.seed.tolist(), self.start.tolist()
        return self._keys

    def draft(self, offset: int) -> Tensor:
        """For drafting position ``offset``: ``[R]``."""
        return self._uniform(torch.full_like(self.start, offset), Purpose.DRAFT)

    def accept(self, positions: int) -> Tensor:
        """For the acceptance tests: ``[R, positions]``."""
        return self._uniform(self._offsets(positions), Purpose.ACCEPT)

    def residual(self, offset: Tensor) -> Tensor:
        """For the token behind the last accepted one, residual or bonus: ``offset`` and result ``[R]``."""
        return self._uniform(offset + self.base, Purpose.RESIDUAL)

    def target(self, positions: int) -> Tensor:
        """For the target's own draws, keyed by absolute position and nothing else: ``[R, positions]``."""
        place = self.start.unsqueeze(1) + self._offsets(positions)
        return self.source.uniform(self.seed.unsqueeze(1), place, torch.zeros_like(place), Purpose.TARGET)

    def race(self, positions: int, width: int) -> Tensor:
        """For races of the target's tokens, keyed by absolute position and token: ``[R, positions, width]``."""
        place = (self.start.unsqueeze(1) + self._offsets(positions)).unsqueeze(2)
        token = torch.arange(width, device=place.device)
        return self.source.uniform(self.seed[:, None, None], place, token, Purpose.RACE)

    def race_of(self, offset: int, tokens: Tensor) -> Tensor:
        """The same numbers for drafting position ``offset`` and tokens ``[K]`` of the target's: ``[R, K]``."""
        place = (self.start + offset).unsqueeze(1)
        return self.source.uniform(self.seed.unsqueeze(1), place, tokens.to(place.device), Purpose.RACE)

    def candidate(self, offset: int, trial: int) -> Tensor:
        """For the token that one of repeated draws at ``offset`` puts up: ``[R]``."""
        return self._uniform(torch.full_like(self.start, offset + self.base), Purpose.CANDIDATE, trial)

    def thinning(self, offset: int, trial: int) -> Tensor:
        """For the test of that token: ``[R]``."""
        return self._uniform(torch.full_like(self.start, offset + self.base), Purpose.THINNING, trial)

    def at(self, base: int) -> Draws:
        """The same round, offsets counted from drafted position ``base``."""
        return Draws(self.source, self._seed, self._start, base, keys=self._keys, device=self._device)

    def rows(self, places: list[int]) -> Draws:
        """The numbers of some rows."""
        if self._keys is None:
            if len(places) == self.seed.shape[0]:
                return self
            return Draws(self.source, self.seed[places], self.start[places], self.base)
        seeds, starts = self._keys
        if len(places) == len(seeds):
            return self
        keys = [seeds[r] for r in places], [starts[r] for r in places]
        return Draws(self.source, None, None, self.base, keys=keys, device=self._device)

    def _offsets(self, positions: int) -> Tensor:
        return torch.arange(self.base, self.base + positions, device=self.start.device).unsqueeze(0)

    def _uniform(self, offset: Tensor, purpose: Purpose, trial: int = 0) -> Tensor:
        seed, start = (self.seed, self.start) if offset.ndim == 1 else (self.seed[:, None], self.start[:, None])
        return self.source.uniform(seed, start, offset, purpose, trial)


class Verdict(NamedTuple):
    """What a rule decided: ``accepted [R]`` draft tokens stay, then comes ``token [R]``, both int64.

    ``token`` is -1 where the row has no defined next token: every score given was used up by an accepted draft token
    (verification of one position at a time), or the target's scores hold a NaN or forbid every token.
    """

    accepted: Tensor
    token: Tensor


class Rule(Protocol):
    @property
    def name(self) -> str:
        """As ``verification`` names it."""

    def verify(self, scores: Tensor, proposal: Proposal, draws: Draws) -> Verdict:
        """Verifies the first ``n`` positions of a proposal.

        Args:
            scores: ``[R, n, V]`` the target's processed scores: row i is its law after i draft tokens. With
                ``n = count + 1`` the round ends here for sure; a smaller ``n`` may use up all scores.
            proposal: ``R`` rows, draft counts at most ``n``.
            draws: the numbers of this round.
        """


def drafted(count: Tensor, positions: int) -> Tensor:
    """Which of the first ``positions`` hold a draft token, ``[R, positions]`` bool; ``count`` is ``[R]``."""
    return torch.arange(positions, device=count.device).unsqueeze(0) < count.unsqueeze(1)


def undefined(scores: Tensor) -> Tensor:
    """Where scores ``[..., V]`` are no law: a NaN among them, or every token forbidden. ``[...]`` bool."""
    peak = scores.amax(-1)
    return peak.isnan() | (peak == -torch.inf)
