"""Literal SLRS: its laws against a brute force, one round enumerated through the drafter itself, end to end, faults."""

import copy
import itertools
from fractions import Fraction
from functools import cache

import pytest
import torch
from laws import (
    DRAFTER_PIECES,
    TARGET_PIECES,
    Recorder,
    chi_square,
    joint_law,
    model,
    pair_counts,
    tokenizer,
    total_variation,
    warpers,
)
from literal_rounds import (
    FAULTS,
    PROBLEMS,
    PROMPT,
    RULES,
    TOY,
    Constant,
    Round,
    decompositions,
    fault_decompositions,
    fault_tokens_before_forgotten,
    plain,
    propose,
    quote_decompositions,
)

from specdec_fast import fast_generate, last_speculation
from specdec_fast.proposal import SparseLaw
from specdec_fast.randomness import Purpose

EXACT = 1e-8  # what moving a number into its cell by a billionth of the cell costs, with a margin
SEEN = 1e-3


@cache
def problem_called(name):
    return PROBLEMS[name]()


@cache
def played(name, rule):
    return problem_called(name).played(rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_round_has_the_targets_law(name, rule):
    problem = problem_called(name)
    assert total_variation(problem.completed(played(name, rule)[0]), problem.joint()) < EXACT


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_laws_are_those_of_a_brute_force(name):
    problem = problem_called(name)
    proposal = propose(problem, torch.rand(300, problem.gamma, dtype=torch.float64))
    law = proposal.law
    assert any(proposal.count)
    for row, count in enumerate(proposal.count):
        tokens = tuple(proposal.tokens[row, :count].tolist())
        for i in range(count):
            dense = -law.subtract_from(torch.zeros(300, problem.width).double(), torch.full((300,), i))[row]
            assert torch.allclose(dense, problem.q_mass[i][tokens[:i]], rtol=0, atol=1e-12)
            assert abs(float(dense.sum()) - 1) < 1e-12
            assert torch.equal(law.log_q(proposal.tokens)[row, i], dense[tokens[i]].log())
            assert torch.equal(law.at(i).log_q(proposal.tokens[:, i : i + 1])[row, 0], dense[tokens[i]].log())


@pytest.mark.parametrize("name", PROBLEMS)
def test_acceptance_is_at_least_that_of_rule_match(name):
    """Σ min(p, ψ) >= Σ pψ, position by position; rule block accepts no fewer tokens than rule token."""
    accepted = {rule: played(name, rule)[1] for rule in RULES}
    for token, match in zip(accepted["token"], accepted["match"], strict=True):
        assert token >= match - EXACT
    certain = name == "one drafter token"
    assert certain or accepted["token"][0] > accepted["match"][0]
    assert sum(accepted["block"]) >= sum(accepted["token"]) - EXACT


def test_ids_that_the_target_lacks_and_padding_take_nothing():
    law = SparseLaw(torch.tensor([[[7, 1, -1]]]), torch.tensor([[[0.75, 0.25, 0.0]]]).double())
    rest = law.subtract_from(torch.ones(1, 3).double(), torch.zeros(1).long())
    assert rest.tolist() == [[1.0, 0.75, 1.0]]
    assert law.log_q(torch.tensor([[-1]])).exp().item() == 0


# The formula often quoted

Q = (0.0, 0.5, 0.3, 0.2)


def toy(p):
    return Round(Constant(*p), Constant(*Q), (TOY, TOY), (2,))


def test_the_sum_over_decompositions_is_no_distribution():
    problem = toy((0.0, 0.4, 0.3, 0.3))
    naive = [decompositions(problem.pieces, t, problem.law) for t in range(4)]
    assert naive == pytest.approx([0, 0.5, 0.3, 0.35], abs=1e-6)
    assert sum(naive) == pytest.approx(1.15, abs=1e-6)
    # An "a" with a "b" behind it is an "ab": the same texts may not count for both
    assert problem.q_mass[0].tolist() == pytest.approx([0, 0.35, 0.3, 0.35], abs=1e-6)


def output_law(p, psi, believed):
    """The law of the token that rule *token* outputs, the draft being drawn from ψ and ``believed`` taken for it."""
    kept = [x * min(Fraction(1), y / z) for x, y, z in zip(psi, p, believed, strict=True)]
    rest = [max(Fraction(0), y - z) for y, z in zip(p, believed, strict=True)]
    rest = rest if sum(rest) else p
    return [k + (1 - sum(kept)) * r / sum(rest) for k, r in zip(kept, rest, strict=True)]


def test_what_the_sum_over_decompositions_costs(monkeypatch):
    psi, naive = ([Fraction(n, 20) for n in law] for law in ((7, 6, 7), (10, 6, 7)))
    cost = {}
    for a, b in itertools.product(range(21), repeat=2):
        if a + b <= 20:
            p = [Fraction(a, 20), Fraction(b, 20), Fraction(20 - a - b, 20)]
            assert output_law(p, psi, psi) == p
            cost[a, b] = sum(abs(x - y) for x, y in zip(output_law(p, psi, naive), p, strict=True)) / 2
    assert max(cost.values()) == cost[10, 10] == Fraction(3, 20)
    assert cost[10, 6] == Fraction(3, 40)  # p = q

    # The same through the production rule
    problem = toy((0.0, 0.5, 0.5, 0.0))
    quote_decompositions(monkeypatch)
    quoted = [decompositions(problem.pieces, t, problem.law) for t in range(4)]
    problem.q_mass[0] = torch.tensor(quoted, dtype=torch.float64)
    first = {}
    for block, weight in problem.played("token")[0].items():
        first[block[0]] = first.get(block[0], 0.0) + weight
    assert total_variation(first, {1: 0.5, 2: 0.5}) == pytest.approx(0.15, abs=1e-6)


# Planted faults


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, rule, monkeypatch):
    problem = plain()
    fault(monkeypatch)
    assert problem.distance(rule) > SEEN


# End to end

STEPS = 4
WIDTH = len(TARGET_PIECES)
PARTIES = {
    "method": "slrs_literal",
    "tokenizer": tokenizer(TARGET_PIECES),
    "assistant_tokenizer": tokenizer(DRAFTER_PIECES),
}


def generate(prompt, **arguments):
    settings = {"num_assistant_tokens": 2, "max_new_tokens": STEPS, "top_k": 0, **PARTIES, **arguments}
    settings.setdefault("assistant_model", model(len(DRAFTER_PIECES), 33, sharpness=0.8))
    return fast_generate(model(WIDTH, 31, sharpness=0.8), prompt, **settings)


def p_values(rule, rows, eos=None, **sampling):
    """Of the first pair and the last one, which lie in different rounds."""
    prompt = torch.tensor([PROMPT])
    ending = {} if eos is None else {"eos_token_id": eos, "pad_token_id": eos}
    output = generate(
        prompt, do_sample=True, verification=rule, num_return_sequences=rows, seed=0, **ending, **sampling
    )
    law = joint_law(model(WIDTH, 31, sharpness=0.8), prompt[0], STEPS, warpers(**sampling), eos)
    first = chi_square(pair_counts(output, len(PROMPT), WIDTH), law.sum((2, 3)))
    return first, chi_square(pair_counts(output, len(PROMPT) + STEPS - 2, WIDTH), law.sum((0, 1)))


@pytest.mark.parametrize(
    "rule, rows, sampling",
    [
        ("match", 800, {}),
        ("token", 1300, {}),
        ("block", 1300, {}),
        ("block", 1300, {"temperature": 0.7, "top_p": 0.9, "eos": 0}),
        ("auto", 1000, {"top_k": 3}),
    ],
)
def test_the_output_has_the_targets_law(rule, rows, sampling):
    assert min(p_values(rule, rows, **sampling)) > 1e-4
    assert last_speculation().method == "slrs_literal"
    assert last_speculation().accepted > 100
    assert rule != "auto" or last_speculation().verification == "block"


@pytest.mark.parametrize("fault, rule", [(fault_decompositions, "token"), (fault_tokens_before_forgotten, "block")])
def test_a_planted_fault_is_seen_end_to_end(fault, rule, monkeypatch):
    fault(monkeypatch)
    assert min(p_values(rule, 1300)) < 1e-6


def test_greedy_equals_plain_decoding():
    prompt = torch.tensor([PROMPT])
    plain = model(WIDTH, 31, sharpness=0.8).generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(generate(prompt, do_sample=False, max_new_tokens=12), plain)
    # What is too much for an enumeration is none where nothing is enumerated
    assert torch.equal(generate(prompt, do_sample=False, max_new_tokens=12, num_assistant_tokens=9), plain)


@pytest.mark.parametrize("rule", ["match", "token", "block"])
def test_a_row_does_not_depend_on_the_batch(rule):
    texts = [[3, 1, 2], [1, 2, 5, 3, 4, 1, 2], [4]]
    ids = torch.tensor([[0] * (7 - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (7 - len(text)) + [1] * len(text) for text in texts])
    sampled = {"do_sample": True, "verification": rule, "max_new_tokens": 8}
    batch = generate(ids, attention_mask=mask, pad_token_id=0, seed=[5, 6, 7], **sampled)
    for row, text in enumerate(texts):
        alone = generate(torch.tensor([text]), seed=[5 + row], **sampled)
        assert torch.equal(batch[row, 7:], alone[0, len(text) :])


@pytest.mark.parametrize("rule", ["match", "token", "block"])
def test_no_key_is_drawn_twice(rule):
    source = Recorder()
    sampled = {"do_sample": True, "verification": rule, "max_new_tokens": 8, "num_return_sequences": 4}
    generate(torch.tensor([PROMPT]), source=source, seed=0, **sampled)
    assert not source.repeated(but=Purpose.TARGET)
    assert Purpose.DRAFT in {key[3] for key in source.keys}


def test_a_text_longer_than_the_drafters_positions_is_read_from_its_end():
    prompt = torch.tensor([[1, 2] * 20])  # 20 times "ab" to the drafter, which has 20 positions
    short = copy.deepcopy(model(len(DRAFTER_PIECES), 33, sharpness=0.8))
    short.config.max_position_embeddings = 20
    generate(prompt, do_sample=True, seed=0, assistant_model=short, max_new_tokens=8)
    assert last_speculation().drafted > 0


def test_a_drafter_without_a_law_drafts_nothing():
    broken = Constant(*[float("nan")] * len(DRAFTER_PIECES))
    output = generate(torch.tensor([PROMPT]), do_sample=True, seed=0, assistant_model=broken)
    assert output.shape == (1, len(PROMPT) + STEPS)
    assert last_speculation().drafted == 0


@pytest.mark.parametrize(
    "width, lookahead, says",
    [
        (len(DRAFTER_PIECES), None, "5 of its 9 tokens make more than 20000: lower num_assistant_tokens to 4, or use"),
        (150, 2, "2 of its 150 tokens make more than 20000: lower num_assistant_tokens to 1, or use method='slrs'"),
        (20001, 1, "1 of its 20001 tokens make more than 20000: use method='slrs'"),
    ],
)
def test_too_many_texts_are_refused(width, lookahead, says):
    with pytest.raises(ValueError, match=says):
        generate(
            torch.tensor([PROMPT]), do_sample=True, assistant_model=model(width, 1), num_assistant_tokens=lookahead
        )


def test_an_adaptive_lookahead_stays_within_what_can_be_enumerated():
    schedule = {"num_assistant_tokens": 4, "num_assistant_tokens_schedule": "heuristic"}
    same = Constant(*[0.0, 0.0, 1.0, *[0.0] * 6])  # "a" for ever, which the target takes
    target = Constant(*[0.0, 1.0, *[0.0] * 6])
    output = fast_generate(
        target,
        torch.tensor([[1]]),
        assistant_model=same,
        do_sample=True,
        seed=0,
        max_new_tokens=16,
        **PARTIES,
        **schedule,
    )
    assert output.tolist() == [[1] * 17]
    assert len(last_speculation().accepted_per_position) == 4
