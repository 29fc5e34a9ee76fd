"""Drafter tokens as the target tokens of their own text: the map M of projection (``docs/projection.md``)."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from specdec_fast.vocab import Vocabulary, shared_markers

__all__ = ["TokenMap", "token_map"]

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class TokenMap:
    """Drafter tokens, sorted by the target tokens that stand for their text.

    Entries whose text begins with the same target tokens stand side by side, those that end with them first. So what
    is known of an entry while its text is told is a range of entries. ``K`` entries, ``F`` target tokens in all, ``C``
    different first ones.

    Attributes:
        drafter_ids: ``[K]`` int64.
        tokens: ``[F]`` int64 target ids, entry after entry.
        start: ``[K + 1]`` int64: entry k stands for ``tokens[start[k] : start[k + 1]]``, one token at least.
        groups: ``[F, 3]`` int64: low, inner and high of each of these tokens. With j - 1 tokens of entry k before it,
            the entries that begin with the same j tokens are ``low .. high``, those with text left ``inner .. high``.
        heads: ``[C]`` int64 ascending, the first tokens.
        bounds: ``[C]`` int64, behind the last entry that begins with each.
    """

    drafter_ids: Tensor
    tokens: Tensor
    start: Tensor
    groups: Tensor
    heads: Tensor
    bounds: Tensor

    def __len__(self) -> int:
        return len(self.drafter_ids)

    @classmethod
    def of(cls, texts: Iterable[tuple[Tokens, int]]) -> TokenMap:
        """From pairs, in any order: target tokens, at least one, and the drafter id that they stand for."""
        entries = sorted(texts)
        lengths = np.array([len(tokens) for tokens, _ in entries], dtype=np.int64)
        flat = np.fromiter(chain.from_iterable(tokens for tokens, _ in entries), dtype=np.int64, count=lengths.sum())
        start = np.concatenate([[0], lengths.cumsum()])
        groups = np.zeros((len(flat), 3), dtype=np.int64)
        heads = bounds = np.zeros(0, dtype=np.int64)
        alike = np.arange(len(entries)) > 0  # whether an entry begins as the one before it does
        for level in range(max(lengths, default=0)):
            here = np.flatnonzero(lengths > level)
            place = start[here] + level
            column = np.full(len(entries), -1)
            column[here] = flat[place]
            alike[1:] &= (column[1:] == column[:-1]) & (column[1:] >= 0)
            begins = ~alike[here]
            low, which = here[begins], begins.cumsum() - 1
            inner = low + np.bincount(which, weights=lengths[here] == level + 1).astype(np.int64)
            high = low + np.bincount(which)
            groups[place] = np.stack([low, inner, high], 1)[which]
            if level == 0:
                heads, bounds = flat[start[low]], high
        ids = np.array([d for _, d in entries], dtype=np.int64)
        return cls(*map(torch.from_numpy, (ids, flat, start, groups, heads, bounds)))

    def to(self, device: torch.device) -> TokenMap:
        """The same on a device."""
        return TokenMap(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def entry(self, k: int) -> list[tuple[int, int, int, int]]:
        """Token, low, inner and high of each token of an entry."""
        first, end = self.start[k : k + 2].tolist()
        groups = self.groups[first:end].tolist()
        return [(token, *group) for token, group in zip(self.tokens[first:end].tolist(), groups, strict=True)]

    def column(self, low: int, high: int, level: int) -> Tensor:
        """What stands behind the first ``level`` tokens of entries ``low .. high``, all longer: ``[high - low]``."""
        return self.tokens[self.start[low:high] + level]

    def head_masses(self, q: Tensor) -> Tensor:
        """The mass of each first token: ``q [N, K]`` float64 to ``[N, C]``."""
        edges = torch.nn.functional.pad(q.cumsum(-1)[:, self.bounds - 1], (1, 0))
        return edges.diff(dim=-1).clamp(min=0)


_Made = dict[tuple[int, int], TokenMap]
_kept: weakref.WeakKeyDictionary[Vocabulary, weakref.WeakKeyDictionary[Vocabulary, _Made]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def token_map(target: Vocabulary, drafter: Vocabulary, *, target_size: int, drafter_size: int) -> TokenMap:
    """The target tokens of each drafter token's text, by bytes. Made once for two vocabularies and kept weakly.

    Where the target has the very bytes, their id stands for them; else what its encoder makes of the text in
    mid-sentence, if that gives the bytes back exactly; else the longest token that the bytes begin with, and so on.
    Bytes that no token begins with end the text; a drafter token of which nothing can be said is left out. Markers
    are those of `shared_markers`.

    Args:
        target, drafter: the vocabularies.
        target_size, drafter_size: width of the models' logits; ids beyond them are not used.
    """
    with _lock:
        made = _kept.setdefault(target, weakref.WeakKeyDictionary()).setdefault(drafter, {})
        sizes = (target_size, drafter_size)
        if sizes not in made:
            made[sizes] = TokenMap.of(_texts(target, drafter, target_size, drafter_size))
        return made[sizes]


def _texts(
    target: Vocabulary, drafter: Vocabulary, target_size: int, drafter_size: int
) -> Iterator[tuple[Tokens, int]]:
    say = _Speaker(target, target_size)
    for d, data in enumerate(drafter.token_bytes[:drafter_size]):
        tokens = say(data) if data else ()
        if tokens:
            yield tokens, d
    for d, t in shared_markers(target, drafter).items():
        if t < target_size and d < drafter_size:
            yield (t,), d


class _Speaker:
    """Says bytes in the ids of a vocabulary below ``size``."""

    def __init__(self, vocabulary: Vocabulary, size: int):
        self._vocabulary = vocabulary
        self._size = size
        self._longest = max((len(data) for data in vocabulary.token_bytes if data), default=0)

    def __call__(self, data: bytes) -> Tokens:
        """The ids of ``data``, or of as much of its beginning as there are ids for."""
        whole = self._id(data)
        if whole is not None:
            return (whole,)
        return self._encoded(data) or self._greedy(data)

    def _id(self, data: bytes) -> int | None:
        found = self._vocabulary.id_of(data)
        return found if found is not None and found < self._size else None

    def _encoded(self, data: bytes) -> Tokens:
        if self._vocabulary.encoder is None:
            return ()
        try:
            ids, _ = self._vocabulary.encode_inside(data.decode())
        except UnicodeDecodeError:
            return ()
        table = self._vocabulary.token_bytes
        pieces = [table[i] if i < self._size else None for i in ids]
        # A special spelled out in the text, or an id without text, is no way to say the bytes
        return tuple(ids) if all(pieces) and b"".join(filter(None, pieces)) == data else ()

    def _greedy(self, data: bytes) -> Tokens:
        ids: list[int] = []
        begin = 0
        while begin < len(data):
            for end in range(min(len(data), begin + self._longest), begin, -1):
                found = self._id(data[begin:end])
                if found is not None:
                    ids.append(found)
                    begin = end
                    break
            else:
                break
        return tuple(ids)
