"""What a round's parts cost, and what of a draft is accepted: the table that a call's lookahead is computed from.

A table is frozen when a call begins. It is a constant one, computed from the models' sizes, where results must repeat
(a seed was given); else it holds what was measured in this process (:mod:`specdec_fast.warmup`, and the passes of
earlier calls), kept as long as the models are.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Costs", "Meter", "Observed", "Outlook", "constant_costs", "low", "observed"]

LARGEST_PASS = 64  # positions; beyond them another one costs what the last one did
SAMPLES = 15  # of each kind that are kept, the newest
PACE = 3  # passes of known sizes in a call, from which the machine's pace is told
MEMORY = 64.0  # draft tokens of a position that are remembered of earlier calls
LEAST_DRAFT_COST, MOST_DRAFT_COST = 0.03, 0.5  # in target passes; sizes are a guess that must rule no drafter out
POSITION_COST = 0.05  # another position in a target pass, in passes


@dataclass(frozen=True)
class Costs:
    """What a round's parts cost, all in one unit (measured: seconds; constant: target passes at one position).

    Args:
        score: the target's pass over 1, 2, ... positions.
        step: one draft token.
        start: a draft before its first token, and what verifying one adds to a round.
        read: one token of text that the drafter has not read.
        rest: what every round costs beside these.
        measured: whether a clock had a part in it.
    """

    score: tuple[float, ...]
    step: float = 0.0
    start: float = 0.0
    read: float = 0.0
    rest: float = 0.0
    measured: bool = False

    def scoring(self, positions: int) -> float:
        """The target's pass over so many positions."""
        known = len(self.score)
        if positions <= known:
            return self.score[positions - 1]
        slope = max((self.score[-1] - self.score[0]) / max(known - 1, 1), 0.0)
        return self.score[-1] + slope * (positions - known)

    def round(self, drafted: int) -> float:
        """A round that drafts so many tokens; with none it is plain decoding."""
        draft = self.start + self.step * drafted if drafted else 0.0
        return self.rest + self.scoring(drafted + 1) + draft

    def tree(self, levels: int, nodes: int) -> float:
        """A round that drafts a tree."""
        draft = self.start + self.step * levels if levels else 0.0
        return self.rest + self.scoring(nodes + 1) + draft


@dataclass(frozen=True)
class Outlook:
    """What is known of a pair before a call.

    Args:
        costs: of a round's parts.
        tested, accepted: draft tokens by position in earlier calls.
        sure_tested, sure_accepted: the same by the drafter's confidence, in equal steps from 0 to 1.
    """

    costs: Costs
    tested: tuple[float, ...] = ()
    accepted: tuple[float, ...] = ()
    sure_tested: tuple[float, ...] = ()
    sure_accepted: tuple[float, ...] = ()


def constant_costs(target_size: int, drafter_size: int) -> Costs:
    """A table that is the same on every machine.

    Args:
        target_size, drafter_size: parameters; 0 for a drafter that is no model.
    """
    step = 0.0
    if drafter_size:
        step = min(max(drafter_size / max(target_size, 1), LEAST_DRAFT_COST), MOST_DRAFT_COST)
    score = tuple(1 + POSITION_COST * more for more in range(LARGEST_PASS))
    return Costs(score, step=step, read=step / 8)


def low(samples: Iterable[float]) -> float:
    """The lower quartile: another process on the machine only makes a sample longer, and often several."""
    ordered = sorted(samples)
    return ordered[(len(ordered) - 1) // 4]


@dataclass
class Meter:
    """Takes down what the parts of a call's rounds took; one call's own.

    A round with a first or a long text to read says nothing of an ordinary draft, and is told apart by ``unread``.
    """

    passes: list[tuple[int, float]] = field(default_factory=list)
    """Positions of a target pass, and its seconds."""
    drafts: list[tuple[int, int, float]] = field(default_factory=list)
    """Tokens drafted, tokens the drafter had not read before, and seconds."""
    rests: list[float] = field(default_factory=list)
    """Seconds of a round without a draft beside these."""
    judged: list[float] = field(default_factory=list)
    """The same of a round with one, which is verified."""


class Observed:
    """What was measured of one pair: costs by a clock, acceptance by counting. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._score: dict[int, deque[float]] = {}
        self._draft: dict[int, deque[float]] = {}
        self._read: deque[float] = deque(maxlen=SAMPLES)
        self._rest: deque[float] = deque(maxlen=SAMPLES)
        self._judged: deque[float] = deque(maxlen=SAMPLES)
        self._tested: list[float] = []
        self._accepted: list[float] = []
        self._sure_tested: list[float] = []
        self._sure_accepted: list[float] = []

    def take(self, meter: Meter) -> None:
        """Adds what a call, or a warm-up, has measured."""
        with self._lock:
            self._keep_pace(meter)
            for positions, seconds in meter.passes:
                self._score.setdefault(positions, deque(maxlen=SAMPLES)).append(seconds)
            for drafted, unread, seconds in meter.drafts:
                if drafted and unread <= LARGEST_PASS // 4:
                    self._draft.setdefault(drafted, deque(maxlen=SAMPLES)).append(seconds)
            start, step = _line({n: low(seconds) for n, seconds in self._draft.items()})
            for drafted, unread, seconds in meter.drafts:
                if drafted and unread > LARGEST_PASS // 4 and self._draft:
                    self._read.append(max(seconds - start - step * drafted, 0.0) / unread)
            self._rest.extend(meter.rests)
            self._judged.extend(meter.judged)

    def _keep_pace(self, meter: Meter) -> None:
        """Brings what was measured to the machine's present pace.

        A call seldom runs passes of every size, and a machine may be half as fast as a minute ago. What calls have not
        run of late would be compared at an old pace: if everything but plain passes looked slow, nothing would be
        drafted, and so nothing measured, ever again.
        """
        new: dict[int, list[float]] = {}
        for positions, seconds in meter.passes:
            if positions in self._score:
                new.setdefault(positions, []).append(seconds)
        changes = [low(own) / low(self._score[positions]) for positions, own in new.items() for _ in own]
        if len(changes) < PACE:
            return
        change = statistics.median(changes)
        for samples in (*self._score.values(), *self._draft.values(), self._read):
            for i, seconds in enumerate(samples):
                samples[i] = change * seconds

    def count(
        self, tested: Sequence[float], accepted: Sequence[float], sure: tuple[Sequence[float], Sequence[float]]
    ) -> None:
        """Adds how many draft tokens of each position a call tested and accepted, and the same by confidence."""
        with self._lock:
            for mine, more in (
                (self._tested, tested),
                (self._accepted, accepted),
                (self._sure_tested, sure[0]),
                (self._sure_accepted, sure[1]),
            ):
                mine.extend([0.0] * (len(more) - len(mine)))
                for i, number in enumerate(more):
                    mine[i] += number
            _fade(self._tested, self._accepted)
            _fade(self._sure_tested, self._sure_accepted)

    @property
    def ready(self) -> bool:
        """Whether there is enough for a table: passes of more than one size, and drafts."""
        with self._lock:
            return 1 in self._score and len(self._score) > 1 and bool(self._draft)

    def outlook(self) -> Outlook:
        """A frozen copy, as a call takes it.

        Raises:
            ValueError: there is not enough yet.
        """
        if not self.ready:
            raise ValueError("nothing was measured yet: run a warm-up first")
        with self._lock:
            start, step = _line({n: low(seconds) for n, seconds in self._draft.items()})
            rests = [low(seconds) if seconds else 0.0 for seconds in (self._rest or self._judged, self._judged)]
            costs = Costs(
                _filled({q: low(seconds) for q, seconds in self._score.items()}),
                step=step,
                start=start + max(rests[1] - rests[0], 0.0),
                read=statistics.median(self._read) if self._read else step / 4,
                rest=rests[0],
                measured=True,
            )
        return self.counted(costs)

    def counted(self, costs: Costs) -> Outlook:
        """These costs, and the acceptance of earlier calls."""
        with self._lock:
            counts = self._tested, self._accepted, self._sure_tested, self._sure_accepted
            return Outlook(costs, *map(tuple, counts))


def _fade(tested: list[float], accepted: list[float]) -> None:
    """Old calls count less once there are many."""
    for i, number in enumerate(tested):
        if number > MEMORY:
            accepted[i] *= MEMORY / number
            tested[i] = MEMORY


def _filled(known: dict[int, float]) -> tuple[float, ...]:
    """Every size from 1 to the largest one known: straight lines between those that are.

    Not made monotone: where another kernel takes over, a longer pass may really be the quicker one.
    """
    sizes = sorted(known)
    least = known[sizes[0]]
    table = []
    for low_size, high_size in itertools.pairwise(sizes):
        for size in range(low_size, high_size):
            share = (size - low_size) / (high_size - low_size)
            table.append(max(known[low_size] + share * (known[high_size] - known[low_size]), least))
    return (*table, max(known[sizes[-1]], least))


def _line(known: dict[int, float]) -> tuple[float, float]:
    """``start, step >= 0`` of the line nearest to ``n -> seconds``."""
    if not known:
        return 0.0, 0.0
    if len(known) == 1:
        ((n, seconds),) = known.items()
        return 0.0, seconds / n
    mean_n, mean = statistics.fmean(known), statistics.fmean(known.values())
    spread = sum((n - mean_n) ** 2 for n in known)
    slope = sum((n - mean_n) * (seconds - mean) for n, seconds in known.items()) / spread
    step = min(max(slope, 0.0), mean / mean_n)
    return max(mean - step * mean_n, 0.0), step


class _NoDrafter:
    """Stands for the drafter where there is none."""


_NONE = _NoDrafter()
_Tables = dict[Hashable, Observed]
_kept: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, _Tables]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def observed(target: Any, drafter: Any, shape: Hashable, make: Callable[[], Observed] = Observed) -> Observed:
    """What is known of a pair in a shape (method, rows, form of the pass, ...), kept as long as both models are."""
    with _lock:
        tables = _kept.setdefault(target, weakref.WeakKeyDictionary()).setdefault(
            _NONE if drafter is None else drafter, {}
        )
        return tables.setdefault(shape, make())
