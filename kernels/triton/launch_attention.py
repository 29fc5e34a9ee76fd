"""The entry point of decode attention for tensors: workspace and grid.

The number of splits follows from the capacity and the queries a row, and everything else is on the device: a CUDA graph
can replay a call at any length, and a row's result does not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from specdec_fast.triton_kernels.attention import attend_kernel, merge_kernel

__all__ = ["decode_attention"]

SPLIT = 64  # columns of the capacity a split is made for
MOST_SPLITS = 64
TILE = 16384  # bytes of a tile of keys


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    hidden: Tensor | None,
    window: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    if query.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"Triton kernels need tensors on a GPU, not on {query.device}; "
            "TRITON_INTERPRET=1, set before Triton is imported, runs them anywhere, slowly"
        )
    rows, all_heads, queries, dim = query.shape
    heads, capacity = key.shape[1:3]
    out = query.new_empty((rows, queries, all_heads, dim))
    if not out.numel():
        return out
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    group = all_heads // heads
    together = group * queries
    width = max(triton.next_power_of_2(dim), 16)
    block = min(max(triton.next_power_of_2(together), 16), 64 if query.element_size() == 2 else 16)
    tiles = triton.cdiv(together, block)
    splits = min(triton.cdiv(capacity, SPLIT), max(MOST_SPLITS // tiles, 1))
    kept = rows * heads * splits * together if splits > 1 else 0
    weighted = query.new_empty(kept * dim, dtype=torch.float32)
    peaks, masses = query.new_empty((2, kept), dtype=torch.float32)
    attend_kernel[(rows * heads * tiles, splits)](
        query,
        *query.stride()[:3],
        key,
        *key.stride()[:3],
        value,
        *value.stride()[:3],
        start,
        start.stride(0),
        hidden,
        0 if hidden is None else hidden.stride(0),
        window,
        0 if window is None else window.stride(0),
        scale,
        softcap,
        out,
        weighted,
        peaks,
        masses,
        heads,
        group,
        queries,
        capacity,
        dim,
        tiles,
        SOFTCAPPED=softcap > 0,
        WIDEN=triton.knobs.runtime.interpret,
        SPLITS=splits,
        ROWS=block,
        COLUMNS=min(max(TILE // (width * query.element_size()), 16), 64),
        DIM=width,
        num_warps=4 if block == 16 else 8,
        num_stages=2,
    )
    if splits > 1:
        merge_kernel[(rows * heads * together,)](
            weighted,
            peaks,
            masses,
            out,
            heads,
            group,
            queries,
            dim,
            SPLITS=splits,
            PLACES=triton.next_power_of_2(splits),
            DIM=width,
        )
    return out
