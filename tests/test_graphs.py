"""Rounds, passes and drafts as graphs are captured on a GPU: nothing that changes between rounds is left in them."""

import graphs
import pytest
import torch
from tiny import drafters, same, taught, taught_prompts

from specdec_fast import device_session, fast_generate, last_speculation
from specdec_fast.device_round import DeviceWriter

STATIC = {"compile": "static"}
SAMPLED = {"do_sample": True, "top_k": 0, "seed": 3, "max_new_tokens": 14, "num_assistant_tokens": 3}


@pytest.fixture
def made(monkeypatch):
    return graphs.imitate(monkeypatch)


def replayed(made):
    return sum(graph.replays for graph in made)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", ["autoregressive", "model", "tli", "projection"])
def test_rounds_give_the_tokens_of_generate(method, rows, made):
    statistics = same(
        taught()[0], taught_prompts(rows, padded=True), {**drafters()[method], **STATIC}, max_new_tokens=20
    )
    assert (statistics.loop, statistics.loop_reason) == ("device", "")
    assert replayed(made) >= statistics.rounds


def test_a_warper_of_transformers_own_is_part_of_a_graph(made, plain_drafters):
    given = {**taught_prompts(2, padded=True), **drafters()["model"], **SAMPLED, "typical_p": 0.9}
    assert torch.equal(
        fast_generate(taught()[0], **given, **STATIC), fast_generate(taught()[0], **given, compile="off")
    )
    assert replayed(made)


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("method", ["model", "tli", "projection"])
def test_sampled_rounds_give_the_tokens_of_the_host_loop(method, rule, made, plain_drafters):
    """Two calls, so that graphs of the first one read numbers, limits and parameters of the second."""
    own = {**drafters()[method], **SAMPLED, "verification": rule}
    for settings in ({"seed": 3}, {"seed": 8, "num_assistant_tokens": 2, "temperature": 0.6}):
        given = {**taught_prompts(2, padded=True), **own, **settings}
        assert torch.equal(
            fast_generate(taught()[0], **given, **STATIC), fast_generate(taught()[0], **given, compile="off")
        )
    assert replayed(made)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", ["model", "tli", "projection"])
def test_steps_that_a_graph_leaves_out_change_nothing(method, rows, made, plain_drafters):
    own = {**drafters()[method], **SAMPLED, "max_new_tokens": 24, "assistant_confidence_threshold": 0.3}
    given = {**taught_prompts(rows, padded=True), **own}
    found = []
    for how in ("static", "off"):
        tokens = fast_generate(taught()[0], **given, compile=how).tolist()
        found.append((tokens, last_speculation().drafted, last_speculation().accepted_per_position))
    assert found[0] == found[1]
    assert {taken for graph in made for taken in graph.taken} == {False, True}


def test_a_step_that_is_left_out_and_was_needed_is_seen(made, plain_drafters, monkeypatch):
    monkeypatch.setattr(device_session, "branch", lambda wanted, run: graphs.branch(torch.zeros_like(wanted), run))
    own = {**drafters()["model"], **SAMPLED, "max_new_tokens": 24, "assistant_confidence_threshold": 0.1}
    given = {**taught_prompts(2, padded=True), **own}
    found = [fast_generate(taught()[0], **given, compile=how).tolist() for how in ("static", "off")]
    assert found[0] != found[1]


def fault(name):
    """One number a row that is read when a round is captured."""

    def planted(patch):
        draft, kept = DeviceWriter.draft, {}

        def baked(self, state, gamma, begun, law):
            number = kept.setdefault(gamma, getattr(begun, name).clone())
            return draft(self, state, gamma, begun._replace(**{name: number}), law)

        patch.setattr(DeviceWriter, "draft", baked)

    return planted


@pytest.mark.parametrize("name", ["room", "committed"])
def test_what_a_graph_would_keep_is_seen(name, made, plain_drafters, monkeypatch):
    fault(name)(monkeypatch)
    given = {**taught_prompts(2, padded=True), **drafters()["model"], **SAMPLED, "max_new_tokens": 12}
    found = fast_generate(taught()[0], **given, **STATIC)
    monkeypatch.undo()
    from specdec_fast.drafters import model

    monkeypatch.setattr(model, "lean_model", lambda *_, **__: None)
    assert not torch.equal(found, fast_generate(taught()[0], **given, compile="off"))


@pytest.mark.parametrize(
    "look",
    [lambda room: room.max().item(), lambda room: room[room > 0], lambda room: torch.tensor([3]) + room],
    ids=["the host reads", "a shape hangs on values", "a list of the host's"],
)
def test_what_no_graph_can_do_runs_as_it_is_and_the_statistics_say_so(look, made, plain_drafters, monkeypatch):
    draft = DeviceWriter.draft

    def looking(self, state, gamma, begun, law):
        look(begun.room)
        return draft(self, state, gamma, begun, law)

    monkeypatch.setattr(DeviceWriter, "draft", looking)
    given = {**taught_prompts(2, padded=True), **drafters()["model"], **SAMPLED}
    found = fast_generate(taught()[0], **given, **STATIC)
    assert "while a graph is being captured" in last_speculation().loop_reason
    assert torch.equal(found, fast_generate(taught()[0], **given, compile="off"))
