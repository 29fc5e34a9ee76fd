"""Toy vocabularies for the cover walk, its laws by brute force, and a way to go through all of its draws."""

from __future__ import annotations

import contextlib

import numpy as np

from specdec_fast.spelling import Spelling
from specdec_fast.vocab import Vocabulary
from specdec_fast.walk import Healed, Masses, Rest, Root, Walk

__all__ = [
    "PAIRS",
    "Brute",
    "Script",
    "brute_laws",
    "laws_behind",
    "look_of",
    "problem",
    "q_table",
    "revealed",
    "walks",
]


class Longest:
    """A tokenizer that always takes the longest piece that fits."""

    fast = False
    opening: tuple[int, ...] = ()

    def __init__(self, pieces, broken=()):
        self._broken = dict(broken)  # texts it writes otherwise
        self._ids = {}
        for i, piece in enumerate(pieces):
            if piece:
                self._ids.setdefault(piece, i)

    def use_pieces(self, pieces):
        pass

    def encode(self, text):
        data, ids = text.encode(), []
        if data in self._broken:
            return self._broken[data], [0] * len(self._broken[data])
        while data:
            n = next((n for n in range(len(data), 0, -1) if data[:n] in self._ids), None)
            if n is None:
                break
            ids.append(self._ids[data[:n]])
            data = data[n:]
        return ids, [0] * len(ids)


def vocabulary(pieces, broken=()):
    """Pieces by id; None is the eos. ``broken``: texts that the tokenizer writes in ids of its own choice."""
    specials = {i: "</s>" for i, piece in enumerate(pieces) if piece is None}
    roles = {"eos": next(iter(specials), None)}
    return Vocabulary(pieces, specials=specials, roles=roles, encoder=Longest(pieces, broken))


PAIRS = {
    # merges, overrun and text left over on either side
    "both": ([b"a", b"b", b"ab", b"abb", b"c", b"bc"], [b"a", b"b", b"c", b"ca", b"cab", b"bb"]),
    # the drafter has the longer tokens
    "long drafter": ([b"a", b"b", b"ab"], [b"a", b"b", b"aab", b"abab", b"ba", b"bab"]),
    # the target has: paths of two and three
    "long target": ([b"a", b"b", b"ab", b"aba", b"abab", b"bb"], [b"a", b"b", b"ab"]),
    # the same text twice on either side
    "aliases": ([b"a", b"ab", b"b", b"ab", b"bb", b"a"], [b"a", b"b", b"a", b"bb", b"b"]),
    # nothing in common
    "disjoint": ([b"a", b"b"], [b"ab", b"ba", b"aa", b"bb", b"bba"]),
    # what the target cannot say, at once (c) and behind a token (ac)
    "unsayable": ([b"a", b"b", b"ab"], [b"a", b"b", b"c", b"ac", b"abc"]),
    # both have an eos; the drafter has one more special
    "eos": ([None, b"a", b"b", b"ab"], [b"a", None, b"b", b"ba"]),
    # drafter tokens that end inside a character (é is C3 A9, è is C3 A8)
    "bytes": (
        [b"\xc3\xa9", b"\xc3\xa8", b"\xc3", b"a", b"a\xc3\xa9", b"\xa9"],
        [b"\xc3", b"\xa9", b"\xa8", b"a\xc3", b"a", b"\xa9a"],
    ),
    # tokenizers that do not take the longest piece
    "ways of writing": ([b"a", b"b", b"ab", b"c", b"bc", b"abca"], [b"a", b"b", b"abc", b"ca", b"ab", b"bcc"]),
    # text left over that is a node's (b), beside some that is not (c)
    "line ends": ([b"a", b"b", b"c", b"bc", b"bcc"], [b"ab", b"ac", b"a", b"b", b"c", b"cc", b"abc"]),
    # a path that passes through a text which is no target token
    "gap": ([b"a", b"abc", b"b", b"c"], [b"a", b"b", b"c", b"ab"]),
}

BROKEN = {
    # "abc" is a bc for the target, though it has ab; "abca" is a b ca for the drafter, though it has ab
    ("ways of writing", 0): {b"abc": [0, 4]},
    ("ways of writing", 1): {b"abca": [0, 1, 3]},
}


def q_table(width, seed, *, zeros=0.0):
    """q behind each text, random: a function of the drafter ids drawn."""
    laws = {}

    def q(prefix):
        if prefix not in laws:
            numbers = np.random.default_rng([seed, *prefix, len(prefix)])
            mass = numbers.exponential(size=width) ** 2
            mass[numbers.random(width) < zeros] = 0.0
            mass[int(numbers.integers(width))] += 0.1
            laws[prefix] = mass / mass.sum()
        return laws[prefix]

    return q


def problem(name):
    target, drafter = (vocabulary(pieces, BROKEN.get((name, side), ())) for side, pieces in enumerate(PAIRS[name]))
    made = Spelling(target, drafter, target_size=target.size, drafter_size=drafter.size)
    return target, drafter, made


# Brute force: DESIGN's words on ids and bytes, one draw after the other; nothing sorted, no sums


class Brute:
    def __init__(self, target, drafter):
        self.texts = {}
        for t, data in enumerate(target.token_bytes):
            if data and data not in self.texts:
                self.texts[data] = t
        self.of = {t: data for data, t in self.texts.items()}
        self.pieces = drafter.token_bytes
        ids = {}
        for d, piece in enumerate(self.pieces):
            if piece:
                ids.setdefault(piece, d)
        self.paths = {}
        for data in sorted(self.texts, key=len):
            path = [ids[data]] if data in ids else None
            if path is None:
                try:
                    path = drafter.encoder.encode(data.decode())[0]
                except UnicodeDecodeError:
                    continue
            if b"".join(self.pieces[d] for d in path) != data:
                continue
            shorter = [tuple(path[:j]) for j in range(1, len(path))]
            if all(self.paths.get(self.texts.get(b"".join(self.pieces[d] for d in part))) == part for part in shorter):
                self.paths[self.texts[data]] = tuple(path)
        self.target = target
        self.markers = {}
        if None in self.pieces and target.roles["eos"] is not None:
            self.markers[self.pieces.index(None)] = target.roles["eos"]

    def below(self, path):
        return [t for t, p in self.paths.items() if len(p) > len(path) and p[: len(path)] == path]

    def longest(self, data, among=None):
        fitting = [t for t, text in self.of.items() if data.startswith(text) and (among is None or t in among)]
        return max(fitting, key=lambda t: len(self.of[t]), default=None)

    def written(self, data):
        """The target tokens of a text, None where the encoder does not give it back."""
        with contextlib.suppress(UnicodeDecodeError):
            ids = self.target.encoder.encode(data.decode())[0]
            if b"".join(self.target.token_bytes[t] for t in ids) == data:
                return [self.texts[self.target.token_bytes[t]] for t in ids]
        return None

    def told(self, d):
        """The target tokens of d's text: itself, else the encoder's, else the longest ones."""
        data = self.pieces[d]
        if data in self.texts:
            return [self.texts[data]]
        if (ids := self.written(data)) is not None:
            return ids
        ids = []
        while (t := self.longest(data)) is not None:
            ids.append(t)
            data = data[len(self.of[t]) :]
        return ids

    def goes_on(self, d, used):
        """The token that goes on with d's text: as it is told, where a told token begins there; else the encoder's."""
        ids = self.told(d)
        ends = self._begins(ids)
        if used in ends:
            return ids[ends.index(used)]
        rest = self.pieces[d][used:]
        return (self.written(rest) or [self.longest(rest)])[0]

    def _begins(self, ids):
        return [sum(len(self.of[t]) for t in ids[:i]) for i in range(len(ids))]

    def joins(self, t):
        return t in self.paths and bool(self.below(self.paths[t]))

    def extends(self, node, d):
        """The token that d leads to at a node, None: it extends nothing."""
        if self.pieces[d] is None:
            return None
        text, below = self.of[node], self.below(self.paths[node])
        for t in below:
            if self.paths[t] == (*self.paths[node], d):
                return t
        data = text + self.pieces[d]
        ids = self.written(data)
        found = self.longest(data, below) if ids is None else ids[0]
        return found if found in below else None

    def parts(self, d, data, last):
        """Whether the target, writing d, might have written ``data`` with ``last`` at its end."""
        text = self.of.get(last, b"")
        if len(text) > len(data) and text.endswith(data):
            ids = self.written(text + self.pieces[d][len(data) :])
            return ids is None or ids[0] == last
        return len(data) in self._begins(self.told(d))

    def outcomes(self, q, steps, last=-1, held=b"", ending=None):
        """Every way to propose ``steps`` tokens: probability, and for each the token and what is revealed behind it.

        What the next token's law must be follows by Bayes: draws are carried along, hidden or not. The first pair
        stands for the text so far.
        """
        steps, begin = steps + 1, (("begin", None),)
        if ending is None or self.pieces[ending] is None:
            yield from self._root(() if ending is None else (ending,), 1.0, begin, q, steps, last, held)
            return
        data, law = self.pieces[ending], q(())
        longer = [d for d, piece in enumerate(self.pieces) if piece and piece.startswith(data) and piece != data]
        longer = [d for d in longer if self._sayable(d) and self.parts(d, data, last)]
        longer = [d for d in longer if self.goes_on(d, len(data)) is not None]
        total = law[[ending, *longer]].sum()
        if not total > 0:
            yield from self._root((ending,), 1.0, begin, q, steps, last)
            return
        if law[ending] > 0:
            yield from self._root((ending,), law[ending] / total, begin, q, steps, last)
        for d in longer:
            if law[d] > 0:
                yield from self._left((), d, len(data), law[d] / total, begin, q, steps)

    def _root(self, fed, chance, done, q, steps, last, held=b""):
        if len(done) == steps:
            yield chance, done
            return
        law = q(fed)
        if held:
            able = [d for d, piece in enumerate(self.pieces) if piece and piece.startswith(held) and piece != held]
            able = [d for d in able if self.goes_on(d, len(held)) is not None]
        else:
            able = [d for d in range(len(law)) if d in self.markers or self._sayable(d)]
            if last in self.paths and self.below(self.paths[last]):
                stopping = [d for d in able if self.extends(last, d) is None]
                able = stopping if law[stopping].sum() > 0 else able
        total = law[able].sum()
        for d in able:
            if law[d] > 0:
                now = chance * law[d] / total
                if held:
                    yield from self._left(fed, d, len(held), now, done, q, steps)
                else:
                    yield from self._begun(fed, d, now, done, q, steps)

    def _sayable(self, d):
        return self.pieces[d] is not None and bool(self.told(d))

    def _begun(self, fed, d, chance, done, q, steps):
        """The first draw of a token is d."""
        if d in self.markers:
            yield from self._root((*fed, d), chance, (*done, (self.markers[d], ("end", d))), q, steps, self.markers[d])
            return
        t = self.told(d)[0]
        if self.paths.get(t) == (d,) and self.below((d,)):
            yield from self._at(fed, (d,), t, chance, done, q, steps)
        elif self.of[t] == self.pieces[d]:
            yield from self._root((*fed, d), chance, (*done, (t, ("end", d))), q, steps, t)
        else:
            kind = ("over", fed)
            yield from self._left(fed, d, len(self.of[t]), chance, (*done, (t, kind)), q, steps)

    def _at(self, fed, path, node, chance, done, q, steps, drawn=()):
        """At a node with this path, of which ``drawn`` was no draw: its text was that of the draw before."""
        behind = (*fed, *path[len(drawn) :])
        law = q(behind)
        usable = np.array([d in self.markers or self._sayable(d) for d in range(len(law))])
        law = np.where(usable, law, 0.0)
        law = law / law.sum()
        for d in range(len(law)):
            if law[d] == 0:
                continue
            t = self.extends(node, d)
            now = chance * law[d]
            if t is None:
                after = (*done, (node, ("stop",)))
                if len(after) == steps:
                    yield now, after
                else:  # d itself is the next token's first draw
                    yield from self._begun(behind, d, now, after, q, steps)
                continue
            longer = (*path, d)
            if self.paths[t] == longer and self.below(longer):
                yield from self._at(fed, longer, t, now, done, q, steps, drawn)
            elif self.of[t] == self.of[node] + self.pieces[d]:
                yield from self._root((*behind, d), now, (*done, (t, ("end", d))), q, steps, t)
            else:
                used = len(self.of[t]) - len(self.of[node])
                yield from self._left(behind, d, used, now, (*done, (t, ("over", behind))), q, steps)

    def _left(self, fed, d, used, chance, done, q, steps):
        """Text of a hidden d is left over."""
        if len(done) == steps:
            yield chance, done
            return
        rest = self.pieces[d][used:]
        t = self.goes_on(d, used)
        if t is None:
            yield chance, (*done, (None, ("lost",)))
        elif self.of[t] == rest and self.joins(t):
            done = (*done[:-1], (done[-1][0], ("join", d)))
            yield from self._at((*fed, d), self.paths[t], t, chance, done, q, steps, drawn=self.paths[t])
        elif self.of[t] == rest:
            yield from self._root((*fed, d), chance, (*done, (t, ("end", d))), q, steps, t)
        else:
            more = used + len(self.of[t])
            yield from self._left(fed, d, more, chance, (*done, (t, ("over", fed))), q, steps)


def brute_laws(brute, q, steps, **start):
    """The law of each next token, by what has been proposed and revealed before it."""
    laws = {}
    for chance, done in brute.outcomes(q, steps, **start):
        for i in range(1, len(done)):
            token = done[i][0]
            if token is not None:
                law = laws.setdefault(done[:i], {})
                law[token] = law.get(token, 0.0) + chance
    return {before: {t: mass / sum(law.values()) for t, mass in law.items()} for before, law in laws.items()}


# Production: every draw of a walk ordered, so that all of them can be gone through


class Ordered(Masses):
    """Draws the entry that a script says, and takes down with what probability."""

    def __init__(self, q, script):
        super().__init__(q)
        self.q, self.script = q, script

    def draw(self, u, runs=None):
        entries = np.arange(len(self.q))
        allowed = np.ones(len(self.q), bool) if runs is None else runs.holds(entries)
        return int(self.script.choose(np.where(allowed, self.q, 0.0)))


class Script:
    """Goes through every choice in turn."""

    def __init__(self):
        self.path, self.chance, self._place = [], 1.0, 0

    def choose(self, weights):
        if self._place == len(self.path):
            self.path.append([0, [i for i, w in enumerate(weights) if w > 0]])
        place, able = self.path[self._place]
        self._place += 1
        self.chance *= weights[able[place]] / weights.sum()
        return able[place]

    def next(self):
        """Whether another way is left."""
        while self.path and self.path[-1][0] + 1 == len(self.path[-1][1]):
            self.path.pop()
        if not self.path:
            return False
        self.path[-1][0] += 1
        self.chance, self._place = 1.0, 0
        return True


def laws_behind(spelling, q):
    """``q`` behind entries, on entries."""

    def masses(entries):
        law = q(tuple(spelling.ids[k] for k in entries))[spelling.ids]
        return law / law.sum()

    return masses


def walks(spelling, q, steps, monkeypatch, **start):
    """Every walk: its probability, the tokens with their laws, and the entries fed."""
    masses, script = laws_behind(spelling, q), Script()

    def rest_draw(self, u):
        i = script.choose(self._masses)
        return int(self._leftover.entries[i]), int(self._leftover.tokens[i]), bool(self._leftover.whole[i])

    def rest_join(self, u, more=0.0):
        i = script.choose(np.append(self._joins, self.total + more))
        left = self._leftover
        return None if i == len(left.entries) else (int(left.entries[i]), int(left.tokens[i]))

    def healed_choose(self, u):
        return (self.rest, self.root)[script.choose(self._parts)]

    monkeypatch.setattr(Rest, "join", rest_join)
    monkeypatch.setattr(Rest, "draw", rest_draw)
    monkeypatch.setattr(Healed, "choose", healed_choose)
    while True:
        walk = Walk(spelling, steps, 100, lambda: 0.5, **start)
        more = True
        while more:
            laws = [Ordered(masses(walk.fed[: len(walk.fed) - i]), script) for i in range(walk.wanted)]
            more = walk.advance(*laws)
        yield script.chance, walk
        if not script.next():
            return


def look_of(spelling, q, walk):
    masses = laws_behind(spelling, q)

    def look(depth, path):
        return [Masses(masses((*walk.fed[:depth], *path[:j]))) for j in range(1, len(path) + 1)]

    return look


def revealed(spelling, walk, ending=None):
    """What a walk has revealed behind each token, in brute force's words."""
    ids, kinds, token = spelling.ids, [], "begin"
    for place, then in enumerate(walk.drawn):
        now = walk.drawn[place - 1].law if place else None
        if isinstance(then.law, Root) and then.law.start:
            kinds.append((token, ("join", ids[walk.fed[then.law.depth - 1]])))
        elif now is None:
            kinds.append((token, None))
        elif isinstance(then.law, Rest):
            kinds.append((token, ("over", tuple(ids[k] for k in walk.fed[: then.law.depth]))))
        else:
            if isinstance(now, Healed):
                now = now.root if walk.fed[:1] == [ending] else now.rest
            fed = tuple(walk.fed[now.depth : then.law.depth])
            path = (*now.start, *fed) if isinstance(now, Root) else ()
            if spelling.at.get(path) == token and spelling.inner(token):
                kinds.append((token, ("stop",)))
            else:
                kinds.append((token, ("end", ids[fed[-1]])))
        token = then.token
    return tuple(kinds)
