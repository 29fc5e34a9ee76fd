"""Rules and drafter draws by one operation: the same tokens as the plain code, from the same numbers."""

import pytest
import torch
from laws import Recorder
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from specdec_fast import fused, ops, reference, sampling
from specdec_fast.block import Block
from specdec_fast.fused import Fused, drafted_token
from specdec_fast.proposal import CompactLaw, Place, PointMass, ProjectedLaw, Proposal, SparseLaw
from specdec_fast.randomness import Philox
from specdec_fast.token_map import TokenMap
from specdec_fast.verification import Draws, Match, Token, greedy_choice, sampled_choice

RULES = {
    "match": (Match(sampled_choice), False),
    "greedy": (Match(greedy_choice), True),
    "token": (Token(), False),
    "block": (Block(), False),
}
ROWS, WIDTH = 200, 37


class LawAsked(Exception):
    pass


class Asking:
    """A law the operations do not know."""

    def log_q(self, tokens):
        raise LawAsked


def draws_of(source):
    generator = torch.Generator().manual_seed(5)
    return Draws(source, torch.randint(-(2**62), 2**62, (ROWS,), generator=generator), torch.arange(ROWS) * 3)


def problem(kind, n, gamma):
    generator = torch.Generator().manual_seed(n * 10 + gamma)
    scores = torch.randn(ROWS, n, WIDTH, generator=generator) * 2
    scores[3] = float("nan")
    scores[5, :, 1:] = -float("inf")
    count = torch.randint(gamma + 1, (ROWS,), generator=generator).tolist()
    if kind == "projected":
        return scores, projected(gamma, count, generator)
    if kind == "point":
        tokens = torch.randint(WIDTH, (ROWS, gamma), generator=generator)
        return scores, Proposal(tokens, count, PointMass(tokens))
    if kind == "sparse":
        masses, ids = torch.randn(ROWS, gamma, WIDTH, generator=generator).double().softmax(-1).topk(9)
        masses = masses / masses.sum(-1, keepdim=True)
        ids[:, :, -2:], masses[:, :, -2:] = -1, 0  # as lists of different lengths are padded
        return scores, Proposal(ids[..., 1], count, SparseLaw(ids, masses))
    index = torch.arange(0, WIDTH, 2) if kind == "indexed" else None
    columns = WIDTH + 3 if index is None else len(index)  # a padded drafter head is wider than the target's
    laws = torch.randn(ROWS, gamma, columns, generator=generator)
    if gamma:
        laws[4] = float("nan")
    drawn = (
        laws.nan_to_num().softmax(-1).cumsum(-1).gt(torch.rand(ROWS, gamma, 1, generator=generator)).int().argmax(-1)
    )
    tokens = drawn if index is None else index[drawn]
    return scores, Proposal(tokens, count, CompactLaw(laws, index, drawn))


def projected(gamma, count, generator):
    """Drafts of a writer that tells entries of up to three tokens, some of which begin alike or are alike."""
    lengths = torch.randint(1, 4, (60,), generator=generator).tolist()
    texts = [tuple(torch.randint(7, (n,), generator=generator).add(i % 3 * 15).tolist()) for i, n in enumerate(lengths)]
    table = TokenMap.of([(text, d) for d, text in enumerate(texts)])
    laws = torch.randn(ROWS * max(gamma, 1), len(table), generator=generator)
    places, tokens = [], torch.zeros(ROWS, gamma, dtype=torch.long)
    log_mass = torch.zeros(ROWS, gamma, dtype=torch.float64)
    if gamma:
        laws[4 * gamma] = float("nan")
    for row in range(ROWS):
        own: list[Place] = []
        for lane in range(row * gamma, (row + 1) * gamma):
            q = reference.masses(laws[lane])
            entry = int(q.nan_to_num(nan=1.0).multinomial(1, generator=generator))
            begin, end = 0, len(table)
            for level, (token, low, inner, high) in enumerate(table.entry(entry)[: count[row] - len(own)]):
                tokens[row, len(own)] = token
                log_mass[row, len(own)] = (q[low:high].sum() / (q[begin:end].sum() if level else 1.0)).log()
                own.append(Place(lane, level, begin, end))
                begin, end = inner, high
        places.append(own)
    return Proposal(tokens, count, ProjectedLaw(laws, table, places, log_mass))


@pytest.mark.parametrize("kind", ["point", "compact", "indexed", "sparse", "projected"])
@pytest.mark.parametrize(("n", "gamma", "base"), [(4, 3, 0), (1, 1, 2), (1, 0, 0)])
@pytest.mark.parametrize("name", RULES)
def test_the_same_verdict(name, n, gamma, base, kind):
    rule, greedy = RULES[name]
    scores, proposal = problem(kind, n, gamma)
    draws = draws_of(Philox()).at(base)
    fused, plain = Fused(rule, greedy).verify(scores, proposal, draws), rule.verify(scores, proposal, draws)
    assert torch.equal(fused.accepted, plain.accepted)
    assert torch.equal(fused.token, plain.token)
    assert int((plain.token == -1).sum()) >= 1  # the row that is no law


def test_a_projection_that_is_told_wrongly_is_noticed(monkeypatch):
    """As if each entry stood for its own id, and as if every token were the first of a text."""
    scores, proposal = problem("projected", 4, 3)
    draws, rule = draws_of(Philox()), Token()
    plain = rule.verify(scores, proposal, draws)
    whole = fused._projected
    for fault in ("one entry", "first"):

        def told(law, drafted, fault=fault):
            given = whole(law, drafted)
            if fault == "first":
                return given | {"kind": torch.ones_like(given["kind"])}
            index = given["index"]
            again = torch.cat([index.new_zeros(1, dtype=torch.bool), index[1:] == index[:-1]])
            return given | {"index": torch.where(again, WIDTH + 1, index).sort().values}

        monkeypatch.setattr(fused, "_projected", told)
        found = Fused(rule).verify(scores, proposal, draws)
        assert not torch.equal(found.token, plain.token)


CHAINS = {
    "heat": [TemperatureLogitsWarper(0.7)],
    "top_k": [TemperatureLogitsWarper(1.3), TopKLogitsWarper(7)],
    "top_p": [TopPLogitsWarper(0.8)],
    "all": [TemperatureLogitsWarper(0.8), TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
}


@pytest.mark.parametrize("kind", ["point", "indexed", "asked"])
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("name", ["match", "token", "block"])
def test_warpers_inside_are_the_processed_scores(name, chain, kind):
    """Whether the operation takes them as parameters or the rule is handed what Transformers makes of the scores."""
    scores, proposal = problem("point" if kind == "asked" else kind, 4, 3)
    warpers = LogitsProcessorList(CHAINS[chain])
    processed = warpers(None, scores.flatten(0, 1).clone()).view(scores.shape)
    processed[3] = float("nan")
    draws = draws_of(Recorder() if kind == "asked" else Philox())
    inside = Fused(RULES[name][0], warpers=warpers).verify(scores, proposal, draws)
    outside = RULES[name][0].verify(processed, proposal, draws)
    assert torch.equal(inside.accepted, outside.accepted)
    assert torch.equal(inside.token, outside.token)
    bare = Fused(RULES[name][0]).verify(scores, proposal, draws)
    assert not torch.equal(inside.token, bare.token), "without the warpers the difference would show"


@pytest.mark.parametrize("chain", CHAINS)
def test_a_drafters_warpers(chain):
    scores = torch.randn(ROWS, 300, generator=torch.Generator().manual_seed(9)) * 3
    warpers = LogitsProcessorList(CHAINS[chain])
    assert torch.equal(sampling.warp(warpers, scores.clone()), warpers(None, scores.clone()))


def test_lists_that_are_no_parameters():
    unusual = ([MinPLogitsWarper(0.1), TopKLogitsWarper(3)], [TopKLogitsWarper(3), TopKLogitsWarper(2)])
    others = ([TopKLogitsWarper(3, min_tokens_to_keep=5)], [TopPLogitsWarper(0.9, filter_value=-9.0)])
    for chain in (*unusual, *others, [TypicalLogitsWarper(0.9)]):
        assert sampling.parameters(LogitsProcessorList(chain)) is None
    assert sampling.parameters(LogitsProcessorList(CHAINS["all"])) == {
        "temperature": 0.8,
        "top_k": 20.0,
        "top_p": 0.9,
        "min_p": 0.05,
    }


def test_what_it_does_not_know_goes_to_the_rule(monkeypatch):
    monkeypatch.setattr(ops, "verify", lambda *_, **__: pytest.fail("a source of another kind must be asked itself"))
    scores, proposal = problem("compact", 4, 3)
    source = Recorder()
    assert Fused(Token()).verify(scores, proposal, draws_of(source)).token.shape == (ROWS,)
    assert source.keys
    asked = Proposal(proposal.tokens, proposal.count, Asking())
    with pytest.raises(LawAsked):
        Fused(Token()).verify(scores, asked, draws_of(Philox()))


def test_a_drafters_draw():
    scores = torch.randn(ROWS, 300, generator=torch.Generator().manual_seed(9)) * 3
    scores[7] = float("nan")
    draws = draws_of(Philox())
    plain = reference.draw(reference.masses(scores), draws.draft(4))
    token, logsumexp = drafted_token(scores, draws, 4)
    assert torch.equal(token, plain)
    assert plain[7] == -1
    assert torch.allclose(logsumexp, scores.double().logsumexp(1), equal_nan=True)
