"""Whatever the text and the tokenizers do to it, the output is the target's; only acceptance may drop."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import build_model
from toy_tokenizers import KINDS, build

from specdec_fast import fast_generate
from specdec_fast.vocab import Vocabulary

# Cut in the middle of a character, dropped, lower-cased, composed or nothing at all by one tokenizer or another
PIECES = [
    "a",
    "The ",
    "def f(x):\n    ",
    "é",
    "ﬁ",
    "Å",
    "漢字",
    "🙂",
    "👩‍🚀",
    "\x00",
    "\x04\xff",
    "\t\t",
    "  ",
    "İ",
    "\u200b",
    "</s>",
]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), min_size=1, max_size=5).map("".join)


@functools.cache
def _pair(target_kind: str, drafter_kind: str):
    tokenizer, own = build(target_kind), build(drafter_kind)
    target = build_model("llama", vocabulary=len(tokenizer), seed=3)
    drafter = build_model("llama", vocabulary=len(own), seed=4)
    target.generation_config.pad_token_id = 0
    target.generation_config.eos_token_id = tokenizer.eos_token_id
    return target, drafter, tokenizer, own


def _prompt(tokenizer, text: str) -> torch.Tensor:
    ids = tokenizer(text).input_ids or [5]
    return torch.tensor([ids])


@pytest.mark.parametrize("method", ["tli", "slem"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "byte_a"])
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=TEXTS)
def test_any_prompt_gives_the_targets_own_output(kind: str, method: str, text: str):
    target, drafter, tokenizer, own = _pair("byte_a", kind)
    prompt = _prompt(tokenizer, text)
    expected = target.generate(prompt, max_new_tokens=10, do_sample=False)
    got = fast_generate(
        target,
        prompt,
        assistant_model=drafter,
        tokenizer=tokenizer,
        assistant_tokenizer=own,
        method=method,
        max_new_tokens=10,
        do_sample=False,
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("method", ["tli", "slem"])
@pytest.mark.parametrize("kind", ["byte_gaps", "nfkc", "sentencepiece_first", "wordpiece"])
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(ids=st.lists(st.integers(0, 10_000), min_size=1, max_size=12))
def test_any_ids_of_any_target_give_its_own_draws(kind: str, method: str, ids: list[int]):
    target, drafter, tokenizer, own = _pair(kind, "byte_b")
    # The eos and control tokens among them; a prompt need not be anything an encoder would have written
    prompt = torch.tensor([[i % len(tokenizer) for i in ids]])
    arguments = {"max_new_tokens": 8, "do_sample": True, "seed": 11, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    expected = fast_generate(target, prompt, attention_mask=mask, **arguments)
    got = fast_generate(
        target,
        prompt,
        attention_mask=mask,
        assistant_model=drafter,
        tokenizer=tokenizer,
        assistant_tokenizer=own,
        method=method,
        verification="match",
        **arguments,
    )
    assert torch.equal(got, expected)


def test_every_character_cut_inside_is_continued():
    """The prompt ends inside each of the bytes of a character."""
    target, drafter, tokenizer, own = _pair("byte_a", "byte_b")
    vocabulary = Vocabulary.of(tokenizer)
    for character in ("é", "漢", "🙂"):
        data = character.encode()
        for cut in range(1, len(data)):
            single = [vocabulary.id_of(bytes([byte])) for byte in data[:cut]]
            prompt = torch.tensor([[*tokenizer("so ").input_ids, *(i for i in single if i is not None)]])
            expected = target.generate(prompt, max_new_tokens=6, do_sample=False)
            for method in ("tli", "slem"):
                got = fast_generate(
                    target,
                    prompt,
                    assistant_model=drafter,
                    tokenizer=tokenizer,
                    assistant_tokenizer=own,
                    method=method,
                    max_new_tokens=6,
                    do_sample=False,
                )
                assert torch.equal(got, expected)
