"""One production round, enumerated: whatever was drafted, the block it commits has the target's law.

Tables of random laws with all that can go wrong in them (`tables.tables`), every drafter, rule and sampling setting.
A block, continued by the target alone to γ + 1 tokens, must have the target's joint law.
"""

import pytest
from enumeration import laws_of
from rounds import CERTAIN, COMBINATIONS, SAMPLINGS, SLOW, TEXT, Setting, distance, prompts

EXACT = 1e-6
FAMILIES = {  # vocabulary, lookahead, prompts
    "plain": {
        "ids": [(3, 2, 10), (4, 1, 18), (3, 3, 2), (5, 1, 6)],
        "text": [("small", 2, 10), ("same bytes", 1, 24)],
    },
    "top_p": {
        "ids": [(4, 2, 4), (3, 1, 24), (6, 1, 8)],
        "text": [("crossing", 1, 18), ("inside a character", 1, 14), ("small", 3, 2)],
    },
    "top_k": {
        "ids": [(6, 2, 10), (5, 1, 20), (4, 3, 6)],
        "text": [("larger", 2, 12), ("inside a character", 2, 12), ("crossing", 3, 6)],
    },
}
DEGENERATE = {  # kinds of the target's and of the drafter's table
    "q = p": ("common", "common"),
    "disjoint supports": ("first half", "second half"),
    "certain target": ("one-hot", "dense"),
    "certain drafter": ("dense", "one-hot"),
    "p = 0 under q > 0": ("holes", "holes"),
    "ties": ("ties", "flat"),
}


def families(method, sampling):
    share = 4 if method == SLOW else 1
    found = FAMILIES[sampling]["text" if method in TEXT else "ids"]
    return [(v, g, max(n // share, 1)) for v, g, n in found]


def check(setting, cases, **how):
    laws = laws_of(setting.one_round, cases, **how)
    for law, case in zip(laws, cases, strict=True):
        assert distance(setting, law, case, setting.gamma + 1) < EXACT
    return laws


def test_there_are_enough_of_them():
    assert sum(count for method, _ in COMBINATIONS for s in SAMPLINGS for *_, count in families(method, s)) >= 2000


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("method, rule", COMBINATIONS)
def test_random_rounds(method, rule, sampling):
    for vocabulary, gamma, count in families(method, sampling):
        setting = Setting(method, rule, sampling, vocabulary, gamma)
        check(setting, [(prompt,) for prompt in prompts(setting, count)])


@pytest.mark.parametrize("kinds", DEGENERATE)
@pytest.mark.parametrize(
    "method, rule", [(m, r) for m, r in COMBINATIONS if r not in ("match", "gumbel") and m not in CERTAIN]
)
def test_degenerate_rounds(method, rule, kinds):
    gamma = 1 if method == SLOW else 2
    setting = Setting(method, rule, "plain", "crossing" if method in TEXT else 4, gamma, kinds=DEGENERATE[kinds])
    laws = check(setting, [(prompt,) for prompt in prompts(setting, 2)])
    lengths = {len(block) for law in laws for (block,) in law.mass}
    if method in ("model", "tli"):
        assert lengths == {"q = p": {3}, "disjoint supports": {1}}.get(kinds, lengths)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("method, rule", COMBINATIONS)
def test_batches_of_one(method, rule, sampling):
    setting = Setting(method, rule, sampling, "small" if method in TEXT else 3, 1)
    check(setting, [(prompt,) for prompt in prompts(setting, 1)], width=1)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("method, rule", COMBINATIONS)
def test_batches_of_two(method, rule, sampling):
    """Two rows of different prompts side by side, and the joint law of two rows."""
    setting = Setting(method, rule, sampling, "small" if method in TEXT else 3, 1)
    rows = prompts(setting, 4)
    check(setting, [(prompt,) for prompt in rows[1:3]], width=2)
    if method != SLOW or sampling == "top_k":
        check(setting, [(rows[0], rows[3])])
