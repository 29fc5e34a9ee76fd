"""One call on the device: a pair of caches taken out for it, the prompt read, rounds launched.

Rounds run as they are, or are captured once as a CUDA graph for each γ bucket and replayed. What a graph reads lives in
tensors of the pair, which the host writes between rounds without a wait.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec_fast import static_cache
from specdec_fast.compiled import (
    BRANCHES,
    Captured,
    Compilation,
    Pair,
    branch,
    capture,
    check_out,
    hand_back,
    handing_back,
    notice,
)
from specdec_fast.costs import Costs
from specdec_fast.device_law import DeviceLaw
from specdec_fast.device_projection import DeviceProjection
from specdec_fast.device_report import HostReport, PinnedReport
from specdec_fast.device_round import (
    BUCKETS,
    UNREAD,
    DeviceDrafter,
    DeviceWriter,
    NothingDrafted,
    Round,
    State,
)
from specdec_fast.device_text import DraftedText, read_texts
from specdec_fast.drafters.model import Context
from specdec_fast.encoding import Encoded
from specdec_fast.host_model import lanes_for
from specdec_fast.pictures import Shown
from specdec_fast.prompt_passes import capture_all, read_prompts
from specdec_fast.runner import Head
from specdec_fast.staging import upload
from specdec_fast.state import Rows
from specdec_fast.static_cache import capacity_for, rows_for
from specdec_fast.static_runner import StaticRunner
from specdec_fast.static_runners import static_runner_for

__all__ = ["DrafterPart", "Session"]

TIMED = (1, 5)  # draft tokens of the rounds that are timed


@dataclass(frozen=True)
class DrafterPart:
    """A drafter model and how it drafts.

    Args:
        model: the drafter.
        law: its sampling.
        head: its LM head, where it has one of its own.
        tensors: what it may draw, as :class:`DeviceWriter` or :class:`DeviceProjection` takes it; nothing for the
            target's tokenizer.
        contexts: one a row, of a tokenizer of its own.
        confidence, watched: as for :class:`DeviceWriter`.
        listed: of a projection, the longest list of what may follow; None for other methods.
        encoded: what the model reads beside the text; None: nothing.
        shown: what it has read of prompts with pictures; None: nothing yet.
    """

    model: PreTrainedModel
    law: DeviceLaw
    head: Head | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    contexts: Sequence[Context] | None = None
    confidence: float = 0.0
    watched: bool = False
    listed: int | None = None
    encoded: Encoded | None = None
    shown: Shown | None = None


class Session:
    """A launcher of rounds (:class:`specdec_fast.device_engine.Launcher`).

    Args:
        model: the target.
        how: passes run.
        batch: rows of the call.
        columns: the longest text the target's cache may have to hold, of which the first ``prompt`` are there.
        law, rule: of the target.
        drafter: None: plain decoding.
        others: make the candidates behind that one, which may draft later; None: not here.
        visible, prefill_chunk: as for :class:`StaticRunner`.
        ends: ids that end a row.
        encoded: what the target reads beside the text; None: nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        how: Compilation,
        batch: int,
        columns: int,
        prompt: int,
        *,
        law: DeviceLaw,
        rule: str,
        drafter: DrafterPart | None = None,
        others: Sequence[Callable[[], DrafterPart | None]] = (),
        visible: Tensor | None = None,
        prefill_chunk: int | None = None,
        ends: Sequence[int] = (),
        encoded: Encoded | None = None,
    ):
        self.why_not_captured = ""
        self.late = int(model.device.type == "cuda" and (drafter is None or drafter.contexts is None))
        self.costly = how.compiled or how.captured
        self._ends, self._encoded = ends, encoded
        self._model, self._how, self._part = model, how, drafter
        self._others = others
        self._known: dict[int, tuple[DrafterPart, DraftedText]] = {}  # candidates that have drafted
        self._law, self._rule = law, rule
        self._batch, self._columns = batch, columns
        self._pair = self._check_out(min(columns, prompt + static_cache.ALLOWANCE), 0)
        self._unread = 1  # the most tokens of a row that a drafter with the target's tokenizer has not read
        self._stopped: set[int] = set()
        self._lent = False
        self._text: DraftedText | None = None
        self._report: HostReport | None = None  # of the newest round; None: it drafted nothing
        self.drafter: StaticRunner | None = None
        with handing_back(self._pair):
            self.target = static_runner_for(
                model,
                self._pair.target,
                batch,
                visible=visible,
                prefill_chunk=prefill_chunk,
                forward=self._pair.forwards[0],
                encoded=encoded,
            )
            if how.captured and prefill_chunk is None:
                self.target.reader = read_prompts
            if drafter is not None:
                self.drafter = self._drafter_over(self._pair)
            self._bind()

    @property
    def state(self) -> State:
        return self._pair.state

    @property
    def watched(self) -> bool:
        """Whether drafts end where the lookahead says so (:meth:`stops`)."""
        return self._part is not None and self._part.watched

    @property
    def bytes(self) -> int:
        """Memory of the caches and rows."""
        return self._pair.bytes

    def _check_out(self, columns: int, own: int) -> Pair:
        """A pair for texts of so many columns; the drafter's are ``own``, where its tokenizer is another."""
        part = self._part
        capacity = capacity_for(columns)
        return check_out(
            self._model,
            None if part is None else part.model,
            rows_for(self._batch),
            (capacity, capacity if part is None or part.contexts is None else capacity_for(max(own, columns))),
            self._how,
            head=None if part is None else part.head,
            choices=None if part is None else part.tensors,
            encoded=(self._encoded, None if part is None else part.encoded),
        )

    def _drafter_over(self, pair: Pair) -> StaticRunner:
        part = self._part
        assert part is not None and pair.drafter is not None
        own: dict[str, Any] = {"head": part.head, "forward": pair.forwards[1], "encoded": part.encoded}
        runner = static_runner_for(part.model, pair.drafter, self._batch, **own)
        if self._how.captured:
            runner.reader = read_prompts
        return runner

    def _bind(self) -> None:
        """Puts the round together over the tensors of the pair."""
        pair, part = self._pair, self._part
        drafter: DeviceDrafter = NothingDrafted()
        if part is not None and self.drafter is not None:
            settings: dict[str, Any] = {
                "parameters": pair.set_parameters(1, part.law.values),
                "confidence": part.confidence,
                "watched": part.watched,
                "eager": not self.costly,
            }
            if part.listed is None:
                drafter = DeviceWriter(self.drafter, part.law, **settings, **dict[str, Any](pair.choices))
            else:
                drafter = DeviceProjection(self.drafter, part.law, **settings, tables=pair.choices, most=part.listed)
        self._writer = drafter
        self._round = Round(self.target, drafter, self._rule, self._law, pair.set_parameters(0, self._law.values))
        own = () if part is None else (part.law.key, part.confidence, part.watched, part.listed)
        self._key: tuple[Any, ...] = (self._rule, self._law.key, own)

    # The call ---------------------------------------------------------------------------------------------------------

    def start(self, rows: Rows, shift: int) -> None:
        """Reads the prompt: all of it but the last token, which the first round takes.

        Args:
            rows: on the host.
            shift: columns of the target's cache in front of theirs.
        """
        prompt, everyone = rows.prompt_columns, list(range(self._batch))
        first = min(self.target.length) - shift
        if prompt - 1 > first:
            read_texts(self.target, everyone, rows.ids[:, first : prompt - 1].tolist())
        if self.drafter is not None and self._part is not None and self._part.contexts is None:
            if self._part.shown is not None:
                self._part.shown.load(self.drafter)
            else:
                read_texts(self.drafter, everyone, [text[:-1] for text in rows.tokens])
        elif self.drafter is not None and self._part is not None and self._part.contexts is not None:
            self._text = DraftedText(self.drafter, self._part.contexts)
            self._known[0] = self._part, self._text
        state = self.state
        state.clear()
        state.ids[: self._batch, :prompt].copy_(rows.ids[:, :prompt])
        hidden = [prompt - len(text) for text in rows.tokens]
        for values, to in (
            ([prompt] * self._batch, state.length),
            (rows.seed.tolist(), state.seed),
            ([rows.capacity] * self._batch, state.most),
            ([self.target.positions] * self._batch, state.places),
            ([shift] * self._batch, state.shift),
            (self.target.hidden, state.hidden),
            (hidden, state.unread),
            (list(self._ends), state.ends),
            ([False] * self._batch, state.done),
        ):
            upload(values, to)

    def tell(self, texts: list[list[int]], active: list[int]) -> float:
        """Hands a drafter with a tokenizer of its own what was committed since the round before.

        Args:
            texts: of all rows, in the target's ids.
            active: rows that go on.

        Returns:
            seconds spent on translation so far.
        """
        if self._text is None:
            return 0.0
        report = self._report
        longest = self._text.read(texts, active, None if report is None else [told.own for told in report.read()])
        self._reserve(0, longest + BUCKETS[-1] + 1)
        self._text.write(self.state)
        return sum(text.seconds for _, text in self._known.values())

    def limit(self, values: list[int]) -> None:
        upload(values, self.state.limit)

    def stops(self, row: int, sure: list[float], worth: list[float]) -> None:
        upload([sure], self.state.sure[row : row + 1])
        upload([worth + [torch.inf] * (self.state.worth.shape[1] - len(worth))], self.state.worth[row : row + 1])

    def stop(self, row: int) -> None:
        if row not in self._stopped:
            self._stopped.add(row)
            self.state.done[row].fill_(True)

    def reserve(self, columns: int) -> None:
        self._reserve(columns, 0)

    def _reserve(self, columns: int, own: int) -> None:
        """Moves to larger caches where texts of so many columns would not fit; ``own``: of the drafter's."""
        old = self._pair
        if columns < old.target.capacity and (old.drafter is None or own < old.drafter.capacity):
            return
        columns = (
            old.target.capacity - 1
            if columns < old.target.capacity
            else min(columns + static_cache.ALLOWANCE, self._columns)
        )
        if old.drafter is not None:
            more = min(static_cache.ALLOWANCE, self._columns)  # a short call's text has few tokens in any vocabulary
            own = old.drafter.capacity - 1 if own < old.drafter.capacity else own + more
        self._pair = self._check_out(columns, own)
        try:
            self._move_target(old)
            if self.drafter is not None and self._pair.drafter is not None and old.drafter is not None:
                self._pair.drafter.take(old.drafter)
                self.drafter.move(self._pair.drafter, self._pair.forwards[1])
            self._pair.state.take(old.state)
        finally:
            hand_back(old)
        self._bind()

    def _move_target(self, old: Pair) -> None:
        self._pair.target.take(old.target)
        forward = self._pair.forwards[0]
        if self._lent and self._how.captured:
            forward = Captured(forward, self._pair.graphs)
        self.target.move(self._pair.target, forward)

    def offers(self, candidate: int) -> bool:
        if candidate not in self._known:
            part = self._others[candidate - 1]()
            if part is None or part.contexts is None or self.drafter is None:
                return False
            self._known[candidate] = part, DraftedText(self.drafter, part.contexts)
        return True

    def change(self, candidate: int) -> None:
        self._part, self._text = self._known[candidate]
        old = self._pair
        columns = old.target.capacity - 1
        self._pair = self._check_out(columns, columns if old.drafter is None else old.drafter.capacity - 1)
        try:
            self._move_target(old)
            self.drafter = self._drafter_over(self._pair)
            self._text.move(self.drafter)
            self._report = None
            self._pair.state.take(old.state)
        finally:
            hand_back(old)
        self._bind()

    def lend(self) -> None:
        self._lent = True
        self.target.lend(self._room)
        if self._how.captured:
            self.target.move(self._pair.target, Captured(self._pair.forwards[0], self._pair.graphs))

    def resume(self, rows: Rows) -> None:
        self._lent = False
        self.target.move(self._pair.target, self._pair.forwards[0])
        state, columns = self.state, max(rows.length)
        state.ids[: self._batch, :columns].copy_(rows.ids[:, :columns])
        upload(rows.length, state.length)
        upload(rows.done, state.done)

    def _room(self, columns: int, lanes: int) -> int:
        self._reserve(columns, 0)
        return lanes_for(lanes)

    def close(self) -> None:
        """Gives the caches back."""
        hand_back(self._pair)

    # Rounds -----------------------------------------------------------------------------------------------------------

    def launch(self, gamma: int) -> HostReport:
        if gamma == 0:
            self._unread += 1
        elif isinstance(self._writer, DeviceWriter):
            if self._unread > UNREAD and self._part is not None and self._part.contexts is None:
                self._writer.catch_up(self.state, self._unread)
            self._unread = UNREAD
        tells = self._writer.tells if gamma else NothingDrafted.tells
        values = self._captured(gamma) if self._how.captured else self._round(self.state, gamma)
        report = (PinnedReport if values.device.type == "cuda" else HostReport)(values, tells)
        self._report = report if gamma else None
        return report

    def _captured(self, gamma: int) -> Tensor:
        """Replays a round, captured at its first use; runs it as it is where it cannot be captured."""
        key = (*self._key, gamma)
        graphs = self._pair.graphs
        if key not in graphs:
            with notice(f"capturing a round of {gamma} draft tokens"):
                graphs[key] = self._capture(gamma)
        if graphs[key] is None:
            return self._round(self.state, gamma)
        graph, report = graphs[key]
        graph.replay()
        return report

    def _capture(self, gamma: int) -> tuple[Any, Tensor] | None:
        state, writer = self.state, self._writer
        done = state.done.clone()
        state.done.fill_(True)  # rows that are done change nothing, so the runs below leave the text as it is
        made = None
        for skipping in (branch, None):
            if isinstance(writer, DeviceWriter):
                writer.branch = skipping
            if skipping is None or (BRANCHES and isinstance(writer, DeviceWriter) and writer.ends_early):
                made, self.why_not_captured = capture(lambda: self._round(state, gamma), state.ids.device)
            if made is not None:
                break
        state.done.copy_(done)
        return made

    # Costs ------------------------------------------------------------------------------------------------------------

    def time_round(self, gamma: int, repetitions: int = 3) -> float:
        """Seconds of a round of a bucket, the median; its first run, which may compile and capture, is not among them.

        To be asked before :meth:`start`: the rows are done, so nothing is committed, and what is written into the
        caches will be written over.
        """
        seconds = []
        self.state.whole.fill_(True)  # no row drafts, so no step would be needed
        for _ in range(repetitions + 1):
            begin = time.perf_counter()
            self.launch(gamma).read()
            seconds.append(time.perf_counter() - begin)
        self.state.whole.fill_(False)
        self._report = None
        return statistics.median(seconds[1:])

    def make(self, most: int) -> None:
        """Captures prompt passes, and rounds of every bucket up to so many draft tokens: no call has to wait for them.

        To be asked before :meth:`start`. Not where passes are compiled besides, which takes minutes for all of them.
        """
        capture_all(self.target, self.drafter)
        if self._how.captured and not self._how.compiled:
            for gamma in BUCKETS:
                if gamma <= most and (*self._key, gamma) not in self._pair.graphs:
                    self.launch(gamma).read()
            self._report, self._unread = None, 1

    def costs(self) -> Costs:
        """What a round's parts cost, measured once a pair, shape and rule: γ = 0, and a line through two others."""
        if self._key not in self._pair.costs:
            plain, *drafted = (self.time_round(gamma) for gamma in (0, *TIMED))
            few, many = TIMED
            step = max(drafted[1] - drafted[0], 0.0) / (many - few)
            start = max(drafted[0] - plain - step * few, 0.0)
            # What a drafter has missed it reads in one pass, on a GPU as fast as a single token
            read = step / (64 if self.state.ids.device.type == "cuda" else 8)
            self._pair.costs[self._key] = Costs((plain,), step=step, start=start, read=read, measured=True)
            self._unread = 1
        return self._pair.costs[self._key]
