"""What a row of a model with states has read: its states, older ones to go back to, and the cache of several rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from specdec_fast.cache import RaggedCache, RaggedLayer, Window, has_state, keeps_nothing

__all__ = ["TENSORS", "Row", "State", "Unit", "changed", "layers_of", "row_of", "set_state", "side_by_side", "state_of"]

SPARE = (8, 32)  # tokens of a block: the first state of each of the last two is kept, for texts that change behind it
NEAR = 16  # steps of a draft whose states are all kept; behind them one in eight is
TENSORS = ("conv_states", "recurrent_states")
FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size")


class _Both(LinearAttentionLayer, RaggedLayer):  # type: ignore[misc, override]
    """A layer with a state and with keys and values."""

    def __init__(self, window: Window, number_of_states: int):
        RaggedLayer.__init__(self, window)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *keys_and_values: Tensor, **states: Any) -> None:  # type: ignore[override]
        kind: Any = RaggedLayer if keys_and_values else LinearAttentionLayer
        kind.lazy_initialization(self, *keys_and_values, **states)


def layers_of(config: Any, window: Window) -> list[Any] | None:
    """A row's layers, None where one of them is of another kind, or none has a state."""
    made: list[Any] = []
    layers: list[Any] = DynamicCache(config=config).layers
    for layer in layers:
        kind: Any = type(layer)
        if kind in (DynamicLayer, DynamicSlidingWindowLayer):
            made.append(RaggedLayer(window))
        elif kind in (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer):
            made.append(_Both(window, layer.number_of_states))
        elif kind is LinearAttentionLayer or keeps_nothing(layer):
            made.append(layer)
        else:
            return None
    return made if any(map(has_state, made)) else None


State = dict[str, dict[int, Any]]


def state_of(layer: Any) -> State:
    return {name: dict(getattr(layer, name)) for name in (*TENSORS, *FLAGS)}


def set_state(layer: Any, state: State) -> None:
    for name, value in state.items():
        setattr(layer, name, value)


def changed(state: State, change: Callable[[Tensor], Tensor]) -> State:
    """A state with other tensors."""
    copy: State = {name: dict(value) for name, value in state.items()}
    for name in TENSORS:
        copy[name] = {i: None if tensor is None else change(tensor) for i, tensor in state[name].items()}
    return copy


def row_of(tensor: Tensor, row: int, alone: bool = False) -> Tensor:
    return tensor if alone else tensor[row : row + 1].clone()


def side_by_side(states: list[State]) -> State:
    """Copies of several rows' states, side by side. All of them have read something, or none."""
    joined: State = {name: dict(value) for name, value in states[0].items()}
    for name in TENSORS:
        for i, tensor in joined[name].items():
            joined[name][i] = None if tensor is None else torch.cat([state[name][i] for state in states])
    return joined


class _Mark(NamedTuple):
    """What a row's states were behind its first ``length`` tokens, one for each layer that has one."""

    length: int
    states: list[State]


class Row:
    """One row: what it has read, its states, and older ones.

    Tokens are counted without padding here, which is never fed: a state would take it in. The tensors of a state are
    never written to: a pass gets copies.
    """

    def __init__(self, blank: list[State]):
        self.tokens: list[int] = []  # -1: not known, and never to be read again
        self.stands = 0
        """How many tokens the states have taken in."""
        self.anchor = 0
        """What is behind so many tokens may go."""
        self.state = blank
        self.marks: list[_Mark] = []
        self._first = _Mark(0, blank)

    def mark(self) -> None:
        """Keeps the states as they are, and no older ones than may be needed."""
        if not self.marks or self.marks[-1].length < self.stands:
            self.marks.append(_Mark(self.stands, self.state))
        before = [mark.length for mark in self.marks if mark.length <= self.anchor]
        kept = set(before[-1:])
        for size in SPARE:
            first = {length // size: length for length in reversed(before)}
            kept.update(sorted(first.values())[-2:])
        drafted: dict[int, int] = {}  # the first of each eight
        for mark in self.marks:
            if mark.length > self.anchor:
                drafted.setdefault(mark.length // SPARE[0], mark.length)
        kept.update(drafted.values())
        near = range(self.anchor, self.anchor + NEAR + 1)
        self.marks = [mark for mark in self.marks if mark.length in kept or mark.length in near]

    def go_back(self, length: int) -> list[int]:
        """Puts states back that hold none of the tokens behind ``length``; returns those up to there that they lack.

        Raises:
            RuntimeError: these are not known.
        """
        if self.stands <= length:
            return []
        while self.marks and self.marks[-1].length > length:
            self.marks.pop()
        mark = self.marks[-1] if self.marks else self._first
        if mark.length > length:
            raise RuntimeError("a row cannot be rolled back into a text that was given as a cache or as embeddings")
        missing = self.tokens[mark.length : length]
        self.stands, self.state = mark
        return missing

    def begin(self, length: int, state: list[State]) -> None:
        """Starts behind a text that cannot be read again, whose tokens are not known."""
        self.tokens, self.stands, self.anchor, self.state, self.marks = [-1] * length, length, length, state, []
        self._first = _Mark(length, state)

    def follow(self, other: Row) -> None:
        """Takes over what another row has read."""
        self.tokens, self.stands, self.anchor = list(other.tokens), other.stands, other.anchor
        self.state, self.marks, self._first = other.state, [], other._first


class Unit(RaggedCache):
    """The cache of rows that share passes; ``[R]`` of them have a state each."""

    def __init__(self, config: Any, rows: int):
        super().__init__(rows, 0)
        layers = layers_of(config, self.window)
        assert layers is not None
        self.cache = Cache(layers=layers)
        self.stateful = [layer for layer in layers if has_state(layer)]
        self.own = [Row([state_of(layer) for layer in self.stateful]) for _ in range(rows)]

    def put(self, rows: list[Row]) -> None:
        """Gives the layers copies of some rows' states, side by side."""
        for index, layer in enumerate(self.stateful):
            set_state(layer, side_by_side([row.state[index] for row in rows]))

    def collect(self, rows: list[Row]) -> None:
        """Gives the rows what the layers have made of their states."""
        states = [state_of(layer) for layer in self.stateful]
        for number, row in enumerate(rows):
            row.state = [changed(state, partial(row_of, row=number, alone=len(rows) == 1)) for state in states]

    def repeat(self, source: list[int], target: list[int], columns: int) -> None:
        super().repeat(source, target, columns)
        for layer in self.cache.layers:
            if isinstance(layer, RaggedLayer) and layer.keys is not None and layer.values is not None:
                for buffer in (layer.keys, layer.values):
                    buffer[target, :, :columns] = buffer[source, :, :columns]
        for one, other in zip(source, target, strict=True):
            self.own[other].follow(self.own[one])
