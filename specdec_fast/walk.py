"""The cover walk: a drafter's draws become target tokens by a map whose law is short (string-level rejection sampling).

Words: :mod:`specdec_fast.spelling`. One target token is proposed like this.

- At the *root*, behind the text so far, draw an entry d; t is the first target token that tells it. If d is path(t) and
  t is a node, go on at t. Otherwise propose t.
- At *node* x draw d. It extends nothing: propose x, the walk *stops*. It leads to a token t below x (it completes
  path(t), or the target itself would write ``text(x) text(d)`` beginning with t): if d completes path(t) and t is a
  node, go on at t. Otherwise propose t.

A walk that ends in t has passed through nothing but prefixes of path(t) = d1 … dm, so its law is the sum

    ψ(t) = own(root, t) + Σ_{0<j<m} q(d1 … dj) own(dj, t) + q(d1 … dm) stop(t),

own(x, t) being the mass of the draws at x that lead to t other than the one that completes path(t), and stop(t) the
mass at node t of the draws that extend nothing (1 where t is no node). A token without a path keeps its first term.

What is revealed behind a proposal is where the walk ended and how, and the next law is conditional on that:

- *stopped* at node x: the entry drawn last is of law q behind path(x), restricted to those that extend nothing. The
  next root stands behind path(x) and has that law.
- *overrun*: the entry drawn at x leads to t and has text left over. It is of law q behind path(x) restricted to all
  such entries; which of them it is stays hidden. The next token is the one that goes on telling the text left over, so
  its law is a sum of masses for each token (:class:`Rest`), and so on until the text is used up. But where the text
  left over is just that of a node, this and the entry are revealed first, and the next walk begins at the node.
- *ended*: the entry drawn is used up and revealed. The next root stands behind it.

A root behind a target token x that is a node (the text committed so far ends with it, or an entry was used up) draws
from the entries that extend nothing at x: the target, had it meant such an extension, would have written it as a longer
token. Any such restriction is lossless, since the law is that of the draw. At the start of a round the text may end
inside what the drafter would have written as one token: :class:`Healed`. ``docs/slrs.md`` has the proofs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from specdec_fast.spelling import Floats, Ints, Leftover, Path, Runs, Spelling

__all__ = ["Certain", "Drawn", "Healed", "Law", "Masses", "Rest", "Root", "Walk", "Weights"]

Look = Callable[[int, Path], "list[Weights]"]


class Weights(Protocol):
    """The masses of all entries behind some text."""

    def total(self, runs: Runs | None = None) -> float:
        """The mass of some runs (None: of all)."""

    def of(self, entries: Ints) -> Floats:
        """The masses of some entries."""

    def draw(self, u: float, runs: Runs | None = None) -> int:
        """An entry of some runs (None: of all), in proportion to mass; their total is positive."""


class Masses:
    """A law on the entries.

    Args:
        q: ``[K]`` float64, not negative; NaN throughout where the drafter's scores were no law.
    """

    def __init__(self, q: Floats):
        self._edges = np.empty(len(q) + 1)
        self._edges[0] = 0.0
        np.cumsum(q, out=self._edges[1:])

    def total(self, runs: Runs | None = None) -> float:
        if runs is None:
            return float(self._edges[-1])
        return float((self._edges[runs.end] - self._edges[runs.start]).sum())

    def of(self, entries: Ints) -> Floats:
        return self._edges[entries + 1] - self._edges[entries]

    def draw(self, u: float, runs: Runs | None = None) -> int:
        edges = self._edges
        if runs is None:
            return _cell(edges, u * edges[-1])
        sums = np.concatenate([[0.0], np.cumsum(edges[runs.end] - edges[runs.start])])
        i = _cell(sums, u * sums[-1])
        low, high = edges[runs.start[i]], edges[runs.end[i]]
        level = low + (min(u * sums[-1], sums[i + 1]) - sums[i])
        return int(np.searchsorted(edges, min(level, np.nextafter(high, low)), side="right")) - 1


def _cell(edges: Floats, level: float) -> int:
    """The cell of a cumulative sum that a level falls into; never one of width 0."""
    # A level may round up to the total: the largest number below it still falls into the last cell with mass
    return int(np.searchsorted(edges, min(level, np.nextafter(edges[-1], 0.0)), side="right")) - 1


@dataclass(frozen=True)
class Certain:
    """The law of a drafter at T=0: one entry, -1 where its scores were no law."""

    entry: int

    def total(self, runs: Runs | None = None) -> float:
        if runs is None:
            return float(self.entry >= 0)
        return float(runs.holds(np.array([self.entry]))[0])

    def of(self, entries: Ints) -> Floats:
        return (entries == self.entry).astype(np.float64)

    def draw(self, u: float, runs: Runs | None = None) -> int:
        return self.entry


@dataclass
class Root:
    """The law of a token that is proposed by a walk.

    Args:
        spelling: of the two vocabularies.
        depth: entries drawn and used up before it in this round.
        weights: of the entries behind them.
        runs: the entries that may be drawn first; None: all.
        start: path of the node that the walk begins at, whose text has been drawn before; empty: the root.
    """

    spelling: Spelling
    depth: int
    weights: Weights
    runs: Runs | None = None
    seen: dict[Path, Weights] = field(default_factory=dict)
    """The laws behind paths from here."""
    start: Path = ()

    def __post_init__(self) -> None:
        self.total = self.weights.total(self.runs)

    def mass(self, token: int, look: Look) -> float:
        """ψ of a token; ``look(depth, path)`` gives the laws behind each beginning of a path from here."""
        value, more, missing = self._sum(token)
        if missing is not None:
            for j, weights in enumerate(look(self.depth, missing), 1):
                self.seen.setdefault(missing[:j], weights)
            value, more, _ = self._sum(token)
        return value + more

    def bounds(self, token: int) -> tuple[float, float]:
        """ψ of a token lies between these numbers, without another look."""
        value, more, missing = self._sum(token)
        return (value + more,) * 2 if missing is None else (value, value + more)

    def missing(self, token: int) -> Path | None:
        """The path that :meth:`mass` would look at."""
        return self._sum(token)[2]

    def _sum(self, token: int) -> tuple[float, float, Path | None]:
        """What is known of ψ, what the rest of the path may add at most, and the path to look at for it."""
        spelling, begun = self.spelling, len(self.start)
        path = spelling.path.get(token, ())
        if path[:begun] != self.start:  # not at or below the node
            return 0.0, 0.0, None
        value = 0.0 if begun else self._first(spelling.own(token)).sum() / self.total
        if not path:
            return value, 0.0, None
        reach = 1.0 if begun else self._first(np.array(path[:1]))[0] / self.total
        needed = path if spelling.inner(token) else path[:-1]
        for j in range(begun or 1, len(needed) + 1):
            if not reach:
                break
            weights = self.weights if j == begun else self.seen.get(path[begun:j])
            if weights is None:
                return value, reach, needed[begun:]
            node = spelling.node(spelling.at[path[:j]])
            if not weights.total() > 0:  # the drafter's scores are no law: the walk would stop
                reach *= float(j == len(path))
            elif j == len(path):
                reach *= weights.total(node.stop) / weights.total()
            else:
                scale = 1.0 / weights.total()
                value += reach * scale * weights.total(node.own(token))
                reach *= scale * weights.of(np.array(path[j : j + 1]))[0]
        return value, reach, None

    def _first(self, entries: Ints) -> Floats:
        masses = self.weights.of(entries)
        return masses if self.runs is None else np.where(self.runs.holds(entries), masses, 0.0)


class Rest:
    """The law of a token that is proposed from the text left over of a hidden draw.

    Where that text is just a node's, it is known, and which entry it was: the walk goes on at the node, and this law
    is that of the others.

    Args:
        spelling: of the two vocabularies.
        depth: entries used up before the hidden one.
        weights: of the entries behind them.
        leftover: what the hidden one may be.

    Attributes:
        total: mass of the entries that this is the law of.
        joining: mass of those that a walk goes on from.
    """

    def __init__(self, spelling: Spelling, depth: int, weights: Weights, leftover: Leftover):
        self.depth = depth
        self._spelling = spelling
        self._weights = weights
        self._leftover = leftover
        masses = np.where(leftover.tokens >= 0, weights.of(leftover.entries), 0.0)
        self._joins = np.where(leftover.joins, masses, 0.0)
        self._masses = masses - self._joins
        self._edges = np.concatenate([[0.0], np.cumsum(self._masses)])
        self.total = float(self._edges[-1])
        self.joining = float(self._joins.sum())

    def mass(self, token: int, look: Look) -> float:
        """ψ of a token; no look is needed."""
        return self.bounds(token)[0]

    def bounds(self, token: int) -> tuple[float, float]:
        """ψ of a token, twice."""
        return (float(self._masses[self._leftover.tokens == token].sum() / self.total) if self.total else 0.0,) * 2

    def draw(self, u: float) -> tuple[int, int, bool]:
        """The hidden entry, the token its text goes on with, and whether that is all of it."""
        i = _cell(self._edges, u * self.total)
        left = self._leftover
        return int(left.entries[i]), int(left.tokens[i]), bool(left.whole[i])

    def join(self, u: float, more: float = 0.0) -> tuple[int, int] | None:
        """An entry that a walk goes on from, and the node; None: the hidden entry is none of these.

        Args:
            more: mass of what else may have been drawn.
        """
        i = Masses(np.append(self._joins, self.total + more)).draw(u)
        left = self._leftover
        return None if i == len(left.entries) else (int(left.entries[i]), int(left.tokens[i]))

    def behind(self, token: int) -> Rest:
        """The law of the next token where ``token`` has not used up the text."""
        left = self._leftover
        kept = left.entries[(left.tokens == token) & ~left.whole & (self._masses > 0)]
        used = left.offset + len(self._spelling.text(token) or b"")
        return Rest(self._spelling, self.depth, self._weights, self._spelling.rest(kept, used))


class Healed:
    """The law of a token behind a text whose last entry may turn out to be the beginning of a longer one.

    The entry is taken back and drawn again, from those that begin with its text: a longer one, told from there on, or
    itself, with a walk behind it. (A longer one that leaves just a node's text is known, see :class:`Rest`, and not in
    this law.)

    Args:
        ending: the entry.
        rest: of the longer ones.
        root: behind the entry.
        whole: mass of the entry, where that of ``rest`` is ``rest.total``.
    """

    def __init__(self, ending: int, rest: Rest, root: Root, whole: float):
        self._ending = ending
        self.rest = rest
        self.root = root
        self.total = rest.total + whole
        self._parts = np.array([rest.total, whole])

    def mass(self, token: int, look: Look) -> float:
        """ψ of a token, see :class:`Root`."""

        def behind(depth: int, path: Path) -> list[Weights]:  # the walk may have gone on without the entry
            return look(0, (self._ending, *path))[1:]

        return self._mix(self.rest.mass(token, look), self.root.mass(token, behind) if self._parts[1] else 0.0)

    def bounds(self, token: int) -> tuple[float, float]:
        """ψ of a token lies between these numbers, without another look."""
        (rest, _), (low, high) = self.rest.bounds(token), self.root.bounds(token) if self._parts[1] else (0.0, 0.0)
        return self._mix(rest, low), self._mix(rest, high)

    def missing(self, token: int) -> Path | None:
        """The path behind the entry that :meth:`mass` would look at."""
        return self.root.missing(token) if self._parts[1] else None

    def choose(self, u: float) -> Rest | Root:
        """Which of the two the walk goes on with."""
        return self.root if Masses(self._parts).draw(u) else self.rest

    def _mix(self, rest: float, root: float) -> float:
        return float((self._parts * (rest, root)).sum() / self.total)


Law = Root | Rest | Healed


@dataclass(frozen=True)
class Drawn:
    """A proposed token and the law it was drawn from."""

    token: int
    law: Law


class Walk:
    """One row's walk through one round.

    Args:
        spelling: of the two vocabularies.
        limit: how many tokens to propose.
        room: how many entries may be fed.
        number: the row's next uniform number in (0, 1).
        last: the last committed target token.
        held: bytes at the end of the committed text that the drafter has not been given.
        ending: the entry that the drafter's text ends with, to be taken back; None: keep it.
        goes_on: asked with the number of tokens proposed and the newest one's mass, as far as the walk knows it,
            whether to propose more; None: always.

    Attributes:
        drawn: the tokens proposed.
        fed: the entries behind the text, ``ending`` included.
    """

    def __init__(
        self,
        spelling: Spelling,
        limit: int,
        room: int,
        number: Callable[[], float],
        *,
        last: int = -1,
        held: bytes = b"",
        ending: int | None = None,
        goes_on: Callable[[int, float], bool] | None = None,
    ):
        self.drawn: list[Drawn] = []
        self.fed: list[int] = [] if ending is None else [ending]
        self._ending = ending
        self._spelling = spelling
        self._limit = limit
        self._room = room
        self._number = number
        self._last = last
        self._held = held
        self._goes_on = goes_on
        self._law: Root | Rest
        self._stated: Law | None = None  # the law of the next token, where it is not _law
        self._path: Path = ()
        self._start: Path = ()  # of the node that the next walk begins at

    @property
    def able(self) -> bool:
        """Whether there is room for the longest walk that another token may take."""
        return self._more() and len(self.fed) + max(self._spelling.longest, 1) <= self._room

    @property
    def wanted(self) -> int:
        """Behind how many of the last tokens a law is wanted next."""
        return 1 if self._ending is None else 2

    def advance(self, weights: Weights, before: Weights | None = None) -> bool:
        """Goes on until another law is needed.

        Args:
            weights: the law behind the entries fed so far.
            before: the law behind all but the last of them, where two are wanted.

        Returns:
            Whether it is needed; False: the walk is over.
        """
        if self._start:
            self._law = Root(self._spelling, len(self.fed), weights, start=self._start)
            self._path, self._start = self._start, ()
            if not self._law.total > 0:
                return False
        elif not self._path:
            self._law = self._open(weights)
            if before is not None and self._heal(before, self._law):
                return True
        elif isinstance(self._law, Root):
            self._law.seen[self._path[len(self._law.start) :]] = weights
        while self._path or self._may_begin():
            if isinstance(self._law, Rest):
                goes_on = self._from_rest(self._law)
            elif self._path:
                goes_on = self._at_node(self._spelling.at[self._path], weights)
            else:
                entry = self._law.weights.draw(self._number(), self._law.runs)
                goes_on = self._lead(None, entry, self._spelling.told[entry][0], weights)
            if goes_on is not None:
                return goes_on
        return False

    def _heal(self, before: Weights, root: Root | Rest) -> bool:
        """Takes back the entry that the text ends with, and draws it or a longer one.

        Returns:
            whether another law is needed first.
        """
        ending, self._ending = self._ending, None
        if ending is None or isinstance(root, Rest):
            return False
        leftover = self._spelling.longer(ending, self._last)
        if leftover is None or not self.able:
            return False
        whole = float(before.of(np.array([ending]))[0]) if root.total > 0 else 0.0
        rest = Rest(self._spelling, 0, before, leftover)
        if not rest.total + rest.joining + whole > 0:
            return False
        if rest.joining and (found := rest.join(self._number(), whole)):
            self.fed.clear()
            return self._join(*found)
        healed = Healed(ending, rest, root, whole)
        self._stated, self._law = healed, healed.choose(self._number())
        if self._law is not root:
            self.fed.clear()
        return False

    def _at_node(self, node: int, weights: Weights) -> bool | None:
        """One draw at a node; returns what `advance` does, None where it needs no other law yet."""
        extending = self._spelling.node(node)
        entry = weights.draw(self._number()) if weights.total() > 0 else -1
        token = extending.token(entry) if entry >= 0 else None
        if token is not None:
            return self._lead(node, entry, token, weights)
        self._propose(node)
        self._law = Root(self._spelling, len(self.fed), weights, extending.stop)
        return None

    def _from_rest(self, law: Rest) -> bool | None:
        """One token of the text left over."""
        # A first token's law may be a mixture with this one, stated after it was known that none is joined
        if law.joining and self._stated is None and (found := law.join(self._number())):
            return self._join(*found)
        entry, token, whole = law.draw(self._number())
        self._propose(token)
        if whole:
            return self._end(entry)
        self._law = law.behind(token)
        return None

    def _join(self, entry: int, node: int) -> bool:
        """The text left over of an entry is a node's: the next walk begins there."""
        self._start = self._spelling.path[node]
        return self._feed(entry)

    def _lead(self, node: int | None, entry: int, token: int, weights: Weights) -> bool | None:
        """An entry drawn at a node (None: the root) leads to a token."""
        spelling, path = self._spelling, (*self._path, entry)
        if spelling.at.get(path) == token and spelling.inner(token):
            self._path = path
            return self._feed(entry)
        self._propose(token)
        before = 0 if node is None else len(spelling.text(node) or b"")
        if spelling.used_up(entry, len(spelling.text(token) or b"") - before):
            return self._end(entry)
        self._law = Rest(spelling, len(self.fed), weights, spelling.leftover(node, token))
        return None

    def _open(self, weights: Weights) -> Root | Rest:
        """The law behind a text that ends where a drafter token does."""
        held, self._held = self._held, b""
        if held:
            entries = np.arange(*self._spelling.begun_with(held))
            return Rest(self._spelling, 0, weights, self._spelling.rest(entries, len(held)))
        last = self.drawn[-1].token if self.drawn else self._last
        runs = self._spelling.node(last).stop if self._spelling.inner(last) else None
        if runs is not None and not weights.total(runs) > 0:
            runs = None
        return Root(self._spelling, len(self.fed), weights, runs)

    def _may_begin(self) -> bool:
        """Whether there is a law for another token, and room for it."""
        law = self._law
        return self.able and law.total + (law.joining if isinstance(law, Rest) else 0.0) > 0

    def _more(self) -> bool:
        return len(self.drawn) < self._limit

    def _propose(self, token: int) -> None:
        law, self._stated = self._stated or self._law, None
        self.drawn.append(Drawn(token, law))
        self._path = ()
        if self._goes_on is not None and not self._goes_on(len(self.drawn), law.bounds(token)[0]):
            self._limit = len(self.drawn)

    def _end(self, entry: int) -> bool:
        """The entry drawn is used up."""
        return self._more() and self._feed(entry)

    def _feed(self, entry: int) -> bool:
        self.fed.append(entry)
        return True
