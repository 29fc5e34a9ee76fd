"""How logits become a law on the device: as parameters of the fused operations, or by Transformers' own warpers.

Temperature, top-k, top-p and min-p, each once and in Transformers' order, are parameters ``[B]`` of
:func:`specdec_fast.ops.sample` and :func:`~specdec_fast.ops.verify`. Other processors that look at nothing but the
scores are called on all positions before the operations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from specdec_fast import sampling

__all__ = ["DeviceLaw"]


@dataclass(frozen=True)
class DeviceLaw:
    """The law of one side.

    Args:
        values: the fused parameters; temperature 0 is the argmax.
        processors: called before, where the parameters cannot say it.
    """

    values: dict[str, float]
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)

    @classmethod
    def of(cls, processors: LogitsProcessorList | None, *, do_sample: bool) -> DeviceLaw:
        """The law of a list of pointwise processors, at ``do_sample=False`` the argmax of what they leave."""
        processors = LogitsProcessorList() if processors is None else processors
        values: dict[str, float] = {} if do_sample else {"temperature": 0.0}
        usual = sampling.parameters(processors) if do_sample else None
        if usual is not None:
            return cls(usual)
        return cls(values, processors)

    @property
    def key(self) -> tuple[Any, ...]:
        """What a captured round depends on, values of fused parameters not among it."""
        # A processor's numbers are baked into a graph, so the object itself is named
        return (tuple(sorted(self.values)), self.greedy, tuple(id(p) for p in self.processors))

    @property
    def greedy(self) -> bool:
        """Whether it is the argmax."""
        return self.values.get("temperature") == 0.0

    def scores(self, logits: Tensor) -> Tensor:
        """Logits ``[.., V]`` after the processors."""
        if not self.processors:
            return logits.float() if logits.dtype is torch.float64 else logits  # as the loop on the host
        flat = logits.float().reshape(-1, logits.shape[-1])
        none = torch.zeros((flat.shape[0], 1), dtype=torch.long, device=logits.device)
        return sampling.apply(self.processors, none, flat).view(logits.shape)
