"""The entry points of a layer's kernels for tensors: tiles by the weights' shapes alone, and grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from specdec_fast.triton_kernels.layers import place_kernel, product_kernel, scale_kernel

__all__ = ["Tiles", "layer_heads", "layer_product", "layer_product_scaled", "layer_scale"]

ROWS = 16  # of a tile of positions: the smallest that tensor cores take
WIDTH = 1024  # columns that a program of layer_scale does
GROUP = 16  # specdec_fast.layer_ops.GROUP


class Tiles(NamedTuple):
    """How a product is cut: columns of the output a program, entries of a sum a step, steps on the way, warps."""

    block: int
    depth: int
    stages: int
    warps: int


def tiles_for(outputs: int, inner: int, gated: bool) -> Tiles:
    """Many programs where there are few outputs, and some twenty kilobytes of weights on the way to each.

    Steps fit the length of a sum where they can (896 is seven of 128): what is masked is not copied 16 bytes at a time.
    """
    block = 32 if outputs >= 8192 and not gated else 16
    depth = next((depth for depth in (256, 128, 64) if inner % depth == 0), 0)
    depth = depth or min(256, max(triton.next_power_of_2(inner), 16))
    stages = {256: 3 if gated or block == 32 else 4, 128: 5 if gated else 6}.get(depth, 8)
    return Tiles(block, depth, stages, 4 if depth == 256 or block == 32 else 2)


def layer_product(
    x: Tensor,
    squares: Tensor | None,
    epsilon: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    out = x.new_empty((x.shape[0], weights[0].shape[0] if gated else sum(w.shape[0] for w in weights)))
    _launch(x, squares, epsilon, weights, biases, residual, gated, out, None, None, None)
    return out


def layer_product_scaled(
    x: Tensor,
    squares: Tensor | None,
    epsilon: float,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    out, scaled = (x.new_empty((x.shape[0], weight.shape[0])) for _ in range(2))
    parts = _parts(out)
    _launch(x, squares, epsilon, [weight], [bias], residual, False, out, norm, scaled, parts)
    return out, scaled, parts


def _launch(
    x: Tensor,
    squares: Tensor | None,
    epsilon: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None,
    gated: bool,
    out: Tensor,
    norm: Tensor | None,
    scaled: Tensor | None,
    parts: Tensor | None,
) -> None:
    _needs_gpu(x)
    x, residual = _in_rows(x), None if residual is None else _in_rows(residual)
    squares = None if squares is None else squares.contiguous()
    weights = [weight.contiguous() for weight in weights]
    rows, inner = x.shape
    counts = [w.shape[0] for w in weights]
    tiles = tiles_for(out.shape[1], inner, gated)
    spare: list[Tensor | None] = [None] * (3 - len(weights))
    programs = sum(triton.cdiv(n, tiles.block) for n in (counts[:1] if gated else counts))
    places = 1 if squares is None else squares.shape[1]
    for at in range(0, rows, ROWS):
        part = slice(at, at + ROWS)
        product_kernel[(programs,)](
            x[part],
            x.stride(0),
            None if squares is None else squares[part],
            places,
            epsilon,
            *weights,
            *spare,
            *biases,
            *spare,
            None if residual is None else residual[part],
            0 if residual is None else residual.stride(0),
            out[part],
            out.stride(0),
            norm,
            None if scaled is None else scaled[part],
            None if parts is None else parts[part],
            min(rows - at, ROWS),
            inner,
            *counts,
            *[0] * len(spare),
            GATED=gated,
            PARTS=1 if gated else len(weights),
            EVEN=inner % tiles.depth == 0 and not any(n % tiles.block for n in counts),
            WIDEN=triton.knobs.runtime.interpret,
            ROWS=ROWS,
            BLOCK=tiles.block,
            DEPTH=tiles.depth,
            PLACES=triton.next_power_of_2(places),
            GROUP=GROUP,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )


def layer_scale(x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    _needs_gpu(x)
    x = _in_rows(x)
    scaled, parts = torch.empty_like(x, memory_format=torch.contiguous_format), _parts(x)
    rows, inner = x.shape
    if rows:
        scale_kernel[(rows, triton.cdiv(inner, WIDTH))](
            x, x.stride(0), norm, scaled, parts, inner, parts.shape[1], WIDTH=WIDTH, GROUP=GROUP, num_warps=4
        )
    return scaled, parts


def _parts(out: Tensor) -> Tensor:
    return out.new_empty((out.shape[0], triton.cdiv(out.shape[1], GROUP)), dtype=torch.float32)


def layer_heads(
    fused: Tensor,
    cosine: Tensor,
    sine: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    epsilon: float,
    columns: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
) -> Tensor:
    _needs_gpu(fused)
    fused, cosine, sine, columns = (t.contiguous() for t in (fused, cosine, sine, columns))
    rows, queries = columns.shape
    kv_heads, _, dim = keys.shape[1:]
    query = fused.new_empty((rows, heads, queries, dim))
    place_kernel[(heads + 2 * kv_heads, rows * queries)](
        fused,
        cosine,
        sine,
        query_norm,
        key_norm,
        epsilon,
        columns,
        keys,
        *keys.stride()[:3],
        values,
        *values.stride()[:3],
        query,
        heads,
        kv_heads,
        queries,
        dim,
        DIM=triton.next_power_of_2(dim),
        num_warps=1,
    )
    return query


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _needs_gpu(tensor: Tensor) -> None:
    if tensor.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"Triton kernels need tensors on a GPU, not on {tensor.device}; "
            "TRITON_INTERPRET=1, set before Triton is imported, runs them anywhere, slowly"
        )
