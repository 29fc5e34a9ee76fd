"""The ops `sample` (one launch) and `softmax` (two)."""

import triton
import triton.language as tl

from specdec_fast.triton_kernels.numbers import uniform
from specdec_fast.triton_kernels.rows import (
    arrive,
    draw,
    log_prob,
    measure,
    merge,
    parameter,
    probabilities,
    scores_at,
)


@triton.jit
def sample_kernel(
    logits,  # [B, V]
    stride,
    width,
    temperature,  # [B] or None
    limits,  # [B] int64 or None
    seed,
    position,
    offset,  # [B] or None
    counters,  # [B] zeros
    peaks,  # [B, tiles]
    masses,
    token,
    log_probability,
    logsumexp,
    status,
    splits,
    PURPOSE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Program (b, split) measures SPAN tiles of row b; the last one of a row draws."""
    program = tl.program_id(0)
    b = (program // splits).to(tl.int64)
    row = logits + b * stride
    heat = parameter(temperature, b, 1.0)
    limit = limits if limits is None else tl.load(limits + b)
    tiles = tl.cdiv(width, BLOCK)
    peaks += b * tiles
    masses += b * tiles
    measure(row, width, heat, limit, program % splits * SPAN, peaks, masses, SPAN, BLOCK)
    if not arrive(counters + b, splits):
        return

    top, total, mass = merge(peaks, masses, width, heat, BLOCK, TILES)
    undefined = total != total
    drawn = tl.full((), 0, tl.int64)
    log_p = tl.full((), float("nan"), tl.float64)
    normaliser = log_p
    if not undefined:
        if offset is None:
            u = uniform(tl.load(seed + b), tl.load(position + b), tl.full((), 0, tl.int64), PURPOSE)
        else:
            u = uniform(tl.load(seed + b), tl.load(position + b), tl.load(offset + b), PURPOSE)
        drawn = draw(row, width, heat, limit, top, total, mass, u, BLOCK, TILES)
        normaliser = top.to(tl.float64) + tl.log(total)
        log_p = log_prob(scores_at(row, drawn, width, heat, limit), top, total)
        if heat == 0.0:
            log_p = tl.full((), 0.0, tl.float64)
    tl.store(token + b, drawn)
    tl.store(log_probability + b, log_p)
    tl.store(logsumexp + b, normaliser)
    tl.store(status + b, undefined.to(tl.int32))


@triton.jit
def measure_kernel(
    logits, stride, width, temperature, limits, peaks, masses, splits, SPAN: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    b = (program // splits).to(tl.int64)
    tiles = tl.cdiv(width, BLOCK)
    heat = parameter(temperature, b, 1.0)
    first = program % splits * SPAN
    limit = limits if limits is None else tl.load(limits + b)
    measure(logits + b * stride, width, heat, limit, first, peaks + b * tiles, masses + b * tiles, SPAN, BLOCK)


@triton.jit
def softmax_kernel(
    logits,  # [B, V]
    stride,
    width,
    temperature,
    limits,
    peaks,
    masses,
    out,  # [B, V] float64
    splits,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Program (b, split) writes SPAN tiles of row b."""
    program = tl.program_id(0)
    b = (program // splits).to(tl.int64)
    row = logits + b * stride
    heat = parameter(temperature, b, 1.0)
    limit = limits if limits is None else tl.load(limits + b)
    tiles = tl.cdiv(width, BLOCK)
    top, total, mass = merge(peaks + b * tiles, masses + b * tiles, width, heat, BLOCK, TILES)
    certain = tl.full((), -1, tl.int64)
    if heat == 0.0:
        certain = draw(row, width, heat, limit, top, total, mass, 0.5, BLOCK, TILES)
    first = program % splits * SPAN
    for tile in range(first, tl.minimum(first + SPAN, tiles)):
        ids = tile * BLOCK + tl.arange(0, BLOCK)
        scores = scores_at(row, ids, width, heat, limit)
        p = probabilities(scores, top.to(tl.float64), 1.0 / total)
        if heat == 0.0:
            p = tl.where(ids == certain, 1.0, 0.0).to(tl.float64)
        p = tl.where(total != total, float("nan"), p)
        tl.store(out + b * width + ids, p, mask=ids < width)
