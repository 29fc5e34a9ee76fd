"""``fast_generate`` with each backend of the ops forced in turn, as SPECDEC_FAST_BACKEND forces it.

Triton runs through the interpreter, a few milliseconds a program: what it generates is compared row by row with the
reference's, whose law is tested, since a row of a seed does not depend on the batch it stands in.
"""

import functools

import pytest
import torch
from laws import (
    DRAFTER_PIECES,
    SAMPLING,
    TARGET_PIECES,
    chi_square,
    joint_law,
    model,
    pair_counts,
    tokenizer,
    warpers,
)

from specdec_fast import dispatch, fast_generate, fused, last_speculation

WIDTH, STEPS = len(TARGET_PIECES), 5
PROMPT = torch.tensor([[1, 2, 5, 3, 4, 1, 2]])
METHODS = ("autoregressive", "model", "tli", "slem", "prompt_lookup", "projection", "slrs")
ROWS, FEW = 1500, 2


def _param(backend):
    missing = dispatch.why_not("verify", backend)
    return pytest.param(backend, marks=pytest.mark.skipif(missing is not None, reason=f"{backend}: {missing}"))


BACKENDS = ["reference", _param("cpu"), _param("triton")]


@pytest.fixture
def forced(monkeypatch):
    """Forces a backend and counts what it is asked for, by op."""
    asked = []

    def force(backend):
        monkeypatch.setattr(dispatch, "DEFAULT", backend)
        plain = dispatch._overload_name
        monkeypatch.setattr(
            dispatch, "_overload_name", lambda op, *rest: asked.append((op, rest[-1])) or plain(op, *rest)
        )
        return asked

    return force


def parties(method):
    own = {"method": method}
    if method == "model":
        return own | {"assistant_model": model(WIDTH, 32, sharpness=0.8)}
    if method in ("autoregressive", "prompt_lookup"):
        return own
    both = {"tokenizer": tokenizer(TARGET_PIECES), "assistant_tokenizer": tokenizer(DRAFTER_PIECES)}
    return own | both | {"assistant_model": model(len(DRAFTER_PIECES), 33, sharpness=0.8)}


def generated(method, rows=1, **arguments):
    target = model(WIDTH, 31, sharpness=0.8)
    drafting = {} if method == "autoregressive" else {"num_assistant_tokens": 2}
    settings = {"max_new_tokens": STEPS, **drafting, **parties(method), **arguments}
    return fast_generate(target, PROMPT, num_return_sequences=rows, **settings)[:, PROMPT.shape[1] :]


def sampled(method, rule, sampling, rows):
    return generated(method, rows, do_sample=True, seed=3, verification=rule, **{"top_k": 0, **SAMPLING[sampling]})


@functools.cache
def by_reference(method, rule, sampling):
    """What the reference generates: the rows that other backends are compared with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "DEFAULT", "reference")
        return sampled(method, rule, sampling, FEW)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_greedy_output_is_the_targets(forced, backend, method):
    expected = model(WIDTH, 31, sharpness=0.8).generate(PROMPT, max_new_tokens=STEPS, do_sample=False)
    asked = forced(backend)
    assert torch.equal(generated(method), expected[:, PROMPT.shape[1] :])
    assert ("verify", backend) in asked and {name for _, name in asked} == {backend}


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize(
    "method, rule",
    [
        ("autoregressive", "auto"),
        ("model", "match"),
        ("model", "token"),
        ("model", "block"),
        ("tli", "token"),
        ("tli", "block"),
        ("slem", "match"),
        ("prompt_lookup", "match"),
        ("projection", "block"),
        ("slrs", "block"),
    ],
)
def test_a_seed_gives_every_backend_the_same_tokens(forced, backend, method, rule):
    same_tokens(forced, backend, method, rule, "plain")


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize(
    "method, rule", [("model", "block"), ("tli", "token"), ("slem", "match"), ("projection", "block")]
)
def test_a_seed_gives_every_backend_the_same_tokens_of_a_filtered_law(forced, backend, method, rule):
    same_tokens(forced, backend, method, rule, "top_p")


def same_tokens(forced, backend, method, rule, sampling):
    expected = by_reference(method, rule, sampling)
    forced(backend)
    assert torch.equal(sampled(method, rule, sampling, FEW), expected)
    assert method == "autoregressive" or last_speculation().drafted > 0


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("method, rule", [("model", "token"), ("tli", "block"), ("slem", "match")])
def test_sampled_output_has_the_targets_law(forced, backend, method, rule):
    asked = forced(backend)
    tokens = sampled(method, rule, "plain", ROWS)
    assert torch.equal(tokens[:FEW], by_reference(method, rule, "plain")), "the rows that other backends are held to"
    law = joint_law(model(WIDTH, 31, sharpness=0.8), PROMPT[0], STEPS, warpers())
    for first, kept in ((0, range(2, STEPS)), (STEPS - 2, range(STEPS - 2))):
        assert chi_square(pair_counts(tokens, first, WIDTH), law.sum(tuple(kept))) > 1e-4
    assert {name for _, name in asked} == {backend}


@pytest.mark.parametrize("fault", ["another key", "keeps everything"])
def test_a_faulty_backend_is_noticed(monkeypatch, fault):
    expected = by_reference("model", "token", "plain")
    plain = fused.overload

    def faulty(op, *rest):
        run = plain(op, *rest)

        def verify(*given):
            *others, seed, start, base, rule, log_probs = given
            if fault == "another key":
                return run(*others, seed + 1, start, base, rule, log_probs)
            _, *found = run(*given)
            return given[6], *found  # its count

        return verify if op == "verify" else run

    monkeypatch.setattr(fused, "overload", faulty)
    monkeypatch.setattr(fused.Fused, "judging", lambda *_: None)
    assert not torch.equal(sampled("model", "token", "plain", FEW), expected)
