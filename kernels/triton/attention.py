"""Attention of a few queries a row over the valid part of a static cache. Defined in specdec_fast/attention_ops.py.

All queries that share keys and values, those of a group of heads at every position, are the rows of one tile, so that
the cache is read once. What a row of the batch sees is shared out evenly among the programs of a fixed number of
splits; a second launch merges their results.
"""

import triton
import triton.language as tl


@triton.jit
def number(pointer, stride, b):
    """A row's int64 parameter; 0 where none was given."""
    if pointer is None:
        return tl.full((), 0, tl.int64)
    else:
        return tl.load(pointer + b * stride)


@triton.jit
def product(a, b, WIDEN: tl.constexpr):
    """Of two tiles, summed in float32. The interpreter knows no bfloat16 product: WIDEN is for it."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def attend_kernel(
    query,  # [B, H, n, d]
    query_row,  # strides
    query_head,
    query_position,
    key,  # [B, KVH, C, d]
    key_row,
    key_head,
    key_column,
    value,  # [B, KVH, C, d]
    value_row,
    value_head,
    value_column,
    start,  # [B] int64
    start_row,
    hidden,  # [B] int64 or None
    hidden_row,
    window,  # [B] int64 or None
    window_row,
    scale,
    softcap,
    out,  # [B, n, H, d]
    weighted,  # [B, KVH, splits, M, d] float32: sums of values, with SPLITS > 1
    peaks,  # [B, KVH, splits, M] float32: largest scores
    masses,  # the same: sums of exp(score - peak)
    heads,  # KVH
    group,  # H / KVH
    queries,  # n
    capacity,  # C
    dim,  # d
    tiles,  # of M = group * n rows
    SOFTCAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Program (b, head, tile; split) attends from ROWS queries to one split's columns."""
    program = tl.program_id(0)
    split = tl.program_id(1)
    tile = program % tiles
    head = program // tiles % heads
    b = (program // (tiles * heads)).to(tl.int64)
    m = tile * ROWS + tl.arange(0, ROWS)
    live = m < group * queries
    own_head = (head * group + m // queries).to(tl.int64)
    i = m % queries
    d = tl.arange(0, DIM)
    q_place = b * query_row + own_head[:, None] * query_head + i[:, None] * query_position + d[None, :]
    q = tl.load(query + q_place, mask=live[:, None] & (d < dim)[None, :], other=0.0)

    # A query sees from its window's first column, or the first that is not hidden, to its own; its own at any rate
    first = tl.minimum(tl.maximum(tl.load(start + b * start_row), 0), capacity - 1)
    covered = number(hidden, hidden_row, b)
    reach = number(window, window_row, b)
    reach = tl.where(reach > 0, reach, capacity)
    own = tl.minimum(first + i, capacity - 1)
    lowest = tl.maximum(own - reach + 1, covered)
    begin = tl.minimum(tl.maximum(tl.maximum(first - reach + 1, covered), 0), first)
    end = tl.minimum(first + queries, capacity)
    share = tl.cdiv(tl.cdiv(end - begin, COLUMNS), SPLITS) * COLUMNS
    from_column = begin + split * share
    to_column = tl.minimum(from_column + share, end)

    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, DIM), tl.float32)
    key += b * key_row + head.to(tl.int64) * key_head
    value += b * value_row + head.to(tl.int64) * value_head
    for at in range(from_column, to_column, COLUMNS):
        c = at + tl.arange(0, COLUMNS)
        there = c < to_column
        inside = there[:, None] & (d < dim)[None, :]
        k = tl.load(key + c[:, None] * key_column + d[None, :], mask=inside, other=0.0)
        v = tl.load(value + c[:, None] * value_column + d[None, :], mask=inside, other=0.0)
        scores = product(q, tl.trans(k), WIDEN) * scale
        if SOFTCAPPED:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        seen = (c[None, :] >= lowest[:, None]) & (c[None, :] <= own[:, None]) | (c[None, :] == own[:, None])
        scores = tl.where(seen & there[None, :], scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp(scores - shift[:, None])
        kept = tl.exp(peak - shift)
        mass = mass * kept + tl.sum(weights, 1)
        total = total * kept[:, None] + product(weights.to(v.dtype), v, WIDEN)
        peak = higher

    inside = live[:, None] & (d < dim)[None, :]
    if SPLITS == 1:
        o_place = ((b * queries + i[:, None]) * heads * group + own_head[:, None]) * dim + d[None, :]
        tl.store(out + o_place, (total / mass[:, None]).to(out.dtype.element_ty), mask=inside)
    else:
        place = ((b * heads + head) * SPLITS + split) * group * queries + m
        tl.store(peaks + place, peak, mask=live)
        tl.store(masses + place, mass, mask=live)
        tl.store(weighted + place[:, None] * dim + d[None, :], total, mask=inside)


@triton.jit
def merge_kernel(
    weighted,  # [B, KVH, splits, M, d]
    peaks,  # [B, KVH, splits, M]
    masses,
    out,  # [B, n, H, d]
    heads,  # KVH
    group,
    queries,
    dim,
    SPLITS: tl.constexpr,
    PLACES: tl.constexpr,
    DIM: tl.constexpr,
):
    """Program (b, head, m) puts the splits of one query together."""
    program = tl.program_id(0)
    m = program % (group * queries)
    b_head = (program // (group * queries)).to(tl.int64)
    split = tl.arange(0, PLACES)
    d = tl.arange(0, DIM)
    place = (b_head * SPLITS + split) * group * queries + m
    peak = tl.load(peaks + place, mask=split < SPLITS, other=-float("inf"))
    mass = tl.load(masses + place, mask=split < SPLITS, other=0.0)
    kept = tl.exp(peak - tl.max(peak, 0))  # the split with the query's own column has a peak
    inside = (split < SPLITS)[:, None] & (d < dim)[None, :]
    part = tl.load(weighted + place[:, None] * dim + d[None, :], mask=inside, other=0.0)
    result = tl.sum(part * kept[:, None], 0) / tl.sum(mass * kept, 0)
    b = b_head // heads
    own_head = b_head % heads * group + m // queries
    row = (b * queries + m % queries) * heads * group + own_head
    tl.store(out + row * dim + d, result.to(out.dtype.element_ty), mask=d < dim)
