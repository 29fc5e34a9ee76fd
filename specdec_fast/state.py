"""What the engine knows of every row."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Rows"]


class Rows:
    """Committed tokens of ``B`` rows, column by column as ``sequences`` will show them.

    Args:
        prompt: ``[B, P]`` int64.
        visible: ``[B, P]`` bool, False where a prompt column is padding; None: no padding.
        seed: ``[B]`` int64, one a row.
        capacity: columns the result can have at most.
        pad: id of padding.
    """

    def __init__(self, prompt: Tensor, visible: Tensor | None, seed: Tensor, capacity: int, pad: int):
        batch, columns = prompt.shape
        self.prompt_columns = columns
        self.pad = pad
        self.ids = torch.full((batch, max(capacity, columns)), pad, dtype=torch.long, device=prompt.device)
        self.ids[:, :columns] = prompt
        self.seed = seed.to(prompt.device)
        self.length = [columns] * batch
        """Committed columns of each row."""
        self.done = [False] * batch
        texts = prompt.tolist()
        shown = [[True] * columns] * batch if visible is None else visible.tolist()
        self.tokens: list[list[int]] = [
            [token for token, seen in zip(text, row, strict=True) if seen]
            for text, row in zip(texts, shown, strict=True)
        ]
        """Each row's text without padding, on the host: what a drafter reads."""

    @property
    def batch(self) -> int:
        return len(self.length)

    @property
    def active(self) -> list[int]:
        """Rows that still want tokens."""
        return [row for row, done in enumerate(self.done) if not done]

    def commit(self, row: int, tokens: list[int]) -> None:
        """Appends tokens to a row."""
        first = self.length[row]
        self.ids[row, first : first + len(tokens)] = torch.tensor(tokens, dtype=torch.long, device=self.ids.device)
        self.length[row] += len(tokens)
        self.tokens[row].extend(tokens)
