"""Whole generations, enumerated: γ + 3 tokens through ``fast_generate`` have the target's joint law.

And the enumerator itself: against Philox, against a grid of numbers, and on numbers that are used twice.
"""

import pytest
import torch
from enumeration import laws_of, laws_on_a_grid
from laws import chi_square
from rounds import COMBINATIONS, SAMPLINGS, SLOW, TEXT, Setting, distance, prompts

from specdec_fast import reference
from specdec_fast.randomness import Philox, Purpose

EXACT = 1e-6


def generation(method, rule, sampling, gamma=1, kinds=("", ""), **more):
    ids, text = {"plain": (3, "small"), "top_p": (4, "same bytes"), "top_k": (4, "inside a character")}[sampling]
    return Setting(method, rule, sampling, text if method in TEXT else ids, gamma, kinds, more=more)


def check(setting):
    cases = [(prompt,) for prompt in prompts(setting, 1)]
    for law, case in zip(laws_of(setting.end_to_end, cases), cases, strict=True):
        assert distance(setting, law, case, setting.gamma + 3) < EXACT


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("method, rule", COMBINATIONS)
def test_end_to_end(method, rule, sampling):
    # Kept to what takes seconds: rule match splits every number it draws, and SLRS asks token by token
    far = sampling == "top_k" and (method == "prompt_lookup" or (rule != "match" and method not in ("slem", SLOW)))
    few = ("ties", "ties") if method == SLOW and sampling != "top_k" else ("", "")
    check(generation(method, rule, sampling, 2 if far else 1, few))


@pytest.mark.parametrize("rule", ["match", "token", "block"])
@pytest.mark.parametrize(
    "method, more",
    [
        ("model", {"assistant_temperature": 1.7}),
        ("model", {"assistant_temperature": 0.0}),
        ("model", {"assistant_confidence_threshold": 0.4, "num_assistant_tokens": 2}),
        ("tli", {"assistant_confidence_threshold": 0.4, "num_assistant_tokens_schedule": "heuristic"}),
        ("slem", {"assistant_confidence_threshold": 0.4, "assistant_temperature": 0.5}),
        ("model", {"num_assistant_tokens_schedule": "adaptive"}),
        ("tli", {"num_assistant_tokens_schedule": "adaptive"}),
        ("slem", {"num_assistant_tokens_schedule": "adaptive"}),
        ("projection", {"num_assistant_tokens_schedule": "adaptive"}),
        ("prompt_lookup", {"max_matching_ngram_size": 1, "prompt_lookup_num_tokens": 2}),
        ("model", {"use_cache": False}),
    ],
    ids=str,
)
def test_no_knob_changes_the_law(method, more, rule):
    check(generation(method, rule, "top_k", **more))


# The enumerator


def test_philox_gives_what_was_enumerated():
    setting = Setting("model", "block", "plain", 3, 2)
    (prompt,) = prompts(setting, 1)
    (law,) = laws_of(setting.one_round, [(prompt,)])
    rows = 10_000
    blocks = setting.one_round([prompt] * rows, list(range(rows)), Philox())
    known = [block for (block,) in law.mass]
    assert set(blocks) <= set(known)
    counts = torch.bincount(torch.tensor([known.index(block) for block in blocks]), minlength=len(known))
    assert len(known) > 12
    assert chi_square(counts, torch.tensor(list(law.mass.values()))) > 1e-4


@pytest.mark.parametrize("method, rule", [("model", "match"), ("model", "token"), ("model", "block"), ("tli", "token")])
def test_a_grid_of_numbers_gives_the_same_law(method, rule):
    """On laws of a quarter and a half, numbers of two bits are as good as any."""
    kinds = ("flat", "ties") if method == "model" else ("ties", "flat")
    setting = Setting(method, rule, "plain", "small" if method == "tli" else 4, 1, kinds=kinds)
    cases = [(prompt,) for prompt in prompts(setting, 4)]
    by_cells, on_grid = laws_of(setting.one_round, cases), laws_on_a_grid(setting.one_round, cases, bits=2)
    for cells, grid in zip(by_cells, on_grid, strict=True):
        assert cells.mass.keys() == grid.mass.keys()
        assert all(abs(cells.mass[output] - grid.mass[output]) < 1e-12 for output in cells.mass)


def ask(source, rows, offset=0, purpose=Purpose.DRAFT):
    keys = torch.arange(rows), torch.zeros(rows, dtype=torch.long)
    return source.uniform(*keys, torch.tensor(offset), purpose)


def weights(*values, rows):
    return torch.tensor([values], dtype=torch.float64).expand(rows, -1)


def test_a_number_used_twice_is_the_same_number():
    def run(prompts, seeds, source):
        u, again, other = (ask(source, len(prompts), offset) for offset in (0, 0, 1))
        first = reference.draw(weights(0.5, 0.5, rows=len(prompts)), u)
        second = reference.draw(weights(0.2, 0.5, 0.3, rows=len(prompts)), again)
        third = reference.accept(torch.full((len(prompts),), 0.25).double().log(), torch.zeros(1), other)
        return list(zip(first.tolist(), second.tolist(), third.tolist(), strict=True))

    (law,) = laws_of(run, [((),)])
    expected = {
        (first, second, third): mass * (0.25 if third else 0.75)
        for (first, second), mass in {(0, 0): 0.2, (0, 1): 0.3, (1, 1): 0.2, (1, 2): 0.3}.items()
        for third in (False, True)
    }
    assert law.mass == {(output,): pytest.approx(mass, abs=1e-12) for output, mass in expected.items()}
    assert law.runs == len(expected)


@pytest.mark.parametrize(
    "look",
    [float, lambda u: u.tolist(), lambda u: 1 - u, lambda u: u.log(), lambda u: torch.where(u > 0.5, u, 0)],
)
def test_numbers_cannot_be_looked_at_elsewhere(look):
    def run(prompts, seeds, source):
        look(ask(source, len(prompts))[0])
        return [()] * len(prompts)

    with pytest.raises(AssertionError, match="looked at"):
        laws_of(run, [((),)])
