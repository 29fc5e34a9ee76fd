"""Rounds on the device have the target's law: enumerated exactly, by chi-square, and with planted faults."""

import functools

import pytest
import torch
from laws import SAMPLING, Reading, Recorder, exact_drafters, total_variation
from test_distribution import FAULTY, SOUND, enumerated, exact_law, first_round, generate, p_values

from specdec_fast import device_plan, device_round, dispatch, last_speculation, ops, reference_ops, static_cache
from specdec_fast.costs import Costs
from specdec_fast.device_round import DeviceWriter, Draft, Round
from specdec_fast.lookahead import Adaptive
from specdec_fast.randomness import Purpose

RULES = ("match", "token", "block")
SEEDS = (0, 1)
ADAPTIVE = {"num_assistant_tokens_schedule": "adaptive", "num_assistant_tokens": 4}


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    monkeypatch.setattr(static_cache, "LEAST_CAPACITY", 16)
    # An adaptive draft of up to three tokens, which goes on behind sure tokens alone
    monkeypatch.setattr(device_plan, "constant_costs", lambda *_: Costs((1.0, 1.02, 1.04, 1.06), step=0.1))
    steps = [(step + 0.5) / Adaptive.STEPS for step in range(Adaptive.STEPS)]
    monkeypatch.setattr(Adaptive, "stops", lambda self, row: (steps, [0.25] * self[row]))


@pytest.fixture
def seam(monkeypatch):
    """Numbers of the operations' reference can be exchanged; every operation runs on it."""
    monkeypatch.setattr(dispatch, "DEFAULT", "reference")
    return functools.partial(monkeypatch.setattr, reference_ops, "_philox")


def on_device(tokens):
    assert last_speculation().loop == "device", last_speculation().loop_reason
    return tokens


class Clamped:
    """A table of numbers for rows that take part; those that fill the batch up get its first ones."""

    def __init__(self, source):
        self._source = source

    def uniform(self, seed, position, offset, purpose, trial=0):
        return self._source.uniform(seed, torch.maximum(position, torch.tensor(7)), offset, purpose, trial)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("method", ["model", "tli"])
def test_the_first_round_has_exactly_the_targets_law(method, sampling, rule, monkeypatch, seam):
    exact_drafters(monkeypatch)
    problem = first_round(method, SAMPLING[sampling])

    def numbered(source):
        seam(Clamped(source))
        return {"compile": "static"}

    blocks = on_device(enumerated(problem, method, rule, SAMPLING[sampling], numbered))
    assert total_variation(problem.completed(blocks), problem.joint()) < 1e-6


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("method", "sampling"), [("model", "plain"), ("model", "top_p"), ("tli", "top_k")])
def test_the_output_has_the_targets_law(method, sampling, rule):
    settings = SAMPLING[sampling]
    ending = {"eos_token_id": 0, "pad_token_id": 0} if sampling == "top_p" else {}
    rows = 2048 if method == "model" else 512  # a text of another tokenizer is kept in Python, row by row
    tokens = on_device(generate(method, rule, rows=rows, seeds=SEEDS, compile="static", **settings, **ending))
    assert last_speculation().accepted > 100
    assert min(p_values(tokens, exact_law(ending.get("eos_token_id"), **settings))) > SOUND


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "arguments",
    [
        {"assistant_temperature": 1.7},
        {"assistant_temperature": 0.0},
        {"assistant_confidence_threshold": 0.3, "num_assistant_tokens": 4},
        {"num_assistant_tokens_schedule": "heuristic", "num_assistant_tokens": 1},
        ADAPTIVE,
    ],
    ids=str,
)
def test_no_knob_of_the_drafter_changes_the_law(arguments, rule):
    tokens = on_device(generate("model", rule, rows=1024, compile="static", **arguments))
    assert min(p_values(tokens, exact_law())) > SOUND


# Planted faults -------------------------------------------------------------------------------------------------------


def fault_bonus_of_another_row(patch):
    """The last position's law is that of the one before."""
    scored = device_round.ops.verify

    def verify(logits, *arguments, **settings):
        moved = logits.clone()
        moved[:, -1] = logits[:, max(logits.shape[1] - 2, 0)]
        return scored(moved, *arguments, **settings)

    patch.setattr(ops, "verify", verify)


def fault_rolled_law(patch):
    """q permuted by one entry."""
    _change_draft(patch, lambda draft: draft._replace(logits=draft.logits.roll(1, -1), logsumexp=None))


def fault_law_of_another_position(patch):
    _change_draft(patch, lambda draft: draft._replace(logits=draft.logits.roll(1, 1), logsumexp=None))


def fault_dropped_after_a_look(patch):
    """The improbable token that ends a draft is dropped."""
    _change_draft(patch, lambda draft: draft._replace(drafted=torch.where(draft.drafted < 2, 0, draft.drafted)))


def fault_dropped_where_the_lookahead_stops(patch):
    """The token behind which a draft ends is dropped, where its confidence ended it."""
    draft = DeviceWriter.draft

    def dropping(self, state, gamma, begun, law_wanted):
        found = draft(self, state, gamma, begun, law_wanted)
        return found._replace(drafted=torch.where(found.drafted < begun.room, found.drafted - 1, found.drafted))

    patch.setattr(DeviceWriter, "draft", dropping)


def _change_draft(patch, change):
    draft = DeviceWriter.draft
    patch.setattr(
        DeviceWriter,
        "draft",
        lambda self, state, gamma, *rest: (
            change(draft(self, state, gamma, *rest)) if gamma else Draft(state.ids[:, :0], state.limit * 0)
        ),
    )


def fault_drafter_warped_twice(patch):
    """The drafter's law is verified without its temperature and filters."""
    verify = ops.verify
    patch.setattr(
        ops,
        "verify",
        lambda *arguments, **settings: verify(
            *arguments, **{k: v for k, v in settings.items() if not k.startswith("draft_t") and k != "draft_logsumexp"}
        ),
    )


def fault_one_more_is_kept(patch):
    verify = Round._verify

    def longer(self, state, begun, draft):
        found = verify(self, state, begun, draft)
        return found._replace(accepted=torch.minimum(found.accepted + 1, draft.drafted))

    patch.setattr(Round, "_verify", longer)


@pytest.mark.parametrize(
    ("fault", "method", "rule", "arguments"),
    [
        (fault_bonus_of_another_row, "model", "token", {}),
        (fault_rolled_law, "model", "block", {}),
        (fault_rolled_law, "tli", "token", {}),
        (fault_law_of_another_position, "model", "token", {}),
        (fault_dropped_after_a_look, "model", "token", {"assistant_confidence_threshold": 0.3}),
        (fault_dropped_where_the_lookahead_stops, "model", "token", ADAPTIVE),
        (fault_drafter_warped_twice, "model", "token", SAMPLING["top_p"]),
        (fault_one_more_is_kept, "model", "match", {}),
    ],
)
def test_a_planted_fault_is_seen(fault, method, rule, arguments, monkeypatch):
    fault(monkeypatch)
    rows, seeds = (4096, range(4)) if fault is fault_bonus_of_another_row else (1024, SEEDS)
    tokens = on_device(generate(method, rule, rows=rows, seeds=seeds, compile="static", **arguments))
    assert (
        min(p_values(tokens, exact_law(**{k: v for k, v in arguments.items() if k in ("temperature", "top_p")})))
        < FAULTY
    )


@pytest.mark.parametrize(
    ("swapped", "rule"),
    [({Purpose.ACCEPT: Purpose.DRAFT}, "token"), ({Purpose.RESIDUAL: Purpose.ACCEPT}, "block")],
    ids=["drafts decide", "coins draw"],
)
def test_noise_that_two_decisions_share_is_seen(swapped, rule, seam):
    seam(Reading(lambda purpose: swapped.get(purpose, purpose)))
    tokens = on_device(generate("model", rule, rows=2048, seeds=SEEDS, compile="static"))
    assert min(p_values(tokens, exact_law())) < FAULTY


@pytest.mark.parametrize("forgetful", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["model", "tli"])
def test_no_number_is_drawn_twice(method, rule, forgetful, seam):
    """Keys by absolute position alone would give a round numbers that the one before has looked at."""
    source = Recorder(forget_round=forgetful)
    seam(source)
    on_device(generate(method, rule, rows=1, seeds=range(4), compile="static", num_assistant_tokens=3))
    repeated = source.repeated(but=Purpose.TARGET)  # the target's own draws are keyed by position
    assert bool(repeated) == forgetful
