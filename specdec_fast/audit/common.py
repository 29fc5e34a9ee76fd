"""What both audits share: the callable they audit, and what it may be given and return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["EXACT", "Generate", "Progress", "check", "name_of", "new_tokens", "quiet"]

EXACT = (torch.float32, torch.float64)
"""Types in which the laws of different passes agree as far as any test can see."""

Generate = Callable[..., Any]
"""``generate(model, input_ids, **kwargs)`` as ``model.generate`` takes them; returns prompt and continuation."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how far it is, and of how much."""


def quiet(what: str, done: int, whole: int) -> None:
    """The progress of those who do not look."""


def check(prompts: Sequence[Tensor], **numbers: int | None) -> None:
    if not prompts:
        raise ValueError("prompts is empty: an audit needs at least one")
    for prompt in prompts:
        if prompt.ndim != 2 or prompt.shape[0] != 1 or prompt.shape[1] == 0:
            raise ValueError(f"prompts holds ids of shape {list(prompt.shape)}: give [1, P] each, P at least 1")
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is out of range: use 1 or more")


def new_tokens(output: Any, prompt: Tensor) -> Tensor:
    """What ``generate`` put behind the prompt: ``[B, n]`` on the CPU."""
    sequences = getattr(output, "sequences", output)
    if not isinstance(sequences, Tensor) or sequences.ndim != 2:
        raise ValueError(
            f"generate returned {type(output).__name__}: it must return ids [B, L], as model.generate does"
        )
    rows, columns = prompt.shape
    if sequences.shape[0] != rows or not torch.equal(sequences[:, :columns], prompt.to(sequences.device)):
        raise ValueError(
            f"generate returned {list(sequences.shape)} ids that do not begin with the {rows} prompts: it must return "
            "prompt and continuation of every row"
        )
    return sequences[:, columns:].cpu()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
