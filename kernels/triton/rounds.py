"""The small arithmetic of a round, a few numbers a row. Defined in specdec_fast/round_ops.py; a program does a row."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["window_0", "window_1"])  # 1 would be no tensor
def places_kernel(
    start,  # [B] int64
    hidden,
    columns,  # [B, n] int64
    positions,
    told,  # [W, B, 3] int64
    rows,  # B
    lanes,  # n
    last,  # column of the cache
    most,  # positions
    window_0,
    window_1,
    LANES: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    first, covered = tl.load(start + b), tl.load(hidden + b)
    lane = tl.arange(0, LANES)
    column = tl.minimum(first + lane, last)
    tl.store(columns + b * lanes + lane, column, mask=lane < lanes)
    position = tl.minimum(tl.maximum(column - covered, 0), most - 1)
    tl.store(positions + b * lanes + lane, position, mask=lane < lanes)
    for w in tl.static_range(WINDOWS):
        at = told + (w * rows + b) * 3
        tl.store(at, first)
        tl.store(at + 1, covered)
        tl.store(at + 2, (window_1 if w else window_0).to(tl.int64))


@triton.jit
def turns_kernel(
    frequencies,  # [d / 2] float32
    positions,  # [B n] int64
    cosine,  # [B n, d]
    sine,
    scaling,
    half,  # d / 2
    HALF: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, HALF)
    angle = tl.load(positions + m).to(tl.float32) * tl.load(frequencies + j, mask=j < half, other=0.0)
    c, s = tl.cos(angle) * scaling, tl.sin(angle) * scaling
    at = m * 2 * half + j
    for part in tl.static_range(2):
        tl.store(cosine + at + part * half, c.to(cosine.dtype.element_ty), mask=j < half)
        tl.store(sine + at + part * half, s.to(sine.dtype.element_ty), mask=j < half)


@triton.jit
def begin_kernel(
    ids,  # [B, C] int64
    ids_row,  # stride
    length,  # [B] int64
    done,  # [B] bool
    limit,
    most,
    places,
    shift,
    hidden,
    room,  # [B]
    token,  # [B]
    start,
    committed,
    gamma,
):
    b = tl.program_id(0).to(tl.int64)
    here, before = tl.load(length + b), tl.load(shift + b)
    known = before + here - tl.load(hidden + b)
    columns = tl.load(most + b) - here - 1
    left = tl.load(places + b) - known
    free = tl.minimum(tl.load(limit + b), tl.where(left >= 0, tl.minimum(columns, left), columns))
    free = tl.minimum(tl.maximum(free, 0), gamma)
    tl.store(room + b, tl.where(tl.load(done + b) != 0, 0, free))
    tl.store(token + b, tl.load(ids + b * ids_row + here - 1))
    tl.store(start + b, before + here - 1)
    tl.store(committed + b, known)


@triton.jit
def tail_kernel(
    ids,  # [B, C] int64
    ids_row,
    columns,  # C
    length,  # [B]
    unread,
    tail,  # [B, n]
    text,  # [B]
    lanes,  # n
    LANES: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    skipped = tl.load(unread + b)
    own = tl.load(length + b) - skipped
    lane = tl.arange(0, LANES)
    column = tl.minimum(skipped + tl.maximum(own - lanes, 0) + lane, columns - 1)
    found = tl.load(ids + b * ids_row + column, mask=lane < lanes, other=0)
    tl.store(tail + b * lanes + lane, found, mask=lane < lanes)
    tl.store(text + b, own)


@triton.jit
def draft_kernel(
    text,  # [B] int64
    room,
    count,
    start,
    lane,
    lanes,
    positions,
):
    b = tl.program_id(0).to(tl.int64)
    own = tl.load(text + b)
    first = tl.maximum(own - lanes, 0)
    able = tl.minimum(tl.load(room + b), tl.maximum(positions - own, 0))
    tl.store(count + b, tl.where(own > 0, able, 0))
    tl.store(start + b, first)
    tl.store(lane + b, tl.maximum(own - 1 - first, 0))


@triton.jit
def commit_kernel(
    tokens,  # [B, G] int64
    tokens_row,
    drafted,  # [B]
    accepted,
    token,
    status,  # [B] int32: its first bit says that there is no token behind the draft
    ids,  # [B, C] int64
    ids_row,
    columns,  # C
    length,  # [B]
    done,  # [B] bool
    most,
    ends,  # [E]
    report,  # [B, G + 4]
    gamma,  # G
    PLACES: tl.constexpr,  # at least G + 1
    ENDS: tl.constexpr,  # E
):
    b = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PLACES)
    stays, here = tl.load(accepted + b), tl.load(length + b)
    behind = tl.where(tl.load(status + b) & 1 != 0, -1, tl.load(token + b))
    given = tl.load(tokens + b * tokens_row + place, mask=place < gamma, other=0)
    block = tl.where(place < stays, given, tl.where(place == stays, behind, -1))
    ending = tl.max((block[:, None] == tl.load(ends + tl.arange(0, ENDS))[None, :]).to(tl.int32), 1)
    ending = (ending != 0) & (place <= stays)
    stop = tl.min(tl.where(ending, place + 1, gamma + 1), 0)
    room = tl.load(most + b) - here
    over = tl.load(done + b) != 0
    new = tl.where(over, 0, tl.minimum(tl.minimum(stays + 1, stop), room))
    tl.store(ids + b * ids_row + here + place, block, mask=(place < new) & (here + place < columns))
    ended = tl.max(ending.to(tl.int32), 0) != 0
    over = over | ((stop <= new) & ended) | (new >= room)
    at = report + b * (gamma + 4)
    tl.store(at, new)
    tl.store(at + 1, stays)
    tl.store(at + 2, tl.load(drafted + b))
    tl.store(at + 3 + place, block, mask=place <= gamma)
    tl.store(done + b, over)
    tl.store(length + b, here + new)
