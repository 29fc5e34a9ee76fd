"""Rounds on a GPU: captured as graphs, the same tokens, and no wait for the device inside a round."""

import pytest
import torch
from tiny import build_model, drafters, make_noisy, prompts, taught, taught_prompts

from specdec_fast import compiled, fast_generate, last_speculation
from specdec_fast.attention import for_static_cache
from specdec_fast.device_session import Session
from specdec_fast.fused import Fused
from specdec_fast.host_passes import HostDraft
from specdec_fast.static_runner import StaticRunner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SAMPLED = {"do_sample": True, "top_k": 0, "seed": 3, "max_new_tokens": 24, "num_assistant_tokens": 4}


@pytest.fixture(scope="module")
def pair():
    target = build_model("llama")
    return target.cuda(), make_noisy(target).cuda()


def moved(inputs):
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.mark.parametrize("rows", [1, 4])
def test_rounds_are_captured_and_give_the_tokens_of_generate(pair, rows):
    target, drafter = pair
    inputs = moved(prompts(rows, padded=rows > 1))
    expected = target.generate(**inputs, max_new_tokens=24, do_sample=False)
    for _ in range(2):  # captured, replayed
        got = fast_generate(target, **inputs, max_new_tokens=24, assistant_model=drafter, num_assistant_tokens=4)
        assert torch.equal(got, expected)
    statistics = last_speculation()
    assert (statistics.forward, statistics.loop, statistics.loop_reason) == ("static", "device", "")
    assert any(graph is not None for graph in compiled._kept[for_static_cache(target)[0]][-1].graphs.values())


@pytest.mark.parametrize("rule", ["match", "token", "block"])
@pytest.mark.parametrize("method", ["model", "tli", "projection"])
def test_sampled_tokens_are_those_of_the_host_loop(method, rule):
    target, own = taught()[0], drafters()[method]
    target.cuda()
    own["assistant_model"].cuda()
    try:
        inputs = moved(taught_prompts(3, padded=True))
        found = [
            fast_generate(target, **inputs, **own, **SAMPLED, verification=rule, compile=how).tolist()
            for how in ("off", "static")
        ]
        assert last_speculation().loop == "device"
        assert found[0] == found[1]
    finally:
        target.cpu()
        own["assistant_model"].cpu()


def strict(call):
    """Raises where the call waits for the device."""

    def checked(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return call(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return checked


def check_no_wait(target, given, monkeypatch):
    fast_generate(target, **given)  # captures

    launch, limit = Session.launch, Session.limit

    monkeypatch.setattr(Session, "launch", strict(launch))
    monkeypatch.setattr(Session, "limit", strict(limit))
    fast_generate(target, **given)
    assert last_speculation().loop_reason == ""


@pytest.mark.parametrize("compile", ["static", "inductor"])
def test_no_round_waits_for_the_device(pair, compile, monkeypatch):
    target, drafter = pair
    given = {**moved(prompts(2)), "assistant_model": drafter, "compile": compile, **SAMPLED}
    check_no_wait(target, given, monkeypatch)


@pytest.mark.parametrize("method", ["tli", "projection"])
def test_a_round_waits_for_nothing_but_its_text(method, monkeypatch):
    """The host has to read the report before it can hand over the text; the launch itself waits for nothing."""
    target, own = taught()[0], drafters()[method]
    target.cuda()
    own["assistant_model"].cuda()
    try:
        check_no_wait(target, {**moved(taught_prompts(2)), **own, "compile": "static", **SAMPLED}, monkeypatch)
    finally:
        target.cpu()
        own["assistant_model"].cpu()


def test_passes_of_the_host_loop_are_captured(pair):
    target, _ = pair
    inputs = moved(prompts(2))
    expected = target.generate(**inputs, max_new_tokens=24, do_sample=False)
    for _ in range(2):
        got = fast_generate(target, **inputs, max_new_tokens=24, prompt_lookup_num_tokens=4)
        assert torch.equal(got, expected)
    assert (last_speculation().forward, last_speculation().loop) == ("static", "host")


@pytest.mark.parametrize("method", ["slem", "slrs"])
def test_drafters_of_the_host_loop_are_captured(method):
    target = taught()[0]
    own = {**drafters()["slem"], "method": method}
    inputs = moved(taught_prompts(2, padded=True))
    target.cuda()
    own["assistant_model"].cuda()
    try:
        expected = target.generate(**inputs, max_new_tokens=24, do_sample=False)
        for _ in range(2):
            assert torch.equal(fast_generate(target, **inputs, **own, max_new_tokens=24), expected)
        assert (last_speculation().forward, last_speculation().loop) == ("static", "host")
        kept = [pair for pair in compiled._kept[for_static_cache(own["assistant_model"])[0]] if pair.graphs]
        assert kept and not any(graph is None for pair in kept for graph in pair.graphs.values())
        assert any(key[0] == "draft" for pair in kept for key in pair.graphs) == (method == "slem")
    finally:
        target.cpu()
        own["assistant_model"].cpu()


def test_the_host_loop_waits_for_a_drafts_text_and_for_a_verdict_alone(monkeypatch):
    """What is launched in between waits for nothing: the draft, the target's pass, the rule."""
    target, own = taught()[0], drafters()["slem"]
    given = {**moved(taught_prompts(2)), **own, **SAMPLED}
    target.cuda()
    own["assistant_model"].cuda()

    try:
        fast_generate(target, **given)  # captures
        for owner, name in ((HostDraft, "_run"), (StaticRunner, "score"), (Fused, "verify")):
            monkeypatch.setattr(owner, name, strict(getattr(owner, name)))
        fast_generate(target, **given)
    finally:
        target.cpu()
        own["assistant_model"].cpu()
