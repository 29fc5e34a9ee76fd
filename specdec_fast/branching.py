"""How far a row's tree grows in its next round (``docs/trees.md``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specdec_fast.costs import Costs, Outlook
from specdec_fast.lookahead import Adaptive, Row, by_confidence
from specdec_fast.trees import Growing

__all__ = ["DRAWN", "Branching", "nodes_for"]

FLAT = 8  # positions of a native pass that take little longer than one
CHANCES = (0.45, 0.2, 0.12, 0.1, 0.08, 0.06, 0.05)  # that a target comes by the best nodes of a tree, roughly
LEAST = 3  # nodes: fewer are no tree


def nodes_for(rows: int) -> int:
    """Nodes of each row's tree at most, for a batch of so many rows."""
    return max(FLAT // rows - 1, LEAST)


class Branching(Adaptive):
    """:class:`Adaptive` for trees: the lookahead is a number of levels, and nodes are drafted where they are worth it.

    A node's chance is the product of what nodes of that confidence are worth on the way down to it. The nodes with the
    best chances stay, as many as the target's pass takes nearly for nothing, and none whose chance does not pay for its
    position; another level is drafted where the chances of the level before say that it pays.

    Args:
        nodes: of a row's tree at most.
        drawn: nodes are draws without replacement: they stay in any case, and so what is chosen is where to draw
            another one. The levels of confidence are then those of :data:`DRAWN`.

    The others are those of :class:`Adaptive`.
    """

    STEPS = 12
    MOST = 8  # levels
    WEIGHT = 12.0  # tested nodes that what is hoped of a confidence is worth

    def __init__(self, rows: int, most: int, outlook: Outlook, *, nodes: int, drawn: bool = False, **more: Any):
        self._nodes = nodes
        self.drawn = drawn
        costs: Costs = outlook.costs
        # A tree has a few nodes in any case: what counts is what more of them cost, not what the first ones do. A
        # slope over few sizes is measured badly; where it is real, the largest pass is as much slower than the smallest
        upper = _slope([costs.scoring(positions) for positions in range(nodes // 2 + 1, nodes + 2)])
        self._position = min(upper, max(costs.scoring(nodes + 1) - costs.scoring(1), 0.0) / nodes)
        super().__init__(rows, min(most, nodes, self.MOST), outlook, **more)
        self._goes_on = True
        self._grown: dict[int, tuple[int, int]] = {}

    def growing(self, row: int, levels: int) -> Growing:
        """How far the row's tree grows.

        Args:
            levels: at most; 0: it does not.
        """
        levels = min(levels, self[row])
        own = self._rows[row]
        sure = [self._sure_acceptance(own, step) for step in range(self.STEPS)]
        worth = [self._worth(own, level) for level in range(1, levels + 1)]
        return Growing(levels, self._nodes, sure, worth)

    def least(self, rows: Sequence[int]) -> float:
        """The chance below which a node of these rows does not pay for its position."""
        speed = min(self._rows[row].speed for row in rows)
        return speed * self._position

    def climbed(self, row: int, levels: int, nodes: int, met: Sequence[tuple[int, bool]]) -> None:
        """Takes note of a round.

        Args:
            levels, nodes: that were drafted, and that the tree has.
            met: of every node that the target came by: the level of the drafter's confidence in it, and whether it
                stayed.
        """
        own = self._rows[row]
        self._grown[row] = levels, nodes
        own.sure.clear()
        for step, stays in met:
            own.sure_tested[step] = self.FADING * own.sure_tested[step] + 1
            own.sure_accepted[step] = self.FADING * own.sure_accepted[step] + stays
            self.sure_tested[step] += 1
            self.sure_accepted[step] += stays

    def _rounds(self, costs: Costs) -> list[float]:
        usual = self._nodes
        if self.drawn:  # as many as pay for their position, so that what a round is held to cost is what its trees do
            least = self._position * (1 + sum(CHANCES)) / costs.tree(3, self._nodes)
            usual = min(sum(chance >= least for chance in CHANCES), usual)
        return [costs.tree(levels, max(levels, usual) if levels else 0) for levels in range(self._most + 1)]

    def _hopes(self, outlook: Outlook) -> list[float]:
        return by_confidence(outlook, DRAWN if self.drawn else HOPES, self.WEIGHT)

    def _spent(self, own: Row, drafted: int) -> float:
        grown = self._grown.pop(self._rows.index(own), None)
        return self._costs.round(drafted) if grown is None else self._costs.tree(*grown)


def _slope(values: Sequence[float]) -> float:
    """Of the line nearest to so many values in a row: single ones are measured badly."""
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    rise = sum((i - middle) * (value - mean) for i, value in enumerate(values))
    return max(rise / sum((i - middle) ** 2 for i in range(len(values))), 0.0)


# What a node is worth by its confidence, whose square root is cut into equal steps
HOPES = tuple(0.9 * ((step + 0.5) / Branching.STEPS) ** 2 for step in range(Branching.STEPS))
# The same of draws: of a first child by its mass, whose square root is cut into eight steps, then of a second, third,
# fourth and later one where those before it are rejected
DRAWN = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 0.25, 0.18, 0.12, 0.08)
