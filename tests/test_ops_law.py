"""The law of what `verify` commits: chi-square on narrow vocabularies where q ranks against p, and planted faults."""

import pytest
import torch
from laws import chi_square
from op_cases import BACKENDS

from specdec_fast import ops
from specdec_fast.randomness import Purpose

V, DRAWS = 6, 200_000
RULES = ("match", "token", "block")
# A first-order chain: row t is the law behind token t. The drafter likes best what the target likes least.
TARGET = torch.randn(V, V, generator=torch.Generator().manual_seed(0)) * 1.2
DRAFT = -TARGET * 0.6 + torch.randn(V, V, generator=torch.Generator().manual_seed(1)) * 0.4
KNOWN = torch.tensor([0, 2, 3, 5])  # ids of the compact vocabulary


def chain_law(scores, length):
    """The joint law of the first tokens behind token 0, ``[V] * length``."""
    step = scores.double().softmax(-1)
    law = step[0]
    for _ in range(length - 1):
        law = law.unsqueeze(-1) * step
    return law


def drafted(scores, gamma, seed, start, purpose, backend):
    """Drafts of a model, with the scores each was drawn from: ``[N, γ]`` entries, ``[N, γ, K]``."""
    previous, entries, laws = torch.zeros_like(seed), [], []
    for i in range(gamma):
        laws.append(scores[previous])
        offset = torch.full_like(seed, i)
        entries.append(
            ops.sample(laws[-1], seed=seed, position=start, offset=offset, purpose=purpose, backend=backend).token
        )
        previous = entries[-1] if scores.shape[1] == V else KNOWN[entries[-1]]
    return torch.stack(entries, 1), torch.stack(laws, 1)


def proposals(gamma, seed, start, backend, purpose):
    """Arguments of `verify`; of three rows one has a point mass, one a dense law and one sparse ids."""
    kind = torch.arange(len(seed)) % 3
    dense, laws = drafted(DRAFT, gamma, seed, start, purpose, backend)
    log_q, ids = laws.double().log_softmax(-1).sort(-1)
    greedy, previous = [], torch.zeros_like(seed)
    for _ in range(gamma):
        previous = DRAFT[previous].argmax(-1)
        greedy.append(previous)
    tokens = torch.where((kind == ops.LawKind.POINT).unsqueeze(1), torch.stack(greedy, 1), dense)
    return {
        "tokens": tokens,
        "kind": kind.int().unsqueeze(1).expand(-1, gamma).contiguous(),
        "draft_logits": laws,
        "drawn": dense,
        "sparse_ids": ids,
        "sparse_log_q": log_q,
    }


def compact_proposals(gamma, seed, start, backend, purpose):
    entries, laws = drafted(DRAFT[:, KNOWN], gamma, seed, start, purpose, backend)
    return {"tokens": KNOWN[entries], "draft_logits": laws, "drawn": entries, "index": KNOWN.int()}


def committed(backend, rule, gamma, *, make=proposals, fault=None, **setting):
    """The first ``γ + 1`` tokens of many rows: one round, and plain draws behind what it committed."""
    start = torch.arange(DRAWS) * 7
    seed = torch.full_like(start, 5)
    purpose = Purpose.ACCEPT if fault == "shared noise" else Purpose.DRAFT
    case = make(gamma, seed, start, backend, purpose)
    before = torch.cat([torch.zeros_like(seed).unsqueeze(1), case["tokens"]], 1)
    logits = TARGET[before]
    if fault == "swapped":
        logits, case["draft_logits"] = torch.cat([case["draft_logits"], logits[:, -1:]], 1), logits[:, :-1]
    elif fault == "last tile":
        logits[..., -1] = -torch.inf
    elif fault == "wrong normaliser":
        case["draft_logsumexp"] = case["draft_logits"][..., :-1].double().logsumexp(-1)
    elif fault == "wrong bonus row":
        logits[:, -1] = logits[:, -2]
    count = torch.full_like(seed, gamma)
    count[::17] = 0
    result = ops.verify(logits, count=count, rule=rule, seed=seed, start=start, backend=backend, **case, **setting)
    assert not result.status.any()
    tokens = before[:, 1:].clone()
    tokens = torch.cat([tokens, tokens[:, :1]], 1).scatter_(1, result.accepted.unsqueeze(1), result.token.unsqueeze(1))
    for i in range(1, gamma + 1):
        rest = ops.sample(TARGET[tokens[:, i - 1]], seed=seed + 1, position=start + i, **setting, backend="reference")
        tokens[:, i] = torch.where(i > result.accepted, rest.token, tokens[:, i])
    return tokens, result.accepted


def p_values(tokens, scores=TARGET):
    """Of the joint law of the first two tokens, and of every position's own."""
    first = torch.bincount(tokens[:, 0] * V + tokens[:, 1], minlength=V * V)
    yield chi_square(first, chain_law(scores, 2))
    law = chain_law(scores, 1)
    for i in range(tokens.shape[1]):
        yield chi_square(torch.bincount(tokens[:, i], minlength=V), law)
        law = law @ scores.double().softmax(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gamma", [1, 3])
def test_committed_tokens_have_the_targets_law(backend, rule, gamma):
    tokens, accepted = committed(backend, rule, gamma)
    assert min(p_values(tokens)) > 1e-5
    assert 0.05 < float(accepted.double().mean()) < 0.9 * gamma, "neither the rule nor the residual would be tested"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["token", "block"])
def test_the_same_with_a_compact_drafter_and_filters(backend, rule):
    tokens, _ = committed(backend, rule, 2, make=compact_proposals, temperature=0.8, min_p=0.1)
    scores = TARGET / 0.8
    scores = scores.masked_fill(scores.softmax(-1) < 0.1 * scores.softmax(-1).amax(-1, keepdim=True), -torch.inf)
    assert min(p_values(tokens, scores)) > 1e-5


@pytest.mark.parametrize("fault", ["shared noise", "swapped", "last tile", "wrong normaliser", "wrong bonus row"])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_planted_fault_changes_the_law(rule, fault):
    backend = BACKENDS[-1].values[0] if fault == "wrong normaliser" else "reference"
    make = compact_proposals if fault in ("wrong normaliser", "shared noise") else proposals
    tokens, _ = committed(backend, rule, 1, make=make, fault=fault)
    assert min(p_values(tokens)) < 1e-9


def test_block_accepts_no_less_than_token():
    """Theorem 2 of Sun et al.; for a chain that drafts badly the gain is visible."""
    mean = {rule: float(committed("reference", rule, 3)[1].double().mean()) for rule in ("token", "block")}
    assert mean["block"] > mean["token"] + 0.005
