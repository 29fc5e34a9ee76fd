"""The ops `project` and `range_sums`: masses of a law put together in another way."""

import triton
import triton.language as tl


@triton.jit
def project_kernel(q, stride, entries, row_start, column, listed, out, width, splits, BLOCK: tl.constexpr):
    """Program (n, split) gathers BLOCK target ids of row n; a map that points outside is read as no mass."""
    program = tl.program_id(0)
    n = (program // splits).to(tl.int64)
    ids = program % splits * BLOCK + tl.arange(0, BLOCK)
    inside = ids < width
    begin = tl.load(row_start + ids, mask=inside, other=0)
    end = tl.load(row_start + ids + 1, mask=inside, other=0)
    total = tl.zeros((BLOCK,), tl.float64)
    for j in range(0, tl.max(end - begin, 0)):
        at = begin + j
        there = (at >= 0) & (at < end) & (at < listed)
        entry = tl.load(column + at, mask=there, other=0)
        there = there & (entry >= 0) & (entry < entries)
        total += tl.load(q + n * stride + entry, mask=there, other=0.0).to(tl.float64)
    tl.store(out + n * width + ids, total, mask=inside)


@triton.jit
def masses_of(q, entries, order, length, tile, BLOCK: tl.constexpr):
    """A tile of the masses in the given order; 0 behind the end, and where the order points outside."""
    place = tile * BLOCK + tl.arange(0, BLOCK)
    there = place < length
    if order is None:
        return tl.load(q + place, mask=there, other=0.0).to(tl.float64)
    else:
        entry = tl.load(order + place, mask=there, other=-1)
        return tl.load(q + entry, mask=(entry >= 0) & (entry < entries), other=0.0).to(tl.float64)


@triton.jit
def tile_sums_kernel(q, stride, entries, order, length, sums, tiles, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    n = (program // tiles).to(tl.int64)
    tl.store(sums + program, tl.sum(masses_of(q + n * stride, entries, order, length, program % tiles, BLOCK), 0))


@triton.jit
def edge(q, entries, order, length, sums, tiles, end, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """The mass of the first ``end`` entries: whole tiles, then the beginning of one."""
    end = tl.minimum(tl.maximum(end, 0), length)
    tile = end // BLOCK
    place = tl.arange(0, TILES)
    whole = tl.sum(tl.load(sums + place, mask=(place < tiles) & (place < tile), other=0.0), 0)
    part = masses_of(q, entries, order, length, tile, BLOCK)
    return whole + tl.sum(tl.where(tl.arange(0, BLOCK) < end - tile * BLOCK, part, 0.0), 0)


@triton.jit
def range_sums_kernel(
    q, stride, entries, order, length, sums, tiles, low, high, out, ranges, BLOCK: tl.constexpr, TILES: tl.constexpr
):
    """Program (n, r) takes the difference of two edges."""
    program = tl.program_id(0).to(tl.int64)
    n = program // ranges
    row = q + n * stride
    sums += n * tiles
    below = edge(row, entries, order, length, sums, tiles, tl.load(low + program), BLOCK, TILES)
    above = edge(row, entries, order, length, sums, tiles, tl.load(high + program), BLOCK, TILES)
    tl.store(out + program, tl.maximum(above - below, 0.0))
