"""Drafters that are language models: the same tokenizer, TLI and SLEM.

All three write with the same loop; they differ in the vocabulary they draw on and in how a drawn token becomes a
target token:

- *same tokenizer*: draws on the whole vocabulary, an id is an id;
- *TLI* (token-level intersection; Timor et al., arXiv 2502.05202): q is restricted to the tokens both vocabularies
  have, byte for byte, and renormalised. What is drawn is a target token, its law is known;
- *SLEM* (string-level exact match; the same): draws on the drafter's whole vocabulary; the text, re-tokenised by the
  target's tokenizer, is proposed as a certainty.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from specdec_fast import sampling
from specdec_fast.branching import Branching
from specdec_fast.drafters.base import Drafting, Passes
from specdec_fast.drafters.head import dense_head, pruned_head
from specdec_fast.drafters.written import Written
from specdec_fast.encoding import Encoded
from specdec_fast.fused import confidence, drafted_token, draws_natively, likeliest, raced_token
from specdec_fast.lean import Choosing, lean_model
from specdec_fast.lean_ops import Choices, Index, Told
from specdec_fast.memory import Memory
from specdec_fast.pictures import Shown
from specdec_fast.proposal import CompactLaw, DenseLaw, PointMass, Proposal
from specdec_fast.randomness import Philox
from specdec_fast.runner import Runner
from specdec_fast.runners import runner_for
from specdec_fast.state import Rows
from specdec_fast.text import TextProposer
from specdec_fast.trees import Origin, Tree
from specdec_fast.verification import Draws

__all__ = ["CompactDrafter", "Context", "ModelWriter", "SameText", "SlemDrafter", "Watcher", "common"]

MOST_STEPS = 4.0  # drafter tokens written for one target token, at most


class Watcher(Protocol):
    """Who knows whether a row drafts on, from how sure the drafter is of what it has written: an adaptive lookahead."""

    def further(self, row: int, drafted: int, confidence: float) -> bool:
        """Whether to, from the tokens of its draft and the newest one's probability."""

    def stops(self, row: int) -> tuple[list[float], list[float]]:
        """The same in numbers, told beforehand (:meth:`specdec_fast.lookahead.Adaptive.stops`)."""

    def saw(self, row: int, steps: Sequence[int]) -> None:
        """Takes note of the level of confidence of each token, where it was told beforehand."""


class Context(Protocol):
    """One row's text as the drafter's ids."""

    ids: list[int]

    def append(self, source_ids: Sequence[int]) -> int:
        """Adds target ids; returns how many of the ids before are unchanged."""


class SameText:
    """The context of a drafter that shares the target's tokenizer."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def append(self, source_ids: Sequence[int]) -> int:
        kept = len(self.ids)
        self.ids.extend(source_ids)
        return kept


class ModelWriter:
    """Runs a drafter model behind the rows' text: brings its cache up to date, then writes token by token.

    Args:
        model: the drafter.
        contexts: one a row.
        warpers: the drafter's sampling; None: its argmax.
        choices: ``[K]`` int64 ids of the drafter it may draw, None: all. Scores and draws are in terms of this list,
            and where that pays no others are computed.
        confidence: stop a row's draft behind a token whose probability is below this; 0: never. The token itself
            stays: dropping it after having looked at it would change the output's law.
        watcher: asked whether a row drafts on, in place of ``confidence``.
        window: how much it reads of a text, in its tokens; None: as much as it has positions for.
        races: draw with the numbers of the target's own races (rule *gumbel*), whose law nobody then asks for.
        names: ``[K]`` int64 target ids of the choices, for that and for the memory; None: their places.
        remembers: mend the scores by what the target said at like places (``docs/memory.md``), where drafts are
            written by native operations.
        passes: runs models that have no native form; None: they run as they are.
        encoded: what the drafter reads beside the text; None: nothing.
        lawless: nobody asks for the law that tokens were drawn from.
        shown: what the model has read of prompts with pictures; None: nothing yet.
    """

    memory: Memory | None = None
    """To be told what the target says of the drafts, where it mends the scores they are drawn from."""

    def __init__(
        self,
        model: PreTrainedModel,
        contexts: Sequence[Context],
        *,
        warpers: LogitsProcessorList | None,
        choices: Tensor | None = None,
        confidence: float = 0.0,
        watcher: Watcher | None = None,
        window: int | None = None,
        races: bool = False,
        names: Tensor | None = None,
        remembers: bool = False,
        passes: Passes | None = None,
        encoded: Encoded | None = None,
        lawless: bool = False,
        shown: Shown | None = None,
    ):
        self._races, self._names = races and warpers is not None, names
        self.contexts = contexts
        self.device = model.device
        self.warpers = warpers
        self.translate_seconds = 0.0
        lean, head = None if encoded is not None else lean_model(model), None
        if choices is not None and encoded is None:
            if lean is None:
                head = pruned_head(model, choices)
            else:
                lean, head = lean.restricted(choices), dense_head(model, choices)
        runner: Runner | None = None
        self._drafting: Drafting | None = None
        if lean is None and passes is not None:
            runner = passes.runner(model, len(contexts), head=head, ids=choices, window=window, encoded=encoded)
            if runner is not None and choices is None and (lawless or warpers is None):
                self._drafting = passes.drafting(runner, warpers, confidence, watcher is not None)
        self._runner = runner or runner_for(model, len(contexts), head=head, lean=lean, window=window, encoded=encoded)
        if remembers and lean is not None:
            self.memory = lean.memory(len(contexts), names)
        self._choices = None if choices is None else choices.to(model.device)
        self._entries = None if choices is None else Choices(choices.cpu())
        self._picks = None if choices is None or head is not None else self._choices
        self._confidence = confidence
        self._choosing = Choosing(0.0 if warpers is None else 1.0, confidence=confidence)
        self._watcher = watcher
        self._read = [0] * len(contexts)
        self._drafted: list[list[int]] = [[] for _ in contexts]  # ids in the cache behind the context
        self._shown = shown is not None
        if shown is not None:
            shown.load(self._runner)
            self._drafted = shown.texts
        self._first = [0] * len(contexts)
        self._positions = self._runner.positions

    def read(self, rows: Rows, active: list[int]) -> None:
        """Takes note of what was committed since the last round."""
        begin = time.perf_counter()
        for row in active:
            context, text = self.contexts[row], rows.tokens[row]
            before = len(context.ids)
            kept = context.append(text[self._read[row] :])
            self._read[row] = len(text)
            if kept == before:  # draft tokens that were accepted are in the cache already
                kept += common(self._drafted[row], context.ids[before:])
            self._runner.rollback(row, max(kept - self._first[row], 0))
        self.translate_seconds += time.perf_counter() - begin

    def write(self, active: list[int], steps: list[int], draws: Draws) -> Written:
        """Draws up to ``steps`` tokens a row behind its context."""
        able = [self._make_room(row, most) for row, most in zip(active, steps, strict=True)]
        places = [r for r, most in enumerate(able) if most]
        if not places:
            return Written(None, None, able, entries=[[] for _ in active], device=self.device)
        if len(places) == len(active):
            return self._write(active, able, draws)
        written = self._write([active[r] for r in places], [able[r] for r in places], draws.rows(places))
        return written.spread(places, len(active))

    def branch(
        self, active: list[int], levels: list[int], draws: Draws, branching: Branching, index: Index | None
    ) -> Tree | None:
        """Drafts a tree of up to so many levels behind each row's context; None where no operation can.

        Args:
            branching: how far each grows.
            index: the target's ids of the choices; None: its tokens are the drafter's.
        """
        if self._picks is not None or not draws_natively(draws, self.device):
            return None
        choosing = _choosing(self.warpers, 0.0) if self.warpers else self._choosing
        able = [self._make_room(row, most) for row, most in zip(active, levels, strict=True)]
        growing = [branching.growing(row, most) for row, most in zip(active, able, strict=True)]
        places = [r for r, one in enumerate(growing) if one.deepest]
        tree = Tree([[] for _ in active], [[] for _ in active], [[] for _ in active], [0] * len(active), self.memory)
        if not places:
            return tree
        rows = [active[r] for r in places]
        missing = self._missing(rows)
        if choosing is None or not self._runner.quick([len(text) for text in missing]):
            return None
        if branching.drawn and not choosing.temperature:  # an argmax is no draw
            return None
        keys = draws.rows(places).keys
        wanted = [growing[r] for r in places]
        least = branching.least(rows)
        drawn = branching.drawn
        grown = self._runner.branch(
            rows, missing, choosing, self._entries, index, wanted, least, keys, self.memory, drawn
        )
        ids = None if index is None else index.list
        for at, (r, row) in enumerate(zip(places, rows, strict=True)):
            self._drafted[row] = []
            entries = grown.entries[at]
            tree.tokens[r] = entries if ids is None else [ids[entry] for entry in entries]
            tree.parents[r], tree.levels[r], tree.passes[r] = grown.parents[at], grown.levels[at], grown.passes[at]
        if (laws := grown.laws) is None:
            return tree
        nothing: list[list[int]] = [[] for _ in active]
        origin = Origin([0] * len(active), nothing, list(nothing), laws, index)
        for at, r in enumerate(places):
            origin.roots[r] = at * laws.shape[1]
            origin.entries[r], origin.behind[r] = grown.entries[at], grown.behind[at]
        return tree._replace(origin=origin)

    def _write(self, active: list[int], count: list[int], draws: Draws) -> Written:
        if (written := self._at_once(active, count, draws) or self._on_the_device(active, count, draws)) is not None:
            return written
        most = max(count)
        logits = self._catch_up(active)
        feed = self._runner.steps(active, most)
        drawn, kept_scores = [], []
        sums: list[Tensor] = []
        fed: list[Tensor] = []
        for step in range(most):
            scores = self._scores(logits)
            token, logsumexp = self._pick(scores, draws, step)
            drawn.append(token)
            kept_scores.append(scores)
            if logsumexp is not None:
                sums.append(logsumexp)
            if self._confidence:
                sure = [mass >= self._confidence for mass in confidence(scores, token)]
                count = [c if ok else min(c, step + 1) for c, ok in zip(count, sure, strict=True)]
            if self._watcher is not None:
                count = self._asked(active, count, step + 1, scores, token)
            if step + 1 >= max(count):
                break
            fed.append(self._ids(token))
            if feed is not None:
                logits = feed(fed[-1])
                continue
            going = [int(step + 1 < c) for c in count]  # a row that is through might have no position left
            logits = self._runner.feed(active, fed[-1].unsqueeze(1), going, going)[:, 0]
        if feed is not None:
            for row, c in zip(active, count, strict=True):
                self._runner.advance(row, min(len(fed), c - 1))
        entries = torch.stack(drawn, 1)
        for row, ids in zip(active, self._ids(entries[:, : len(fed)]).tolist(), strict=True):
            self._drafted[row] = ids
        law = None if self.warpers is None or self._races else torch.stack(kept_scores, 1)
        return Written(entries, law, count, torch.stack(sums, 1) if sums else None)

    def _at_once(self, active: list[int], count: list[int], draws: Draws) -> Written | None:
        """The same in one operation, without Python between the steps; None where there is none."""
        if self._picks is not None or self._races or not draws_natively(draws, self.device):
            return None
        choosing: Choosing | None = self._choosing
        if self.warpers:  # asked now: they may have been set to other values
            choosing = _choosing(self.warpers, self._confidence)
        if choosing is None:
            return None
        missing = self._missing(active)
        if not self._runner.quick([len(text) for text in missing]):
            return None
        watcher = self._watcher
        stops = None if watcher is None else [watcher.stops(row) for row in active]
        drafted = self._runner.draft(active, missing, count, choosing, self._entries, *draws.keys, stops, self.memory)
        if watcher is not None and drafted.levels is not None:
            for row, levels, length in zip(active, drafted.levels, drafted.counts, strict=True):
                watcher.saw(row, levels[:length])
        ids = None if self._entries is None else self._entries.list
        for row, entries, drawn in zip(active, drafted.drawn, drafted.counts, strict=True):
            fed = [entry if entry > 0 else 0 for entry in entries[: drawn - 1]]  # some id where none was drawn
            self._drafted[row] = fed if ids is None else [ids[entry] for entry in fed]
        return Written(None, drafted.laws, drafted.counts, entries=drafted.drawn, device=self.device)

    def _on_the_device(self, active: list[int], count: list[int], draws: Draws) -> Written | None:
        """The same as one function of fixed shape, which keeps no law; None where there is none."""
        if self._drafting is None or self._races or type(draws.source) is not Philox:
            return None
        watcher, texts = self._watcher, [context.ids for context in self.contexts]
        stops = None if watcher is None else [watcher.stops(row) for row in active]
        told = self._drafting(texts, self._first, active, count, draws.keys, self.warpers, stops)
        if told is None:
            return None
        for row, one in zip(active, told, strict=True):
            self._drafted[row] = [max(entry, 0) for entry in one.drawn[:-1]]  # some id where none was drawn
            if watcher is not None:
                watcher.saw(row, one.levels)
        drawn = [one.drawn for one in told]
        return Written(None, None, [len(line) for line in drawn], entries=drawn, device=self.device)

    def _ids(self, entries: Tensor) -> Tensor:
        """The drafter's ids of entries drawn; some id where there is none."""
        if self.warpers is not None:  # an argmax is always an entry
            entries = entries.clamp(min=0)
        return entries if self._choices is None else self._choices[entries]

    def _asked(self, active: list[int], count: list[int], drafted: int, scores: Tensor, token: Tensor) -> list[int]:
        """How long each draft becomes, now that so many tokens of it are drawn; none of them is dropped."""
        assert self._watcher is not None
        sure = confidence(scores, token)
        asked = zip(active, count, sure, strict=True)
        on = [drafted <= c and self._watcher.further(row, drafted, mass) for row, c, mass in asked]
        return [c if goes else min(c, drafted) for c, goes in zip(count, on, strict=True)]

    def _make_room(self, row: int, steps: int) -> int:
        """Slides a row's window where its text would leave the drafter's positions; returns the steps possible."""
        length = len(self.contexts[row].ids)
        if length == 0:
            return 0  # a model without a first token has nothing to continue
        if length - self._first[row] + steps > self._positions and not self._shown:
            self._first[row] = max(length - max(self._positions // 2, 1), 0)
            self._runner.rollback(row, 0)
        # What has seen a picture is not read again without it: there drafting ends
        return max(min(steps, self._positions - (length - self._first[row])), 0)

    def _catch_up(self, active: list[int]) -> Tensor:
        """Feeds each row what its cache lacks: logits behind its text, ``[R, V]``."""
        return self._runner.read(active, self._missing(active), [1] * len(active))[:, 0]

    def _missing(self, active: list[int]) -> list[list[int]]:
        """What each row's cache lacks of its text: one token at least."""
        missing = []
        for row in active:
            text = self.contexts[row].ids
            self._runner.rollback(row, len(text) - self._first[row] - 1)
            missing.append(text[self._first[row] + self._runner.length[row] :])
        return missing

    def _scores(self, logits: Tensor) -> Tensor:
        scores = logits.float() if self._picks is None else logits[:, self._picks].float()
        return sampling.warp(self.warpers, scores) if self.warpers else scores

    def _pick(self, scores: Tensor, draws: Draws, step: int) -> tuple[Tensor, Tensor | None]:
        if self.warpers is None:
            return likeliest(scores), None
        if self._races:
            return raced_token(scores, draws, step, self._names), None
        return drafted_token(scores, draws, step)


class CompactDrafter:
    """Proposes what a model draws on a vocabulary whose every entry is one target token: same tokenizer and TLI.

    With q the law on those entries (for TLI: the drafter's law restricted to the intersection and renormalised, since
    no other score is in the softmax), rule *token* accepts with probability ``sum min(p, q)``.

    Args:
        writer: the drafter model, its choices in the order of ``index``.
        index: ``[K]`` int64 ascending target ids; None: ids are the same on both sides.
        device: of the target.
        branching: drafts are trees that grow so far, where that can be; None: they are not.
    """

    def __init__(
        self, writer: ModelWriter, index: Tensor | None, device: torch.device, branching: Branching | None = None
    ):
        self._writer = writer
        self._branching = branching
        self._index = None if index is None else index.to(device)
        self._table = None if self._index is None else Index(self._index)
        self._device = device

    @property
    def translate_seconds(self) -> float:
        return self._writer.translate_seconds

    def propose(self, rows: Rows, active: list[int], limit: list[int], draws: Draws) -> Proposal:
        self._writer.read(rows, active)
        if self._branching is not None:
            tree = self._writer.branch(active, limit, draws, self._branching, self._table)
            if tree is not None:
                return Proposal.of_tree(tree, self._device)
            # A tree may be twice as deep as what pays for a chain, whose last tokens nobody looks at twice
            limit = [(most + 1) // 2 for most in limit]
        written = self._writer.write(active, limit, draws)
        if (entries := written.entries) is not None:
            ids = None if self._table is None else self._table.list
            lists = entries if ids is None else [[ids[k] if k >= 0 else -1 for k in line] for line in entries]
            told = Told(lists, entries, written.laws, self._table, self._writer.memory)
            return Proposal.of_told(told, written.count, self._device)
        drawn = written.drawn.to(self._device)
        tokens = drawn if self._index is None else torch.where(drawn < 0, -1, self._index[drawn.clamp(min=0)])
        law: DenseLaw = PointMass(tokens)
        if written.scores is not None:
            sums = None if written.logsumexp is None else written.logsumexp.to(self._device)
            law = CompactLaw(
                written.scores.to(self._device),
                self._index,
                drawn,
                None if self._table is None else self._table.narrow,
                sums,
            )
        return Proposal(tokens, written.count, law)


class SlemDrafter:
    """Proposes the target's tokenisation of what a model writes.

    The text is certain before the target looks at it, so the proposal is a point mass and no law is needed; rule
    *match* accepts with probability ``sum_t p(t) psi(t)``, psi being the law of the first re-tokenised token.

    Args:
        writer: the drafter model on its whole vocabulary.
        proposer: re-tokenises text behind a row's own.
        device: of the target.
    """

    def __init__(self, writer: ModelWriter, proposer: TextProposer, device: torch.device):
        self._writer = writer
        self._proposer = proposer
        self._device = device
        self._translate = 0.0

    @property
    def translate_seconds(self) -> float:
        return self._writer.translate_seconds + self._translate

    def propose(self, rows: Rows, active: list[int], limit: list[int], draws: Draws) -> Proposal:
        self._writer.read(rows, active)
        steps = []
        for row, most in zip(active, limit, strict=True):
            own, text = len(self._writer.contexts[row].ids), len(rows.tokens[row])
            ratio = min(max(own / max(text, 1), 1.0), MOST_STEPS)
            steps.append(math.ceil(most * ratio))
        written = self._writer.write(active, steps, draws)
        begin = time.perf_counter()
        entries = written.drawn.tolist() if written.entries is None else written.entries
        drafts = []
        for row, most, drawn, count in zip(active, limit, entries, written.count, strict=True):
            text_ids = [token for token in drawn[:count] if token >= 0]
            context = self._writer.contexts[row].ids
            drafts.append(self._proposer.propose(rows.tokens[row], context, text_ids)[:most] if text_ids else [])
        self._translate += time.perf_counter() - begin
        return Proposal.of_lists(drafts, self._device)


def _choosing(warpers: LogitsProcessorList, confidence: float) -> Choosing | None:
    """The drafter's sampling as the native loop takes it; None where it cannot say it."""
    usual = sampling.parameters(warpers)
    if usual is None:
        return None
    top_k = int(usual.pop("top_k", 0))
    return Choosing(**{"temperature": 1.0, **usual}, top_k=top_k, confidence=confidence)


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common start of two sequences."""
    for length, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return length
    return min(len(left), len(right))
