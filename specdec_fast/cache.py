"""A key-value cache whose rows have lengths of their own.

Every row writes where its own text ends and rolls back by lowering a number: nothing is copied, cropped or
concatenated. Column ``c`` of a row holds its ``c``-th column of ``sequences``, so a cache given back to the caller
matches them column by column.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionCacheLayerMixin,
)

__all__ = [
    "CACHE_NAMES",
    "RaggedCache",
    "cache_argument",
    "cache_of",
    "check_cache",
    "columns_of",
    "empty",
    "given_cache",
    "has_state",
    "keeps_nothing",
    "multimodal",
    "ragged_layers",
    "read_cache",
    "takes",
    "write_cache",
]

CACHE_NAMES = ("cache", "past_key_values")  # since Transformers 5.24, and before
GROWTH = 256  # columns a buffer grows by at least, so that growing costs one copy in hundreds of tokens


def cache_argument(kind: Any) -> str:
    """What the forward of a class of models or layers calls its cache; empty where it takes none."""
    return _cache_argument(kind)


@functools.cache
def _cache_argument(kind: Any) -> str:
    return next((name for name in CACHE_NAMES if name in _parameters(kind)), "")


@functools.cache
def _parameters(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def takes(model: Any, argument: str) -> bool:
    """Whether a model's forward has an argument of this name."""
    kind: Any = type(model)
    return argument in _parameters(kind)


def multimodal(model: Any) -> bool:
    """Whether a decoder-only model's text is a part of what it reads."""
    config = model.config
    return not config.is_encoder_decoder and config.get_text_config(decoder=True) is not config


def cache_of(output: Any) -> Any:
    """The cache in what a model or ``generate`` returns."""
    return output.cache if hasattr(output, "cache") else output.past_key_values


def given_cache(arguments: dict[str, Any]) -> tuple[str, Any]:
    """A caller's cache among keyword arguments, and by which name; None where there is none."""
    return next(((n, arguments[n]) for n in CACHE_NAMES if arguments.get(n) is not None), (CACHE_NAMES[0], None))


@dataclass
class Window:
    """Where the next forward pass writes, shared by all layers of a cache.

    Args:
        rows: ``[R]`` int64 rows of the cache that take part, None where all do.
        start: first column written; per row ``[R, n]`` columns are in ``columns`` where rows differ.
        columns: ``[R, n]`` int64, None where every row writes at ``start``.
        end: columns the attention sees: one more than the last written.
        total_rows: rows of the whole cache.
        most: columns that no row grows beyond, 0: unknown. Buffers are made no longer without need.
        grown: how often buffers were made anew.
        model: whose cache it is, by name.
    """

    rows: Tensor | None = None
    start: int = 0
    columns: Tensor | None = None
    end: int = 0
    total_rows: int = 0
    most: int = 0
    grown: int = 0
    model: str = "the model"

    @property
    def lanes(self) -> int:
        return self.end - self.start if self.columns is None else self.columns.shape[1]


class RaggedLayer(CacheLayerMixin):
    """One layer: ``[B, heads, capacity, head_dim]`` keys and values, grown when needed."""

    is_croppable = True
    is_sliding = False

    def __init__(self, window: Window):
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self._empty(key_states, 0)
        self.values = self._empty(value_states, 0)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes keys and values ``[R, heads, n, head_dim]`` of a pass, and gives those its attention reads.

        Raises:
            ValueError: they are not of the tokens that the pass was given.
        """
        if key_states.shape[2] != self.window.lanes:
            raise ValueError(
                f"{self.window.model} keeps {key_states.shape[2]} keys of {self.window.lanes} tokens, so its cache "
                "cannot be rolled back to one of them: use model.generate for it"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.keys = keys = self._write(self.keys, key_states)
        self.values = values = self._write(self.values, value_states)
        return self._read(keys), self._read(values)

    def get_seq_length(self) -> int:
        return self.window.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.start + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        raise RuntimeError("a ragged cache is rolled back through its rows' lengths")

    @property
    def room(self) -> int:
        """Columns the buffers hold."""
        return self.keys.shape[2] if self.keys is not None else 0

    def reserve(self, end: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Makes room for the columns below ``end``, for a pass that writes into the buffers itself."""
        if not self.is_initialized:
            none = torch.empty((0, heads, 0, dim), dtype=dtype, device=device)
            self.lazy_initialization(none, none)
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self._grown(self.keys, end), self._grown(self.values, end)

    def _grown(self, buffer: Tensor, end: int) -> Tensor:
        if end <= buffer.shape[2]:
            return buffer
        size = max(end, buffer.shape[2] * 3 // 2) + GROWTH
        if end <= self.window.most:
            size = min(size, self.window.most)
        grown = self._empty(buffer, size)
        grown[:, :, : buffer.shape[2]] = buffer
        return grown

    def _empty(self, states: Tensor, columns: int) -> Tensor:
        self.window.grown += 1
        # Zeros, not garbage: a column nobody wrote is masked, but 0 * NaN in the attention's sum would still be NaN
        _, heads, _, dim = states.shape
        return states.new_zeros((self.window.total_rows, heads, columns, dim))

    def _write(self, buffer: Tensor, states: Tensor) -> Tensor:
        window = self.window
        buffer = self._grown(buffer, window.end)
        if window.columns is None:
            span = slice(window.start, window.start + states.shape[2])
            if window.rows is None:
                buffer[:, :, span] = states
            else:
                buffer[window.rows.to(states.device), :, span] = states
        else:
            rows = torch.arange(states.shape[0]) if window.rows is None else window.rows
            place = rows.to(states.device).unsqueeze(1), slice(None), window.columns.to(states.device)
            buffer[place] = states.transpose(1, 2)
        return buffer

    def _read(self, buffer: Tensor) -> Tensor:
        seen = buffer[:, :, : self.window.end]
        return seen if self.window.rows is None else seen[self.window.rows.to(seen.device)]


@dataclass
class RaggedCache:
    """The cache of one model for ``rows`` rows, as the object the model's forward takes plus its window."""

    rows: int
    layer_count: int
    window: Window = field(default_factory=Window)
    cache: Cache = field(init=False)
    ragged: list[RaggedLayer] = field(init=False)
    session: Any = None
    """What native passes keep of it between them (:mod:`specdec_fast.lean`)."""

    def __post_init__(self) -> None:
        self.window.total_rows = self.rows
        self.ragged = [RaggedLayer(self.window) for _ in range(self.layer_count)]
        self.cache = Cache(layers=list(self.ragged))

    def repeat(self, source: list[int], target: list[int], columns: int) -> None:
        """Copies the first columns of some rows to others, pair by pair."""
        for layer in self.ragged:
            for buffer in (layer.keys, layer.values):
                if layer.is_initialized and buffer is not None:
                    buffer[target, :, :columns] = buffer[source, :, :columns]


def ragged_layers(config: Any) -> int | None:
    """How many cache layers a model of this configuration needs, None where one of them is not attention.

    Layers with a recurrent state (Mamba, RWKV, linear attention) or an index of their own cannot roll back to an
    earlier column by themselves.
    """
    layers = [layer for layer in DynamicCache(config=config).layers if not keeps_nothing(layer)]
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return len(DynamicCache(config=config).layers) if plain and layers else None


def columns_of(cache: Cache, name: str) -> int:
    """How many columns a caller's cache holds.

    Raises:
        ValueError: it holds something and cannot say.
    """
    layers = getattr(cache, "layers", [])
    if not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers):
        return int(cache.get_seq_length())
    if any(any(getattr(layer, "has_previous_state", {}).values()) for layer in layers):
        raise ValueError(f"{name} has no layer that says how long its text is: pass the whole text without it")
    return 0


def keeps_nothing(layer: Any) -> bool:
    """Whether a cache's layer is there for its place alone: it has no attention, or reads another layer's keys.

    Transformers has such layers since 5.23; before, those that read others' keys came last and were left out.
    """
    return type(layer).__name__ == "DummyLayer"


def has_state(layer: Any) -> bool:
    """Whether a cache's layer keeps a state: all it has read in one sum, which cannot be rolled back."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def check_cache(cache: Any, name: str, rows: int, config: Any, columns: int) -> None:
    """Refuses a caller's cache that cannot be read, or cannot hold the result.

    Args:
        name: of the argument.
        rows: of the call.
        config: of the model.
        columns: the longest result's.

    Raises:
        ValueError: why not.
    """
    past = columns_of(cache, name)
    if getattr(config, "is_encoder_decoder", False):
        if not isinstance(cache, EncoderDecoderCache):
            raise ValueError(f"{name} must be an EncoderDecoderCache, not {type(cache).__name__}: leave it out")
        for index, layer in enumerate(cast(Any, cache.cross_attention_cache.layers)):
            if layer.is_initialized and cache.is_updated.get(index) and layer.keys.shape[0] != rows:
                raise ValueError(f"{name} has {layer.keys.shape[0]} rows, the call {rows}: give it one row a sequence")
        cache, config = cache.self_attention_cache, config.get_text_config(decoder=True)
    layers: list[Any] = cache.layers
    models = DynamicCache(config=config).layers
    if len(layers) != len(models) and (past or layers):
        raise ValueError(
            f"{name} has {len(layers)} layers, the model {len(models)}: pass a cache that this model returned"
        )
    if not layers and any(map(has_state, models)):
        raise ValueError(f"{name} knows nothing of the model's layers: make it with DynamicCache(config=model.config)")
    for layer, own in zip(layers, models, strict=False):
        kind = type(layer).__name__
        if past and has_state(layer) != has_state(own):
            raise ValueError(f"{name} has a {kind} for the model's {type(own).__name__}: pass a cache that it returned")
        if past and has_state(layer):
            tensors = [*layer.conv_states.values(), *layer.recurrent_states.values()]
            for batch in {tensor.shape[0] for tensor in tensors if tensor is not None} - {rows}:
                raise ValueError(f"{name} has {batch} rows, the call {rows}: give it one row a sequence")
            if layer.record_past:
                raise ValueError(f"{name} records past states: pass one that does not")
        if not isinstance(layer, CacheLayerMixin):
            continue  # nothing but a state, or nothing at all
        layer = cast(Any, layer)
        # One that keeps a state as well says nothing of its length
        room = getattr(layer, "max_cache_len", -1) if has_state(layer) else layer.get_max_length()
        if not layer.is_sliding and 0 <= room < columns:
            raise ValueError(
                f"{name} is a static cache of {room} columns, this call may need {columns}: "
                "make it larger, or lower max_new_tokens"
            )
        if not past or not layer.is_initialized:
            continue  # layers that share another layer's keys never fill their own
        if layer.keys is None or layer.values is None or (not layer.is_sliding and layer.keys.shape[2] < past):
            raise ValueError(f"{name} has layers of type {kind}, which cannot be read: pass a DynamicCache")
        if layer.keys.shape[0] != rows:
            raise ValueError(f"{name} has {layer.keys.shape[0]} rows, the call {rows}: give it one row a sequence")


def read_cache(source: Any, target: RaggedCache) -> None:
    """Copies a caller's cache, found readable by :func:`check_cache`, into a ragged one."""
    columns = int(source.get_seq_length())
    target.window.rows, target.window.columns = None, None
    target.window.start, target.window.end = 0, columns
    layers: Any = target.cache.layers
    for mine, theirs in zip(layers, source.layers, strict=False):  # more layers than the model has may be left out
        if not theirs.is_initialized or keeps_nothing(theirs):
            continue
        # A sliding-window layer keeps its last columns only; what it dropped, its window hides for good
        kept = min(columns, theirs.keys.shape[2])
        padding = (0, 0, columns - kept, 0)
        mine.update(
            torch.nn.functional.pad(theirs.keys[:, :, :kept], padding),
            torch.nn.functional.pad(theirs.values[:, :, :kept], padding),
        )


def empty(cache: Cache) -> None:
    """Forgets what a Transformers cache holds."""
    cache.reset()
    for layer in cache.layers:  # before 5.18 a reset leaves columns of zeros, and an update adds to them
        if isinstance(layer, DynamicLayer):
            layer.keys = layer.values = None
            layer.is_initialized = False


def write_cache(source: RaggedCache, target: Cache, columns: int) -> None:
    """Replaces what a Transformers cache holds by the first ``columns`` columns of a ragged one."""
    empty(target)
    layers: Any = source.cache.layers
    for index, layer in enumerate(layers):
        if layer.is_initialized:
            keys, values = layer.keys[:, :, :columns], layer.values[:, :, :columns]
            target.update(keys.clone(), values.clone(), index)
