"""Rows of scores: read tile by tile, merged, and drawn from. The law of a row is defined in specdec_fast/ops.py.

A tile is BLOCK entries. A first pass leaves two numbers a tile, its largest score and its mass relative to that;
whoever needs the row's law merges them. A draw finds the tile by those masses and reads that one again. Filters are one
limit a row (filters.py): what comes before it in the order of ``order_of`` has the score ``-inf``. A limit of None
filters nothing; whoever needs one loads it itself, since a device function of Triton 3.6 cannot return None.
"""

# ruff: noqa: SIM102  - a condition known when compiling stands alone
import triton
import triton.language as tl

from specdec_fast.triton_kernels.numbers import (
    LARGEST,
    exponential,
    in_units_of_one,
    in_units_of_the_peak,
    level_of,
)


@triton.jit
def parameter(pointer, row, default: tl.constexpr):
    """A row's float parameter, or the default where none was given."""
    if pointer is None:
        return tl.full((), default, tl.float32)
    else:
        return tl.load(pointer + row)


@triton.jit
def order_of(scores, ids):
    """Entries as int64 in the order of their scores, lower id first among equals; both zeros are one score."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) << 32) | ids


@triton.jit
def scores_at(row, ids, width, temperature, limit):
    """Scores as the law has them; -inf for ids outside the row. At temperature 0 the logits themselves."""
    inside = (ids >= 0) & (ids < width)
    scores = tl.load(row + ids, mask=inside, other=-float("inf")).to(tl.float32)
    if temperature != 1.0:
        scores = tl.div_rn(scores, tl.zeros_like(scores) + tl.where(temperature == 0.0, 1.0, temperature))
    if limit is not None:
        scores = tl.where(order_of(scores, ids) < limit, -float("inf"), scores)
    return scores


@triton.jit
def tile_weights(scores, peak):
    """exp(score - peak) of a tile in units of 2^-50; ``peak`` is the tile's own, or anything above -inf."""
    if peak == float("inf"):
        scores = tl.where(scores == float("inf"), LARGEST, -float("inf"))
    shift = tl.where(peak == -float("inf"), 0.0, tl.minimum(peak, LARGEST))
    return in_units_of_the_peak(exponential(scores.to(tl.float64) - shift.to(tl.float64)))


@triton.jit
def measure(row, width, temperature, limit, first, peaks, masses, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """Writes peak (NaN where the tile holds one) and, where asked for, mass of SPAN tiles from tile ``first`` on."""
    for tile in range(first, tl.minimum(first + SPAN, tl.cdiv(width, BLOCK))):
        scores = scores_at(row, tile * BLOCK + tl.arange(0, BLOCK), width, temperature, limit)
        undefined = tl.max((scores != scores).to(tl.int32), 0) > 0
        scores = tl.where(scores != scores, -float("inf"), scores)
        peak = tl.max(scores, 0)
        if masses is not None:
            if temperature != 0.0:
                tl.store(masses + tile, tl.sum(tile_weights(scores, peak), 0))
        tl.store(peaks + tile, tl.where(undefined, float("nan"), peak))


@triton.jit
def merge(peaks, masses, width, temperature, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """The row's peak float32, its mass relative to that float64 (NaN: undefined), and the masses of its tiles."""
    place = tl.arange(0, TILES)
    there = place < tl.cdiv(width, BLOCK)
    # Written by other programs of this launch: around the first-level cache
    peak = tl.load(peaks + place, mask=there, other=-float("inf"), cache_modifier=".cg")
    undefined = tl.max((peak != peak).to(tl.int32), 0) > 0
    peak = tl.where(peak != peak, -float("inf"), peak)
    top = tl.max(peak, 0)
    if top == float("inf"):
        peak = tl.where(peak == float("inf"), LARGEST, -float("inf"))
    shift = tl.where(top == -float("inf"), 0.0, tl.minimum(top, LARGEST))
    if temperature == 0.0:
        mass = tl.where(peak == shift, 1.0, 0.0).to(tl.float64)
        total = tl.full((), 1.0, tl.float64)
    else:
        mass = tl.load(masses + place, mask=there, other=0, cache_modifier=".cg").to(tl.float64)
        mass *= 8.881784197001252e-16 * tl.exp(peak.to(tl.float64) - shift.to(tl.float64))
        total = tl.sum(mass, 0)
    undefined = undefined | (top == -float("inf"))
    return top, tl.where(undefined, float("nan"), total), mass


@triton.jit
def log_prob(score, top, total):
    """log p of an entry with this score in a row whose logsumexp is ``top + log(total)``; NaN where undefined."""
    if top == float("inf"):
        score = tl.where(score == float("inf"), LARGEST, -float("inf"))
    return score.to(tl.float64) - tl.minimum(top, LARGEST).to(tl.float64) - tl.log(total)


@triton.jit
def probabilities(scores, peak, scale):
    """``scale * exp(score - peak)`` of entries of a defined row, ``peak`` float64; 0 is exact."""
    if peak == float("inf"):
        scores = tl.where(scores == float("inf"), LARGEST, -float("inf"))
        peak = tl.full((), LARGEST, tl.float64)
    return tl.where(scores == -float("inf"), 0.0, scale * exponential(scores.to(tl.float64) - peak))


@triton.jit
def pick_tile(masses, u, TILES: tl.constexpr):
    """Where ``u`` of the sum of int64 masses falls: the tile, how far into it (0 to 1), its mass as float64."""
    cumulative = tl.cumsum(masses, 0)
    level = level_of(u, tl.sum(masses, 0))
    tile = tl.sum((cumulative <= level).to(tl.int32), 0)
    place = tl.arange(0, TILES)
    before = tl.sum(tl.where(place < tile, masses, 0), 0)
    own = tl.sum(tl.where(place == tile, masses, 0), 0).to(tl.float64)
    return tile, (level - before).to(tl.float64) / own, own


@triton.jit
def pick_entry(weights, depth):
    """The entry of a tile where ``depth`` of the sum of its int64 weights falls; one without weight never."""
    cumulative = tl.cumsum(weights, 0)
    level = level_of(depth, tl.sum(weights, 0))
    return tl.sum((cumulative <= level).to(tl.int32), 0)


@triton.jit
def draw(row, width, temperature, limit, top, total, masses, u, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """One draw from a defined row as ``merge`` left it: the argmax at temperature 0."""
    place = tl.arange(0, BLOCK)
    if temperature == 0.0:
        tiles = tl.arange(0, TILES)
        tile = tl.min(tl.where(masses > 0.0, tiles, TILES), 0)
        scores = scores_at(row, tile * BLOCK + place, width, temperature, limit)
        entry = tl.min(tl.where(scores == top, place, BLOCK - 1), 0)
    else:
        tile, depth, _ = pick_tile(in_units_of_one(masses / total), u, TILES)
        scores = scores_at(row, tile * BLOCK + place, width, temperature, limit)
        entry = pick_entry(tile_weights(scores, tl.max(scores, 0)), depth)
    return (tile * BLOCK + entry).to(tl.int64)


@triton.jit
def arrive(counter, expected):
    """Whether this program is the last of ``expected`` at a counter; what the others wrote is then visible."""
    tl.debug_barrier()  # every thread's writes come before the one thread's atomic
    return tl.atomic_add(counter, 1) == expected - 1
