"""Rule *block* (Sun et al., arXiv 2403.10444): its law, what it accepts, and planted faults."""

import itertools
import math

import pytest
import torch
from laws import Problem, Recorder, block_ways, chi_square, model, token_ways
from replay import (
    EXACT,
    INF,
    PROBLEMS,
    compact_proposal,
    distance,
    mean_accepted,
    one_hot,
    philox_draws,
    random_problem,
    random_supports,
    replay,
    tables,
)
from transformers import LogitsProcessor, LogitsProcessorList

from specdec_fast import fast_generate, last_speculation, reference
from specdec_fast.block import _Next
from specdec_fast.proposal import CompactLaw, PointMass, Proposal
from specdec_fast.randomness import Philox, Purpose
from specdec_fast.verification import Block, Draws, Token


def accepted(problem, name):
    rule, ways = {"token": (Token(), token_ways), "block": (Block(), block_ways)}[name]
    return mean_accepted(replay(problem, rule, ways))


def expected(problem):
    """Mean accepted tokens of rules *token* and *block*, in plain sums over the drafts: E sum_i P(tau >= i | x^i)."""
    token = block = 0.0
    for _, tokens, weight, count in problem.drafts():
        kept = block_weight = 1.0
        for i in range(count):
            kept *= min(1.0, problem.ratio(tokens, i))
            block_weight = min(1.0, block_weight * problem.ratio(tokens, i))
            token += weight * kept
            block += weight * block_weight
    return token, block


def stationary(p, q, gamma):
    """The same laws behind every prefix."""
    p, q = (torch.tensor(x).log() for x in (p, q))
    shape = [len(p)] * gamma
    return Problem(
        [p.expand(*shape[:i], -1) for i in range(gamma + 1)], [q.expand(*shape[:i], -1) for i in range(gamma)]
    )


# What it accepts


def test_the_papers_example():
    """Section 2 of the paper: two tokens, γ = 2; 10/9 accepted by rule token, 11/9 by rule block."""
    problem = stationary([1 / 3, 2 / 3], [2 / 3, 1 / 3], 2)
    assert accepted(problem, "token") == pytest.approx(10 / 9, abs=1e-6)
    assert accepted(problem, "block") == pytest.approx(11 / 9, abs=1e-6)


@pytest.mark.parametrize("make", PROBLEMS)
def test_it_accepts_what_the_formula_says(make):
    problem = make()
    token, block = expected(problem)
    assert accepted(problem, "token") == pytest.approx(token, abs=EXACT)
    assert accepted(problem, "block") == pytest.approx(block, abs=EXACT)


def test_never_fewer_accepted_than_rule_token():
    """Hundreds of instances, half of them with holes in the laws and ragged drafts, replayed."""
    gained = 0
    for seed in range(200):
        gamma = 1 + seed % 3
        problem = random_supports(seed, 3, gamma, False) if seed % 2 else random_problem(3, gamma, seed)
        if seed % 5 == 0:
            problem.stop = lambda prefix, mass: mass < 0.2
        token, block = accepted(problem, "token"), accepted(problem, "block")
        assert (token, block) == pytest.approx(expected(problem), abs=EXACT)
        assert block >= token - EXACT
        if gamma == 1:
            assert block == pytest.approx(token, abs=EXACT)
        gained += block > token + 1e-3
    assert gained > 60


def test_one_draft_token_is_rule_token():
    """With γ = 1 the two rules ask the same number the same question."""
    generator = torch.Generator().manual_seed(0)
    scores, laws = torch.randn(500, 2, 6, generator=generator), torch.randn(500, 1, 6, generator=generator)
    proposal = compact_proposal(laws)
    block, token = (rule.verify(scores, proposal, philox_draws(500)) for rule in (Block(), Token()))
    assert torch.equal(block.accepted, token.accepted)
    assert torch.equal(block.token, token.token)


# Its law


def certain_text(gamma=2, width=3):
    """A proposal that was certain (SLEM, prompt lookup): the draft is one text."""
    p, _ = tables(width, width, gamma, 30)
    generator = torch.Generator().manual_seed(30)
    return Problem(p, [one_hot((width,) * (i + 1), generator) for i in range(gamma)])


@pytest.mark.parametrize("rule, ways", [(Token(), token_ways), (Block(), block_ways)])
def test_point_masses_of_any_kind(rule, ways):
    """One text known for certain: as a point mass and as one-hot scores it is verified alike, and losslessly."""
    problem = certain_text()
    assert distance(problem, rule, ways) < EXACT
    (_, tokens, _, _) = next(problem.drafts())
    rows = 4000
    drafts = torch.tensor(tokens).expand(rows, -1)
    scores = torch.stack([problem.p[i][tokens[:i]] for i in range(3)]).expand(rows, -1, -1)
    scores_q = torch.stack([problem.q[i][tokens[:i]] for i in range(2)]).expand(rows, -1, -1)
    certain, one = (
        rule.verify(scores, Proposal(drafts, [2] * rows, law), philox_draws(rows))
        for law in (PointMass(drafts), CompactLaw(scores_q, None, drafts))
    )
    assert torch.equal(certain.accepted, one.accepted) and torch.equal(certain.token, one.token)
    assert len(set(certain.accepted.tolist())) > 1


def test_a_draft_ends_where_the_target_has_no_law():
    """A row of NaN behind an accepted token: reported if the draft gets there, no matter if it does not."""
    rows = 300
    scores = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(1)).repeat(rows, 1, 1)
    scores[:, 1] = float("nan")
    laws = torch.zeros(rows, 2, 4)
    verdict = Block().verify(scores, compact_proposal(laws), philox_draws(rows))
    assert set(verdict.accepted.tolist()) == {0, 1}
    assert ((verdict.token == -1) == (verdict.accepted == 1)).all()


def test_a_coin_at_the_edge_loses():
    """P(u < h) = h on the grid of the numbers: one that equals h must not win."""

    class Coin:
        def uniform(self, seed, position, offset, purpose, trial=0):
            return torch.full((seed + position + offset).shape, 0.5, dtype=torch.float64)

    half = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]).double().log()
    proposal = Proposal(torch.tensor([[0]]), [1], CompactLaw(torch.zeros(1, 1, 2), None, torch.tensor([[0]])))
    draws = Draws(Coin(), torch.tensor([0]), torch.tensor([0]))
    assert Block().verify(half, proposal, draws).accepted.item() == 0


# Several rounds

P = torch.tensor([[0.2, 0.5, 0.3], [0.5, 0.1, 0.4], [0.4, 0.4, 0.2]])
Q = torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.3, 0.2, 0.5]])
"""The next token's laws behind each token: residuals of two entries, so that the number they take matters."""


def rounds(rule, source, *, rows=100_000, length=4, gamma=2):
    """Texts written round by round, ``[rows, length]``: behind token 0, by a target that looks at one token back."""
    text = torch.zeros(rows, length + gamma + 1, dtype=torch.long)
    done = torch.zeros(rows, dtype=torch.long)
    while len(lanes := (done < length).nonzero().squeeze(1)):
        start = done[lanes]
        draws = Draws(source, lanes, start)
        before = torch.where(start > 0, text[lanes, start - 1], 0)
        drawn, laws, scores = [], [], [P[before].log()]
        for i in range(gamma):
            laws.append(Q[before].log())
            before = reference.draw(reference.masses(laws[-1]), draws.draft(i))
            drawn.append(before)
            scores.append(P[before].log())
        tokens = torch.stack(drawn, 1)
        proposal = Proposal(tokens, [gamma] * len(lanes), CompactLaw(torch.stack(laws, 1), None, tokens))
        verdict = rule.verify(torch.stack(scores, 1), proposal, draws)
        for i, token in enumerate(drawn):
            text[lanes, start + i] = token
        text[lanes, start + verdict.accepted] = verdict.token
        done[lanes] = start + verdict.accepted + 1
    return text[:, :length]


def fit(texts):
    """The p-value of the joint law of what :func:`rounds` writes."""
    length, p = texts.shape[1], P.double()
    law = []
    for text in itertools.product(range(3), repeat=length):
        law.append(math.prod(float(p[before, token]) for before, token in zip((0, *text), text, strict=False)))
    code = (texts * 3 ** torch.arange(length - 1, -1, -1)).sum(1)
    return chi_square(torch.bincount(code, minlength=3**length), torch.tensor(law))


@pytest.mark.parametrize("rule", [Token(), Block()])
def test_rounds_after_rounds(rule):
    assert fit(rounds(rule, Philox())) > 1e-3


def test_keys_by_position_alone_are_lossy():
    """A planted fault: the next round draws with numbers whose coins this one has looked at."""

    class Forgetful(Philox):
        def uniform(self, seed, position, offset, purpose, trial=0):
            return super().uniform(seed, position + offset, torch.zeros_like(offset), purpose, trial)

    assert fit(rounds(Block(), Forgetful())) < 1e-9


@pytest.mark.parametrize("taken, given", [("RESIDUAL", "ACCEPT"), ("ACCEPT", "DRAFT"), ("RESIDUAL", "DRAFT")])
def test_shared_noise_is_lossy(taken, given):
    class Shared(Philox):
        def uniform(self, seed, position, offset, purpose, trial=0):
            purpose = Purpose[given] if purpose is Purpose[taken] else purpose
            return super().uniform(seed, position, offset, purpose, trial)

    assert fit(rounds(Block(), Shared(), rows=50_000)) < 1e-9


def test_no_number_is_drawn_twice():
    source = Recorder()
    rounds(Block(), source, rows=200, length=8, gamma=3)
    assert not source.repeated()


# Planted faults: the enumeration must see each of them


class Unweighted(Block):
    """The residual is taken with p, not with p_τ p."""

    @classmethod
    def _descend(cls, scores, law, weight, end, lost, coins):
        found = super()._descend(scores, law, weight, end, lost, coins)
        rows = torch.arange(len(end))
        p = reference.masses(scores[rows, found.place])
        rest = cls._rest(p, law, torch.ones_like(weight[:, 0]), found.place, found.place < end)
        return _Next(reference.residual(p, rest), found.place)


class FirstToFail(Block):
    """Stops in front of the first coin that loses, not behind the last one that wins."""

    @classmethod
    def _descend(cls, scores, law, weight, end, lost, coins):
        rows, place, running = torch.arange(len(end)), torch.zeros_like(end), torch.ones_like(lost)
        for i in range(1, coins.shape[1]):
            here = torch.full_like(end, i)
            rest = cls._rest(reference.masses(scores[:, i]), law, weight[:, i], here, here < end)
            running = running & (coins[:, i - 1] < reference.block_chance(weight[:, i], rest.sum(-1))) & (here < end)
            place = place + running.long()
        place = torch.where(lost, place, end)
        p = reference.masses(scores[rows, place])
        rest = cls._rest(p, law, weight[rows, place], place, place < end)
        return _Next(reference.residual(p, rest), place)


class LawOfThePositionItself(Block):
    """ψ_i in place of ψ_{i+1}."""

    @staticmethod
    def _rest(p, law, weight, place, before_end):
        shifted = torch.where(before_end, (place - 1).clamp(min=0), place)
        return Block._rest(p, law, weight, shifted, before_end)


def off_by_one(weights):
    return torch.cat([weights[:, :1], weights[:, :-1]], 1)


def certain_end(weights):
    return torch.cat([weights[:, :-1], torch.ones_like(weights[:, :1])], 1)


@pytest.mark.parametrize("rule", [Unweighted(), FirstToFail(), LawOfThePositionItself()])
def test_a_planted_rule_is_seen(rule):
    assert distance(random_problem(3, 3), rule, block_ways) > 1e-3


@pytest.mark.parametrize("change", [off_by_one, certain_end])
def test_planted_weights_are_seen(change, monkeypatch):
    weights = reference.block_weights
    monkeypatch.setattr(reference, "block_weights", lambda log_p, log_q: change(weights(log_p, log_q)))
    assert distance(random_problem(), Block(), block_ways) > 1e-3


def test_a_chance_without_the_lost_mass_is_seen(monkeypatch):
    monkeypatch.setattr(reference, "block_chance", lambda weight, rest: rest)
    assert distance(random_problem(), Block(), block_ways) > 1e-3


def test_weights_pinned():
    log = torch.tensor([[0.5, 0.0, 0.5, 0.5], [0.0, 0.5, 0.5, 0.5], [0.2, 0.4, 0.2, 0.1]]).double().log()
    log_q = torch.tensor([[0.25, 0.5, 0.5, 0.5], [0.0, 0.5, 0.5, 0.5], [0.4, 0.1, 0.4, 0.4]]).double().log()
    weights = reference.block_weights(log, log_q)
    assert weights.tolist() == [
        [1, 1, 0, 0, 0],
        [1, 0, 0, 0, 0],  # q = 0: cannot have been drawn
        pytest.approx([1, 0.5, 1, 0.5, 0.125]),
    ]
    undefined = torch.tensor([[float("nan"), 0.0]]).double()
    assert reference.block_weights(undefined, torch.zeros(1, 2).double()).tolist() == [[1, 0, 0]]
    assert reference.block_weights(torch.zeros(1, 2).double(), undefined).tolist() == [[1, 0, 0]]
    assert reference.block_weights(torch.full((1, 1), -INF).double(), torch.full((1, 1), -INF).double())[0, 1] == 0
    chance = reference.block_chance(torch.tensor([1.0, 0.5, 0.5]).double(), torch.tensor([0.0, 0.0, 0.5]).double())
    assert chance.tolist() == [1, 0, 0.5]


# Which calls take it


class Nothing(LogitsProcessor):
    """A processor of the caller's own, which must be called in order."""

    def __call__(self, input_ids, scores):
        return scores


def call(**arguments):
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 8, "seed": 0, "num_assistant_tokens": 2}
    fast_generate(model(8, 31), torch.tensor([[1, 2, 5, 3]]), **{**settings, **arguments})
    return last_speculation()


def test_it_is_the_default_where_the_law_is_known():
    drafter = {"assistant_model": model(8, 32)}
    assert call(**drafter).verification == "block"
    assert call(**drafter, assistant_temperature=0.0).verification == "block"
    assert call(**drafter, do_sample=False).verification == "match"
    assert call(method="prompt_lookup").verification == "match"
    own = LogitsProcessorList([Nothing()])
    assert call(**drafter, logits_processor=own).verification == "match"


def test_it_is_refused_where_a_draft_cannot_be_judged_as_a_whole():
    own = LogitsProcessorList([Nothing()])
    with pytest.raises(ValueError, match=r"verification='block'.*custom logits processor.*'token'"):
        call(assistant_model=model(8, 32), logits_processor=own, verification="block")
    plain = call(
        verification="block", logits_processor=own, num_assistant_tokens=None
    )  # nothing is drafted, so nothing stands against it
    assert (plain.method, plain.rounds) == ("autoregressive", 8)
    greedy = call(assistant_model=model(8, 32), logits_processor=own, verification="block", do_sample=False)
    assert greedy.verification == "match"


@pytest.mark.parametrize("seed", range(3))
def test_it_accepts_more_end_to_end(seed):
    """Real models, many rows: tokens a round, beyond the spread of either."""
    rows = {"num_return_sequences": 400, "max_new_tokens": 24, "num_assistant_tokens": 4, "seed": seed}
    token, block = (
        call(assistant_model=model(8, 32), verification=rule, **rows).block_efficiency for rule in ("token", "block")
    )
    assert block > token + 0.02
