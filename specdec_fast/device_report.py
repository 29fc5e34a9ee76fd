"""What a round reports, on its way to the host."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_fast.device_round import Told

__all__ = ["HostReport", "PinnedReport"]


class HostReport:
    """A report that is there at once.

    Args:
        values: of a round.
        tells: what its drafter tells.
    """

    def __init__(self, values: Tensor, tells: tuple[bool, bool]):
        self._values = values
        self._tells = tells

    def read(self) -> list[Told]:
        return [Told.of(row, *self._tells) for row in self._values.tolist()]


class PinnedReport(HostReport):
    """A report on its way to the host: the device goes on, and only the reader waits."""

    def __init__(self, values: Tensor, tells: tuple[bool, bool]):
        super().__init__(torch.empty(values.shape, dtype=values.dtype, pin_memory=True), tells)
        self._values.copy_(values, non_blocking=True)
        self._there = torch.cuda.Event()
        self._there.record()

    def read(self) -> list[Told]:
        self._there.synchronize()
        return super().read()
