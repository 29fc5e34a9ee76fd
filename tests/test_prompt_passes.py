"""Prompts read by passes of fixed shape: as on a GPU, with graphs that a CPU can replay."""

import copy

import graphs
import pytest
import torch
from tiny import build_model, drafters, model, noisy, prompts, same, taught, taught_prompts

from specdec_fast import device_session, fast_generate, host_model, last_speculation, prepare, prompt_passes
from specdec_fast.drafters import slrs
from specdec_fast.prompt_passes import lanes_for_prompt

STATIC = {"compile": "static"}
METHODS = ("autoregressive", "model", "tli", "projection")


@pytest.fixture
def captures(monkeypatch):
    """Everything is captured; yields the shapes of the prompt passes that were."""
    shapes = []

    def captured(runner, lanes, right=prompt_passes._captured):
        shapes.append((runner.model, lanes))
        return right(runner, lanes)

    graphs.imitate(monkeypatch)
    monkeypatch.setattr(prompt_passes, "_captured", captured)
    monkeypatch.setattr(prompt_passes, "LANES", (4, 8))
    return shapes


def test_lanes_are_few_shapes():
    assert [lanes_for_prompt(n, 1, 1e6) for n in (1, 2, 16, 17, 64, 65, 256, 257, 1024, 1025)] == [
        0, 16, 16, 64, 64, 256, 256, 256, 256, 0,
    ]  # fmt: skip
    assert [lanes_for_prompt(300, rows, 1e6) for rows in (4, 8, 16, 64, 65)] == [256, 64, 64, 16, 0]
    # A layer of Llama 8B (436 MB) may be read twice, one of 70B (1.7 GB) once
    assert [lanes_for_prompt(n, 1, 4.36e8) for n in (256, 512, 513)] == [256, 256, 0]
    assert [lanes_for_prompt(n, 1, 1.7e9) for n in (256, 257)] == [256, 0]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_greedy_text_is_that_of_generate(captures, method, rows):
    options = {"method": method} if method == "autoregressive" else {**drafters()[method], "num_assistant_tokens": 3}
    target = taught()[0]
    same(target, taught_prompts(rows, padded=True), {**options, **STATIC}, max_new_tokens=20)
    assert last_speculation().loop == "device"
    assert any(one is target for one, _ in captures)
    assert len({one for one, _ in captures}) == 1 + (method != "autoregressive")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", ["slem", "slrs", "prompt_lookup", "tli"])
def test_in_the_hosts_loop_too(captures, plain_drafters, monkeypatch, method, rows):
    """Longer ones than its passes of fixed shape: what logits are wanted of is left to those."""
    monkeypatch.setattr(host_model, "MOST", 6)
    monkeypatch.setattr(slrs, "lean_model", lambda *_, **__: None)
    options = {**drafters()["slem"], "method": "slrs"} if method == "slrs" else drafters()[method]
    hosted = {"repetition_penalty": 1.2} if method == "tli" else {}
    target = taught()[0]
    same(target, taught_prompts(rows, padded=True), {**options, **STATIC}, max_new_tokens=20, **hosted)
    assert last_speculation().loop == "host"
    assert {one for one, _ in captures} == {target, options.get("assistant_model", target)}


@pytest.mark.parametrize("architecture", ["llama", "qwen2_windows", "gemma3", "gpt2"])
@pytest.mark.parametrize("length", [2, 6, 9, 17, 30])
def test_every_length_and_kind_of_layer(captures, architecture, length):
    options = {"assistant_model": noisy(architecture), "num_assistant_tokens": 3, **STATIC}
    same(model(architecture), prompts(2, padded=True, length=length), options, max_new_tokens=8)
    assert (length > 2) == bool(captures)


@pytest.mark.parametrize("method", ["model", "tli"])
def test_sampled_tokens_of_a_seed_are_those_of_prompts_read_otherwise(captures, plain_drafters, monkeypatch, method):
    settings = {"do_sample": True, "top_k": 0, "seed": 5, "max_new_tokens": 16, "num_assistant_tokens": 3}
    given = {**taught_prompts(3, padded=True), **drafters()[method], **settings, **STATIC}
    found = fast_generate(taught()[0], **given)
    assert captures
    monkeypatch.setattr(device_session, "read_prompts", None)
    assert torch.equal(fast_generate(taught()[0], **given), found)


def test_captured_passes_are_kept_for_the_next_call(captures):
    target, drafter = (copy.deepcopy(one) for one in (model("llama"), noisy("llama")))
    pair = {"assistant_model": drafter, "num_assistant_tokens": 2, **STATIC}
    for length in (7, 8, 5):
        same(target, prompts(1, length=length), pair, max_new_tokens=6)
    assert sorted(lanes for _, lanes in captures) == [4, 4, 8, 8]  # prompts of 6, 7 and 4 tokens are read
    with torch.no_grad():
        for one in (target, drafter):
            for parameter in one.parameters():
                parameter.data = parameter.data.clone()
    same(target, prompts(1, length=7), pair, max_new_tokens=6)
    assert sorted(lanes for _, lanes in captures) == [4, 4, 8, 8, 8, 8], "graphs read the old weights"


def test_a_prepared_pair_has_all_of_them(captures):
    target, drafter = (copy.deepcopy(one) for one in (model("llama"), noisy("llama")))
    call = {"assistant_model": drafter, "do_sample": False, **STATIC}
    prepared = prepare(target, inputs=prompts(1)["input_ids"], repetitions=1, max_new_tokens=12, **call)
    assert sorted(lanes for _, lanes in captures) == [4, 4, 8, 8]
    given = prompts(1, length=19)
    assert torch.equal(prepared.generate(**given), target.generate(**given, max_new_tokens=12, do_sample=False))
    assert len(captures) == 4


def test_a_cache_that_is_gone_on_with_keeps_what_it_holds(captures):
    """The runs before a capture write where nothing is."""
    target = build_model("llama")
    inputs = prompts(1, length=21)["input_ids"]
    expected = target.generate(inputs, max_new_tokens=8, do_sample=False)
    cache = target(inputs[:, :9], use_cache=True).past_key_values
    options = {"method": "autoregressive", "max_new_tokens": 8, "do_sample": False, **STATIC}
    assert torch.equal(fast_generate(target, inputs, past_key_values=cache, **options), expected)
    assert captures


def test_chunks_that_were_asked_for_are_kept_to(captures):
    target = build_model("llama")
    given = {**prompts(1, length=12), "max_new_tokens": 4, "do_sample": False}
    output = fast_generate(target, **given, method="autoregressive", prefill_chunk_size=4, **STATIC)
    assert torch.equal(output, target.generate(**given))
    assert not captures


@pytest.mark.parametrize("fault", ["one column on", "another token", "a pass left out"])
def test_planted_faults_are_noticed(captures, monkeypatch, fault):
    right = prompt_passes._run
    calls = []

    def wrong(runner, tokens, start):
        calls.append(1)
        if fault == "one column on":
            start = [column + 1 for column in start]
        if fault == "another token":
            tokens = [[(token + 1) % 50 for token in row] for row in tokens]
        if fault != "a pass left out" or len(calls) != 2:
            right(runner, tokens, start)

    monkeypatch.setattr(prompt_passes, "_run", wrong)
    target, inputs = taught()[0], taught_prompts(1)
    assert inputs["input_ids"].shape[1] > 9
    expected = target.generate(**inputs, max_new_tokens=20, do_sample=False)
    output = fast_generate(target, **inputs, max_new_tokens=20, do_sample=False, method="autoregressive", **STATIC)
    assert len(calls) > 1
    assert not torch.equal(output, expected)


def test_what_cannot_be_captured_runs_as_it_is(captures, monkeypatch):
    monkeypatch.setattr(prompt_passes, "capture", lambda run, device: (None, "not here"))
    same(model("llama"), prompts(2, padded=True), {"method": "autoregressive", **STATIC}, max_new_tokens=8)
