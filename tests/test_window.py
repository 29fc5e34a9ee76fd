"""``assistant_window``: the drafter reads the end of the text only."""

import contextlib

import pytest
import torch
from tiny import drafters, same, taught, taught_prompts

from specdec_fast import fast_generate, last_speculation

WINDOW = 8


@contextlib.contextmanager
def watched(model):
    """The columns that each pass of a model sees; with a hook it runs as it is."""
    seen = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(int(kwargs["position_ids"].max()) + 1), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", ["model", "tli", "projection", "slem", "slrs"])
def test_no_more_than_the_window_is_read_and_greedy_output_stays(method, padded):
    target, _ = taught()
    own = drafters().get(method) or {**drafters()["tli"], "method": method}
    inputs = taught_prompts(2, padded=padded)
    settings = {"num_assistant_tokens": 4, "assistant_window": WINDOW}
    with watched(own["assistant_model"]) as columns:
        statistics = same(target, inputs, {**own, **settings}, max_new_tokens=24, do_sample=False)
    assert statistics.drafted
    assert WINDOW // 2 < max(columns) <= WINDOW
    if method != "slrs":  # whose drafts may be several times as long in the drafter's tokens
        assert statistics.accepted
    with watched(own["assistant_model"]) as columns:
        same(target, inputs, {**own, "num_assistant_tokens": 4}, max_new_tokens=24, do_sample=False)
    assert max(columns) > WINDOW


def test_all_of_a_text_that_fits_is_read():
    target, _ = taught()
    own = {**drafters()["model"], "num_assistant_tokens": 4, "seed": 3}
    both = {**taught_prompts(), "max_new_tokens": 12, "do_sample": True}
    whole = fast_generate(target, **both, **own)
    drafted = last_speculation().accepted_per_position
    assert torch.equal(fast_generate(target, **both, **own, assistant_window=256), whole)
    assert last_speculation().accepted_per_position == drafted


def test_a_drafter_with_a_window_stays_on_the_host():
    target, _ = taught()
    own = {**drafters()["model"], "compile": "static", "assistant_window": WINDOW}
    fast_generate(target, **taught_prompts(), **own, max_new_tokens=6, do_sample=False)
    assert "assistant_window" in last_speculation().loop_reason
