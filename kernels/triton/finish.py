"""Second launch of `verify`: where the round ends, and the token behind."""

import triton
import triton.language as tl

from specdec_fast.triton_kernels.laws import POINT, kind_at, residual
from specdec_fast.triton_kernels.numbers import ACCEPT, RESIDUAL, in_units_of_one, uniform
from specdec_fast.triton_kernels.rows import (
    arrive,
    draw,
    log_prob,
    merge,
    parameter,
    pick_entry,
    pick_tile,
    probabilities,
    scores_at,
)


@triton.jit
def finish_kernel(
    logits,  # arguments as in judge_kernel
    stride_row,
    stride_position,
    width,
    temperature,
    limits,
    tokens,
    count,
    kind,
    draft_logits,
    draft_stride_row,
    draft_stride_position,
    entries,
    draft_temperature,
    draft_limits,
    index,
    sparse_ids,
    sparse_log_q,
    listed,
    seed,
    start,
    base,
    positions,
    drafted,
    counters,  # [B] zeros
    peaks,
    masses,
    tops,
    totals,
    own,
    keep,
    log_ps,
    log_ratios,
    rests,  # [B, slots, tiles] int64: mass of the residual by tile, in units of 2^-60
    accepted,  # [B]
    next_token,
    log_probabilities,  # [B, P] or None
    status,
    slots,  # positions whose residual is measured: 1, or min(P, G) under rule block
    splits,
    tiles,
    RULE: tl.constexpr,
    STEPS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Program (b, slot, split) measures SPAN tiles of one residual; the last one of a row draws.

    Under *token* only the row of the first rejection is read, under *block* every drafted one. A row that rejected
    nothing, or that matches, is left to its first program.
    """
    program = tl.program_id(0)
    split = program % splits
    slot = program // splits % slots
    b = (program // (splits * slots)).to(tl.int64)
    length = tl.maximum(tl.minimum(tl.minimum(tl.load(count + b), drafted), positions), 0)
    heat = parameter(temperature, b, 1.0)
    matching = (RULE == 0) | (heat == 0.0)
    at = b * 2 * positions
    own += b * positions
    keep += b * positions
    log_ps += b * positions
    log_ratios += b * positions

    # Where the draft ends: under block at the latest before an undefined row, else behind the first token not kept
    blockwise = (RULE == 2) & (matching == 0)
    place = tl.arange(0, PLACES)
    in_draft = place < length
    if blockwise:
        row_total = tl.load(totals + at + place, mask=in_draft, other=1.0)
        stop = (row_total != row_total) | (place >= length)
    else:
        stop = tl.load(keep + place, mask=in_draft, other=0) == 0
    end = tl.min(tl.where(stop, place, PLACES), 0)

    measured = (matching == 0) & (end < length)
    spot = end
    if blockwise:
        measured = end > 0
        spot = slot
    if (measured == 0) & ((slot > 0) | (split > 0)):
        return
    rests += b * slots * tiles
    if measured & (spot < length) & (spot <= end):
        weight = weight_at(log_ratios, tl.where(blockwise, spot, 0))
        law = kind_at(kind, b * drafted + spot, parameter(draft_temperature, b, 1.0), draft_logits, sparse_ids)
        token = tl.load(tokens + b * drafted + spot)
        top = tl.load(tops + at + spot)
        total = tl.load(totals + at + spot)
        if total == total:
            for tile in range(split * SPAN, tl.minimum(split * SPAN + SPAN, tl.cdiv(width, BLOCK))):
                if (law == POINT) & (tile != token // BLOCK):  # nothing to subtract: the first launch knows its mass
                    peak = tl.load(peaks + (at + spot) * tiles + tile)
                    mass = tl.load(masses + (at + spot) * tiles + tile).to(tl.float64) * 8.881784197001252e-16
                    left = in_units_of_one(probabilities(peak, top, weight / total) * mass)
                else:
                    rest = residual(
                        b, spot, tile, weight,
                        logits, stride_row, stride_position, width, temperature, limits, tokens, kind, draft_logits,
                        draft_stride_row, draft_stride_position, entries, draft_temperature, draft_limits, index,
                        sparse_ids, sparse_log_q, listed, positions, drafted, tops, totals, STEPS, BLOCK,
                    )  # fmt: skip
                    left = tl.sum(in_units_of_one(rest), 0)
                tl.store(rests + slot * tiles + tile, left)
    if not arrive(counters + b, tl.where(measured, splits * slots, 1)):
        return

    tile_place = tl.arange(0, TILES)
    there = tile_place < tl.cdiv(width, BLOCK)
    if blockwise:
        stay = end * 0
        for i in range(1, end + 1):
            chance = weight_at(log_ratios, i)
            if i < end:
                left = tl.load(rests + i * tiles + tile_place, mask=there, other=0, cache_modifier=".cg")
                mass = tl.sum(left, 0).to(tl.float64) * 8.673617379884035e-19
                whole = mass + (1.0 - chance)
                chance = tl.where(whole > 0.0, mass / whole, 1.0)
            u = uniform(tl.load(seed + b), tl.load(start + b), (base + i - 1).to(tl.int64), ACCEPT)
            stay = tl.where(u < chance, i, stay)
    else:
        stay = end
    tl.store(accepted + b, stay.to(tl.int64))

    token = tl.full((), -1, tl.int64)
    log_p = tl.full((), 0.0, tl.float64)
    undefined = tl.full((), 0, tl.int32)
    if stay < positions:
        row = logits + b * stride_row + stay.to(tl.int64) * stride_position
        limit = limits if limits is None else tl.load(limits + b * positions + stay)
        here = (at + stay) * tiles
        top, total, mass = merge(peaks + here, masses + here, width, heat, BLOCK, TILES)
        token = tl.full((), 0, tl.int64)
        log_p = tl.full((), float("nan"), tl.float64)
        if total != total:
            undefined = tl.full((), 1, tl.int32)
        elif matching:
            token = tl.load(own + stay)
            log_p = log_prob(scores_at(row, token, width, heat, limit), top, total)
            if heat == 0.0:
                log_p = tl.full((), 0.0, tl.float64)
        else:
            u = uniform(tl.load(seed + b), tl.load(start + b), (base + stay).to(tl.int64), RESIDUAL)
            rejected = stay < tl.where(blockwise, end, length)
            left = tl.zeros((TILES,), tl.int64)
            if rejected:
                if tl.load(totals + at + positions + stay) != tl.load(totals + at + positions + stay):
                    undefined = tl.full((), 2, tl.int32)
                from_slot = rests + tl.where(blockwise, stay, 0) * tiles
                left = tl.load(from_slot + tile_place, mask=there, other=0, cache_modifier=".cg")
            if tl.sum(left, 0) > 0:
                tile, depth, own_mass = pick_tile(left, u, TILES)
                rest = residual(
                    b, stay, tile, weight_at(log_ratios, tl.where(blockwise, stay, 0)),
                    logits, stride_row, stride_position, width, temperature, limits, tokens, kind, draft_logits,
                    draft_stride_row, draft_stride_position, entries, draft_temperature, draft_limits, index,
                    sparse_ids, sparse_log_q, listed, positions, drafted, tops, totals, STEPS, BLOCK,
                )  # fmt: skip
                # Relative to the tile, so that a tile with any mass has an entry with some
                entry = pick_entry(in_units_of_one(rest * (1125899906842624.0 / own_mass)), depth)
                token = (tile * BLOCK + entry).to(tl.int64)
            else:
                token = draw(row, width, heat, limit, top, total, mass, u, BLOCK, TILES)
            log_p = log_prob(scores_at(row, token, width, heat, limit), top, total)
    tl.store(next_token + b, token)
    tl.store(status + b, undefined)
    if log_probabilities is not None:
        kept = tl.load(log_ps + place, mask=place < stay, other=-1.0)
        tl.store(
            log_probabilities + b * positions + place, tl.where(place == stay, log_p, kept), mask=place < positions
        )


@triton.jit
def weight_at(log_ratios, i):
    """``w_i`` of block verification, min(1, w_{i-1} p/q) from w_0 = 1."""
    log_weight = tl.full((), 0.0, tl.float64)
    for k in range(0, i):
        log_weight = tl.minimum(log_weight + tl.load(log_ratios + k), 0.0)
    return tl.exp(log_weight)
