"""The text of a drafter with a tokenizer of its own: kept on the host, handed over before each round.

What the drafter writes is text in its own ids, what is committed are target ids. Only the host can translate those
(merges across the end of what was there before change ids that were already read), so it reads each round's report
before it launches the next one: one small copy a round.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from specdec_fast.device_round import State
from specdec_fast.drafters.model import Context, common
from specdec_fast.staging import upload
from specdec_fast.static_runner import StaticRunner

__all__ = ["DraftedText", "read_texts"]


def read_texts(runner: StaticRunner, rows: Sequence[int], texts: Sequence[Sequence[int]]) -> None:
    """Feeds texts of different lengths to rows, each behind what the row holds."""
    some = [(row, text) for row, text in zip(rows, texts, strict=True) if text]
    if not some:  # as in most rounds
        return
    own = [row for row, _ in some]
    if runner.reader is not None and runner.reader(runner, own, [text for _, text in some]):
        return
    pieces = [torch.tensor(text, dtype=torch.long) for _, text in some]
    tokens = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    runner.feed(own, tokens, [len(text) for _, text in some], [1] * len(some))


class DraftedText:
    """What each row's drafter reads, and how much of it stands in the drafter's cache.

    Args:
        runner: the drafter model.
        contexts: one a row.
    """

    def __init__(self, runner: StaticRunner, contexts: Sequence[Context]):
        self.seconds = 0.0
        self._runner = runner
        self._contexts = contexts
        self._read = [0] * len(contexts)

    def move(self, runner: StaticRunner) -> None:
        """Goes on with another cache, which holds nothing yet."""
        self._runner = runner

    def read(self, texts: list[list[int]], active: list[int], drafted: Sequence[list[int]] | None) -> int:
        """Reads what was committed since the round before.

        Args:
            texts: of all rows, in the target's ids.
            active: rows that go on.
            drafted: what the round before left behind each row's text in the cache (:class:`Told` ``own``); None: it
                drafted nothing, and read nothing either.

        Returns:
            length of the longest text.
        """
        begin = time.perf_counter()
        for row in active:
            context, new = self._contexts[row], texts[row][self._read[row] :]
            before = len(context.ids)
            kept = context.append(new)
            self._read[row] = len(texts[row])
            cached = min(self._runner.length[row] if drafted is None else before, kept)
            if drafted is not None and kept == before:  # accepted drafts stand there already
                cached += common(drafted[row], context.ids[before:])
            self._runner.length[row] = min(cached, max(len(context.ids) - 1, 0))
        self.seconds += time.perf_counter() - begin
        return max(len(context.ids) for context in self._contexts)

    def write(self, state: State) -> None:
        """Hands the drafter the last tokens of each row, and reads for it what is missing before those."""
        behind, missing, tails = [], [], []
        for row, context in enumerate(self._contexts):
            ids, cached = context.ids, self._runner.length[row]
            if len(ids) - cached > State.TAIL:
                behind.append(row)
                missing.append(ids[cached:-1])
            tail = ids[max(len(ids) - State.TAIL, 0) :]
            tails.append(tail + [0] * (State.TAIL - len(tail)))
        read_texts(self._runner, behind, missing)
        upload(tails, state.tail)
        upload([len(context.ids) for context in self._contexts], state.text)
