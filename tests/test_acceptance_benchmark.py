"""benchmarks/acceptance.py: what it computes on toy models equals brute force."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest
import torch
from tiny import taught
from toy_tokenizers import CODE, ENGLISH

from specdec_fast.drafters import model as model_drafters
from specdec_fast.drafters import slrs as slrs_drafter
from specdec_fast.token_map import token_map
from specdec_fast.vocab import Vocabulary, intersection

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
acceptance = pytest.importorskip("acceptance")
laws = pytest.importorskip("acceptance_laws")

TEXTS = (ENGLISH[:160], CODE[120:300])
SIZES = {"target_size": len(taught()[1]), "drafter_size": len(taught("drafter")[1])}


@pytest.fixture(autouse=True)
def _own_weights(monkeypatch):
    """Drafters run on their own weights, as brute force does."""
    for module in (model_drafters, slrs_drafter, laws):
        monkeypatch.setattr(module, "lean_model", lambda model, **how: None)


@pytest.fixture(scope="module")
def pair():
    (target, tokenizer), (drafter, own) = taught(), taught("drafter")
    return laws.Pair("toy", target, tokenizer, drafter, own)


@pytest.fixture(scope="module")
def vocabularies(pair):
    return Vocabulary.of(pair.tokenizer), Vocabulary.of(pair.own)


@pytest.fixture(scope="module")
def places(vocabularies):
    """Of each text its target ids, and the longest beginning that both tokenisations have."""
    found = [laws.boundaries(text, *vocabularies) for text in TEXTS]
    return [(ids, ends[-5]) for ids, ends in found]


def probe_of(pair, places, **how):
    probe = laws.Probe(pair, [ids for ids, _ in places], **how)
    probe.move([length for _, length in places])
    return probe


@torch.no_grad()
def law(model, ids, temperature=1.0):
    logits = model(input_ids=torch.tensor(ids)).logits[..., -1, :]
    return (logits.double() / temperature).softmax(-1)


def contexts(vocabularies, place):
    """The ids before a place, the target's and the drafter's."""
    target, own = vocabularies
    ids = place[0][: place[1]]
    return ids, own.encode(target.bytes_of(ids).decode())[0]


def by_method(outcomes):
    return {outcome.method: outcome for outcome in outcomes}


def test_a_boundary_is_one_of_both_tokenisations(vocabularies):
    target, own = vocabularies
    for text in TEXTS:
        ids, ends = laws.boundaries(text, target, own)
        assert target.bytes_of(ids).decode() == text
        other = own.encode(text)[0]
        beginnings = {own.bytes_of(other[:n]) for n in range(len(other) + 1)}
        assert [n for n in range(1, len(ids) + 1) if target.bytes_of(ids[:n]) in beginnings] == ends


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_tokens(pair, vocabularies, places, temperature):
    shared = intersection(*vocabularies, **SIZES)
    table = token_map(*vocabularies, **SIZES)
    measured = probe_of(pair, places, lookahead=2).measure(temperature, 1)
    for place, outcomes in zip(places, measured, strict=True):
        ids, other = contexts(vocabularies, place)
        p, q = law(pair.target, [ids], temperature)[0], law(pair.drafter, [other], temperature)[0]
        union = torch.zeros_like(p)
        union[shared.target_ids] = q[shared.drafter_ids]
        projected = torch.zeros_like(p)
        for k, d in enumerate(table.drafter_ids.tolist()):
            projected[table.entry(k)[0][0]] += q[d]
        expected = {"union": union, "tli": union / union.sum(), "projection": projected / projected.sum()}
        own = by_method(outcomes)
        for method, psi in expected.items():
            assert own[method].first["token"] == own[method].first["block"]
            assert own[method].first["token"] == pytest.approx((float(torch.minimum(p, psi).sum()),) * 2, abs=1e-5)
            assert own[method].first["match"] == pytest.approx((float((p * psi).sum()),) * 2, abs=1e-5)
        assert own["union"].first["token"] < own["tli"].first["token"]


@pytest.mark.parametrize("looks", [0, 3, 400])
def test_bounds_of_a_law_that_is_asked_token_by_token(pair, places, looks):
    probe = probe_of(pair, places, lookahead=2, methods=("slrs",), tolerance=0.0, looks=looks)
    measured = probe.measure(1.0, 1)
    drafter = probe._drafters["slrs"]
    draws = laws.Draws(laws.Philox(), laws.row_seeds(0, 2), torch.tensor(probe._rows.length))
    stated = drafter.propose(probe._rows, [0, 1], [1, 1], draws).law
    for row, (ids, length) in enumerate(places):
        p = law(pair.target, [ids[:length]])[0]
        psi = torch.tensor([stated.mass(row, 0, token) for token in range(len(p))])
        assert float(psi.sum()) == pytest.approx(1.0)
        for rule, exact in (("token", torch.minimum(p, psi).sum()), ("match", (p * psi).sum())):
            low, high = measured[row][0].first[rule]
            assert low - 1e-6 <= float(exact) <= high + 1e-6
            assert looks < 400 or high - low < 1e-4
        assert measured[row][0].first["token"][0] >= measured[row][0].first["match"][0]


def exact_tli(pair, vocabularies, place):
    """The expected number of accepted tokens of two by TLI, over all drafts: by rule."""
    shared = intersection(*vocabularies, **SIZES)
    ids, other = contexts(vocabularies, place)

    def psi(behind):
        q = law(pair.drafter, behind)[:, shared.drafter_ids]
        return q / q.sum(-1, keepdim=True)

    p1, psi1 = law(pair.target, [ids])[0][shared.target_ids], psi([other])[0]
    p2 = law(pair.target, [[*ids, t] for t in shared.target_ids.tolist()])[:, shared.target_ids]
    psi2 = psi([[*other, d] for d in shared.drafter_ids.tolist()])
    weight = (p1 / psi1).clamp(max=1).unsqueeze(1)
    both = torch.minimum(p1, psi1)
    return {
        "match": float((p1 * psi1 * (1 + (p2 * psi2).sum(1))).sum()),
        "token": float((both * (1 + torch.minimum(p2, psi2).sum(1))).sum()),
        "block": float(both.sum() + (psi1 * torch.minimum(psi2, weight * p2).sum(1)).sum()),
    }


def test_expected_accepted_tokens_are_those_of_all_drafts(pair, vocabularies, places):
    measured = probe_of(pair, places[:1], lookahead=2, methods=("tli",)).measure(1.0, 60)
    for place, (outcome,) in zip(places[:1], measured, strict=True):
        exact = exact_tli(pair, vocabularies, place)
        for rule, values in outcome.accepted.items():
            error = statistics.stdev(values) / len(values) ** 0.5
            assert abs(statistics.fmean(values) - exact[rule]) < 4 * error + 1e-5
            assert error < 0.05


def test_one_draft_is_judged_rule_by_rule(pair, vocabularies, places):
    """The chances that its tokens stay, each given those before it, written out."""
    probe = probe_of(pair, places, lookahead=3, methods=("tli", "slem"))
    shared = intersection(*vocabularies, **SIZES)
    draws = laws.Draws(laws.Philox(), laws.row_seeds(0, 2), torch.tensor(probe._rows.length))
    measured = probe.measure(1.0, 1)
    drafts = probe._drafters["tli"].propose(probe._rows, [0, 1], [3, 3], draws).tokens.tolist()
    for place, draft, outcomes in zip(places, drafts, measured, strict=True):
        ids, other = contexts(vocabularies, place)
        drafter_id = dict(zip(shared.target_ids.tolist(), shared.drafter_ids.tolist(), strict=True))
        stay, expected = dict.fromkeys(laws.RULES, 1.0), dict.fromkeys(laws.RULES, 0.0)
        for i, token in enumerate(draft):
            p = law(pair.target, [ids + draft[:i]])[0]
            q = law(pair.drafter, [other + [drafter_id[t] for t in draft[:i]]])[0][shared.drafter_ids]
            psi = torch.zeros_like(p)
            psi[shared.target_ids] = q / q.sum()
            expected["match"] += stay["match"] * float((p * psi).sum())
            expected["token"] += stay["token"] * float(torch.minimum(p, psi).sum())
            expected["block"] += float(torch.minimum(stay["block"] * p, psi).sum())
            ratio = float(p[token] / psi[token])
            stay["match"] *= float(p[token])
            stay["token"] *= min(1.0, ratio)
            stay["block"] = min(1.0, stay["block"] * ratio)
        accepted = by_method(outcomes)["tli"].accepted
        assert accepted == {rule: [pytest.approx(value, abs=1e-5)] for rule, value in expected.items()}
        assert by_method(outcomes)["slem"].first == {} and len(by_method(outcomes)["slem"].drafted) == 1


def test_at_zero_temperature_the_argmax_decides(pair, vocabularies, places):
    shared = intersection(*vocabularies, **SIZES)
    measured = probe_of(pair, places, lookahead=3).measure(0.0, 5)
    for place, outcomes in zip(places, measured, strict=True):
        ids, other = contexts(vocabularies, place)
        agreed, going = 0, True
        for _ in range(3):
            k = int(law(pair.drafter, [other])[0][shared.drafter_ids].argmax())
            going &= int(law(pair.target, [ids])[0].argmax()) == int(shared.target_ids[k])
            agreed += going
            ids, other = [*ids, int(shared.target_ids[k])], [*other, int(shared.drafter_ids[k])]
        tli = by_method(outcomes)["tli"]
        assert tli.accepted == {rule: [pytest.approx(agreed, abs=1e-6)] for rule in laws.RULES}
        for outcome in outcomes:
            assert all(bound == pytest.approx((round(bound[0]),) * 2, abs=1e-6) for bound in outcome.first.values())


def test_block_never_keeps_fewer_and_the_table_says_so(pair, places):
    probe = probe_of(pair, places, lookahead=3)
    measured = probe.measure(1.0, 4)
    for outcome in (outcome for outcomes in measured for outcome in outcomes if outcome.first):
        pairs = zip(outcome.accepted["block"], outcome.accepted["token"], strict=True)
        assert all(block >= token - 1e-12 for block, token in pairs)
    place = {"pair": "toy", "kind": "code", "temperature": 1.0}
    alone = probe.measure(1.0, 0)  # positions where no round is measured
    rows = [{**place, **row} for row in acceptance.summarise([*alone, *measured])]
    assert {(row["positions"], row.get("rounds", 2)) for row in rows} == {(4, 2)}
    reached = {check["goal"]: check["reached"] for check in acceptance.goals(rows)}
    assert reached["block - token >= 0, every method"] == "yes"
    headings, lines = acceptance.tabulate(rows)
    assert [line[3:5] for line in lines] == [
        ["1st", "match"],
        ["1st", "token, block"],
        *(["round", rule] for rule in laws.RULES),
    ]
    assert all(len(line) == len(headings) for line in lines)


def test_a_ratio_is_of_means_and_its_error_is_paired():
    ratio, error = acceptance.ratio_and_error([0.2, 0.4, 0.6], [0.1, 0.2, 0.3])
    assert (ratio, error) == pytest.approx((2.0, 0.0))


@pytest.mark.parametrize("given", ["code", "code:Name", "code:Name=/nowhere/at/all"])
def test_texts_that_are_none_are_refused_by_name(given):
    with pytest.raises(acceptance.typer.BadParameter, match="--texts"):
        acceptance.Source.parse(given)
