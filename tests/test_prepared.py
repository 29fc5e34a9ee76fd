"""A prepared pair: ready, the same results, nothing of it outlives the models."""

import gc
import weakref

import graphs
import pytest
import torch
from tiny import PAD, build_model, drafters, make_noisy, model, prompts, taught, taught_prompts

from specdec_fast import Prepared, costs, device_session, fast_generate, last_speculation, methods, prepare, warmup
from specdec_fast.device_session import Session


@pytest.fixture(autouse=True)
def _measured(monkeypatch):
    monkeypatch.setattr(warmup, "observed", costs.observed)
    monkeypatch.setattr(warmup, "WORTH_IT", 64)


def pair():
    target = build_model("llama", seed=3)
    return target, make_noisy(target, 0.2)


@pytest.mark.parametrize("method", ["model", "tli", "slem", "prompt_lookup"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_it_gives_what_fast_generate_gives(method, do_sample):
    target, own, inputs = taught()[0], drafters()[method], taught_prompts(2)
    prepared = prepare(target, batch=2, do_sample=do_sample, repetitions=1, **own)
    call = {**inputs, "do_sample": do_sample, "max_new_tokens": 12, "seed": 3}
    assert torch.equal(prepared.generate(**call), fast_generate(target, **call, **own))
    assert prepared.speculation[do_sample].method == method
    assert prepared.seconds > 0


def test_calls_after_it_measure_nothing(monkeypatch):
    target, drafter = pair()
    prepared = prepare(target, assistant_model=drafter, repetitions=1)
    monkeypatch.setattr(warmup, "measure", None)
    for do_sample in (False, True):
        table = prepared.costs(do_sample=do_sample)
        assert table is not None and table.measured and table.round(3) > table.round(0) > 0
        prepared.generate(prompts()["input_ids"], do_sample=do_sample, max_new_tokens=70, pad_token_id=PAD)
        fast_generate(target, **prompts(), assistant_model=drafter, do_sample=do_sample, max_new_tokens=70)


def test_tables_of_every_method_that_auto_may_take_are_made(monkeypatch):
    built, build = [], warmup.build_drafter
    monkeypatch.setattr(warmup, "build_drafter", lambda plan, *rest: built.append(plan.method) or build(plan, *rest))
    (target, tokenizer), (drafter, own) = taught(), taught("drafter")
    both = {"tokenizer": tokenizer, "assistant_tokenizer": own}
    prepared = prepare(target, assistant_model=drafter, do_sample=True, repetitions=1, **both)
    assert sorted(built) == ["projection", "tli"]
    assert prepared.speculation[True].method in built


def test_rounds_of_every_size_are_captured(monkeypatch):
    """As on a GPU, but that prompts are read as ever."""
    graphs.imitate(monkeypatch)
    launched, launch = [], Session.launch
    monkeypatch.setattr(device_session, "read_prompts", None)
    monkeypatch.setattr(Session, "launch", lambda self, gamma: launched.append(gamma) or launch(self, gamma))
    target, drafter = pair()
    call = {"assistant_model": drafter, "compile": "static", "do_sample": False, "max_new_tokens": 70}
    fast_generate(target, **prompts(), **call)
    assert launched[:8] == [0] * 4 + [1] * 4  # those that are timed, and later what the call needs
    launched.clear()
    prepared = prepare(target, repetitions=1, inputs=prompts()["input_ids"], **call)
    assert launched[:6] == [2, 3, 4, 6, 8, 0]  # what the call before had not captured, then the call
    expected = fast_generate(target, **prompts(), **call | {"compile": "off"})
    assert torch.equal(prepared.generate(**prompts()), expected)


def test_passes_and_drafts_of_the_hosts_loop_are_captured(plain_drafters, monkeypatch):
    monkeypatch.setattr(methods, "asks", lambda *_: False)  # as on a GPU
    made = graphs.imitate(monkeypatch)
    own, inputs = drafters()["slem"], taught_prompts(1)
    call = {"compile": "static", "do_sample": False, "max_new_tokens": 40}
    pair = prepare(taught()[0], **own, **call, repetitions=1, inputs=inputs["input_ids"])
    assert made
    made.clear()
    for ids in (inputs["input_ids"], inputs["input_ids"][:, 3:]):
        for tokens in (None, 1, 2, 4, 6):
            given = {**call, "num_assistant_tokens": tokens}
            expected = fast_generate(taught()[0], ids, **own, **{**given, "compile": "off"})
            assert torch.equal(pair.generate(ids, **given), expected)
    assert not made


def test_settings_are_every_calls_and_can_be_overridden():
    target, drafter = pair()
    prepared = prepare(target, assistant_model=drafter, num_assistant_tokens=2, temperature=0.5, repetitions=1)
    assert prepared.costs() is None  # a lookahead that was given looks at no costs
    prepared.generate(prompts()["input_ids"], max_new_tokens=12, do_sample=True)
    assert len(last_speculation().drafted_per_position) == 2
    prepared.generate(prompts()["input_ids"], max_new_tokens=12, do_sample=True, num_assistant_tokens=4)
    assert len(last_speculation().drafted_per_position) == 4


def test_it_changes_neither_the_generator_nor_the_last_statistics():
    target, drafter = pair()
    fast_generate(target, **prompts(), max_new_tokens=3)
    statistics, state = last_speculation(), torch.get_rng_state()
    prepare(target, assistant_model=drafter, repetitions=1)
    assert last_speculation() is statistics
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_keeps_the_models_alive():
    target, drafter = pair()
    prepared = prepare(target, assistant_model=drafter, repetitions=1)
    fast_generate(target, **prompts(), assistant_model=drafter, max_new_tokens=70)
    gone = weakref.ref(target), weakref.ref(drafter)
    tables = len(costs._kept)
    del target, drafter
    gc.collect()
    assert all(ref() is not None for ref in gone)  # a prepared pair is a pair
    del prepared
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert len(costs._kept) == tables - 1


def test_a_pair_without_a_drafter():
    prepared = prepare(model(), repetitions=1)
    assert isinstance(prepared, Prepared)
    assert prepared.speculation[False].method == "autoregressive" and prepared.costs() is None
    assert torch.equal(
        prepared.generate(**prompts(), max_new_tokens=5), model().generate(**prompts(), max_new_tokens=5)
    )


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        ({"batch": 0}, ValueError, "batch=0 is out of range"),
        ({"repetitions": True}, ValueError, "repetitions=True is out of range"),
        ({"seed": 1}, TypeError, "seed belongs to a single call: give it to generate"),
        ({"method": "fast"}, ValueError, "method='fast' is not known"),
        ({"assistant_model": "smollm"}, TypeError, "assistant_model must be a Transformers model"),
        ({"assistant_model": build_model("gpt2", vocabulary=40)}, ValueError, "pass tokenizer and assistant_tokenizer"),
        ({"max_new_token": 3}, ValueError, "max_new_token"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused(settings, error, named):
    with pytest.raises(error, match=named):
        prepare(model(), **settings)


def test_the_pair_is_not_an_argument_of_a_call():
    prepared = prepare(model(), repetitions=1)
    with pytest.raises(TypeError, match="assistant_model belongs to the prepared pair: leave it out"):
        prepared.generate(**prompts(), assistant_model=model())
