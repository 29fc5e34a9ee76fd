"""Prompts with pictures: what a second pair of eyes has found, and what a model's trial must not be told by."""

import copy

import pytest
import torch
from pictures import KINDS, PICTURE, VOCABULARY, build_seer, noisy_seer, pictured, seer
from tiny import model

from specdec_fast import fast_generate, last_speculation
from specdec_fast.cache import cache_argument, cache_of
from specdec_fast.runner import Runner

PLAIN = {"do_sample": False, "max_new_tokens": 8}


def text_drafter():
    return {"assistant_model": model("llama", vocabulary=VOCABULARY), "num_assistant_tokens": 3}


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_one_token(kind):
    """With types, as processors give them. Read both ways it would be read together with a draft."""
    ids, target = torch.tensor([[5]]), seer(kind)
    types = {"gemma3": "token_type_ids"} | {name: "mm_token_type_ids" for name in KINDS if name.startswith("qwen")}
    given = {
        "input_ids": ids,
        **({types[kind]: torch.zeros_like(ids)} if kind in types and kind != "qwen2_audio" else {}),
    }
    if kind == "paligemma":
        with pytest.raises(ValueError, match="input_ids: PaliGemmaForConditionalGeneration reads a prompt both ways"):
            fast_generate(target, **given, **PLAIN, **text_drafter())
        longer = torch.tensor([[5, 6]])
        got = fast_generate(target, longer, **PLAIN, **text_drafter())  # nothing of it was remembered
        assert torch.equal(got, target.generate(longer, **PLAIN))
        return
    for compile in ("off", "static"):
        got = fast_generate(target, **given, **PLAIN, **text_drafter(), compile=compile)
        assert torch.equal(got, target.generate(**given, **PLAIN))


def test_what_is_read_both_ways_is_read_once():
    with pytest.raises(ValueError, match="use_cache=False is not supported for prompts that PaliGemma"):
        fast_generate(seer("paligemma"), torch.tensor([[5, 6, 7]]), use_cache=False, **PLAIN)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_text_that_ends_with_a_placeholder(kind):
    """Nobody sees a picture there, but the target goes on from it."""
    ids = torch.tensor([[5, PICTURE, 6, PICTURE], [PICTURE] * 4])
    for compile in ("auto", "static"):
        for more in ({}, text_drafter(), {"assistant_model": noisy_seer(kind), "num_assistant_tokens": 2}):
            got = fast_generate(seer(kind), ids, **PLAIN, **more, compile=compile)
            assert torch.equal(got, seer(kind).generate(ids, **PLAIN))
            made = seer(kind).generate(ids[:, :3], **PLAIN, return_dict_in_generate=True)
            longer = torch.cat([made.sequences[:, :-1], ids[:, -1:]], 1)
            kept = {cache_argument(type(seer(kind))): cache_of(made)}
            wanted = seer(kind).generate(longer, **copy.deepcopy(kept), **PLAIN)
            assert torch.equal(fast_generate(seer(kind), longer, **kept, **PLAIN, **more, compile=compile), wanted)


def test_types_of_text_are_no_picture():
    ids, target = torch.tensor([[5, 6, 7]]), seer("gemma3")
    given = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "use_cache": False}
    assert torch.equal(fast_generate(target, **given, **PLAIN), target.generate(**given, **PLAIN))


def test_a_picture_that_is_no_number_says_nothing_of_the_model():
    target, inputs = build_seer("llava"), pictured("llava")
    spoilt = {**inputs, "pixel_values": inputs["pixel_values"] * torch.nan}
    with pytest.raises(RuntimeError, match="row 0: the target's scores hold a NaN"):
        fast_generate(target, **spoilt, **PLAIN)
    assert torch.equal(fast_generate(target, **inputs, **PLAIN), target.generate(**inputs, **PLAIN))


def test_a_trial_that_finds_no_memory_is_none(monkeypatch):
    target, inputs = build_seer("llava"), pictured("llava")

    def full(*_, **__):
        raise torch.OutOfMemoryError("not now")

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "feed", full)
        with pytest.raises(torch.OutOfMemoryError, match="not now"):
            fast_generate(target, **inputs, **PLAIN)
    assert torch.equal(fast_generate(target, **inputs, **PLAIN), target.generate(**inputs, **PLAIN))


def test_what_is_found_under_autocast_holds_there():
    target, inputs = build_seer("llava"), pictured("llava")
    with torch.autocast("cpu", torch.bfloat16):
        text = fast_generate(target, **inputs, **PLAIN)
    assert text.shape == target.generate(**inputs, **PLAIN).shape
    assert torch.equal(fast_generate(target, **inputs, **PLAIN), target.generate(**inputs, **PLAIN))


@pytest.mark.parametrize(
    "settings", [{"num_beams": 2}, {"stop_strings": ["x"]}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_a_drafters_own_settings_have_no_part_in_what_it_sees(settings):
    drafter, inputs = copy.deepcopy(noisy_seer("llava")), pictured("llava", 2, padded=True)
    for name, value in settings.items():
        setattr(drafter.generation_config, name, value)
    got = fast_generate(
        seer("llava"), **inputs, **PLAIN, assistant_model=drafter, num_assistant_tokens=2, method="model"
    )
    assert torch.equal(got, seer("llava").generate(**inputs, **PLAIN))
    assert "sees what the target sees" in last_speculation().reason
    assert all(getattr(drafter.generation_config, name) == value for name, value in settings.items())


@pytest.mark.parametrize("kind", ["lfm2_vl", "qwen3_5", "llava"])
def test_a_seeing_drafter_ends_where_its_positions_do(kind):
    drafter, inputs = copy.deepcopy(noisy_seer(kind)), pictured(kind, 2)
    drafter.config.get_text_config(decoder=True).max_position_embeddings = 24
    for compile in ("off", "static"):
        own = {"assistant_model": drafter, "num_assistant_tokens": 3, "compile": compile, "max_new_tokens": 24}
        got = fast_generate(seer(kind), **inputs, **{**PLAIN, **own})
        assert torch.equal(got, seer(kind).generate(**inputs, **{**PLAIN, "max_new_tokens": 24}))
        assert last_speculation().drafted


def test_ids_of_pictures_beyond_the_vocabulary():
    """Which Gemma 3 has replaced before it looks words up."""
    target = build_seer("gemma3", vocabulary=58)
    inputs = pictured("gemma3", most=50)
    for compile in ("off", "static"):
        got = fast_generate(target, **inputs, **PLAIN, prompt_lookup_num_tokens=2, compile=compile)
        assert torch.equal(got, target.generate(**inputs, **PLAIN))
    with pytest.raises(ValueError, match="input_ids holds 60"):
        fast_generate(target, inputs["input_ids"], **PLAIN)


def test_a_drafter_of_text_goes_on_from_a_picture_in_a_cache(monkeypatch, plain_drafters):
    target, inputs, never = seer("llava"), pictured("llava"), {"suppress_tokens": [PICTURE]}
    first = fast_generate(target, **inputs, **PLAIN, **never, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, torch.tensor([[7, 8]])], 1)
    read, plain, own = [], Runner.feed, text_drafter()

    def feed(self, rows, tokens, *rest, **more):
        if self.model is own["assistant_model"]:
            read.append(tokens)
        return plain(self, rows, tokens, *rest, **more)

    monkeypatch.setattr(Runner, "feed", feed)
    kept = {cache_argument(type(target)): cache_of(first)}
    fast_generate(target, longer, **kept, **PLAIN, **own, compile="off")
    assert read and not bool((read[0] == PICTURE).any()) and "reads the text alone" in last_speculation().reason


def test_a_first_picture_behind_a_cache_is_tried_too(monkeypatch):
    target, inputs = build_seer("llava"), pictured("llava")
    first = fast_generate(
        target, torch.tensor([[4, 5, 6]]), **PLAIN, return_dict_in_generate=True, suppress_tokens=[PICTURE]
    )
    longer = torch.cat([first.sequences, inputs["input_ids"]], 1)
    given = {"input_ids": longer, "pixel_values": inputs["pixel_values"], **PLAIN}
    kept = {cache_argument(type(target)): cache_of(first)}
    wanted = target.generate(**given)
    with monkeypatch.context() as patch:
        patch.setattr("specdec_fast.pictures.alike", lambda *_: False)
        with pytest.raises(ValueError, match="gives other logits where text is read apart"):
            fast_generate(copy.deepcopy(target), **given, **copy.deepcopy(kept))
    assert torch.equal(fast_generate(target, **given, **kept, **text_drafter()), wanted)
