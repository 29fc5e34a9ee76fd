"""Laws asked token by token: the same law of the output as with dense ones, few questions, fresh numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import Problem, Recorder, block_ways, lazy_block_ways, lazy_token_ways, token_ways, total_variation
from replay import (
    EXACT,
    INF,
    NAN,
    PROBLEMS,
    Asked,
    compact,
    compact_proposal,
    confident_stop,
    distance,
    long_draft,
    narrower_drafter,
    philox_draws,
    random_problem,
    random_supports,
    replay,
    stop_by_text,
    tables,
    wider_drafter,
)

from specdec_fast import thinning
from specdec_fast.proposal import CompactLaw, Proposal
from specdec_fast.verification import Block, Draws, Token

RULES = {"token": (Token(), token_ways, lazy_token_ways), "block": (Block(), block_ways, lazy_block_ways)}
LARGE = (
    long_draft,
    confident_stop,
    stop_by_text,
    random_problem,
    compact,
    wider_drafter,
    narrower_drafter,
)  # too many ways to go through here


def small_and_ragged():
    return Problem(*tables(3, 3, 2, 13), stop=lambda prefix, mass: prefix[-1] == 2)


def small():
    return random_problem(3, 2, 14)


def small_index():
    """An index map that skips target tokens (TLI)."""
    return Problem(*tables(4, 2, 2, 7), index=torch.tensor([0, 3]))


def small_and_wider():
    """A padded drafter head."""
    return Problem(*tables(2, 4, 2, 10))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "make", [make for make in PROBLEMS if make not in LARGE] + [small_and_ragged, small, small_index, small_and_wider]
)
def test_a_round_has_the_targets_law(make, name):
    rule, _, ways = RULES[name]
    assert distance(make(), rule, ways, ask=True) < EXACT


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(6))
def test_the_same_verdicts_as_with_a_dense_law(seed, name):
    """Not only the output's law: how many tokens are kept has the same law too."""
    rule, dense, lazy = RULES[name]
    problem = random_supports(seed, 3, 2, False)
    one, other = replay(problem, rule, dense), replay(problem, rule, lazy, ask=True)
    assert total_variation(one, other) < EXACT


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_laws_with_holes(seed, compacted):
    problem = random_supports(seed, 3, 2, compacted)
    for rule, _, ways in RULES.values():
        assert distance(problem, rule, ways, ask=True) < EXACT


# Planted faults


@pytest.mark.parametrize("name", RULES)
def test_a_law_of_another_position_is_seen(name, monkeypatch):
    mass = Asked.mass
    monkeypatch.setattr(Asked, "mass", lambda law, row, position, token: mass(law, row, 1 - position, token))
    rule, _, ways = RULES[name]
    assert distance(small(), rule, ways, ask=True) > 1e-3


def test_a_race_without_its_weight_is_seen(monkeypatch):
    """p in place of p_i p: what rule token needs, not rule block."""
    race = thinning._race
    monkeypatch.setattr(thinning, "_race", lambda weight, *others: race(1.0, *others))
    assert distance(small(), Block(), lazy_block_ways, ask=True) > 1e-3


@pytest.mark.parametrize("name", RULES)
def test_thinning_by_another_law_than_was_drawn_from_is_seen(name, monkeypatch):
    mass = Asked.mass
    monkeypatch.setattr(Asked, "mass", lambda *which: 0.7 * mass(*which))
    rule, _, ways = RULES[name]
    assert distance(small(), rule, ways, ask=True) > 1e-3


# Behaviour on batches


def proposals(rows=2000, gamma=3, width=6, seed=3):
    generator = torch.Generator().manual_seed(seed)
    scores, laws = torch.randn(rows, gamma + 1, width, generator=generator), torch.randn(rows, gamma, width)
    dense = compact_proposal(laws, count=[row % (gamma + 1) for row in range(rows)])
    return scores, dense, Proposal(dense.tokens, dense.count, Asked(dense.law, width))


def test_rule_token_tests_the_same_and_only_the_residual_differs():
    scores, dense, lazy = proposals()
    one, other = (Token().verify(scores, proposal, philox_draws(2000)) for proposal in (dense, lazy))
    assert torch.equal(one.accepted, other.accepted)
    whole = one.accepted == torch.tensor(dense.count)
    assert torch.equal(one.token[whole], other.token[whole])
    assert not torch.equal(one.token, other.token)


@pytest.mark.parametrize("rule", [Token(), Block()])
def test_few_questions_and_fresh_numbers(rule):
    """At most one look for each position tested, on average; and no number twice."""
    scores, _, lazy = proposals()
    source = Recorder()
    verdict = rule.verify(scores, lazy, Draws(source, torch.arange(2000), torch.zeros(2000, dtype=torch.long)))
    assert not source.repeated()
    tested = sum(lazy.count) if rule.name == "block" else int((verdict.accepted + 1).clamp(max=3).sum())
    assert 0 < len(lazy.law.asked) < 0.8 * tested
    assert {(row, position) for row, position, _ in lazy.law.asked} <= {
        (row, position) for row in range(2000) for position in range(lazy.count[row])
    }


@pytest.mark.parametrize("rule", [Token(), Block()])
def test_nothing_is_asked_where_everything_is_kept(rule):
    scores = torch.randn(50, 3, 5, generator=torch.Generator().manual_seed(4))
    dense = compact_proposal(scores[:, :2])
    lazy = Proposal(dense.tokens, dense.count, Asked(dense.law, 5))
    verdict = rule.verify(scores, lazy, philox_draws(50))
    assert verdict.accepted.min() == 2
    assert not lazy.law.asked


@pytest.mark.parametrize("rule", [Token(), Block()])
def test_undefined_scores_on_either_side(rule):
    """-1: the drafter had no law, so nothing is subtracted. A target without one: reported."""
    rows = 300
    tokens = torch.full((rows, 1), -1)
    scores = torch.zeros(rows, 2, 3)
    scores[..., 2] = -INF
    scores[0, 0] = NAN
    law = Asked(CompactLaw(torch.full((rows, 1, 3), NAN), None, tokens), 3)
    verdict = rule.verify(scores, Proposal(tokens, [1] * rows, law), philox_draws(rows))
    assert verdict.accepted.max() == 0
    assert verdict.token[0] == -1
    assert set(verdict.token[1:].tolist()) == {0, 1}
    assert not law.asked


def test_a_rejection_that_only_rounding_brings_about():
    """ψ = p and yet a race: everything is looked at, nothing is left, and the token comes from p."""
    p = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    winners = {thinning._race(1.0, p, p.tolist().__getitem__, {}, philox_draws(1, start), 0) for start in range(60)}
    assert winners == {0, 1, 2}
