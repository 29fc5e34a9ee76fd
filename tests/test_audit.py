"""The audit: it passes what is lossless, finds planted faults and others' faults, and says when it cannot tell.

Seeds are fixed, so nothing here fails by chance.
"""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from laws import DRAFTER_PIECES, TARGET_PIECES, joint_law, model, plain_rules, tokenizer, warpers

from specdec_fast import fast_generate, reference
from specdec_fast.audit import RESOLUTION, audit_greedy, audit_sampling, sampled, statistics
from specdec_fast.audit.law import SHAPES, Scorer, cells_of
from specdec_fast.drafters.model import CompactDrafter
from specdec_fast.proposal import CompactLaw, Proposal
from specdec_fast.randomness import Philox, Purpose

PROMPTS = [torch.tensor([ids]) for ids in ([1, 2, 5, 3, 4, 1, 2], [3, 1, 2])]
PLAIN = {"top_k": 0}
SCORER = {"tokens": 4, "positions": 3}


def target():
    return model(len(TARGET_PIECES), 31, sharpness=0.8)


def parties(method="tli"):
    if method == "model":
        return {"method": method, "assistant_model": model(len(TARGET_PIECES), 32, sharpness=0.8)}
    if method == "prompt_lookup":
        return {"method": method}
    return {
        "method": method,
        "assistant_model": model(len(DRAFTER_PIECES), 33, sharpness=0.8),
        "tokenizer": tokenizer(TARGET_PIECES),
        "assistant_tokenizer": tokenizer(DRAFTER_PIECES),
    }


def audit(method="tli", *, sampling=PLAIN, samples=2048, **arguments):
    """An audit of γ = 2, so that tokens 3 and 4 lie beyond the first round."""
    given = {"num_assistant_tokens": 2, **parties(method), **arguments}
    return audit_sampling(
        target(),
        PROMPTS,
        sampling=sampling,
        arguments=given,
        samples=samples,
        batch=2048,
        small=8,
        positions=3,
        tokens=4,
    )


# What it passes ------------------------------------------------------------------------------------------------------


def test_a_lossless_sampler_passes():
    report = audit("tli", sampling={"temperature": 0.7, "top_p": 0.9}, samples=None)
    assert report.verdict == "pass", report.reason
    assert report.detectable <= RESOLUTION
    assert report.impossible == 0
    assert report.samples == len(PROMPTS) * report.tests[1].samples
    kinds = [test.of for test in report.tests]
    assert kinds == ["all prompts", "prompt", "prompt", "small batches", "positions", "positions", "positions"]
    assert report.tests[3].samples == 16


@pytest.mark.parametrize(
    "method, sampling",
    [
        ("model", PLAIN),
        ("slem", {"top_k": 3}),
        ("prompt_lookup", {"top_k": 0, "repetition_penalty": 1.5}),
        ("tli", {**PLAIN, "eos_token_id": 0, "pad_token_id": 0}),
    ],
)
def test_no_method_and_no_setting_is_called_faulty(method, sampling):
    report = audit(method, sampling=sampling, samples=1024)
    assert report.verdict == "inconclusive", report.reason
    assert report.impossible == 0


def test_a_law_without_choice_proves_nothing():
    report = audit("tli", sampling={"top_k": 1}, samples=64)
    assert report.verdict == "inconclusive"
    assert "one outcome" in report.reason


def test_few_samples_prove_too_little():
    report = audit(samples=512)
    assert report.verdict == "inconclusive"
    assert report.detectable > RESOLUTION
    assert "take more samples" in report.reason


def test_callers_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = audit(samples=64)
    assert torch.equal(torch.rand(3), expected)
    assert audit(samples=64) == first, "a seed repeats"


@pytest.mark.parametrize("samples", [40, 150, 600])
def test_few_samples_do_not_raise_the_rate_of_false_alarms(samples):
    """The tests' p-values, of samples from the very law, fall below a level about as often as it says."""
    cells = cells_of(Scorer(target(), PROMPTS[0], {"do_sample": True, **PLAIN}, **SCORER), 4, 1 / 40)
    merged = cells.merged(sampled.THIN / samples)
    random = np.random.default_rng(0)

    def rate(masses, level):
        counts = random.multinomial(samples, masses, size=200_000)
        statistic = ((counts - samples * masses) ** 2 / (samples * masses)).sum(1)
        return (statistic > scipy.stats.chi2.isf(level, len(masses) - 1)).mean() / level

    if merged.count > 1:
        assert rate(merged.centre, 0.001) < 1.6
    assert merged.centre.sum() == pytest.approx(1)
    assert merged.count == 1 or merged.centre.min() * samples >= sampled.THIN
    if samples == 40:
        assert rate(cells.centre, 0.001) > 1.6, "what it is for"


def test_p_values_are_uniform_where_nothing_is_wrong():
    """Plain sampling from the law itself, by Transformers, many times."""
    values = []
    for seed in range(12):
        report = audit_sampling(
            target(), PROMPTS[1:], generate=transformers, sampling=PLAIN, samples=512, batch=512, seed=seed
        )
        values += [test.p_value for test in report.tests if test.of == "positions"]
        values.append(report.tests[0].p_value)
    assert scipy.stats.kstest(values, "uniform").pvalue > 1e-3


# What it finds -------------------------------------------------------------------------------------------------------


def fault_no_residual(patch):
    patch.setattr(reference, "residual", lambda p, difference: p)


def fault_permuted_law(patch):
    propose = CompactDrafter.propose

    def changed(self, *arguments):
        proposal = propose(self, *arguments)
        law = proposal.law
        rolled = CompactLaw(law.scores.roll(1, -1), law.index, law.drawn) if isinstance(law, CompactLaw) else law
        return Proposal(proposal.tokens, proposal.count, rolled)

    patch.setattr(CompactDrafter, "propose", changed)


def fault_shared_noise(patch):
    uniform = Philox.uniform

    def shared(self, seed, position, offset, purpose, trial=0):
        return uniform(self, seed, position, offset, Purpose.DRAFT if purpose is Purpose.ACCEPT else purpose, trial)

    patch.setattr(Philox, "uniform", shared)


def test_a_fault_of_small_batches_alone_is_found():
    """Large batches are sound; in those of two rows a quarter of the calls is greedy."""
    calls = itertools.count()

    def hasty(model, input_ids, **arguments):
        if len(input_ids) <= sampled.SMALL and next(calls) % 4 == 0:
            arguments = {**arguments, "do_sample": False}
        return fast_generate(model, input_ids, **arguments)

    report = audit_sampling(
        target(), PROMPTS, generate=hasty, sampling=PLAIN, arguments=parties(), samples=1024, batch=1024, tokens=2
    )
    assert report.verdict == "fault" and "in small batches" in report.reason
    assert all(test.corrected > 0.01 for test in report.tests if test.of != "small batches"), "what the test is for"


@pytest.mark.parametrize("fault", [fault_no_residual, fault_permuted_law, fault_shared_noise])
def test_a_planted_fault_is_found(fault, monkeypatch):
    plain_rules(monkeypatch)
    fault(monkeypatch)
    report = audit(samples=2048)
    assert report.verdict == "fault"
    assert min(test.corrected for test in report.tests) < 1e-6


def test_keys_by_position_alone_are_found_by_pairs(monkeypatch):
    """Under rule *block* a later round gets the coins that this one has looked at; the first tokens do not show it."""
    uniform = Philox.uniform

    def forgetful(self, seed, position, offset, purpose, trial=0):
        return uniform(self, seed, position + offset, torch.zeros_like(offset), purpose, trial)

    plain_rules(monkeypatch)
    monkeypatch.setattr(Philox, "uniform", forgetful)
    report = audit_sampling(
        target(),
        PROMPTS,
        sampling=PLAIN,
        arguments={"num_assistant_tokens": 3, "verification": "block", **parties("model")},
        batch=4096,
        small=0,
        positions=4,
        tokens=4,
    )
    assert report.verdict == "fault"
    assert min(test.corrected for test in report.tests if test.of == "positions") < 1e-6
    assert all(test.corrected > 0.01 for test in report.tests if test.of != "positions")


def test_a_fault_behind_the_first_round_is_found():
    """The fourth token repeats the third where it should be drawn anew."""

    def stuck(model, input_ids, **arguments):
        output = fast_generate(model, input_ids, **arguments)
        again = torch.rand(len(output)) < 0.3
        output[again, -1] = output[again, -2]
        return output

    report = audit_sampling(
        target(), PROMPTS, generate=stuck, sampling=PLAIN, arguments=parties(), samples=2048, batch=2048, tokens=4
    )
    assert report.verdict == "fault"
    *_, middle, last = report.tests
    assert last.positions == (3, 4) and last.corrected < 1e-6
    assert middle.p_value > 1e-3


def test_a_token_that_cannot_be_is_found():
    """Once in two thousand samples: no test of shares would see it."""
    kept = joint_law(target(), PROMPTS[0][0], 1, warpers(top_k=3))

    def wrong(model, input_ids, **arguments):
        output = fast_generate(model, input_ids, **arguments)
        output[0, input_ids.shape[1]] = int(kept.argmin())
        return output

    report = audit_sampling(
        target(),
        PROMPTS[:1],
        generate=wrong,
        sampling={"top_k": 3},
        arguments=parties(),
        samples=2048,
        batch=2048,
        small=0,
    )
    assert (report.verdict, report.impossible) == ("fault", 1)
    assert "no mass" in report.reason


def transformers(model, input_ids, **arguments):
    return model.generate(input_ids, **arguments)


def test_assisted_generation_of_transformers_is_found():
    """Its sampled decoding with a drafter of another tokenizer draws from a wrong law."""
    found = []
    for _ in range(4):  # how wrong it is hangs on an order that is another one in every pair: chi-squares of 35 to 200
        arguments = {name: value for name, value in parties().items() if name != "method"}
        arguments["assistant_model"] = copy.deepcopy(arguments["assistant_model"])  # it prunes the head for good
        report = audit_sampling(
            target(),
            PROMPTS[:1],
            generate=transformers,
            sampling=PLAIN,
            arguments=arguments,
            samples=300,
            batch=1,
            tokens=3,
        )
        found.append((report.verdict, report.reason))
        if report.verdict == "fault":
            return
    pytest.fail(str(found))


# Greedy --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["model", "tli", "slem", "prompt_lookup"])
def test_greedy_output_is_plain_decodings(method):
    report = audit_greedy(target(), PROMPTS, arguments=parties(method), tokens=20)
    assert (report.verdict, report.reason) == ("pass", "the same tokens as plain decoding")
    assert [case.compared for case in report.cases] == [20, 20]


def second_best(position):
    """Takes the runner-up at one position and goes on greedily."""

    def generate(model, input_ids, **arguments):
        tokens = arguments.pop("max_new_tokens")
        head = model.generate(input_ids, max_new_tokens=position, **arguments) if position else input_ids
        runner_up = model(head).logits[:, -1].topk(2).indices[:, 1:]
        text = torch.cat([head, runner_up], 1)
        arguments["attention_mask"] = torch.ones_like(text)
        return model.generate(text, max_new_tokens=tokens - position - 1, **arguments)

    return generate


def test_any_greedy_difference_is_a_fault_in_float32():
    report = audit_greedy(target(), PROMPTS, generate=second_best(6), tokens=12)
    assert report.verdict == "fault"
    for case in report.cases:
        found = case.divergence
        assert found.position == 6
        assert found.margin > 0 and not found.tie
        assert found.spread < 1e-5


def test_in_low_precision_a_fault_is_told_from_a_tie():
    low = copy.deepcopy(target()).bfloat16()
    found = audit_greedy(low, PROMPTS[:1], generate=second_best(0), tokens=4)
    assert found.verdict == "fault" and "more than bfloat16 rounding explains" in found.reason
    margin = found.cases[0].divergence
    assert margin.margin > max(margin.unit, 2 * margin.spread) and not margin.tie
    assert audit_greedy(low, PROMPTS[:1], arguments=parties(), tokens=4).verdict == "pass"


def test_in_low_precision_a_tie_is_told_from_a_fault():
    low = copy.deepcopy(target()).bfloat16()
    rows = low.lm_head.weight.data
    first, second = low(PROMPTS[0]).logits[0, -1].topk(2).indices.tolist()
    rows[second] = rows[first]
    report = audit_greedy(low, PROMPTS[:1], generate=second_best(0), tokens=4)
    assert report.verdict == "pass" and "a tie within bfloat16 rounding" in report.reason
    found = report.cases[0].divergence
    assert found.tie and found.margin == 0 and set(found.tokens) == {first, second}


# The law -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 3}])
def test_cells_have_the_mass_of_the_exact_law(sampling):
    scorer = Scorer(target(), PROMPTS[0], {"do_sample": True, **PLAIN, **sampling}, **SCORER)
    cells = cells_of(scorer, 4, 1 / 40)
    law = joint_law(target(), PROMPTS[0][0], 4, warpers(**sampling))
    exact = np.zeros(cells.count)
    for tokens in np.ndindex(*law.shape):
        place, possible = cells.place(tokens)
        exact[place] += float(law[tokens])
        assert possible or law[tokens] < 1e-12
    for shape in SHAPES:
        assert cells.masses[shape] == pytest.approx(exact, abs=1e-6)
    assert cells.count > 10 and cells.split[1] > 0.5 and cells.spread < 1e-6
    assert cells.masses[SHAPES[0]].min() >= 1 / 40


def moved(amount):
    """The target in bfloat16, whose scores move with the number of rows a pass has, as rounding moves them."""
    changed = copy.deepcopy(target()).bfloat16()
    steps = amount * torch.cos(torch.arange(len(TARGET_PIECES)).bfloat16())
    changed.lm_head.register_forward_hook(lambda _, __, scores: scores + steps * (len(scores) > 1))
    return changed


def test_the_targets_own_spread_is_measured():
    scorer = Scorer(moved(0.1), PROMPTS[0], {"do_sample": True, **PLAIN}, **SCORER)
    cells = cells_of(scorer, 4, 1 / 12)
    centre = cells.centre
    assert 0.01 < cells.spread < 0.1
    assert sum(centre) == pytest.approx(1)
    plain = cells.masses[SHAPES[0]]
    assert cells.noncentrality >= float(((plain - centre) ** 2 / centre).sum()) > 1e-4


def test_the_targets_own_spread_is_no_fault():
    """Batches of Transformers' own sampling, whose law differs from that of single rows."""
    common = {"sampling": PLAIN, "samples": 8192, "batch": 4096, "positions": 3, "tokens": 2}
    report = audit_sampling(moved(0.3), PROMPTS, generate=transformers, **common)
    assert report.verdict == "inconclusive", report.reason
    assert report.spread > RESOLUTION and "float32" in report.reason
    together = report.tests[0]
    assert statistics.p_value(together.statistic, together.degrees) < 1e-3 < together.p_value


# Statistics ----------------------------------------------------------------------------------------------------------


def test_the_power_is_what_is_claimed():
    """In the direction that is hardest to see, and with an allowance, by simulation."""
    random = np.random.default_rng(0)
    masses = np.full(8, 1 / 8)
    for allowance in (0.0, 10.0):
        delta = statistics.detectable(4000, 7, 0.01, allowance)
        shifted = masses * (1 + 2 * delta * np.array([1, -1] * 4))
        assert np.abs(shifted - masses).sum() / 2 == pytest.approx(delta)
        counts = random.multinomial(4000, shifted, size=2000)
        found = [statistics.p_value(statistics.chi_square(count, masses), 7, allowance) < 0.01 for count in counts]
        assert 0.98 < np.mean(found) <= 1.0


def test_other_directions_are_easier_to_see():
    random = np.random.default_rng(1)
    masses = np.array([0.6, 0.3, 0.05, 0.05])
    delta = statistics.detectable(4000, 3, 0.01)
    for shift in ([1, -1, 0, 0], [0, 0, 1, -1], [-1, 0, 0, 1]):
        counts = random.multinomial(4000, masses + delta * np.array(shift), size=500)
        found = [statistics.p_value(statistics.chi_square(count, masses), 3) < 0.01 for count in counts]
        assert np.mean(found) >= 0.98


def test_the_number_of_samples_is_the_least_that_is_enough():
    number = statistics.samples_for(0.03, 20, 0.002)
    assert statistics.detectable(number, 20, 0.002) <= 0.03 < statistics.detectable(number - 1, 20, 0.002)
    assert statistics.samples_for(0.03, 20, 0.002, spread=0.1) is None


def test_a_mass_of_zero():
    assert statistics.chi_square(np.array([3, 1]), np.array([1.0, 0.0])) == math.inf
    assert statistics.p_value(math.inf, 1) == 0.0
    assert statistics.chi_square(np.array([3, 0]), np.array([1.0, 0.0])) == 0.0


def test_holm():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, says",
    [
        ({"tokens": 1}, "tokens=1 is out of range"),
        ({"samples": 0}, "samples=0 is out of range"),
        ({"batch": 0}, "batch=0 is out of range"),
        ({"small": -1}, "small=-1 is out of range"),
        ({"significance": 0}, "significance=0 is out of range"),
        ({"generate": lambda *_, **__: "text"}, "generate returned str"),
        ({"generate": lambda model, ids, **_: ids[:1, :-1]}, "do not begin with the 8 prompts"),
        ({"generate": lambda model, ids, **_: ids}, "0 new tokens where 3 were asked for"),
    ],
)
def test_refusals(change, says):
    with pytest.raises(ValueError, match=says):
        audit_sampling(target(), PROMPTS[:1], **{"samples": 8, "batch": 8, "small": 0, "sampling": PLAIN, **change})


@pytest.mark.parametrize("prompts", [[], [torch.tensor([1, 2])], [torch.zeros(1, 0, dtype=torch.long)]])
def test_prompts_that_are_none(prompts):
    for check in (audit_greedy, audit_sampling):
        with pytest.raises(ValueError, match="prompts"):
            check(target(), prompts)


def test_without_scipy(monkeypatch):
    monkeypatch.setattr(statistics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"specdec-fast\[verify\]"):
        audit(samples=8)


def test_reports_are_json():
    for report in (audit(samples=64), audit_greedy(target(), PROMPTS, generate=second_best(2), tokens=4)):
        assert json.loads(json.dumps(report.to_dict()))["verdict"] == report.verdict
