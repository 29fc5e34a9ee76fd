"""Finds the exact token at which a row ends, inside a block of accepted tokens too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

__all__ = ["Stops"]

_ROW_BY_ROW = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)


class Stops:
    """The stopping criteria of a call.

    Args:
        criteria: as ``generate`` prepared them.
    """

    def __init__(self, criteria: StoppingCriteriaList):
        self.criteria = criteria
        self.in_order = any(type(c) not in _ROW_BY_ROW for c in criteria)
        """Whether a criterion must be called with the whole batch, once a committed position: anything custom."""
        self.pads = any(hasattr(c, "eos_token_id") for c in criteria)
        """Whether a finished row is filled up with padding, as ``generate`` does where an EOS is known."""
        self.max_length: int | None = criteria.max_length
        self.eos = {int(i) for c in criteria if type(c) is EosTokenCriteria for i in c.eos_token_id.reshape(-1)}
        """Ids that end a row."""
        self._others = StoppingCriteriaList(
            [c for c in criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)]
        )

        self.reads_text = bool(self._others)
        """Whether :meth:`first` looks at ``ids``."""

    def first(self, ids: Tensor | None, length: int, tokens: list[int]) -> int | None:
        """Where a block ends its row.

        Args:
            ids: ``[1, C]`` the row, the block in it already, behind ``length`` columns; None where no text is read.
            tokens: the block.

        Returns:
            Index in the block of the first token that ends the row, None where it goes on.
        """
        for i, token in enumerate(tokens):
            end = length + i + 1
            if token in self.eos or (self.max_length is not None and end >= self.max_length):
                return i
            if ids is not None and self._others and bool(self._others(ids[:, :end], None)[0]):
                return i
        return None

    def ended(self, ids: Tensor, scores: Any) -> list[bool]:
        """The criteria's word on the whole batch ``[B, L]``, as plain decoding asks for it after each token."""
        return torch.as_tensor(self.criteria(ids, scores)).expand(ids.shape[0]).tolist()
