"""A model whose short passes have fixed shapes: the runner of compiled and captured rounds.

Prompts are read as :class:`~specdec_fast.runner.Runner` reads them. Behind them every pass takes ``n`` tokens of every
row of the cache, at columns that a tensor on the device names, with an explicit mask over the whole cache: no shape and
no branch depends on a value, so the pass can be compiled, captured in a CUDA graph and chained with the next one
without the host looking at anything.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from specdec_fast import attention
from specdec_fast.apart import placed_on_device
from specdec_fast.cache import RaggedCache, cache_argument, keeps_nothing, multimodal, ragged_layers, takes
from specdec_fast.masks import looked_up_positions
from specdec_fast.round_ops import pass_places
from specdec_fast.runner import Head, Runner, left_align, supports_ragged_batches
from specdec_fast.staging import staged
from specdec_fast.static_cache import Place, StaticCache, StaticSource, capacity_for
from specdec_fast.trial import distance, trial_ids

__all__ = ["Forward", "StaticRunner", "empty_cache", "static_forward", "why_not_static"]

Forward = Callable[..., Tensor]


def static_forward(
    model: Any, cache: StaticCache, head: Head | None, tokens: Tensor, lane: Tensor | None, positions: int, ids: int
) -> Tensor:
    """One pass of fixed shape. Pure tensor code over its arguments: what is compiled.

    Args:
        model: the model.
        cache: ``B`` rows; ``place.start`` says where the first lane stands.
        head: replaces the model's LM head.
        tokens: ``[B, n]`` int64; an id that the model does not have is read as another one.
        lane: ``[B]`` int64 whose logits are wanted; None: all.
        positions: how many it can be told; a lane that nobody reads is told one of them.
        ids: how many it can read.

    Returns:
        logits ``[B, n, V]``, or ``[B, V]`` of one lane.
    """
    if cache.source is not None:
        return _with_source(model, cache, cache.source, head, tokens, lane, positions, ids)
    if cache.stateful:
        return _with_states(model, cache, head, tokens, positions, ids)
    place = cache.place
    windows = sorted({window or 0 for window in cache.windows})
    ours = model.config._attn_implementation == attention.NAME
    columns, position_ids, places = pass_places(
        place.start, place.hidden, tokens.shape[1], place.capacity, positions, windows if ours else []
    )
    if place.ahead is not None:
        position_ids = position_ids + place.ahead.unsqueeze(1)
    if ours:
        masks = dict(zip(map(_kind, windows), places.unbind(), strict=True))
    else:
        masks = _masks(model.config, model.dtype, cache, columns, windows)
    if not torch.compiler.is_compiling():  # a compiler sees by itself that it is the same in all layers
        place.lanes = columns
    arguments: dict[str, Any] = {
        "input_ids": tokens.clamp(0, ids - 1),
        "position_ids": position_ids,
        "attention_mask": masks if len(masks) > 1 else next(iter(masks.values())),
        cache.argument: cache.handed,
        "use_cache": True,
        "return_dict": True,
    }
    if head is None:
        logits = model(**arguments).logits
        return logits if lane is None else _pick(logits, lane)
    hidden = model.base_model(**arguments).last_hidden_state
    return head(hidden if lane is None else _pick(hidden, lane))


def _with_states(model: Any, cache: StaticCache, head: Head | None, tokens: Tensor, positions: int, ids: int) -> Tensor:
    """:func:`static_forward` of a model whose layers keep a state (:mod:`specdec_fast.static_recurrent`)."""
    place, windows = cache.place, sorted({window or 0 for window in cache.windows}) or [0]
    columns, position_ids, _ = pass_places(place.start, place.hidden, tokens.shape[1], place.capacity, positions, [])
    place.lanes = columns
    masks: dict[str, Any] = dict(_masks(model.config, model.dtype, cache, columns, windows))
    if len(masks) > 1:  # layers that keep a state have no mask: all columns are of a text
        kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
        masks.update(dict.fromkeys(kinds - set(masks)))
    arguments: dict[str, Any] = {
        "input_ids": tokens.clamp(0, ids - 1),
        "attention_mask": masks if len(masks) > 1 else next(iter(masks.values())),
        cache.argument: cache.handed,
        "use_cache": True,
        "return_dict": True,
    }
    if takes(model, "position_ids"):
        arguments["position_ids"] = position_ids if place.ahead is None else position_ids + place.ahead.unsqueeze(1)
    cache.enter()
    logits: Tensor = (
        model(**arguments).logits if head is None else head(model.base_model(**arguments).last_hidden_state)
    )
    cache.leave()
    return logits


def _with_source(
    model: Any,
    cache: StaticCache,
    source: StaticSource,
    head: Head | None,
    tokens: Tensor,
    lane: Tensor | None,
    positions: int,
    ids: int,
) -> Tensor:
    """:func:`static_forward` of a twin (:mod:`specdec_fast.apart`) of a model that reads what an encoder made.

    Args:
        head: None, or what says that nobody wants logits.
    """
    place, windows = cache.place, sorted({window or 0 for window in cache.windows})
    left_out = place.hidden if source.counted else torch.zeros_like(place.hidden)
    given = place.start, left_out, tokens.shape[1], place.capacity, positions
    columns, position_ids, _ = pass_places(*given, [])
    place.lanes = columns
    prefix, decoder = ("decoder_", model.get_decoder()) if model.config.is_encoder_decoder else ("", model)
    masks = _masks(decoder.config, model.dtype, cache, columns, windows)
    tokens = tokens.clamp(0, ids - 1)
    arguments: dict[str, Any] = {
        f"{prefix}input_ids": tokens,
        f"{prefix}attention_mask": masks if len(masks) > 1 else next(iter(masks.values())),
        **source.arguments(tokens.shape[1], lambda mask: _as_wanted(mask, decoder.config, model.dtype)),
        cache.argument: cache.handed,
        "use_cache": True,
        "return_dict": True,
    }
    if takes(model, f"{prefix}position_ids"):
        arguments[f"{prefix}position_ids"] = position_ids
    wanted = torch.zeros_like(place.start) if head is not None else lane
    most = min(positions, place.capacity)
    with placed_on_device(columns.clamp(max=positions - 1), wanted, most, tokens, source.pad):
        logits: Tensor = model(**arguments).logits
    return logits if lane is None else logits.squeeze(1)


def _pick(values: Tensor, lane: Tensor) -> Tensor:
    """``values [B, n, H]`` at one lane a row: ``[B, H]``."""
    index = lane[:, None, None].expand(-1, 1, values.shape[2])
    return values.gather(1, index).squeeze(1)


def _masks(
    config: Any, dtype: torch.dtype, cache: StaticCache, columns: Tensor, windows: list[int]
) -> dict[str, Tensor]:
    """Explicit masks ``[B, 1, n, capacity]``, one a kind of layer."""
    place: Place = cache.place
    kv = torch.arange(place.capacity, device=columns.device)
    query = columns.unsqueeze(-1)
    # A lane sees itself whatever it is: a row of nothing would turn the softmax into NaN
    seen = (kv <= query) & (kv >= place.hidden[:, None, None]) | (kv == query)
    masks = {}
    for size in windows:
        mask = (seen & (kv > query - size) if size else seen).unsqueeze(1)
        masks[_kind(size)] = _as_wanted(mask, config, dtype)
    return masks


def _as_wanted(mask: Tensor, config: Any, dtype: torch.dtype) -> Tensor:
    """A mask as the attention of a model takes it."""
    if config._attn_implementation != "eager":
        return mask
    return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)


def _kind(window: int) -> str:
    """Transformers' name for layers with such a window, 0: none."""
    return "sliding_attention" if window else "full_attention"


def empty_cache(model: PreTrainedModel, rows: int, capacity: int) -> StaticCache:
    """A static cache for a model that :func:`why_not_static` has nothing against, its buffers allocated."""
    config = model.config.get_text_config(decoder=True)
    layers: list[Any] = DynamicCache(config=config).layers
    some = next(layer for layer in layers if not keeps_nothing(layer))  # no window but those there are
    layers = [some if keeps_nothing(layer) else layer for layer in layers]
    windows = tuple(layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None for layer in layers)
    own: dict[str, Any] = {"argument": cache_argument(type(model)), "device": model.device, "ahead": multimodal(model)}
    cache = StaticCache(rows, len(layers), capacity=capacity, windows=windows, **own)
    # Only a pass tells how many heads of what size and type a layer keeps
    StaticRunner(model, cache, 1).feed([0], torch.zeros((1, 1), dtype=torch.long), [1], [1])
    cache.forget()
    return cache


class StaticRunner(Runner):
    """A :class:`Runner` over a static cache, with passes of fixed shape beside its own.

    Args:
        model: that :func:`why_not_static` has nothing against.
        cache: at least ``rows`` rows; rows behind those take part in passes of fixed shape and mean nothing.
        rows: of the call.
        visible: ``[rows, P]`` bool, padding on the left only.
        prefill_chunk, head, window: as for :class:`Runner`.
        forward: :func:`static_forward`, or a compiled form of it.
        room: called before each pass of :meth:`feed` with the columns and lanes it needs, it sees to the cache's size
            and returns how many lanes to make of them; such a pass, once the prompt is read, has a fixed shape too.
            0 lanes, or None: passes of fixed shape are those of :meth:`score` alone.

    Attributes:
        reader: may read texts of given rows in the place of :meth:`feed`; says whether it did. None: nobody does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: StaticCache,
        rows: int,
        *,
        visible: Tensor | None = None,
        prefill_chunk: int | None = None,
        head: Head | None = None,
        window: int | None = None,
        forward: Forward = static_forward,
        room: Callable[[int, int], int] | None = None,
    ):
        self.cache = cache
        self.forward = forward
        self._room = room
        self.reader: Callable[[StaticRunner, Sequence[int], Sequence[Sequence[int]]], bool] | None = None
        own = {"visible": visible, "prefill_chunk": prefill_chunk, "head": head, "window": window}
        super().__init__(model, rows, **own, joint=True)  # type: ignore[arg-type]
        self._ids, self._places = self.vocabulary or 1 << 60, looked_up_positions(model)
        cache.place.hidden[:rows].copy_(torch.tensor(self.hidden))

    def _make_caches(self, groups: list[list[int]]) -> list[tuple[list[int], RaggedCache]]:
        return [(group, self.cache) for group in groups]

    def move(self, cache: StaticCache, forward: Forward) -> None:
        """Goes on with another cache that holds the same."""
        self.cache, self.forward = cache, forward
        self._units = [(group, cache) for group, _ in self._units]

    def go_ahead(self, places: list[int]) -> None:
        super().go_ahead(places)
        self.cache.go_ahead(places)

    def lend(self, room: Callable[[int, int], int]) -> None:
        """Passes of :meth:`feed` have fixed shapes from here on; ``room`` as in the class."""
        self._room = room

    @property
    def caches(self) -> list[tuple[list[int], RaggedCache]]:
        return [(list(range(self.rows)), self.cache.view(self.rows))]

    @torch.no_grad()
    def feed(
        self,
        rows: Sequence[int],
        tokens: Tensor,
        count: Sequence[int],
        tail: Sequence[int],
        *,
        embeds: Tensor | None = None,
    ) -> Tensor:
        """:meth:`Runner.feed`; long texts go to the reader, if there is one, but for lanes whose logits are wanted."""
        longest, end = max(count), max(self.length[row] for row in rows) + max(count)
        if self._room is not None and self.reader is not None and embeds is None and not self._room(end, longest):
            heads = [c - t for c, t in zip(count, tail, strict=True)]
            lines = [line[:c] for line, c in zip(tokens.tolist(), count, strict=True)]
            if self.reader(self, rows, [line[:head] for line, head in zip(lines, heads, strict=True)]):
                rest = [line[head:] for line, head in zip(lines, heads, strict=True)]
                tokens = staged([line + [0] * (max(tail) - len(line)) for line in rest], tokens.device)
                count = tail
        return super().feed(rows, tokens, count, tail, embeds=embeds)

    def _forward(
        self,
        unit: RaggedCache,
        rows: list[int],
        places: list[int],
        tokens: Tensor,
        count: list[int],
        tail: list[int],
        embeds: Tensor | None,
        lean: bool,
    ) -> Tensor:
        lanes = self._lanes([self.length[row] for row in rows], tokens.shape[1])
        if not lanes or embeds is not None:
            return super()._forward(self.cache, rows, places, tokens, count, tail, embeds, lean)
        # Rows that take no part write behind their own text, where it will be overwritten
        everyone = tokens.new_zeros((self.cache.rows, lanes))
        some = slice(self.rows) if len(rows) == self.rows else staged(rows, tokens.device)
        everyone[some, : tokens.shape[1]] = tokens
        first = [*self.length, *[0] * (self.cache.rows - self.rows)]
        logits = self.score(everyone, staged(first, tokens.device))
        for row, advance in zip(rows, count, strict=True):
            self.length[row] += advance
        # A copy: a graph's own memory holds the next pass's logits soon
        own = logits[some].clone() if isinstance(some, slice) else logits[some]
        return left_align(own, list(range(lanes)), count, tail)

    def _lanes(self, start: list[int], tokens: int) -> int:
        """Lanes of a pass of fixed shape over so many tokens behind ``start``; 0 where it has none."""
        lanes = 0 if self._room is None else self._room(max(start) + tokens, tokens)
        return lanes if min(start) else 0

    def score(
        self, tokens: Tensor, start: Tensor, lane: Tensor | None = None, *, forward: Forward | None = None
    ) -> Tensor:
        """Feeds ``tokens [B, n]`` of every row of the cache from columns ``start [B]`` on.

        What stood there is overwritten, so a row rolls back by starting earlier.

        Args:
            lane: ``[B]``, the lane whose logits are wanted; None: all.
            forward: for this pass.

        Returns:
            ``[B, n, V]``, or ``[B, V]``.
        """
        run = self.forward if forward is None else forward
        place = self.cache.place
        place.start.copy_(start)
        place.fixed = True
        try:
            return run(self.model, self.cache, self.head, tokens, lane, self._places, self._ids)
        finally:
            place.fixed, place.lanes, place.scaled = False, None, None


_probed: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, str | None]] = weakref.WeakKeyDictionary()
_probing = threading.Lock()


def why_not_static(model: PreTrainedModel) -> str | None:
    """Why a model cannot run passes of fixed shape; None where it can. Tried once a model against a plain pass."""
    with _probing:
        found = _probed.setdefault(model, {})
        implementation = str(model.config._attn_implementation)  # can be changed on a loaded model
        if implementation not in found:
            found[implementation] = _probe(model, implementation)
        return found[implementation]


@torch.no_grad()
def _probe(model: PreTrainedModel, implementation: str) -> str | None:
    name = type(model).__name__
    if ragged_layers(model.config) is None:
        return f"{name} has layers with a state, which no pass of fixed shape rolls back"
    if not supports_ragged_batches(model):
        return f"{name} with {implementation} attention takes no mask that a static cache needs"
    ids = trial_ids(model)
    visible = torch.tensor([[True, True, True], [False, True, True]])
    try:
        runner = StaticRunner(model, empty_cache(model, 2, capacity_for(8)), 2, visible=visible)
        runner.feed([0, 1], ids[:, :3], [3, 3], [1, 1])
        start = torch.full((2,), 3, device=model.device)
        runner.score(ids[:, 1:4], start)  # what is written over
        got = runner.score(ids[:, 3:], start)
        for row, text in enumerate((ids[:1], ids[1:, 1:])):
            plain = model(input_ids=text, use_cache=False).logits[0, -4:]
            if not distance(plain, got[row]) <= 1:
                return f"{name} gives other logits with a static cache"
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        return f"{name} fails with a static cache ({type(error).__name__})"
    return None
