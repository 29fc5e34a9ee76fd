"""The entry points of a round's small operations for tensors: one launch each, a program a row."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from specdec_fast.triton_kernels.rounds import (
    begin_kernel,
    commit_kernel,
    draft_kernel,
    places_kernel,
    tail_kernel,
    turns_kernel,
)

__all__ = ["draft_begin", "draft_tail", "pass_places", "pass_turns", "round_begin", "round_commit"]

MOST_WINDOWS = 2  # specdec_fast.round_ops.MOST_WINDOWS


def pass_places(
    start: Tensor, hidden: Tensor, lanes: int, capacity: int, positions: int, windows: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    rows = start.shape[0]
    columns, own = (start.new_empty((rows, lanes)) for _ in range(2))
    told = start.new_empty((len(windows), rows, 1, 1, 3))
    if rows:
        places_kernel[(rows,)](
            start.contiguous(),
            hidden.contiguous(),
            columns,
            own,
            told,
            rows,
            lanes,
            capacity - 1,
            positions,
            *windows,
            *[0] * (MOST_WINDOWS - len(windows)),
            LANES=triton.next_power_of_2(lanes),
            WINDOWS=len(windows),
            num_warps=1,
        )
    return columns, own, told


def pass_turns(frequencies: Tensor, positions: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half = frequencies.shape[0]
    cosine, sine = (frequencies.new_empty((*positions.shape, 2 * half), dtype=dtype) for _ in range(2))
    if positions.numel():
        turns_kernel[(positions.numel(),)](
            frequencies.float().contiguous(),
            positions.contiguous(),
            cosine,
            sine,
            scaling,
            half,
            HALF=triton.next_power_of_2(half),
            num_warps=1,
        )
    return cosine, sine


def round_begin(
    ids: Tensor,
    length: Tensor,
    done: Tensor,
    limit: Tensor,
    most: Tensor,
    places: Tensor,
    shift: Tensor,
    hidden: Tensor,
    gamma: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids, rows = _in_rows(ids), length.shape[0]
    room, token, start, committed = (torch.empty_like(length) for _ in range(4))
    if rows:
        begin_kernel[(rows,)](
            ids,
            ids.stride(0),
            length,
            done,
            limit,
            most,
            places,
            shift,
            hidden,
            room,
            token,
            start,
            committed,
            gamma,
            num_warps=1,
        )
    return room, token.unsqueeze(1), start, committed


def draft_tail(ids: Tensor, length: Tensor, unread: Tensor, lanes: int) -> tuple[Tensor, Tensor]:
    ids, rows = _in_rows(ids), length.shape[0]
    tail, text = ids.new_empty((rows, lanes)), torch.empty_like(length)
    if rows:
        tail_kernel[(rows,)](
            ids,
            ids.stride(0),
            ids.shape[1],
            length,
            unread,
            tail,
            text,
            lanes,
            LANES=triton.next_power_of_2(lanes),
            num_warps=1,
        )
    return tail, text


def draft_begin(text: Tensor, room: Tensor, lanes: int, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    text, room = text.contiguous(), room.contiguous()
    count, start, lane = (torch.empty_like(text) for _ in range(3))
    if text.numel():
        draft_kernel[(text.shape[0],)](text, room, count, start, lane, lanes, positions, num_warps=1)
    return count, start, lane


def round_commit(
    tokens: Tensor,
    drafted: Tensor,
    accepted: Tensor,
    token: Tensor,
    status: Tensor,
    ids: Tensor,
    length: Tensor,
    done: Tensor,
    most: Tensor,
    ends: Tensor,
) -> Tensor:
    if ids.stride(1) != 1 or not (length.is_contiguous() and done.is_contiguous()):
        raise ValueError("ids, length and done must be contiguous: they are written in place")
    tokens, (rows, gamma) = _in_rows(tokens), tokens.shape
    report = ids.new_empty((rows, gamma + 4))
    if rows:
        commit_kernel[(rows,)](
            tokens,
            tokens.stride(0),
            *(one.contiguous() for one in (drafted, accepted, token, status)),
            ids,
            ids.stride(0),
            ids.shape[1],
            length,
            done,
            most.contiguous(),
            ends.contiguous(),
            report,
            gamma,
            PLACES=triton.next_power_of_2(gamma + 1),
            ENDS=ends.shape[0],
            num_warps=1,
        )
    return report


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
