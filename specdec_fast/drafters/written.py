"""What a drafter model wrote, on the host or on its device."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_fast.lean_ops import Laws
from specdec_fast.proposal import padded

__all__ = ["Written"]


class Written:
    """What a drafter wrote.

    Args:
        drawn: ``[R, G]`` int64, entries of the writer's choices; -1 where the drafter's scores were no distribution.
        laws: they were drawn from, None for an argmax drafter; or their scores, ``[R, >= G, K]`` float32.
        count: tokens of each row.
        logsumexp: ``[R, >= G]`` float64 of the scores, where it is known and these are given.
        entries: ``drawn`` as lists, ``[R][G]``, where they are at hand; ``drawn`` may then be None.
        device: of the tensor made of them.
    """

    def __init__(
        self,
        drawn: Tensor | None,
        laws: Laws | Tensor | None,
        count: list[int],
        logsumexp: Tensor | None = None,
        *,
        entries: list[list[int]] | None = None,
        device: torch.device | None = None,
    ):
        assert drawn is not None or entries is not None
        self.laws = Laws(laws, logsumexp) if isinstance(laws, Tensor) else laws
        self.count, self.entries = count, entries
        self._drawn, self._device = drawn, device

    @property
    def scores(self) -> Tensor | None:
        return None if self.laws is None else self.laws.scores

    @property
    def logsumexp(self) -> Tensor | None:
        return None if self.laws is None else self.laws.logsumexp

    @property
    def drawn(self) -> Tensor:
        if self._drawn is None:
            assert self.entries is not None
            self._drawn = padded(self.entries, self._device or torch.device("cpu"))
        return self._drawn

    def spread(self, places: list[int], rows: int) -> Written:
        """The same with rows that wrote nothing put in between."""
        if len(places) == rows:
            return self
        drawn = self.drawn.new_zeros((rows, self.drawn.shape[1]))
        drawn[places] = self.drawn
        scores, logsumexp = self.scores, self.logsumexp
        if scores is not None:
            own, scores = scores, scores.new_zeros((rows, *scores.shape[1:]))
            scores[places] = own
        if logsumexp is not None:
            sums, logsumexp = logsumexp, logsumexp.new_zeros((rows, logsumexp.shape[1]))
            logsumexp[places] = sums
        count = [0] * rows
        for place, number in zip(places, self.count, strict=True):
            count[place] = number
        return Written(drawn, scores, count, logsumexp, entries=None if self.entries is None else drawn.tolist())
