"""What a static pair keeps between calls: shapes, compiled passes, captured rounds, and how a call gives it back."""

import gc
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from test_static import on_device
from tiny import (
    build_model,
    drafters,
    make_noisy,
    model,
    noisy,
    prompts,
    same,
    taught,
    taught_prompts,
)
from transformers import CompileConfig

from specdec_fast import (
    compiled,
    device_plan,
    device_session,
    fast_generate,
    host_model,
    last_speculation,
    loop,
    prepare,
)
from specdec_fast.costs import Costs
from specdec_fast.static_runner import StaticRunner

STATIC = {"compile": "static"}


def test_another_prompt_or_batch_finds_the_same_shapes():
    """Counted by a backend that compiles nothing: what Dynamo hands over is what inductor would have to compile."""
    target = build_model("llama")
    drafter, graphs = make_noisy(target), []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(backend=counting)
    own = {"assistant_model": drafter, "num_assistant_tokens": 2, "compile": "inductor"}
    for rows, length, new in ((3, 9, 12), (3, 30, 40), (4, 12, 5)):
        statistics = same(
            target, prompts(rows, padded=True, length=length), own, max_new_tokens=new, compile_config=config
        )
        assert on_device(statistics).forward == "inductor"
        assert len(graphs) == 3  # a drafter's first pass, its others, a scoring pass


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_compiled_passes_give_the_same():
    target = build_model("llama", num_hidden_layers=1)
    own = {"method": "autoregressive", "compile": "inductor"}
    for length in (9, 17):
        assert (
            on_device(same(target, prompts(2, padded=True, length=length), own, max_new_tokens=12)).forward
            == "inductor"
        )
    assert len(compiled._kept[target]) == 1


def test_disable_compile_leaves_passes_as_they_are():
    own = {"assistant_model": noisy(), "compile": "inductor"}
    assert same(model(), prompts(), own, max_new_tokens=4, disable_compile=True).forward == "static"


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_compile_config_is_honoured_or_the_statistics_say_why_not(everywhere):
    config = CompileConfig(backend=lambda graph, inputs: graph.forward)
    config._compile_all_devices = everywhere
    own = {"assistant_model": noisy()}
    statistics = same(model(), prompts(), own, max_new_tokens=4, compile_config=config)
    if everywhere:
        assert on_device(statistics).forward == "inductor"
    else:
        assert (
            statistics.loop_reason == "compile_config is for GPUs, as in generate; compile='inductor' compiles here too"
        )
    assert not same(model(), prompts(), {**own, "compile": "off"}, max_new_tokens=4, compile_config=config).loop_reason


def test_a_pair_prepared_where_shapes_are_fixed_is_ready_for_calls_of_the_same_size():
    target, compiled_graphs = build_model("llama"), []

    def counting(graph, inputs):
        compiled_graphs.append(graph)
        return graph.forward

    config = CompileConfig(backend=counting)
    config._compile_all_devices = True
    own = {"assistant_model": make_noisy(target), "num_assistant_tokens": 2, "compile_config": config}
    pair = prepare(target, **own, do_sample=False, repetitions=1, max_new_tokens=300, pad_token_id=0)
    made, kept = len(compiled_graphs), len(compiled._kept[target])
    pair.generate(**prompts(length=20), max_new_tokens=280)
    assert made and (len(compiled_graphs), len(compiled._kept[target])) == (made, kept)
    assert on_device(last_speculation()).forward == "inductor"


def test_what_was_kept_goes_with_the_models():
    target = build_model("llama")
    drafter = make_noisy(target)
    for rows in (1, 2, 4, 8, 16):
        fast_generate(target, **prompts(rows), assistant_model=drafter, max_new_tokens=4, compile="static")
    kept = compiled._kept[target]
    assert len(kept) == compiled.MOST_KEPT
    assert compiled.kept_bytes(target) == sum(pair.bytes for pair in kept)
    assert last_speculation().static_bytes == kept[-1].bytes
    assert all(not bool(t.any()) for pair in kept for t in pair.target.tensors())  # nobody's text stays behind
    gone = [weakref.ref(item) for item in (target, drafter, kept[0])]
    del kept, drafter
    gc.collect()
    assert not compiled._kept[target]
    del target
    gc.collect()
    assert [reference() for reference in gone] == [None, None, None]


def test_a_busy_pair_is_not_shared():
    target = build_model("llama")
    how = compiled.Compilation()
    first = compiled.check_out(target, None, 1, (32, 32), how)
    second = compiled.check_out(target, None, 1, (32, 32), how)
    assert first is not second
    compiled.hand_back(first)
    assert compiled.check_out(target, None, 1, (32, 32), how) is first


@pytest.mark.parametrize("drafter", ["none", "same"])
def test_a_call_that_fails_before_its_first_round_gives_its_caches_back(monkeypatch, drafter):
    target = build_model("llama")
    own = {"assistant_model": make_noisy(target)} if drafter == "same" else {"method": "autoregressive"}

    def fails(*arguments, **named):
        raise MemoryError("no room for rows")

    for name in ("Rows", "resident_outlook", "lookahead_for"):
        with monkeypatch.context() as patched:
            patched.setattr(loop, name, fails)
            with pytest.raises(MemoryError):
                fast_generate(target, **prompts(), **own, max_new_tokens=4, compile="static")
        assert [pair.busy for pair in compiled._kept[target]] == [False]


@pytest.mark.parametrize("fails_at", range(1, 4))
@pytest.mark.parametrize("method", ["autoregressive", "model", "tli", "slem"])
def test_a_session_that_cannot_be_made_gives_its_caches_back(monkeypatch, method, fails_at):
    """A prepared pair is free again wherever its next call fails before the first round, and works as before."""
    target = make_noisy(taught()[0], 0.0)
    given = {**drafters()[method], "compile": "static", "max_new_tokens": 4}
    inputs = taught_prompts(1)
    pair = prepare(target, **given, do_sample=False, repetitions=1, inputs=inputs["input_ids"])
    assert not any(pair.busy for pair in compiled._kept[target])
    expected = pair.generate(**inputs)
    made = []

    def failing(call):
        def counted(*arguments, **named):
            made.append(call)
            if len(made) == fails_at:
                raise MemoryError("no room")
            return call(*arguments, **named)

        return counted

    with monkeypatch.context() as patched:
        parts = [(device_session, "static_runner_for"), (host_model, "host_runner_for")]
        for owner, name in (*parts, (device_session, "Round"), (StaticRunner, "feed")):
            patched.setattr(owner, name, failing(getattr(owner, name)))
        with pytest.raises(MemoryError, match="no room"):
            pair.generate(**inputs)
    assert not any(pair.busy for pair in compiled._kept[target])
    assert torch.equal(pair.generate(**inputs), expected)
    assert len(compiled._kept[target]) == 1


def test_a_branch_goes_into_the_graph_that_is_being_captured(monkeypatch):
    done = []
    graph = SimpleNamespace(
        begin_capture_to_if_node=lambda wanted: done.append(wanted),
        end_capture_to_conditional_node=lambda: done.append("end"),
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(done))
    compiled.branch(torch.tensor(False), lambda: done.append("run"))  # nothing is captured: it runs
    monkeypatch.setattr(torch.cuda.CUDAGraph, "get_currently_capturing_graph", lambda: graph, raising=False)
    wanted = torch.tensor(False)
    compiled.branch(wanted, lambda: done.append("run"))
    with pytest.raises(ZeroDivisionError):
        compiled.branch(wanted, lambda: 1 // 0)
    assert done == ["run", wanted, "run", "end", wanted, "end"]


@pytest.mark.parametrize("fails", ["nothing", "branches", "everything"])
@pytest.mark.parametrize("method", ["model", "projection"])
def test_a_round_is_captured_with_branches_where_that_can_be(monkeypatch, method, fails):
    """Only rounds that often need fewer steps than they have; and without, where a capture takes none."""
    session, tried = [], []

    def capture(run, device):
        tried.append(session[-1]._writer.branch)
        can = fails == "nothing" or (fails == "branches" and tried[-1] is None)
        return ((None, run()), "") if can else (None, "no graph")

    launch = device_session.Session.launch
    monkeypatch.setattr(
        device_session.Session, "launch", lambda self, gamma: (session.append(self), launch(self, gamma))[1]
    )
    monkeypatch.setattr(device_session, "capture", capture)
    monkeypatch.setattr(device_session, "BRANCHES", True)
    options = {**drafters()[method], **STATIC, "num_assistant_tokens": 3}
    fast_generate(taught()[0], **taught_prompts(1), **options, max_new_tokens=8)
    made = session[-1]._capture(3)
    first = [compiled.branch] if method == "projection" else []
    assert tried == ([*first, None] if fails != "nothing" else first or [None])
    assert (made is None) == (fails == "everything") == bool(session[-1].why_not_captured)
    assert session[-1]._writer.branch is tried[-1]


def test_a_long_prompt_is_read_before_the_first_round_and_charged_to_no_draft(monkeypatch):
    """The adaptive lookahead begins at once behind it: a drafter that the account made read it first would not."""
    monkeypatch.setattr(device_plan, "constant_costs", lambda *_: Costs((1.0,), step=0.05, start=0.0, read=0.05))
    ids = torch.randint(1, 60, (1, 400), generator=torch.Generator().manual_seed(0))
    own = {"assistant_model": noisy("llama"), "compile": "static", "seed": 1}
    fast_generate(model(), ids, max_new_tokens=40, do_sample=False, **own)
    done = last_speculation()
    assert done.loop == "device"
    assert done.drafted > 10


@pytest.mark.parametrize("method", ["model", "slem"])
def test_what_was_kept_in_inference_mode_stays_there(method):
    """Buffers made there cannot be written to outside of it."""
    target, _ = taught("target")
    own, inputs = drafters()[method], taught_prompts(2, padded=True)
    wanted = target.generate(**inputs, max_new_tokens=12, do_sample=False)
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            got = fast_generate(target, **inputs, **own, **STATIC, max_new_tokens=12, do_sample=False)
        assert torch.equal(got, wanted) and last_speculation().forward == "static"
