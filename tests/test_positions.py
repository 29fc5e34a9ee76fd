"""Texts that go beyond the positions a model was made for: rotary ones are computed and go on, others end."""

import copy

import graphs
import pytest
import torch
from sources import build_writer, source
from tiny import RECURRENT, build_model, drafters, make_noisy, prompts, same, taught, taught_prompts
from transformers import AutoModelForCausalLM, CodeGenConfig, GPTJConfig, XGLMConfig

from specdec_fast import fast_generate, last_speculation, static_runner
from specdec_fast.masks import UNBOUNDED, looked_up_positions, positions_of

MADE_FOR = 24
STATIC = {"compile": "static"}


def short(architecture, **changes):
    return build_model(architecture, max_position_embeddings=MADE_FOR, **changes)


def taught_for_few():
    target = copy.deepcopy(taught()[0])
    target.config.max_position_embeddings = MADE_FOR
    return target


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox", "qwen3_next"])
def test_computed_positions(architecture):
    assert (positions_of(short(architecture)), looked_up_positions(short(architecture))) == (MADE_FOR, UNBOUNDED)


def test_looked_up_positions():
    turned = {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 8, "n_positions": MADE_FOR}
    waves = {"d_model": 32, "num_layers": 1, "attention_heads": 4, "max_position_embeddings": MADE_FOR}
    for config, sizes in ((GPTJConfig, turned), (CodeGenConfig, turned), (XGLMConfig, waves)):
        assert looked_up_positions(AutoModelForCausalLM.from_config(config(vocab_size=20, **sizes))) == MADE_FOR
    assert looked_up_positions(short("gpt2")) == looked_up_positions(short("opt")) == MADE_FOR
    assert looked_up_positions(build_writer("whisper")) == 64
    assert looked_up_positions(build_writer("t5")) == UNBOUNDED


@pytest.mark.parametrize("captured", [False, True], ids=["plain", "captured"])
@pytest.mark.parametrize("method", list(drafters()))
def test_rotary_positions_go_on(monkeypatch, method, captured):
    if captured:
        graphs.imitate(monkeypatch)
    statistics = same(taught_for_few(), taught_prompts(3, padded=True), drafters()[method] | STATIC, max_new_tokens=40)
    assert statistics.forward == "static"
    assert statistics.loop == ("host" if method in ("slem", "prompt_lookup") else "device")


@pytest.mark.parametrize("compile", ["auto", "off"])
@pytest.mark.parametrize("method", ["autoregressive", "model", "projection"])
def test_in_the_loop_on_the_host(method, compile):
    own = drafters()[method] | {"compile": compile}
    if method != "autoregressive":
        own["assistant_model"] = copy.deepcopy(own["assistant_model"])
        own["assistant_model"].config.max_position_embeddings = MADE_FOR
    same(taught_for_few(), taught_prompts(3, padded=True), own, max_new_tokens=40)


def sampled(compile):
    """As the law of the loop on the host is tested, the same tokens have it too."""
    settings = {"do_sample": True, "seed": 5, "num_assistant_tokens": 3, "max_new_tokens": 40, "compile": compile}
    return fast_generate(taught_for_few(), **taught_prompts(3, padded=True), **drafters()["tli"], **settings)


def test_sampled_text_beyond_them_is_that_of_the_host_loop(monkeypatch, plain_drafters):
    expected = sampled("off")
    assert torch.equal(sampled("static"), expected)
    monkeypatch.setattr(static_runner, "looked_up_positions", positions_of)
    assert not torch.equal(sampled("static"), expected)


def test_a_clamped_position_is_found(monkeypatch):
    """As it was: passes of fixed shape told a lane the last position it was made for."""
    monkeypatch.setattr(static_runner, "looked_up_positions", positions_of)
    with pytest.raises(AssertionError):
        same(taught_for_few(), taught_prompts(3, padded=True), STATIC, max_new_tokens=40)


@pytest.mark.parametrize("kind", ["gemma3", *(name for name in ("qwen3_next", "falcon_h1") if name in RECURRENT)])
def test_of_a_drafter_too(kind):
    target = short(kind)
    options = {"assistant_model": make_noisy(target, 0.02), "num_assistant_tokens": 3, **STATIC}
    statistics = same(target, prompts(3, padded=True), options, max_new_tokens=40)
    assert statistics.forward == "static" and statistics.accepted
    assert statistics.loop_reason


def test_of_a_decoder_that_reads_a_source():
    writer = build_writer("moonshine")
    writer.config.max_position_embeddings = MADE_FOR
    assert looked_up_positions(writer) == UNBOUNDED
    assert same(writer, source("moonshine", 2), STATIC, max_new_tokens=40).forward == "static"


@pytest.mark.parametrize("method", ["autoregressive", "model"])
def test_looked_up_ones_end_as_in_generate(method):
    target = short("gpt2")
    options = {"method": method} | ({"assistant_model": make_noisy(target)} if method == "model" else {})
    same(target, prompts(2), options | STATIC, max_new_tokens=MADE_FOR - 9 + 1)  # the last token is never read
    assert last_speculation().forward == "static"
    inputs = prompts(2)
    with pytest.raises(IndexError):
        target.generate(**inputs, max_new_tokens=40)
    with pytest.raises(IndexError):
        fast_generate(target, **inputs, **options, **STATIC, max_new_tokens=40)


def test_a_text_that_ends_in_time_runs_by_the_models_own_forward():
    target, inputs = short("gpt2"), prompts(1)
    eos = int(target.generate(**inputs, max_new_tokens=10)[0, -1])
    statistics = same(target, inputs, STATIC, max_new_tokens=40, eos_token_id=eos)
    assert statistics.forward == "eager" and "the 24 positions of GPT2LMHeadModel" in statistics.loop_reason
    assert torch.equal(inputs["input_ids"], prompts(1)["input_ids"])
