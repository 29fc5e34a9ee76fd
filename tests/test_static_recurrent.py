"""Models whose layers keep a state, in passes of fixed shape: passes and rollbacks, graphs, calls, the law."""

import copy
import weakref

import graphs
import pytest
import torch
from test_recurrent import forgets, known, skips, walk
from test_recurrent_calls import noisy, p_values, recurrent_pair
from tiny import RECURRENT, build_model, make_noisy, model, prompts, same, taught

from specdec_fast import (
    compiled,
    fast_generate,
    last_speculation,
    prepare,
    recurrent,
    static_cache,
    static_runner,
    static_runners,
)
from specdec_fast.cache import cache_argument, cache_of
from specdec_fast.states import TENSORS, Row, state_of
from specdec_fast.static_cache import capacity_for, rows_for
from specdec_fast.static_recurrent import LONGEST, StaticRecurrentRunner, StaticUnit, empty_cache, why_not_static

STATIC = {"compile": "static"}


@pytest.fixture
def made(monkeypatch):
    return graphs.imitate(monkeypatch)


@pytest.fixture
def tight(monkeypatch):
    """Caches that are too small soon."""
    monkeypatch.setattr(static_cache, "LEAST_CAPACITY", 1)
    monkeypatch.setattr(static_cache, "ALLOWANCE", 2)


def at_fixed_shapes(target, rows, visible=None, columns=600):
    return StaticRecurrentRunner(
        target, empty_cache(target, rows_for(rows), capacity_for(columns)), rows, visible=visible
    )


# Passes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "level"])
@pytest.mark.parametrize("architecture", RECURRENT)
def test_a_row_gives_what_plain_passes_over_its_text_give(architecture, padded):
    assert why_not_static(known(architecture)) is None
    assert walk(known(architecture), 3, padded=padded, runner=at_fixed_shapes) < 1e-3


def test_passes_have_as_many_lanes_as_tokens_and_long_ones_are_the_models_own(monkeypatch):
    found, score = [], StaticRecurrentRunner.score
    monkeypatch.setattr(
        StaticRecurrentRunner,
        "score",
        lambda self, tokens, start: found.append(tokens.shape) or score(self, tokens, start),
    )
    runner, ids = at_fixed_shapes(model("lfm2"), 3), torch.ones((3, LONGEST + 1), dtype=torch.long)
    for n in (7, 1, 5, LONGEST, LONGEST + 1):
        runner.feed(range(3), ids[:, :n], [n] * 3, [1] * 3)
    assert [tuple(shape) for shape in found] == [(4, 1), (4, 5), (4, LONGEST)]  # the first reads a text from its start


# Planted faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [forgets, skips])
@pytest.mark.parametrize("architecture", ["lfm2", "qwen3_5", "falcon_h1"])
def test_a_state_that_is_not_rolled_back_is_seen(architecture, fault, monkeypatch):
    monkeypatch.setattr(Row, "go_back", fault)
    assert walk(model(architecture), 3, padded=False, runner=at_fixed_shapes) > 0.05


def of_another_row(patch):
    hold = StaticUnit.hold
    patch.setattr(StaticUnit, "hold", lambda self, numbers, rows: hold(self, numbers, list(rows)[::-1]))


def not_given_back(patch):
    patch.setattr(StaticUnit, "give", lambda self, numbers, rows: None)


def columns_of_another_row(patch):
    score = StaticRecurrentRunner.score
    patch.setattr(StaticRecurrentRunner, "score", lambda self, tokens, start: score(self, tokens, start.flip(0)))


def given_to_rows_that_sat_out(patch):
    give = StaticUnit.give
    patch.setattr(StaticUnit, "give", lambda self, numbers, rows: give(self, range(len(self.own)), self.own))


def lanes_that_see_too_little(patch):
    masks = static_runner._masks

    def short(config, dtype, cache, columns, windows):
        made = masks(config, dtype, cache, columns, windows)
        for mask in made.values():
            mask[:, :, 4:, :2] = False
        return made

    patch.setattr(static_runner, "_masks", short)


def written_over_rows_that_sat_out(patch):
    score = StaticRecurrentRunner.score

    def elsewhere(self, tokens, start):
        return score(self, tokens, torch.where((tokens == 0).all(1), 0, start))

    patch.setattr(StaticRecurrentRunner, "score", elsewhere)


FAULTS = [
    of_another_row,
    not_given_back,
    columns_of_another_row,
    given_to_rows_that_sat_out,
    lanes_that_see_too_little,
    written_over_rows_that_sat_out,
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("architecture", ["lfm2", "qwen3_5", "falcon_h1"])
def test_states_and_columns_where_they_do_not_belong_are_seen(architecture, fault, monkeypatch):
    fault(monkeypatch)
    assert walk(model(architecture), 3, padded=False, runner=at_fixed_shapes) > 0.05
    target = build_model(architecture, seed=3)
    assert "other logits with a static cache" in why_not_static(target)


def test_states_that_a_capture_has_moved_on_are_seen(made, monkeypatch):
    """It runs a pass several times."""
    given = {**prompts(2), "max_new_tokens": 12}
    expected = model("lfm2").generate(**given)
    own = {"assistant_model": noisy("lfm2"), "num_assistant_tokens": 3, **STATIC}
    assert torch.equal(fast_generate(model("lfm2"), **given, **own), expected) and made
    monkeypatch.setattr(compiled, "_kept", weakref.WeakKeyDictionary())
    monkeypatch.setattr(StaticUnit, "states", lambda self: [])
    assert not torch.equal(fast_generate(model("lfm2"), **given, **own), expected)


# Calls --------------------------------------------------------------------------------------------------------------


def own(architecture, method):
    if method == "model":
        return {"assistant_model": noisy(architecture), "num_assistant_tokens": 4, **STATIC}
    return {"method": method, **STATIC}


CALLS = [
    *((architecture, "model", rows) for architecture in RECURRENT for rows in (1, 3)),
    *((architecture, "autoregressive", 3) for architecture in RECURRENT),
    *((architecture, "prompt_lookup", rows) for architecture in ("lfm2", "qwen3_5") for rows in (1, 3)),
]


@pytest.mark.parametrize(("architecture", "method", "rows"), CALLS)
def test_greedy_text_is_generates(architecture, method, rows, made):
    target = known(architecture)
    for seed in (0, 1):  # graphs of the first call read the second one's states
        statistics = same(target, prompts(rows, padded=True, seed=seed), own(architecture, method), max_new_tokens=20)
    assert (statistics.loop, statistics.forward) == ("host", "static")
    assert "keeps a state" in statistics.loop_reason or method == "prompt_lookup"
    assert sum(graph.replays for graph in made) > 15


@pytest.mark.parametrize("method", ["autoregressive", "model"])
@pytest.mark.parametrize("architecture", ["lfm2", "qwen3_5", "falcon_h1"])
def test_caches_grow(architecture, method, tight):
    statistics = same(model(architecture), prompts(3, padded=True), own(architecture, method), max_new_tokens=40)
    assert statistics.forward == "static"


@pytest.mark.parametrize("rule", ["match", "token", "block", "gumbel"])
@pytest.mark.parametrize("architecture", ["lfm2", "qwen3_5"])
def test_sampled_text_is_the_host_loops(architecture, rule, made):
    for seed in (3, 8):
        given = {**prompts(2, padded=True), "assistant_model": noisy(architecture), "verification": rule}
        given |= {"do_sample": True, "seed": seed, "top_k": 0, "max_new_tokens": 16, "num_assistant_tokens": 3}
        static = fast_generate(model(architecture), **given, **STATIC)
        assert torch.equal(static, fast_generate(model(architecture), **given, compile="off"))


@pytest.mark.parametrize("sides", ["target", "drafter", "both"])
@pytest.mark.parametrize("method", ["tli", "slem", "projection", "slrs"])
def test_across_vocabularies(method, sides, made):
    target, own = recurrent_pair("lfm2")[0] if sides != "drafter" else taught("target")
    drafter, others = recurrent_pair("lfm2")[1] if sides != "target" else taught("drafter")
    options = {"assistant_model": drafter, "tokenizer": own, "assistant_tokenizer": others, "method": method}
    texts = ["The old lighthouse keeper counted", "One evening in October he"]
    inputs = own(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    statistics = same(target, inputs, {**options, "num_assistant_tokens": 4, **STATIC}, max_new_tokens=40)
    assert 0 < statistics.accepted < statistics.drafted
    assert (statistics.loop, statistics.forward) == ("host", "static")
    assert "keeps a state" in statistics.loop_reason or method in ("slem", "slrs")


@pytest.mark.parametrize("how", [("static", "static"), ("off", "static"), ("static", "off")])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("architecture", ["lfm2", "qwen3_5", "falcon_h1"])
def test_a_cache_is_handed_back_and_gone_on_with(architecture, rows, how):
    target, inputs = model(architecture), prompts(rows, padded=True)
    drafting = {"assistant_model": noisy(architecture), "num_assistant_tokens": 4}
    both = {"max_new_tokens": 14, "return_dict_in_generate": True}
    first = fast_generate(target, **inputs, **both, **drafting, compile=how[0])
    longer = torch.cat([first.sequences, prompts(rows, length=4, seed=3)["input_ids"]], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, longer.shape[1] - 9), value=1)
    second = {"input_ids": longer, "attention_mask": mask, "max_new_tokens": 14}
    expected = target.generate(**second)
    given = {cache_argument(type(target)): cache_of(first), "compile": how[1]}
    assert torch.equal(fast_generate(target, **second, **drafting, **given), expected)


def test_prompts_that_are_alike_are_read_once():
    """And what was read of them is that of all."""
    text = prompts(1, length=40)
    own = {"assistant_model": noisy("lfm2"), "num_assistant_tokens": 3, **STATIC}
    given = {**text, "do_sample": True, "seed": [5, 6, 7], "top_k": 0, "num_return_sequences": 3, "max_new_tokens": 16}
    together = fast_generate(model("lfm2"), **given, **own)
    for row, seed in enumerate(given["seed"]):
        alone = fast_generate(model("lfm2"), **{**given, "seed": [seed], "num_return_sequences": 1}, **own)
        assert torch.equal(together[row], alone[0])
    assert len(set(map(tuple, together.tolist()))) == 3


def test_a_drafter_with_states_beside_a_target_without(made):
    drafting = {"assistant_model": model("lfm2"), "num_assistant_tokens": 4, **STATIC}
    statistics = same(model("llama"), prompts(3, padded=True), drafting, max_new_tokens=20)
    assert (statistics.loop, statistics.forward) == ("host", "static")
    assert statistics.loop_reason == "the drafter: Lfm2ForCausalLM keeps a state, which the host rolls back"
    assert statistics.drafted and sum(graph.replays for graph in made) > 20


def test_rows_that_cannot_share_passes(monkeypatch):
    target = build_model("lfm2", seed=4)
    monkeypatch.setattr(recurrent, "_shares", lambda *_: False)
    statistics = same(target, prompts(2), {"method": "autoregressive", **STATIC}, max_new_tokens=9)
    assert statistics.forward == "eager" and "cannot share passes" in statistics.loop_reason


@pytest.mark.parametrize("architecture", ["llama", "lfm2"])
def test_calls_under_autocast_have_caches_of_their_own(architecture):
    target, given = build_model(architecture, seed=7), {**prompts(2), "method": "autoregressive", "max_new_tokens": 9}
    plain = fast_generate(target, **given, **STATIC)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast_generate(target, **given, **STATIC).shape == plain.shape
    assert torch.equal(fast_generate(target, **given, **STATIC), plain)


def test_inductor_leaves_such_models_as_they_are():
    given = {"assistant_model": noisy("lfm2"), "num_assistant_tokens": 3, "compile": "inductor"}
    statistics = same(model("lfm2"), prompts(2), given, max_new_tokens=9)
    assert statistics.forward == "static" and "not compiled" in statistics.loop_reason


def test_a_prepared_pair(made):
    target = build_model("lfm2", seed=5)
    pair = prepare(target, assistant_model=make_noisy(target, 0.1), max_new_tokens=24, do_sample=False, **STATIC)
    before = len(made)
    got = pair.generate(prompts(1)["input_ids"], max_new_tokens=24)
    assert torch.equal(got, target.generate(prompts(1)["input_ids"], max_new_tokens=24))
    assert len(made) == before


def test_what_is_kept_holds_nothing_of_a_text():
    target = build_model("qwen3_5", seed=6)
    fast_generate(target, **prompts(2), **STATIC, method="autoregressive", max_new_tokens=8)
    fast_generate(target, **prompts(2), **STATIC, method="autoregressive", max_new_tokens=1)  # the model's own pass
    (pair,) = compiled._kept[target]
    assert not any(tensor.any() for tensor in pair.target.tensors())
    layers = [state_of(layer) for layer in pair.target.stateful]
    assert not any(t.any() for state in layers for name in TENSORS for t in state[name].values())
    assert pair.target.states() and all(not row.tokens and not row.marks for row in pair.target.own)
    assert last_speculation().static_bytes == pair.bytes > sum(state.nbytes for state in pair.target.states())


def test_attention_of_an_implementation_without_masks_a_row():
    target = copy.deepcopy(model("qwen3_5"))
    target.set_attn_implementation("eager")
    statistics = same(target, prompts(3, padded=True), own("qwen3_5", "model"), max_new_tokens=16)
    assert statistics.forward == "static"


def test_the_dispatchers_tell_models_apart():
    assert isinstance(static_runners.empty_cache(model("lfm2"), 2, 32), StaticUnit)
    assert not isinstance(static_runners.empty_cache(model("llama"), 2, 32), StaticUnit)
    assert static_runners.why_not_rounds(model("llama")) is None


@pytest.mark.parametrize("architecture", ["llama", "lfm2"])
def test_a_model_on_several_devices_runs_as_it_is(architecture):
    target = build_model(architecture, seed=8)
    assert static_runners.why_not_static(target) is None
    target.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    assert "several devices" in static_runners.why_not_static(target)


# The law ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Caches of thousands of rows."""
    monkeypatch.setattr(static_cache, "LEAST_CAPACITY", 16)


@pytest.mark.parametrize(
    ("architecture", "method", "rule"),
    [("qwen3_5", "model", "match"), ("qwen3_5", "tli", "block"), ("lfm2", "model", "block"), ("lfm2", "tli", "token")],
)
def test_the_output_has_the_targets_law(architecture, method, rule, small):
    assert min(p_values(architecture, method, rule, seed=1, **STATIC)) > 1e-4
    assert last_speculation().forward == "static"


@pytest.mark.parametrize("architecture", ["lfm2", "qwen3_5"])
def test_a_state_that_keeps_rejected_tokens_changes_the_law(architecture, monkeypatch, small):
    p_values(architecture, "model", "token", **STATIC)  # the trials would find it
    monkeypatch.setattr(Row, "go_back", forgets)
    assert min(p_values(architecture, "model", "token", **STATIC)) < 1e-6
