"""Attention of a few queries over the valid part of a static cache: one function over every backend.

Keys and values stand in buffers of fixed size, ``capacity`` columns a row, of which a row of the batch uses the first
``start + n``. A kernel that is told so reads those alone; one that is given a mask reads the buffers to the end. The
backends are those of :mod:`specdec_fast.ops`: Triton kernels on a GPU, the reference elsewhere.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from specdec_fast.dispatch import overload, run_triton

__all__ = ["decode_attention", "seen_columns"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MOST_DIM = 256


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    *,
    hidden: Tensor | None = None,
    window: Tensor | int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention from ``n`` queries a row to what each of them sees of a static cache.

        c_i = min(start + i, C - 1)                                    # query i's own column
        seen(i) = {c: max(hidden, c_i - window + 1) <= c <= c_i} and c_i itself
        s_ic = scale * <query_i, key_c>;  s_ic = softcap * tanh(s_ic / softcap) where there is a softcap
        out_i = sum over seen(i) of softmax(s_i)_c * value_c           # sums in float32

    Columns that no query of a row sees are not read and may hold anything.

    Args:
        query: ``[B, H, n, d]`` float32, bfloat16 or float16, ``d`` from 1 to 256.
        key, value: ``[B, KVH, C, d]`` of the same type; ``KVH`` divides ``H`` and query heads ``h * H / KVH`` to
            ``(h + 1) * H / KVH - 1`` share head ``h``.
        start: ``[B]`` int64, the column of each row's first query; the queries' own keys are already there.
        hidden: ``[B]`` int64, how many columns at the start of a row are padding. None: none.
        window: ``[B]`` int64 or a number, how many columns a query sees, its own included; 0 or None: all.
        scale: of the scores. None: ``d ** -0.5``.
        softcap: None or 0: none.
        backend: see :mod:`specdec_fast.ops`.

    Returns:
        ``[B, n, H, d]`` in the type of ``query``, contiguous: what a model's output projection reads.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a backend that is not there.
    """
    _check(query, key, value)
    if isinstance(window, int):
        window = start.new_full(start.shape, window)
    for name, number in (("start", start), ("hidden", hidden), ("window", window)):
        wrong = number is not None and (
            number.shape != query.shape[:1] or number.dtype != torch.int64 or number.device != query.device
        )
        if wrong:
            assert number is not None
            wanted = f"[{query.shape[0]}] torch.int64 on {query.device}"
            raise ValueError(f"{name} must be {wanted}, not {list(number.shape)} {number.dtype} on {number.device}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    op = overload("decode_attention", query, backend)
    return op(query, key, value, start, hidden, window, float(scale), float(softcap or 0.0))


def seen_columns(start: Tensor, queries: int, capacity: int, hidden: Tensor | None, window: Tensor | None) -> Tensor:
    """What each query sees, as a mask ``[B, n, C]`` bool; see :func:`decode_attention`."""
    column = torch.arange(capacity, device=start.device)
    own = (start.unsqueeze(1) + torch.arange(queries, device=start.device)).clamp(0, capacity - 1).unsqueeze(2)
    seen = column <= own
    if hidden is not None:
        seen = seen & (column >= hidden[:, None, None])
    if window is not None:
        reach = torch.where(window > 0, window, capacity)[:, None, None]
        seen = seen & (column > own - reach)
    return seen | (column == own)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            "query must be [B, H, n, d], key and value [B, KVH, C, d] of one shape, not "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    rows, heads, _, dim = query.shape
    if (key.shape[0], key.shape[3]) != (rows, dim) or not key.shape[1] or heads % key.shape[1] or not key.shape[2]:
        raise ValueError(
            f"key must be [{rows}, KVH, C, {dim}] with a KVH that divides {heads} and C >= 1, not {list(key.shape)}"
        )
    if not 1 <= dim <= MOST_DIM:
        raise ValueError(f"query must have a head size from 1 to {MOST_DIM}, not {dim}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype not in _FLOATS or tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} must be float32, bfloat16 or float16, like query: {query.dtype} on {query.device}, "
                f"not {tensor.dtype} on {tensor.device}"
            )


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    hidden: Tensor | None,
    window: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """In float64, and with nothing that is not seen in any sum."""
    queries, group = query.shape[2], query.shape[1] // key.shape[1]
    seen = seen_columns(start, queries, key.shape[2], hidden, window).unsqueeze(1)
    unused = ~seen.any(2).unsqueeze(3)
    k, v = (t.double().masked_fill(unused, 0.0).repeat_interleave(group, 1) for t in (key, value))
    scores = query.double() @ k.transpose(2, 3) * scale
    if softcap > 0:
        scores = softcap * (scores / softcap).tanh()
    out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return out.to(query.dtype).transpose(1, 2).contiguous()


def _fake(query: Tensor, *rest: object) -> Tensor:
    rows, heads, queries, dim = query.shape
    return query.new_empty((rows, queries, heads, dim))


_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor start, Tensor? hidden, Tensor? window, float scale,"
    " float softcap) -> Tensor"
)
_library = torch.library.Library("specdec_fast", "FRAGMENT")
for _name, _kernel in (
    ("decode_attention", _reference),
    ("decode_attention.reference", _reference),
    ("decode_attention.triton", partial(run_triton, "decode_attention")),
):
    _library.define(_name + _SCHEMA)
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    _library.impl(_name, _fake, "Meta")
