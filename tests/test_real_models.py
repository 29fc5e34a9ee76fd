"""The default target with the shipped drafter: real text, real vocabularies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from specdec_fast import fast_generate, last_speculation
from specdec_fast.pretrained import default_drafter, default_target, load

PROMPTS = [entry["text"] for entry in json.loads(Path(__file__).with_name("prompts.json").read_text())]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def pair():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    target, tokenizer = load(default_target(), dtype=torch.float32)
    drafter, own = load(default_drafter(), dtype=torch.float32)
    tokenizer.padding_side = "left"
    yield target, tokenizer, drafter, own
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plain(pair):
    """The target's own greedy text for every prompt, as one left-padded batch."""
    target, tokenizer, _, _ = pair
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False)
        for p in PROMPTS
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    return dict(inputs), target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)


def test_there_are_twenty_prompts():
    assert len(PROMPTS) >= 20


@pytest.mark.parametrize("method", ["slem", "tli"])
def test_greedy_equals_generate(pair, plain, method):
    target, tokenizer, drafter, own = pair
    inputs, expected = plain
    got = fast_generate(
        target,
        **inputs,
        assistant_model=drafter,
        tokenizer=tokenizer,
        assistant_tokenizer=own,
        method=method,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    assert torch.equal(got, expected)
    assert last_speculation().block_efficiency > 1.3


@pytest.mark.parametrize(("tree", "rule"), [("on", "gumbel"), ("auto", "block")])
def test_the_drafter_pays_for_itself_when_sampling(pair, plain, tree, rule):
    """On the intersection's law: real text accepts a good part of what this drafter proposes."""
    target, tokenizer, drafter, own = pair
    inputs, _ = plain
    fast_generate(
        target,
        **{name: value[:8] for name, value in inputs.items()},
        assistant_model=drafter,
        tokenizer=tokenizer,
        assistant_tokenizer=own,
        method="tli",
        draft_tree=tree,
        do_sample=True,
        seed=0,
        max_new_tokens=16,
    )
    assert last_speculation().verification == rule
    assert last_speculation().acceptance_rate > 0.2
