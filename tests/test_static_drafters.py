"""Drafters of the loop on the host over static caches: the drafts of the plain loop, and the target's law."""

import graphs
import pytest
import torch
from laws import Reading
from test_distribution import FAULTY, SOUND, exact_law, generate, p_values
from tiny import build_model, drafters, make_noisy, model, same, taught, taught_prompts
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper

from specdec_fast import (
    compiled,
    dispatch,
    fast_generate,
    host_model,
    last_speculation,
    prepare,
    reference_ops,
    static_cache,
    static_runner,
    warmup,
)
from specdec_fast.compiled import Compilation
from specdec_fast.costs import Observed
from specdec_fast.drafters import model as model_drafters
from specdec_fast.drafters import slrs
from specdec_fast.drafters.model import ModelWriter, SameText
from specdec_fast.host_passes import HostDraft, HostPasses
from specdec_fast.lookahead import Adaptive
from specdec_fast.randomness import Philox, Purpose
from specdec_fast.rule import Draws
from specdec_fast.runner import Runner
from specdec_fast.state import Rows
from specdec_fast.static_runner import StaticRunner

STATIC = {"compile": "static"}
WARPERS = {
    "greedy": None,
    "temperature": LogitsProcessorList([TemperatureLogitsWarper(0.7)]),
    "filters": LogitsProcessorList([TemperatureLogitsWarper(1.3), TopKLogitsWarper(9), MinPLogitsWarper(0.05)]),
}


@pytest.fixture(autouse=True)
def no_native_forms(monkeypatch):
    """As on a GPU."""
    for module in (model_drafters, slrs):
        monkeypatch.setattr(module, "lean_model", lambda *_, **__: None)


@pytest.fixture
def tight(monkeypatch):
    monkeypatch.setattr(static_cache, "LEAST_CAPACITY", 1)
    monkeypatch.setattr(static_cache, "ALLOWANCE", 2)


@pytest.fixture
def passes():
    made = HostPasses(Compilation(), torch.device("cpu"), 64, 9)
    yield made
    made.close()


@pytest.fixture
def whole(monkeypatch):
    """How many tokens each draft had that was one function."""
    found, call = [], HostDraft.__call__

    def noted(self, *arguments):
        told = call(self, *arguments)
        if told is not None:
            found.append([len(one.drawn) for one in told])
        return told

    monkeypatch.setattr(HostDraft, "__call__", noted)
    return found


class Seen:
    """A lookahead that ends drafts behind unsure tokens, and writes down what it saw."""

    def __init__(self):
        self.levels = []

    def further(self, row, drafted, confidence):
        raise AssertionError("asked behind a token")

    def stops(self, row):
        sure = [(step + 0.5) / Adaptive.STEPS for step in range(Adaptive.STEPS)]
        return sure, [0.2, 0.1, 0.05]

    def saw(self, row, steps):
        self.levels.append((row, list(steps)))


# The writer -----------------------------------------------------------------------------------------------------------


def written(writer, steps, seeds=(3, 4, 5), kept=lambda number, row: (number + row) % 4):
    """What a writer drafts in rounds of a script: texts of three rows, of which drafts are kept in part."""
    texts = [[5, 6, 7], [9], [1 + 7 * i % 60 for i in range(40)]]
    rows = Rows(torch.ones((3, 1), dtype=torch.long), None, torch.tensor(seeds), 99, 0)
    rows.tokens = texts
    found = []
    for number, limits in enumerate(steps):
        active = [row for row, most in enumerate(limits) if most is not None]
        writer.read(rows, active)
        draws = Draws(Philox(), None, None, keys=([seeds[r] for r in active], [len(texts[r]) for r in active]))
        out = writer.write(active, [limits[r] for r in active], draws)
        entries = out.drawn.tolist() if out.entries is None else out.entries
        drafts = [line[:count] for line, count in zip(entries, out.count, strict=True)]
        found.append(drafts)
        for r, row in enumerate(active):  # some of it is accepted, and another token committed behind it
            texts[row] += [*drafts[r][: kept(number, row)], 7 + number + row]
    return found


SCRIPT = [(3, 3, 3), (4, 1, 2), (None, 2, 5), (1, None, 6), (0, 3, 3), (5, 2, None), (2, 2, 2)]


@pytest.mark.parametrize("sampling", WARPERS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "qwen2_windows"])
def test_drafts_as_one_function_are_those_of_the_loop(architecture, sampling, passes, whole):
    def writer(**own):
        contexts = [SameText() for _ in range(3)]
        return ModelWriter(model(architecture), contexts, warpers=WARPERS[sampling], lawless=True, **own)

    expected = written(writer(), SCRIPT)
    assert not whole
    assert written(writer(passes=passes), SCRIPT) == expected
    assert len(whole) == len(SCRIPT)
    assert any(len(set(line)) > 1 for drafts in expected for line in drafts)


@pytest.mark.parametrize("sampling", WARPERS)
def test_rows_that_sit_a_round_out_keep_what_they_have_read(sampling, passes, whole):
    """Longer drafts than what is read again anyway, all of them accepted."""

    def drafts(**own):
        writer = ModelWriter(model(), [SameText() for _ in range(3)], warpers=WARPERS[sampling], lawless=True, **own)
        return written(writer, [(8, 8, 8), (None, 4, 5), (4, None, 4), (5, 5, None), (5, 5, 5)], kept=lambda *_: 8)

    assert drafts(passes=passes) == drafts()
    assert len(whole) == 5


@pytest.mark.parametrize("own", [{"confidence": 0.3}, {"window": 12}, {"window": 5, "confidence": 0.2}], ids=str)
@pytest.mark.parametrize("sampling", WARPERS)
def test_drafts_end_and_windows_slide_as_in_the_loop(sampling, own, passes, whole):
    def writer(**more):
        return ModelWriter(
            model(), [SameText() for _ in range(3)], warpers=WARPERS[sampling], lawless=True, **own, **more
        )

    assert written(writer(passes=passes), SCRIPT) == written(writer(), SCRIPT)
    assert len(whole) == len(SCRIPT)
    if "confidence" in own:
        drafted, asked = sum(map(sum, whole)), sum(most for limits in SCRIPT for most in limits if most)
        assert drafted < asked


def test_a_lookahead_ends_drafts_by_what_it_says_beforehand(passes, whole):
    watcher = Seen()
    contexts = [SameText() for _ in range(3)]
    writer = ModelWriter(
        model(), contexts, warpers=WARPERS["temperature"], lawless=True, passes=passes, watcher=watcher
    )
    drafts = written(writer, SCRIPT)
    assert [len(line) for _, line in watcher.levels] == [len(draft) for round in drafts for draft in round if draft]
    assert sum(map(sum, whole)) < sum(most for limits in SCRIPT for most in limits if most)


@pytest.mark.parametrize("lawless", [True, False])
@pytest.mark.parametrize("sampling", ["greedy", "temperature"])
def test_captured_drafts_are_those_of_the_loop(sampling, lawless, whole, monkeypatch):
    made = graphs.imitate(monkeypatch)
    passes = HostPasses(Compilation(captured=True), torch.device("cpu"), 64, 9)

    def drafts(seed, **own):
        contexts = [SameText() for _ in range(3)]
        writer = ModelWriter(model(), contexts, warpers=WARPERS[sampling], lawless=lawless, **own)
        return written(writer, SCRIPT, seeds=(seed, 4, 5))

    assert drafts(3, window=12, passes=passes) == drafts(3, window=12)
    passes.close()
    windowed, whole[:] = sum(graph.replays for graph in made), []
    for seed in (3, 8):
        assert drafts(seed, passes=passes) == drafts(seed)
        passes.close()
    assert sum(graph.replays for graph in made) - windowed >= 2 * len(SCRIPT)
    assert len(whole) == (2 * len(SCRIPT) if lawless or sampling == "greedy" else 0)


# Calls ----------------------------------------------------------------------------------------------------------------


def drafter_of(method):
    return {**drafters()["slem"], "method": "slrs"} if method == "slrs" else drafters()[method]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", ["slem", "slrs", "model", "tli", "projection"])
def test_greedy_text_is_that_of_generate(method, rows, captured, tight, whole, monkeypatch):
    made = graphs.imitate(monkeypatch) if captured else []
    passes, score = [], StaticRunner.score
    monkeypatch.setattr(
        StaticRunner, "score", lambda self, *given, **named: (passes.append(self), score(self, *given, **named))[1]
    )
    own = {**drafter_of(method), **STATIC}
    hosted = {} if method in ("slem", "slrs") else {"repetition_penalty": 1.2}  # looks at the text
    statistics = same(taught()[0], taught_prompts(rows, padded=True), own, max_new_tokens=40, **hosted)
    assert (statistics.forward, statistics.loop) == ("static", "host")
    assert {runner.model for runner in passes} == {taught()[0], own["assistant_model"]}
    assert bool(whole) == (method in ("slem", "model"))
    assert bool(made) == captured
    for one in (taught()[0], own["assistant_model"]):
        assert not any(pair.busy for pair in compiled._kept[one])


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("method", ["slem", "slrs", "model", "tli", "projection"])
def test_sampled_text_is_that_of_the_plain_loop(method, captured, monkeypatch):
    """Whose law others test (test_distribution, test_slrs, test_projection)."""
    made = graphs.imitate(monkeypatch) if captured else []
    own = {**drafter_of(method), "num_assistant_tokens": 3, "assistant_window": 40}
    call = {**taught_prompts(3, padded=True), "do_sample": True, "top_k": 0, "max_new_tokens": 20}
    for settings in ({"seed": 2}, {"seed": 7, "temperature": 0.7, "top_p": 0.9}):
        found = fast_generate(taught()[0], **call, **own, **settings, **STATIC)
        assert (last_speculation().forward, last_speculation().loop) == ("static", "host")
        assert torch.equal(found, fast_generate(taught()[0], **call, **own, **settings, compile="off"))
    assert bool(made) == captured


@pytest.mark.parametrize("rule", ["match", "token", "block"])
@pytest.mark.parametrize("method", ["model", "tli"])
@pytest.mark.parametrize("captured", [False, True])
def test_the_output_has_the_targets_law(method, rule, captured, monkeypatch):
    made = graphs.imitate(monkeypatch) if captured else []
    tokens = generate(method, rule, rows=512, seeds=(0, 1), assistant_window=40, **STATIC)
    assert last_speculation().loop == "host" and "assistant_window" in last_speculation().loop_reason
    assert last_speculation().accepted > 100 and bool(made) == captured
    assert min(p_values(tokens, exact_law())) > SOUND


@pytest.mark.parametrize("rule", ["match", "token"])
def test_certain_drafts_have_the_targets_law(rule, whole):
    tokens = generate("slem", rule, rows=512, seeds=(0, 1), **STATIC)
    assert whole and last_speculation().accepted > 100
    assert min(p_values(tokens, exact_law())) > SOUND


@pytest.mark.parametrize("rule", ["token", "block"])
def test_laws_that_the_next_pass_writes_over_are_seen(rule, monkeypatch):
    """What a graph returns is its own memory: a law that is not copied becomes that of the next step."""
    aligned, memory = static_runner.left_align, {}

    def shared(logits, *rest):
        found = aligned(logits, *rest)
        return memory.setdefault(found.shape, torch.empty_like(found)).copy_(found)

    monkeypatch.setattr(static_runner, "left_align", shared)
    tokens = generate("model", rule, rows=512, seeds=(0, 1), assistant_window=40, **STATIC)
    assert min(p_values(tokens, exact_law())) < FAULTY


def test_drafts_that_the_acceptance_knows_are_seen(monkeypatch):
    """Certain drafts under rule token, drawn with the numbers that accept them."""
    monkeypatch.setattr(dispatch, "DEFAULT", "reference")
    swapped = {Purpose.ACCEPT: Purpose.DRAFT}
    monkeypatch.setattr(reference_ops, "_philox", Reading(lambda purpose: swapped.get(purpose, purpose)))
    tokens = generate("slem", "token", rows=2048, seeds=(0, 1), **STATIC)
    assert min(p_values(tokens, exact_law())) < FAULTY


def test_a_drafter_that_cannot_runs_as_it_is_and_the_statistics_say_so():
    own = {**drafters()["slem"], **STATIC}
    own["assistant_model"] = build_model("bloom", vocabulary=len(own["assistant_tokenizer"]))
    statistics = same(taught()[0], taught_prompts(2, padded=True), own, max_new_tokens=12)
    assert statistics.forward == "static"
    assert "the drafter's passes are its own: BloomForCausalLM" in statistics.loop_reason


def test_a_call_that_fails_gives_all_caches_back(monkeypatch):
    monkeypatch.setattr(HostDraft, "__call__", lambda *_: 1 / 0)
    own = {**drafters()["slem"], **STATIC}
    with pytest.raises(ZeroDivisionError):
        fast_generate(taught()[0], **taught_prompts(2), **own, max_new_tokens=12)
    for one in (taught()[0], own["assistant_model"]):
        assert not any(pair.busy for pair in compiled._kept[one])


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_pair_that_cannot_be_made_ready_gives_all_caches_back(fails_at, monkeypatch):
    """Of the target, of the drafter."""
    graphs.imitate(monkeypatch)
    own, capture, asked = {**drafters()["slem"], **STATIC}, host_model.capture_all, []

    def failing(*runners):
        asked.append(runners)
        return 1 / 0 if len(asked) > fails_at else capture(*runners)

    monkeypatch.setattr(host_model, "capture_all", failing)
    with pytest.raises(ZeroDivisionError):
        prepare(taught()[0], **own, repetitions=1, inputs=taught_prompts(1)["input_ids"], max_new_tokens=12)
    for one in (taught()[0], own["assistant_model"]):
        assert not any(pair.busy for pair in compiled._kept.get(one, []))


def test_costs_are_those_of_passes_of_fixed_shape(monkeypatch):
    """Measured apart from the call's own caches, a second time when everything is captured."""
    made = graphs.imitate(monkeypatch)
    monkeypatch.setattr(warmup, "WORTH_IT", 1)
    timed, measure, known = [], warmup.measure, Observed()
    monkeypatch.setattr(warmup, "observed", lambda *_: known)

    def noted(target, drafter, *given, **named):
        runner, before = target(), len(made)
        found = measure(lambda: runner, drafter, *given, **named)
        timed.append((type(runner), type(drafter._writer._runner), len(made) > before))
        return found

    monkeypatch.setattr(warmup, "measure", noted)
    target, own = make_noisy(taught()[0], 0.0), {**drafters()["slem"], **STATIC}
    for _ in range(2):
        same(target, taught_prompts(2), own, max_new_tokens=20)
    assert timed == [(StaticRunner, StaticRunner, True), (StaticRunner, StaticRunner, False)]
    kept = compiled._kept[target]
    assert not any(pair.busy for pair in kept) and len(kept) == 1  # the call's


@pytest.mark.parametrize("settings", [{"use_cache": False}, {}], ids=str)
def test_a_target_that_runs_as_it_is_is_timed_so(settings, monkeypatch):
    monkeypatch.setattr(warmup, "WORTH_IT", 1)
    timed, measure = [], warmup.measure

    def noted(target, *given, **named):
        timed.append(type(target()))
        return measure(target, *given, **named)

    monkeypatch.setattr(warmup, "measure", noted)
    same(
        make_noisy(taught()[0], 0.0), taught_prompts(2), {**drafters()["slem"], **STATIC}, max_new_tokens=20, **settings
    )
    assert set(timed) == {StaticRunner if not settings else Runner}


def test_caches_are_no_longer_than_a_window(monkeypatch):
    made = HostPasses(Compilation(), torch.device("cpu"), 4000, 3000)
    runner = made.runner(model(), 1, window=40)
    assert runner.cache.capacity <= static_cache.capacity_for(40 + 65)
    made.close()


@pytest.mark.parametrize("order", [(0.0, 0.8), (0.8, 0.0)], ids=str)
@pytest.mark.parametrize("method", ["slem", "model"])
def test_graphs_of_an_argmax_are_none_of_a_temperature(method, order, whole, monkeypatch):
    """Where a draft ends by confidence is computed from other numbers; and of a round, whether there is a law."""
    graphs.imitate(monkeypatch)
    own = {**drafters()[method], "num_assistant_tokens": 4, "assistant_confidence_threshold": 0.3, "seed": 3}
    call = {**taught_prompts(2), "do_sample": True, "top_k": 0, "max_new_tokens": 16}
    for temperature in order:
        own["assistant_temperature"] = temperature
        found = []
        for how in ("static", "off"):
            tokens = fast_generate(taught()[0], **call, **own, compile=how).tolist()
            found.append((tokens, last_speculation().drafted, last_speculation().accepted))
        assert found[0] == found[1]
    assert bool(whole) == (method == "slem")
