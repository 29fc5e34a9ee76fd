"""What stands between two attentions of a decoder layer at a few positions, as few operations.

At a few positions a layer costs the reading of its weights and the launching of its operations. ``layer_product`` is a
matrix product with what stands before and behind it, ``layer_product_scaled`` one that does for the norm behind it what
can be done an entry at a time, ``layer_scale`` the same for a first layer, and ``layer_heads`` the turning of heads to
their positions and the writing of keys and values into a static cache. Each has a Triton kernel for GPUs and a
reference, which rounds where the kernel rounds: sums in float32, results in the type of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from specdec_fast.dispatch import run_triton

__all__ = ["GROUP", "layer_heads", "layer_product", "layer_product_scaled", "layer_scale"]

GROUP = 16  # columns whose squares are summed together


def layer_product(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    squares: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
    backend: str,
) -> Tensor:
    """Products of a few rows with weights that read the same input.

        z = x / sqrt(sum(squares) / K + epsilon)                  # with squares, else x
        y = [z W_1' + b_1, z W_2' + b_2, ...]                     # or, gated: silu(z W_1' + b_1) * (z W_2' + b_2)
        result = y + residual                                     # where there is one

    What a row gets does not depend on the others.

    Args:
        x: ``[M, K]``.
        weights: one to three of ``[N_i, K]``, contiguous, of the same type; two of one shape where ``gated``.
        biases: ``[N_i]`` each; None, or a list of them: none.
        squares: ``[M, P]`` float32, parts of the sum of squares of what ``x`` was before it was scaled by a norm.
        residual: ``[M, N]``.
        backend: ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: some of several weights have a bias and others none.

    Returns:
        ``[M, N]`` in the type of ``x``; ``N`` is the sum of all ``N_i``, or ``N_1`` where ``gated``.
    """
    held: list[Tensor | None] = [None] * len(weights) if biases is None else list(biases)
    if len({bias is None for bias in held}) > 1:
        raise ValueError("biases must be there for all weights or for none: add zeros where one is missing")
    result: Tensor = _operator("layer_product", backend)(x, squares, epsilon, list(weights), held, residual, gated)
    return result


def layer_product_scaled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor,
    squares: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`layer_product` with one weight, and with what :func:`layer_scale` gives for its result.

    Args:
        norm: ``[N]``, the weight of the RMS norm behind it.

    Returns:
        the result ``[M, N]``, and both of :func:`layer_scale`.
    """
    found: tuple[Tensor, Tensor, Tensor] = _operator("layer_product_scaled", backend)(
        x, squares, epsilon, weight, bias, residual, norm
    )
    return found


def layer_scale(x: Tensor, norm: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    """The part of an RMS norm that goes an entry at a time; the product behind it does the rest.

    Args:
        x: ``[M, K]``.
        norm: ``[K]``.

    Returns:
        ``x * norm`` in the type of ``x``, and ``[M, K / GROUP]`` float32: sums of squares of ``GROUP`` columns each.
    """
    found: tuple[Tensor, Tensor] = _operator("layer_scale", backend)(x, norm)
    return found


def layer_heads(
    fused: Tensor,
    cosine: Tensor,
    sine: Tensor,
    columns: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
    *,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    epsilon: float = 0.0,
    backend: str,
) -> Tensor:
    """Turns queries and keys to their positions, and writes keys and values into a static cache.

        turn(h) = h * cosine + rotate_half(h) * sine              # float32, behind the heads' own RMS norm if any

    Args:
        fused: ``[B * n, (H + 2 KVH) d]``: each position's queries, keys and values.
        cosine, sine: ``[B * n, d]``.
        columns: ``[B, n]`` int64, where each position is written.
        keys, values: ``[B, KVH, C, d]``, with contiguous entries; written to.
        heads: H.
        query_norm, key_norm: ``[d]``, of heads that are normalised first.
        backend: ``"triton"`` or ``"reference"``.

    Returns:
        the queries, ``[B, H, n, d]``.
    """
    query: Tensor = _operator("layer_heads", backend)(
        fused, cosine, sine, query_norm, key_norm, epsilon, columns, keys, values, heads
    )
    return query


def _operator(name: str, backend: str) -> Callable[..., Any]:
    operator: Callable[..., Any] = getattr(getattr(torch.ops.specdec_fast, name), backend)
    return operator


def _product(
    x: Tensor,
    squares: Tensor | None,
    epsilon: float,
    weights: list[Tensor],
    biases: list[Tensor | None],
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    wide, scale = x.float(), x.new_ones(1, dtype=torch.float32)
    if squares is not None:
        scale = torch.rsqrt(squares.sum(1, keepdim=True) / x.shape[1] + epsilon)
    parts = [wide @ weight.float().T * scale for weight in weights]
    parts = [part if bias is None else part + bias.float() for part, bias in zip(parts, biases, strict=True)]
    result = silu(parts[0]) * parts[1] if gated else torch.cat(parts, 1)
    return (result if residual is None else result + residual.float()).to(x.dtype)


def _product_shape(
    x: Tensor, squares: object, epsilon: float, weights: list[Tensor], biases: object, residual: object, gated: bool
) -> Tensor:
    return x.new_empty((x.shape[0], weights[0].shape[0] if gated else sum(w.shape[0] for w in weights)))


def _product_scaled(
    x: Tensor,
    squares: Tensor | None,
    epsilon: float,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    out = _product(x, squares, epsilon, [weight], [bias], residual, False)
    return out, *_scale(out, norm)


def _product_scaled_shape(x: Tensor, squares: object, epsilon: float, weight: Tensor, *rest: object) -> Any:
    out = x.new_empty((x.shape[0], weight.shape[0]))
    return out, *_scale_shape(out, weight)


def _scale(x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    sums = pad(wide.square(), (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP)).sum(2)
    return (wide * norm.float()).to(x.dtype), sums


def _scale_shape(x: Tensor, norm: object) -> tuple[Tensor, Tensor]:
    groups = -(-x.shape[1] // GROUP)
    return x.new_empty(x.shape), x.new_empty((x.shape[0], groups), dtype=torch.float32)


def _heads(
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
    rows, queries = columns.shape
    kv_heads, _, dim = keys.shape[1:]
    apart = fused.view(rows, queries, heads + 2 * kv_heads, dim).transpose(1, 2)
    query, key, value = apart.split([heads, kv_heads, kv_heads], 1)
    turned = []
    for head, weight in ((query, query_norm), (key, key_norm)):
        wide = head.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * weight.float()
        c, s = (t.float().view(rows, 1, queries, dim) for t in (cosine, sine))
        left, right = wide.chunk(2, -1)
        turned.append((wide * c + torch.cat([-right, left], -1) * s).to(fused.dtype))
    place = columns[:, None, :, None].expand(rows, kv_heads, queries, dim)
    keys.scatter_(2, place, turned[1].to(keys.dtype))
    values.scatter_(2, place, value.to(values.dtype))
    return turned[0].contiguous()


def _heads_shape(fused: Tensor, *rest: Any) -> Tensor:
    columns, keys, _, heads = rest[-4:]
    return fused.new_empty((columns.shape[0], heads, columns.shape[1], keys.shape[3]))


_SCHEMAS = {
    "layer_product": "(Tensor x, Tensor? squares, float epsilon, Tensor[] weights, Tensor?[] biases, Tensor? residual,"
    " bool gated) -> Tensor",
    "layer_product_scaled": "(Tensor x, Tensor? squares, float epsilon, Tensor weight, Tensor? bias, Tensor? residual,"
    " Tensor norm) -> (Tensor, Tensor, Tensor)",
    "layer_scale": "(Tensor x, Tensor norm) -> (Tensor, Tensor)",
    "layer_heads": "(Tensor fused, Tensor cosine, Tensor sine, Tensor? query_norm, Tensor? key_norm, float epsilon,"
    " Tensor columns, Tensor(a!) keys, Tensor(b!) values, int heads) -> Tensor",
}
_library = torch.library.Library("specdec_fast", "FRAGMENT")


for _op, _reference, _fake in (
    ("layer_product", _product, _product_shape),
    ("layer_product_scaled", _product_scaled, _product_scaled_shape),
    ("layer_scale", _scale, _scale_shape),
    ("layer_heads", _heads, _heads_shape),
):
    for _backend, _kernel in (("reference", _reference), ("triton", partial(run_triton, _op))):
        _library.define(f"{_op}.{_backend}{_SCHEMAS[_op]}")
        _library.impl(f"{_op}.{_backend}", _kernel, "CompositeExplicitAutograd")
        _library.impl(f"{_op}.{_backend}", _fake, "Meta")
