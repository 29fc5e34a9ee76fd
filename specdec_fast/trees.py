"""Drafts that are trees: what they are, and the native operations on them (``csrc/branch.cpp``, ``csrc/climb.cpp``).

A target's pass over a handful of positions takes little longer than over one, and a chain of draft tokens uses it up in
one guess: where its first token is wrong, all of it is. A tree spends the same positions on what may come second and
third. The target then draws its own token at the root, goes to the child that is this token, and so on: the output is
the target's own draws, whatever the tree (``docs/trees.md``).
"""

from __future__ import annotations

from typing import NamedTuple

from specdec_fast.cache import RaggedCache
from specdec_fast.lean import LeanModel, joined, level
from specdec_fast.lean_ops import Choices, Choosing, Index, Laws
from specdec_fast.memory import Memory, number_of

__all__ = ["Climbed", "Climbing", "Growing", "Grown", "Origin", "Tree", "branch", "climb"]


class Climbing(NamedTuple):
    """How a target judges a tree.

    Args:
        temperature, top_k, top_p, min_p: of its sampling.
        drawn: by the law that the nodes were drawn from (rule *block*). False: it looks for its own tokens, which are
            its argmax at temperature 0 and else the winners of races.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    drawn: bool = False


class Origin(NamedTuple):
    """What the nodes of trees were drawn from, ``R`` rows of ``N`` nodes.

    Args:
        roots: ``[R]`` the number of the law that what is behind each text was drawn from.
        entries: ``[R][N]`` the entry of the scores that each was drawn as.
        behind: ``[R][N]`` the number of the law that what is behind each was drawn from, -1: nothing is.
        laws: their scores, ``[.., K]`` but for the shape.
        table: the target id of each entry; None: it is one.
    """

    roots: list[int]
    entries: list[list[int]]
    behind: list[list[int]]
    laws: Laws
    table: Index | None


class Tree(NamedTuple):
    """Drafts that branch, ``R`` rows; a node's parent stands before it.

    Args:
        tokens: ``[R][N]`` target ids of the nodes.
        parents: ``[R][N]`` places of what each stands behind; -1: the row's text.
        levels: ``[R][N]`` of the drafter's confidence in each.
        passes: ``[R]`` of the drafter's, one a level, that it took.
        memory: to be told what the target says of the nodes.
        origin: what the nodes were drawn from, a node's children in the order in which they were drawn; None: they were
            certain.
    """

    tokens: list[list[int]]
    parents: list[list[int]]
    levels: list[list[int]]
    passes: list[int]
    memory: Memory | None = None
    origin: Origin | None = None

    @classmethod
    def of_chains(cls, drafts: list[list[int]], memory: Memory | None = None) -> Tree:
        """Trees that do not branch."""
        parents = [list(range(-1, len(line) - 1)) for line in drafts]
        return cls(drafts, parents, [[] for _ in drafts], [0] * len(drafts), memory)

    def chains(self) -> list[list[int]]:
        """Each row's way from first child to first child."""
        return [[tokens[i] for i in _way(parents)] for tokens, parents in zip(self.tokens, self.parents, strict=True)]


def _way(parents: list[int]) -> list[int]:
    way: list[int] = []
    for place, parent in enumerate(parents):
        if parent == (way[-1] if way else -1):
            way.append(place)
    return way


class Climbed(NamedTuple):
    """What a target said of trees.

    Args:
        passed: ``[R][..]`` the nodes that stay, one behind the other.
        token: ``[R]`` what comes next in each row, -1 where the target's scores are no law.
        seconds: that judging took beside the pass.
    """

    passed: list[list[int]]
    token: list[int]
    seconds: float


class Growing(NamedTuple):
    """How far a row's tree grows (:meth:`specdec_fast.branching.Branching.growing`).

    Args:
        deepest, most: levels and nodes at most.
        sure: how often a node follows its parent, by the level of the drafter's confidence.
        worth: what the chances of a level's nodes must come to for another level to be drafted.
    """

    deepest: int
    most: int
    sure: list[float]
    worth: list[float]


class Grown(NamedTuple):
    """What a drafter wrote, ``R`` rows of ``N`` nodes.

    Args:
        entries: ``[R][N]`` the logit of each node.
        parents: ``[R][N]`` the place of each one's parent, -1: the text.
        levels: ``[R][N]`` of the confidence in each.
        behind: ``[R][N]`` the number of the law that what is behind each was drawn from, -1: none.
        passes: ``[R]`` that each tree took.
        laws: that nodes were drawn from; None: they were not.
    """

    entries: list[list[int]]
    parents: list[list[int]]
    levels: list[list[int]]
    behind: list[list[int]]
    passes: list[int]
    laws: Laws | None


def climb(
    lean: LeanModel,
    first: list[int],
    tree: Tree,
    places: list[int],
    start: list[int],
    hidden: list[int],
    cache: RaggedCache,
    climbing: Climbing,
    seed: list[int],
    position: list[int],
) -> Climbed:
    """Feeds each row a token and a tree behind it, and goes up the tree as far as the target's own tokens are in it.

    A node's scores are bit for bit what :meth:`specdec_fast.lean.LeanModel.read` gives for the text down to it. In the
    cache the nodes passed stand behind the first token, and nothing else does.

    Args:
        first: the token of each of the ``R`` rows that stands before its tree.
        places, start, hidden: as for :meth:`specdec_fast.lean.LeanModel.read`.
        climbing: how the target draws its own tokens.
        seed, position: ``[R]``, of the numbers' keys.
    """
    count = [len(tokens) for tokens in tree.tokens]
    rows, most, origin = len(count), max(count), tree.origin
    session = lean.session(cache, max(start) + most + 1)
    temperature, top_k, top_p, min_p, drawn = climbing
    board = [session.number, rows, most, top_k, number_of(tree.memory)]
    board += [0] * 5 if origin is None or not drawn else _addresses(origin)
    for line in (first, count, places, start, hidden, seed, position):
        board += line
    board += level(tree.tokens, most) + level(tree.parents, most)
    if origin is not None and drawn:
        board += origin.roots + level(origin.entries, most) + level(origin.behind, most)
    said = session.told("climb", board, [temperature, top_p, min_p], rows * (2 + most) + 2)
    first_place = 2 * rows
    passed = [said[first_place + r * most : first_place + r * most + n] for r, n in enumerate(said[:rows])]
    return Climbed(passed, said[rows : 2 * rows], 1e-9 * said[-1])


def _addresses(origin: Origin) -> list[int]:
    laws, table = origin.laws, origin.table
    assert laws.room is not None
    return [*laws.room.at, 0 if table is None else table.at, laws.shape[0] * laws.shape[1], laws.shape[2]]


def branch(
    lean: LeanModel,
    texts: list[list[int]],
    places: list[int],
    start: list[int],
    hidden: list[int],
    cache: RaggedCache,
    choosing: Choosing,
    choices: Choices | None,
    index: Index | None,
    growing: list[Growing],
    least: float,
    seed: list[int],
    position: list[int],
    memory: Memory | None = None,
    drawn: bool = False,
) -> Grown:
    """Feeds each row its text, then drafts a tree behind it, level by level.

    Behind a node come the likeliest tokens at temperature 0, else the first ones of a race run with the target's
    numbers of that position, or draws without replacement. What is in the cache behind the texts is nothing afterwards.

    Args:
        texts, places, start, hidden: as for :meth:`specdec_fast.lean.LeanModel.read`.
        choosing: by what law; its confidence is not looked at.
        choices, index: the drafter's and the target's id of each logit; None: its place.
        growing: of each row, how far.
        least: chance of a node that is kept.
        seed, position: ``[R]``, of the numbers' keys.
        memory: mends the logits, by the rows' ``places``.
        drawn: nodes are draws, whose levels of confidence are :data:`specdec_fast.branching.DRAWN`'s.
    """
    rows, most = len(texts), max(one.most for one in growing)
    lengths = [len(text) for text in texts]
    ends = (first + n + one.deepest * one.most for first, n, one in zip(start, lengths, growing, strict=True))
    session, tokens = lean.session(cache, max(ends)), joined(texts)
    addresses = [0 if choices is None else choices.at, 0 if index is None else index.at]
    board = [session.number, rows, len(tokens), len(growing[0].sure), choosing.top_k, *addresses]
    board.append(number_of(memory))
    laws = None
    if drawn:  # a law behind the text, and at most one behind each node
        room = session.room(rows * (most + 1), lean.width)
        laws = room.laws((rows, most + 1, lean.width))
        board += [*room.at, most + 1]
    else:
        board += [0, 0, 0]
    for line in (lengths, places, start, hidden, [g.deepest for g in growing], [g.most for g in growing]):
        board += line
    board += seed + position + tokens
    reals = [choosing.temperature, choosing.top_p, choosing.min_p, least]
    for one in growing:
        reals += one.sure + one.worth
    said = session.told("branch", board, reals, rows * (2 + 4 * most) + 1)
    lists = [said[at : at + n] for at, n in zip(range(2 * rows, len(said) - 1, most), said[:rows] * 4, strict=True)]
    entries, parents, levels, behind = (lists[first : first + rows] for first in range(0, 4 * rows, rows))
    return Grown(entries, parents, levels, behind, said[rows : 2 * rows], laws)
