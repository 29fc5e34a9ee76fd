"""A key-value cache of fixed size whose rows have lengths of their own, told by tensors on the device.

The buffers ``[B, heads, capacity, head_dim]`` are allocated once. A pass writes ``n`` columns a row from
``Place.start`` on, by a scatter whose shapes depend on no value, so that it can be compiled and captured; rolling back
is writing a smaller number into ``start``. Nothing is copied or concatenated. Sliding-window layers are as long as the
others, and their window is in the mask.

The last column belongs to nobody: lanes beyond the capacity (drafts behind the end of the longest text) are written
there, and no lane that counts sees it.

Outside such passes the layers are ragged ones (:mod:`specdec_fast.cache`): prompts are read, and a caller's cache is
taken in and handed back, as with those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from specdec_fast.cache import CACHE_NAMES, RaggedCache, RaggedLayer, Window

__all__ = ["Place", "StaticCache", "StaticLayer", "StaticSource", "capacity_for", "rows_for"]

LEAST_CAPACITY = 256
ALLOWANCE = 2048  # columns behind the prompt that are allocated at once; callers who stop at an EOS allow millions


@dataclass
class Place:
    """Where a pass of fixed shape writes and what it sees, for all layers of a cache. An attention kernel reads it.

    Args:
        start: ``[B]`` int64, the column that each row's first lane is written to.
        hidden: ``[B]`` int64, how many columns at the start of each row are padding.
        capacity: columns of the buffers, the last of them nobody's.
        ahead: ``[B]`` int64, by how much each row's positions are ahead of its count (:meth:`Runner.go_ahead`); None:
            this model's are not.
        fixed: whether a pass of fixed shape is running.
        lanes: ``[B, n]``, during such a pass: :meth:`columns`, made once for all layers.
        scaled: during such a pass, what a layer has left for the next one: the states it gave, the norm that reads
            them, and what :func:`specdec_fast.layer_ops.layer_scale` gives for both.
    """

    start: Tensor
    hidden: Tensor
    capacity: int
    ahead: Tensor | None = None
    fixed: bool = False
    lanes: Tensor | None = None
    scaled: tuple[Tensor, nn.Module, Tensor, Tensor] | None = None

    def columns(self, lanes: int) -> Tensor:
        """Where each lane is written: ``[B, lanes]``."""
        lane = torch.arange(lanes, device=self.start.device)
        return (self.start.unsqueeze(1) + lane).clamp(max=self.capacity - 1)


class StaticLayer(RaggedLayer):
    """One layer. Where its attention has a window, a lane sees ``sliding`` columns, its own among them."""

    is_compileable = True

    def __init__(self, window: Window, place: Place, sliding: int | None):
        super().__init__(window)
        self.place = place
        self.sliding = sliding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self._empty(key_states, self.place.capacity)
        self.values = self._empty(value_states, self.place.capacity)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.place.fixed:
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None and self.values is not None
        columns = self.place.columns(key_states.shape[2]) if self.place.lanes is None else self.place.lanes
        columns = columns[:, None, :, None]
        self.keys.scatter_(2, columns.expand(key_states.shape), key_states)
        self.values.scatter_(2, columns.expand(value_states.shape), value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.place.capacity if self.place.fixed else super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.place.capacity, 0) if self.place.fixed else super().get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return self.place.capacity

    def _grown(self, buffer: Tensor, end: int) -> Tensor:
        if end > buffer.shape[2]:
            raise RuntimeError(f"column {end} is beyond the {buffer.shape[2]} of a static cache")
        return buffer


class StaticSource:
    """Keys and values of what an encoder made of each row's source, in buffers that are written once a text.

    Args:
        like: keys and values ``[1, heads, S', head_dim]`` of each layer, as the model gives them.
        rows: of the cache.
        columns: of the longest source, S.
        masked: where a forward takes the mask that hides columns behind a shorter source: "given" beside the encoder's
            output, "inside" it, "": nowhere, and all sources are of S columns.
        outputs: the type of the encoder's output, and ``width`` of its states.
        counted: whether positions leave a text's padding out.
        pad: an id that stands at no position, wherever it is read; None: there is none.
    """

    def __init__(
        self,
        like: list[tuple[Tensor, Tensor]],
        rows: int,
        columns: int,
        *,
        masked: str,
        outputs: type,
        width: int,
        counted: bool,
        pad: int | None,
    ):
        self.masked, self.counted, self.pad = masked, counted, pad
        self.layers = [DynamicLayer() for _ in like]
        for layer, (keys, values) in zip(self.layers, like, strict=True):
            shapes = [(rows, states.shape[1], columns, states.shape[3]) for states in (keys, values)]
            layer.keys, layer.values = keys.new_zeros(shapes[0]), values.new_zeros(shapes[1])
            layer.is_initialized = True
        some = like[0][0]
        # Nobody reads the states themselves again, but their shape and type
        self._type, self._states = outputs, some.new_zeros(1, 1, 1).expand(rows, columns, width)
        self.shown = torch.ones((rows, columns), dtype=torch.bool, device=some.device) if masked else None

    def arguments(self, lanes: int, made: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """What a forward of so many lanes takes.

        Args:
            made: of a mask ``[B, 1, n, S]``, bool, what the model's attention takes.
        """
        if self.shown is None:
            return {"encoder_outputs": self._type(last_hidden_state=self._states)}
        mask = made(self.shown[:, None, None].expand(-1, 1, lanes, -1))
        if self.masked == "inside":
            return {"encoder_outputs": self._type(last_hidden_state=self._states, attention_mask=mask)}
        return {"encoder_outputs": self._type(last_hidden_state=self._states), "attention_mask": mask}

    def tensors(self) -> list[Tensor]:
        """Everything whose address must stay."""
        buffers = [t for layer in self.layers for t in (layer.keys, layer.values) if t is not None]
        return buffers if self.shown is None else [*buffers, self.shown]

    def write(self, layers: list[tuple[Tensor, Tensor]], shown: Tensor | None) -> None:
        """Writes the first rows.

        Args:
            layers: keys and values ``[R, heads, S', head_dim]``, S' at most S.
            shown: ``[R, S']``, 0 where nothing is; None: everything.
        """
        for own, parts in zip(self.layers, layers, strict=True):
            for buffer, part in zip((own.keys, own.values), parts, strict=True):
                assert buffer is not None
                buffer[: part.shape[0], :, : part.shape[2]] = part
        if self.shown is not None:
            rows, _, columns, _ = layers[0][0].shape
            self.shown[:, columns:] = False
            self.shown[:rows, :columns] = True if shown is None else shown.bool()

    def take(self, other: StaticSource) -> None:
        """Copies that of another cache for as many rows and columns."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)


@dataclass
class StaticCache(RaggedCache):
    """The cache of one model for ``rows`` rows of ``capacity`` columns.

    Args:
        argument: of the model's forward that takes it.
        capacity: columns, one more than the longest text.
        device: of the model.
        windows: of each layer, None: full attention.
        source: of models that read what an encoder made.
        ahead: whether the model's positions may be ahead of a text's count.

    Attributes:
        handed: what a forward is given.
        stateful: its layers that keep a state (:mod:`specdec_fast.static_recurrent`).
        graphs: captured passes that concern this cache alone (:mod:`specdec_fast.prompt_passes`).
    """

    argument: str = CACHE_NAMES[0]
    capacity: int = LEAST_CAPACITY
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    windows: tuple[int | None, ...] = ()
    source: StaticSource | None = None
    ahead: bool = False
    handed: Cache = field(init=False)
    stateful: list[Any] = field(init=False, default_factory=list)
    place: Place = field(init=False)
    graphs: dict[Any, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.window.total_rows = self.rows
        start, hidden, ahead = (torch.zeros(self.rows, dtype=torch.long, device=self.device) for _ in range(3))
        self.place = Place(start, hidden, self.capacity, ahead if self.ahead else None)
        self.ragged = [StaticLayer(self.window, self.place, sliding) for sliding in self.windows]
        self.cache = self.handed = Cache(layers=list(self.ragged))
        if self.source is not None:
            self.handed = EncoderDecoderCache(self.cache, Cache(layers=list(self.source.layers)))
            self.handed.is_updated = dict.fromkeys(range(len(self.source.layers)), True)

    @property
    def bytes(self) -> int:
        """Memory of the buffers."""
        return sum(t.nbytes for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Everything whose address must stay."""
        buffers = [t for layer in self.ragged for t in (layer.keys, layer.values) if t is not None]
        source = [] if self.source is None else self.source.tensors()
        place = [self.place.start, self.place.hidden, *([] if self.place.ahead is None else [self.place.ahead])]
        return [*buffers, *source, *place]

    def states(self) -> list[Tensor]:
        """What a pass reads and replaces, so that running it again would give something else."""
        return []

    def enter(self) -> None:
        """To be called before a forward that reads and writes states."""

    def leave(self) -> None:
        """To be called behind one."""

    def forget(self) -> None:
        """Empties it for another text. What was there is cleared: a NaN in a masked column would still spread."""
        self.window.rows = self.window.columns = None
        self.window.start = self.window.end = 0
        for tensor in self.tensors():
            tensor.zero_()
        if self.source is not None and self.source.shown is not None:
            self.source.shown.fill_(True)  # a row that sees nothing would turn the softmax into NaN

    def go_ahead(self, places: list[int]) -> None:
        """:meth:`Runner.go_ahead`, of the first rows."""
        if any(places):
            assert self.place.ahead is not None, "a model that counts otherwise"
            self.place.ahead[: len(places)].copy_(torch.tensor(places))

    def view(self, rows: int) -> RaggedCache:
        """The first rows as a ragged cache over the same memory."""
        part = RaggedCache(rows, self.layer_count)
        for mine, own in zip(part.ragged, self.ragged, strict=True):
            if own.is_initialized:
                assert own.keys is not None and own.values is not None
                mine.dtype, mine.device, mine.is_initialized = own.dtype, own.device, True
                mine.keys, mine.values = own.keys[:rows], own.values[:rows]
        return part

    def take(self, other: StaticCache) -> None:
        """Copies what a smaller cache of as many rows holds; layers are made where this one has none yet."""
        for mine, theirs in zip(self.ragged, other.ragged, strict=True):
            if theirs.is_initialized:
                assert theirs.keys is not None and theirs.values is not None
                if not mine.is_initialized:
                    mine.lazy_initialization(theirs.keys, theirs.values)
                assert mine.keys is not None and mine.values is not None
                mine.keys[:, :, : other.capacity - 1] = theirs.keys[:, :, :-1]
                mine.values[:, :, : other.capacity - 1] = theirs.values[:, :, :-1]
        if self.source is not None and other.source is not None:
            self.source.take(other.source)
        self.place.start.copy_(other.place.start)
        self.place.hidden.copy_(other.place.hidden)
        if self.place.ahead is not None and other.place.ahead is not None:
            self.place.ahead.copy_(other.place.ahead)


def capacity_for(columns: int) -> int:
    """Columns to allocate for a text of so many: few different numbers, so that few shapes are compiled."""
    size = LEAST_CAPACITY
    while size < columns + 1:
        half = size * 3 // 2
        if half >= columns + 1:
            return half
        size *= 2
    return size


def rows_for(batch: int) -> int:
    """Rows to allocate for a batch."""
    return 1 << max(batch - 1, 0).bit_length()
