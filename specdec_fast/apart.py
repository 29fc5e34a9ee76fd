"""Models whose rows may stand at columns of their own though they take no positions, and whose head reads few lanes.

Decoders that read a source seldom take positions: they count columns, all rows alike, from what their cache says. A
twin of such a model (new modules around the same tensors, as in :mod:`specdec_fast.attention`) is told where each row
stands: learned and computed positions, and biases by distance, are then looked up once a row. Its head sees those
lanes only whose scores somebody wants.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec_fast.attention import around, parts_of, why_no_twin
from specdec_fast.cache import takes

__all__ = ["placed", "placed_on_device", "told_apart", "twin_apart"]


class _Pass(NamedTuple):
    """Where the rows of a pass stand, how many of its lanes they have, and which lanes' scores are wanted."""

    start: list[int]
    held: list[int]
    lanes: list[int]


class _Fixed(NamedTuple):
    """The same of a pass of fixed shape, in tensors; as :func:`placed_on_device` is told it."""

    columns: Tensor
    lane: Tensor | None
    most: int
    tokens: Tensor
    pad: int | None


_thread = threading.local()


@contextmanager
def placed_on_device(
    columns: Tensor, lane: Tensor | None, most: int, tokens: Tensor, pad: int | None = None
) -> Iterator[None]:
    """:func:`placed` for a pass of fixed shape, in which no operation hangs on a value.

    Args:
        columns: ``[B, n]`` int64, below ``most``.
        lane: ``[B]`` int64, the lane whose scores are wanted; None: all.
        most: columns that the model has positions for.
        tokens: ``[B, n]`` int64, what is read.
        pad: an id that stands nowhere, in a model that counts positions by what it reads; None: there is none.
    """
    _thread.now = _Fixed(columns, lane, most, tokens, pad)
    try:
        yield
    finally:
        _thread.now = None


@contextmanager
def placed(start: list[int], held: list[int], lanes: list[int]) -> Iterator[None]:
    """Says where the rows of this thread's next pass stand, how many of its lanes each has, and the lanes whose scores
    are wanted."""
    _thread.now = _Pass(start, held, lanes)
    try:
        yield
    finally:
        _thread.now = None


def _now() -> _Pass | _Fixed | None:
    return getattr(_thread, "now", None)


def _shifts() -> list[int] | None:
    """By how much each row is ahead of what the cache says; None where none is."""
    now = _now()
    if not isinstance(now, _Pass) or min(now.start) == max(now.start):
        return None
    return [start - min(now.start) for start in now.start]


def _lanes(shifts: list[int]) -> dict[int, int]:
    """How many lanes the rows that are so far ahead have: a table may end behind them."""
    now: _Pass = _thread.now
    return {shift: max(n for n, own in zip(now.held, shifts, strict=True) if own == shift) for shift in set(shifts)}


class _Positions(nn.Module):
    """Embeds the positions of each row. ``own`` gets what it would get if all rows stood there."""

    def __init__(self, own: nn.Module):
        super().__init__()
        self.own = own

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        now, shifts = _now(), _shifts()
        if isinstance(now, _Fixed):
            plain = 0 if now.pad is None else now.pad + (1 if now.pad == 0 else -1)
            found = self._table(now, now.most, plain, args, kwargs)[now.columns]
            if now.pad is None:
                return found
            nowhere = self._table(now, 1, now.pad, args, kwargs)[0]
            return torch.where((now.tokens == now.pad).unsqueeze(2), nowhere, found)
        if shifts is None:
            return self.own(*args, **kwargs)
        made = {}
        n = max(_thread.now.held)
        for shift, lanes in _lanes(shifts).items():  # rows that are equally far ahead share one
            alone = [_ahead(value, shift, n, lanes) for value in args]
            named = {name: _ahead(value, shift, n, lanes) for name, value in kwargs.items()}
            if isinstance(named.get("position_ids"), Tensor):
                named["position_ids"] = named["position_ids"] + shift
            part = self.own(*alone, **named)
            made[shift] = nn.functional.pad(part, (0, 0, 0, n - part.shape[-2]))
        rows = [made[shift] for shift in shifts]
        if rows[0].ndim == 2:
            return torch.stack(rows)
        alike = rows[0].shape[0] == 1
        return torch.stack([part[0 if alike else row] for row, part in enumerate(rows)])

    def _table(self, now: _Fixed, most: int, token: int, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """What a text of ``most`` like tokens would get, ``[most, H]``."""
        n = now.columns.shape[1]
        alone = [_from_start(value, n, most, token) for value in args]
        named = {name: _from_start(value, n, most, token, name) for name, value in kwargs.items()}
        table: Tensor = self.own(*alone, **named)
        return table.reshape(-1, table.shape[-1])


def _ahead(value: Any, shift: int, n: int, lanes: int) -> Any:
    """What says where a pass of ``n`` lanes stands, as a row sees it that is so far ahead and has fewer."""
    if isinstance(value, Tensor):
        if value.ndim > 1 and value.shape[1] == n:
            return value[:, :lanes]
        return value[:lanes] if value.shape == (n,) else value
    if isinstance(value, tuple | list) and len(value) > 1 and value[1] == n:
        return type(value)((value[0], lanes, *value[2:]))
    return value + shift if isinstance(value, int) and not isinstance(value, bool) else value


def _from_start(value: Any, n: int, most: int, token: int, name: str = "") -> Any:
    """What says where a pass of ``n`` lanes stands, as one row would see it that reads ``most`` tokens at once."""
    if isinstance(value, Tensor):
        if value.shape == (n,) or name == "position_ids":
            return torch.arange(most, device=value.device).view(*[1] * (value.ndim - 1), most)
        if value.ndim == 2 and value.shape[1] == n and not value.is_floating_point():
            return torch.full((1, most), token, device=value.device)
        return value[:1, :1].expand(1, most, *value.shape[2:]) if value.ndim > 2 and value.shape[1] == n else value
    if isinstance(value, tuple | list) and len(value) > 1 and value[1] == n:
        return type(value)((1, most, *value[2:]))
    return 0 if isinstance(value, int) and not isinstance(value, bool) else value


def _biases(own: Any, query_length: int, key_length: int, device: Any = None, past_seen_tokens: Any = 0) -> Tensor:
    """The bias by distance of each row, ``[R, heads, queries, keys]``."""
    now, shifts = _now(), _shifts()
    if isinstance(now, _Fixed):

        def of_a_row(first: Tensor) -> Tensor:
            found: Tensor = own(query_length, key_length, device=device, past_seen_tokens=first)
            return found[0]

        return torch.vmap(of_a_row)(now.columns[:, 0])
    if shifts is None:
        return own(query_length, key_length, device=device, past_seen_tokens=past_seen_tokens)
    made = {
        shift: own(query_length, key_length, device=device, past_seen_tokens=past_seen_tokens + shift)
        for shift in set(shifts)
    }
    return torch.cat([made[shift] for shift in shifts])


class _Head(nn.Module):
    """Scores of the lanes that are wanted."""

    def __init__(self, own: nn.Module):
        super().__init__()
        self.own = own

    def forward(self, hidden: Tensor) -> Tensor:
        now = _now()
        if isinstance(now, _Pass) and hidden.ndim == 3 and len(now.lanes) < hidden.shape[1]:
            hidden = hidden[:, now.lanes]
        elif isinstance(now, _Fixed) and now.lane is not None:
            hidden = hidden.gather(1, now.lane[:, None, None].expand(-1, 1, hidden.shape[2]))
        return self.own(hidden)


_twins: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, tuple[Any, PreTrainedModel]]] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def twin_apart(model: PreTrainedModel, implementation: str = "") -> PreTrainedModel | None:
    """A twin of a model that reads a source, to be called under :func:`placed`; None where none can be made.

    It lives as long as the model, whose tensors it holds.

    Args:
        implementation: of its attention, "": the model's.
    """
    if why_no_twin(model):
        return None
    with _making:
        state = [parts_of(model), [one._attn_implementation for one in _configs(model)]]
        kept = _twins.setdefault(model, {})
        if implementation not in kept or kept[implementation][0] != state:
            kept[implementation] = state, _made(model, implementation)
        return kept[implementation][1]


def told_apart(model: PreTrainedModel) -> bool:
    """Whether passes of a model's twin can be told where each row stands.

    A trial alone would not do: in half precision it takes small differences for rounding, and a model whose positions
    are looked up in another way would be read at one place for another.
    """
    prefix = "decoder_" if model.config.is_encoder_decoder else ""
    decoder: Any = model.get_decoder() if model.config.is_encoder_decoder else model
    counts = any("embed_positions" in m._modules or hasattr(m, "compute_bias") for m in decoder.modules())
    return counts or takes(model, f"{prefix}position_ids")


def _configs(model: PreTrainedModel) -> list[Any]:
    """The model's configuration and those within it, of which a twin has copies."""
    return [
        model.config,
        *(vars(model.config)[name] for name in model.config.sub_configs if name in vars(model.config)),
    ]


def _made(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    made: Any = around(model, {})
    if implementation:
        made.set_attn_implementation(implementation)
    decoder, head = made.get_decoder(), made.get_output_embeddings()
    prefix = "decoder_" if model.config.is_encoder_decoder else ""
    counts = not takes(model, f"{prefix}position_ids")
    for module in list(made.modules()):
        for name, child in list(module._modules.items()):
            if child is head and isinstance(child, nn.Linear):
                module._modules[name] = _Head(child)
    for module in list(decoder.modules()) if counts else []:
        if (embed := module._modules.get("embed_positions")) is not None:
            module._modules["embed_positions"] = _Positions(embed)
        if hasattr(module, "compute_bias"):
            module.compute_bias = functools.partial(_biases, module.compute_bias)
    return made
