"""Expected acceptance of each method behind given texts, from the laws that the production drafters state.

Nothing is decided by a coin here. With p the target's law and ψ the proposal's, the first draft token is accepted with
probability ``Σ min(p, ψ)`` under rules *token* and *block* and ``Σ p ψ`` under rule *match*: sums over the vocabulary.
For longer drafts the drafts are drawn (keyed numbers, the same for every method and temperature), and given a draft
x_1 … x_γ the chance that its first i tokens stay is known:

    match  Π_{j<=i} p(x_j),    token  Π_{j<=i} min(1, p(x_j)/ψ_j(x_j)),    block  p_i = min(1, p_{i-1} p(x_i)/ψ_i(x_i)),

the last given x_1 … x_i alone (``docs/verification.md``, the lemma), which is all that its mean over drafts needs. The
expected number of accepted tokens is the mean of their sums over i. Where ψ is known for the whole vocabulary, the term
of x_i is replaced by its mean over x_i, given what comes before: a sum of ``min(ψ, w p)`` or ``w p ψ``, w being the
term before. For SLRS that is done with the first term alone (its lower bound). What is left to chance are the drafts.

T=0: the target's law is its argmax (the first, where several are equal), and drafters run at a temperature so low that
only theirs has mass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, TemperatureLogitsWarper

from specdec_fast import reference
from specdec_fast.drafters.base import Drafter
from specdec_fast.drafters.model import ModelWriter, SlemDrafter
from specdec_fast.drafters.slrs import WalkLaw
from specdec_fast.lean import lean_model
from specdec_fast.methods import Plan, build_drafter, logit_width
from specdec_fast.options import LOOKBEHIND, Options
from specdec_fast.proposal import CompactLaw, LazyLaw, PointMass, Proposal
from specdec_fast.randomness import Philox, row_seeds
from specdec_fast.runner import Runner
from specdec_fast.sources import Sources
from specdec_fast.state import Rows
from specdec_fast.text import Reader, TextProposer
from specdec_fast.verification import Draws
from specdec_fast.vocab import Vocabulary, intersection

__all__ = ["METHODS", "RULES", "Outcome", "Pair", "Probe", "UnionDrafter", "boundaries", "lazy_acceptance"]

METHODS = ("union", "tli", "slem", "projection", "slrs")
RULES = ("match", "token", "block")
COLD = 1e-6
"""The drafters' temperature that stands for 0."""
MOST_TOKENS = 2000
"""Tokens whose ψ is bounded one by one; all others count as unknown."""
REFRESH = 8
"""Tokens asked for before all others are bounded again."""


@dataclass(frozen=True)
class Pair:
    """A target and a drafter, each with its tokenizer."""

    name: str
    target: PreTrainedModel
    tokenizer: Any
    drafter: PreTrainedModel
    own: Any


@dataclass
class Outcome:
    """What is known of one method at one position and temperature.

    Attributes:
        first: rule to the probability that the first draft token stays, between two numbers (equal where it is exact).
        drafted: the same for SLEM, whose law cannot be summed: under rule *match*, given each draft.
        accepted: rule to the expected number of accepted tokens, given each draft.
    """

    method: str
    first: dict[str, tuple[float, float]] = field(default_factory=dict)
    drafted: list[float] = field(default_factory=list)
    accepted: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class UnionLaw(CompactLaw):
    """Softmax over the drafter's vocabulary; ``index`` is -1 where no target token stands."""

    def subtract_from(self, p: Tensor, position: Tensor) -> Tensor:
        assert self.index is not None
        inside = self.index >= 0
        q = reference.masses(self.scores[torch.arange(p.shape[0]), position])
        return reference.subtract_at(p, q[:, inside], self.index[inside])


class UnionDrafter:
    """The baseline over the union of the vocabularies: the drafter's own law, a draw outside the intersection is lost.

    Args:
        writer: the drafter model on its whole vocabulary.
        index: ``[K]`` int64 the target's id of each drafter id, -1: none.
    """

    translate_seconds = 0.0

    def __init__(self, writer: ModelWriter, index: Tensor):
        self._writer = writer
        self._index = index

    def propose(self, rows: Rows, active: list[int], limit: list[int], draws: Draws) -> Proposal:
        self._writer.read(rows, active)
        written = self._writer.write(active, limit, draws)
        assert written.scores is not None
        tokens = torch.where(written.drawn < 0, -1, self._index[written.drawn.clamp(min=0)])
        return Proposal(tokens, written.count, UnionLaw(written.scores, self._index, written.drawn))


class Probe:
    """The production drafters of a pair behind several texts, and the target's laws there.

    Args:
        pair: the models.
        texts: each text in target ids.
        lookahead: γ.
        methods: of :data:`METHODS`.
        tolerance: how far apart the bounds of a law that is asked token by token may stay.
        looks: how many tokens of such a law are asked at most.
    """

    def __init__(
        self,
        pair: Pair,
        texts: Sequence[Sequence[int]],
        *,
        lookahead: int,
        methods: Sequence[str] = METHODS,
        tolerance: float = 0.004,
        looks: int = 48,
    ):
        self._texts = texts
        self._lookahead = lookahead
        self._tolerance = tolerance
        self._looks = looks
        self._warper = TemperatureLogitsWarper(1.0)
        self._drafters = _drafters(pair, len(texts), LogitsProcessorList([self._warper]), lookahead, methods)
        self._target = Runner(pair.target, len(texts), lean=lean_model(pair.target, rounded=False))
        shortest = min(map(len, texts))
        self._rows = Rows(torch.tensor([text[:1] for text in texts]), None, row_seeds(0, len(texts)), shortest, 0)

    def move(self, lengths: Sequence[int]) -> None:
        """Reads each text on, up to a length; lengths may only grow."""
        for row, (text, length) in enumerate(zip(self._texts, lengths, strict=True)):
            self._rows.commit(row, list(text[self._rows.length[row] : length]))
        active = list(range(len(lengths)))
        missing = [torch.tensor(self._rows.tokens[row][self._target.length[row] :]) for row in active]
        tokens = torch.nn.utils.rnn.pad_sequence(missing, batch_first=True)
        self._behind = self._target.feed(active, tokens, [len(part) for part in missing], [1] * len(active))[:, 0]
        self._known: list[dict[tuple[int, ...], Tensor]] = [{(): logits.float()} for logits in self._behind]

    def measure(self, temperature: float, drafts: int) -> list[list[Outcome]]:
        """Every method at one temperature, where the texts have been read to: for each text one outcome a method.

        Args:
            temperature: of target and drafter; 0 takes one draft, for there is no other.
            drafts: how many drafts for the expected number of accepted tokens; 0: none, first tokens alone.
        """
        self._temperature, self._warper.temperature = temperature, temperature or COLD
        rows = len(self._texts)
        p = reference.masses(self._scores(torch.stack([known[()] for known in self._known])))
        outcomes = {method: [Outcome(method) for _ in range(rows)] for method in self._drafters}
        proposals: dict[str, list[tuple[Proposal, Tensor]]] = {method: [] for method in self._drafters}
        for number in range(max(drafts, 1) if temperature else 1):
            draws = Draws(Philox(), row_seeds(number, rows), torch.tensor(self._rows.length))
            for method, drafter in self._drafters.items():
                # SLEM's first token hangs on the text behind it
                limit = [self._lookahead if drafts or method == "slem" else 1] * rows
                proposal = drafter.propose(self._rows, list(range(rows)), limit, draws)
                if number == 0:
                    for outcome, first in zip(outcomes[method], self._first(proposal, p), strict=True):
                        outcome.first = first
                proposals[method].append((proposal, proposal.law.log_q(proposal.tokens)))
        self._score([proposal for made in proposals.values() for proposal, _ in made])
        for method, made in proposals.items():
            for proposal, log_q in made:
                for row, outcome in enumerate(outcomes[method]):
                    self._judge(outcome, row, proposal, log_q, drafts > 0)
        return [[outcomes[method][row] for method in outcomes] for row in range(rows)]

    def _first(self, proposal: Proposal, p: Tensor) -> Iterator[dict[str, tuple[float, float]]]:
        """Of each row, the probability that a first draft token stays, by rule."""
        law = proposal.law
        if isinstance(law, PointMass):  # SLEM: the law of the text is not known
            yield from ({} for _ in range(len(p)))
        elif isinstance(law, LazyLaw):
            for row in range(len(p)):
                yield lazy_acceptance(law, row, p[row], self._tolerance, self._looks)
        else:
            psi = -law.subtract_from(torch.zeros_like(p), torch.zeros(len(p), dtype=torch.long))
            for both, product in zip(torch.minimum(p, psi).sum(-1).tolist(), (p * psi).sum(-1).tolist(), strict=True):
                yield {"match": (product,) * 2, "token": (both,) * 2, "block": (both,) * 2}

    def _scores(self, logits: Tensor) -> Tensor:
        """The target's scores at the temperature of the moment."""
        if self._temperature:
            return logits / self._temperature
        certain = torch.full_like(logits, -torch.inf)
        return certain.scatter(-1, logits.argmax(-1, keepdim=True), 0.0)

    def _score(self, proposals: list[Proposal]) -> None:
        """Has the target score what stands behind every draft token but the last."""
        rows = list(range(len(self._texts)))
        texts: list[list[tuple[int, ...]]] = []
        for row in rows:
            drafts = {_sayable(proposal, row, self._behind.shape[1])[:-1] for proposal in proposals}
            begun = {draft[:n] for draft in drafts for n in range(len(draft))}
            texts.append(sorted(drafts - begun - self._known[row].keys()))
        for turn in range(max(map(len, texts))):
            parts = [texts[row][turn] if turn < len(texts[row]) else () for row in rows]
            tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(part, dtype=torch.long) for part in parts], True)
            count = [len(part) for part in parts]
            logits = self._target.feed(rows, tokens, count, count)
            for row, part in enumerate(parts):
                self._target.rollback(row, self._rows.length[row])
                for n in range(len(part)):
                    self._known[row][part[: n + 1]] = logits[row, n].float()

    def _judge(self, outcome: Outcome, row: int, proposal: Proposal, log_q: Tensor, whole: bool) -> None:
        """Adds what one draft says to an outcome."""
        draft = _sayable(proposal, row, self._behind.shape[1])
        scores = [self._scores(self._known[row][draft[:i]]) for i in range(len(draft))]
        log_p = torch.full((1, len(draft)), -torch.inf, dtype=torch.float64)
        for i, token in enumerate(draft):
            log_p[0, i] = reference.log_prob(scores[i], torch.tensor(token))
        log_psi = log_q[row : row + 1, : len(draft)]
        stay = {
            "match": log_p[0].cumsum(0).exp(),
            "token": (log_p - log_psi)[0].clamp(max=0).cumsum(0).exp(),
            "block": reference.block_weights(log_p, log_psi)[0, 1:],
        }
        if not outcome.first:
            outcome.drafted.append(float(stay["match"][:1].sum()))
        if not whole:
            return
        means = self._means(proposal, row, scores, stay)
        for rule in RULES if outcome.first else ("match",):
            chances = stay[rule].tolist() if means is None else means[rule]
            if outcome.first:
                chances[:1] = [outcome.first[rule][0]]
            outcome.accepted.setdefault(rule, []).append(sum(chances))

    def _means(
        self, proposal: Proposal, row: int, scores: list[Tensor], stay: dict[str, Tensor]
    ) -> dict[str, list[float]] | None:
        """By rule, the chance that each draft token stays given those before it; None where ψ is not known."""
        law = proposal.law
        if isinstance(law, PointMass | LazyLaw):
            return None
        means: dict[str, list[float]] = {rule: [] for rule in RULES}
        for i, given in enumerate(scores):
            p = reference.masses(given)
            place = torch.tensor([min(i, count - 1) for count in proposal.count])
            psi = -law.subtract_from(p.new_zeros(len(self._texts), len(p)), place)[row]
            before = {rule: float(stay[rule][i - 1]) if i else 1.0 for rule in RULES}
            means["match"].append(before["match"] * float((p * psi).sum()))
            means["token"].append(before["token"] * float(torch.minimum(p, psi).sum()))
            means["block"].append(float(torch.minimum(before["block"] * p, psi).sum()))
        return means


def _drafters(
    pair: Pair, rows: int, processors: LogitsProcessorList, lookahead: int, methods: Sequence[str]
) -> dict[str, Drafter]:
    """As :func:`specdec_fast.fast_generate` makes them; the union baseline and SLEM share a model's cache."""
    options = Options(assistant_model=pair.drafter, tokenizer=pair.tokenizer, assistant_tokenizer=pair.own)
    target, own = Vocabulary.of(pair.tokenizer), Vocabulary.of(pair.own)
    device = pair.target.device
    made: dict[str, Drafter] = {}
    if {"union", "slem"} & set(methods):
        contexts = [Reader(target, pair.own, own, lookbehind=LOOKBEHIND) for _ in range(rows)]
        writer = ModelWriter(pair.drafter, contexts, warpers=processors)
        width = logit_width(pair.drafter)
        shared = intersection(target, own, target_size=logit_width(pair.target), drafter_size=width)
        index = torch.full((width,), -1, dtype=torch.long)
        index[shared.drafter_ids] = shared.target_ids
        proposer = TextProposer(pair.tokenizer, target, own, lookbehind=LOOKBEHIND)
        made = {"union": UnionDrafter(writer, index), "slem": SlemDrafter(writer, proposer, device)}
    for method in set(methods) - {"union", "slem"}:
        plan = Plan(method, "block", "", lookahead, "constant")
        made[method] = build_drafter(plan, pair.target, options, rows, processors, True, Sources(), device)
    return {method: made[method] for method in METHODS if method in methods}


def _sayable(proposal: Proposal, row: int, width: int) -> tuple[int, ...]:
    """A row's draft up to a first token that the target does not have, that one included (it is always rejected)."""
    draft = proposal.tokens[row, : proposal.count[row]].tolist()
    outside = next((i for i, token in enumerate(draft) if not 0 <= token < width), len(draft))
    return tuple(draft[: outside + 1])


def lazy_acceptance(law: LazyLaw, row: int, p: Tensor, tolerance: float, looks: int) -> dict[str, tuple[float, float]]:
    """Bounds of a first token's acceptance under a law that costs a drafter pass for most tokens.

    ψ of every token is bounded by what is known beforehand; then the token that leaves most open is asked for, until
    the bounds of ``Σ min(p, ψ)`` are ``tolerance`` apart or ``looks`` are used up. What lies outside the likeliest
    tokens counts for nothing in the lower bound and with all of its p in the upper one.

    Args:
        p: ``[V]`` float64, the target's.

    Returns:
        rule to lower and upper bound.
    """
    assert isinstance(law, WalkLaw)
    if not law._walks[row].drawn:
        return dict.fromkeys(RULES, (0.0, 0.0))
    first = law._walks[row].drawn[0].law
    mass, order = p.sort(descending=True)
    kept = min(int((mass.cumsum(0) < 1 - tolerance / 4).sum()) + 1, MOST_TOKENS, int((mass > 0).sum()))
    tokens, p = order[:kept].tolist(), mass[:kept]
    open_mass = max(1.0 - float(p.sum()), 0.0)
    bounds = torch.tensor([first.bounds(token) for token in tokens], dtype=torch.float64)
    for look in range(looks):
        gap = torch.minimum(p, bounds[:, 1]) - torch.minimum(p, bounds[:, 0])
        if float(gap.sum()) + open_mass <= tolerance or not float(gap.max()) > 0:
            break
        asked = int(gap.argmax())
        law.mass(row, 0, tokens[asked])
        # Paths of other tokens may pass through what was computed: they are bounded anew now and then
        again = [asked]
        if (look + 1) % REFRESH == 0:
            again += (gap > tolerance / 1000).nonzero().squeeze(1).tolist()
        bounds[again] = torch.tensor([first.bounds(tokens[k]) for k in again], dtype=torch.float64)
    low, high = torch.minimum(p.unsqueeze(1), bounds).sum(0).tolist()
    products = (p.unsqueeze(1) * bounds).sum(0).tolist()
    both = low, min(high + open_mass, 1.0)
    return {"match": (products[0], min(products[1] + open_mass, both[1])), "token": both, "block": both}


def boundaries(text: str, target: Vocabulary, drafter: Vocabulary) -> tuple[list[int], list[int]]:
    """A text in target ids, and after how many of them the drafter's tokenisation has a boundary too."""
    ids, _ = target.encode(text)
    other, _ = drafter.encode(text)
    ends = set(_ends(drafter, other))
    return ids, [n for n, end in enumerate(_ends(target, ids), 1) if end in ends]


def _ends(vocabulary: Vocabulary, ids: list[int]) -> list[int]:
    """How many bytes of text end with each id."""
    ends, end = [], 0
    for i in ids:
        end += len(vocabulary.bytes_of([i]))
        ends.append(end)
    return ends
