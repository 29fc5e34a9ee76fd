"""The loop: draft, score, verify, commit, until every row is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from specdec_fast import sampling
from specdec_fast.branching import Branching
from specdec_fast.costs import Meter
from specdec_fast.drafters.base import Drafter
from specdec_fast.lean_ops import Judged, Judging
from specdec_fast.lookahead import Lookahead
from specdec_fast.proposal import Proposal
from specdec_fast.randomness import Philox, UniformSource
from specdec_fast.record import Record
from specdec_fast.runner import Runner
from specdec_fast.staging import staged
from specdec_fast.state import Rows
from specdec_fast.stats import Speculation
from specdec_fast.stops import Stops
from specdec_fast.trees import Climbed, Climbing, Tree
from specdec_fast.verification import Draws, Rule, Verdict

__all__ = ["Engine", "refuse_undefined"]

Judge = Callable[[Proposal, Draws], Judging | None]


@dataclass
class Engine:
    """One generation. Nothing outlives it and nothing of the caller's is changed.

    Args:
        rows: committed text.
        target: scores text; its columns are those of ``rows`` shifted by ``shift``.
        drafter, rule, processors, stops, lookahead: the independent parts.
        source: random numbers.
        statistics: filled while it runs.
        pad: id of padding.
        shift: columns the target's cache holds in front of ``rows`` (a continuation, a prompt given as embeddings).
        embeds: ``[B, n, H]`` the prompt as embeddings, fed instead of the prompt's ids.
        record: what to keep of scores and logits.
        streamer: receives a ``[B]`` tensor a column, as ``generate`` calls it.
        meter: takes down what rounds took, None where nobody asks.
    """

    rows: Rows
    target: Runner
    drafter: Drafter
    rule: Rule
    processors: LogitsProcessorList
    stops: Stops
    lookahead: Lookahead
    source: UniformSource
    statistics: Speculation
    pad: int
    shift: int = 0
    embeds: Tensor | None = None
    record: Record = field(default_factory=Record)
    streamer: BaseStreamer | None = None
    meter: Meter | None = None

    def __post_init__(self) -> None:
        self._manner = sampling.manner_of(self.processors)
        self._in_order = self._manner is sampling.Manner.IN_ORDER or self.stops.in_order
        self._stop: list[int | None] = [None] * self.rows.batch  # columns of each row once it has ended
        self._streamed = self.rows.prompt_columns
        self._feeding = 0.0  # seconds of this round's target pass
        self._drafted_at = [0] * self.rows.batch  # tokens of each row when a draft was last asked for
        self._history: list[Tensor] = []  # [B, V] scores of each step, for criteria called with the whole batch
        # Scores that nobody but the rule looks at can be judged where they are made
        unseen = self.record.empty and not self.processors and self.rows.device.type == "cpu"
        self._judging: Judge | None = getattr(self.rule, "judging", None) if unseen else None
        drawn = unseen and type(self.source) is Philox
        self._climbing: Climbing | None = getattr(self.rule, "climbing", None) if drawn else None

    def run(self) -> Tensor:
        """Generates; returns ``sequences [B, L]``."""
        begin = time.perf_counter()
        with torch.no_grad():
            while self.rows.active:
                self.statistics.rounds += 1
                start, drafting, self._feeding = time.perf_counter(), self.statistics.draft_seconds, 0.0
                drafted = self.statistics.drafted
                if self._in_order:
                    self._round_in_order()
                else:
                    self._round()
                self._stream()
                if self.meter is not None and self._feeding:  # else the prompt's pass is among the rest
                    parts = self.statistics.draft_seconds - drafting + self._feeding
                    rests = self.meter.rests if self.statistics.drafted == drafted else self.meter.judged
                    rests.append(time.perf_counter() - start - parts)
        self.statistics.translate_seconds = self.drafter.translate_seconds
        self.statistics.total_seconds = time.perf_counter() - begin
        return self.rows.ids[:, : max(self.rows.length)]

    def fill(self) -> None:
        """Feeds the padding behind rows that ended early, so that cache and scores cover every column of the result.

        Plain decoding feeds it too, one column at a time.
        """
        end = max(self.rows.length)
        short = [row for row, n in enumerate(self.rows.length) if n < end]
        if not short:
            return
        start = [self.rows.length[row] for row in short]
        missing = [end - n for n in start]
        tokens = self._lanes(self.rows.ids, short, [n - 1 for n in start], missing)
        if self.record.empty:  # only the cache is wanted
            self.target.feed(short, tokens, missing, [1] * len(short))
            return
        logits = self.target.feed(short, tokens, missing, missing).float()
        raw = logits.clone()
        scores = sampling.process(
            self.processors,
            self._manner,
            logits,
            lambda r, i: self.rows.ids[short[r] : short[r] + 1, : start[r] + i],
            short,
            missing,
        )
        for r, row in enumerate(short):
            self.record.add(row, scores[r, : missing[r]], raw[r, : missing[r]])

    # One round -------------------------------------------------------------------------------------------------------

    def _round(self) -> None:
        """All drafted positions at once; each row keeps as many as it accepts."""
        active = self.rows.active
        draws = self._draws(active)
        proposal = self._draft(active, draws)
        begin = time.perf_counter()
        if (climbed := self._climb(active, proposal, draws)) is not None:
            self.statistics.verify_seconds += time.perf_counter() - begin
            self._keep(active, *climbed)
            return
        scores, raw = None, None
        if (judged := self._judge(active, proposal, draws)) is not None:
            accepted, token, drafts = judged.accepted, judged.token, proposal.on_host()
        else:
            logits = self._score(active, proposal)
            memories = proposal.memories()
            raw = logits.clone() if self.record.logits is not None else None
            own = logits.clone() if memories and self.processors else logits
            scores = self._processed(active, proposal, logits) if self.processors else logits
            accepted, token, drafts = _verdict_on_host(self.rule.verify(scores, proposal, draws), proposal)
            for places, memory in memories:
                lists = [[line[p] for p in places] for line in (active, draws.keys[1], accepted)]
                memory.hear(lists[0], lists[1], lists[2], own[places])
        self.statistics.verify_seconds += time.perf_counter() - begin
        count = proposal.count
        for r, row in enumerate(active):
            refuse_undefined(token[r], row)
            block = [*drafts[r][: accepted[r]], token[r]]
            kept = self._commit(row, block)
            self._learn(row, count[r], accepted[r], kept, count[r])
            if scores is not None and not self.record.empty:
                self.record.add(row, scores[r, :kept], None if raw is None else raw[r, :kept])
        self._settle()

    def _keep(self, active: list[int], tree: Tree, climbed: Climbed) -> None:
        """Commits the nodes that stay of each row's tree, and the token behind them."""
        for r, row in enumerate(active):
            refuse_undefined(climbed.token[r], row)
            tokens, parents, passed = tree.tokens[r], tree.parents[r], climbed.passed[r]
            kept = self._commit(row, [*(tokens[i] for i in passed), climbed.token[r]])
            if not tree.passes[r]:  # a chain, or nothing
                self._learn(row, len(tokens), len(passed), kept, len(tokens))
                continue
            way = [-1, *passed]
            met = [(level, i in passed) for i, level in enumerate(tree.levels[r]) if parents[i] in way]
            if tree.origin is not None:  # what was drawn behind a node that stays was not tried
                last = dict(zip(way, passed, strict=False))
                tried = [i for i, parent in enumerate(parents) if parent in way and i <= last.get(parent, i)]
                met = [(tree.levels[r][i], i in passed) for i in tried]
            if isinstance(self.lookahead, Branching):
                self.lookahead.climbed(row, tree.passes[r], len(tokens), met)
            self.statistics.nodes += len(tokens)
            # A level is tested where the target came by one of its nodes' parents
            tested = len(passed) + (way[-1] in parents)
            self._learn(row, tested, len(passed), kept, tested)
        self._settle()

    def _processed(self, active: list[int], proposal: Proposal, logits: Tensor) -> Tensor:
        """Scores of every drafted position."""
        start = [self.rows.length[row] for row in active]
        if self._manner is sampling.Manner.PREFIX:  # prefixes are read off the rows: put the drafts there
            self._place(active, proposal, logits.shape[-1])
        return sampling.process(
            self.processors,
            self._manner,
            logits,
            lambda r, i: self.rows.ids[active[r] : active[r] + 1, : start[r] + i],
            active,
            [c + 1 for c in proposal.count],
        )

    def _round_in_order(self) -> None:
        """One position after the other for the whole batch, until a row rejects: for callables that see every step.

        A row that would have accepted more drops the rest of its draft untested.
        """
        batch, active = self.rows.batch, self.rows.active
        draws = self._draws(active)
        proposal = self._draft(active, draws)
        begin = time.perf_counter()
        length = self.rows.length[active[0]]
        width = proposal.tokens.shape[1]
        tokens = torch.full((batch, width), self.pad, dtype=torch.long, device=self.rows.device)
        tokens[active] = proposal.tokens
        count = [width] * batch  # a finished row takes in padding
        for r, row in enumerate(active):
            count[row] = proposal.count[r]
        logits = self._score(list(range(batch)), Proposal(tokens, count, proposal.law))
        accepted = [0] * len(active)
        for i in range(width + 1):
            raw = logits[:, i].clone() if self.record.logits is not None else None
            scores = sampling.apply(self.processors, self.rows.ids[:, : length + i], logits[:, i])
            verdict = self.rule.verify(scores[active].unsqueeze(1), proposal.at(i), draws.at(i))
            column = torch.full((batch,), self.pad, dtype=torch.long, device=tokens.device)
            kept = verdict.accepted.bool()
            drafted = proposal.tokens[:, i] if i < width else verdict.token
            column[active] = torch.where(kept, drafted, verdict.token)
            kept_rows, chosen = _to_host(kept, column[active])
            for row, (token,) in zip(active, chosen, strict=True):
                refuse_undefined(token, row)
            self._append_column(column)
            for row in range(batch):
                self.record.add(row, scores[row].unsqueeze(0), None if raw is None else raw[row].unsqueeze(0))
            if self.record.scores is not None:
                self._history.append(scores)
            newly_done = self._ask_criteria(length + i + 1, tuple(self._history) if self._history else None)
            accepted = [a + k for a, (k,) in zip(accepted, kept_rows, strict=True)]
            if newly_done or min(accepted) == i:
                break
        self.statistics.verify_seconds += time.perf_counter() - begin
        new = self.rows.length[0] - length
        for r, row in enumerate(active):
            # A row cut short by another one has not rejected anything
            tested = proposal.count[r] if accepted[r] < new else accepted[r]
            self._learn(row, proposal.count[r], accepted[r], new, tested)
        for row in range(batch):
            self.target.rollback(row, self.shift + self.rows.length[row] - 1)

    # Draft and score -------------------------------------------------------------------------------------------------

    def _draws(self, active: list[int]) -> Draws:
        rows, shift, hidden = self.rows, self.shift, self.target.hidden
        # Padding is not counted: a row draws the same numbers in whatever batch it stands
        start = [shift + rows.length[row] - hidden[row] for row in active]
        if len(active) == len(hidden):
            return Draws(self.source, rows.seed, None, keys=(rows.seeds, start), device=rows.device)
        seeds = [rows.seeds[row] for row in active]
        return Draws(self.source, None, None, keys=(seeds, start), device=rows.device)

    def _draft(self, active: list[int], draws: Draws) -> Proposal:
        begin = time.perf_counter()
        limit = []
        for row in active:
            room = self.rows.capacity - self.rows.length[row] - 1  # the token behind the draft needs a column too
            places = self.target.positions - (self.shift + self.rows.length[row] - self.target.hidden[row])
            if places >= 0:  # beyond them rotary positions go on, and learned ones end plain decoding too
                room = min(room, places)
            limit.append(max(min(self.lookahead[row], room), 0) if self.embeds is None else 0)
        proposal = self.drafter.propose(self.rows, active, limit, draws)
        seconds = time.perf_counter() - begin
        self.statistics.draft_seconds += seconds
        if any(limit):
            if self.meter is not None and len(active) == self.rows.batch:
                unread = max(len(self.rows.tokens[row]) - self._drafted_at[row] for row in active)
                levels = max(proposal.count if proposal.tree is None else proposal.tree.passes)
                self.meter.drafts.append((levels, unread, seconds))
            for row, most in zip(active, limit, strict=True):
                if most:
                    self._drafted_at[row] = len(self.rows.tokens[row])
        return proposal

    def _climb(self, rows: list[int], proposal: Proposal, draws: Draws) -> tuple[Tree, Climbed] | None:
        """Scores trees, and chains where their rule has no other operation, and judges them in one operation."""
        climbing, tree = self._climbing, proposal.tree
        if climbing is None or (tree is None and (climbing.drawn or not climbing.temperature)):
            return None
        if tree is None:
            if proposal.told is None:
                return None
            told = zip(proposal.told.tokens, proposal.count, strict=True)
            tree = Tree.of_chains([line[:count] for line, count in told], proposal.told.memory)
        count = [len(tokens) for tokens in tree.tokens]
        if not self._follows(rows, count):
            return None
        begin = time.perf_counter()
        first = [self.rows.tokens[row][-1] for row in rows]
        climbed = self.target.climb(rows, first, tree, climbing, draws.keys)
        self._timed(rows, max(count) + 1, begin + climbed.seconds)
        return tree, climbed

    def _follows(self, rows: list[int], count: list[int]) -> bool:
        """Whether the target has not seen one token a row, and runs a pass over that and a draft as one operation."""
        seen, length, texts = self.target.length, self.rows.length, self.rows.tokens
        fits = all(length[row] + self.shift == seen[row] + 1 and texts[row] for row in rows)
        return self.embeds is None and fits and self.target.quick([c + 1 for c in count])

    def _judge(self, rows: list[int], proposal: Proposal, draws: Draws) -> Judged | None:
        """Scores drafts and judges them in one operation; None where there is none for that.

        Only where the target has not seen one token a row, and nobody but the rule wants the scores.
        """
        told = proposal.told
        texts, count = self.rows.tokens, proposal.count
        if self._judging is None or told is None or not self._follows(rows, count):
            return None
        if (judging := self._judging(proposal, draws)) is None:
            return None
        begin = time.perf_counter()
        judged = self.target.judge(rows, [texts[row][-1] for row in rows], told, count, judging, draws.keys)
        self._timed(rows, max(count) + 1, begin + judged.seconds)
        return judged

    def _score(self, rows: list[int], proposal: Proposal) -> Tensor:
        """Feeds what the target has not seen yet and the drafts: ``[R, G+1, V]`` float32."""
        if self.embeds is not None:
            embeds, self.embeds = self.embeds, None
            lanes = [embeds.shape[1]] * len(rows)
            unread = torch.zeros(embeds.shape[:2], dtype=torch.long)
            return self.target.feed(rows, unread, lanes, [1] * len(rows), embeds=embeds).float()
        first = [self.target.length[row] - self.shift for row in rows]
        unseen = [self.rows.length[row] - f for row, f in zip(rows, first, strict=True)]
        if max(unseen) == 1 and (logits := self._score_quickly(rows, proposal)) is not None:
            return logits
        known = self._lanes(self.rows.ids, rows, first, unseen)
        width = proposal.tokens.shape[1]
        lanes = [u + c for u, c in zip(unseen, proposal.count, strict=True)]
        if min(unseen) == max(unseen):
            tokens = torch.cat([known, proposal.tokens], 1)
        else:
            tokens = torch.nn.functional.pad(known, (0, width))
            for r, u in enumerate(unseen):
                tokens[r, u : u + width] = proposal.tokens[r]
        begin = time.perf_counter()
        logits = self.target.feed(rows, tokens[:, : max(lanes)], lanes, [c + 1 for c in proposal.count])
        if max(unseen) == 1:
            self._timed(rows, max(lanes), begin)
        # A copy in float32, as plain decoding takes it: processors write into it
        return logits.to(device=self.rows.device, dtype=torch.float32, copy=True)

    def _score_quickly(self, rows: list[int], proposal: Proposal) -> Tensor | None:
        """The same from lists, where the target has not seen one token a row and runs as one operation."""
        lanes = [c + 1 for c in proposal.count]
        texts = [self.rows.tokens[row] for row in rows]
        if self.rows.device.type != "cpu" or not all(texts) or not self.target.quick(lanes):
            return None
        drafts = proposal.on_host()
        lists = [[text[-1], *draft[:c]] for text, draft, c in zip(texts, drafts, proposal.count, strict=True)]
        begin = time.perf_counter()
        logits = self.target.read(rows, lists, lanes)
        self._timed(rows, max(lanes), begin)
        return logits

    def _timed(self, rows: list[int], positions: int, begin: float) -> None:
        self._feeding = time.perf_counter() - begin
        if self.meter is not None and len(rows) == self.rows.batch:
            self.meter.passes.append((positions, self._feeding))

    @staticmethod
    def _lanes(ids: Tensor, rows: list[int], first: list[int], count: list[int]) -> Tensor:
        """Columns ``first .. first + count`` of each row, left-aligned: ``[R, max(count)]``."""
        if min(first) == max(first):
            picked = ids if len(rows) == ids.shape[0] else ids[staged(rows, ids.device)]
            return picked[:, first[0] : first[0] + max(count)]
        index = staged(first, ids.device).unsqueeze(1) + torch.arange(max(count), device=ids.device)
        return ids[staged(rows, ids.device)].gather(1, index.clamp(max=ids.shape[1] - 1))

    def _place(self, active: list[int], proposal: Proposal, width: int) -> None:
        """Writes drafts behind the rows' text; an id without a logit will be rejected, but processors look it up."""
        drafts = proposal.tokens.clamp(0, width - 1)
        for r, row in enumerate(active):
            first, n = self.rows.length[row], proposal.count[r]
            self.rows.reserve(first + n)
            self.rows.ids[row, first : first + n] = drafts[r, :n]

    # Commit ----------------------------------------------------------------------------------------------------------

    def _commit(self, row: int, block: list[int]) -> int:
        """Adds a block to a row, up to the token that ends it; returns how many tokens were added."""
        length = self.rows.length[row]
        block = block[: self.rows.capacity - length]
        written = self._manner is sampling.Manner.PREFIX  # drafts stand behind the text
        if self._stop[row] is None:
            if self.stops.reads_text:
                self.rows.reserve(length + len(block))
                self.rows.ids[row, length : length + len(block)] = torch.tensor(block, device=self.rows.device)
                written = True
            ids = self.rows.ids[row : row + 1] if self.stops.reads_text else None
            index = self.stops.first(ids, length, block)
            if index is not None:
                self._stop[row] = length + index + 1
                if self.stops.pads:
                    block = block[: index + 1]
        self.rows.commit(row, block)
        if written:
            self.rows.ids[row, self.rows.length[row] :] = self.pad
        self.target.rollback(row, self.shift + self.rows.length[row] - 1)
        return len(block)

    def _settle(self) -> None:
        """Decides which rows are done.

        Without an EOS there is no padding: plain decoding lets rows that ended run on until the last one has.
        """
        if self.stops.pads:
            self.rows.done = [stop is not None for stop in self._stop]
            return
        self.rows.done = [length >= self.rows.capacity for length in self.rows.length]
        if any(stop is None for stop in self._stop):
            return
        end = max(stop for stop in self._stop if stop is not None)
        for row in range(self.rows.batch):
            self.rows.done[row] = self.rows.length[row] >= end
            if self.rows.done[row]:
                self._truncate(row, end)

    def _truncate(self, row: int, end: int) -> None:
        dropped = self.rows.length[row] - end
        if dropped > 0:
            self.statistics.committed -= dropped
            self.rows.length[row] = end
            del self.rows.tokens[row][-dropped:]
            self.rows.ids[row, end:] = self.pad
            for kept in (self.record.scores, self.record.logits):
                if kept is not None:
                    del kept[row][-dropped:]
            self.target.rollback(row, self.shift + end - 1)

    def _append_column(self, column: Tensor) -> None:
        (values,) = _to_host(column)
        for row, (token,) in enumerate(values):
            self.rows.commit(row, [token])

    def _ask_criteria(self, end: int, scores: tuple[Tensor, ...] | None) -> bool:
        """Asks every criterion about the newest column; returns whether a row ended there."""
        newly = False
        for row, ended in enumerate(self.stops.ended(self.rows.ids[:, :end], scores)):
            if ended and self._stop[row] is None:
                self._stop[row] = end
                newly = True
        if self.stops.pads:
            self.rows.done = [stop is not None for stop in self._stop]
        elif all(stop is not None for stop in self._stop):
            self.rows.done = [True] * self.rows.batch
        return newly

    def _learn(self, row: int, drafted: int, accepted: int, committed: int, tested: int) -> None:
        """Takes note of a round; what was accepted behind the token that ended the row does not count as output."""
        self.statistics.count(drafted, min(accepted, committed), committed)
        self.lookahead.update(row, tested, accepted)

    def _stream(self) -> None:
        """Hands over the columns that every row has reached."""
        if self.streamer is None:
            return
        running = [self.rows.length[row] for row in self.rows.active]
        ready = min(running) if running else max(self.rows.length)
        for column in range(self._streamed, ready):
            self.streamer.put(self.rows.ids[:, column].to("cpu", copy=True))
        self._streamed = max(self._streamed, ready)


def _verdict_on_host(verdict: Verdict, proposal: Proposal) -> tuple[list[int], list[int], list[list[int]]]:
    """How many draft tokens of each row stay, the token behind them, and the drafts."""
    if verdict.accepted.device.type == "cpu":
        return verdict.accepted.tolist(), verdict.token.tolist(), proposal.on_host()
    accepted, token, drafts = _to_host(verdict.accepted, verdict.token, proposal.tokens)
    return [n for (n,) in accepted], [t for (t,) in token], drafts


def _to_host(*tensors: Tensor) -> list[list[list[int]]]:
    """Several ``[R]`` or ``[R, n]`` tensors as lists, with one copy off the device."""
    flat = [t.long().reshape(t.shape[0], -1) for t in tensors]
    values = torch.cat(flat, 1).tolist()
    result, first = [], 0
    for t in flat:
        result.append([line[first : first + t.shape[1]] for line in values])
        first += t.shape[1]
    return result


def refuse_undefined(token: int, row: int) -> None:
    """Raises where a row has no next token."""
    if token < 0:
        raise RuntimeError(
            f"row {row}: the target's scores hold a NaN or forbid every token, so there is no next token to draw"
        )
