"""Rules and drafter draws by one operation: the same tokens as the plain code, from the same numbers."""

from dataclasses import replace

import pytest
import torch
from laws import Recorder

from specdec_fast import ops, reference
from specdec_fast.block import Block
from specdec_fast.fused import Fused, drafted_token
from specdec_fast.proposal import CompactLaw, PointMass, Proposal, SparseLaw
from specdec_fast.randomness import Philox
from specdec_fast.verification import Draws, Match, Token, greedy_choice, sampled_choice

RULES = {
    "match": (Match(sampled_choice), False),
    "greedy": (Match(greedy_choice), True),
    "token": (Token(), False),
    "block": (Block(), False),
}
ROWS, WIDTH = 200, 37


class Asked:
    """A law the operations do not know."""

    def log_q(self, tokens):
        raise NotImplementedError("this law was asked")


def draws_of(source):
    generator = torch.Generator().manual_seed(5)
    return Draws(source, torch.randint(-(2**62), 2**62, (ROWS,), generator=generator), torch.arange(ROWS) * 3)


def problem(kind, n, gamma):
    generator = torch.Generator().manual_seed(n * 10 + gamma)
    scores = torch.randn(ROWS, n, WIDTH, generator=generator) * 2
    scores[3] = float("nan")
    scores[5, :, 1:] = -float("inf")
    count = torch.randint(gamma + 1, (ROWS,), generator=generator).tolist()
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


@pytest.mark.parametrize("kind", ["point", "compact", "indexed", "sparse"])
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


def test_what_it_does_not_know_goes_to_the_rule(monkeypatch):
    monkeypatch.setattr(ops, "verify", lambda *_, **__: pytest.fail("a source of another kind must be asked itself"))
    scores, proposal = problem("compact", 4, 3)
    source = Recorder()
    assert Fused(Token()).verify(scores, proposal, draws_of(source)).token.shape == (ROWS,)
    assert source.keys
    asked = replace(proposal, law=Asked())
    with pytest.raises(NotImplementedError, match="this law"):
        Fused(Token()).verify(scores, asked, draws_of(Philox()))


def test_a_drafters_draw():
    scores = torch.randn(ROWS, 300, generator=torch.Generator().manual_seed(9)) * 3
    scores[7] = float("nan")
    draws = draws_of(Philox())
    plain = reference.draw(reference.masses(scores), draws.draft(4))
    assert torch.equal(drafted_token(scores, draws, 4), plain)
    assert plain[7] == -1
