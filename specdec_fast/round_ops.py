"""The small arithmetic of a round on the device, each piece one operation.

What a round does to a few numbers a row (where a pass writes, how many tokens there is room for, what was committed) is
some two hundred operations of torch, each of which is a launch of a microsecond or two on a GPU, beside a draft step of
a hundred. Each piece has a Triton kernel for GPUs and a reference in torch, which is what runs elsewhere and what a
compiler sees. Both give the same integers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specdec_fast import dispatch, ops

MOST_WINDOWS = 2  # that the kernel knows

__all__ = ["draft_begin", "draft_tail", "pass_places", "pass_turns", "round_begin", "round_commit", "why_no_kernels"]


def pass_places(
    start: Tensor, hidden: Tensor, lanes: int, capacity: int, positions: int, windows: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Where a pass of fixed shape writes, at which positions, and what its attention sees.

        columns[b, i] = min(start[b] + i, capacity - 1)
        positions[b, i] = columns[b, i] - hidden[b], in [0, positions)

    Args:
        start, hidden: ``[B]`` int64, as :class:`specdec_fast.static_cache.Place` has them.
        lanes: n.
        capacity: columns of the cache.
        positions: that the model has.
        windows: of each kind of layer, 0: all columns; none where nobody asks what is seen.

    Returns:
        columns and positions ``[B, n]`` int64, and :func:`specdec_fast.attention.places` of each window,
        ``[W, B, 1, 1, 3]``.
    """
    given = start, hidden, lanes, capacity, positions, list(windows)
    if len(windows) > MOST_WINDOWS:
        return _places(*given)
    found: tuple[Tensor, Tensor, Tensor] = _run("pass_places", *given)
    return found


def pass_turns(frequencies: Tensor, positions: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of a rotary embedding whose frequencies do not hang on the text.

        cosine[b, i, j] = cos(positions[b, i] * frequencies[j mod d/2]) * scaling, sine alike

    Args:
        frequencies: ``[d / 2]`` float32.
        positions: ``[B, n]`` int64.

    Returns:
        ``[B, n, d]`` twice.
    """
    found: tuple[Tensor, Tensor] = _run("pass_turns", frequencies, positions, scaling, dtype)
    return found


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
    """What a round begins with.

    Args:
        ids, length, done, limit, most, places, shift, hidden: of :class:`specdec_fast.device_round.State`.
        gamma: draft tokens at most.

    Returns:
        how many tokens each row may draft ``[B]``: none where it is done, else up to its limit, as there are columns
        for them and the one behind them, and positions where the text has not gone beyond those already; its last token
        ``[B, 1]``; where the target's cache takes that ``[B]``; and the tokens committed, without padding ``[B]``.
    """
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _run(
        "round_begin", ids, length, done, limit, most, places, shift, hidden, gamma
    )
    return found


def draft_tail(ids: Tensor, length: Tensor, unread: Tensor, lanes: int) -> tuple[Tensor, Tensor]:
    """The last ``lanes`` tokens of each row's text ``[B, lanes]``, more than it has repeated, and its length ``[B]``.

    Args:
        ids, length, unread: of :class:`specdec_fast.device_round.State`.
    """
    found: tuple[Tensor, Tensor] = _run("draft_tail", ids, length, unread, lanes)
    return found


def draft_begin(text: Tensor, room: Tensor, lanes: int, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a draft begins with.

    Args:
        text: ``[B]`` length of the drafter's text.
        room: ``[B]`` of :func:`round_begin`.
        lanes: of the pass over the text's last tokens.
        positions: that the drafter has.

    Returns:
        how many tokens each row may draft; where that pass begins; and which of its lanes is the text's last token;
        ``[B]`` each.
    """
    found: tuple[Tensor, Tensor, Tensor] = _run("draft_begin", text, room, lanes, positions)
    return found


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
    """Adds each row's block up to the token that ends the row, and says what it did.

    Args:
        tokens: ``[B, G]`` the draft.
        drafted, accepted: ``[B]`` of its tokens.
        token, status: ``[B]`` the one behind them, and :class:`specdec_fast.ops.Status`: there may be none.
        ids, length, done: of :class:`specdec_fast.device_round.State`; written to.
        most, ends: of the same.

    Returns:
        ``[B, G + 4]``: columns committed, tokens accepted, tokens drafted, and the block: the accepted tokens and the
        one behind them, -1 from there on.
    """
    report: Tensor = _run("round_commit", tokens, drafted, accepted, token, status, ids, length, done, most, ends)
    return report


def _run(name: str, *arguments: Any) -> Any:
    if torch.compiler.is_compiling():
        return _REFERENCES[name](*arguments)
    backend = "reference" if why_no_kernels(arguments[0].device.type) else "triton"
    return getattr(getattr(torch.ops.specdec_fast, name), backend)(*arguments)


@functools.cache
def why_no_kernels(device: str) -> str | None:
    """Why a kind of device has the reference; None where it has kernels. Tried once."""
    if device != "cuda" or dispatch.DEFAULT not in ("auto", "triton", "cuda"):
        return f"the kernels of rounds are for GPUs, not for a {device} device, and not where a backend is forced"
    if reason := dispatch.why_not("round_commit", "triton"):
        return reason
    try:
        for got, right in zip(trial(device, "triton"), trial(device, "reference"), strict=True):
            exact = got.dtype == torch.float32 or torch.equal(got, right)
            if not exact or not (got.double() - right.double()).abs().amax() <= 1e-5:
                return "the kernels of rounds give other values than their reference"
    except Exception as error:  # what a compiler or driver can throw has no common base
        return f"the kernels of rounds fail ({type(error).__name__}: {error})"
    return None


def trial(device: str, backend: str) -> list[Tensor]:
    """Results of every operation for a few rows: short, long, full and done ones."""
    generator = torch.Generator("cpu").manual_seed(0)

    def numbers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device="cpu").to(device)

    def run(name: str, *arguments: Any) -> list[Tensor]:
        found = getattr(getattr(torch.ops.specdec_fast, name), backend)(*arguments)
        return [found] if isinstance(found, Tensor) else list(found)

    rows, columns, gamma = 33, 24, 5
    ids, length = numbers(0, 9, rows, columns), numbers(1, columns - 1, rows)
    most, limit = torch.minimum(length + numbers(0, 9, rows), length.new_tensor(columns)), numbers(0, 9, rows)
    done, unread = numbers(0, 4, rows) == 0, torch.minimum(numbers(0, 5, rows), length - 1)
    places, shift, hidden = numbers(1, 40, rows), numbers(0, 5, rows), numbers(0, 4, rows)
    found = run("pass_places", length, hidden, 6, 20, 17, [0, 7])
    found += run("pass_turns", numbers(1, 9, 8) / 9, found[1] * 300, 0.7, torch.float32)
    begun = run("round_begin", ids, length, done, limit, most, places, shift, hidden, gamma)
    found += begun + run("draft_tail", ids, length, unread, 2) + run("draft_begin", places - 2, begun[0], 4, 30)
    for ending in ([9], [1, 3, 5]):
        written = [t.clone() for t in (ids, length, done)]
        drafted = begun[0]
        accepted = torch.minimum(numbers(0, 6, rows), drafted)
        ends = torch.full((64,), -9, device=device)
        ends[: len(ending)] = torch.tensor(ending, device=device)
        status = numbers(0, 4, rows).int()
        block = numbers(0, 9, rows, gamma)
        given = (block, drafted, accepted, numbers(0, 9, rows), status, *written, most, ends)
        found += run("round_commit", *given) + written
    return found


def _places(
    start: Tensor, hidden: Tensor, lanes: int, capacity: int, positions: int, windows: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    columns = (start.unsqueeze(1) + torch.arange(lanes, device=start.device)).clamp(max=capacity - 1)
    told = [torch.stack([start, hidden, torch.full_like(start, size)], 1)[:, None, None] for size in windows]
    places = torch.stack(told) if told else start.new_empty((0, start.shape[0], 1, 1, 3))
    return columns, (columns - hidden.unsqueeze(1)).clamp(0, positions - 1), places


def _turns(frequencies: Tensor, positions: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = positions.unsqueeze(2).float() * frequencies.float()
    angles = torch.cat([angles, angles], 2)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def _begin(
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
    committed = shift + length - hidden
    columns = most - length - 1  # the token behind the draft needs a column too
    # Beyond the target's positions rotary ones go on, and learned ones end plain decoding too
    left = places - committed
    room = torch.minimum(limit, torch.where(left >= 0, torch.minimum(columns, left), columns))
    room = torch.where(done, 0, room.clamp(0, gamma))
    return room, ids.gather(1, (length - 1).unsqueeze(1)), shift + length - 1, committed


def _tail(ids: Tensor, length: Tensor, unread: Tensor, lanes: int) -> tuple[Tensor, Tensor]:
    text = length - unread
    first = unread + (text - lanes).clamp(min=0)
    columns = first.unsqueeze(1) + torch.arange(lanes, device=first.device)
    return ids.gather(1, columns.clamp(max=ids.shape[1] - 1)), text


def _draft_begin(text: Tensor, room: Tensor, lanes: int, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.where(text > 0, torch.minimum(room, (positions - text).clamp(min=0)), 0)
    start = (text - lanes).clamp(min=0)
    return count, start, (text - 1 - start).clamp(min=0)


def _commit(
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
    token = torch.where((status & ops.Status.TARGET) != 0, -1, token)
    place = torch.arange(tokens.shape[1] + 1, device=token.device)
    behind = accepted.unsqueeze(1)
    padded = torch.nn.functional.pad(tokens, (0, 1))
    block = torch.where(place < behind, padded, torch.where(place == behind, token.unsqueeze(1), -1))
    # Not by torch.isin, which sorts and then waits for the device
    ending = (block.unsqueeze(2) == ends).any(2) & (place <= behind)
    stop = torch.where(ending, place + 1, place.shape[0]).amin(1)
    room = most - length
    new = torch.where(done, 0, torch.minimum(torch.minimum(accepted + 1, stop), room))
    # What is not kept writes the row's last token where it stands already, so that no column is written two things
    kept, last = place < new.unsqueeze(1), (length - 1).unsqueeze(1)
    columns = torch.where(kept, length.unsqueeze(1) + place, last)
    ids.scatter_(1, columns, torch.where(kept, block, ids.gather(1, last)))
    done |= (stop <= new) & ending.any(1) | (new >= room)
    length += new
    return torch.cat([torch.stack([new, accepted, drafted], 1), block], 1)


_REFERENCES: dict[str, Callable[..., Any]] = {
    "pass_places": _places,
    "pass_turns": _turns,
    "round_begin": _begin,
    "draft_tail": _tail,
    "draft_begin": _draft_begin,
    "round_commit": _commit,
}
_SCHEMAS = {
    "pass_places": "(Tensor start, Tensor hidden, int lanes, int capacity, int positions, int[] windows)"
    " -> (Tensor, Tensor, Tensor)",
    "pass_turns": "(Tensor frequencies, Tensor positions, float scaling, ScalarType dtype) -> (Tensor, Tensor)",
    "round_begin": "(Tensor ids, Tensor length, Tensor done, Tensor limit, Tensor most, Tensor places, Tensor shift,"
    " Tensor hidden, int gamma) -> (Tensor, Tensor, Tensor, Tensor)",
    "draft_tail": "(Tensor ids, Tensor length, Tensor unread, int lanes) -> (Tensor, Tensor)",
    "draft_begin": "(Tensor text, Tensor room, int lanes, int positions) -> (Tensor, Tensor, Tensor)",
    "round_commit": "(Tensor tokens, Tensor drafted, Tensor accepted, Tensor token, Tensor status, Tensor(a!) ids,"
    " Tensor(b!) length, Tensor(c!) done, Tensor most, Tensor ends) -> Tensor",
}
_library = torch.library.Library("specdec_fast", "FRAGMENT")
for _op, _reference in _REFERENCES.items():
    for _backend, _kernel in (("reference", _reference), ("triton", partial(dispatch.run_triton, _op))):
        _library.define(f"{_op}.{_backend}{_SCHEMAS[_op]}")
        _library.impl(f"{_op}.{_backend}", _kernel, "CompositeExplicitAutograd")
