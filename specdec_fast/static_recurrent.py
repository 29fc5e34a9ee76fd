"""Models whose layers keep a state, in passes of fixed shape for the loop on the host.

Keys and values stand in a static cache, and beside them each layer's states in tensors of fixed address, which a pass
reads and writes. What is rolled back, and how, is :class:`~specdec_fast.recurrent.RecurrentRunner`'s: before a pass the
states that its rows go on from are copied there, and behind it those that it made are copied away. A pass has exactly
as many lanes as tokens, since one more would be in the states. Texts of rows that have read nothing yet are read by the
model's own forward over the same cache.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer

from specdec_fast.cache import RaggedCache, RaggedLayer, Window, cache_argument, has_state, multimodal
from specdec_fast.masks import looked_up_positions
from specdec_fast.recurrent import RecurrentRunner, form_of, shares_passes
from specdec_fast.runner import Head, left_align
from specdec_fast.staging import staged
from specdec_fast.states import TENSORS, Row, State, Unit, changed, set_state, state_of
from specdec_fast.static_cache import Place, StaticCache, StaticLayer, capacity_for
from specdec_fast.static_runner import Forward, static_forward
from specdec_fast.trial import alike, trial_ids

__all__ = ["LONGEST", "StaticRecurrentRunner", "StaticUnit", "empty_cache", "why_not_static"]

LONGEST = 32  # tokens of a pass of fixed shape: each number is one to capture


class _Both(LinearAttentionLayer, StaticLayer):  # type: ignore[misc, override]
    """A layer with a state and with keys and values."""

    def __init__(self, window: Window, place: Place, sliding: int | None, number_of_states: int):
        StaticLayer.__init__(self, window, place, sliding)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *keys_and_values: Tensor, **states: Any) -> None:  # type: ignore[override]
        kind: Any = StaticLayer if keys_and_values else LinearAttentionLayer
        kind.lazy_initialization(self, *keys_and_values, **states)


class StaticUnit(StaticCache):
    """A static cache of layers of which some keep a state; what rows have read is :class:`specdec_fast.states.Row`'s.

    Args:
        model: with states.
        sample: a unit of one row of it that has read something: it says of what size states are.
        rows, capacity: as for :class:`StaticCache`.
    """

    def __init__(self, model: PreTrainedModel, sample: Unit, rows: int, capacity: int):
        kinds = zip(sample.cache.layers, DynamicCache(config=model.config).layers, strict=True)
        windows = tuple(getattr(own, "sliding_window", None) for mine, own in kinds if isinstance(mine, RaggedLayer))
        own: dict[str, Any] = {"argument": cache_argument(type(model)), "device": model.device, "windows": windows}
        own["ahead"] = multimodal(model)
        super().__init__(rows, len(windows), capacity=capacity, **own)
        layers: list[Any] = []
        attending = iter(self.ragged)
        given: list[Any] = sample.cache.layers
        for layer in given:
            mine: Any = layer
            if isinstance(layer, RaggedLayer):
                mine = next(attending)
                if has_state(layer):
                    mine = _Both(self.window, self.place, mine.sliding, _number_of(layer))
                if layer.is_initialized and layer.keys is not None:
                    mine.lazy_initialization(layer.keys, layer.values)
            elif has_state(layer):
                mine = LinearAttentionLayer(number_of_states=_number_of(layer))
            layers.append(mine)
        self.ragged = [layer for layer in layers if isinstance(layer, StaticLayer)]
        self.cache = self.handed = Cache(layers=layers)
        self.stateful = [layer for layer in layers if has_state(layer)]
        stateful: list[Any] = [layer for layer in sample.cache.layers if has_state(layer)]
        self.fixed: list[State] = [changed(state_of(layer), partial(_of_rows, rows=rows)) for layer in stateful]
        for mine, layer in zip(self.stateful, stateful, strict=True):
            mine.device, mine.dtype = layer.device, layer.dtype
        self._blank = [state_of(layer) for layer in self.stateful]
        self.own: list[Row] = []
        self.begin(rows)

    put, collect = Unit.put, Unit.collect
    """As :class:`specdec_fast.states.Unit`'s, for passes of the model's own forward."""

    def begin(self, rows: int) -> None:
        """Rows that have read nothing."""
        self.own = [Row([dict(state) for state in self._blank]) for _ in range(rows)]

    def states(self) -> list[Tensor]:
        return [t for state in self.fixed for name in TENSORS for t in state[name].values() if t is not None]

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.states()]

    def forget(self) -> None:
        super().forget()
        self.enter()  # what passes of the model's own have left in the layers
        self.begin(self.rows)

    def take(self, other: StaticCache) -> None:
        super().take(other)
        assert isinstance(other, StaticUnit)
        self.own = other.own

    def hold(self, numbers: Sequence[int], rows: Sequence[Row]) -> None:
        """Copies the states that rows go on from to where a pass reads them."""
        parts = list(self._parts(numbers, rows))
        torch._foreach_copy_([to for to, _ in parts], [own for _, own in parts])

    def give(self, numbers: Sequence[int], rows: Sequence[Row]) -> None:
        """Gives rows copies of what a pass made of their states."""
        for row in rows:
            row.state = [changed(state, lambda made: torch.empty_like(made[:1])) for state in self.fixed]
        parts = list(self._parts(numbers, rows))
        torch._foreach_copy_([own for _, own in parts], [made for made, _ in parts])

    def _parts(self, numbers: Sequence[int], rows: Sequence[Row]) -> Iterator[tuple[Tensor, Tensor]]:
        """Where a pass has rows' states and where the rows have them: many tensors, which are copied in one call."""
        for number, row in zip(numbers, rows, strict=True):
            for fixed, state in zip(self.fixed, row.state, strict=True):
                for here, own in _pairs(fixed, state):
                    yield here[number : number + 1], own

    def enter(self) -> None:
        """Lets the layers read and write the fixed states."""
        for layer, state in zip(self.stateful, self.fixed, strict=True):
            set_state(layer, {name: dict(value) for name, value in state.items()})

    def leave(self) -> None:
        """Sees to it that what the layers made is there: they may have tensors of their own instead."""
        for layer, fixed in zip(self.stateful, self.fixed, strict=True):
            for to, tensor in _pairs(fixed, state_of(layer)):
                if to is not tensor:
                    to.copy_(tensor)

    def repeat(self, source: list[int], target: list[int], columns: int) -> None:
        super().repeat(source, target, columns)
        for one, other in zip(source, target, strict=True):
            self.own[other].follow(self.own[one])


def _number_of(layer: Any) -> int:
    """How many states of each kind a layer keeps."""
    found: int = layer.number_of_states
    return found


def _of_rows(tensor: Tensor, rows: int) -> Tensor:
    return tensor.new_zeros((rows, *tensor.shape[1:]))


def _pairs(fixed: State, state: State) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors of two states of the same layer."""
    for name in TENSORS:
        for index, to in fixed[name].items():
            if to is not None:
                yield to, state[name][index]


class StaticRecurrentRunner(RecurrentRunner):
    """A runner of a model with states over a static cache; other arguments are :class:`Runner`'s.

    Args:
        cache: of :func:`empty_cache`, for at least ``rows`` rows.
        forward: :func:`static_forward`, or a captured form of it.
        room: called before each pass with the columns and lanes it needs, it sees to the cache's size.

    Attributes:
        cache: that its passes work on.
        reader: nobody reads prompts in its place.
    """

    reader = None

    def __init__(
        self,
        model: PreTrainedModel,
        cache: StaticUnit,
        rows: int,
        *,
        forward: Forward = static_forward,
        room: Callable[[int, int], int] | None = None,
        head: Head | None = None,
        **settings: Any,
    ):
        self.cache, self.forward, self._room = cache, forward, room
        super().__init__(model, rows, head=head, joint=True, **settings)
        self._ids, self._places = self.vocabulary or 1 << 60, looked_up_positions(model)

    def _make_caches(self, groups: list[list[int]]) -> list[tuple[list[int], RaggedCache]]:
        (group,) = groups
        self.cache.begin(self.cache.rows)
        self._bind()
        return [(group, self.cache)]

    def _bind(self) -> None:
        self._unit_of: dict[int, Any] = dict.fromkeys(range(self.rows), self.cache)
        self.own = self.cache.own[: self.rows]

    def go_ahead(self, places: list[int]) -> None:
        super().go_ahead(places)
        self.cache.go_ahead(places)

    def move(self, cache: StaticCache, forward: Forward) -> None:
        """Goes on with another cache that holds the same."""
        assert isinstance(cache, StaticUnit)
        self.cache, self.forward = cache, forward
        self._units = [(group, cache) for group, _ in self._units]
        self._bind()

    def _pass(self, rows: list[int], texts: list[list[int]], tail: list[int], embeds: Tensor | None) -> Tensor:
        own, count = [self.own[row] for row in rows], [len(text) for text in texts]
        n = max(count)
        if self._room is not None:
            self._room(max(one.stands for one in self.own) + n, n)
        if n > LONGEST or embeds is not None or not min(one.stands for one in own):
            return super()._pass(rows, texts, tail, embeds)
        for one in own:
            one.mark()
        self.cache.hold(rows, own)
        lines = [[0] * n for _ in range(self.cache.rows)]
        for row, text in zip(rows, texts, strict=True):
            lines[row] = text + text[-1:] * (n - len(text))
        # Rows that take no part write behind what their states have taken in, where it will be overwritten
        start = [one.stands for one in self.cache.own]
        device = self.cache.device
        logits = self.score(staged(lines, device), staged(start, device))
        self.cache.give(rows, own)
        for one in own:
            one.stands += n
        # A copy: a graph's own memory holds the next pass's logits soon
        own_logits = logits.clone() if len(rows) == len(logits) else logits[staged(rows, device)]
        return left_align(own_logits, list(range(n)), count, tail)

    def score(self, tokens: Tensor, start: Tensor) -> Tensor:
        """Feeds ``tokens [B, n]`` of every row of the cache from columns ``start [B]`` and its fixed states on: logits
        ``[B, n, V]``."""
        place = self.cache.place
        place.start.copy_(start)
        place.fixed = True
        try:
            return self.forward(self.model, self.cache, self.head, tokens, None, self._places, self._ids)
        finally:
            place.fixed, place.lanes, place.scaled = False, None, None


@torch.no_grad()
def empty_cache(model: PreTrainedModel, rows: int, capacity: int) -> StaticUnit:
    """A cache for a model that :func:`why_not_static` has nothing against, its buffers allocated."""
    sample = RecurrentRunner(model, 1)
    sample.feed([0], trial_ids(model)[:1, :2], [2], [1])
    unit: Any = sample.caches[0][1]
    return StaticUnit(model, unit, rows, capacity)


_probed: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, str | None]] = weakref.WeakKeyDictionary()
_probing = threading.Lock()


def why_not_static(model: PreTrainedModel) -> str | None:
    """Why a model with states cannot run passes of fixed shape; None where it can. Tried once a model."""
    if not shares_passes(model):
        return f"rows of {type(model).__name__} cannot share passes"
    with _probing:
        found, form = _probed.setdefault(model, {}), form_of(model)
        if form not in found:
            found[form] = _probe(model)
        return found[form]


@torch.no_grad()
def _probe(model: PreTrainedModel) -> str | None:
    name, ids = type(model).__name__, trial_ids(model)
    try:
        static = StaticRecurrentRunner(model, empty_cache(model, 2, capacity_for(32)), 2)
        plain = RecurrentRunner(model, 2)
        for runner in (static, plain):
            runner.feed([0, 1], ids[:, :4], [4, 2], [1, 1])
        # A draft; one of a row alone, behind what was kept; drafts of different lengths; single tokens; a longer draft
        for rows, back, count in (
            ([0, 1], [4, 2], [3, 3]),
            ([1], [5, 5], [2]),
            ([0, 1], [5, 6], [3, 1]),
            ([0, 1], [8, 7], [1, 1]),
            ([0, 1], [9, 8], [9, 9]),
        ):
            tokens = ids.repeat(1, 2)[rows, 1 : 1 + max(count)]
            for runner in (static, plain):
                for row in (0, 1):
                    runner.rollback(row, back[row])
            got, right = (runner.feed(rows, tokens, count, count) for runner in (static, plain))
            for row, n in enumerate(count):
                if not alike(model, right[row, :n], got[row, :n]):
                    return f"{name} gives other logits with a static cache"
    except torch.OutOfMemoryError:
        raise  # says nothing of the model
    except Exception as error:  # what a forward of its own kind can throw
        return f"{name} fails with a static cache ({type(error).__name__})"
    return None
