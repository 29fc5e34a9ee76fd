"""Projection as rounds that live on the device: the host loop's tokens, the target's law exactly, faults seen."""

import contextlib
import itertools

import pytest
import tables
import torch
from enumeration import laws_of
from rounds import Setting, distance, prompts
from test_backends import BACKENDS, generated
from test_projection import PAIRS
from tiny import drafters, make_noisy, same, taught, taught_prompts

from specdec_fast import (
    device_plan,
    device_projection,
    device_session,
    dispatch,
    fast_generate,
    last_speculation,
    ops,
    reference_ops,
    static_cache,
    warmup,
)
from specdec_fast.device_engine import DeviceEngine
from specdec_fast.device_projection import DeviceProjection, device_tables
from specdec_fast.device_round import DeviceWriter
from specdec_fast.token_map import TokenMap

STATIC = {"compile": "static"}
EXACT = 1e-8
RULES = ("token", "block")
OWN = drafters()["projection"]


def on_device(statistics):
    assert statistics.loop == "device", statistics.loop_reason
    return statistics


@pytest.fixture(autouse=True)
def _pairs(monkeypatch):
    for name, pair in PAIRS.items():
        monkeypatch.setitem(tables.PAIRS, name, pair)


# What may follow ------------------------------------------------------------------------------------------------------


def test_what_may_follow_is_what_the_entries_say():
    texts = [(4,), (4, 1), (4, 1, 2), (4, 1, 2), (4, 3), (4, 3, 3, 0), (5, 1), (7,), (4, 1, 0), (5, 2, 2)]
    table = TokenMap.of((tokens, d) for d, tokens in enumerate(texts))
    made = {name: values.tolist() for name, values in device_tables(table).items()}
    said = [texts[d] for d in made["choices"]]
    assert made["index"] == [tokens[0] for tokens in said]
    for k, tokens in enumerate(said):
        for level, token in enumerate(tokens):
            f = made["start"][k] + level
            told = [j for j, other in enumerate(said) if other[:level] == tokens[:level] and len(other) > level]
            alike = [j for j in told if said[j][level] == token]
            assert [*range(made["inner"][f], made["end"][f])] == told
            assert [*range(made["low"][f], made["high"][f])] == alike
            assert made["tokens"][f] == token
            first, number = made["first"][f], made["number"][f]
            lists = {
                made["next_id"][c]: (made["next_low"][c], made["next_high"][c]) for c in range(first, first + number)
            }
            assert len(lists) == number and bool(number) == bool(level)
            for follower, (low, high) in lists.items():
                assert [*range(low, high)] == [j for j in told if said[j][level] == follower]
            assert not level or sum(high - low for low, high in lists.values()) == len(told)


# The same tokens as everywhere ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4])
def test_greedy_output_is_that_of_generate(rows):
    statistics = on_device(same(taught()[0], taught_prompts(rows, padded=True), {**OWN, **STATIC}, max_new_tokens=40))
    assert statistics.method == "projection" and statistics.accepted


SAMPLINGS = (
    {},
    {"temperature": 0.7, "top_k": 9, "top_p": 0.9},
    {"typical_p": 0.9},
    {"assistant_temperature": 0.0},
    {"assistant_confidence_threshold": 0.3},
    {"assistant_temperature": 0.0, "assistant_confidence_threshold": 0.5},
)


def counted(**settings):
    output = fast_generate(taught()[0], **{**OWN, "do_sample": True, "top_k": 0, "seed": 3, **settings})
    statistics = last_speculation()
    counts = statistics.accepted_per_position, statistics.drafted_per_position, statistics.rounds, statistics.committed
    return output.tolist(), counts, statistics


@pytest.mark.parametrize("rule", ["match", *RULES])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_sampled_tokens_are_those_of_the_host_loop(plain_drafters, rule, sampling):
    settings = {"verification": rule, "max_new_tokens": 24, "num_assistant_tokens": 5, **sampling}
    *host, _ = counted(**taught_prompts(3, padded=True), **settings, compile="off")
    *device, statistics = counted(**taught_prompts(3, padded=True), **settings, **STATIC)
    on_device(statistics)
    assert host == device


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_seed_gives_every_backend_the_same_tokens(monkeypatch, backend):
    settings = {"do_sample": True, "seed": 3, "top_k": 0, "num_assistant_tokens": 3, **STATIC}
    found = []
    for name in ("reference", backend):
        monkeypatch.setattr(dispatch, "DEFAULT", name)
        found.append(generated("projection", 2, verification="block", **settings).tolist())
        assert on_device(last_speculation()).drafted
    assert found[0] == found[1]


@pytest.mark.parametrize("place", [0, 3, 7])
def test_eos_at_any_place_of_a_block(place):
    inputs = taught_prompts(2)
    text = taught()[0].generate(**inputs, max_new_tokens=24)[:, inputs["input_ids"].shape[1] :]
    own = {**OWN, "num_assistant_tokens": 6, **STATIC}
    eos = [int(text[0, place]), int(text[1, place + 2])]
    on_device(same(taught()[0], inputs, own, max_new_tokens=24, eos_token_id=eos))


@pytest.mark.parametrize("new", [1, 2, 7])
def test_the_longest_text_ends_inside_a_block(new):
    own = {**OWN, "num_assistant_tokens": 6, **STATIC}
    on_device(same(taught()[0], taught_prompts(2, padded=True), own, max_new_tokens=new))


def test_a_text_that_outgrows_its_caches_moves_to_larger_ones(monkeypatch):
    monkeypatch.setattr(static_cache, "LEAST_CAPACITY", 1)
    monkeypatch.setattr(static_cache, "ALLOWANCE", 2)
    on_device(same(taught()[0], taught_prompts(2, padded=True), {**OWN, **STATIC}, max_new_tokens=50))


def test_a_second_turn():
    target, inputs = taught()[0], taught_prompts(2)
    settings = {"return_dict_in_generate": True, "max_new_tokens": 8}
    theirs, ours = target.generate(**inputs, **settings), fast_generate(target, **inputs, **settings, **OWN, **STATIC)
    on_device(last_speculation())
    longer = torch.cat([theirs.sequences, inputs["input_ids"][:, :3]], 1)
    expected = target.generate(longer, past_key_values=theirs.past_key_values, **settings)
    got = fast_generate(target, longer, past_key_values=ours.past_key_values, **settings, **OWN, **STATIC)
    on_device(last_speculation())
    assert torch.equal(got.sequences, expected.sequences)


def test_shapes_are_fixed_where_rounds_are_compiled(monkeypatch, plain_drafters):
    """Steps and lanes are those of the bucket, wherever drafts end; what is drawn behind them changes nothing."""
    inputs = {**taught_prompts(3, padded=True), "max_new_tokens": 24, "num_assistant_tokens": 5}
    *eager, _ = counted(**inputs, **STATIC)
    made = DeviceProjection.__init__
    monkeypatch.setattr(
        DeviceProjection, "__init__", lambda self, *rest, eager, **more: made(self, *rest, eager=False, **more)
    )
    *fixed, statistics = counted(**inputs, **STATIC)
    on_device(statistics)
    assert eager == fixed


@pytest.fixture
def skipping(monkeypatch):
    """Draft steps of fixed number, passes that no row needs left out as a graph leaves them out; counts both."""
    passes = {"taken": 0, "skipped": 0}

    def branch(wanted, run):
        passes["taken" if bool(wanted) else "skipped"] += 1
        if bool(wanted):
            run()

    made = DeviceWriter.__init__
    monkeypatch.setattr(
        DeviceWriter, "__init__", lambda self, *rest, eager, **more: made(self, *rest, eager=False, **more)
    )
    monkeypatch.setattr(DeviceWriter, "branch", staticmethod(branch))
    return passes


def skipped_and_not(method, rows=1, **settings):
    own = {"tokenizer": None, "assistant_tokenizer": None, **drafters()[method], **settings}
    given = {**taught_prompts(rows, padded=True), **own, "max_new_tokens": 40, "num_assistant_tokens": 5}
    *host, _ = counted(**given, compile="off")
    *device, statistics = counted(**given, **STATIC)
    on_device(statistics)
    return host, device, statistics


CONFIDENT = {"assistant_confidence_threshold": 0.3, "rows": 3}
SKIPPING = {
    "projection": ("projection", {}),
    "confident": ("projection", CONFIDENT),
    "tli": ("tli", CONFIDENT),
    "model": ("model", CONFIDENT),
}


@pytest.mark.parametrize(
    ("method", "settings", "rule"),
    [
        pytest.param("projection", {"do_sample": False}, "match", id="argmax"),  # greedy decoding has one rule
        *(
            pytest.param(*case, rule, id=f"{name}-{rule}")
            for name, case in SKIPPING.items()
            for rule in ["match", *RULES]
        ),
    ],
)
def test_passes_that_no_row_needs_are_skipped_and_change_no_token(method, settings, rule, skipping, plain_drafters):
    host, device, statistics = skipped_and_not(method, verification=rule, **settings)
    assert host == device
    assert skipping["skipped"] and skipping["taken"]
    assert sum(skipping.values()) <= 4 * statistics.rounds  # the first step's is never left out


@pytest.mark.parametrize("method", ["tli", "projection"])
def test_what_was_not_read_is_not_said_to_be(method, skipping, plain_drafters, monkeypatch):
    draft, found = DeviceWriter.draft if method == "tli" else DeviceProjection.draft, []

    def drafting(self, *rest):
        before = skipping["taken"]
        made = draft(self, *rest)
        found.append(((made.own[0] >= 0).tolist(), skipping["taken"] - before))
        return made

    monkeypatch.setattr(DeviceWriter if method == "tli" else DeviceProjection, "draft", drafting)
    skipped_and_not(method, assistant_confidence_threshold=0.3)
    assert all(said == [i < taken for i in range(len(said))] for said, taken in found)
    assert len({taken for _, taken in found}) > 1


def test_a_pass_too_few_is_seen(skipping, plain_drafters, monkeypatch):
    """A planted fault: the pass in front of the last step that is needed is skipped as well."""
    where = DeviceWriter._where
    wanted = []

    def early(self, taken, behind, logits):
        wanted.append(bool(taken))
        return where(self, taken & (len(wanted) % 7 > 0), behind, logits)

    monkeypatch.setattr(DeviceWriter, "_where", early)
    host, device, _ = skipped_and_not("projection")
    assert host != device


def test_a_round_that_is_timed_takes_every_step(skipping, monkeypatch):
    monkeypatch.setattr(warmup, "WORTH_IT", 1)
    target = make_noisy(taught()[0], 0.0)
    timed, time_round = [], device_session.Session.time_round

    def timing(self, gamma):
        before = dict(skipping)
        seconds = time_round(self, gamma, 1)
        timed.append((gamma, skipping["taken"] - before["taken"], skipping["skipped"] - before["skipped"]))
        return seconds

    monkeypatch.setattr(device_session.Session, "time_round", timing)
    on_device(same(target, taught_prompts(2, padded=True), {**OWN, **STATIC}, max_new_tokens=30))
    assert timed == [(0, 0, 0), (1, 0, 0), (5, 8, 0)]


# The law --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_round():
    """Device loops end after one round; what the rows hold then."""
    texts = []

    @torch.no_grad()
    def run(engine):
        engine.launcher.start(engine.rows, engine.shift)
        engine.launcher.tell(engine.rows.tokens, engine.rows.active)
        engine._take(engine.launcher.launch(engine._next_gamma(0)))
        texts.extend(engine.rows.tokens)
        engine.statistics.loop_reason = ""
        return engine.rows.ids[:, : max(engine.rows.length)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceEngine, "run", run)
        yield texts


@pytest.fixture
def enumerated(monkeypatch):
    """The distance of one round's law from the target's, on the operations' reference and numbers of the enumerator."""
    monkeypatch.setattr(dispatch, "DEFAULT", "reference")
    monkeypatch.setattr(static_cache, "LEAST_CAPACITY", 16)
    monkeypatch.setattr(device_plan, "why_not_static", lambda *_: None)  # the trial takes no scores of -inf
    monkeypatch.setattr(device_session, "rows_for", lambda batch: batch)  # a row of nothing would draw numbers too

    def measure(rule, pair, gamma, *, sampling="plain", count=2, kinds=("dense", "dense"), **more):
        setting = Setting("projection", rule, sampling, pair, gamma, kinds=kinds, more={**STATIC, **more})

        def run(texts, seeds, source):
            monkeypatch.setattr(reference_ops, "_philox", source)
            with one_round() as rows:
                setting.generate(texts, seeds, None, gamma + 1)
            on_device(last_speculation())
            return [tuple(row[len(text) :]) for row, text in zip(rows, texts, strict=True)]

        cases = [(prompt,) for prompt in prompts(setting, count)]
        laws = laws_of(run, cases)
        return max(distance(setting, law, case, gamma + 1) for law, case in zip(laws, cases, strict=True))

    return measure


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("pair", "gamma"), [*itertools.product(PAIRS, [1, 2])])
def test_a_round_has_exactly_the_targets_law(pair, gamma, rule, enumerated):
    assert enumerated(rule, pair, gamma) < EXACT


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pair", ["some of both", "inside a character"])
def test_laws_with_holes_certainties_and_ties(pair, rule, enumerated):
    assert enumerated(rule, pair, 2, kinds=("", "")) < EXACT


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("sampling", "more"),
    [
        ("top_p", {}),
        ("plain", {"assistant_confidence_threshold": 0.4}),
        ("plain", {"assistant_temperature": 0.0, "assistant_confidence_threshold": 0.7}),
    ],
    ids=["top_p", "confidence", "certain and confident"],
)
def test_no_knob_of_the_drafter_changes_the_law(sampling, more, rule, enumerated):
    assert enumerated(rule, "long tokens", 2, sampling=sampling, **more) < EXACT


# Planted faults -------------------------------------------------------------------------------------------------------


def changed_law(patch, change):
    with_law = DeviceProjection._with_law
    patch.setattr(DeviceProjection, "_with_law", lambda self, *rest: change(with_law(self, *rest), *rest))


def fault_rest_taken_for_a_fresh_draw(patch):
    changed_law(patch, lambda draft, *_: draft._replace(kind=None, ids=None, log_q=None))


def fault_not_renormalised(patch):
    """The rest as a share of the whole law, not of the texts that go on."""
    sums = ops.range_sums

    def shares(q, low, high):
        masses = sums(q, low, high)
        masses[:, 0] = 1.0
        return masses

    patch.setattr(device_projection.ops, "range_sums", shares)


def fault_rolled_law(patch):
    changed_law(patch, lambda draft, *_: draft._replace(logits=draft.logits.roll(1, -1), logsumexp=None))


def fault_one_entrys_mass(patch):
    """q(d) where the mass of all entries with the same first token belongs."""

    def one(draft, _, steps, where, lane):
        return draft._replace(drawn=torch.stack([drawn.entry for drawn in steps], 1).gather(1, lane))

    changed_law(patch, one)


def fault_dropped_after_a_look(patch):
    draft = DeviceProjection.draft

    def dropping(self, *rest):
        found = draft(self, *rest)
        return found._replace(
            drafted=torch.where(found.drafted < found.tokens.shape[1], found.drafted - 1, found.drafted)
        )

    patch.setattr(DeviceProjection, "draft", dropping)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("fault", "more"),
    [
        (fault_rest_taken_for_a_fresh_draw, {}),
        (fault_not_renormalised, {}),
        (fault_rolled_law, {}),
        (fault_one_entrys_mass, {}),
        (fault_dropped_after_a_look, {"assistant_confidence_threshold": 0.4}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_fault_is_seen(fault, more, rule, enumerated, monkeypatch):
    fault(monkeypatch)
    assert enumerated(rule, "some of both", 2, **more) > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_more_may_be_revealed(rule, enumerated, monkeypatch):
    """The rest of a text as a certainty, for acceptance and residual alike: no fault, and fewer tokens accepted."""
    changed_law(
        monkeypatch,
        lambda draft, *_: draft._replace(
            log_q=torch.where(draft.ids == draft.tokens.unsqueeze(2), 0.0, -torch.inf).double()
        ),
    )
    assert enumerated(rule, "some of both", 2) < EXACT
