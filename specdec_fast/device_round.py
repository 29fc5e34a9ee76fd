"""One round that lives on the device: draft, score, verify, commit, in tensors of fixed shape.

No shape and no branch depends on a value, so a round can be captured in a CUDA graph and replayed while the host is
still reading the one before. ``B`` rows, ``G`` draft tokens at most (the γ bucket); a row drafts as many as its own
``limit`` says. Numbers are keyed as everywhere (:mod:`specdec_fast.randomness`), so the tokens are those of the eager
loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from specdec_fast import ops
from specdec_fast.device_law import DeviceLaw
from specdec_fast.lookahead import Adaptive
from specdec_fast.randomness import Purpose
from specdec_fast.round_ops import draft_begin, draft_tail, round_begin, round_commit
from specdec_fast.static_runner import StaticRunner, static_forward

__all__ = [
    "BUCKETS",
    "UNREAD",
    "Begun",
    "DeviceDrafter",
    "DeviceWriter",
    "Draft",
    "Drawn",
    "NothingDrafted",
    "Round",
    "State",
    "Told",
    "bucket_of",
]

UNREAD = 2  # a drafter has not read the last draft token that was accepted, nor the token behind it
_NO_ID = -9  # fills the list of ids that end a row; no token has this id

# Draft tokens of a round, rounded up to one of these: each is a shape to compile or capture
BUCKETS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)


def bucket_of(gamma: int) -> int:
    """The smallest bucket that holds so many draft tokens; the largest where none does."""
    return next((bucket for bucket in BUCKETS if bucket >= gamma), BUCKETS[-1])


@dataclass(eq=False)
class State:
    """What the device knows of every row, written in place.

    Args:
        ids: ``[B, C]`` int64, the columns of ``sequences``, padding behind a row's length.
        length: ``[B]`` committed columns.
        done: ``[B]`` bool.
        seed: ``[B]`` int64.
        limit: ``[B]`` how many tokens each row may draft; the host writes it.
        most: ``[B]`` columns a row can have.
        places: ``[B]`` positions the target was made for.
        shift: ``[B]`` columns of the target's cache in front of ``ids``.
        hidden: ``[B]`` columns of the target's cache that are padding.
        unread: ``[B]`` columns of ``ids`` that are padding.
        ends: ``[E]`` ids that end a row, filled up with an id that no token has.
        tail: ``[B, F]`` the last ids of the drafter's text, where the host writes it (another tokenizer).
        text: ``[B]`` length of the drafter's text.
        sure: ``[B, S]`` float64, the acceptance expected of a draft token by its confidence, in S equal steps.
        worth: ``[B, M]`` float64: behind its i-th token a row drafts on where the whole draft's is above this.
        whole: bool, every step of a draft is taken, whoever drafts: rounds are being timed.
        steps: ``[G, B]`` int64, i in row i: constants, made once.
    """

    ids: Tensor
    length: Tensor
    done: Tensor
    seed: Tensor
    limit: Tensor
    most: Tensor
    places: Tensor
    shift: Tensor
    hidden: Tensor
    unread: Tensor
    ends: Tensor
    tail: Tensor
    text: Tensor
    sure: Tensor
    worth: Tensor
    whole: Tensor
    steps: Tensor

    ENDS = 64
    TAIL = 4

    @classmethod
    def empty(cls, rows: int, columns: int, device: torch.device) -> State:
        """Rows of nothing, all done."""

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        each = ("length", "seed", "limit", "most", "places", "shift", "hidden", "unread", "text")
        state = cls(
            ids=numbers(rows, columns),
            done=torch.zeros(rows, dtype=torch.bool, device=device),
            ends=numbers(cls.ENDS),
            tail=numbers(rows, cls.TAIL),
            sure=numbers(rows, Adaptive.STEPS).double(),
            worth=numbers(rows, BUCKETS[-1]).double(),
            whole=numbers().bool(),
            steps=numbers(BUCKETS[-1], rows),
            **{name: numbers(rows) for name in each},
        )
        state.clear()
        return state

    def clear(self) -> None:
        """Makes every row one of nothing, which is done."""
        for tensor in vars(self).values():
            tensor.zero_()
        self.length.fill_(1)  # a pass takes the last token of a row, and there has to be one
        self.text.fill_(1)
        self.done.fill_(True)
        self.ends.fill_(_NO_ID)
        self.steps.copy_(torch.arange(len(self.steps), device=self.steps.device).unsqueeze(1))

    def take(self, other: State) -> None:
        """Copies the rows of a state with fewer columns."""
        for name, mine in vars(self).items():
            theirs = getattr(other, name)
            (mine[:, : theirs.shape[1]] if name == "ids" else mine).copy_(theirs)


class Begun(NamedTuple):
    """What a round begins with: how many tokens each row may draft ``[B]``, its last token ``[B, 1]``, the column of
    the target's cache that takes it ``[B]``, and the tokens committed, padding not counted, by which random numbers are
    keyed ``[B]``."""

    room: Tensor
    last: Tensor
    start: Tensor
    committed: Tensor


class Draft(NamedTuple):
    """What a drafter proposes: target ids ``[B, G]`` and how many of them each row drafted ``[B]``.

    Where they have a law, also the logits ``[B, G, K]``, their logsumexp and the entries drawn ``[B, G]``, as
    :func:`specdec_fast.ops.verify` takes them; where that is of several kinds, ``kind [B, G]`` and ``ids`` with
    ``log_q [B, G, S]``.

    The host is told ``own [B, G]``, the drafter's ids that stand in its cache behind its text (-1: none), where its
    tokenizer is another; and ``sure [B, G]``, the step of each token's confidence, where the lookahead asks for it.
    """

    tokens: Tensor
    drafted: Tensor
    logits: Tensor | None = None
    logsumexp: Tensor | None = None
    drawn: Tensor | None = None
    kind: Tensor | None = None
    ids: Tensor | None = None
    log_q: Tensor | None = None
    own: Tensor | None = None
    sure: Tensor | None = None


class Told(NamedTuple):
    """What the host reads of a row's round.

    ``new`` columns were committed (0: the row was done), ``accepted`` of the ``drafted`` tokens; ``block`` holds the
    accepted ones and the one behind them (-1: there is none that the target's scores define). ``own`` and ``sure`` as
    in :class:`Draft`, nothing where the drafter tells nothing.
    """

    new: int
    accepted: int
    drafted: int
    block: list[int]
    own: list[int]
    sure: list[int]

    @classmethod
    def of(cls, values: list[int], own: bool, sure: bool) -> Told:
        """From a row of what :class:`Round` returns."""
        new, accepted, drafted, *rest = values
        width = (len(rest) - 1) // (1 + own + sure)
        parts = [rest[width + 1 + i * width :][:width] for i in range(own + sure)]
        return cls(new, accepted, drafted, rest[: width + 1], parts[0] if own else [], parts[-1] if sure else [])


class DeviceDrafter(Protocol):
    """Drafts on the device."""

    @property
    def tells(self) -> tuple[bool, bool]:
        """Whether its drafts hold ``own`` and ``sure``."""

    @property
    def index(self) -> Tensor | None:
        """``[K]`` int32 ascending target ids of the entries of its logits; None: entry k is id k."""

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Fused parameters of its law, ``[B]`` each."""

    def draft(self, state: State, gamma: int, begun: Begun, law_wanted: bool) -> Draft:
        """Drafts as many tokens a row as there is room for, at most ``gamma``."""


class NothingDrafted:
    """Plain decoding."""

    index: Tensor | None = None
    parameters: ClassVar[dict[str, Tensor]] = {}
    tells: ClassVar[tuple[bool, bool]] = (False, False)

    def draft(self, state: State, gamma: int, begun: Begun, law_wanted: bool) -> Draft:
        return Draft(state.ids[:, :gamma], state.steps[0])


class Drawn(NamedTuple):
    """One draft step: the scores ``[B, K]`` it was drawn from, the entry (-1: they are no law), and what
    :func:`specdec_fast.ops.sample` says of it, ``[B]`` each.

    ``taken``: bool, whether the drafter read the token before it; where not, no row drafts that far, and the scores are
    those of the step before. None: it did.
    """

    scores: Tensor
    entry: Tensor
    log_prob: Tensor
    logsumexp: Tensor
    taken: Tensor | None = None


Branch = Callable[[Tensor, Callable[[], None]], None]
"""Runs a function where a bool on the device says so, without the host looking at it."""


class DeviceWriter:
    """A model that drafts on a vocabulary whose every entry is one target token: same tokenizer, TLI.

    Args:
        runner: the drafter model over a static cache.
        law: its sampling.
        parameters: its fused parameters, ``[B]`` each.
        index: ``[K]`` int32 ascending target ids of what it may draw, None: ids are the same on both sides.
        target_ids: the same, int64.
        choices: ``[K]`` int64 its own ids of them.
        picks: the same, where its head computes other logits as well.
        confidence: a row's draft ends behind a token whose probability is below this.
        watched: a row's draft ends where ``State.sure`` and ``State.worth`` say so.
        eager: shapes may hang on values (a CPU, and nothing compiled): drafting ends where all rows are through.
        told: the host writes the drafter's text into the state; None: where its tokenizer is another.

    Attributes:
        branch: passes of steps that no row needs are skipped by it; None: they run.
    """

    branch: Branch | None = None

    def __init__(
        self,
        runner: StaticRunner,
        law: DeviceLaw,
        *,
        parameters: dict[str, Tensor],
        index: Tensor | None = None,
        target_ids: Tensor | None = None,
        choices: Tensor | None = None,
        picks: Tensor | None = None,
        confidence: float = 0.0,
        watched: bool = False,
        eager: bool = False,
        told: bool | None = None,
    ):
        self.runner = runner
        self.law = law
        self.parameters = parameters
        self.index = index
        self.watched = watched
        self._target_ids = target_ids
        self._choices = choices
        self._told = choices is not None if told is None else told
        self._picks = picks
        self.eager = eager
        self._confidence = confidence

    @property
    def tells(self) -> tuple[bool, bool]:
        return self._choices is not None, self.watched

    @property
    def ends_early(self) -> bool:
        """Whether drafts often need fewer steps than they have places."""
        return bool(self._confidence)

    def draft(self, state: State, gamma: int, begun: Begun, law_wanted: bool) -> Draft:
        """Reads what is new of each row's text, then draws token by token."""
        tail, text = self._tail(state)
        count, *first = draft_begin(text, begun.room, tail.shape[1], self.runner.positions)
        steps: list[Drawn] = []
        sure: list[Tensor] = []
        reach = torch.ones_like(state.sure[:, 0]) if self.watched else state.sure[:, 0]

        def goes_on() -> Tensor:
            return (count > len(steps)).any() | state.whole

        for drawn in self._steps(state, gamma, begun.committed, (tail, *first), text, goes_on):
            steps.append(drawn)
            if self._confidence or self.watched:
                mass = (_certainty(drawn.scores, drawn.entry) if self.law.greedy else drawn.log_prob).exp()
                on = mass >= self._confidence
                if self.watched:
                    scale = state.sure.shape[1]
                    sure.append((mass.nan_to_num(0.0) * scale).long().clamp(max=scale - 1))
                    reach = reach * state.sure.gather(1, sure[-1].unsqueeze(1)).squeeze(1)
                    on = reach > state.worth[:, len(steps) - 1]
                count = torch.where(on, count, count.clamp(max=len(steps)))
            if self.eager and not bool(goes_on()):
                break
        entries = torch.stack([drawn.entry for drawn in steps], 1)
        tokens = entries
        if self._target_ids is not None:
            tokens = torch.where(entries < 0, -1, self._target_ids[entries.clamp(min=0)])
        draft = Draft(tokens, count, own=self._read(steps), sure=torch.stack(sure, 1) if sure else None)
        if not law_wanted or self.law.greedy:
            return draft
        logits, logsumexp = (torch.stack(part, 1) for part in ([d.scores for d in steps], [d.logsumexp for d in steps]))
        return draft._replace(logits=logits, logsumexp=logsumexp, drawn=entries)

    def _read(self, steps: list[Drawn]) -> Tensor | None:
        """The drafter's ids ``[B, S]`` that it has read behind its text, -1 where it has not; for the host."""
        if self._choices is None:
            return None
        drawn = torch.stack([step.entry for step in steps], 1).clamp(min=0)
        own = torch.nn.functional.pad(self._choices[drawn[:, :-1]], (0, 1), value=-1)
        taken = [step.taken for step in steps[1:] if step.taken is not None]
        return torch.where(torch.stack([*taken, taken[-1]]), own, -1) if taken else own

    def _steps(
        self,
        state: State,
        gamma: int,
        key: Tensor,
        first: tuple[Tensor, ...],
        text: Tensor,
        goes_on: Callable[[], Tensor],
    ) -> Iterator[Drawn]:
        """Draws up to ``gamma`` tokens one behind the other, each read when the next is asked for.

        Args:
            key: of the round's numbers.
            first: what the first pass reads, where it begins and the lane that counts.
            text: of :meth:`_tail`.
            goes_on: whether a row needs the next step; asked behind each.
        """
        logits, taken = self.runner.score(*first), None
        for step in range(gamma):
            scores = self.law.scores(logits if self._picks is None else logits[:, self._picks])
            found = ops.sample(
                scores,
                seed=state.seed,
                position=key,
                offset=state.steps[step],
                purpose=Purpose.DRAFT,
                **self.parameters,  # type: ignore[arg-type]
            )
            entry = torch.where(found.status != 0, -1, found.token)
            yield Drawn(scores, entry, found.log_prob, found.logsumexp, taken)
            if step + 1 < gamma:
                own = found.token if self._choices is None else self._choices[found.token]  # 0 where there is none
                behind = partial(self.runner.score, own.unsqueeze(1), text + step, state.steps[0])
                if self.branch is None:
                    logits = behind()
                else:
                    taken = goes_on()
                    logits = self._where(taken, behind, logits)

    def _where(self, taken: Tensor, behind: Callable[[], Tensor], logits: Tensor) -> Tensor:
        """The logits of a pass where it is taken, else those there were; in memory that holds them either way."""
        assert self.branch is not None
        kept = logits.clone()

        def run() -> None:
            kept.copy_(behind())

        self.branch(taken, run)
        return kept

    def catch_up(self, state: State, unread: int) -> None:
        """Reads the last tokens of each row after rounds without a draft; same tokenizer."""
        lanes = 1 << (unread - 1).bit_length()
        tail, text = draft_tail(state.ids, state.length, state.unread, lanes)
        self.runner.score(tail, (text - lanes).clamp(min=0), torch.zeros_like(text), forward=static_forward)

    def _tail(self, state: State) -> tuple[Tensor, Tensor]:
        """The last ids of each row's text and its length: what may be new, and a token or two more."""
        if self._told:
            return state.tail, state.text
        return draft_tail(state.ids, state.length, state.unread, UNREAD)


def _certainty(scores: Tensor, token: Tensor) -> Tensor:
    """Log-probability of a token under the softmax of scores, ``[B]`` float64."""
    wide = scores.double()
    return wide.gather(1, token.clamp(min=0).unsqueeze(1)).squeeze(1) - wide.logsumexp(1)


@dataclass(frozen=True)
class Round:
    """The parts of a round that stay the same during a call.

    Args:
        target: scores.
        drafter: drafts.
        rule: "match", "token" or "block".
        law: the target's sampling.
        parameters: its fused parameters, ``[B]`` each.
    """

    target: StaticRunner
    drafter: DeviceDrafter
    rule: str
    law: DeviceLaw
    parameters: dict[str, Tensor]

    def __call__(self, state: State, gamma: int) -> Tensor:
        """Runs a round and commits what it gave.

        Returns:
            ``[B, N]`` int64, what :meth:`Told.of` takes apart: columns committed, draft tokens accepted, draft tokens
            drafted, the block, and what the drafter tells.
        """
        drafter = self.drafter if gamma else NothingDrafted()
        ids, length, done, most = state.ids, state.length, state.done, state.most
        row = (state.limit, most, state.places, state.shift, state.hidden)
        begun = Begun(*round_begin(ids, length, done, *row, gamma))
        draft = drafter.draft(state, gamma, begun, self.rule != "match")
        found = self._verify(state, begun, draft)
        block = (found.accepted, found.token, found.status)
        report = round_commit(draft.tokens, draft.drafted, *block, ids, length, done, most, state.ends)
        told = [part for part in (draft.own, draft.sure) if part is not None]
        return torch.cat([report, *told], 1) if told else report

    def _verify(self, state: State, begun: Begun, draft: Draft) -> ops.Verification:
        tokens = torch.cat([begun.last, draft.tokens], 1) if draft.tokens.shape[1] else begun.last
        logits = self.target.score(tokens, begun.start)
        given = {"draft_" + name: value for name, value in self.drafter.parameters.items()}
        if draft.logits is None:
            given = {}
        return ops.verify(
            self.law.scores(logits),
            draft.tokens,
            draft.drafted,
            rule=self.rule,
            seed=state.seed,
            start=begun.committed,
            draft_logits=draft.logits,
            index=None if draft.logits is None else self.drafter.index,
            drawn=draft.drawn,
            draft_logsumexp=draft.logsumexp,
            kind=draft.kind,
            sparse_ids=draft.ids,
            sparse_log_q=draft.log_q,
            **self.parameters,  # type: ignore[arg-type]
            **given,  # type: ignore[arg-type]
        )
