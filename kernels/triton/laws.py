"""The drafter's law at one position, and what is left of the target's once it is subtracted."""

# ruff: noqa: SIM102  - a condition known when compiling stands alone
import triton
import triton.language as tl

from specdec_fast.triton_kernels.rows import log_prob, parameter, probabilities, scores_at

POINT = tl.constexpr(0)  # ops.LawKind
COMPACT = tl.constexpr(1)
SPARSE = tl.constexpr(2)


@triton.jit
def kind_at(kind, place, draft_temperature, draft_logits, sparse_ids):
    """The kind of the law at ``place`` of [B, G]; POINT where what it needs is not given."""
    if kind is not None:
        chosen = tl.load(kind + place)
    elif draft_logits is not None:
        chosen = tl.full((), COMPACT, tl.int32)
    elif sparse_ids is not None:
        chosen = tl.full((), SPARSE, tl.int32)
    else:
        chosen = tl.full((), POINT, tl.int32)
    if draft_logits is None:
        chosen = tl.where(chosen == COMPACT, POINT, chosen)
    if sparse_ids is None:
        chosen = tl.where(chosen == SPARSE, POINT, chosen)
    chosen = tl.where((chosen == COMPACT) & (draft_temperature == 0.0), POINT, chosen)
    return tl.where((chosen == COMPACT) | (chosen == SPARSE), chosen, POINT)


@triton.jit
def entry_of(ids, index, entries, STEPS: tl.constexpr):
    """The first compact entry that stands for each target id, or -1: a search in the ascending map."""
    if index is None:
        return tl.where((ids >= 0) & (ids < entries), ids, -1)
    else:
        low = ids * 0
        high = low + entries
        for _ in range(STEPS):  # low is at most the first place whose id is not smaller, high at least
            middle = (low + high) // 2
            smaller = tl.load(index + middle, mask=low < high, other=0) < ids
            high = tl.where((low < high) & ~smaller, middle, high)
            low = tl.where((low < high) & smaller, middle + 1, low)
        found = tl.load(index + low, mask=low < entries, other=-1) == ids
        return tl.where(found & (low < entries), low, -1)


@triton.jit
def next_entry(entry, ids, index, entries):
    """The entry behind, where it stands for the same id; else -1."""
    after = entry + 1
    same = tl.load(index + after, mask=(entry >= 0) & (after < entries), other=-1) == ids
    return tl.where(same & (entry >= 0) & (after < entries), after, -1)


@triton.jit
def compact_log_q(token, row, index, entries, temperature, limit, top, total, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """log q of a token under a row of compact logits: of all entries that stand for it together."""
    entry = entry_of(token, index, entries, STEPS).to(tl.int64)
    log_q = log_prob(scores_at(row, entry, entries, temperature, limit), top, total)
    if index is not None:
        if next_entry(entry, token, index, entries) >= 0:
            mass = tl.full((), 0.0, tl.float64)
            more = True
            while more:
                run = entry + tl.arange(0, BLOCK)
                own = tl.load(index + run, mask=run < entries, other=-1) == token
                scores = scores_at(row, tl.where(own, run, -1), entries, temperature, limit)
                mass += tl.sum(probabilities(scores, top, 1.0 / total), 0)
                entry += BLOCK
                more = tl.min(own.to(tl.int32), 0) > 0
            log_q = tl.log(mass)
    return log_q


@triton.jit
def sparse_mass(token, ids, log_masses, listed, LISTED: tl.constexpr):
    """log q of a token under listed ids; -inf where it is none of them."""
    place = tl.arange(0, LISTED)
    id_ = tl.load(ids + place, mask=place < listed, other=-1)
    log_mass = tl.load(log_masses + place, mask=place < listed, other=-float("inf"))
    return tl.max(tl.where((id_ == token) & (id_ >= 0), log_mass, -float("inf")), 0)


@triton.jit
def sparse_undefined(width, ids, log_masses, listed, LISTED: tl.constexpr):
    place = tl.arange(0, LISTED)
    id_ = tl.load(ids + place, mask=place < listed, other=-1)
    log_mass = tl.load(log_masses + place, mask=(id_ >= 0) & (id_ < width), other=0.0)
    return tl.max((log_mass != log_mass).to(tl.int32), 0) > 0


@triton.jit
def residual(
    b,
    spot,
    tile,
    weight,
    logits,  # arguments as in judge_kernel
    stride_row,
    stride_position,
    width,
    temperature,
    limits,
    tokens,
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
    positions,
    drafted,
    tops,
    totals,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``max(0, weight * p - q)`` of one tile at position ``spot`` of row b; ``weight * p`` where q is undefined."""
    at = b * 2 * positions + spot
    draft_at = at + positions
    place = b * drafted + spot
    ids = tile * BLOCK + tl.arange(0, BLOCK)
    row = logits + b * stride_row + spot.to(tl.int64) * stride_position
    limit = limits if limits is None else tl.load(limits + (b * positions + spot))
    scores = scores_at(row, ids, width, parameter(temperature, b, 1.0), limit)
    rest = probabilities(scores, tl.load(tops + at), weight / tl.load(totals + at))
    draft_heat = parameter(draft_temperature, b, 1.0)
    law = kind_at(kind, place, draft_heat, draft_logits, sparse_ids)
    draft_total = tl.load(totals + draft_at)
    if draft_total == draft_total:
        if law == POINT:
            rest = tl.where(ids == tl.load(tokens + place), rest - 1.0, rest)
        if draft_logits is not None:
            if law == COMPACT:
                draft_row = draft_logits + b * draft_stride_row + spot.to(tl.int64) * draft_stride_position
                draft_limit = draft_limits if draft_limits is None else tl.load(draft_limits + place)
                draft_top = tl.load(tops + draft_at)
                entry = entry_of(ids, index, entries, STEPS)
                scores = scores_at(draft_row, entry, entries, draft_heat, draft_limit)
                rest -= probabilities(scores, draft_top, 1.0 / draft_total)
                if index is not None:
                    entry = next_entry(entry, ids, index, entries)
                    while tl.max(entry, 0) >= 0:  # as often as the most entries that stand for one id of the tile
                        scores = scores_at(draft_row, entry, entries, draft_heat, draft_limit)
                        rest -= probabilities(scores, draft_top, 1.0 / draft_total)
                        entry = next_entry(entry, ids, index, entries)
        if sparse_ids is not None:
            if law == SPARSE:
                for s in range(listed):
                    q = tl.exp(tl.load(sparse_log_q + place * listed + s))
                    rest = tl.where(ids == tl.load(sparse_ids + place * listed + s), rest - q, rest)
    return tl.maximum(rest, 0.0)
