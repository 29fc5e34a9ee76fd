"""Rounds of literal SLRS with the law of their proposals counted text by text, and faults to plant.

The count knows nothing of the package's text layer: it draws every text the drafter can write, has the target's
tokenizer read the whole of it, and adds up.
"""

import copy
import itertools
from types import SimpleNamespace

import torch
from laws import (
    DRAFTER_PIECES,
    EOS,
    TARGET_PIECES,
    Problem,
    block_ways,
    cells,
    inside,
    match_ways,
    model,
    token_ways,
    tokenizer,
    total_variation,
    warpers,
)
from transformers import LlamaForCausalLM

from specdec_fast.drafters import literal
from specdec_fast.drafters.literal import LiteralSlrsDrafter
from specdec_fast.proposal import Proposal, SparseLaw
from specdec_fast.randomness import Purpose
from specdec_fast.state import Rows
from specdec_fast.text import Reader, TextProposer
from specdec_fast.verification import Block, Draws, Match, Token, sampled_choice
from specdec_fast.vocab import Vocabulary

__all__ = [
    "FAULTS",
    "PROBLEMS",
    "PROMPT",
    "RULES",
    "TOY",
    "Constant",
    "Round",
    "decompositions",
    "fault_decompositions",
    "fault_tokens_before_forgotten",
    "plain",
    "propose",
    "quote_decompositions",
]

RULES = {
    "match": (Match(sampled_choice), match_ways),
    "token": (Token(), token_ways),
    "block": (Block(), block_ways),
}
PROMPT = (1, 2, 5, 3, 4, 1, 2)
TOY = (EOS, "a", "b", "ab")


def exact(width, seed):
    """In float64: however a pass is batched, its logits are the same float32."""
    return copy.deepcopy(model(width, seed, sharpness=0.8)).double()


class Constant(LlamaForCausalLM):
    """The same law behind every text."""

    def __init__(self, *masses):
        super().__init__(model(len(masses), 0).config)
        self.law = torch.tensor(masses).log()

    def forward(self, input_ids, past_key_values=None, logits_to_keep=0, **others):
        return SimpleNamespace(logits=self.law.expand(*input_ids[:, -logits_to_keep:].shape, -1))


def reread(pieces, drafter_pieces, committed, drawn):
    """f: the target tokens that go on from the committed text with what was drawn."""
    behind = "".join(pieces[t] for t in committed)
    new = "".join(drafter_pieces[d] for d in drawn)
    new, ended = new.removesuffix(EOS), new.endswith(EOS)
    ids, ends = tokenizer(pieces)(behind + new).input_ids if new else [], [0]
    for i in ids:
        ends.append(ends[-1] + len(pieces[i]))
    if new:  # where a token reaches across the boundary, the new text is read on its own
        ids = ids[ends.index(len(behind)) :] if len(behind) in ends else tokenizer(pieces)(new).input_ids
    return (*ids, *[pieces.index(EOS)] * ended)


class Round(Problem):
    """The first round behind a prompt, with the law of its proposals counted text by text.

    Args:
        target, drafter: models.
        pieces: of the target's and the drafter's tokenizer.
        prompt: target ids.
        steps: γ, and how many tokens the drafter draws.
        chain: the drafter's sampling.
        confidence: a draft ends behind a drafter token less probable than this.
        read: f; None: `reread`.
    """

    @torch.no_grad()
    def __init__(self, target, drafter, pieces, prompt=PROMPT, steps=2, chain=(), confidence=0.0, read=None):
        self.prompt, self.drafter, self.pieces, self.chain, self.confidence = prompt, drafter, pieces, chain, confidence
        mine, other = pieces
        read = read or (lambda committed, drawn: reread(mine, other, committed, drawn))
        width = len(mine)
        context = tokenizer(other)("".join(mine[t] for t in prompt)).input_ids
        self.law, self.texts, going = {}, {}, {(): 1.0}
        for _ in range(steps):
            ahead = {}
            for drawn, weight in going.items():
                logits = drafter(input_ids=torch.tensor([[*context, *drawn]])).logits[:, -1].float()
                scores = chain(torch.zeros(1, 1), logits) if chain else logits
                self.law[drawn] = scores.double().softmax(-1)[0].tolist()
                for d, mass in enumerate(self.law[drawn]):
                    ended = other[d] == EOS or mass < confidence
                    (self.texts if ended else ahead)[(*drawn, d)] = weight * mass
            going = ahead
        self.texts |= going
        self.texts = {drawn: weight for drawn, weight in self.texts.items() if weight > 0}
        self.proposal = {drawn: read(prompt, drawn)[:steps] for drawn in self.texts}
        q = [torch.zeros((width,) * (i + 1), dtype=torch.float64) for i in range(steps)]
        for drawn, weight in self.texts.items():
            tokens = self.proposal[drawn]
            for i in range(len(tokens)):
                q[i][tokens[: i + 1]] += weight
        # Behind a prefix that cannot be drafted any law will do: nothing asks for it
        q = [(mass + (mass.sum(-1, keepdim=True) == 0)).log() for mass in q]
        p = []
        for i in range(steps + 1):
            texts = torch.tensor([[*prompt, *more] for more in itertools.product(range(width), repeat=i)])
            p.append(target(input_ids=texts).logits[:, -1].float().reshape((width,) * (i + 1)))
        super().__init__(p, q)

    def drafts(self):
        for drawn, weight in self.texts.items():
            tokens = self.proposal[drawn]
            yield drawn, tokens, weight, len(tokens)

    def drafter_of(self, rows):
        mine, other = map(tokenizer, self.pieces)
        target, own = Vocabulary.of(mine), Vocabulary.of(other)
        return LiteralSlrsDrafter(
            self.drafter,
            [Reader(target, other, own) for _ in range(rows)],
            TextProposer(mine, target, own),
            warpers=self.chain,
            confidence=self.confidence,
            eos=own.roles["eos"],
            width=len(self.pieces[1]),
            lookahead=self.gamma,
            device=torch.device("cpu"),
        )

    def played(self, name):
        """Every way the round can go under a rule, through the production code: blocks, and P(accepted > i)."""
        rule, ways = RULES[name]
        drafts = list(self.drafts())
        edges = {drawn: {d: edge for d, *edge in cells(law)} for drawn, law in self.law.items()}
        numbers = torch.full((2 * len(drafts), self.gamma), 0.5, dtype=torch.float64)
        for row in range(len(numbers)):
            drawn = drafts[row // 2][0]
            for i, d in enumerate(drawn):
                numbers[row, i] = inside(edges[drawn[:i]][d], 2 * (row % 2))
        proposal = propose(self, numbers)
        plan = [
            (2 * n + k, tokens, spans, weight * chance / 2)
            for n, (_, tokens, weight, count) in enumerate(drafts)
            for spans, chance in ways(self, tokens, count)
            for k in range(2)
        ]
        rows = len(plan)
        numbers = {purpose: torch.full((rows, self.gamma + 1), 0.5, dtype=torch.float64) for purpose in Purpose}
        scores = torch.zeros(rows, proposal.tokens.shape[1] + 1, self.width)
        for row, (draft, tokens, spans, _) in enumerate(plan):
            assert proposal.tokens[draft, : proposal.count[draft]].tolist() == [*tokens]
            for purpose, offset, span in spans:
                numbers[purpose][row, offset] = inside(span, 2 * (draft % 2))
            for i in range(len(tokens) + 1):
                scores[row, i] = self.p[i][tokens[:i]]
        index = torch.tensor([draft for draft, *_ in plan])
        law = SparseLaw(proposal.law.ids[index], proposal.law.masses[index])
        count = [proposal.count[draft] for draft in index.tolist()]
        verdict = rule.verify(scores, Proposal(proposal.tokens[index], count, law), draws_of(numbers))
        blocks, accepted = {}, [0.0] * self.gamma
        for way, kept, token in zip(plan, verdict.accepted.tolist(), verdict.token.tolist(), strict=True):
            _, tokens, _, weight = way
            block = (*tokens[:kept], token)
            blocks[block] = blocks.get(block, 0.0) + weight
            for i in range(kept):
                accepted[i] += weight
        return blocks, accepted

    def distance(self, name):
        """Total variation of the round, continued by the target, from the target's own law."""
        return total_variation(self.completed(self.played(name)[0]), self.joint())


class Lookup:
    """Numbers read from a table by row (its seed) and offset."""

    def __init__(self, numbers):
        self.numbers = numbers

    def uniform(self, seed, position, offset, purpose, trial=0):
        seed, place = torch.broadcast_tensors(seed, position + offset)
        return self.numbers[purpose][seed, place]


def draws_of(numbers):
    rows = len(next(iter(numbers.values())))
    return Draws(Lookup(numbers), torch.arange(rows), torch.zeros(rows, dtype=torch.long))


def propose(problem, numbers):
    """A proposal for one row a line of ``numbers [R, γ]``, all of them at the prompt."""
    rows, columns = len(numbers), len(problem.prompt)
    prompts = torch.tensor([problem.prompt]).expand(rows, -1)
    state = Rows(prompts, None, torch.arange(rows), columns + problem.gamma + 1, 0)
    limit = [problem.gamma] * rows
    return problem.drafter_of(rows).propose(state, list(range(rows)), limit, draws_of({Purpose.DRAFT: numbers}))


def through_the_proposer(pieces):
    mine, other = map(tokenizer, pieces)
    proposer = TextProposer(mine, Vocabulary.of(mine), Vocabulary.of(other))
    return lambda committed, drawn: tuple(proposer.propose(committed, other("a").input_ids, drawn))


def plain(**options):
    pieces = TARGET_PIECES, DRAFTER_PIECES
    return Round(exact(len(TARGET_PIECES), 31), exact(len(DRAFTER_PIECES), 33), pieces, **options)


def inside_a_character():
    """Drafter tokens that end inside é: what is no whole character is not proposed."""
    pieces = ((EOS, "a", "©", "Ã"), ("Ã", "©", EOS, "a"))
    return Round(exact(4, 34), exact(4, 35), pieces, (1,), read=through_the_proposer(pieces))


def one_drafter_token():
    return Round(exact(4, 36), exact(1, 37), (TOY, ("a",)), (1,))


PROBLEMS = {
    "plain": plain,
    "one draw": lambda: plain(steps=1),
    "top_p": lambda: plain(chain=warpers(temperature=0.7, top_p=0.9)),
    "three draws": lambda: plain(steps=3, chain=warpers(top_k=2)),
    "merged across the boundary": lambda: plain(prompt=(2, 1)),
    "behind a special": lambda: plain(prompt=(1, 0)),
    "confidence": lambda: plain(confidence=0.12),
    "inside a character": inside_a_character,
    "one drafter token": one_drafter_token,
}


# Planted faults


def decompositions(pieces, token, next_law):
    """Σ q(d) over the ways to write one token's text, as if each of them were all that is drawn."""
    total = 0.0
    for drawn, law in next_law.items():
        for d, mass in enumerate(law):
            if mass and "".join(pieces[1][k] for k in (*drawn, d)) == pieces[0][token]:
                for i, k in enumerate(drawn):
                    mass *= next_law[drawn[:i]][k]
                total += mass
    return total


def quote_decompositions(patch, pieces=(TOY, TOY)):
    """Position 1 gets the sum over the decompositions of its token."""
    laws_of = literal._Texts.laws_of

    def faulty(texts, proposal):
        laws = laws_of(texts, proposal)
        if laws and not hasattr(texts, "quoted"):
            known = {drawn: law.tolist() for drawn, law in texts.next_law.items()}
            texts.quoted = {t: decompositions(pieces, t, known) for t in laws[0]}
        return [texts.quoted, *laws[1:]] if laws else laws

    patch.setattr(literal._Texts, "laws_of", faulty)


def fault_decompositions(patch):
    quote_decompositions(patch, (TARGET_PIECES, DRAFTER_PIECES))


def _replace(patch, counts, among):
    """ψ_j from the proposals that ``counts`` picks, normalised over those that ``among`` picks."""

    def faulty(proposals, proposal):
        laws, longest = [], max(map(len, proposals))
        for j in range(len(proposal)):
            law, total = {}, 0.0
            for other, mass in proposals.items():
                if among(other, proposal, j, longest):
                    total += mass
                if len(other) > j and counts(other, proposal, j, longest):
                    law[other[j]] = law.get(other[j], 0.0) + mass
            laws.append({t: mass / total for t, mass in law.items()} if total else law)
        return laws

    patch.setattr(literal, "position_laws", faulty)


def fault_the_next_token_is_not_revealed(patch):
    """ψ_j is normalised over the proposals that end before j, too."""
    agree = lambda other, proposal, j, longest: other[:j] == proposal[:j]  # noqa: E731
    _replace(patch, agree, agree)


def fault_normalised_over_whole_proposals(patch):
    """ψ_j is taken among the proposals of γ tokens alone."""
    whole = lambda other, proposal, j, longest: len(other) == longest and other[:j] == proposal[:j]  # noqa: E731
    _replace(patch, whole, whole)


def fault_tokens_before_forgotten(patch):
    """ψ_j is the law of the j-th token whatever came before."""
    longer = lambda other, proposal, j, longest: len(other) > j  # noqa: E731
    _replace(patch, longer, longer)


def fault_one_text_for_all(patch):
    """The likeliest text's mass stands for that of all texts with the same tokens."""

    def largest(texts, proposal_of):
        law = {}
        for drawn, mass in texts.items():
            law[proposal_of[drawn]] = max(law.get(proposal_of[drawn], 0.0), mass)
        return law

    patch.setattr(literal, "proposal_law", largest)


FAULTS = (
    fault_decompositions,
    fault_the_next_token_is_not_revealed,
    fault_normalised_over_whole_proposals,
    fault_tokens_before_forgotten,
    fault_one_text_for_all,
)
