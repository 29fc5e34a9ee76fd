"""Rounds that live on the device, as plain tensor code on a CPU: the same tokens as everywhere else."""

import copy
import gc
import itertools

import pytest
import torch
from test_continuation import extended, only_new
from test_greedy import assert_same_cache
from tiny import (
    ARCHITECTURES,
    VOCABULARY,
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
from transformers import CompileConfig, LogitsProcessorList, StoppingCriteriaList, TextStreamer

from specdec_fast import (
    compiled,
    device_plan,
    device_session,
    fast_generate,
    last_speculation,
    static_cache,
    static_runner,
    trial,
    warmup,
)
from specdec_fast.attention import NAME, twin
from specdec_fast.lookahead import Adaptive
from specdec_fast.round_ops import pass_places
from specdec_fast.static_runner import StaticRunner, empty_cache, why_not_static

STATIC = {"compile": "static"}
CANNOT = ("bloom", "falcon", "gpt_neo", "mpt")
ABLE = tuple(name for name in ARCHITECTURES if name not in CANNOT)
METHODS = ("autoregressive", "model", "tli", "projection")


@pytest.fixture
def tight(monkeypatch):
    """Caches without a column to spare."""
    monkeypatch.setattr(static_cache, "LEAST_CAPACITY", 1)


def on_device(statistics):
    assert statistics.loop == "device", statistics.loop_reason
    return statistics


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("architecture", ABLE)
def test_greedy_output_is_that_of_generate(architecture, rows):
    options = {"assistant_model": noisy(architecture), "num_assistant_tokens": 4, **STATIC}
    statistics = same(model(architecture), prompts(rows, padded=rows > 1), options, max_new_tokens=24)
    assert on_device(statistics).forward == "static"
    assert 0 < statistics.accepted <= statistics.drafted - (rows > 1)


@pytest.mark.parametrize("architecture", ["llama", "qwen2_windows", "gemma3", "gemma4", "gpt2"])
def test_the_attention_of_this_package_gives_the_same(monkeypatch, architecture):
    monkeypatch.setattr(device_plan, "for_passes", lambda model, _: (twin(model, NAME), "the one for the other"))
    options = {"assistant_model": noisy(architecture), "num_assistant_tokens": 4, **STATIC}
    statistics = same(model(architecture), prompts(4, padded=True), options, max_new_tokens=24)
    assert on_device(statistics).attention == "the one for the other"
    assert statistics.accepted


def test_a_drafters_cache_grows_by_no_more_than_the_call(tight):
    """Its text has another length than the target's, which the first cache was made for."""
    target = copy.deepcopy(taught()[0])
    fast_generate(target, **taught_prompts(2), **drafters()["tli"], **STATIC, max_new_tokens=6)
    held = [pair.drafter.capacity for pair in compiled._kept[target]]
    assert on_device(last_speculation()).drafted and max(held) < static_cache.ALLOWANCE


def test_an_attention_that_takes_no_mask_a_row_is_replaced_for_the_call():
    flash = build_model("llama")
    flash.config._attn_implementation = "flash_attention_2"  # which is not here, so its own passes would fail
    ids = prompts(2)["input_ids"]
    output = fast_generate(flash, ids, do_sample=False, max_new_tokens=12, **STATIC)
    assert torch.equal(output, model("llama").generate(ids, do_sample=False, max_new_tokens=12))
    assert last_speculation().attention == "sdpa attention in the place of flash_attention_2"
    assert flash.config._attn_implementation == "flash_attention_2"


def test_plain_decoding_scores_one_lane_a_round(monkeypatch):
    lanes = []
    score = StaticRunner.score

    def noted(self, tokens, *rest, **named):
        lanes.append(tokens.shape[1])
        return score(self, tokens, *rest, **named)

    why_not_static(model())
    monkeypatch.setattr(StaticRunner, "score", noted)
    fast_generate(model(), **prompts(1), max_new_tokens=6, do_sample=False, **STATIC)
    assert lanes == [1] * 6


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_every_drafter_that_lives_on_the_device(method, rows):
    options = {**drafters()[method], **STATIC}
    on_device(same(taught()[0], taught_prompts(rows, padded=True), options, max_new_tokens=40))


@pytest.mark.parametrize("architecture", CANNOT)
def test_a_model_without_static_caches_runs_as_it_is(architecture):
    options = {"assistant_model": noisy(architecture), **STATIC}
    statistics = same(model(architecture), prompts(2, padded=True), options, max_new_tokens=8)
    assert statistics.loop == "host"
    assert "takes no mask that a static cache needs" in statistics.loop_reason


def test_what_a_static_cache_would_get_wrong_is_found_by_trying(monkeypatch):
    target = build_model("llama")

    def at_nothing(start, *rest):
        columns, *others = pass_places(start, *rest)
        return torch.zeros_like(columns), *others

    monkeypatch.setattr(static_runner, "pass_places", at_nothing)
    assert "other logits" in why_not_static(target)


@pytest.mark.parametrize("fault", ["sees one more", "sees padding", "hides the first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mask_that_is_off_by_one_is_found_by_trying(monkeypatch, dtype, fault):
    target = make_noisy(taught()[0], 0.0).to(dtype)
    assert why_not_static(target) is None
    behind, hidden = {"sees one more": (1, 0), "sees padding": (0, -1), "hides the first": (0, 1)}[fault]

    def masks(config, dtype, cache, columns, windows):
        kv, query = torch.arange(cache.place.capacity), columns.unsqueeze(-1)
        shown = (kv <= query + behind) & (kv >= cache.place.hidden[:, None, None] + hidden)
        return {"full_attention": (shown | (kv == query)).unsqueeze(1)}

    monkeypatch.setattr(static_runner, "_masks", masks)
    assert "other logits" in why_not_static(make_noisy(target, 0.0))


def test_rounding_is_no_other_logits(monkeypatch):
    """Real models move by this much in bfloat16 where sums come in another order; in float32 none does."""
    plain = torch.randn(4, 400, generator=torch.Generator().manual_seed(0))
    noise = 0.07 / 0.8 * torch.randn(4, 400, generator=torch.Generator().manual_seed(1))
    assert trial.distance(plain, plain + noise) > 1
    assert trial.distance(plain.bfloat16(), (plain + noise).bfloat16()) < 1


SAMPLINGS = (
    {},
    {"temperature": 0.7, "top_k": 9, "top_p": 0.9},
    {"min_p": 0.05},
    {"typical_p": 0.9},
    {"assistant_temperature": 0.0},
    {"assistant_confidence_threshold": 0.3},
)


@pytest.mark.parametrize("rule", ["match", "token", "block"])
@pytest.mark.parametrize(
    ("method", "sampling"),
    [("autoregressive", SAMPLINGS[1]), *itertools.product(["model", "tli"], SAMPLINGS)],
    ids=str,
)
def test_sampled_tokens_are_those_of_the_host_loop(plain_drafters, method, rule, sampling):
    found = []
    inputs = taught_prompts(3, padded=True)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 24, "seed": 3, **sampling}
    if method != "autoregressive":
        settings["num_assistant_tokens"] = 4
    for compile in ("off", "static"):
        options = {**drafters()[method], "verification": rule, "compile": compile}
        output = fast_generate(taught()[0], **inputs, **options, **settings)
        statistics = last_speculation()
        counts = statistics.accepted_per_position, statistics.drafted_per_position, statistics.rounds
        found.append((output.tolist(), counts, statistics.committed))
    on_device(statistics)
    assert found[0] == found[1]


# Stops ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(0, 9, 2))
def test_eos_at_every_place_of_a_block(place):
    inputs = prompts()
    eos = int(model().generate(**inputs, max_new_tokens=24)[0, inputs["input_ids"].shape[1] + place])
    own = {"assistant_model": model(), "num_assistant_tokens": 6, **STATIC}
    on_device(same(model(), inputs, own, max_new_tokens=24, eos_token_id=eos))


def test_rows_end_at_different_times():
    inputs = prompts(4, padded=True)
    text = model().generate(**inputs, max_new_tokens=24)[:, inputs["input_ids"].shape[1] :]
    eos = [int(text[row, 3 + 4 * row]) for row in range(4)]
    for drafter in (model(), noisy()):
        own = {"assistant_model": drafter, **STATIC}
        on_device(same(model(), inputs, own, max_new_tokens=24, eos_token_id=eos, pad_token_id=17))


@pytest.mark.parametrize("new", [1, 2, 7])
def test_the_longest_text_ends_inside_a_block(new):
    own = {"assistant_model": model(), "num_assistant_tokens": 6, **STATIC}
    on_device(same(model(), prompts(2, padded=True), own, max_new_tokens=new))


@pytest.mark.parametrize("late", [0, 1])
def test_stop_strings_are_seen_by_the_host(monkeypatch, late):
    read = device_session.Session.__init__

    def lagging(session, *arguments, **settings):
        read(session, *arguments, **settings)
        session.late = late

    monkeypatch.setattr(device_session.Session, "__init__", lagging)
    target, tokenizer = taught()
    inputs = taught_prompts(3, padded=True)
    free = target.generate(**inputs, max_new_tokens=24)
    strings = [tokenizer.decode(free[row, -9:-6]) for row in range(2)]
    settings = {"stop_strings": strings, "max_new_tokens": 24, "tokenizer": tokenizer}
    for eos in (None, int(free[2, -4])):
        expected = target.generate(**inputs, **settings, eos_token_id=eos)
        for method in ("autoregressive", "model"):
            options = {**drafters()[method], **STATIC}
            got = fast_generate(target, **inputs, **options, **settings, eos_token_id=eos)
            on_device(last_speculation())
            assert got.tolist() == expected.tolist()


def test_a_streamer_gets_every_token(capsys):
    target, tokenizer = taught()
    inputs = taught_prompts(1)
    target.generate(**inputs, max_new_tokens=20, streamer=TextStreamer(tokenizer))
    expected = capsys.readouterr().out
    fast_generate(target, **inputs, max_new_tokens=20, streamer=TextStreamer(tokenizer), **drafters()["tli"], **STATIC)
    on_device(last_speculation())
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("late", [1, 2])
def test_reading_late_changes_no_token(monkeypatch, plain_drafters, late):
    inputs = taught_prompts(3, padded=True)
    settings = {"do_sample": True, "max_new_tokens": 24, "seed": 5, "num_assistant_tokens": 3, **STATIC}
    expected = fast_generate(taught()[0], **inputs, **drafters()["model"], **settings)
    made = device_session.Session.__init__

    def lagging(session, *arguments, **options):
        made(session, *arguments, **options)
        session.late = late

    monkeypatch.setattr(device_session.Session, "__init__", lagging)
    got = fast_generate(taught()[0], **inputs, **drafters()["model"], **settings)
    assert torch.equal(got, expected)


# Caches ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["all ids", "new ids"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_a_second_turn(architecture, way):
    target, inputs = model(architecture), prompts(3, padded=True)
    own = {"assistant_model": noisy(architecture), **STATIC}
    settings = {"return_dict_in_generate": True, "max_new_tokens": 8}
    theirs, ours = target.generate(**inputs, **settings), fast_generate(target, **inputs, **settings, **own)
    on_device(last_speculation())
    assert_same_cache(ours.past_key_values, theirs.past_key_values, inputs["attention_mask"])
    second = extended(inputs, theirs.sequences)
    if way == "new ids":
        second = only_new(second, ours.past_key_values)
    expected = target.generate(**second, past_key_values=theirs.past_key_values, **settings)
    got = fast_generate(target, **second, past_key_values=ours.past_key_values, **settings, **own)
    on_device(last_speculation())
    assert torch.equal(got.sequences, expected.sequences)
    assert_same_cache(got.past_key_values, expected.past_key_values, second["attention_mask"])


@pytest.mark.parametrize("architecture", ["llama", "qwen2_windows", "gpt2"])
def test_drafts_beyond_the_last_column_change_nothing(tight, architecture):
    own = {"assistant_model": model(architecture), "num_assistant_tokens": 12, **STATIC}
    for new in (1, 6, 7, 8):  # 9 + 7 columns and one that is nobody's
        on_device(same(model(architecture), prompts(2, padded=True), own, max_new_tokens=new))


def test_a_text_that_outgrows_its_caches_moves_to_larger_ones(tight, monkeypatch, plain_drafters):
    monkeypatch.setattr(static_cache, "ALLOWANCE", 2)
    moved = []
    take = static_cache.StaticCache.take
    monkeypatch.setattr(static_cache.StaticCache, "take", lambda mine, other: (moved.append(1), take(mine, other))[1])
    own = {"assistant_model": noisy(), "num_assistant_tokens": 3, **STATIC}
    on_device(same(model(), prompts(3, padded=True), own, max_new_tokens=60))
    for method in METHODS:
        on_device(
            same(taught()[0], taught_prompts(2, padded=True), {**drafters()[method], **STATIC}, max_new_tokens=60)
        )
    assert len(moved) >= 8


def test_a_row_rolls_back_by_starting_earlier():
    target = model("mistral")
    cache = empty_cache(target, 2, 32)
    runner = StaticRunner(target, cache, 2)
    ids = torch.randint(1, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(4))
    wrong = torch.randint(1, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(5))
    runner.feed([0, 1], ids[:, :6], [6, 4], [1, 1])
    runner.score(wrong, torch.tensor([6, 4]))
    addresses = [t.data_ptr() for t in cache.tensors()]
    got = runner.score(torch.stack([ids[0, 6:10], ids[1, 4:8]]), torch.tensor([6, 4]))
    for row, text in enumerate((ids[:1, :10], ids[1:, :8])):
        plain = target(input_ids=text, use_cache=False).logits[0, -4:]
        torch.testing.assert_close(got[row], plain, rtol=1e-4, atol=1e-4)
    assert addresses == [t.data_ptr() for t in cache.tensors()]


# What cannot live on the device ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"repetition_penalty": 1.3}, "looks at the text"),
        ({"stopping_criteria": StoppingCriteriaList([lambda ids, scores: ids[:, -1] < 0])}, "custom stopping"),
        ({"logits_processor": LogitsProcessorList([lambda ids, scores: scores])}, "looks at the text"),
        ({"return_dict_in_generate": True, "output_scores": True}, "asked for"),
        ({"use_cache": False}, "keeps no cache"),
    ],
    ids=["prefix", "criterion", "processor", "scores", "no cache"],
)
def test_what_needs_the_host_runs_there_and_says_why(settings, reason):
    inputs, own = prompts(2), {"assistant_model": noisy(), **STATIC}
    expected = model().generate(**inputs, max_new_tokens=6, **settings)
    got = fast_generate(model(), **inputs, **own, max_new_tokens=6, **settings)
    ids = (got, expected) if isinstance(got, torch.Tensor) else (got.sequences, expected.sequences)
    assert torch.equal(*ids)
    assert last_speculation().loop == "host"
    assert reason in last_speculation().loop_reason


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", ["slem", "prompt_lookup", "model"])
def test_in_the_hosts_loop_short_passes_have_fixed_shapes(tight, monkeypatch, method, rows):
    monkeypatch.setattr(static_cache, "ALLOWANCE", 2)
    passes, score = [], StaticRunner.score
    monkeypatch.setattr(
        StaticRunner,
        "score",
        lambda self, tokens, start: (passes.append(tuple(tokens.shape)), score(self, tokens, start))[1],
    )
    options = {**drafters()[method], **STATIC}
    penalty = {"repetition_penalty": 1.2} if method == "model" else {}
    statistics = same(taught()[0], taught_prompts(rows, padded=True), options, max_new_tokens=40, **penalty)
    assert (statistics.forward, statistics.loop) == ("static", "host")
    assert len(passes) >= statistics.rounds - 1  # the first one reads the prompt
    assert {rows for rows, _ in passes} == {1 if rows == 1 else 4}


@pytest.mark.parametrize("method", ["model", "slem"])
def test_models_of_double_precision(method, plain_drafters):
    """Scores are judged in float32, as in the loop on the host."""
    target, own = copy.deepcopy(taught()[0]).double(), dict(drafters()[method])
    own |= {"assistant_model": copy.deepcopy(own["assistant_model"]).double(), "num_assistant_tokens": 3}
    for settings in ({"do_sample": False}, {"do_sample": True, "top_k": 0, "seed": 4}):
        given = {**taught_prompts(2, padded=True), **own, **settings, "max_new_tokens": 16}
        assert torch.equal(fast_generate(target, **given, **STATIC), fast_generate(target, **given, compile="off"))
        assert last_speculation().forward == "eager"


def test_scores_that_are_no_law_are_refused():
    broken = build_model("llama")
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    with pytest.raises(RuntimeError, match="row 0: the target's scores"):
        fast_generate(broken, **prompts(), assistant_model=noisy(), max_new_tokens=4, compile="static")


# What is kept ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["take", "move"])
@pytest.mark.parametrize("method", ["tli", "slem"])
def test_a_move_to_larger_caches_that_fails_gives_both_back(tight, monkeypatch, method, fails):
    monkeypatch.setattr(static_cache, "ALLOWANCE", 2)
    target = make_noisy(taught()[0], 0.0)

    def no_room(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(static_cache.StaticCache if fails == "take" else StaticRunner, fails, no_room)
    with pytest.raises(MemoryError, match="no room"):
        fast_generate(target, **taught_prompts(1), **drafters()[method], max_new_tokens=40, **STATIC)
    assert [pair.busy for pair in compiled._kept[target]] == [False, False]


def test_a_first_call_that_takes_long_says_so(monkeypatch, capsys):
    monkeypatch.setattr(compiled, "NOTICE", 0.0)
    with compiled.notice("compiling"):
        gc.collect()
    assert "specdec_fast: compiling (once)" in capsys.readouterr().err


def test_a_lookahead_from_measured_rounds(monkeypatch):
    """Measured on rows of nothing before the prompt is read, once a pair; the output stays what it is."""
    monkeypatch.setattr(warmup, "WORTH_IT", 1)
    timed, time_round = [], device_session.Session.time_round
    monkeypatch.setattr(
        device_session.Session, "time_round", lambda self, gamma: (timed.append(gamma), time_round(self, gamma, 1))[1]
    )
    for method in ("model", "tli"):
        for _ in range(2):
            options = {**drafters()[method], **STATIC}
            on_device(same(taught()[0], taught_prompts(2, padded=True), options, max_new_tokens=30))
    assert timed == [0, 1, 5] * 2


# Where drafts end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9}, {"do_sample": False}], ids=str)
@pytest.mark.parametrize("method", ["model", "tli", "projection"])
def test_drafts_end_where_those_of_the_host_loop_do(plain_drafters, monkeypatch, method, sampling):
    asked = {"num_assistant_tokens": 6, "num_assistant_tokens_schedule": "adaptive"}
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 40, "seed": 3, **asked, **sampling}
    ended = []
    saw = Adaptive.saw

    def note(lookahead, row, steps):
        ended.append((len(steps), lookahead._rows[row].limit))
        saw(lookahead, row, steps)

    monkeypatch.setattr(Adaptive, "saw", note)
    found = []
    for compile in ("off", "static"):
        output = fast_generate(
            taught()[0], **taught_prompts(3, padded=True), **drafters()[method], **settings, compile=compile
        )
        statistics = last_speculation()
        found.append((output.tolist(), statistics.accepted_per_position, statistics.drafted_per_position))
    on_device(statistics)
    assert found[0] == found[1]
    assert any(drafted < limit for drafted, limit in ended), "no draft ended early"


def test_a_draft_of_fixed_cost_is_not_cut_short(monkeypatch):
    told = []
    monkeypatch.setattr(device_session.Session, "stops", lambda *arguments: told.append(arguments))
    config = CompileConfig(backend=lambda graph, inputs: graph.forward)
    own = {"assistant_model": noisy(), "compile": "inductor", "seed": 0}
    on_device(same(model(), prompts(), own, max_new_tokens=12, compile_config=config))
    assert not told
    on_device(same(model(), prompts(), {**own, **STATIC}, max_new_tokens=12))
    assert told
