"""Literal SLRS (string-level rejection sampling), with its law summed over every text the drafter can write.

SLRS is algorithm 3 of Timor et al., arXiv 2502.05202: the drafter writes a text, the target's tokenizer reads it, and
the tokens that come out are tested by rejection sampling. That needs the law ψ of those tokens. Here it is computed by
enumeration, so its cost is exponential: this is for vocabularies of a few tokens, and the oracle that any other way of
computing or bounding ψ is compared with.

*What is random.* The drafter draws ``d = (d_1 … d_n)`` from ``q(d) = Π q(d_i | d_1 … d_{i-1})``, n fixed or up to its
eos. Everything else is a deterministic map: ``f(d)`` is the target's tokenisation of the text of d behind the
committed text (`TextProposer`), cut to γ tokens. The proposal is ``x = f(d)``, so its law is the image of q,

    P(x) = Σ_{d: f(d) = x} q(d),

in which merges with later tokens, merges across the boundary and text beyond the last whole token are counted, because
the tokenizer itself has read every one of the texts.

*What is revealed.* Before position j: the tokens before it, and that the proposal has a j-th token. So

    ψ_j(t | x_1 … x_{j-1}) = Σ_{d: f(d) = x_1 … x_{j-1} t …} q(d) / Σ_{d: f(d) = x_1 … x_{j-1} …, longer than j-1} q(d).

*Why the output is the target's.* Given what was revealed, x_j was drawn from ψ_j: the ratio above is the definition of
a conditional probability. How long the proposal is may depend on all that was drawn, for the length is revealed one
step at a time, each before the token it announces; where it says that no token follows, the next one is drawn from the
target's law. That is all that rules *token* and *block* ask of a proposal. ``docs/slrs_literal.md`` has the proof, and
the formula often quoted in place of P, which is no distribution.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from specdec_fast import reference, sampling
from specdec_fast.drafters.model import Context
from specdec_fast.proposal import Proposal, SparseLaw
from specdec_fast.runners import runner_for
from specdec_fast.state import Rows
from specdec_fast.text import TextProposer
from specdec_fast.verification import Draws

__all__ = ["LiteralSlrsDrafter", "position_laws", "proposal_law"]

MOST_TEXTS = 20_000

Tokens = tuple[int, ...]


def position_laws(proposals: Mapping[Tokens, float], proposal: Tokens) -> list[dict[int, float]]:
    """ψ_j of every position of one proposal: target token to probability, given the tokens before and that one follows.

    Args:
        proposals: the law of the whole proposal.
        proposal: the one drawn, of positive probability.
    """
    laws = []
    for j in range(len(proposal)):
        law: dict[int, float] = {}
        for other, mass in proposals.items():
            if len(other) > j and other[:j] == proposal[:j]:
                law[other[j]] = law.get(other[j], 0.0) + mass
        total = sum(law.values())
        laws.append({token: mass / total for token, mass in law.items()})
    return laws


def proposal_law(texts: Mapping[Tokens, float], proposal_of: Mapping[Tokens, Tokens]) -> dict[Tokens, float]:
    """P, the law of the whole proposal.

    Args:
        texts: what the drafter can draw, with probabilities that sum to 1.
        proposal_of: f.
    """
    law: dict[Tokens, float] = {}
    for drawn, mass in texts.items():
        proposal = proposal_of[drawn]
        law[proposal] = law.get(proposal, 0.0) + mass
    return law


class _Texts:
    """Everything a drafter can draw behind one context.

    Attributes:
        next_law: ``[K]`` float64 the law of the next drafter token behind each text that goes on.
        mass: the probability of each text that has ended.
        proposal_of: the target tokens each of those stands for.
    """

    def __init__(self) -> None:
        self.next_law: dict[Tokens, Tensor] = {}
        self.mass: dict[Tokens, float] = {}
        self.proposal_of: dict[Tokens, Tokens] = {}
        self._laws: dict[Tokens, list[dict[int, float]]] = {}

    @cached_property
    def proposals(self) -> dict[Tokens, float]:
        return proposal_law(self.mass, self.proposal_of)

    def laws_of(self, proposal: Tokens) -> list[dict[int, float]]:
        """`position_laws` of a proposal, computed once."""
        if proposal not in self._laws:
            self._laws[proposal] = position_laws(self.proposals, proposal)
        return self._laws[proposal]


class LiteralSlrsDrafter:
    """Proposes the target's tokenisation of what a model draws, with the exact law of every token.

    A round draws as many drafter tokens as it may propose target tokens, fewer where more would make too many texts.

    Args:
        model: the drafter.
        contexts: one a row.
        proposer: re-tokenises text behind a row's own.
        warpers: the drafter's sampling.
        confidence: a draft ends behind a drafter token whose probability is below this, which stays; 0: never.
        window: how much it reads of a text, in its tokens; None: as much as it has positions for.
        eos: the drafter's eos, behind which nothing is drawn.
        width: how many logits the drafter has.
        lookahead: draft tokens a round.
        device: of the target.

    Raises:
        ValueError: ``width ** lookahead`` texts are more than can be enumerated.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        contexts: Sequence[Context],
        proposer: TextProposer,
        *,
        warpers: LogitsProcessorList,
        confidence: float,
        eos: int | None,
        width: int,
        lookahead: int,
        device: torch.device,
        window: int | None = None,
    ):
        self._most_steps = _most_steps(width, lookahead)
        self._model = model
        self._positions = runner_for(model, 1, window=window).positions
        self._contexts = contexts
        self._proposer = proposer
        self._warpers = warpers
        self._confidence = confidence
        self._eos = eos
        self._device = device
        self._read = [0] * len(contexts)
        self.translate_seconds = 0.0

    def propose(self, rows: Rows, active: list[int], limit: list[int], draws: Draws) -> Proposal:
        known: dict[tuple[Tokens, Tokens, int], _Texts] = {}  # rows that stand at the same text share the work
        texts = []
        for row, most in zip(active, limit, strict=True):
            text, context = rows.tokens[row], self._contexts[row]
            context.append(text[self._read[row] :])
            self._read[row] = len(text)
            key = tuple(text), tuple(context.ids), most
            if key not in known:
                known[key] = self._enumerate(*key)
            texts.append(known[key])
        drawn = _draw(texts, draws, min(max(limit), self._most_steps))
        proposals = [own.proposal_of[tokens] for own, tokens in zip(texts, drawn, strict=True)]
        laws = [own.laws_of(proposal) for own, proposal in zip(texts, proposals, strict=True)]
        width = max(map(len, proposals))
        tokens = torch.tensor([[*proposal, *[0] * (width - len(proposal))] for proposal in proposals], dtype=torch.long)
        tokens = tokens.reshape(len(active), width).to(self._device)
        return Proposal(tokens, [len(proposal) for proposal in proposals], SparseLaw.of_lists(laws, self._device))

    def _enumerate(self, text: Tokens, context: Tokens, most: int) -> _Texts:
        """Every text behind one context, level by level, and what the target's tokenizer makes of it."""
        steps = min(most, self._most_steps, self._positions - 1) if context else 0
        read = context[-(self._positions - steps) :]
        found = _Texts()
        going: dict[Tokens, float] = {(): 1.0}
        for _ in range(steps):
            ahead: dict[Tokens, float] = {}
            for (drawn, weight), law in zip(going.items(), self._next_laws(read, list(going)), strict=True):
                if bool(law.isnan().any()):  # no distribution: the draft ends here
                    found.mass[drawn] = weight
                    continue
                found.next_law[drawn] = law
                for token, mass in enumerate(law.tolist()):
                    if mass > 0:
                        ended = token == self._eos or mass < self._confidence
                        longer = (*drawn, token)
                        (found.mass if ended else ahead)[longer] = weight * mass
            going = ahead
            if not going:
                break
        found.mass |= going
        begin = time.perf_counter()
        for drawn in found.mass:
            proposal = self._proposer.propose(text, context, drawn) if drawn else []
            found.proposal_of[drawn] = tuple(proposal[:most])
        self.translate_seconds += time.perf_counter() - begin
        return found

    def _next_laws(self, context: Tokens, drawn: list[Tokens]) -> Tensor:
        """The drafter's law behind each of ``N`` texts of one length: ``[N, K]`` float64 on the host."""
        ids = torch.tensor([[*context, *tokens] for tokens in drawn], dtype=torch.long)
        rows, columns = ids.shape
        runner = runner_for(self._model, rows, use_cache=False, joint=True)
        scores = runner.feed(range(rows), ids, [columns] * rows, [1] * rows)[:, 0].float()
        if self._warpers:
            scores = sampling.warp(self._warpers, scores)
        return reference.masses(scores).cpu()


def _draw(texts: list[_Texts], draws: Draws, steps: int) -> list[Tokens]:
    """One text a row, token by token until it ends."""
    drawn: list[Tokens] = [()] * len(texts)
    for step in range(steps):
        going = [r for r, tokens in enumerate(drawn) if tokens in texts[r].next_law]
        if not going:
            break
        laws = torch.stack([texts[r].next_law[drawn[r]] for r in going])
        for r, token in zip(going, reference.draw(laws, draws.draft(step).cpu()[going]).tolist(), strict=True):
            drawn[r] = (*drawn[r], token)
    return drawn


def _most_steps(width: int, lookahead: int) -> int:
    """The most drafter tokens whose every sequence can be enumerated."""
    most = max((steps for steps in range(1, 15) if width**steps <= MOST_TEXTS), default=0)
    if width**lookahead > MOST_TEXTS:
        way_out = f"lower num_assistant_tokens to {most}, or use method='slrs'" if most else "use method='slrs'"
        raise ValueError(
            f"method='slrs_literal' runs the drafter on every text it can write, and {lookahead} of its {width} tokens "
            f"make more than {MOST_TEXTS}: {way_out}"
        )
    return most
