"""The law of what the production code outputs, computed and not sampled.

`laws_of` runs the production code on numbers of its own choice, takes down where each of them is compared, and splits
the number's interval there: the run goes on in the cell its number lies in, the other cells are runs still to be made.
An output has the probability of its cells. A number that is met twice (its key was drawn again) is split inside the
cell it already has, so that a number used twice is conditioned on as it is in production. Nothing here knows what a
drafter or a rule does with its numbers. They are sealed: they may be moved about, but looking at one in any way but the
known ones raises.

`laws_on_a_grid` lets every number take each of ``2^bits`` values, as Philox's take each of 2^53. Where all
probabilities are multiples of ``2^-bits`` the law is exact too, and it hangs on how a number equal to an edge is
decided.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from specdec_fast import reference
from specdec_fast.randomness import Purpose, UniformSource
from specdec_fast.walk import Masses, Rest

__all__ = ["Law", "Run", "Tokens", "laws_of", "laws_on_a_grid"]

Key = tuple[int, int, int, Purpose, int]  # row of the case, position, offset, purpose, trial
Tokens = tuple[int, ...]
Run = Callable[[list[Tokens], list[int], UniformSource], list[Tokens]]
"""Production: prompts and seeds, one a row, and the source of numbers; what each row outputs."""
Fault = Callable[[UniformSource], UniformSource]

WIDTH = 4096  # rows of a call at most
THIN = 1e-13  # a cell or a run less probable than this is left out, and counted


@dataclass
class Law:
    """What came out, one tuple of tokens a row of the case, with its probability.

    Args:
        mass: of each output.
        lost: probability of the runs left out.
        runs: how many runs there were.
    """

    mass: dict[tuple[Tokens, ...], float] = field(default_factory=dict)
    lost: float = 0.0
    runs: int = 0

    def add(self, output: tuple[Tokens, ...], mass: float) -> None:
        self.mass[output] = self.mass.get(output, 0.0) + mass
        self.runs += 1


@dataclass
class Branch:
    """A run to be made: its numbers must lie in these cells.

    Args:
        case: which case.
        cells: low and high end by key; a number that is not there may lie anywhere in (0, 1).
        mass: product of the cells' sizes.
    """

    case: int
    cells: dict[Key, tuple[float, float]] = field(default_factory=dict)
    mass: float = 1.0


class _Numbers(ABC):
    """A source for runs that go on side by side, ``rows`` rows each: row r of run k has seed ``k rows + r``."""

    def __init__(self, branches: list[Branch], rows: int, generator: random.Random):
        self.branches, self._rows, self._random = branches, rows, generator
        self._values: list[dict[Key, float]] = [{} for _ in branches]
        self.pending: list[Branch] = []
        self.lost = [0.0] * len(branches)

    def uniform(self, seed: Tensor, position: Tensor, offset: Tensor, purpose: Purpose, trial: int = 0) -> Tensor:
        seed, position, offset = torch.broadcast_tensors(seed, position, offset)
        keys = zip(*(key.reshape(-1).tolist() for key in (seed, position, offset)), strict=True)
        numbers = []
        for row, place, step in keys:
            run, part = divmod(row, self._rows)
            key = (part, place, step, purpose, trial)
            value = self._values[run].get(key)
            if value is None:
                value = self._values[run][key] = self._new(run, key)
            numbers.append(value)
        return self._handed_out(torch.tensor(numbers, dtype=torch.float64).reshape(seed.shape))

    @abstractmethod
    def _new(self, run: int, key: Key) -> float:
        """The number of a key that a run meets for the first time."""

    def _handed_out(self, numbers: Tensor) -> Tensor:
        return numbers


class _Cells(_Numbers):
    """Numbers anywhere in their cells, no two alike: a number tells its run and its key."""

    def __init__(self, branches: list[Branch], rows: int, generator: random.Random):
        super().__init__(branches, rows, generator)
        self._owner: dict[float, tuple[int, Key]] = {}

    def _new(self, run: int, key: Key) -> float:
        low, high = self.branches[run].cells.get(key, (0.0, 1.0))
        value = low
        while not low < value < high or value in self._owner:
            value = low + (high - low) * self._random.uniform(0.2, 0.8)
        self._owner[value] = run, key
        return value

    def _handed_out(self, numbers: Tensor) -> Tensor:
        sealed = numbers.as_subclass(_Sealed)
        sealed.source = self
        return sealed

    def compare(self, number: float, edges: Sequence[float]) -> None:
        """Takes note that a decision hangs on between which of the edges the number lies."""
        run, key = self._owner[number]
        branch = self.branches[run]
        low, high = branch.cells.get(key, (0.0, 1.0))
        inner = [edge for edge in edges if low < edge < high]
        if not inner:
            return
        rest = branch.mass / (high - low)
        own = low, high
        for cell in itertools.pairwise((low, *sorted(inner), high)):
            size = cell[1] - cell[0]
            if cell[0] <= number < cell[1]:
                own = cell
            elif size <= THIN or rest * size <= THIN:
                self.lost[run] += rest * size
            else:
                self.pending.append(Branch(branch.case, {**branch.cells, key: cell}, rest * size))
        branch.cells[key] = own
        branch.mass = rest * (own[1] - own[0])


class _Grid(_Numbers):
    """Numbers on the grid of ``max(n, 1/2) / size``, n from 0 to size - 1; a cell is one of them."""

    def __init__(self, branches: list[Branch], rows: int, generator: random.Random, *, size: int):
        super().__init__(branches, rows, generator)
        self.size = size

    def _new(self, run: int, key: Key) -> float:
        branch = self.branches[run]
        points = [max(n, 0.5) / self.size for n in range(self.size)]
        if key not in branch.cells:
            mass = branch.mass / self.size
            for point in points[1:]:
                self.pending.append(Branch(branch.case, {**branch.cells, key: (point, point)}, mass))
            branch.cells[key], branch.mass = (points[0], points[0]), mass
        return branch.cells[key][0]


_MOVING = {
    torch.Tensor.__getitem__,
    torch.Tensor.cpu,
    torch.Tensor.expand,
    torch.Tensor.gather,
    torch.Tensor.index_select,
    torch.Tensor.ndim.__get__,
    torch.Tensor.numel,
    torch.Tensor.reshape,
    torch.Tensor.shape.__get__,
    torch.Tensor.squeeze,
    torch.Tensor.to,
    torch.Tensor.unsqueeze,
    torch.Tensor.view,
}


class _Sealed(Tensor):
    """Numbers that may be moved, and compared by ``<``, but not looked at."""

    source: _Cells

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number = args[0]
        plain = number.as_subclass(Tensor) if isinstance(number, cls) else None
        if plain is not None and function in _MOVING:
            with torch._C.DisableTorchFunctionSubclass():
                moved = function(plain, *args[1:], **(kwargs or {}))
            if isinstance(moved, Tensor):
                moved = moved.as_subclass(cls)
                moved.source = number.source
            return moved
        if plain is not None and function is torch.Tensor.tolist and plain.ndim == 1:
            return [_SealedFloat(value, number.source) for value in plain.tolist()]
        if plain is not None and function in (torch.Tensor.__lt__, torch.Tensor.lt):
            edges = torch.as_tensor(args[1], dtype=torch.float64).expand(plain.shape).unsqueeze(-1)
            return _decide(plain, number.source, edges, lambda u: u < args[1])
        raise AssertionError(f"a random number was looked at by {getattr(function, '__qualname__', function)}")


@dataclass(frozen=True)
class _SealedFloat:
    """One such number on the host; only `_watched` operations take it."""

    value: float
    source: _Cells


def _decide(u: Tensor, source: _Cells, edges: Tensor, decision: Callable[[Tensor], Tensor]) -> Tensor:
    """A decision on numbers, after taking down its edges.

    The edges are what the enumerator believes; that the decision is the same all over each number's cell is tested.

    Args:
        u: ``[...]``.
        edges: ``[..., E]`` where on (0, 1) the decision may change, ascending.
    """
    edges = torch.nn.functional.pad(edges.nan_to_num(nan=1.0), (1, 1)).clamp(0.0, 1.0)
    edges[..., -1] = 1.0
    low = torch.where(edges <= u.unsqueeze(-1), edges, 0.0).amax(-1)
    high = torch.where(edges > u.unsqueeze(-1), edges, 1.0).amin(-1)
    decided = decision(u)
    margin = ((high - low) * 1e-9).clamp(min=1e-12)
    for end in (low + margin, high - margin):
        there = decision(torch.where(margin < (high - low) / 4, end, u))
        assert torch.equal(there, decided), "a decision changes where no edge was expected"
    for number, row in zip(u.reshape(-1).tolist(), edges.reshape(-1, edges.shape[-1]).tolist(), strict=True):
        source.compare(number, row)
    return decided


def _watched_draw(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def watched(weights: Tensor, u: Tensor) -> Tensor:
        if not isinstance(u, _Sealed):
            return draw(weights, u)
        edges = weights.cumsum(-1)
        inner = (edges / edges[:, -1:])[:, :-1]
        return _decide(u.as_subclass(Tensor), u.source, inner, lambda u: draw(weights, u))

    return watched


def _watched_accept(accept: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def watched(log_p: Tensor, log_q: Tensor, u: Tensor) -> Tensor:
        if not isinstance(u, _Sealed):
            return accept(log_p, log_q, u)
        edges = (log_p - log_q).exp().unsqueeze(-1)
        return _decide(u.as_subclass(Tensor), u.source, edges, lambda u: accept(log_p, log_q, u))

    return watched


def _watched_float(draw: Callable[..., Any], masses: Callable[..., Any]) -> Callable[..., Any]:
    """A draw with one number on the host; ``masses`` gives those of its outcomes, in their order."""

    def watched(law: Any, u: Any, *more: Any) -> Any:
        if not isinstance(u, _SealedFloat):
            return draw(law, u, *more)
        edges = torch.as_tensor(masses(law, *more)).cumsum(-1)
        outcomes: list[Any] = []

        def place(u: Tensor) -> Tensor:
            outcome = draw(law, float(u), *more)
            outcomes.append(outcome)
            return torch.tensor(outcomes.index(outcome))

        number = torch.tensor(u.value, dtype=torch.float64)
        return outcomes[int(_decide(number, u.source, (edges / edges[-1])[:-1], place))]

    return watched


def _masses_of_entries(law: Masses, runs: Any = None) -> Any:
    if runs is None:
        return np.diff(law._edges)
    return law.of(np.concatenate([np.arange(*ends) for ends in zip(runs.start, runs.end, strict=True)]))


def _race(weights: Tensor, u: Tensor) -> Tensor:
    """The winner of a race by one of its numbers, from the law that a winner has (``tests/test_trees.py``).

    A race's numbers are known together or not at all, so one stands for them: what is asked here is what the rounds
    make of it.
    """
    shape = weights.shape
    return reference.draw(weights.reshape(-1, shape[-1]), u[..., 0].reshape(-1)).reshape(shape[:-1])


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Lets the operations that decide open sealed numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "draw", _watched_draw(reference.draw))
        patch.setattr(reference, "accept", _watched_accept(reference.accept))
        patch.setattr(reference, "race", _race)
        patch.setattr(Masses, "draw", _watched_float(Masses.draw, _masses_of_entries))
        patch.setattr(Rest, "draw", _watched_float(Rest.draw, lambda law: law._masses))
        yield


def laws_of(
    run: Run, cases: Sequence[Sequence[Tokens]], *, width: int = WIDTH, fault: Fault = lambda source: source
) -> list[Law]:
    """The law of each case's output.

    Args:
        run: the production code.
        cases: prompts of each case, as many rows in each: the rows of one run, whose joint law is wanted.
        width: rows of a call at most. Runs of all cases share calls.
        fault: wraps the source, to plant a fault in the keys.
    """
    with _watched():
        return _explore(run, cases, _Cells, width, fault)


def laws_on_a_grid(run: Run, cases: Sequence[Sequence[Tokens]], *, bits: int, width: int = WIDTH) -> list[Law]:
    """The same where every number takes ``2^bits`` values; see `laws_of`."""
    return _explore(run, cases, functools.partial(_Grid, size=2**bits), width, lambda source: source)


def _explore(
    run: Run, cases: Sequence[Sequence[Tokens]], kind: Callable[..., _Numbers], width: int, fault: Fault
) -> list[Law]:
    rows = len(cases[0])
    laws = [Law() for _ in cases]
    pending = [Branch(case) for case in range(len(cases))]
    generator = random.Random(0)
    at_once = max(width // rows, 1)
    while pending:
        branches, pending = pending[-at_once:], pending[:-at_once]
        numbers = kind(branches, rows, generator)
        prompts = [prompt for branch in branches for prompt in cases[branch.case]]
        outputs = run(prompts, list(range(len(prompts))), fault(numbers))
        pending += numbers.pending
        for place, branch in enumerate(branches):
            laws[branch.case].add(tuple(outputs[place * rows : (place + 1) * rows]), branch.mass)
            laws[branch.case].lost += numbers.lost[place]
    return laws
