"""The ops' entry points for tensors: workspace and grids.

Each function takes the arguments of its op's schema (``specdec_fast/ops.py``) in order. A grid depends on shapes alone,
and everything else a kernel decides by is on the device, so a CUDA graph can replay a call.

Per call of ``verify`` there are two launches and one clearing of a few counters. Workspace is 12 bytes a tile and row
of logits and 8 a tile and measured residual: 0.7 MB at B = 64, γ = 4, V = 152k. Filters (filters.py) come before that,
for each side that is given any: one launch for the largest scores and min-p, one a digit of top-k's and of top-p's
place (8 and 13 at V = 152k), and 4 bytes a tile and 164 a row.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from specdec_fast.triton_kernels.filters import floor_kernel, narrow_kernel
from specdec_fast.triton_kernels.finish import finish_kernel
from specdec_fast.triton_kernels.judge import judge_kernel
from specdec_fast.triton_kernels.launch_attention import decode_attention
from specdec_fast.triton_kernels.launch_layers import layer_heads, layer_product, layer_product_scaled, layer_scale
from specdec_fast.triton_kernels.launch_rounds import (
    draft_begin,
    draft_tail,
    pass_places,
    pass_turns,
    round_begin,
    round_commit,
)
from specdec_fast.triton_kernels.maps import project_kernel, range_sums_kernel, tile_sums_kernel
from specdec_fast.triton_kernels.sample import measure_kernel, sample_kernel, softmax_kernel

__all__ = [
    "decode_attention",
    "draft_begin",
    "draft_tail",
    "layer_heads",
    "layer_product",
    "layer_product_scaled",
    "layer_scale",
    "pass_places",
    "pass_turns",
    "project",
    "range_sums",
    "round_begin",
    "round_commit",
    "sample",
    "softmax",
    "verify",
]

BLOCK = 2048  # entries a tile, at most 8192
SPAN = 2  # tiles a program, of at most 8192 entries together
DIGIT = 4  # bits of a filter's place that a launch finds, a divisor of 32
WARPS = 4

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def sample(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor,
    position: Tensor,
    offset: Tensor | None,
    purpose: int,
) -> Outputs:
    _check(logits)
    rows, width = logits.shape
    logits = _unit_stride(logits)
    tiles, splits = _tiles(width), _splits(width)
    token = logits.new_empty(rows, dtype=torch.int64)
    log_prob, logsumexp = (logits.new_empty(rows, dtype=torch.float64) for _ in range(2))
    status = logits.new_empty(rows, dtype=torch.int32)
    if rows:
        sample_kernel[(rows * splits,)](
            logits,
            logits.stride(0),
            width,
            _flat(temperature),
            _limits(logits.unsqueeze(1), temperature, top_k, top_p, min_p),
            _flat(seed),
            _flat(position),
            _flat(offset),
            logits.new_zeros(rows, dtype=torch.int32),
            logits.new_empty(rows * tiles, dtype=torch.float32),
            logits.new_empty(rows * tiles, dtype=torch.int64),
            token,
            log_prob,
            logsumexp,
            status,
            splits,
            PURPOSE=purpose,
            **_tuning(tiles),
        )
    return token, log_prob, logsumexp, status


def softmax(
    logits: Tensor, temperature: Tensor | None, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Tensor:
    _check(logits)
    rows, width = logits.shape
    logits = _unit_stride(logits)
    tiles, splits = _tiles(width), _splits(width)
    out = logits.new_empty((rows, width), dtype=torch.float64)
    if rows:
        peaks = logits.new_empty(rows * tiles, dtype=torch.float32)
        masses = logits.new_empty(rows * tiles, dtype=torch.int64)
        limits = _limits(logits.unsqueeze(1), temperature, top_k, top_p, min_p)
        row = (logits, logits.stride(0), width, _flat(temperature), limits, peaks, masses)
        measure_kernel[(rows * splits,)](*row, splits, SPAN=SPAN, BLOCK=BLOCK, num_warps=WARPS)
        softmax_kernel[(rows * splits,)](*row, out, splits, **_tuning(tiles))
    return out


def verify(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    tokens: Tensor,
    count: Tensor,
    kind: Tensor | None,
    draft_logits: Tensor | None,
    draft_temperature: Tensor | None,
    draft_top_k: Tensor | None,
    draft_top_p: Tensor | None,
    draft_min_p: Tensor | None,
    index: Tensor | None,
    drawn: Tensor | None,
    draft_logsumexp: Tensor | None,
    sparse_ids: Tensor | None,
    sparse_log_q: Tensor | None,
    seed: Tensor,
    start: Tensor,
    base: int,
    rule: int,
    log_probs: bool,
) -> Outputs:
    _check(logits)
    rows, positions, width = logits.shape
    drafted = tokens.shape[1]
    new = logits.new_empty
    accepted, token = new(rows, dtype=torch.int64), new(rows, dtype=torch.int64)
    log_prob = new((rows, positions if log_probs else 0), dtype=torch.float64)
    status = new(rows, dtype=torch.int32)
    if not rows:
        return accepted, token, log_prob, status

    logits = _unit_stride(logits)
    if rule == 0 or drafted == 0:  # nothing of the drafter's law is looked at
        kind = draft_logits = index = drawn = draft_logsumexp = sparse_ids = sparse_log_q = None
    compact = None if draft_logits is None else _unit_stride(draft_logits)
    entries = 1 if compact is None else compact.shape[2]
    listed = 0 if sparse_ids is None else sparse_ids.shape[2]
    if listed == 0:
        sparse_ids = sparse_log_q = None
    tiles = max(_tiles(width), _tiles(entries))
    splits = max(_splits(width), _splits(entries))
    slots = min(positions, drafted) if rule == 2 and drafted else 1
    counters = logits.new_zeros(rows * (positions + 1), dtype=torch.int32)
    peaks = new(rows * 2 * positions * tiles, dtype=torch.float32)
    masses = new(rows * 2 * positions * tiles, dtype=torch.int64)
    tops, totals = new((2, rows * 2 * positions), dtype=torch.float64)
    log_ps, log_ratios = new((2, rows * positions), dtype=torch.float64)
    own, keep = new(rows * positions, dtype=torch.int64), new(rows * positions, dtype=torch.int32)
    rests = new(rows * slots * tiles, dtype=torch.int64)
    used = (count, min(positions, drafted))
    limits = _limits(logits, temperature, top_k, top_p, min_p, *used, 1)
    draft_limits = None
    if compact is not None:
        draft_limits = _limits(compact, draft_temperature, draft_top_k, draft_top_p, draft_min_p, *used)
        if draft_limits is not None:
            draft_logsumexp = None
    target = (
        logits,
        logits.stride(0),
        logits.stride(1),
        width,
        _flat(temperature),
        limits,
        _flat(tokens),
        _flat(count),
    )
    draft = (
        _flat(kind),
        compact,
        0 if compact is None else compact.stride(0),
        0 if compact is None else compact.stride(1),
        entries,
        _flat(draft_temperature),
        draft_limits,
        _flat(index),
    )
    sparse = (_flat(sparse_ids), _flat(sparse_log_q), listed)
    keys = (_flat(seed), _flat(start), base, positions, drafted)
    found = (peaks, masses, tops, totals, own, keep, log_ps, log_ratios)
    tuning = {"RULE": rule, "STEPS": entries.bit_length(), **_tuning(tiles)}

    judged = positions * (1 if compact is None else 2)
    judge_kernel[(rows * judged * splits,)](
        *target,
        *draft,
        _flat(drawn),
        _flat(draft_logsumexp),
        *sparse,
        *keys,
        counters,
        *found,
        judged,
        splits,
        tiles,
        LISTED=triton.next_power_of_2(max(listed, 1)),
        **tuning,
    )
    splits = _splits(width)
    finish_kernel[(rows * slots * splits,)](
        *target,
        *draft,
        *sparse,
        *keys,
        counters[rows * positions :],
        *found,
        rests,
        accepted,
        token,
        log_prob if log_probs else None,
        status,
        slots,
        splits,
        tiles,
        PLACES=triton.next_power_of_2(positions + 1),
        **tuning,
    )
    return accepted, token, log_prob, status


def project(q: Tensor, row_start: Tensor, column: Tensor) -> Tensor:
    _check(q)
    rows, width = q.shape[0], row_start.shape[0] - 1
    q = _unit_stride(q)
    out = q.new_empty((rows, width), dtype=torch.float64)
    splits = triton.cdiv(width, BLOCK)
    if out.numel():
        project_kernel[(rows * splits,)](
            q,
            q.stride(0),
            q.shape[1],
            _flat(row_start),
            _flat(column),
            column.shape[0],
            out,
            width,
            splits,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return out


def range_sums(q: Tensor, order: Tensor | None, low: Tensor, high: Tensor) -> Tensor:
    _check(q)
    rows, ranges = low.shape
    length = q.shape[1] if order is None else order.shape[0]
    q = _unit_stride(q)
    out = q.new_empty((rows, ranges), dtype=torch.float64)
    if not out.numel():
        return out
    tiles = max(_tiles(length), 1)
    sums = q.new_empty(rows * tiles, dtype=torch.float64)
    masses = (q, q.stride(0), q.shape[1], _flat(order), length, sums, tiles)
    tile_sums_kernel[(rows * tiles,)](*masses, BLOCK=BLOCK, num_warps=WARPS)
    range_sums_kernel[(rows * ranges,)](
        *masses,
        _flat(low),
        _flat(high),
        out,
        ranges,
        BLOCK=BLOCK,
        TILES=triton.next_power_of_2(tiles),
        num_warps=WARPS,
    )
    return out


def _check(tensor: Tensor) -> None:
    if tensor.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"Triton kernels need tensors on a GPU, not on {tensor.device}; "
            "TRITON_INTERPRET=1, set before Triton is imported, runs them anywhere, slowly"
        )


def _limits(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    count: Tensor | None = None,
    longest: int = 0,
    more: int = 0,
) -> Tensor | None:
    """Where the filters of ``logits [B, P, V]`` start to keep, ``[B, P]`` int64; None where none is given.

    With a count, of the first ``min(count, longest) + more`` positions of a row.
    """
    if top_k is None and top_p is None and min_p is None:
        return None
    rows, positions, width = logits.shape
    tiles, splits, ways = _tiles(width), _splits(width), 1 << DIGIT
    new, lowest = logits.new_empty, -(2**63)
    if not rows * positions:
        return new((rows, positions), dtype=torch.int64)
    counters = logits.new_zeros(rows * positions, dtype=torch.int32)
    sums = logits.new_zeros(rows * positions * ways, dtype=torch.int64)
    peaks = new(rows * positions * tiles, dtype=torch.float32)
    totals = new(rows * positions, dtype=torch.int64)
    floor, kth, nucleus = logits.new_full((3, rows, positions), lowest, dtype=torch.int64)
    row = (logits, logits.stride(0), logits.stride(1), width, _flat(temperature))
    used = (_flat(count), longest, more)
    grid = (rows * positions * splits,)
    floor_kernel[grid](*row, _flat(min_p), *used, counters, peaks, floor, positions, splits, **_tuning(tiles))

    def narrow(amount: Tensor, kept: Tensor | None, places: Tensor, shifts: list[int], by_mass: bool) -> None:
        for shift in shifts:
            narrow_kernel[grid](
                *row,
                _flat(amount),
                *used,
                counters,
                peaks,
                kept,
                places,
                sums,
                totals,
                positions,
                splits,
                shift,
                shift == shifts[0],
                BY_MASS=by_mass,
                SCALE=max(width.bit_length() - 12, 0),
                WAYS=ways,
                PART=min(BLOCK, 4096 >> DIGIT),
                **_tuning(tiles),
            )

    of_score = list(range(64 - DIGIT, 31, -DIGIT))
    if top_k is not None:
        narrow(top_k, None, kth, of_score, False)
    if top_p is not None:
        of_id = range(_rounded_up((width - 1).bit_length(), DIGIT) - DIGIT, -1, -DIGIT)
        narrow(top_p, None if top_k is None else kth, nucleus, of_score + list(of_id), True)
    return torch.maximum(torch.maximum(floor, kth), nucleus)


def _rounded_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _tiles(width: int) -> int:
    return triton.cdiv(width, BLOCK)


def _splits(width: int) -> int:
    return triton.cdiv(_tiles(width), SPAN)


def _tuning(tiles: int) -> dict[str, int]:
    return {"SPAN": SPAN, "BLOCK": BLOCK, "TILES": triton.next_power_of_2(tiles), "num_warps": WARPS}


def _unit_stride(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
