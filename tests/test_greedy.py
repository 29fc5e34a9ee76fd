"""Greedy decoding gives what ``model.generate`` gives, token for token, and returns it as ``generate`` does."""

import threading

import pytest
import torch
from tiny import ARCHITECTURES, PAD, drafters, model, noisy, prompts, same, taught, taught_prompts
from transformers import DynamicCache, StaticCache

from specdec_fast import fast_generate, last_speculation, native
from specdec_fast.runner import supports_ragged_batches

METHODS = ("autoregressive", "model", "tli", "slem", "prompt_lookup")
RULES = ("match", "token", "block")


@pytest.mark.parametrize("padded", [False, True], ids=["level", "padded"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_every_drafter(method, rows, padded):
    target, _ = taught()
    statistics = same(target, taught_prompts(rows, padded=padded), drafters()[method], max_new_tokens=40)
    assert statistics.method == method
    if method == "autoregressive":
        assert statistics.drafted == 0
        assert statistics.rounds == 40
    else:
        assert 0 < statistics.accepted < statistics.drafted


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_at_temperature_0_every_rule_compares_with_the_argmax(method, rule):
    target, _ = taught()
    options = {**drafters()[method], "verification": rule}
    statistics = same(target, taught_prompts(2, padded=True), options, max_new_tokens=20)
    assert statistics.verification == "match"


@pytest.mark.parametrize("padded", [False, True], ids=["level", "padded"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture, rows, padded):
    options = {"assistant_model": noisy(architecture), "num_assistant_tokens": 4}
    inputs = prompts(rows, padded=padded)
    statistics = same(model(architecture), inputs, options, max_new_tokens=24)
    assert 0 < statistics.accepted <= statistics.drafted - (rows > 1)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_the_models_own_forward_gives_the_same(method, rows):
    target, _ = taught()
    options = {**drafters()[method], "compile": "off"}
    assert same(target, taught_prompts(rows, padded=True), options, max_new_tokens=30).forward == "eager"
    if native.load_ops():
        assert same(target, taught_prompts(rows), drafters()[method], max_new_tokens=5).forward == "native"


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("architecture", ["gemma3", "qwen2_windows"])
def test_masks_of_several_kinds_by_the_models_own_forward(architecture, rows):
    options = {"assistant_model": noisy(architecture), "num_assistant_tokens": 4, "compile": "off"}
    statistics = same(model(architecture), prompts(rows, padded=True), options, max_new_tokens=24)
    assert statistics.forward == "eager" and 0 < statistics.accepted < statistics.drafted


def test_which_rows_share_a_forward_pass():
    """Found out by trying; a wrong mask would not fail the tests above, only be slower, as each row ran alone."""
    alone = [architecture for architecture in ARCHITECTURES if not supports_ragged_batches(model(architecture))]
    assert alone == ["gpt_neo", "bloom", "falcon", "mpt"]


@pytest.mark.parametrize("drafter", ["bloom", "mistral", "gpt2"])
@pytest.mark.parametrize("target", ["llama", "falcon"])
def test_target_and_drafter_of_different_architectures(target, drafter):
    """Each side finds out for itself whether its rows may share a forward pass."""
    same(model(target), prompts(3, padded=True), {"assistant_model": model(drafter)}, max_new_tokens=16)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_attention_implementations(architecture, implementation):
    target = model(architecture)
    before = target.config._attn_implementation
    target.set_attn_implementation(implementation)
    try:
        same(target, prompts(3, padded=True), {"assistant_model": noisy(architecture)}, max_new_tokens=16)
    finally:
        target.set_attn_implementation(before)


def test_a_perfect_drafter_is_always_accepted():
    statistics = same(model(), prompts(), {"assistant_model": model(), "num_assistant_tokens": 4}, max_new_tokens=30)
    assert statistics.accepted == statistics.drafted == 24
    assert statistics.rounds == 6
    assert statistics.block_efficiency == 5.0
    assert statistics.acceptance_rate == 1.0
    assert statistics.accepted_per_position == [6, 6, 6, 6]


def test_a_hopeless_drafter_costs_nothing_but_time():
    statistics = same(model(), prompts(), {"assistant_model": model(seed=9)}, max_new_tokens=12)
    assert statistics.accepted <= 3


def test_bfloat16_runs():
    target = taught()[0]
    for method in METHODS:
        output = fast_generate(target.to(torch.bfloat16), **taught_prompts(2), **drafters()[method], max_new_tokens=12)
        assert output.shape == (2, taught_prompts(2)["input_ids"].shape[1] + 12)
    target.to(torch.float32)


# What is returned ----------------------------------------------------------------------------------------------------

FULL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


def assert_same_output(got, expected, mask=None):
    assert torch.equal(got.sequences, expected.sequences)
    for name in ("scores", "logits"):
        ours, theirs = getattr(got, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        if ours is None:
            continue
        assert isinstance(ours, tuple)
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.dtype == other.dtype
            torch.testing.assert_close(mine, other, atol=2e-4, rtol=1e-3)
    assert_same_cache(got.past_key_values, expected.past_key_values, mask)


def assert_same_cache(got, expected, mask=None):
    """Equal in every column that is not padding of the prompt (what stands there, nothing ever reads)."""
    assert (got is None) == (expected is None)
    if got is None:
        return
    columns = int(got.get_seq_length())
    shown = torch.ones(1, columns, dtype=torch.bool)
    if mask is not None:
        shown = torch.nn.functional.pad(mask.bool(), (0, columns - mask.shape[1]), value=True)
    assert int(got.get_seq_length()) == int(expected.get_seq_length())
    assert len(got.layers) == len(expected.layers)
    for mine, other in zip(got.layers, expected.layers, strict=True):
        assert type(mine) is type(other)
        if other.keys is None:  # reads another layer's
            assert mine.keys is None
            continue
        assert mine.keys.shape == other.keys.shape
        kept = min(columns, mine.keys.shape[2])
        weight = shown[:, None, columns - kept :, None]
        for name in ("keys", "values"):
            ours, theirs = getattr(mine, name)[:, :, :kept] * weight, getattr(other, name)[:, :, :kept] * weight
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_scores_logits_and_cache(method):
    target, _ = taught()
    inputs = taught_prompts(3, padded=True)
    settings = {**FULL, "max_new_tokens": 24, "repetition_penalty": 1.2, "suppress_tokens": [5, 6]}
    expected = target.generate(**inputs, **settings)
    got = fast_generate(target, **inputs, **settings, **drafters()[method])
    assert_same_output(got, expected, inputs["attention_mask"])
    assert got.speculation.method == method
    assert got.speculation is last_speculation()
    assert all(torch.isneginf(step[:, [5, 6]]).all() for step in got.scores)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "gpt2", "bloom"])
@pytest.mark.parametrize("padded", [False, True], ids=["level", "padded"])
def test_scores_logits_and_cache_where_rows_end_early(architecture, padded):
    target, inputs = model(architecture), prompts(4, padded=padded)
    free = target.generate(**inputs, max_new_tokens=20)[:, inputs["input_ids"].shape[1] :]
    stop = [int(free[0, 5]), int(free[1, 11])]
    settings = {**FULL, "max_new_tokens": 20, "eos_token_id": stop, "no_repeat_ngram_size": 5}
    expected = target.generate(**inputs, **settings)
    assert (expected.sequences == PAD).any(1).sum() > padded
    got = fast_generate(target, **inputs, **settings, assistant_model=noisy(architecture))
    assert_same_output(got, expected, inputs["attention_mask"])


def test_only_what_was_asked_for_is_returned():
    target, inputs = model(), prompts(2)
    for name in ("output_scores", "output_logits"):
        settings = {"return_dict_in_generate": True, name: True, "max_new_tokens": 7}
        expected = target.generate(**inputs, **settings)
        assert_same_output(fast_generate(target, **inputs, **settings, assistant_model=noisy()), expected)
    plain = fast_generate(target, **inputs, output_scores=True, max_new_tokens=7, assistant_model=noisy())
    assert isinstance(plain, torch.Tensor)
    no_cache = fast_generate(
        target, **inputs, return_dict_in_generate=True, use_cache=False, max_new_tokens=7, assistant_model=noisy()
    )
    assert no_cache.past_key_values is None
    assert torch.equal(no_cache.sequences, plain)


def test_transition_scores_can_be_computed():
    target, inputs = model(), prompts(2)
    settings = {**FULL, "max_new_tokens": 7}
    got = fast_generate(target, **inputs, **settings, assistant_model=noisy())
    ours = target.compute_transition_scores(got.sequences, got.scores, normalize_logits=True)
    expected = target.generate(**inputs, **settings)
    theirs = target.compute_transition_scores(expected.sequences, expected.scores, normalize_logits=True)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("implementation", [None, "dynamic", "static"])
def test_the_returned_cache_is_of_the_kind_asked_for(implementation):
    target, inputs = model(), prompts(2, padded=True)
    settings = {"return_dict_in_generate": True, "max_new_tokens": 9, "cache_implementation": implementation}
    got = fast_generate(target, **inputs, **settings, assistant_model=noisy())
    expected = target.generate(**inputs, **settings)
    assert type(got.past_key_values) is type(expected.past_key_values)
    assert isinstance(got.past_key_values, StaticCache if implementation == "static" else DynamicCache)
    assert_same_output(got, expected, inputs["attention_mask"])


def test_statistics_add_up():
    target, inputs = model(), prompts(4, padded=True)
    options = {"assistant_model": noisy(), "num_assistant_tokens": 4}
    output = fast_generate(target, **inputs, **options, return_dict_in_generate=True, max_new_tokens=24)
    statistics = output.speculation
    assert statistics.committed == 4 * 24
    assert statistics.committed == statistics.accepted + statistics.row_rounds
    assert statistics.drafted == sum(statistics.drafted_per_position)
    assert statistics.accepted == sum(statistics.accepted_per_position)
    assert statistics.rounds <= statistics.row_rounds <= 4 * statistics.rounds
    assert 0 < statistics.draft_seconds < statistics.total_seconds
    assert 0 < statistics.verify_seconds < statistics.total_seconds
    assert statistics.reason
    assert statistics.to_dict()["block_efficiency"] == statistics.block_efficiency > 1


def test_statistics_belong_to_a_thread():
    fast_generate(model(), **prompts(), assistant_model=noisy(), max_new_tokens=5)
    mine = last_speculation()
    others = []

    def run():
        others.append(last_speculation())
        fast_generate(model(), **prompts(), prompt_lookup_num_tokens=2, max_new_tokens=5)
        others.append(last_speculation())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert others[0] is None
    assert others[1].method == "prompt_lookup"
    assert last_speculation() is mine
