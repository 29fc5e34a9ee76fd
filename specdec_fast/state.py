"""What the engine knows of every row."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from specdec_fast.staging import staged

__all__ = ["Rows"]

GROWTH = 256  # columns added at least


class Rows:
    """Committed tokens of ``B`` rows, column by column as ``sequences`` will show them.

    Args:
        prompt: ``[B, P]`` int64.
        visible: ``[B, P]`` bool, False where a prompt column is padding; None: no padding.
        seed: ``[B]`` int64, one a row.
        capacity: columns the result can have at most; one more than the prompt's where that is less, because plain
            decoding looks at its limits after the first token.
        pad: id of padding.
        unread: ids of the prompt, but for its last, that stand for what is no text.
    """

    def __init__(
        self,
        prompt: Tensor,
        visible: Tensor | None,
        seed: Tensor,
        capacity: int,
        pad: int,
        unread: Collection[int] = (),
    ):
        batch, columns = prompt.shape
        self.prompt_columns = columns
        self.pad = pad
        self.capacity = max(capacity, columns + 1)
        self.device = prompt.device
        self._ids = prompt.long().clone()
        self._unwritten: list[tuple[int, int, list[int]]] = []  # row, column, tokens
        self.reserve(columns + 1)
        self.seed = seed.to(prompt.device)
        self.seeds: list[int] = seed.tolist()
        self.length = [columns] * batch
        """Committed columns of each row."""
        self.done = [False] * batch
        texts, last = prompt.tolist(), columns - 1  # what a target goes on from, whatever it is
        shown = [[True] * columns] * batch if visible is None else visible.tolist()
        self.tokens: list[list[int]] = [
            [token for column, token in enumerate(text) if row[column] and (token not in unread or column == last)]
            for text, row in zip(texts, shown, strict=True)
        ]
        """Each row's text without padding and pictures, on the host: what a drafter reads."""

    @property
    def ids(self) -> Tensor:
        """``[B, C]``: the columns so far and room for more, filled with padding.

        Writing into a tensor costs more than a round's other bookkeeping, so it is put off until somebody looks.
        """
        for row, first, tokens in self._unwritten:
            self._ids[row, first : first + len(tokens)] = staged(tokens, self.device)
        self._unwritten.clear()
        return self._ids

    @property
    def batch(self) -> int:
        return len(self.length)

    @property
    def active(self) -> list[int]:
        """Rows that still want tokens."""
        return [row for row, done in enumerate(self.done) if not done]

    def reserve(self, columns: int) -> None:
        """Makes room. Not for ``capacity`` at once: callers who stop at an EOS allow millions of tokens."""
        missing = columns - self._ids.shape[1]
        if missing > 0:
            missing = max(missing, self._ids.shape[1], GROWTH)
            self._ids = torch.nn.functional.pad(self._ids, (0, missing), value=self.pad)

    def to(self, device: torch.device) -> None:
        """Moves to a device."""
        self._ids, self.seed, self.device = self.ids.to(device), self.seed.to(device), device

    def commit(self, row: int, tokens: list[int]) -> None:
        """Appends tokens to a row."""
        first = self.length[row]
        self.reserve(first + len(tokens))
        self._unwritten.append((row, first, tokens))
        self.length[row] += len(tokens)
        self.tokens[row].extend(tokens)
