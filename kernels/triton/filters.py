"""Top-k, top-p and min-p as one limit a row, without sorting it. The law is defined in specdec_fast/ops.py.

Entries have one order, by score and then by id (``order_of``), and each filter keeps those from some place in it on:
the highest of the three places is the row's limit. Min-p's follows from the largest score. Those of top-k and top-p are
found digit by digit, a launch a digit: the programs of a row count the entries at or above each of WAYS pivots, or add
up their masses, and the last of them goes on from the highest pivot that keeps enough. The sums are of integers, so a
limit depends on neither the batch nor the order in which programs ran.
"""

import triton
import triton.language as tl

from specdec_fast.triton_kernels.rows import arrive, measure, order_of, parameter, scores_at, tile_weights


@triton.jit
def row_is_used(count, b, i, longest, more):
    """Whether position i of row b is looked at: the draft's, at most ``longest``, and ``more`` behind them."""
    if count is None:
        return i >= 0
    else:
        return i < tl.maximum(tl.minimum(tl.load(count + b), longest), 0) + more


@triton.jit
def row_peak(peaks, tiles, TILES: tl.constexpr):
    """The row's largest score; NaN where the row is undefined."""
    place = tl.arange(0, TILES)
    # Written by other programs of this launch, in the first of them: around the first-level cache
    peak = tl.load(peaks + place, mask=place < tiles, other=-float("inf"), cache_modifier=".cg")
    undefined = tl.max((peak != peak).to(tl.int32), 0) > 0
    top = tl.max(tl.where(peak != peak, -float("inf"), peak), 0)
    return tl.where(undefined | (top == -float("inf")), float("nan"), top)


@triton.jit
def floor_kernel(
    logits,  # [B, P, V]
    stride_row,
    stride_position,
    width,
    temperature,  # [B] or None
    min_p,  # [B] or None
    count,  # [B] or None
    longest,
    more,
    counters,  # [B, P] zeros, left as zeros
    peaks,  # [B, P, tiles] float32
    places,  # [B, P] int64: where min-p starts to keep
    positions,
    splits,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Program (b, i, split) finds the largest scores of SPAN tiles; the last one of a row, min-p's place."""
    program = tl.program_id(0)
    at = (program // splits).to(tl.int64)
    b = at // positions
    i = at % positions
    if not row_is_used(count, b, i, longest, more):
        return
    heat = parameter(temperature, b, 1.0)
    tiles = tl.cdiv(width, BLOCK)
    peaks += at * tiles
    row = logits + b * stride_row + i * stride_position
    measure(row, width, heat, None, program % splits * SPAN, peaks, None, SPAN, BLOCK)
    if not arrive(counters + at, splits):
        return
    tl.store(counters + at, 0)
    if min_p is not None:
        share = tl.load(min_p + b).to(tl.float64)
        top = row_peak(peaks, tiles, TILES)
        if (share > 0.0) & (heat != 0.0) & (top == top):
            floor = top.to(tl.float64) + tl.log(tl.minimum(share, 1.0))
            lowest = floor.to(tl.float32)
            # Rounded down, the number itself is below the floor: the next one is the first to keep
            below = (lowest.to(tl.float64) < floor).to(tl.int64)
            tl.store(places + at, order_of(lowest, below * 0) + (below << 32))


@triton.jit(do_not_specialize=["shift", "first"])
def narrow_kernel(
    logits,  # [B, P, V]
    stride_row,
    stride_position,
    width,
    temperature,  # [B] or None
    amount,  # [B]: top_k int32 or top_p float32
    count,  # [B] or None
    longest,
    more,
    counters,  # [B, P] zeros, left as zeros
    peaks,  # [B, P, tiles] float32
    kept,  # [B, P] int64 or None: what is below was dropped before
    places,  # [B, P] int64: the digits known so far
    found,  # [B, P, WAYS] int64 zeros, left as zeros
    whole,  # [B, P] int64: top-p's mass of all that is kept
    positions,
    splits,
    shift,  # of this launch's digit
    first,  # whether it is the first digit
    BY_MASS: tl.constexpr,  # top-p, else top-k
    SCALE: tl.constexpr,  # masses are in units of 2^(SCALE - 50), so that those of a row add up
    WAYS: tl.constexpr,
    PART: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Program (b, i, split) counts or weighs what SPAN tiles hold at or above each pivot."""
    program = tl.program_id(0)
    at = (program // splits).to(tl.int64)
    b = at // positions
    i = at % positions
    if not row_is_used(count, b, i, longest, more):
        return
    heat = parameter(temperature, b, 1.0)
    wanted = tl.load(amount + b)
    filtered = wanted < 1.0 if BY_MASS else (wanted > 0) & (wanted < width)
    tiles = tl.cdiv(width, BLOCK)
    peaks += at * tiles
    top = row_peak(peaks, tiles, TILES)
    if (filtered == 0) | (heat == 0.0) | (top != top):
        return

    row = logits + b * stride_row + i * stride_position
    low = tl.load(places + at)
    ways = tl.arange(0, WAYS)
    pivots = low + (ways.to(tl.int64) << shift)  # may pass the largest integer: the first digit starts at the smallest
    passed = tl.zeros((WAYS, PART), tl.int64)
    start = program % splits * SPAN
    for tile in range(start, tl.minimum(start + SPAN, tiles)):
        if order_of(tl.load(peaks + tile), tl.full((), 0x7FFFFFFF, tl.int64)) >= low:
            for part in range(BLOCK // PART):
                ids = tile * BLOCK + part * PART + tl.arange(0, PART)
                scores = scores_at(row, ids, width, heat, None)
                order = order_of(scores, ids)
                if BY_MASS:
                    worth = tile_weights(scores, top)
                    if kept is not None:
                        worth = tl.where(order < tl.load(kept + at), 0, worth)
                else:
                    worth = (ids < width).to(tl.int64)
                passed += tl.where(order[None, :] >= pivots[:, None], worth[None, :], 0)
    sum_ = tl.sum(passed, 1)
    if BY_MASS:
        sum_ = (sum_ + ((1 << SCALE) >> 1)) >> SCALE
    tl.atomic_add(found + at * WAYS + ways, sum_)
    if not arrive(counters + at, splits):
        return

    tl.store(counters + at, 0)
    sum_ = tl.load(found + at * WAYS + ways, cache_modifier=".cg")
    tl.store(found + at * WAYS + ways, tl.zeros((WAYS,), tl.int64))
    if BY_MASS:
        total = tl.load(whole + at)
        if first:
            total = tl.max(sum_, 0)
            tl.store(whole + at, total)
        # What lies below may be dropped; the last entry stays whatever top_p is
        allowed = (1.0 - wanted.to(tl.float64)) * total.to(tl.float64)
        enough = ((total - sum_).to(tl.float64) <= allowed) & (sum_ > 0)
    else:
        enough = sum_ >= wanted
    way = tl.max(tl.where(enough, ways, 0), 0).to(tl.int64)
    tl.store(places + at, low + (way << shift))
