"""``method="auto"`` with several candidates on the device: rows that agree are there, and draw the host's tokens."""

import re

import pytest
from enumeration import laws_of
from rounds import Setting, distance, prompts
from tables import PAIRS
from tiny import drafters, taught, taught_prompts

from specdec_fast import (
    device_plan,
    device_session,
    dispatch,
    fast_generate,
    last_speculation,
    reference_ops,
    static_cache,
    warmup,
)
from specdec_fast.choice import Choice
from specdec_fast.costs import Costs
from specdec_fast.device_engine import DeviceEngine
from specdec_fast.drafters.auto import History

OWN = {name: value for name, value in drafters()["tli"].items() if name != "method"}


@pytest.fixture
def changing(monkeypatch, plain_drafters):
    """Rows that change as soon as a candidate has been tested a little; the arguments name the candidates."""
    monkeypatch.setattr(History, "LEAST", 4)
    monkeypatch.setattr(History, "WEIGHT", 0.5)
    monkeypatch.setattr(History, "MARGIN", 0.01)
    monkeypatch.setattr("specdec_fast.methods.LOOKING", 0.1)  # SLRS gets its turn beside a drafter of any size

    def among(method, *others):
        chosen = Choice(method, "for the test", others)
        monkeypatch.setattr("specdec_fast.methods.across_vocabularies", lambda *_: chosen)

    return among


def written(rows, compile, **settings):
    given = {"do_sample": True, "top_k": 0, "seed": 5, "max_new_tokens": 40, "num_assistant_tokens": 3, **settings}
    output = fast_generate(taught()[0], **taught_prompts(rows, padded=rows > 1), **OWN, **given, compile=compile)
    statistics = last_speculation()
    counts = statistics.accepted_per_position, statistics.drafted_per_position, statistics.rounds, statistics.committed
    return (output.tolist(), counts, statistics.reason), statistics


@pytest.fixture
def changes(monkeypatch):
    """Takes down each change of a session, and when the host's loop takes over or gives rounds back."""
    found = []
    change, leave, resume = device_session.Session.change, DeviceEngine._go_on_the_host, device_session.Session.resume
    monkeypatch.setattr(
        device_session.Session, "resume", lambda self, rows: (found.append("device"), resume(self, rows))[1]
    )
    monkeypatch.setattr(
        device_session.Session, "change", lambda self, candidate: (found.append(candidate), change(self, candidate))[1]
    )
    monkeypatch.setattr(DeviceEngine, "_go_on_the_host", lambda self: (found.append("host"), leave(self))[1])
    return found


@pytest.mark.parametrize("rule", ["token", "block", "match"])
@pytest.mark.parametrize("order", [("tli", "projection"), ("projection", "tli")])
def test_one_row_stays_on_the_device(order, rule, changing, changes, monkeypatch):
    monkeypatch.setattr(static_cache, "LEAST_CAPACITY", 1)
    monkeypatch.setattr(static_cache, "ALLOWANCE", 2)
    changing(*order)
    host, _ = written(1, "off", verification=rule)
    device, statistics = written(1, "static", verification=rule)
    assert device == host
    assert (statistics.loop, statistics.loop_reason) == ("device", "")
    assert changes and set(changes) <= {0, 1}
    assert "the running acceptance changed the method" in statistics.reason


@pytest.mark.parametrize(
    ("rows", "order"), [(1, ("tli", "slrs", "projection")), (3, ("tli", "projection"))], ids=["text", "rows apart"]
)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9}], ids=str)
def test_rows_that_need_the_host_go_on_there_and_come_back(rows, order, sampling, changing, changes, monkeypatch):
    monkeypatch.setattr(static_cache, "LEAST_CAPACITY", 1)
    monkeypatch.setattr(static_cache, "ALLOWANCE", 2)
    changing(*order)
    host, _ = written(rows, "off", max_new_tokens=60, **sampling)
    device, statistics = written(rows, "static", max_new_tokens=60, **sampling)
    assert device == host
    hosted, rounds = (
        int(n) for n in re.match(r"(\d+) of (\d+) rounds, .* needed the host", statistics.loop_reason).groups()
    )
    assert statistics.loop == "device" and 0 < hosted < rounds == statistics.rounds
    assert "device" in changes


@pytest.mark.parametrize("missing", ["ids", "length", "text"])
def test_rows_that_come_back_without_what_the_host_wrote_are_seen(missing, changing, changes, monkeypatch):
    changing("tli", "projection")
    host, _ = written(2, "off", max_new_tokens=60)
    resume = device_session.Session.resume

    def forgetful(self, rows):
        before = {name: getattr(self.state, name).clone() for name in ("ids", "length")}
        resume(self, rows)
        if missing == "text":
            for _, text in self._known.values():
                text._read = [len(ids) for ids in rows.tokens]
        else:
            getattr(self.state, missing).copy_(before[missing])

    monkeypatch.setattr(device_session.Session, "resume", forgetful)
    assert written(2, "static", max_new_tokens=60)[0] != host
    assert "device" in changes


@pytest.mark.parametrize("rows", [1, 3])
def test_a_lookahead_that_is_asked_gives_the_hosts_tokens(rows, changing, monkeypatch):
    costs = Costs((1.0, 1.02, 1.04, 1.06), step=0.05)
    for module in (device_plan, warmup):
        monkeypatch.setattr(module, "constant_costs", lambda *_: costs)
    changing("projection", "tli", "slrs")
    settings = {"num_assistant_tokens_schedule": "adaptive", "num_assistant_tokens": 4, "max_new_tokens": 60}
    host, _ = written(rows, "off", **settings)
    device, statistics = written(rows, "static", **settings)
    assert device == host
    assert statistics.loop == "device" and statistics.drafted


def needs_the_host(monkeypatch, method):
    why_not = device_plan.why_not_resident
    monkeypatch.setattr(
        device_plan,
        "why_not_resident",
        lambda model, call, how: "for the test" if call.plan.method == method else why_not(model, call, how),
    )


def test_a_candidate_without_a_static_cache_is_none_of_the_devices(changing, changes, monkeypatch):
    needs_the_host(monkeypatch, "projection")
    changing("tli", "projection")
    assert written(1, "static")[0] == written(1, "off")[0]
    assert {"host", "device"} <= set(changes) and 1 not in changes


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_rows_that_change_have_exactly_the_targets_law(rule, where, changing, changes, monkeypatch):
    """From one candidate on the device to another there, or to one that needs the host and back."""
    monkeypatch.setattr(dispatch, "DEFAULT", "reference")
    monkeypatch.setattr(static_cache, "LEAST_CAPACITY", 16)
    monkeypatch.setattr(device_plan, "why_not_static", lambda *_: None)  # the trial takes no scores of -inf
    monkeypatch.setattr(device_session, "rows_for", lambda batch: batch)  # a row of nothing would draw numbers too
    monkeypatch.setattr(History, "LEAST", 1)
    changing("projection", "tli")
    if where == "host":
        needs_the_host(monkeypatch, "tli")
    setting = Setting("auto", rule, "plain", "small", 1, more={**PAIRS["small"].tokenizers, "compile": "static"})

    def run(texts, seeds, source):
        monkeypatch.setattr(reference_ops, "_philox", source)
        return [tuple(row) for row in setting.generate(texts, seeds, None, setting.gamma + 3).tolist()]

    case = tuple(prompts(setting, 1))
    (law,) = laws_of(run, [case], width=1)  # a row of its own changes on the device
    assert distance(setting, law, case, setting.gamma + 3) < 1e-6
    assert (1 in changes, "host" in changes, "device" in changes) == (where == "device", *[where == "host"] * 2)
