"""What a decoder layer does between two attentions, for a few positions. Defined in specdec_fast/layer_ops.py.

At a few positions a layer is bound by reading its weights, and beside a fast memory by the number of its launches. So a
product takes along what stands before and behind it: its bias, the gate, the sum with the residual stream, the norm of
what comes next; and matrices that read the same input are one launch. A position's sums run in an order that hangs on
the shapes of the weights alone: what it gets does not depend on how many share the pass.

A norm is shared out: whoever writes a position's entries scales them by the norm's weight and sums their squares, and
the product that reads them divides its result. A product that did this to its input would do it once a program, in
every step of its loop, three times as many instructions as the product itself.
"""

import triton
import triton.language as tl

from specdec_fast.triton_kernels.attention import product


@triton.jit
def tile(pointer, row_stride, row, column, inside, EVEN: tl.constexpr):
    """Entries [rows, columns] of a matrix; 0 outside, where there is an outside."""
    place = row.to(tl.int64)[:, None] * row_stride + column[None, :]
    if EVEN:
        return tl.load(pointer + place)
    else:
        return tl.load(pointer + place, mask=inside, other=0.0)


# One compilation for all passes; and a count that a branch sets anew must not be a constant before it
@triton.jit(do_not_specialize=["rows", "count", "count_1", "count_2"])
def product_kernel(
    x,  # [M, K]
    x_row,  # strides
    squares,  # [M, places] or None: parts of each row's sum of squares before it was scaled, as below
    places,
    epsilon,
    weight,  # [N, K], up to three of them, contiguous
    weight_1,  # or None
    weight_2,
    bias,  # [N], all of them or none
    bias_1,
    bias_2,
    residual,  # [M, N] or None: added
    residual_row,
    out,  # [M, N + N_1 + N_2], or [M, N]
    out_row,
    norm,  # [N] or None: of what is normalised next
    scaled,  # [M, N]: out * norm
    parts,  # [M, N / GROUP]: sums of squares of GROUP columns of out each
    rows,  # M
    inner,  # K
    count,  # N
    count_1,
    count_2,
    GATED: tl.constexpr,  # silu(first product) * second
    PARTS: tl.constexpr,  # matrices side by side, not with GATED
    EVEN: tl.constexpr,  # tiles fit
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    PLACES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A program computes BLOCK columns of the output."""
    program = tl.program_id(0)
    shift = 0
    if PARTS == 2:
        first = tl.cdiv(count, BLOCK)
        if program >= first:
            weight, bias = weight_1, bias_1
            program -= first
            shift = count
            count = count_1
    if PARTS == 3:
        first = tl.cdiv(count, BLOCK)
        second = first + tl.cdiv(count_1, BLOCK)
        if program >= second:
            weight, bias = weight_2, bias_2
            program -= second
            shift = count + count_1
            count = count_2
        elif program >= first:
            weight, bias = weight_1, bias_1
            program -= first
            shift = count
            count = count_1
    m = tl.arange(0, ROWS)
    live = m < rows
    n = program * BLOCK + tl.arange(0, BLOCK)
    there = n < count
    if squares is not None:  # read here, so that it is there behind the loop
        part = tl.arange(0, PLACES)
        known = live[:, None] & (part < places)[None, :]
        square = tl.load(squares + m[:, None] * places + part[None, :], mask=known, other=0.0)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    other = tl.zeros((ROWS, BLOCK), tl.float32)
    for at in range(0, inner, DEPTH):
        k = at + tl.arange(0, DEPTH)
        inside = k < inner
        place = m.to(tl.int64)[:, None] * x_row + k[None, :]
        given = tl.load(x + place, mask=live[:, None] & inside[None, :], other=0.0)
        both = there[:, None] & inside[None, :]
        total += product(given, tl.trans(tile(weight, inner, n, k, both, EVEN)), WIDEN)
        if GATED:
            other += product(given, tl.trans(tile(weight_1, inner, n, k, both, EVEN)), WIDEN)
    if squares is not None:
        scale = (1.0 / tl.sqrt(tl.sum(square, 1) / inner + epsilon))[:, None]
        total *= scale
        other *= scale
    if bias is not None:
        total += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if bias_1 is not None:
            other += tl.load(bias_1 + n, mask=there, other=0.0).to(tl.float32)[None, :]
        total = total * tl.sigmoid(total) * other
    inside = live[:, None] & there[None, :]
    if residual is not None:
        place = m.to(tl.int64)[:, None] * residual_row + (shift + n)[None, :]
        total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    place = m.to(tl.int64)[:, None] * out_row + (shift + n)[None, :]
    result = total.to(out.dtype.element_ty)
    tl.store(out + place, result, mask=inside)
    if norm is not None:
        wide = tl.where(inside, result.to(tl.float32), 0.0)
        factor = tl.load(norm + n, mask=there, other=0.0).to(tl.float32)
        tl.store(scaled + place, (wide * factor[None, :]).to(out.dtype.element_ty), mask=inside)
        sums = tl.sum(tl.reshape(wide * wide, (ROWS, BLOCK // GROUP, GROUP)), 2)
        group = program * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        groups = tl.cdiv(count, GROUP)
        tl.store(parts + m[:, None] * groups + group[None, :], sums, mask=live[:, None] & (group < groups)[None, :])


@triton.jit
def scale_kernel(
    x,  # [M, K]
    x_row,
    norm,  # [K]
    scaled,  # [M, K]
    parts,  # [M, groups]
    inner,  # K
    groups,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Program (m, part) does WIDTH columns of a row: what a product does for those behind it."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    wide = tl.load(x + m * x_row + k, mask=k < inner, other=0.0).to(tl.float32)
    factor = tl.load(norm + k, mask=k < inner, other=0.0).to(tl.float32)
    tl.store(scaled + m * inner + k, (wide * factor).to(scaled.dtype.element_ty), mask=k < inner)
    group = tl.program_id(1) * (WIDTH // GROUP) + tl.arange(0, WIDTH // GROUP)
    sums = tl.sum(tl.reshape(wide * wide, (WIDTH // GROUP, GROUP)), 1)
    tl.store(parts + m * groups + group, sums, mask=group < groups)


@triton.jit
def normed(value, pair, weight, d, turned, dim, epsilon):
    """A head's entries, and those they are turned with, by their root mean square; as they are without a weight."""
    if weight is None:
        return value, pair
    else:
        factor = 1.0 / tl.sqrt(tl.sum(value * value, 0) / dim + epsilon)
        own = tl.load(weight + d, mask=d < dim, other=0.0).to(tl.float32)
        others = tl.load(weight + turned, mask=d < dim, other=0.0).to(tl.float32)
        return value * factor * own, pair * factor * others


@triton.jit
def place_kernel(
    fused,  # [M, (H + 2 KVH) d]: queries, keys and values
    cosine,  # [M, d]
    sine,
    query_norm,  # [d] or None
    key_norm,
    epsilon,
    columns,  # [M] int64
    keys,  # [B, KVH, C, d]
    key_row,  # strides
    key_head,
    key_column,
    values,
    value_row,
    value_head,
    value_column,
    query,  # [B, H, n, d]
    heads,  # H
    kv_heads,  # KVH
    queries,  # n
    dim,  # d
    DIM: tl.constexpr,
):
    """Program (m, head) turns a head to its position and puts it where it belongs."""
    head = tl.program_id(0)
    m = tl.program_id(1).to(tl.int64)
    b, i = m // queries, m % queries
    d = tl.arange(0, DIM)
    inside = d < dim
    half = dim // 2
    turned = tl.where(d < half, d + half, d - half)
    from_ = fused + m * (heads + 2 * kv_heads) * dim + head * dim
    given = tl.load(from_ + d, mask=inside, other=0.0)
    column = tl.load(columns + m)
    if head >= heads + kv_heads:
        own = (head - heads - kv_heads).to(tl.int64)
        tl.store(values + b * value_row + own * value_head + column * value_column + d, given, mask=inside)
    else:
        value = given.to(tl.float32)
        pair = tl.load(from_ + turned, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(cosine + m * dim + d, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sine + m * dim + d, mask=inside, other=0.0).to(tl.float32)
        s = tl.where(d < half, -s, s)
        if head >= heads:
            value, pair = normed(value, pair, key_norm, d, turned, dim, epsilon)
            kept = keys + b * key_row + (head - heads).to(tl.int64) * key_head + column * key_column + d
            tl.store(kept, (value * c + pair * s).to(keys.dtype.element_ty), mask=inside)
        else:
            value, pair = normed(value, pair, query_norm, d, turned, dim, epsilon)
            place = query + ((b * heads + head) * queries + i) * dim + d
            tl.store(place, (value * c + pair * s).to(query.dtype.element_ty), mask=inside)
