"""Models that read a source, in passes of fixed shape: passes, rounds on a device, graphs, the law."""

import copy

import graphs
import pytest
import torch
from sources import START, TEXTUAL, WRITERS, build_writer, decoder_of, noisy_writer, source, taught_writer, writer
from test_encoded import plain, read, walk
from test_encoded_calls import begun, p_values
from tiny import PAD, VOCABULARY, make_noisy, model, same
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutput

from specdec_fast import (
    apart,
    compiled,
    decoding_loop,
    fast_generate,
    last_speculation,
    prepare,
    static_cache,
    static_runner,
    static_sources,
)
from specdec_fast.cache import cache_argument, cache_of
from specdec_fast.encoded import why_not_encoded
from specdec_fast.encoding import Encoded
from specdec_fast.host_model import lanes_for
from specdec_fast.static_cache import StaticSource, capacity_for, rows_for
from specdec_fast.static_sources import StaticEncodedRunner, empty_cache, shape_of, why_not_static

STATIC = {"compile": "static"}


def at_fixed_shapes(target, rows, made):
    assert why_not_encoded(target, made) is None and why_not_static(target, made) is None
    cache = empty_cache(target, rows_for(rows), capacity_for(100), made, shape_of(target, made))
    return StaticEncodedRunner(target, cache, rows, encoded=made, room=lambda columns, lanes: lanes_for(lanes))


# Passes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "level"])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_row_gives_what_plain_passes_over_its_text_give(kind, padded):
    assert walk(kind, 3, padded=padded, runner=at_fixed_shapes) < 1e-3


@pytest.mark.parametrize("kind", ["t5", "m2m", "whisper"])
def test_one_lane_of_a_pass(kind):
    made = read(writer(kind), kind, 2)
    runner, ids = at_fixed_shapes(writer(kind), 2, made), torch.arange(3, 21).view(2, 9)
    runner.feed([0, 1], ids[:, :4], [4, 2], [1, 1])
    tokens = torch.stack([ids[0, 4:7], ids[1, 2:5]])
    got = runner.score(tokens, torch.tensor([4, 2]), torch.tensor([2, 0]))
    for row, n in enumerate((7, 3)):
        assert torch.allclose(got[row], plain(writer(kind), ids[row : row + 1, :n], made, row)[-1], atol=1e-3)


def test_long_beginnings_are_read_in_pieces():
    ids = torch.randint(3, VOCABULARY, (2, 300), generator=torch.Generator().manual_seed(0))
    both = {**source("t5", 2, padded=True), "decoder_input_ids": ids}
    statistics = same(writer("t5"), both, {"assistant_model": noisy_writer("t5"), **STATIC}, max_new_tokens=20)
    assert (statistics.loop, statistics.forward) == ("device", "static")


def test_padding_stands_nowhere_in_a_text_whose_positions_count_what_is_read():
    """Positions of M2M100 and its kin hang on the ids of a pass."""
    made = read(writer("m2m"), "m2m", 1)
    runner, ids = at_fixed_shapes(writer("m2m"), 1, made), torch.tensor([[START, 7, 9, PAD, 12, 5]])
    runner.feed([0], ids[:, :2], [2], [1])
    got = runner.feed([0], ids[:, 2:], [4], [4])[0]
    steps = EncodedSteps(writer("m2m"), made)
    steps(ids[:, :2])
    assert torch.allclose(got, torch.cat([steps(ids[:, i : i + 1]) for i in range(2, 6)]), atol=1e-3)


class EncodedSteps:
    """Passes of the model itself behind one another, as ``generate`` makes them."""

    def __init__(self, target, made):
        self._target, self._outputs, self._cache = target, made.of([0]), None

    @torch.no_grad()
    def __call__(self, ids):
        outputs, mask = self._outputs
        name = cache_argument(type(self._target))
        given = {name: self._cache} if self._cache is not None else {}
        found = self._target(
            decoder_input_ids=ids, encoder_outputs=outputs, attention_mask=mask, use_cache=True, **given
        )
        self._cache = cache_of(found)
        return found.logits[0, -1:]


# Planted faults -----------------------------------------------------------------------------------------------------


def of_another_row(patch):
    write = StaticSource.write
    patch.setattr(
        StaticSource,
        "write",
        lambda self, layers, shown: write(self, [(k.flip(0), v.flip(0)) for k, v in layers], shown),
    )


def longer_than_it_is(patch):
    write = StaticSource.write
    patch.setattr(StaticSource, "write", lambda self, layers, shown: write(self, layers, None))


def where_the_first_row_stands(patch):
    given = apart.placed_on_device
    patch.setattr(
        static_runner,
        "placed_on_device",
        lambda columns, *rest: given(columns[:1].expand_as(columns), *rest),
    )


def as_any_token(patch):
    given = apart.placed_on_device
    patch.setattr(
        static_runner,
        "placed_on_device",
        lambda columns, lane, most, tokens, pad: given(columns, lane, most, tokens, None),
    )


@pytest.mark.parametrize("kind", ["t5", "bart", "whisper"])
def test_a_source_of_another_row_is_seen(kind, monkeypatch):
    of_another_row(monkeypatch)
    monkeypatch.setattr(static_sources, "_probe", lambda *_: None)
    assert walk(kind, 3, padded=False, runner=lambda *given: untried(*given)) > 0.05


def untried(target, rows, made):
    cache = empty_cache(target, rows_for(rows), capacity_for(100), made, shape_of(target, made))
    return StaticEncodedRunner(target, cache, rows, encoded=made, room=lambda columns, lanes: lanes_for(lanes))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_columns_behind_a_short_source_that_are_read_are_seen(kind, monkeypatch):
    longer_than_it_is(monkeypatch)
    assert walk(kind, 3, padded=True, runner=untried) > 0.05


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_rows_where_they_do_not_stand_are_seen(kind, monkeypatch):
    where_the_first_row_stands(monkeypatch)
    assert walk(kind, 3, padded=True, runner=untried) > 0.02


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("t5", where_the_first_row_stands),
        ("bart", where_the_first_row_stands),
        ("bart", longer_than_it_is),
        ("t5", of_another_row),
        ("m2m", as_any_token),
    ],
)
def test_the_trial_finds_them_too(kind, fault, monkeypatch):
    target = build_writer(kind, seed=5)
    made = read(target, kind, 2)
    assert why_not_encoded(target, made) is None
    fault(monkeypatch)
    assert "other logits with a static cache" in why_not_static(target, made)


# What cannot be -----------------------------------------------------------------------------------------------------


def reason(target, inputs, **settings):
    expected = target.generate(**inputs, max_new_tokens=12)
    got = fast_generate(target, **inputs, **STATIC, max_new_tokens=12, **settings)
    assert torch.equal(got, expected)
    return last_speculation()


def test_a_replaced_forward():
    target = build_writer("bart", seed=5)
    target.forward = target.forward
    statistics = reason(target, source("bart", 2))
    assert "replaced" in statistics.loop_reason and statistics.forward == "eager"


def test_a_text_that_begins_with_padding_where_that_moves_positions():
    both = {**source("m2m", 2), **begun(2, padded=True)}
    statistics = reason(writer("m2m"), both)
    assert "begins with padding" in statistics.loop_reason and statistics.forward == "eager"
    assert reason(writer("m2m"), {**source("m2m", 2), **begun(2)}).forward == "static"


def test_more_than_states():
    made = read(writer("bart"), "bart", 1)
    outputs = BaseModelOutput(last_hidden_state=made.outputs[0])
    outputs["router"] = torch.zeros(1, 3)
    assert "more than states: router" in why_not_static(writer("bart"), Encoded(outputs, made.mask))


def test_a_source_of_no_numbers_says_nothing_of_the_model():
    target = build_writer("bart", seed=6)
    made = read(target, "bart", 1)
    nothing = Encoded(BaseModelOutput(last_hidden_state=made.outputs[0] * torch.nan), made.mask)
    assert "no numbers" in why_not_static(target, nothing)
    assert why_not_encoded(target, made) is None and why_not_static(target, made) is None


def test_a_drafter_that_cannot_runs_as_it_is():
    drafter = make_noisy(writer("bart"), 0.1)
    drafter.forward = drafter.forward
    statistics = reason(writer("bart"), source("bart", 2), assistant_model=drafter)
    assert statistics.loop == "host" and statistics.forward == "static" and "replaced" in statistics.loop_reason
    assert statistics.accepted


def test_inductor_leaves_such_models_as_they_are():
    got = fast_generate(writer("t5"), **source("t5"), compile="inductor", max_new_tokens=9)
    assert torch.equal(got, writer("t5").generate(**source("t5"), max_new_tokens=9))
    assert last_speculation().forward == "static" and "read a source" in last_speculation().loop_reason


# Masks that are not of what the encoder made ------------------------------------------------------------------------


def test_a_model_that_does_not_look_at_such_a_mask():
    """Whisper's is of the recording, and says nothing to its decoder."""
    made = read(writer("whisper"), "whisper", 2)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 20:] = 0
    heard = Encoded(made.outputs, mask)
    assert shape_of(writer("whisper"), heard) == (20, "", 32)
    assert why_not_encoded(writer("whisper"), heard) is None and why_not_static(writer("whisper"), heard) is None


def test_a_mask_inside_what_the_encoder_made():
    """Moonshine's encoder says which of its states are of the recording."""
    target, columns = writer("moonshine"), source("moonshine")["input_values"].shape[1]
    mask = torch.ones(3, columns, dtype=torch.long)
    mask[1, columns // 4 :] = 0
    inputs = {**source("moonshine", 3), "attention_mask": mask}
    made = target.get_encoder()(**inputs)
    assert not made.attention_mask.all()
    assert shape_of(target, Encoded(made, mask)) == (64, "inside", 32)
    statistics = same(target, inputs, {**own("moonshine", "model"), **STATIC}, max_new_tokens=20)
    assert (statistics.loop, statistics.forward) == ("device", "static")


# Calls --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tight(monkeypatch):
    """Caches that are too small soon."""
    monkeypatch.setattr(static_cache, "LEAST_CAPACITY", 1)
    monkeypatch.setattr(static_cache, "ALLOWANCE", 2)
    monkeypatch.setattr(static_sources, "LEAST_COLUMNS", 1)


@pytest.fixture
def made(monkeypatch):
    return graphs.imitate(monkeypatch)


def own(kind, method):
    if method == "model":
        return {"assistant_model": noisy_writer(kind), "num_assistant_tokens": 4}
    return {"method": method}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", ["autoregressive", "model", "prompt_lookup"])
@pytest.mark.parametrize("kind", WRITERS)
def test_greedy_text_is_generates(kind, method, rows):
    statistics = same(writer(kind), source(kind, rows, padded=True), {**own(kind, method), **STATIC}, max_new_tokens=30)
    assert statistics.forward == "static"
    assert statistics.loop == ("host" if method == "prompt_lookup" else "device")
    if method == "model" and kind != "t5gemma" and rows > 1:
        assert 0 < statistics.accepted < statistics.drafted


@pytest.mark.parametrize("method", ["autoregressive", "model"])
@pytest.mark.parametrize("kind", ["t5", "bart", "whisper"])
def test_caches_grow(kind, method, tight):
    statistics = same(writer(kind), source(kind, 3, padded=True), {**own(kind, method), **STATIC}, max_new_tokens=40)
    assert (statistics.loop, statistics.forward) == ("device", "static")


@pytest.mark.parametrize("processed", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("kind", ["t5", "m2m", "whisper", "t5gemma"])
def test_graphs_read_the_next_calls_sources(kind, processed, made):
    """One pair of caches, one set of graphs, several calls."""
    more = {"repetition_penalty": 1.2} if processed else {}
    for seed in range(3):
        inputs = source(kind, 2, padded=seed == 1, seed=seed)
        before = len(made)
        statistics = same(writer(kind), inputs, {**own(kind, "model"), **STATIC}, max_new_tokens=20, **more)
        assert statistics.loop == ("host" if processed else "device")
        assert processed or statistics.loop_reason == ""
        if seed == 2:
            assert len(made) == before  # all of them are there
    assert sum(graph.replays for graph in made) > 10


@pytest.mark.parametrize("rule", ["match", "token", "block", "gumbel"])
@pytest.mark.parametrize("kind", ["t5", "bart", "trocr"])
def test_sampled_text_is_the_host_loops(kind, rule, made):
    for seed in (3, 8):
        given = {**source(kind, 2, padded=True, seed=seed), **own(kind, "model"), "verification": rule}
        given |= {"do_sample": True, "seed": seed, "top_k": 0, "max_new_tokens": 16}
        static = fast_generate(writer(kind), **given, **STATIC)
        assert last_speculation().forward == "static"
        assert torch.equal(static, fast_generate(writer(kind), **given, compile="off"))


def test_sources_of_nearly_equal_length_share_a_shape(monkeypatch):
    target = build_writer("t5", seed=7)
    for columns in (17, 20, 63, 64, 65):
        ids = torch.randint(3, VOCABULARY, (1, columns))
        same(target, {"input_ids": ids}, {"method": "autoregressive", **STATIC}, max_new_tokens=8)
    kept = compiled._kept[target]
    assert [pair.target.source.shown.shape[1] for pair in kept] == [64, 128]
    assert kept[0].bytes > kept[0].target.source.layers[0].keys.nbytes * 4


def test_a_source_is_forgotten_behind_a_call():
    target = build_writer("bart", seed=7)
    fast_generate(target, **source("bart", 2), **STATIC, method="autoregressive", max_new_tokens=8)
    (pair,) = compiled._kept[target]
    assert not any(layer.keys.any() or layer.values.any() for layer in pair.target.source.layers)
    assert pair.target.source.shown.all()


@pytest.mark.parametrize("method", ["tli", "slem", "projection", "slrs", "auto"])
@pytest.mark.parametrize(
    ("kind", "drafting", "captured"),
    [
        ("t5", "bart", False),
        ("t5", "bart", True),
        ("bart", "t5", False),
        ("bart", "llama", False),
        ("bart", "llama", True),
    ],
)
def test_across_vocabularies(kind, drafting, method, captured, monkeypatch):
    if captured:
        graphs.imitate(monkeypatch)
    (target, tokenizer), (drafter, other) = across(kind, drafting)
    names = {"tokenizer": tokenizer, "assistant_tokenizer": other, "assistant_model": drafter, "method": method}
    inputs = tokenizer(["the quick brown fox", "of"], return_tensors="pt", padding=True, add_special_tokens=False)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    statistics = same(target, inputs, {**names, "num_assistant_tokens": 4, **STATIC}, max_new_tokens=25)
    assert statistics.forward == "static"
    assert statistics.loop == ("host" if method in ("slem", "slrs", "auto") else "device")
    sampled = {**inputs, **names, "do_sample": True, "seed": 5, "max_new_tokens": 15, "num_assistant_tokens": 3}
    found = [fast_generate(target, **sampled, compile=how).tolist() for how in ("static", "off")]
    assert found[0] == found[1]


def across(kind, drafting):
    from tiny import drafters

    if drafting != "llama":
        return taught_writer("target", kind), taught_writer("drafter", drafting)
    parties = drafters()["tli"]
    return (
        (build_writer(kind, vocabulary=len(parties["tokenizer"])), parties["tokenizer"]),
        (parties["assistant_model"], parties["assistant_tokenizer"]),
    )


# Whisper ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_a_decoder_alone_drafts_for_its_encoder(rows, made):
    own = {"assistant_model": decoder_of(), "num_assistant_tokens": 4, **STATIC}
    statistics = same(writer("whisper"), source("whisper", rows), own, max_new_tokens=30)
    assert (statistics.loop, statistics.loop_reason) == ("device", "") and statistics.accepted


@pytest.mark.parametrize("rows", [1, 3])
def test_transcripts_with_times_in_windows(rows, made):
    target = copy.deepcopy(writer("whisper"))
    target.generation_config.no_timestamps_token_id = 40
    own = {"assistant_model": make_noisy(target, 0.05), "num_assistant_tokens": 4, **STATIC}
    long = torch.randn(rows, 8, 100, generator=torch.Generator().manual_seed(0))
    inputs = {"input_features": long, "attention_mask": torch.ones(rows, 100, dtype=torch.long)}
    statistics = same(target, {**inputs, "return_timestamps": True}, own, max_new_tokens=12)
    assert statistics.forward == "static" and statistics.accepted
    assert sum(graph.replays for graph in made) > 10


@pytest.mark.parametrize("rows", [1, 3])
def test_padding_before_a_text_whose_positions_generate_counts(rows):
    inputs, more = source("whisper", rows), begun(rows, padded=True)
    target = writer("whisper")
    generate = super(type(target), target).generate.__func__
    expected = generate(target, **inputs, **more, max_new_tokens=25)
    loop = decoding_loop(assistant_model=noisy_writer("whisper"), num_assistant_tokens=4, **STATIC)
    got = generate(target, **inputs, **more, max_new_tokens=25, custom_generate=loop)
    assert torch.equal(got, expected) and last_speculation().accepted
    assert (last_speculation().loop, last_speculation().forward) == ("device", "static")


# Beginnings, caches, attention, pairs -------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["level", "padded"])
@pytest.mark.parametrize("kind", [*(kind for kind in TEXTUAL if kind != "m2m"), "moonshine"])
def test_the_decoders_text_may_be_begun(kind, padded):
    text = begun(3, padded=padded)
    first = begun(1)["decoder_input_ids"]  # where all rows began with padding, generate would put a mark in front
    text["decoder_input_ids"][0], text["decoder_attention_mask"][0] = first[0], 1
    both = {**source(kind, 3, padded=True), **text}
    statistics = same(writer(kind), both, {"assistant_model": noisy_writer(kind), **STATIC}, max_new_tokens=25)
    assert statistics.accepted and statistics.forward == "static"


@pytest.mark.parametrize("how", [("static", "static"), ("off", "static"), ("static", "off")])
@pytest.mark.parametrize("processed", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("kind", ["t5", "bart", "moonshine"])
def test_a_cache_is_handed_back_and_gone_on_with(kind, processed, how):
    target, inputs = writer(kind), source(kind, 3, padded=True)
    more = {"repetition_penalty": 1.2} if processed else {}
    drafting = {"assistant_model": noisy_writer(kind), "num_assistant_tokens": 3}
    first = fast_generate(
        target, **inputs, **drafting, **more, max_new_tokens=9, return_dict_in_generate=True, compile=how[0]
    )
    kept, longer = cache_of(first), first.sequences
    text = {"decoder_input_ids": longer, "decoder_attention_mask": torch.ones_like(longer)}
    expected = target.generate(**inputs, **more, **text, max_new_tokens=11)
    assert kept.get_seq_length() == longer.shape[1] - 1
    second = {**text, cache_argument(type(target)): kept, "compile": how[1]}
    got = fast_generate(target, **inputs, **drafting, **more, **second, max_new_tokens=11)
    assert torch.equal(got, expected)


def test_an_attention_that_takes_no_mask_a_row_is_left():
    AttentionInterface.register("of_its_own", sdpa_attention_forward)
    AttentionMaskInterface.register("of_its_own", sdpa_mask)
    target = copy.deepcopy(writer("bart"))
    target.set_attn_implementation("of_its_own")
    statistics = same(target, source("bart", 2, padded=True), {**own("bart", "model"), **STATIC}, max_new_tokens=15)
    assert statistics.attention == "sdpa attention in the place of of_its_own" and statistics.loop == "device"
    assert target.config._attn_implementation == "of_its_own"


@pytest.mark.parametrize("kind", ["bart", "t5", "t5gemma"])
def test_eager_attention(kind):
    target = copy.deepcopy(writer(kind))
    target.set_attn_implementation("eager")
    statistics = same(target, source(kind, 2, padded=True), {**own(kind, "model"), **STATIC}, max_new_tokens=15)
    assert statistics.loop == "device"


def test_half_precision():
    target = copy.deepcopy(writer("t5")).to(torch.bfloat16)
    text = fast_generate(
        target, **source("t5", 2), assistant_model=make_noisy(target, 0.02), max_new_tokens=20, **STATIC
    )
    assert text.shape == (2, 21) and last_speculation().accepted and last_speculation().loop == "device"


def test_a_prepared_pair(made):
    target = build_writer("t5", seed=8)
    pair = prepare(target, assistant_model=make_noisy(target, 0.1), max_new_tokens=24, do_sample=False, **STATIC)
    before, inputs = len(made), {"input_ids": torch.randint(3, VOCABULARY, (1, 30))}
    got = pair.generate(**inputs, max_new_tokens=24)
    assert torch.equal(got, target.generate(**inputs, max_new_tokens=24))
    assert len(made) == before and last_speculation().loop == "device"


def test_a_drafter_of_the_text_alone(made):
    own = {"assistant_model": model("llama"), "num_assistant_tokens": 3, **STATIC}
    statistics = same(writer("t5"), source("t5", 2), own, max_new_tokens=20)
    assert (statistics.loop, statistics.loop_reason) == ("device", "") and statistics.drafted


# The law ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Caches of thousands of rows."""
    monkeypatch.setattr(static_cache, "LEAST_CAPACITY", 16)


@pytest.mark.parametrize(
    ("kind", "method", "rule"),
    [("t5", "model", "match"), ("t5", "tli", "block"), ("bart", "model", "block"), ("bart", "tli", "token")],
)
def test_the_output_has_the_targets_law(kind, method, rule, small):
    assert min(p_values(kind, method, rule, seed=1, **STATIC)) > 1e-4
    assert (last_speculation().loop, last_speculation().forward) == ("device", "static")


def test_rejected_tokens_that_stay_change_the_law(monkeypatch, small):
    p_values("bart", "model", "token", **STATIC)  # the trial would find it

    def stays(self, keys, values, *rest, **more):
        columns = self.place.lanes[:, None, :, None]
        for buffer, states in ((self.keys, keys), (self.values, values)):
            place = columns.expand(states.shape)
            old = buffer.gather(2, place)
            buffer.scatter_(2, place, torch.where(old != 0, old, states))
        return self.keys, self.values

    monkeypatch.setattr(static_cache.StaticLayer, "update", stays)
    assert min(p_values("bart", "model", "token", **STATIC)) < 1e-6
