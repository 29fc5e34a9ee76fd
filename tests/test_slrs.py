"""String-level rejection sampling by the cover walk: lossless under every rule, and what it is worth.

One round is computed exactly: every walk is gone through, and verified by the rules' formulas with the laws that
production states. What is sampled through ``fast_generate`` is compared with the target's law by chi-square.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from laws import (
    DRAFTER_PIECES,
    SAMPLING,
    TARGET_PIECES,
    Recorder,
    chi_square,
    joint_law,
    model,
    pair_counts,
    tokenizer,
    warpers,
)
from tiny import drafters, same, taught, taught_prompts
from transformers import LogitsProcessor, LogitsProcessorList
from walking import PAIRS, laws_behind, look_of, problem, q_table, revealed, vocabulary, walks

from specdec_fast import fast_generate, last_speculation
from specdec_fast.randomness import Purpose
from specdec_fast.spelling import Spelling
from specdec_fast.walk import Masses, Rest, Root, Walk

GAMMA = 2
EXACT = 1e-8
PROMPT = torch.tensor([[1, 2, 5, 3, 4, 1, 2]])


# One round, exactly


def stated(drawn, spelling, q, walk):
    """The law that production states for a token."""
    return drawn.law.mass


def rounds(name, monkeypatch, law_of=stated, seed=11, **start):
    """Every draft of a round: probability, tokens, and the law of each, ``[V]``."""
    target, drafter, spelling = problem(name)
    q, known = q_table(drafter.size, seed), {}
    for chance, walk in walks(spelling, q, GAMMA, monkeypatch, **start):
        before, look = revealed(spelling, walk, start.get("ending")), look_of(spelling, q, walk)
        laws = []
        for i, drawn in enumerate(walk.drawn):
            if before[: i + 1] not in known:
                mass = law_of(drawn, spelling, q, walk)
                known[before[: i + 1]] = np.array([mass(t, look) for t in range(target.size)])
            laws.append(known[before[: i + 1]])
        yield chance, tuple(drawn.token for drawn in walk.drawn), laws


def rest(p, psi):
    left = np.maximum(p - psi, 0.0)
    return left / left.sum() if left.sum() > 1e-14 else p


def by_match(p, tokens, laws):
    kept = 1.0
    for i, token in enumerate(tokens):
        for t, mass in enumerate(p(tokens[:i])):
            if t != token:
                yield (*tokens[:i], t), kept * mass
        kept *= p(tokens[:i])[token]
    for t, mass in enumerate(p(tokens)):
        yield (*tokens, t), kept * mass


def by_token(p, tokens, laws):
    kept = 1.0
    for i, (token, psi) in enumerate(zip(tokens, laws, strict=True)):
        law = p(tokens[:i])
        ratio = min(1.0, law[token] / psi[token]) if psi[token] > 0 else float(law[token] > 0)
        for t, mass in enumerate(rest(law, psi)):
            yield (*tokens[:i], t), kept * (1 - ratio) * mass
        kept *= ratio
    for t, mass in enumerate(p(tokens)):
        yield (*tokens, t), kept * mass


def by_block(p, tokens, laws):
    """Sun et al., arXiv 2403.10444, algorithm 2: coins from the last position down."""
    weights = [1.0]
    for i, (token, psi) in enumerate(zip(tokens, laws, strict=True)):
        ratio = p(tokens[:i])[token] / psi[token] if psi[token] > 0 else 1.0
        weights.append(min(1.0, weights[-1] * ratio))
    lost = 1.0
    for i in range(len(tokens), -1, -1):
        psi = laws[i] if i < len(tokens) else 0.0
        left = np.maximum(weights[i] * p(tokens[:i]) - psi, 0.0)
        total = left.sum()
        wins = 1.0 if i == 0 else total / (total + 1 - weights[i]) if total + 1 - weights[i] > 1e-14 else 1.0
        law = left / total if total > 1e-14 else p(tokens[:i])
        for t, mass in enumerate(law):
            yield (*tokens[:i], t), lost * wins * mass
        lost *= 1 - wins


RULES = {"match": by_match, "token": by_token, "block": by_block}


def distance(name, rule, monkeypatch, **how):
    """Total variation of a round's output, continued by the target alone, from the target's law."""
    size = len(PAIRS[name][0])
    p = q_table(size, 21, zeros=0.2)
    joint = {}
    for chance, tokens, laws in rounds(name, monkeypatch, **how):
        for block, mass in RULES[rule](p, tokens, laws):
            joint[block] = joint.get(block, 0.0) + chance * mass
    for n in range(1, GAMMA + 1):
        for block in [block for block in joint if len(block) == n]:
            mass = joint.pop(block)
            for t, more in enumerate(p(block)):
                joint[(*block, t)] = joint.get((*block, t), 0.0) + mass * more
    expected = {
        tokens: np.prod([p(tokens[:i])[t] for i, t in enumerate(tokens)])
        for tokens in itertools.product(range(size), repeat=GAMMA + 1)
    }
    return 0.5 * sum(abs(joint.get(key, 0.0) - expected.get(key, 0.0)) for key in joint.keys() | expected.keys())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", PAIRS)
def test_a_round_has_the_targets_law(name, rule, monkeypatch):
    assert distance(name, rule, monkeypatch) < EXACT


def sure(drafted, mass):
    return mass >= 0.3


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "start", [{"last": 2}, {"held": b"a"}, {"ending": 0}, {"ending": 1}, {"goes_on": sure}], ids=lambda s: str(*s)
)
def test_wherever_it_begins_and_ends(start, rule, monkeypatch):
    for name in ("bytes", "long target"):
        assert distance(name, rule, monkeypatch, **start) < EXACT


@pytest.mark.parametrize("rule", ["token", "block"])
def test_the_token_behind_which_a_walk_ends_must_stay(rule, monkeypatch):
    propose = Walk._propose

    def dropping(self, token):
        limit = self._limit
        propose(self, token)
        if self._limit < limit:
            self.drawn.pop()
            self._limit -= 1

    monkeypatch.setattr(Walk, "_propose", dropping)
    assert distance("bytes", rule, monkeypatch, goes_on=sure) > 1e-3


# Planted faults: laws that are nearly right


def without_overrun(drawn, spelling, q, walk):
    """Draws at the root that run beyond a token are not counted."""

    def mass(token, look):
        missed = drawn.law._first(spelling.own(token)).sum() / drawn.law.total if isinstance(drawn.law, Root) else 0.0
        return drawn.law.mass(token, look) - missed

    return mass


def forgetting_the_stop(drawn, spelling, q, walk):
    """The law behind a stop is q over all tokens."""
    law = drawn.law
    return law.mass if isinstance(law, Rest) else Root(spelling, law.depth, law.weights, None, law.seen).mass


def over_the_wrong_set(drawn, spelling, q, walk):
    """The law behind a stop is q restricted, but not renormalised to the restriction."""
    law = drawn.law
    return law.mass if isinstance(law, Rest) else lambda token, look: law.mass(token, look) * law.total


def fresh_instead_of_left_over(drawn, spelling, q, walk):
    """The text left over is taken for a fresh draw."""
    law = drawn.law
    return Root(spelling, law.depth, law._weights).mass if isinstance(law, Rest) else law.mass


def joined_not_taken_out(drawn, spelling, q, walk):
    """It is known that the text left over is no node's, but the law still counts the draws of which it is."""
    law = drawn.law
    if not isinstance(law, Rest):
        return law.mass
    total = law.total + law.joining

    def mass(token, look):
        mine = law._leftover.tokens == token
        return (law._masses[mine].sum() + law._joins[mine].sum()) / total

    return mass


def from_the_root(drawn, spelling, q, walk):
    """A walk that begins at a node is taken for one from the root."""
    law = drawn.law
    return law.mass if isinstance(law, Rest) else Root(spelling, law.depth, law.weights, law.runs).mass


def permuted(drawn, spelling, q, walk):
    """q moved by one entry."""
    law = drawn.law
    if isinstance(law, Rest):
        return law.mass
    moved = Masses(np.roll(law.weights.of(np.arange(len(spelling.ids))), 1))
    return Root(spelling, law.depth, moved, law.runs).mass


def naive(drawn, spelling, q, walk):
    """The sum over all ways to write the token's text."""

    def mass(token, look):
        return sum_of_decompositions(spelling, laws_behind(spelling, q), tuple(walk.fed[: drawn.law.depth]), token)

    return mass


def sum_of_decompositions(spelling, masses, fed, token):
    def ways(before, text):
        if not text:
            return 1.0
        law = masses((*fed, *before))
        return sum(
            law[k] * ways((*before, k), text[len(piece) :])
            for k, piece in enumerate(spelling._pieces)
            if text.startswith(piece)
        )

    return ways((), spelling.text(token))


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize(
    "fault, name, seed",
    [
        (without_overrun, "long drafter", 11),
        (without_overrun, "eos", 11),
        (forgetting_the_stop, "eos", 11),
        (over_the_wrong_set, "eos", 11),
        (fresh_instead_of_left_over, "long drafter", 11),
        (fresh_instead_of_left_over, "bytes", 11),
        (joined_not_taken_out, "both", 12),
        (from_the_root, "both", 12),
        (permuted, "long target", 11),
        (naive, "long target", 11),
    ],
)
def test_a_planted_fault_is_seen(fault, name, seed, rule, monkeypatch):
    assert distance(name, rule, monkeypatch, law_of=fault, seed=seed) > 1e-3


# What it is worth


@pytest.mark.parametrize("name", PAIRS)
def test_it_accepts_no_less_than_rule_match_on_the_same_proposals(name, monkeypatch):
    p = q_table(len(PAIRS[name][0]), 21)
    for _, tokens, laws in rounds(name, monkeypatch):
        for i, psi in enumerate(laws):
            assert np.minimum(p(tokens[:i]), psi).sum() >= (p(tokens[:i]) * psi).sum() - 1e-15


def root_law(target, drafter, q):
    """ψ of every target token behind q, which is the same behind any text."""
    spelling = Spelling(vocabulary(target), vocabulary(drafter), target_size=len(target), drafter_size=len(drafter))
    weights = Masses(np.array(q)[spelling.ids])
    law = Root(spelling, 0, weights)
    return spelling, np.array([law.mass(t, lambda _, path: [weights] * len(path)) for t in range(len(target))])


def test_the_sum_over_all_decompositions_is_no_law():
    """D = T = {a, b, ab}: ab alone, or a then b."""
    pieces, q = [b"a", b"b", b"ab"], [0.5, 0.3, 0.2]
    spelling, psi = root_law(pieces, pieces, q)
    naive_sum = sum(sum_of_decompositions(spelling, lambda _: np.array(q)[spelling.ids], (), t) for t in range(3))
    assert naive_sum == pytest.approx(1.15)
    assert psi == pytest.approx(q)


def test_it_may_accept_less_than_tli():
    """T = {a, b, x, y}, D = {a, b, xy}: the target says a or b only, and TLI throws xy away before drawing."""
    _, psi = root_law([b"a", b"b", b"x", b"y"], [b"a", b"b", b"xy"], [0.25, 0.25, 0.5])
    p = np.array([0.5, 0.5, 0.0, 0.0])
    assert np.minimum(p, psi).sum() == pytest.approx(0.5)
    restricted = np.array([0.25, 0.25, 0.0, 0.0]) / 0.5
    assert np.minimum(p, restricted).sum() == pytest.approx(1.0)


def test_it_may_accept_less_than_slem():
    """T = {a, b, c, abc}, D = {a, b, c}: abc passes through ab, which is no target token, so no walk leads there."""
    pieces = [b"a", b"b", b"c"]
    target, drafter = vocabulary([*pieces, b"abc"]), vocabulary(pieces)
    spelling = Spelling(target, drafter, target_size=4, drafter_size=3)
    laws = {(): [1.0, 0.0, 0.0], (0,): [0.0, 1.0, 0.0], (0, 1): [0.0, 0.0, 1.0]}  # a, b, c for certain
    walk = Walk(spelling, 1, 100, lambda: 0.5)
    while walk.advance(Masses(np.array(laws[tuple(walk.fed)]))):
        pass
    assert [drawn.token for drawn in walk.drawn] == [0]
    assert walk.drawn[0].law.mass(3, look_of(spelling, lambda fed: np.array(laws[fed]), walk)) == 0.0
    assert target.encode("abc")[0] == [3]  # what SLEM proposes


def test_it_accepts_what_only_a_merge_can_say():
    """T = {a, b, ab}, D = {a, b}: of the same texts, TLI loses every token that the drafter writes as two."""
    _, psi = root_law([b"a", b"b", b"ab"], [b"a", b"b"], [0.6, 0.4])
    p = np.array([0.6 * 0.6, 0.4, 0.6 * 0.4])
    assert np.minimum(p, psi).sum() == pytest.approx(1.0)
    assert np.minimum(p, [0.6, 0.4, 0.0]).sum() == pytest.approx(0.76)


# Through fast_generate


def arguments(rule, **more):
    return {
        "method": "slrs",
        "assistant_model": model(len(DRAFTER_PIECES), 33, sharpness=0.8),
        "tokenizer": tokenizer(TARGET_PIECES),
        "assistant_tokenizer": tokenizer(DRAFTER_PIECES),
        "do_sample": True,
        "top_k": 0,
        "verification": rule,
        "num_assistant_tokens": GAMMA,
        **more,
    }


def target():
    return model(len(TARGET_PIECES), 31, sharpness=0.8)


@pytest.mark.parametrize(
    "rule, sampling, more",
    [
        ("match", "plain", {}),
        ("block", "plain", {}),
        ("token", "top_p", {"eos_token_id": 0, "pad_token_id": 0, "assistant_temperature": 1.7}),
        ("block", "top_k", {"assistant_confidence_threshold": 0.3}),
        ("block", "plain", {"num_assistant_tokens_schedule": "adaptive"}),
        ("token", "plain", {"assistant_temperature": 0.0}),
    ],
)
def test_the_output_has_the_targets_law(rule, sampling, more):
    steps, width = GAMMA + 3, len(TARGET_PIECES)
    how = arguments(rule, max_new_tokens=steps, num_return_sequences=1024, seed=3, **SAMPLING[sampling], **more)
    output = fast_generate(target(), PROMPT, **how)[:, PROMPT.shape[1] :]
    assert last_speculation().accepted > 100
    law = joint_law(target(), PROMPT[0], steps, warpers(**SAMPLING[sampling]), more.get("eos_token_id"))
    first, last = law.sum(tuple(range(2, steps))), law.sum(tuple(range(steps - 2)))
    assert chi_square(pair_counts(output, 0, width), first) > 1e-4
    assert chi_square(pair_counts(output, steps - 2, width), last) > 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_no_number_is_drawn_twice(rule):
    source = Recorder()
    fast_generate(target(), PROMPT, num_return_sequences=6, max_new_tokens=24, seed=5, source=source, **arguments(rule))
    assert not source.repeated(but=Purpose.TARGET)


@pytest.mark.parametrize("rule", RULES)
def test_a_row_does_not_depend_on_its_batch(rule):
    ids = torch.tensor([[0, 0, 0, 0, 3, 1, 2], [1, 2, 5, 3, 4, 1, 2], [0, 4, 1, 2, 4, 1, 2]])
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [1] * 7, [0] + [1] * 6])
    how = arguments(rule, max_new_tokens=20, pad_token_id=0)
    together = fast_generate(target(), ids, attention_mask=mask, seed=[7, 8, 9], **how)
    for row, seed in enumerate([7, 8, 9]):
        shown = ids[row : row + 1, int((mask[row] == 0).sum()) :]
        alone = fast_generate(target(), shown, seed=[seed], **how)
        assert torch.equal(alone[0, shown.shape[1] :], together[row, ids.shape[1] :])


class Nothing(LogitsProcessor):
    """A processor of the caller's own that does nothing: it makes the positions go in order."""

    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize("seed", range(6))
def test_one_position_at_a_time_gives_the_same(seed):
    how = arguments("token", max_new_tokens=24, num_assistant_tokens=4, seed=seed)
    at_once = fast_generate(target(), PROMPT, **how)
    in_order = fast_generate(target(), PROMPT, logits_processor=LogitsProcessorList([Nothing()]), **how)
    assert torch.equal(at_once, in_order)


@pytest.mark.parametrize("rows", [1, 4])
def test_greedy_decoding_gives_what_generate_gives(rows):
    own = {**drafters()["tli"], "method": "slrs"}
    statistics = same(taught()[0], taught_prompts(rows, padded=True), own, max_new_tokens=40)
    assert statistics.method == "slrs"
    assert statistics.verification == "match"
    assert 0 < statistics.accepted < statistics.drafted
