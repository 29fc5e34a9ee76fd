"""Prompt lookup: what followed the last few tokens when they stood in the text before."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from specdec_fast.ngram import NgramIndex
from specdec_fast.proposal import Proposal
from specdec_fast.state import Rows
from specdec_fast.verification import Draws

__all__ = ["PromptLookup"]


class PromptLookup:
    """Proposes the continuation of the most recent earlier occurrence of the longest matching suffix.

    Args:
        rows: how many rows.
        max_ngram: longest suffix compared (``max_matching_ngram_size``).
        device: of the target.
        only: the rows that it proposes for; None: all.
        sources: what an encoder-decoder target writes about, ids of each row, where it looks too; None: nothing.
    """

    translate_seconds = 0.0

    def __init__(
        self,
        rows: int,
        max_ngram: int,
        device: torch.device,
        *,
        only: Collection[int] | None = None,
        sources: Sequence[list[int]] | None = None,
    ):
        self._index = [NgramIndex(max_ngram) for _ in range(rows)]
        self._read = [0] * rows
        self._device = device
        for index, source in zip(self._index, sources or [], strict=False):
            index.extend(source)
        self._only = range(rows) if only is None else only

    def propose(self, rows: Rows, active: list[int], limit: list[int], draws: Draws) -> Proposal:
        drafts: list[list[int]] = []
        for row, most in zip(active, limit, strict=True):
            if row not in self._only:
                drafts.append([])
                continue
            text = rows.tokens[row]
            self._index[row].extend(text[self._read[row] :])
            self._read[row] = len(text)
            draft = list(self._index[row].lookup(most)) if most else []
            # A continuation that runs into the end of the text is a loop of that length: go round it again
            drafts.append([draft[i % len(draft)] for i in range(most)] if draft else [])
        return Proposal.of_lists(drafts, self._device)
