"""The loop around rounds that live on the device: launch, read what the round before gave, decide the next lookahead.

The host keeps the text as the eager loop does, with the same code (:class:`specdec_fast.engine.Engine`), from a small
report a round. On a GPU it reads a report while the next round runs, so it never makes the device wait; a row that has
ended drafts nothing and commits nothing in the rounds launched meanwhile.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from specdec_fast.device_round import BUCKETS, Told, bucket_of
from specdec_fast.drafters.auto import AutoDrafter
from specdec_fast.engine import Engine, refuse_undefined
from specdec_fast.lookahead import Adaptive
from specdec_fast.state import Rows

__all__ = ["DeviceEngine", "Launcher", "Report"]


class Launcher(Protocol):
    """Runs rounds on the device (:class:`specdec_fast.device_session.Session`)."""

    late: int
    """How many rounds may be launched beyond the one that is read."""
    costly: bool
    """Whether each bucket costs a compilation or a capture."""
    why_not_captured: str
    """Why rounds are not replayed as graphs, where they were to be."""

    def start(self, rows: Rows, shift: int) -> None:
        """Reads the prompt; ``shift`` columns of the target's cache are in front of it."""

    def tell(self, texts: list[list[int]], active: list[int]) -> float:
        """Hands the drafter what it cannot read on the device; returns the seconds this has taken so far."""

    def launch(self, gamma: int) -> Report:
        """Starts a round of a bucket; what it reports can be read as soon as it is through."""

    def limit(self, values: list[int]) -> None:
        """Sets how many tokens each row of the call may draft."""

    def stops(self, row: int, sure: list[float], worth: list[float]) -> None:
        """Sets where a row's draft ends, as :meth:`specdec_fast.lookahead.Adaptive.stops` says it."""

    def stop(self, row: int) -> None:
        """Ends a row for a reason that only the host can see."""

    def reserve(self, columns: int) -> None:
        """Makes room in the caches for texts of so many columns, a round's drafts not counted."""

    def offers(self, candidate: int) -> bool:
        """Whether a candidate of ``auto`` drafts on the device."""

    def change(self, candidate: int) -> None:
        """Lets another candidate that is offered draft from the next round on."""

    def lend(self) -> None:
        """Ends the rounds on the device: the loop on the host has the target from here on."""

    def resume(self, rows: Rows) -> None:
        """Goes on with rounds on the device behind what the loop on the host has committed."""


class Report(Protocol):
    """What a round gave."""

    def read(self) -> list[Told]:
        """What each row did; waits until it is there."""


@dataclass
class DeviceEngine(Engine):
    """One generation whose rounds live on the device.

    ``rows`` is on the host; ``target`` is the runner the rounds use. Where ``drafter`` chooses among candidates
    (:class:`~specdec_fast.drafters.auto.AutoDrafter`), it says who drafts, and drafts where rounds need the host.

    Args:
        launcher: runs the rounds.
    """

    launcher: Launcher = None  # type: ignore[assignment]  # fields behind those with a default need one
    _limits: list[int] = field(default_factory=list)
    _candidate: int = 0
    _hosted: list[int] = field(default_factory=list)  # rounds that the loop on the host ran

    def run(self) -> Tensor:
        """Generates; returns ``sequences [B, L]`` on the host."""
        begin = time.perf_counter()
        with torch.no_grad():
            self.launcher.start(self.rows, self.shift)
            while self.rows.active:
                self._stay_on_the_device()
                if self.rows.active:
                    self._go_on_the_host()
        reasons = [self.launcher.why_not_captured or self.statistics.loop_reason]
        if self._hosted:
            reasons.append(
                f"{len(self._hosted)} of {self.statistics.rounds} rounds, the first of them round {self._hosted[0]}, "
                "needed the host: the running acceptance chose a method that drafts there, or several for the rows"
            )
        self.statistics.loop_reason = "; ".join(filter(None, reasons))
        self.statistics.translate_seconds += self.drafter.translate_seconds
        self.statistics.total_seconds = time.perf_counter() - begin
        return self.rows.ids[:, : max(self.rows.length)]

    def _stay_on_the_device(self) -> None:
        """Rounds, as long as they can live there."""
        reports: deque[Report] = deque()
        while self.rows.active and (candidate := self._agreed()) is not None:
            if candidate != self._candidate:
                self.launcher.change(candidate)
                self._candidate = candidate
            self.statistics.translate_seconds = self.launcher.tell(self.rows.tokens, self.rows.active)
            gamma = self._next_gamma(len(reports))
            reports.append(self.launcher.launch(gamma))
            if len(reports) > self.launcher.late:
                self._take(reports.popleft())
        # Rounds launched behind the last one hold nothing, but their writes must be over before the caches go on
        for report in reports:
            report.read()
        for row, length in enumerate(self.rows.length):
            self.target.length[row] = self.shift + length - 1

    def _agreed(self) -> int | None:
        """Which candidate drafts all rows' next round on the device; None: several do, or one that needs the host."""
        if not isinstance(self.drafter, AutoDrafter):
            return 0
        chosen = set(self.drafter.choose(self.rows, self.rows.active))
        candidate = min(chosen)
        return candidate if len(chosen) == 1 and self.launcher.offers(candidate) else None

    def _go_on_the_host(self) -> None:
        """Rounds as the loop on the host runs them, until the next one can live on the device again."""
        self.launcher.lend()
        self.rows.to(self.target.model.device)
        self.meter = None  # whole rounds were measured
        while self.rows.active and self._agreed() is None:
            self.statistics.rounds += 1
            self._hosted.append(self.statistics.rounds)
            self._round()
            self._stream()
        self.rows.to(torch.device("cpu"))
        if self.rows.active:
            self.launcher.resume(self.rows)

    def _next_gamma(self, unread: int) -> int:
        """Tells the rows their lookahead; the bucket of the round to come."""
        limits = [0] * self.rows.batch
        longest = 0
        watched = self.lookahead if isinstance(self.lookahead, Adaptive) and self.lookahead.watches else None
        for row in self.rows.active:
            room = self.rows.capacity - self.rows.length[row] - 1
            limits[row] = max(min(self.lookahead[row], BUCKETS[-1], room), 0)
            longest = max(longest, self.rows.length[row])
            if watched is not None and limits[row]:
                self.launcher.stops(row, *watched.stops(row))
        if limits != self._limits:
            self._limits = limits
            self.launcher.limit(limits)
        # Near the end fewer tokens would do, but not where that shape would have to be compiled for the end alone
        wanted = [self.lookahead[row] for row in self.rows.active] if self.launcher.costly else limits
        gamma = bucket_of(max(wanted))
        ahead = longest + unread * (BUCKETS[-1] + 1)
        self.launcher.reserve(self.shift + min(ahead + gamma + 1, self.rows.capacity))
        return gamma

    def _take(self, report: Report) -> None:
        """Takes note of a round."""
        self.statistics.rounds += 1
        for row, told in enumerate(report.read()[: self.rows.batch]):
            if not told.new or self.rows.done[row]:
                continue
            refuse_undefined(told.block[min(told.accepted, told.new - 1)], row)
            if isinstance(self.drafter, AutoDrafter):
                self.drafter.note(row, len(self.rows.tokens[row]), told.drafted)
            kept = self._commit(row, told.block[: told.accepted + 1])
            if told.sure and isinstance(self.lookahead, Adaptive):
                self.lookahead.saw(row, told.sure[: told.drafted])
            self._learn(row, told.drafted, told.accepted, kept, told.drafted)
        self._settle()
        for row, done in enumerate(self.rows.done):
            if done:
                self.launcher.stop(row)
        self._stream()
