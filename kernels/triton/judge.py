"""First launch of `verify`: the statistics of every row, and what they say of each drafted position."""

# ruff: noqa: SIM102  - a condition known when compiling stands alone
import triton
import triton.language as tl

from specdec_fast.triton_kernels.laws import (
    COMPACT,
    SPARSE,
    compact_log_q,
    kind_at,
    sparse_mass,
    sparse_undefined,
)
from specdec_fast.triton_kernels.numbers import ACCEPT, TARGET, uniform
from specdec_fast.triton_kernels.rows import arrive, draw, log_prob, measure, merge, parameter, scores_at


@triton.jit
def judge_kernel(
    logits,  # [B, P, V]
    stride_row,
    stride_position,
    width,
    temperature,  # [B] or None, as every draft_* below
    limits,  # [B, P] int64 or None
    tokens,  # [B, G]
    count,  # [B]
    kind,  # [B, G]
    draft_logits,  # [B, G, K]
    draft_stride_row,
    draft_stride_position,
    entries,
    draft_temperature,  # [B]
    draft_limits,  # [B, G] int64
    index,  # [K]
    drawn,  # [B, G]
    draft_logsumexp,  # [B, G]
    sparse_ids,  # [B, G, S]
    sparse_log_q,
    listed,
    seed,
    start,
    base,
    positions,  # P
    drafted,  # G
    counters,  # [B, P] zeros
    peaks,  # [B, 2P, tiles] float32: the target's rows, then the drafter's
    masses,  # the same, int64
    tops,  # [B, 2P] float64
    totals,
    own,  # [B, P] int64, rows that match
    keep,  # [B, P] int32
    log_ps,  # [B, P] float64
    log_ratios,
    slots,  # P, or 2P with draft_logits
    splits,
    tiles,
    RULE: tl.constexpr,
    STEPS: tl.constexpr,
    LISTED: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Program (b, slot, split) measures SPAN tiles of one row; the last one of a position judges it.

    *match* (and rows at temperature 0): own = the target's token, keep = whether it is the draft token.
    *token*, *block*: keep = whether the draft token passes the test, log_ratio = log p - log q of it.
    """
    program = tl.program_id(0)
    slot = program // splits % slots
    b = (program // (splits * slots)).to(tl.int64)
    first = program % splits * SPAN
    i = slot % positions
    length = tl.maximum(tl.minimum(tl.minimum(tl.load(count + b), drafted), positions), 0)
    tested = i < length
    if (i > length) | ((slot >= positions) & (i >= length)):
        return

    heat = parameter(temperature, b, 1.0)
    limit = limits if limits is None else tl.load(limits + b * positions + i)
    matching = (RULE == 0) | (heat == 0.0)
    row = logits + b * stride_row + i.to(tl.int64) * stride_position
    place = b * drafted + i
    token = tl.load(tokens + place, mask=tested, other=-1)
    draft_heat = parameter(draft_temperature, b, 1.0)
    law = tl.full((), 0, tl.int32)
    if tested & (matching == 0):
        law = kind_at(kind, place, draft_heat, draft_logits, sparse_ids)
    at = b * 2 * positions + i
    draft_at = at + positions
    draft_row = logits
    if draft_logits is not None:
        draft_row = draft_logits + b * draft_stride_row + i.to(tl.int64) * draft_stride_position
    known = tl.full((), float("nan"), tl.float64)
    if draft_logsumexp is not None:
        known = tl.load(draft_logsumexp + place, mask=tested, other=float("nan"))
    unknown = (known != known) | (tl.abs(known) == float("inf"))

    if slot < positions:
        measure(row, width, heat, limit, first, peaks + at * tiles, masses + at * tiles, SPAN, BLOCK)
    elif draft_logits is not None:
        if (law == COMPACT) & unknown:
            here = draft_at * tiles
            draft_limit = draft_limits if draft_limits is None else tl.load(draft_limits + place)
            measure(draft_row, entries, draft_heat, draft_limit, first, peaks + here, masses + here, SPAN, BLOCK)
    if not arrive(counters + b * positions + i, tl.where(tested, slots // positions, 1) * splits):
        return

    top, total, mass = merge(peaks + at * tiles, masses + at * tiles, width, heat, BLOCK, TILES)
    tl.store(tops + at, top.to(tl.float64))
    tl.store(totals + at, total)
    log_p = log_prob(scores_at(row, token, width, heat, limit), top, total)
    log_ratio = tl.full((), -float("inf"), tl.float64)
    choice = tl.full((), -1, tl.int64)
    kept = tl.full((), 0, tl.int32)
    if matching:
        if total == total:
            number = uniform(tl.load(seed + b), tl.load(start + b) + base + i, tl.full((), 0, tl.int64), TARGET)
            choice = draw(row, width, heat, limit, top, total, mass, number, BLOCK, TILES)
        kept = ((choice == token) & (token >= 0)).to(tl.int32)
        if heat == 0.0:
            log_p = tl.where(kept > 0, 0.0, -float("inf")).to(tl.float64)
    elif tested:
        log_q = tl.full((), 0.0, tl.float64)
        draft_total = tl.full((), 1.0, tl.float64)
        if draft_logits is not None:
            if law == COMPACT:
                draft_top = known
                if unknown:
                    here = draft_at * tiles
                    peak, draft_total, _ = merge(peaks + here, masses + here, entries, draft_heat, BLOCK, TILES)
                    draft_top = peak.to(tl.float64)
                draft_limit = draft_limits if draft_limits is None else tl.load(draft_limits + place)
                if drawn is not None:
                    scores = scores_at(draft_row, tl.load(drawn + place), entries, draft_heat, draft_limit)
                    log_q = log_prob(scores, draft_top, draft_total)
                else:
                    log_q = compact_log_q(
                        token, draft_row, index, entries, draft_heat, draft_limit, draft_top, draft_total, STEPS, BLOCK
                    )
                tl.store(tops + draft_at, draft_top)
        if sparse_ids is not None:
            if law == SPARSE:
                ids = sparse_ids + place * listed
                log_masses = sparse_log_q + place * listed
                log_q = sparse_mass(token, ids, log_masses, listed, LISTED)
                if sparse_undefined(width, ids, log_masses, listed, LISTED):
                    draft_total = tl.full((), float("nan"), tl.float64)
        tl.store(totals + draft_at, draft_total)
        u = uniform(tl.load(seed + b), tl.load(start + b), (base + i).to(tl.int64), ACCEPT)
        drawable = log_q > -float("inf")
        kept = (drawable & (log_p > tl.log(u) + log_q)).to(tl.int32)
        difference = log_p - log_q
        log_ratio = tl.where(drawable & (difference == difference), difference, -float("inf"))
    tl.store(own + b * positions + i, choice)
    tl.store(keep + b * positions + i, kept)
    tl.store(log_ps + b * positions + i, log_p)
    tl.store(log_ratios + b * positions + i, log_ratio)
