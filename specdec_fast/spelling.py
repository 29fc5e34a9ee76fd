"""Two vocabularies sorted and matched by bytes: what each drafter token means for a walk over target tokens.

Everything about string-level rejection sampling that no model decides; :mod:`specdec_fast.walk` says what it is for.

*Entries*. The drafter's tokens are sorted by their bytes and called by their place. The tokens that begin with some
bytes are then a range of entries, and their mass is the difference of two numbers of one cumulative sum. The text of an
entry is told in target tokens (:mod:`specdec_fast.token_map`): what the target's own tokenizer makes of it, where that
gives it back. Drafter tokens that no target token can tell are no entries (they are never drawn). Specials that the
target has too come last.

*Paths*. ``path(t)`` is how the drafter itself writes the text of t, in entries: the one token of that text where the
drafter has it, else its tokenizer's encoding, if that gives the text back byte for byte. Each text that a path passes
through must be a target token whose path is that part of it; else t has no path. t lies *below* x where path(t) begins
with path(x) and is longer; x is then a *node*.
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap

import numpy as np
from numpy.typing import NDArray

from specdec_fast.token_map import token_map
from specdec_fast.vocab import Vocabulary

__all__ = ["LONGEST_PATH", "Leftover", "Node", "Runs", "Spelling", "spelling"]

LONGEST_PATH = 8  # entries; a target token that needs more has no path

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Path = tuple[int, ...]


@dataclass(frozen=True)
class Runs:
    """Disjoint ranges of entries, ascending.

    Args:
        start, end: ``[N]``; range i holds the entries ``start[i] .. end[i] - 1``.
    """

    start: Ints
    end: Ints

    def holds(self, entries: Ints) -> NDArray[np.bool_]:
        """Which of the entries ``[M]`` they contain."""
        if not len(self.start):
            return np.zeros(len(entries), dtype=bool)
        place = np.searchsorted(self.start, entries, side="right") - 1
        return (place >= 0) & (entries < self.end[place])

    def entries(self) -> Ints:
        """All they contain."""
        return np.concatenate([np.arange(0), *starmap(np.arange, zip(self.start, self.end, strict=True))])


class Node:
    """What a draw at one node leads to.

    Args:
        below: ``[C]`` target tokens.
        leads_to: ``[K]`` index into ``below`` for each entry, -1 where it extends nothing.
        steps: entries that complete the path of a token below, to that token.

    Attributes:
        stop: the entries that extend nothing.
    """

    def __init__(self, below: Sequence[int], leads_to: Ints, steps: dict[int, int]):
        leads_to = leads_to.copy()
        leads_to[list(steps)] = len(below)
        change = np.flatnonzero(np.diff(leads_to)) + 1
        self._start = np.concatenate([[0], change])
        self._end = np.append(change, len(leads_to))
        self._kind = leads_to[self._start]
        self._below = list(below)
        self._index = {token: i for i, token in enumerate(below)}
        self._steps = steps
        self.stop = self._of(-1)

    def token(self, entry: int) -> int | None:
        """The token that a draw leads to; None: it extends nothing."""
        if entry in self._steps:
            return self._steps[entry]
        kind = int(self._kind[int(np.searchsorted(self._start, entry, side="right")) - 1])
        return None if kind < 0 else self._below[kind]

    def own(self, token: int) -> Runs:
        """The entries that lead to a token below, without the one that completes its path."""
        return self._of(self._index[token])

    def _of(self, kind: int) -> Runs:
        mine = self._kind == kind
        return Runs(self._start[mine], self._end[mine])


@dataclass(frozen=True)
class Leftover:
    """Entries whose text has been used up to some byte, and the target token that goes on from there.

    Args:
        entries: ``[N]``, each with text behind the byte.
        offset: bytes of each that have been used.
        tokens: ``[N]`` target ids; -1: none.
        whole: ``[N]`` bool, whether that token is all of the rest.
        joins: ``[N]`` bool, whether a walk begins at it: it is all of the rest, and a node.
    """

    entries: Ints
    offset: int
    tokens: Ints
    whole: NDArray[np.bool_]
    joins: NDArray[np.bool_]


class Spelling:
    """See the module.

    Args:
        target, drafter: the vocabularies; the drafter's must come from a tokenizer.
        target_size, drafter_size: width of the models' logits; ids beyond them do not exist.

    Attributes:
        ids: ``[K]`` drafter id of each entry.
        told: ``[K]`` the target tokens of each entry, one at least.
        entry_of: drafter id to its entry.
        path: target token to its path.
        at: path to its target token.
        longest: length of the longest path.
    """

    def __init__(self, target: Vocabulary, drafter: Vocabulary, *, target_size: int, drafter_size: int):
        self._target = weakref.ref(target)  # whoever uses the spelling keeps it alive
        self._tokens = {data: t for data, t in target._id_of.items() if t < target_size}
        self._texts = {t: data for data, t in self._tokens.items()}
        self._most = max(map(len, self._tokens), default=0)
        table = token_map(target, drafter, target_size=target_size, drafter_size=drafter_size)
        # Where several ids share bytes, one stands for all
        tokens = [self._tokens.get(target.token_bytes[t] or b"", t) for t in table.tokens.tolist()]
        start = table.start.tolist()
        told = {d: tokens[a:b] for d, a, b in zip(table.drafter_ids.tolist(), start, start[1:], strict=False)}
        markers = sorted(d for d in told if not drafter.token_bytes[d])
        texts = sorted((data, d) for d in told if (data := drafter.token_bytes[d]))
        self._pieces = [data for data, _ in texts]
        self.ids: list[int] = [*(d for _, d in texts), *markers]
        self.told: list[list[int]] = [told[d] for d in self.ids]
        self.entry_of = entry_of = {d: k for k, d in enumerate(self.ids)}
        self.path: dict[int, Path] = {told[d][0]: (entry_of[d],) for d in reversed(markers)}
        self.at: dict[Path, int] = {}
        self._below: dict[int, list[int]] = {}
        self._find_paths(drafter, entry_of)
        self.longest = max(map(len, self.path.values()), default=0)
        first = np.array([tokens[0] for tokens in self.told], dtype=np.int64)
        self._by_first = np.argsort(first, kind="stable")
        self._sorted_first = first[self._by_first]
        self._nodes: dict[int, Node] = {}
        self._rests: dict[tuple[int, int], tuple[int, bool]] = {}
        self._leftovers: dict[tuple[int | None, int], Leftover] = {}
        self._longer: dict[tuple[int, int], Leftover] = {}

    def _find_paths(self, drafter: Vocabulary, entry_of: dict[int, int]) -> None:
        # Shorter texts first: a path may pass through the tokens that are known by then
        for data, t in sorted(self._tokens.items(), key=lambda pair: len(pair[0])):
            path = tuple(entry_of.get(d, -1) for d in _drafted(data, drafter))
            above = [self.at.get(path[:j], -1) for j in range(1, len(path))]
            if not path or len(path) > LONGEST_PATH or -1 in path or -1 in above:
                continue
            self.path[t] = path
            self.at[path] = t
            for node in above:
                self._below.setdefault(node, []).append(t)

    def text(self, token: int) -> bytes | None:
        """The bytes of a target token; None for specials, and where another token of the same text stands for it."""
        return self._texts.get(token)

    def inner(self, token: int) -> bool:
        """Whether a token is a node."""
        return token in self._below

    def node(self, token: int) -> Node:
        """The node of a token that others lie below."""
        found = self._nodes.get(token)
        if found is None:
            found = self._nodes[token] = self._build(token)
        return found

    def _build(self, token: int) -> Node:
        text, path = self._texts[token], self.path[token]
        below = sorted(self._below[token], key=lambda t: len(self._texts[t]))
        leads_to = np.full(len(self.ids), -1, dtype=np.int64)
        steps = {}
        for i, t in enumerate(below):  # a longer text over a shorter one
            low, high = self.begun_with(self._texts[t][len(text) :])
            leads_to[low:high] = i
            if len(self.path[t]) == len(path) + 1:
                steps[self.path[t][-1]] = t
        index = {t: i for i, t in enumerate(below)}
        for k in np.flatnonzero(leads_to >= 0).tolist():
            if k not in steps and (written := self._written(text + self._pieces[k])):
                leads_to[k] = index.get(written[0], -1)
        return Node(below, leads_to, steps)

    def _written(self, data: bytes) -> list[int]:
        """What the target's own tokenizer makes of a text in mid-sentence; nothing where that is another text."""
        target = self._target()
        if target is None:
            raise RuntimeError("the target vocabulary of this spelling no longer exists")
        if target.encoder is None:
            return []
        try:
            ids, _ = target.encode_inside(data.decode())
        except UnicodeDecodeError:
            return []
        pieces = [target.token_bytes[i] for i in ids]
        if not all(pieces) or b"".join(filter(None, pieces)) != data:
            return []
        tokens = [self._tokens.get(piece, -1) for piece in pieces if piece]
        return [] if -1 in tokens else tokens

    def begun_with(self, data: bytes) -> tuple[int, int]:
        """The range of entries whose text begins with some bytes."""
        low, after = bisect_left(self._pieces, data), _successor(data)
        return low, len(self._pieces) if after is None else bisect_left(self._pieces, after, low)

    def own(self, token: int) -> Ints:
        """The entries whose text is told beginning with a token, without the one that is its path."""
        low, high = np.searchsorted(self._sorted_first, [token, token + 1])
        mine = self._by_first[low:high]
        path = self.path.get(token, ())
        return mine[mine != path[0]] if len(path) == 1 else mine

    def used_up(self, entry: int, offset: int) -> bool:
        """Whether an entry has no text behind its first ``offset`` bytes; specials have none anyway."""
        return entry >= len(self._pieces) or len(self._pieces[entry]) == offset

    def leftover(self, node: int | None, token: int) -> Leftover:
        """What is left of the draws at ``node`` (None: the root) that lead to ``token``."""
        found = self._leftovers.get((node, token))
        if found is None:
            used = len(self._texts[token])
            if node is None:
                found = self.rest(self.own(token), used)
            else:
                found = self.rest(self.node(node).own(token).entries(), used - len(self._texts[node]))
            self._leftovers[node, token] = found
        return found

    def longer(self, entry: int, last: int) -> Leftover | None:
        """What is left, behind its text, of the entries that begin with an entry's text; None: nothing, or a special.

        Args:
            entry: that the drafter's text ends with.
            last: target token that the target's text ends with, at the same byte. Entries are left out with which the
                target, had it meant them, would have written another token than that.
        """
        if entry >= len(self._pieces):
            return None
        found = self._longer.get((entry, last))
        if found is None:
            data, text = self._pieces[entry], self._texts.get(last, b"")
            low, high = self.begun_with(data)
            able = [k for k in range(low, high) if self._parts_at(k, data, last, text)]
            found = self._longer[entry, last] = self.rest(np.array(able, np.int64), len(data))
        return found if (found.tokens >= 0).any() else None

    def _parts_at(self, entry: int, data: bytes, last: int, text: bytes) -> bool:
        """Whether the target would write an entry that begins with ``data`` in tokens that part behind it."""
        if len(text) <= len(data) or not text.endswith(data):
            return self._told_at(entry, len(data)) is not None
        written = self._written(text + self._pieces[entry][len(data) :])
        return not written or written[0] == last

    def joins(self, token: int) -> bool:
        """Whether text left over that is just this token begins a walk at it."""
        return token in self._below

    def rest(self, entries: Ints, offset: int) -> Leftover:
        """Of some entries, those with text behind ``offset``, and how it begins."""
        kept = [k for k in entries.tolist() if not self.used_up(k, offset)]
        rests = [self._rest(k, offset) for k in kept]
        tokens, whole = [token for token, _ in rests], np.array([whole for _, whole in rests], bool)
        joins = whole & np.array([self.joins(token) for token in tokens], bool)
        return Leftover(np.array(kept, np.int64), offset, np.array(tokens, np.int64), whole, joins)

    def _rest(self, entry: int, offset: int) -> tuple[int, bool]:
        """The token that goes on with an entry's text, -1 for none, and whether that is all of it."""
        found = self._rests.get((entry, offset))
        if found is None:
            data, token = self._pieces[entry][offset:], self._told_at(entry, offset)
            if token is None:
                token = (self._written(data) or [self._longest(data)])[0]
            found = self._rests[entry, offset] = (token, len(self._texts.get(token, b"")) == len(data))
        return found

    def _told_at(self, entry: int, offset: int) -> int | None:
        """The token that begins at a byte of an entry's text as it is told; None: none does."""
        end = 0
        for told in self.told[entry]:
            if end >= offset:
                return told if end == offset else None
            end += len(self._texts[told])
        return None

    def _longest(self, data: bytes) -> int:
        """The longest target token that some bytes begin with, -1 for none."""
        for n in range(min(len(data), self._most), 0, -1):
            token = self._tokens.get(data[:n])
            if token is not None:
                return token
        return -1


def _drafted(data: bytes, drafter: Vocabulary) -> list[int]:
    """The drafter's ids for a text; none where it cannot write it."""
    known = drafter.id_of(data)
    if known is not None:
        return [known]
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return []
    ids, _ = drafter.encode_inside(text)
    return ids if len(ids) <= LONGEST_PATH and drafter.bytes_of(ids) == data else []


def _successor(data: bytes) -> bytes | None:
    """The least bytes that are greater than all that begin with ``data``; None: there are none."""
    kept = data.rstrip(b"\xff")
    return kept[:-1] + bytes([kept[-1] + 1]) if kept else None


_spellings: weakref.WeakKeyDictionary[
    Vocabulary, weakref.WeakKeyDictionary[Vocabulary, dict[tuple[int, int], Spelling]]
]
_spellings = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def spelling(target: Vocabulary, drafter: Vocabulary, *, target_size: int, drafter_size: int) -> Spelling:
    """The spelling of two vocabularies, made once (seconds for 150,000 tokens) and kept weakly."""
    with _lock:
        made = _spellings.setdefault(target, weakref.WeakKeyDictionary()).setdefault(drafter, {})
        sizes = target_size, drafter_size
        if sizes not in made:
            made[sizes] = Spelling(target, drafter, target_size=target_size, drafter_size=drafter_size)
        return made[sizes]
