"""The verification rules: one round's law computed, not sampled, planted faults, and pinned outcomes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import Recorder, block_ways, match_ways, token_ways
from replay import (
    EXACT,
    INF,
    NAN,
    PROBLEMS,
    compact_proposal,
    confident_stop,
    distance,
    philox_draws,
    random_problem,
    random_supports,
)

from specdec_fast import reference
from specdec_fast.proposal import CompactLaw, PointMass, Proposal
from specdec_fast.verification import Block, Draws, Match, Token, greedy_choice, rule_for, sampled_choice

RULES = {"token": (Token(), token_ways), "match": (Match(sampled_choice), match_ways), "block": (Block(), block_ways)}
EVERY = (Token(), Block(), Match(sampled_choice), Match(greedy_choice))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("make", PROBLEMS)
def test_a_round_has_the_targets_law(make, name):
    assert distance(make(), *RULES[name]) < EXACT


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("width, gamma", [(3, 1), (5, 1), (6, 2), (3, 3)])
@pytest.mark.parametrize("seed", [20, 21])
def test_random_tables(width, gamma, seed, name):
    assert distance(random_problem(width, gamma, seed), *RULES[name]) < EXACT


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 2), st.booleans())
def test_laws_with_holes(seed, width, gamma, compacted):
    problem = random_supports(seed, width, gamma, compacted)
    for rule, ways in RULES.values():
        assert distance(problem, rule, ways) < EXACT


# Planted faults: the enumeration must see each of them


class RolledLaw(CompactLaw):
    def log_q(self, tokens):
        return reference.log_prob(self.scores.roll(1, -1), self.drawn)


class LawOfTheNextPosition(CompactLaw):
    def subtract_from(self, p, position):
        return super().subtract_from(p, (position + 1).clamp(max=self.scores.shape[1] - 1))


class SharperLaw(CompactLaw):
    def log_q(self, tokens):
        return reference.log_prob(self.scores / 0.7, self.drawn)


class WithLaw:
    """A rule with another law than was drawn from."""

    def __init__(self, rule, kind):
        self.rule, self.kind = rule, kind

    def verify(self, scores, proposal, draws):
        law = proposal.law
        law = self.kind(law.scores, law.index, law.drawn)
        return self.rule.verify(scores, Proposal(proposal.tokens, proposal.count, law), draws)


class BonusOfTheRowBefore(Token):
    @staticmethod
    def _next_token(scores, law, accepted, rejected, draws):
        earlier = torch.where(rejected, accepted, (accepted - 1).clamp(min=0))
        rows = torch.arange(len(scores))
        shifted = scores.clone()
        shifted[rows, accepted] = scores[rows, earlier]
        return Token._next_token(shifted, law, accepted, rejected, draws)


class OwnTokenOfTheRowBefore(Match):
    def verify(self, scores, proposal, draws):
        verdict = super().verify(scores, proposal, draws)
        own = self.choose(scores, draws)
        token = own.gather(1, (verdict.accepted - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        return verdict._replace(token=token)


class KeepsOneMore(Match):
    """Accepts the first draft token that differs, too."""

    def verify(self, scores, proposal, draws):
        verdict = super().verify(scores, proposal, draws)
        accepted = torch.minimum(verdict.accepted + 1, torch.tensor(proposal.count))
        own = self.choose(scores, draws)
        return verdict._replace(accepted=accepted, token=own.gather(1, accepted.unsqueeze(1)).squeeze(1))


@pytest.mark.parametrize("kind", [OwnTokenOfTheRowBefore, KeepsOneMore])
def test_a_planted_match_is_seen(kind):
    assert distance(random_problem(), kind(sampled_choice), match_ways) > 0.01


@pytest.mark.parametrize("name", ["token", "block"])
@pytest.mark.parametrize("kind", [RolledLaw, LawOfTheNextPosition, SharperLaw])
def test_a_planted_law_is_seen(kind, name):
    rule, ways = RULES[name]
    assert distance(random_problem(), WithLaw(rule, kind), ways) > 0.01


def test_a_planted_bonus_row_is_seen():
    assert distance(random_problem(), BonusOfTheRowBefore(), token_ways) > 0.01


def test_swapped_laws_are_seen(monkeypatch):
    accept = reference.accept
    monkeypatch.setattr(reference, "accept", lambda log_p, log_q, u: accept(log_q, log_p, u))
    assert distance(random_problem(), *RULES["token"]) > 0.01


def test_a_missing_residual_is_seen(monkeypatch):
    monkeypatch.setattr(reference, "residual", lambda p, difference: p)
    assert distance(random_problem(), *RULES["token"]) > 0.01


@pytest.mark.parametrize("name", ["token", "block"])
def test_dropping_a_token_after_a_look_at_it_is_seen(name):
    problem = confident_stop()
    drafts = problem.drafts
    # The improbable token that ended the draft goes, as if it had never been drawn
    problem.drafts = lambda: (
        (chosen, tokens, weight, count - problem.stop(tokens[:count], _mass_of(problem, tokens, count)))
        for chosen, tokens, weight, count in drafts()
    )
    assert distance(problem, *RULES[name]) > 0.01


def _mass_of(problem, tokens, count):
    return float(problem.q_mass[count - 1][tokens[: count - 1]][tokens[count - 1]])


# Pinned outcomes


@pytest.mark.parametrize("rule", EVERY)
def test_certain_and_equal_accepts_everything(rule):
    tokens = torch.tensor([[2, 0, 4], [1, 1, 1]])
    scores = torch.full((2, 4, 5), -INF).scatter_(2, torch.cat([tokens, torch.tensor([[3], [0]])], 1).unsqueeze(2), 7.0)
    laws = scores[:, :3]
    for law in (PointMass(tokens), CompactLaw(laws, None, tokens)):
        verdict = rule.verify(scores, Proposal(tokens, [3, 3], law), philox_draws(2))
        assert verdict.accepted.tolist() == [3, 3]
        assert verdict.token.tolist() == [3, 0]


@pytest.mark.parametrize("rule", [Token(), Block()])
def test_the_same_law_accepts_everything(rule):
    rows = 3000
    scores = torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(0)).expand(rows, -1, -1)
    verdict = rule.verify(scores, compact_proposal(scores[:, :2]), philox_draws(rows))
    assert verdict.accepted.min() == 2


@pytest.mark.parametrize("rule", [Token(), Block(), Match(sampled_choice)])
def test_disjoint_supports_reject_at_once(rule):
    rows = 500
    generator = torch.Generator().manual_seed(0)
    scores, laws = torch.randn(rows, 4, 6, generator=generator), torch.randn(rows, 3, 6, generator=generator)
    scores[..., ::2], laws[..., 1::2] = -INF, -INF
    verdict = rule.verify(scores, compact_proposal(laws), philox_draws(rows))
    assert verdict.accepted.max() == 0
    assert (verdict.token % 2 == 1).all()


@pytest.mark.parametrize("rule", [Token(), Block()])
def test_a_residual_with_one_entry_leaves_no_choice(rule):
    rows = 2000
    scores = torch.tensor([0.1, 0.2, 0.7]).log().expand(rows, 2, 3)
    laws = torch.tensor([0.3, 0.3, 0.4]).log().expand(rows, 1, 3)
    verdict = rule.verify(scores, compact_proposal(laws), philox_draws(rows))
    rejected = verdict.accepted == 0
    assert 0 < rejected.sum() < rows
    assert (verdict.token[rejected] == 2).all()


@pytest.mark.parametrize("rule", EVERY)
def test_no_rows_and_no_drafts(rule):
    empty = Proposal.of_lists([], torch.device("cpu"))
    verdict = rule.verify(torch.zeros(0, 1, 4), empty, philox_draws(0))
    assert verdict.accepted.shape == verdict.token.shape == (0,)
    none = Proposal.of_lists([[], []], torch.device("cpu"))
    verdict = rule.verify(torch.tensor([[[0.0, -INF]], [[-INF, 0.0]]]), none, philox_draws(2))
    assert (verdict.accepted.tolist(), verdict.token.tolist()) == ([0, 0], [0, 1])


@pytest.mark.parametrize("rule", EVERY)
def test_what_lies_behind_a_rows_count_is_not_looked_at(rule):
    generator = torch.Generator().manual_seed(1)
    rows, gamma, width = 200, 3, 5
    scores, laws = torch.randn(rows, gamma + 1, width, generator=generator), torch.randn(rows, gamma, width)
    count = [row % (gamma + 1) for row in range(rows)]
    clean = compact_proposal(laws, count=count)
    verdict = rule.verify(scores, clean, philox_draws(rows))
    assert {0, 1, 2} <= set(verdict.accepted.tolist())
    behind = torch.arange(gamma) >= torch.tensor(count).unsqueeze(1)
    for garbage in (-1, 0, 10**9):
        tokens = clean.tokens.masked_fill(behind, garbage)
        law = CompactLaw(
            laws.masked_fill(behind.unsqueeze(2), NAN), None, clean.law.drawn.masked_fill(behind, min(garbage, 4))
        )
        dirty_scores = scores.clone()
        dirty_scores[:, 1:].masked_fill_(behind.unsqueeze(2), NAN)
        dirty = rule.verify(dirty_scores, Proposal(tokens, count, law), philox_draws(rows))
        assert torch.equal(dirty.accepted, verdict.accepted)
        assert torch.equal(dirty.token, verdict.token)


@pytest.mark.parametrize("rule", EVERY)
def test_a_row_does_not_depend_on_the_batch(rule):
    generator = torch.Generator().manual_seed(2)
    scores, laws = torch.randn(7, 4, 9, generator=generator), torch.randn(7, 3, 9, generator=generator)
    proposal = compact_proposal(laws, count=[3, 0, 2, 1, 3, 2, 3])
    draws = philox_draws(7)
    verdict = rule.verify(scores, proposal, draws)
    for row in range(7):
        one = slice(row, row + 1)
        law = CompactLaw(laws[one], None, proposal.law.drawn[one])
        alone = rule.verify(scores[one], Proposal(proposal.tokens[one], [proposal.count[row]], law), draws.rows([row]))
        assert alone.accepted.item() == verdict.accepted[row]
        assert alone.token.item() == verdict.token[row]


def test_a_draft_that_is_no_token_is_rejected():
    """-1: the drafter's scores were no distribution. 9: a padded drafter head drew beyond the target's vocabulary."""
    rows = 400
    scores = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(3)).expand(rows, -1, -1)
    tokens = torch.full((rows, 1), -1)
    undefined = CompactLaw(torch.full((rows, 1, 4), NAN), None, tokens)
    beyond = CompactLaw(torch.full((rows, 1, 10), 0.0), None, torch.full((rows, 1), 9))
    for proposal in (
        Proposal(tokens, [1] * rows, undefined),
        Proposal(tokens, [1] * rows, PointMass(tokens)),
        Proposal(torch.full((rows, 1), 9), [1] * rows, PointMass(torch.full((rows, 1), 9))),
        Proposal(torch.full((rows, 1), 9), [1] * rows, beyond),
    ):
        for rule in EVERY:
            verdict = rule.verify(scores, proposal, philox_draws(rows))
            assert verdict.accepted.max() == 0
            assert verdict.token.min() >= 0 and verdict.token.max() < 4
    # No mass lies on a token of the target's: nothing to subtract, the next token comes from p itself
    own = reference.draw(reference.masses(scores[:, 0]), philox_draws(rows).residual(torch.zeros_like(tokens[:, 0])))
    for draft, law in ((-1, undefined), (-1, PointMass(tokens)), (9, PointMass(torch.full_like(tokens, 9)))):
        for rule in (Token(), Block()):
            plain = rule.verify(scores, Proposal(torch.full_like(tokens, draft), [1] * rows, law), philox_draws(rows))
            assert torch.equal(plain.token, own)


@pytest.mark.parametrize("rule", EVERY)
@pytest.mark.parametrize("row", [[NAN, 0.0, 0.0], [-INF, -INF, -INF]])
def test_undefined_target_scores_are_reported_and_spoil_no_other_row(rule, row):
    scores = torch.zeros(3, 2, 3)
    scores[1, 0] = torch.tensor(row)
    good = rule.verify(torch.zeros(3, 2, 3), Proposal.of_lists([[1]] * 3, torch.device("cpu")), philox_draws(3))
    for draft in (-1, 1):  # the same -1 on both sides is no agreement
        drafts = Proposal.of_lists([[1], [draft], [1]], torch.device("cpu"))
        verdict = rule.verify(scores, drafts, philox_draws(3))
        assert (verdict.accepted[1], verdict.token[1]) == (0, -1)
        assert verdict.token[[0, 2]].tolist() == good.token[[0, 2]].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_mix(dtype):
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(50, 3, 9, generator=generator).to(dtype)
    laws = torch.randn(50, 2, 9, generator=generator).bfloat16()
    for rule in EVERY:
        mixed = rule.verify(scores, compact_proposal(laws), philox_draws(50))
        plain = rule.verify(scores.double(), compact_proposal(laws.double()), philox_draws(50))
        assert torch.equal(mixed.accepted, plain.accepted)
        assert torch.equal(mixed.token, plain.token)


# One position at a time


@pytest.mark.parametrize("rule", [Token(), Match(sampled_choice), Match(greedy_choice)])
@pytest.mark.parametrize("certain", [False, True])
def test_one_position_at_a_time_gives_the_same_verdict(rule, certain):
    rows, gamma, width = 300, 3, 4
    generator = torch.Generator().manual_seed(5)
    scores, laws = torch.randn(rows, gamma + 1, width, generator=generator), torch.randn(rows, gamma, width)
    proposal = compact_proposal(laws, count=[row % (gamma + 1) for row in range(rows)])
    if certain:
        proposal = Proposal(proposal.tokens, proposal.count, PointMass(proposal.tokens))
    joint = rule.verify(scores, proposal, philox_draws(rows))
    source = Recorder()
    for row in range(rows):
        law = proposal.law
        one = slice(row, row + 1)
        law = PointMass(law.tokens[one]) if certain else CompactLaw(law.scores[one], None, law.drawn[one])
        single = Proposal(proposal.tokens[one], [proposal.count[row]], law)
        draws = Draws(source, torch.tensor([row]), torch.tensor([0]))
        for i in range(gamma + 1):
            verdict = rule.verify(scores[one, i : i + 1], single.at(i), draws.at(i))
            if not verdict.accepted.item():
                break
            assert verdict.token.item() == -1
        assert (i, verdict.token.item()) == (joint.accepted[row], joint.token[row])
    assert not source.repeated()


def test_greedy_takes_the_lowest_id_of_a_tie():
    scores = torch.tensor([[[0.0, 2.0, 2.0], [INF, 0.0, INF]]]).expand(3, -1, -1)
    verdict = Match(greedy_choice).verify(
        scores, Proposal.of_lists([[1], [2], []], torch.device("cpu")), philox_draws(3)
    )
    assert verdict.accepted.tolist() == [1, 0, 0]
    assert verdict.token.tolist() == [0, 1, 1]


def test_rules_by_name():
    assert isinstance(rule_for("token", do_sample=True), Token)
    assert isinstance(rule_for("block", do_sample=True), Block)
    assert rule_for("match", do_sample=True).choose is sampled_choice
    for name in ("match", "token", "block"):
        assert rule_for(name, do_sample=False).choose is greedy_choice
