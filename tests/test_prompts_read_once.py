"""Rows that begin with the same prompt have it read once."""

from unittest import mock

import pytest
import torch
from tiny import ARCHITECTURES, model, noisy

from specdec_fast import fast_generate
from specdec_fast.runner import WORTH_COPYING, Runner
from specdec_fast.static_cache import capacity_for
from specdec_fast.static_runner import StaticRunner, empty_cache, why_not_static


def ids(rows, columns, seed=0):
    return torch.randint(1, 61, (rows, columns), generator=torch.Generator().manual_seed(seed))


def passes(runner):
    """The shapes of the passes that follow."""
    seen = []
    forward = runner._forward

    def watched(unit, rows, places, tokens, *rest):
        seen.append(tuple(tokens.shape))
        return forward(unit, rows, places, tokens, *rest)

    runner._forward = watched
    return seen


def batch():
    """Prompts 0 and 1 in rows 0, 2, 3 and 1; what follows differs in every row."""
    prompt = ids(2, 12)[[0, 1, 0, 0]]
    return torch.cat([prompt, ids(4, 3, seed=1)], 1)


def fed(runner, tokens, count, tail):
    """Two passes, the second with rows at different columns, and nothing shared in what is returned."""
    first = runner.feed(range(4), tokens, count, tail)
    for row in range(4):
        runner.rollback(row, 12 + row % 2)
    second = runner.feed(range(4), tokens[:, 13:], [2, 1, 2, 1], [1, 1, 1, 1])
    return [first[row, : tail[row]] for row in range(4)] + [second]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_row_gets_the_logits_of_its_own_text(architecture):
    target = model(architecture)
    tokens, count, tail = batch(), [15, 14, 15, 13], [4, 3, 4, 2]
    runner = Runner(target, 4)
    seen = passes(runner)
    own = fed(runner, tokens, count, tail)
    if runner.joint:
        assert seen[:2] == [(2, 9), (4, 6)]
    with mock.patch("specdec_fast.runner.WORTH_COPYING", 1 << 30):
        apart = fed(Runner(target, 4), tokens, count, tail)
    for one, other in zip(own, apart, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_static_caches_read_them_once_too(architecture):
    target = model(architecture)
    assert why_not_static(target) is None
    tokens, count, tail = batch(), [15, 15, 15, 15], [4, 4, 4, 4]
    runner = StaticRunner(target, empty_cache(target, 4, capacity_for(32)), 4)
    seen = passes(runner)
    own = fed(runner, tokens, count, tail)
    assert seen[:2] == [(2, 11), (4, 4)]
    for one, other in zip(own, fed(Runner(target, 4), tokens, count, tail), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_the_same_ids_behind_different_padding_are_different_prompts():
    target = model()
    tokens = ids(1, 20).repeat(3, 1)
    visible = torch.ones_like(tokens, dtype=torch.bool)
    visible[1, :4] = False
    runner = Runner(target, 3, visible=visible)
    seen = passes(runner)
    own = runner.feed(range(3), tokens, [20] * 3, [1] * 3)
    assert seen[0] == (2, 19)
    alone = target(tokens[:1, 4:], position_ids=torch.arange(16)[None]).logits[0, -1]
    torch.testing.assert_close(own[1, -1], alone.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(own[0], own[2], atol=1e-5, rtol=1e-5)


def test_few_tokens_are_not_worth_a_pass_of_their_own():
    runner = Runner(model(), 2)
    seen = passes(runner)
    runner.feed(range(2), ids(1, WORTH_COPYING).repeat(2, 1), [WORTH_COPYING] * 2, [1, 1])
    assert seen == [(2, WORTH_COPYING)]


@pytest.mark.parametrize("prefill_chunk", [None, 8])
@pytest.mark.parametrize("compiled", ["off", "static"])
def test_returned_sequences_of_one_prompt_are_those_of_generate(prefill_chunk, compiled):
    target, prompt = model(), ids(2, 21)
    both = {"max_new_tokens": 12, "do_sample": False}
    plain = target.generate(prompt.repeat_interleave(3, 0), **both)
    own = fast_generate(
        target, prompt.repeat_interleave(3, 0), assistant_model=noisy(), prefill_chunk_size=prefill_chunk,
        compile=compiled, **both,
    )  # fmt: skip
    assert torch.equal(own, plain)


def test_a_cache_grows_no_longer_than_the_longest_text():
    runner = Runner(model(), 3, most=40)
    runner.feed(range(3), ids(3, 25), [25] * 3, [1] * 3)
    assert {layer.room for _, unit in runner.caches for layer in unit.ragged} == {40}
    runner.feed(range(3), ids(3, 18), [18] * 3, [1] * 3)  # what was said does not hold: it grows all the same
    assert all(layer.room > 43 for _, unit in runner.caches for layer in unit.ragged)
