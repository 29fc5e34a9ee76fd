"""Measures a pair before a call: short passes of the target, and drafts, on text that is thrown away.

It costs a few percent of a call of 256 tokens and is done once a pair, shape and process; from then on the passes that
calls make anyway keep the table up to date (:mod:`specdec_fast.costs`).
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specdec_fast.costs import Meter, Observed, Outlook, constant_costs, low, observed
from specdec_fast.drafters.base import Drafter
from specdec_fast.host_passes import HostPasses
from specdec_fast.lean import LeanModel
from specdec_fast.methods import Parts, Plan, build_drafter
from specdec_fast.randomness import Philox
from specdec_fast.runner import Runner
from specdec_fast.runners import runner_for
from specdec_fast.state import Rows
from specdec_fast.verification import Draws

__all__ = ["measure", "measuring", "outlook_for", "preparing"]

CONTEXT = 48  # tokens of a prompt that are read
SIZES = (6, 3, 10, 2, 16, 4, 8)  # positions of a pass beside that of one, the most telling first
NEEDED = 2  # of them are measured in any case
DRAFTS = (1, 4, 1)
WORTH_IT = 64  # tokens that a call may write, from which it is measured for
SHARE = 0.03  # of a call that its measurement may take


def outlook_for(
    plan: Plan,
    parts: Parts,
    texts: list[list[int]],
    lean: LeanModel | None,
    horizon: int,
    passes: HostPasses | None = None,
) -> tuple[Outlook, Observed | None]:
    """What a call's lookahead is computed from.

    With a seed it is a constant table, in which neither a clock nor earlier calls have a part.

    Args:
        plan: of the call.
        parts: of the call.
        texts: each row's prompt without padding.
        lean: the target's short passes.
        horizon: tokens a row may write.
        passes: runs models of this call that have no native form; None: they run as they are.

    Returns:
        the table, and where what the call measures goes (None: nowhere).
    """
    model, options, batch, _, do_sample, sources, device = parts
    pair = model, options.assistant_model
    constant = constant_costs(*(0 if one is None else one.num_parameters() for one in pair))
    if plan.schedule != "adaptive" or plan.method == "autoregressive":
        return Outlook(constant), None
    shape = (
        plan.method,
        batch,
        do_sample,
        lean is None,
        model.dtype,
        torch.get_num_threads(),
        plan.tree,
        plan.verification,
        None if passes is None else (passes.target, passes.compiled),
    )
    known = observed(*pair, shape)
    if options.seed is not None or options.source is not None:
        return Outlook(constant), known
    asked: _Asked | None = getattr(_thread, "asked", None)
    if all(texts) and (asked is not None or (not known.ready and horizon >= WORTH_IT)):
        more: dict[str, Any] = {"budget": SHARE * horizon}
        if asked is not None:
            asked.found.append(known)
            for method in plan.others:  # makes its tables
                build_drafter(replace(plan, method=method, others=(), rows=None), *parts)
            more = {"budget": float("inf"), "repetitions": asked.repetitions}
        alone = replace(plan, others=(), rows=None)
        if passes is None:
            more["runner"] = partial(runner_for, model, batch, lean=lean, encoded=sources.target)
            known.take(measure(drafter=build_drafter(alone, *parts), texts=texts, device=device, **more))
        else:
            known.take(_measured_at_fixed_shapes(alone, parts, texts, lean, passes, more))
    return known.outlook() if known.ready else known.counted(constant), known


def _measured_at_fixed_shapes(
    plan: Plan,
    parts: Parts,
    texts: list[list[int]],
    lean: LeanModel | None,
    passes: HostPasses,
    more: dict[str, Any],
) -> Meter:
    """:func:`measure` of passes as the call will run them.

    Everything runs once for nothing: what is compiled or captured then is kept with caches that are given back, and
    those that are timed are the same ones.
    """
    model, _, batch, _, _, sources, device = parts
    every = more["budget"] == float("inf") and not passes.compiled
    for last, repetitions in enumerate((1, more.get("repetitions", 1))):
        apart = passes.apart()

        def target(apart: HostPasses = apart) -> Runner:
            own: dict[str, Any] = {"columns": CONTEXT + max(SIZES), "encoded": sources.target}
            fixed = apart.runner(model, batch, **own) if apart.target and lean is None else None
            return runner_for(model, batch, lean=lean, encoded=sources.target) if fixed is None else fixed

        try:
            meter = measure(
                target,
                build_drafter(plan, *parts, passes=apart),
                texts,
                device,
                budget=float("inf"),
                repetitions=repetitions,
                sizes=SIZES if every else SIZES[:NEEDED],
            )
        finally:
            apart.close(small=not last)
    return meter


@dataclass
class _Asked:
    repetitions: int
    found: list[Observed] = field(default_factory=list)


_thread = threading.local()


@contextmanager
def measuring(repetitions: int) -> Iterator[list[Observed]]:
    """Calls of this thread without a seed are measured for, however short they are and whatever is known.

    Yields a list that each of them adds to: what is known of its pair.
    """
    _thread.asked = _Asked(repetitions)
    try:
        yield _thread.asked.found
    finally:
        _thread.asked = None


def preparing() -> bool:
    """Whether calls of this thread are made to prepare a pair (:func:`measuring`)."""
    return getattr(_thread, "asked", None) is not None


@torch.no_grad()
def measure(
    runner: Callable[[], Runner],
    drafter: Drafter,
    texts: list[list[int]],
    device: torch.device,
    *,
    budget: float,
    repetitions: int = 1,
    sizes: Sequence[int] = SIZES,
) -> Meter:
    """Times passes and drafts of as many rows as there are texts.

    A machine's pace may change by half from one second to the next, and what counts is how the parts compare. So each
    is timed next to a pass of one position, as a multiple of that one, and the median of these is taken down.

    Args:
        runner: makes a target's runner for that many rows.
        drafter: one that was made for this; what it learns here is of no use elsewhere.
        texts: each row's prompt without padding, at least one token.
        budget: how long to go on, in target passes at one position.
        repetitions: of every pass and draft.
        sizes: positions of the passes beside that of one.
    """
    length = min(CONTEXT, *map(len, texts))
    ids = torch.tensor([text[-length:] for text in texts], device=device)
    batch = len(texts)
    target, rows = runner(), list(range(batch))
    again = min(target.again, length - 1)
    base = length - again
    target.feed(rows, ids[:, :base], [base] * batch, [1] * batch)
    places = target.positions - length
    text = ids.repeat(1, -(-(max(SIZES) + length) // length))

    def timed(size: int) -> float:
        lanes = size if size == 1 else size + again
        for row in rows:
            target.rollback(row, base)
        begin = time.perf_counter()
        target.feed(rows, text[:, :lanes], [lanes] * batch, [size] * batch)
        _wait(device)
        return time.perf_counter() - begin

    timed(1)  # warms up
    plain: list[float] = []
    drafts: dict[tuple[int, int], list[float]] = {}
    for steps, unread, draft in _drafts(drafter, ids, repetitions):
        plain.append(timed(1))
        drafts.setdefault((steps, unread), []).append(draft() / plain[-1])
    passes: dict[int, list[float]] = {}
    begin = time.perf_counter()
    for number, size in enumerate([*sizes] * repetitions, 1):
        if size > places:
            continue
        plain.append(timed(1))
        passes.setdefault(size, []).append(timed(size) / plain[-1])
        if number >= NEEDED and time.perf_counter() - begin > budget * min(plain):
            break
    pace = low(plain)
    meter = Meter([(1, seconds) for seconds in plain])
    for size, multiples in passes.items():
        meter.passes += [(size, pace * statistics.median(multiples))] * len(multiples)
    for (steps, unread), multiples in drafts.items():
        meter.drafts += [(steps, unread, pace * statistics.median(multiples))] * len(multiples)
    return meter


def _drafts(drafter: Drafter, ids: Tensor, repetitions: int) -> Iterator[tuple[int, int, Callable[[], float]]]:
    """Drafts to be timed: their tokens, tokens that the drafter has not read before, and what gives their seconds."""
    batch, length = ids.shape
    rows = Rows(ids, None, torch.zeros(batch, dtype=torch.long), length + max(DRAFTS) + 1, 0)
    start = torch.full((batch,), length, device=ids.device)

    def draft(number: int, steps: int) -> float:
        # Numbers of its own: those of the call are drawn once, by the call
        draws = Draws(Philox(), rows.seed, start + number)
        begin = time.perf_counter()
        drafter.propose(rows, list(range(batch)), [steps] * batch, draws)
        _wait(ids.device)
        return time.perf_counter() - begin

    for number, steps in enumerate(DRAFTS * repetitions):
        yield steps, 1 if number else length, partial(draft, number, steps)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
