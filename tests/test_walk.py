"""The cover walk on toy vocabularies: its laws against brute force over every way the drafter can draw."""

from __future__ import annotations

import random

import numpy as np
import pytest
from walking import PAIRS, Brute, brute_laws, laws_behind, look_of, problem, q_table, revealed, walks

from specdec_fast.spelling import Runs
from specdec_fast.walk import Certain, Masses, Root, Walk


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize("name", PAIRS)
def test_every_law_is_that_of_brute_force(name, zeros, monkeypatch):
    target, drafter, spelling = problem(name)
    q = q_table(drafter.size, 5, zeros=zeros)
    brute = Brute(target, drafter)
    for last in (-1, 1):
        laws = brute_laws(brute, q, 3, last=last)
        met = set()
        for _, walk in walks(spelling, q, 3, monkeypatch, last=last):
            before, look = revealed(spelling, walk), look_of(spelling, q, walk)
            for i, drawn in enumerate(walk.drawn):
                if before[: i + 1] in met:
                    continue
                met.add(before[: i + 1])
                found = [drawn.law.mass(t, look) for t in range(target.size)]
                expected = laws[before[: i + 1]]
                assert np.allclose(found, [expected.get(t, 0.0) for t in range(target.size)], rtol=0, atol=1e-12)
                assert abs(sum(found) - 1) < 1e-12
        assert met == {before for before in laws if len(before) < 4}


@pytest.mark.parametrize("name", PAIRS)
def test_tokens_are_drawn_by_their_laws(name, monkeypatch):
    _, drafter, spelling = problem(name)
    q = q_table(drafter.size, 6)
    seen: dict = {}
    for chance, walk in walks(spelling, q, 2, monkeypatch):
        before, look = revealed(spelling, walk), look_of(spelling, q, walk)
        for i, drawn in enumerate(walk.drawn):
            law = seen.setdefault(before[: i + 1], ({}, drawn.law, look))[0]
            law[drawn.token] = law.get(drawn.token, 0.0) + chance
    for drawn, law, look in seen.values():
        total = sum(drawn.values())
        for token, mass in drawn.items():
            assert abs(mass / total - law.mass(token, look)) < 1e-12


def test_the_rest_of_a_character_the_text_has_begun(monkeypatch):
    """What the drafter was not given is the beginning of its first token."""
    target, drafter, spelling = problem("bytes")
    q = q_table(drafter.size, 7)
    laws = brute_laws(Brute(target, drafter), q, 3, held=b"a")
    for _, walk in walks(spelling, q, 3, monkeypatch, held=b"a"):
        before, look = revealed(spelling, walk), look_of(spelling, q, walk)
        for i, drawn in enumerate(walk.drawn):
            for t in range(target.size):
                assert abs(drawn.law.mass(t, look) - laws[before[: i + 1]].get(t, 0.0)) < 1e-12


@pytest.mark.parametrize("name", PAIRS)
def test_a_text_that_may_end_inside_a_drafter_token(name, monkeypatch):
    """The last drafter token is taken back: it or a longer one."""
    target, drafter, spelling = problem(name)
    q = q_table(drafter.size, 10, zeros=0.2)
    for ending in range(len(spelling.ids)):
        d, last = spelling.ids[ending], (2 + ending) % target.size
        laws = brute_laws(Brute(target, drafter), q, 3, last=last, ending=d)
        met = set()
        for _, walk in walks(spelling, q, 3, monkeypatch, last=last, ending=ending):
            before, look = revealed(spelling, walk, ending), look_of(spelling, q, walk)
            for i, drawn in enumerate(walk.drawn):
                met.add(before[: i + 1])
                found = [drawn.law.mass(t, look) for t in range(target.size)]
                assert np.allclose(
                    found, [laws[before[: i + 1]].get(t, 0.0) for t in range(target.size)], rtol=0, atol=1e-12
                )
        assert met == {before for before in laws if len(before) < 4}


def test_nothing_is_proposed_where_no_token_goes_on_with_a_character():
    _, drafter, spelling = problem("bytes")
    walk = Walk(spelling, 3, 100, lambda: 0.5, held=b"\xe2\x82")
    assert not walk.advance(Masses(laws_behind(spelling, q_table(drafter.size, 0))(())))
    assert not walk.drawn


@pytest.mark.parametrize("name", ["long target", "both"])
def test_one_pass_at_most_for_a_token_and_none_on_the_path_drawn(name, monkeypatch):
    target, drafter, spelling = problem(name)
    q = q_table(drafter.size, 8)
    for _, walk in walks(spelling, q, 3, monkeypatch):
        for (token, kind), drawn in zip(revealed(spelling, walk)[1:], walk.drawn, strict=False):
            looks = []
            look = look_of(spelling, q, walk)

            def counted(depth, path, looks=looks, look=look):
                looks.append(path)
                return look(depth, path)

            low, high = drawn.law.bounds(token)
            mass = drawn.law.mass(token, counted)
            assert low - 1e-15 <= mass <= high + 1e-15
            if kind[0] in ("stop", "end") and isinstance(drawn.law, Root):
                assert not looks and low == high
            for t in range(target.size):
                looks.clear()
                low, high = drawn.law.bounds(t)
                mass = drawn.law.mass(t, counted)
                assert low - 1e-15 <= mass <= high + 1e-15
                assert len(looks) <= 1
                assert drawn.law.bounds(t) == (mass, mass)


@pytest.mark.parametrize("seed", range(3))
def test_an_entry_is_drawn_in_proportion_to_its_mass(seed):
    numbers = np.random.default_rng(seed)
    q = numbers.random(12) * (numbers.random(12) < 0.6)
    q[int(numbers.integers(12))] += 0.2
    law = Masses(q / q.sum())
    for runs in (None, Runs(np.array([1, 6]), np.array([5, 11]))):
        mine = np.arange(len(q)) if runs is None else runs.entries()
        if not law.total(runs) > 0:
            continue
        edges = np.concatenate([[0.0], np.cumsum(law.of(mine))]) / law.total(runs)
        for entry, low, high in zip(mine, edges, edges[1:], strict=False):
            if high > low:
                for u in (low + 1e-9 * (high - low), (low + high) / 2, high - 1e-9 * (high - low)):
                    assert law.draw(u, runs) == entry
        for u in (2.0**-54, 1 - 2.0**-53):
            assert law.of(np.array([law.draw(u, runs)]))[0] > 0


@pytest.mark.parametrize("name", PAIRS)
def test_a_drafter_at_temperature_0_walks_as_one_whose_law_is_certain(name, monkeypatch):
    _, drafter, spelling = problem(name)
    q = q_table(drafter.size, 9)

    def peak(prefix):
        law = q(prefix)[spelling.ids]
        certain = np.zeros(drafter.size)
        certain[spelling.ids[int(law.argmax())]] = 1.0
        return certain

    ((_, expected),) = walks(spelling, peak, 4, monkeypatch)
    monkeypatch.undo()
    walk = Walk(spelling, 4, 100, lambda: random.random())
    masses = laws_behind(spelling, q)
    while walk.advance(Certain(int(masses(walk.fed).argmax()))):
        pass
    assert [drawn.token for drawn in walk.drawn] == [drawn.token for drawn in expected.drawn]


@pytest.mark.parametrize("name", PAIRS)
def test_a_path_gives_back_the_text_and_passes_through_target_tokens(name):
    target, drafter, spelling = problem(name)
    for token, path in spelling.path.items():
        text = spelling.text(token)
        if text is None:
            continue
        pieces = [drafter.token_bytes[spelling.ids[k]] for k in path]
        assert b"".join(pieces) == text
        for j in range(1, len(path)):
            assert target.id_of(b"".join(pieces[:j])) == spelling.at[path[:j]]


def test_a_walk_ends_where_there_is_no_room_for_the_longest_path():
    _, drafter, spelling = problem("long target")
    masses = laws_behind(spelling, q_table(drafter.size, 3))
    for room in range(8):
        numbers = np.random.default_rng(room)
        walk = Walk(spelling, 10, room, numbers.random)
        while walk.able and walk.advance(Masses(masses(walk.fed))):
            assert len(walk.fed) <= room
        for drawn in walk.drawn:
            assert drawn.law.depth + spelling.longest <= room


def test_scores_that_are_no_law_end_the_walk(monkeypatch):
    """At the root nothing is proposed; behind a node its token is, and its law says so."""
    target, drafter, spelling = problem("long target")
    q = q_table(drafter.size, 4)
    broken = np.full(drafter.size, np.nan)
    node = spelling.ids[spelling.path[0][0]]

    def spoilt(prefix):
        return broken if prefix == (node,) else q(prefix)

    assert not Walk(spelling, 3, 100, lambda: 0.5).advance(Masses(broken))
    laws: dict[int, float] = {}
    for chance, walk in walks(spelling, spoilt, 1, monkeypatch):
        laws[walk.drawn[0].token] = laws.get(walk.drawn[0].token, 0.0) + chance
        look = look_of(spelling, spoilt, walk)
        law = walk.drawn[0].law
    assert np.allclose([law.mass(t, look) for t in range(target.size)], [laws.get(t, 0.0) for t in range(target.size)])
