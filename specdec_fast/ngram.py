"""The n-gram index of prompt lookup: what followed the last time the text ended like this?

Saxena, "Prompt Lookup Decoding", 2023.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

from specdec_fast import native

__all__ = ["NgramIndex", "PythonNgramIndex"]


class NgramIndex:
    """N-grams of one row's token ids, grown as ids are committed.

    `extend` costs O(max_ngram) an id, `lookup` O(max_ngram + count). Compiled where the binary is
    there, `PythonNgramIndex` elsewhere; both give the same results.

    Args:
        max_ngram: the longest suffix looked for, at least 1.

    Example:
        >>> index = NgramIndex(max_ngram=3)
        >>> index.extend([5, 6, 7, 8, 5, 6])
        >>> index.lookup(3)
        [7, 8, 5]
    """

    def __init__(self, max_ngram: int) -> None:
        text = native.load_text()
        self._index = (text.NgramIndex if text else PythonNgramIndex)(operator.index(max_ngram))

    def extend(self, ids: Iterable[int]) -> None:
        """Append token ids; ValueError, and nothing appended, for one outside [0, 2^31)."""
        self._index.extend([operator.index(id) for id in ids])

    def lookup(self, count: int) -> list[int]:
        """Up to `count` ids that followed an earlier occurrence of the sequence's suffix.

        The suffix is the longest of at most `max_ngram` ids that occurred before; of its
        occurrences the most recent one counts. Empty when not even the last id occurred before.
        """
        return self._index.lookup(operator.index(count))

    def __len__(self) -> int:
        return len(self._index)


class PythonNgramIndex:
    """The reference: a trie of reversed n-grams.

    A node at depth n stands for an n-gram, reached from the root by its ids from the last to the
    first; it keeps the index of the id that followed the n-gram most recently. An n-gram enters
    when the id after it does, so the suffix itself is never found.
    """

    def __init__(self, max_ngram: int) -> None:
        if max_ngram < 1:
            raise ValueError("max_ngram must be at least 1")
        self._max_ngram = max_ngram
        self._ids: list[int] = []
        self._child: dict[tuple[int, int], int] = {}  # (node, id) -> node
        self._follow = [0]  # by node; the root's entry is never read

    def extend(self, ids: list[int]) -> None:
        """Append token ids."""
        for id in ids:
            if not 0 <= id < 2**31:
                raise ValueError(f"ids must be in [0, 2^31), not {id}")
        for id in ids:
            node = 0
            for earlier in reversed(self._ids[-self._max_ngram :]):
                node = self._child.setdefault((node, earlier), len(self._follow))
                if node == len(self._follow):
                    self._follow.append(0)
                self._follow[node] = len(self._ids)
            self._ids.append(id)

    def lookup(self, count: int) -> list[int]:
        """See `NgramIndex.lookup`."""
        if count < 0:
            raise ValueError("count must not be negative")
        node = 0
        for earlier in reversed(self._ids[-self._max_ngram :]):
            child = self._child.get((node, earlier))
            if child is None:
                break
            node = child
        if node == 0:
            return []
        return self._ids[self._follow[node] : self._follow[node] + count]

    def __len__(self) -> int:
        return len(self._ids)
