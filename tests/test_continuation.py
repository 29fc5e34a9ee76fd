"""Going on from a cache, prompts given as embeddings, and the kinds of caches ``generate`` knows."""

import copy

import pytest
import torch
from test_greedy import assert_same_cache, assert_same_output
from tiny import PAD, model, noisy, prompts, same
from transformers import DynamicCache, GenerationConfig, StaticCache

from specdec_fast import fast_generate, last_speculation
from specdec_fast.cache import CACHE_NAMES, cache_argument, cache_of

DICT = {"return_dict_in_generate": True}
NAME = cache_argument(type(model()))  # Transformers has changed it
ARCHITECTURES = ("llama", "mistral", "gemma3", "gemma4", "gpt2", "bloom", "qwen2_windows")


def extended(inputs, output, seed=8, new=3):
    """A second turn: all ids so far and some more."""
    more = prompts(output.shape[0], length=new, seed=seed)["input_ids"]
    ids = torch.cat([output, more], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - inputs["input_ids"].shape[1]), value=1)
    return {"input_ids": ids, "attention_mask": mask}


def only_new(inputs, cache):
    """The same with the new ids alone, under the mask of the whole text."""
    return {**inputs, "input_ids": inputs["input_ids"][:, int(cache.get_seq_length()) :]}


@pytest.mark.parametrize("way", ["all ids", "new ids"])
@pytest.mark.parametrize("first", ["generate", "fast_generate"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_second_turn(architecture, first, way):
    target, inputs = model(architecture), prompts(3, padded=True)
    own = {"assistant_model": noisy(architecture)}
    run = target.generate if first == "generate" else lambda **all: fast_generate(target, **all, **own)
    turn = run(**inputs, **DICT, max_new_tokens=8)
    theirs, ours = copy.deepcopy(turn.past_key_values), turn.past_key_values
    second = extended(inputs, turn.sequences)
    if way == "new ids":
        second = only_new(second, ours)
    settings = {**DICT, "max_new_tokens": 8, "output_scores": True}
    expected = target.generate(**second, past_key_values=theirs, **settings)
    got = fast_generate(target, **second, past_key_values=ours, **settings, **own)
    assert got.past_key_values is ours
    # What a sliding window had thrown away stays so: compare what both still hold
    assert_same_output(got, expected, second["attention_mask"])


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_a_second_turn_is_what_one_turn_over_all_text_would_be(architecture):
    target, inputs = model(architecture), prompts(2)
    turn = fast_generate(target, **inputs, **DICT, max_new_tokens=8, assistant_model=noisy(architecture))
    second = extended(inputs, turn.sequences)
    expected = target.generate(**second, max_new_tokens=10)
    got = fast_generate(
        target, **second, past_key_values=turn.past_key_values, max_new_tokens=10, assistant_model=noisy(architecture)
    )
    assert torch.equal(got, expected)
    assert int(turn.past_key_values.get_seq_length()) == expected.shape[1] - 1


@pytest.mark.parametrize("rule", ["match", "token"])
def test_sampled_continuations_do_not_depend_on_how_the_text_is_given(rule):
    target, inputs = model(), prompts(2, padded=True)
    own = {"assistant_model": noisy(), "verification": rule, "do_sample": True, "seed": 4, "max_new_tokens": 10}
    turn = target.generate(**inputs, **DICT, max_new_tokens=5)
    second = extended(inputs, turn.sequences)
    plain = fast_generate(target, **second, **own)
    whole = fast_generate(target, **second, past_key_values=copy.deepcopy(turn.past_key_values), **own)
    assert torch.equal(whole, plain)
    if rule == "match":  # the drafter sees less text, so under the other rule other tokens come out
        new = only_new(second, turn.past_key_values)
        got = fast_generate(target, **new, past_key_values=turn.past_key_values, **own)
        assert torch.equal(got, plain[:, -got.shape[1] :])


def test_a_cache_handed_in_empty_is_filled():
    for make in (DynamicCache, lambda: StaticCache(config=model().config, max_cache_len=40)):
        for settings in ({}, DICT):
            theirs, ours = make(), make()
            model().generate(**prompts(2), past_key_values=theirs, max_new_tokens=9, **settings)
            fast_generate(
                model(), **prompts(2), past_key_values=ours, max_new_tokens=9, assistant_model=noisy(), **settings
            )
            assert_same_cache(ours, theirs)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("tokens", [2, 9])
def test_static_caches(architecture, tokens):
    """Shorter and longer than the sliding window."""
    target, inputs = model(architecture), prompts(2, length=3)
    own = {"assistant_model": noisy(architecture)}
    caches = [StaticCache(config=target.config, max_cache_len=48) for _ in range(2)]
    for seed in range(3):
        expected = target.generate(**inputs, past_key_values=caches[0], max_new_tokens=tokens)
        got = fast_generate(target, **inputs, past_key_values=caches[1], max_new_tokens=tokens, **own)
        assert torch.equal(got, expected)
        assert_same_cache(caches[1], caches[0])
        inputs = extended(inputs, expected, seed=seed, new=2)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_goes_by_every_name_that_generate_has_for_it(name):
    if CACHE_NAMES.index(name) < CACHE_NAMES.index(NAME):
        with pytest.raises(ValueError, match=name):  # as generate's own: it would be ignored
            fast_generate(model(), **prompts(), **{name: DynamicCache()}, max_new_tokens=3)
        return
    turn = fast_generate(model(), **prompts(), **DICT, max_new_tokens=5, assistant_model=noisy())
    assert turn[name] is getattr(turn, name) is cache_of(turn)
    second = extended(prompts(), turn.sequences)
    expected = model().generate(**second, max_new_tokens=6)
    for own in ({}, {"assistant_model": noisy()}, {"assistant_model": noisy(), "compile": "static"}):
        given = {name: copy.deepcopy(turn[name])}
        assert torch.equal(fast_generate(model(), **second, **given, max_new_tokens=6, **own), expected)
        assert given[name].get_seq_length() == expected.shape[1] - 1


def test_a_static_cache_that_is_too_small_is_refused_at_once():
    cache = StaticCache(config=model().config, max_cache_len=12)
    with pytest.raises(ValueError, match=rf"{NAME} is a static cache of 12 columns.* may need 18"):
        fast_generate(model(), **prompts(), past_key_values=cache, max_new_tokens=10)
    assert cache.get_seq_length() == 0
    fast_generate(model(), **prompts(), past_key_values=cache, max_new_tokens=4)
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.layers.pop(), "1 layers, the model 2"),
        (lambda c: c.batch_select_indices(torch.tensor([0])), "1 rows, the call 2"),
        (lambda c: setattr(c.layers[1], "keys", c.layers[1].keys[:, :, 3:]), "cannot be read"),
    ],
    ids=["layers", "rows", "part of the text"],
)
def test_caches_that_do_not_fit_are_refused(change, words):
    cache = model().generate(**prompts(2), **DICT, max_new_tokens=5).past_key_values
    change(cache)
    ids = prompts(2, length=20)
    with pytest.raises(ValueError, match=f"{NAME}.*{words}"):
        fast_generate(model(), **ids, past_key_values=cache, max_new_tokens=5, assistant_model=noisy())


def test_nothing_new_behind_a_cache_is_refused():
    turn = model().generate(**prompts(), **DICT, max_new_tokens=5)
    with pytest.raises(ValueError, match=f"{NAME} holds 13 columns and input_ids has 9"):
        fast_generate(model(), **prompts(), past_key_values=turn.past_key_values, max_new_tokens=5)


def test_a_cache_without_using_it_is_refused():
    turn = model().generate(**prompts(), **DICT, max_new_tokens=5)
    with pytest.raises(ValueError, match=f"use_cache=False cannot continue {NAME}"):
        fast_generate(model(), turn.sequences, past_key_values=turn.past_key_values, use_cache=False)


# Embeddings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [{}, {"assistant_model": noisy()}, {"prompt_lookup_num_tokens": 3}], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("with_ids", [False, True])
def test_inputs_embeds(own, rows, with_ids):
    target, inputs = model(), prompts(rows, padded=rows > 1)
    embeds = target.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    if with_ids:
        given["input_ids"] = inputs["input_ids"]
    before = embeds.clone()
    settings = {"max_new_tokens": 14, "output_scores": True, **DICT}
    expected = target.generate(**given, **settings)
    got = fast_generate(target, **given, **settings, **own)
    assert_same_output(got, expected, inputs["attention_mask"])
    assert torch.equal(embeds, before)
    assert with_ids or got.sequences.shape[1] == 14


def test_embeddings_that_stand_for_no_token():
    embeds = torch.randn(2, 7, 32)
    same(model(), {"inputs_embeds": embeds}, {"assistant_model": noisy()}, max_new_tokens=14)
    same(model("gpt2"), {"inputs_embeds": embeds}, {"assistant_model": noisy("gpt2")}, max_new_tokens=14)
    assert last_speculation().drafted > 0


def test_sampling_from_embeddings():
    own = {"do_sample": True, "seed": 3, "max_new_tokens": 14, "inputs_embeds": torch.randn(2, 7, 32)}
    plain = fast_generate(model(), **own)
    assert torch.equal(fast_generate(model(), **own, assistant_model=noisy(), verification="match"), plain)


# Kinds of caches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "bloom"])
@pytest.mark.parametrize("own", ["plain", "model", "prompt_lookup"])
def test_without_a_cache(own, architecture):
    own = {
        "plain": {},
        "model": {"assistant_model": noisy(architecture)},
        "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    }[own]
    same(model(architecture), prompts(2, padded=True), own, max_new_tokens=10, use_cache=False)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_cache_implementations(architecture, implementation):
    own = {"assistant_model": noisy(architecture)}
    target, inputs = model(architecture), prompts(2, padded=True)
    same(target, inputs, own, max_new_tokens=12, cache_implementation=implementation)
    config = GenerationConfig(max_new_tokens=12, cache_implementation=implementation, pad_token_id=PAD)
    same(target, inputs, own, generation_config=config)


def test_a_quantized_cache_works_or_says_what_is_missing():
    settings = {"max_new_tokens": 6, "cache_implementation": "quantized"}
    try:
        model().generate(**prompts(), **settings)
    except ImportError as theirs:
        with pytest.raises(ImportError) as ours:
            fast_generate(model(), **prompts(), **settings, assistant_model=noisy())
        assert str(ours.value) == str(theirs)
    else:
        fast_generate(model(), **prompts(), **settings, assistant_model=noisy())


@pytest.mark.parametrize("chunk", [1, 4, 50])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "bloom"])
def test_prefill_in_chunks(chunk, architecture):
    target, inputs = model(architecture), prompts(3, padded=True, length=21)
    widths = []
    hook = target.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        fast_generate(target, **inputs, assistant_model=noisy(architecture), max_new_tokens=2, prefill_chunk_size=chunk)
    finally:
        hook.remove()
    assert max(widths) <= max(chunk, 6)
    expected = target.generate(**inputs, max_new_tokens=10)
    got = fast_generate(
        target, **inputs, assistant_model=noisy(architecture), max_new_tokens=10, prefill_chunk_size=chunk
    )
    assert torch.equal(got, expected)


# How arguments may be given ------------------------------------------------------------------------------------------


def test_positional_arguments_as_generate_takes_them():
    ids = prompts()["input_ids"]
    config = GenerationConfig(max_new_tokens=8, pad_token_id=PAD, eos_token_id=3)
    expected = model().generate(ids, config)
    assert torch.equal(fast_generate(model(), ids, config), expected)
    none = (None, None, None, None)
    assert torch.equal(fast_generate(model(), ids, config, *none, noisy()), expected)
    assert last_speculation().method == "model"
    assert torch.equal(fast_generate(model(), inputs=ids, generation_config=config), expected)
    assert torch.equal(fast_generate(model(), input_ids=ids, generation_config=config), expected)


def test_a_generation_config_counts_and_stays_as_it_is():
    config = GenerationConfig(max_new_tokens=8, pad_token_id=PAD, prompt_lookup_num_tokens=3, stop_strings=None)
    before = copy.deepcopy(config.__dict__)
    expected = model().generate(**prompts(2), max_new_tokens=8)
    assert torch.equal(fast_generate(model(), **prompts(2), generation_config=config), expected)
    assert last_speculation().method == "prompt_lookup"
    assert config.__dict__ == before


def test_positions_of_the_callers():
    inputs = prompts(2, padded=True)
    own = {"assistant_model": noisy(), "max_new_tokens": 8}
    counted = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = model().generate(**inputs, max_new_tokens=8)
    assert torch.equal(fast_generate(model(), **inputs, position_ids=counted, **own), expected)
    with pytest.raises(ValueError, match="position_ids"):
        fast_generate(model(), **inputs, position_ids=counted + 1, **own)


def test_a_mask_with_holes():
    inputs = prompts(2)
    inputs["attention_mask"][0, 3:5] = 0
    inputs["attention_mask"][1, 0] = 0
    same(model(), inputs, {"assistant_model": noisy()}, max_new_tokens=14)


def test_padding_is_found_as_generate_finds_it():
    ids = prompts(3, padded=True)["input_ids"]
    same(model(), {"input_ids": ids}, {"assistant_model": noisy()}, max_new_tokens=14)
