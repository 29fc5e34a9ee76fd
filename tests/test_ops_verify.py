"""`verify`: every backend against the reference token by token, pinned outcomes, edges, and no row-wide buffers."""

import ctypes
from pathlib import Path

import pytest
import torch
from op_cases import BACKENDS, DTYPES, FAST, INF, NAN, differing, edge_rows, filters, proposal, verify_both

from specdec_fast import ops, reference
from specdec_fast.proposal import CompactLaw, PointMass, Proposal
from specdec_fast.randomness import Philox, Purpose
from specdec_fast.verification import Draws, rule_for

RULES = ("match", "token", "block")
KINDS = ("point", "dense", "wide", "compact", "heads", "sparse")
WIDTHS = (9, 16, 111, 2047, 2048, 2049, 4100)  # both sides of the CPU kernels' chunks and vectors


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_backend_decides_what_the_reference_decides(backend, rule, kind, width):
    """Ragged counts, T=0 among T>0, every edge row, one kind of filter a case; dtypes and lookaheads take turns."""
    turn = WIDTHS.index(width) + KINDS.index(kind)
    gamma, dtype = (1, 3, 4)[turn % 3], DTYPES[turn // 2 % 3]
    case = proposal(kind, 14, gamma, width, dtype, generator(turn))
    edge_rows(case["logits"][:, turn % (gamma + 1)])
    if "draft_logits" in case:
        case["draft_logits"][10, 0, 0], case["draft_logits"][11, 0, 1] = NAN, INF
    settings = [{}, filters(14, generator(1))]
    if kind in ("dense", "wide", "compact"):
        settings.append(filters(14, generator(2)) | filters(14, generator(3), "draft_"))
    for setting in settings:
        assert differing(*verify_both(backend, rule=rule, base=turn % 2 * 5, **case, **setting)) == 0


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "width, kinds", [(32001, ("heads", "wide")), (151936, ("dense", "compact")), (262147, ("point",))]
)
def test_large_vocabularies(backend, rule, width, kinds):
    for kind in kinds:
        case = proposal(kind, 3, 2, width, torch.bfloat16, generator(4))
        assert differing(*verify_both(backend, rule=rule, **case)) == 0


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("rule", RULES)
def test_many_rows_differ_at_most_at_an_edge(backend, rule):
    """Thousands of decisions; u lies within 1e-12 of an edge less than once in 10^9."""
    case = proposal("dense", 3000, 3, 40, torch.float32, generator(5))
    assert differing(*verify_both(backend, rule=rule, **case)) == 0


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_extreme_temperatures(backend, rule, temperature):
    """Logits of ±60 and beyond float32's exponential on one side, next to uniform on the other."""
    case = proposal("dense", 60, 3, 111, torch.float32, generator(13))
    for name in ("logits", "draft_logits"):
        case[name] = (case[name] * 20).clamp(-60, 60)
    heat = {"temperature": temperature, "draft_temperature": 1 / temperature}
    for setting in ({"temperature": temperature, "draft_temperature": temperature}, heat):
        assert differing(*verify_both(backend, rule=rule, **case, **setting)) == 0


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("rule", RULES)
def test_a_drafter_with_fewer_tokens_and_the_same_ids(backend, rule):
    """K < V without an index: the target's ids behind K hold nothing of the drafter's."""
    case = proposal("dense", 200, 2, 111, torch.float32, generator(14))
    case["draft_logits"] = case["draft_logits"][..., :40]
    case["tokens"] = case["drawn"] = case["draft_logits"].argmax(-1)
    expected, result = verify_both(backend, rule=rule, **case)
    assert differing(expected, result) == 0
    assert int((expected.token >= 40).sum()) > 0


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("fault", ["swapped", "last tile", "normaliser", "noise"])
def test_a_faulty_call_is_noticed(backend, fault):
    """What the comparison above would find in a backend: p for q, a row cut short, a sum over one tile, another key."""
    case = proposal("dense", 400, 2, 2100, torch.float32, generator(6))
    wrong = dict(case)
    if fault == "swapped":
        wrong["logits"], wrong["draft_logits"] = case["logits"].clone(), case["logits"][:, :2]
        wrong["logits"][:, :2] = case["draft_logits"]
    elif fault == "last tile":
        wrong["logits"] = case["logits"][..., :2048]
    elif fault == "normaliser":
        wrong["draft_logsumexp"] = case["draft_logits"][..., :2048].double().logsumexp(-1)
        wrong["draft_logsumexp"] -= 0.1
    else:
        wrong["start"] = case["start"] + 1
    expected = ops.verify(rule="token", **case, backend="reference")
    result = ops.verify(rule="token", **wrong, backend=backend)
    assert int(((expected.accepted != result.accepted) | (expected.token != result.token)).sum()) > 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["dense", "compact"])
def test_what_the_drafter_hands_over_changes_nothing(backend, kind):
    case = proposal(kind, 40, 3, 300, torch.bfloat16, generator(7))
    rows, gamma, width = case["draft_logits"].shape
    flat = case["draft_logits"].reshape(rows * gamma, width)
    key = torch.zeros(rows * gamma, dtype=torch.int64)
    known = ops.sample(flat, seed=key, position=key, temperature=0.8, backend=backend).logsumexp.view(rows, gamma)
    known[3] = NAN  # not known
    for rule in ("token", "block"):
        plain = ops.verify(rule=rule, draft_temperature=0.8, **case, backend=backend)
        handed = ops.verify(rule=rule, draft_temperature=0.8, draft_logsumexp=known, **case, backend=backend)
        without = {name: value for name, value in case.items() if name != "drawn"}
        searched = ops.verify(rule=rule, draft_temperature=0.8, **without, backend=backend)
        for other in (handed, searched):
            assert all(torch.equal(*pair) for pair in zip(plain, other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["point", "dense", "wide", "compact"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("positions", [1, 3, 4])
def test_the_op_is_what_the_rules_of_the_engine_do(backend, kind, rule, positions):
    """The rules of `verification` on processed scores, whole rounds and rounds cut short, numbers included."""
    case = proposal(kind, 60, 3, 30, torch.float32, generator(8))
    if kind == "compact":  # the engine's laws hold target ids alone
        case["index"][0], case["index"][-1] = 0, 29
        case["tokens"] = case["index"].long()[case["drawn"]]
    logits, tokens, count = case["logits"][:, :positions], case["tokens"], case["count"].clamp(max=positions)
    index = case["index"].long() if "index" in case else None
    law = PointMass(tokens) if kind == "point" else CompactLaw(case["draft_logits"], index, case["drawn"])
    draws = Draws(Philox(), case["seed"], case["start"], base=2)
    case |= {"logits": logits, "count": count}
    for temperature in (None, 0.0):
        engine = rule_for(rule, do_sample=temperature is None)
        verdict = engine.verify(logits, Proposal(tokens, count.tolist(), law), draws)
        result = ops.verify(rule=rule, base=2, temperature=temperature, **case, backend=backend)
        assert torch.equal(result.accepted, verdict.accepted)
        assert torch.equal(result.token, verdict.token)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_one_hot_laws_that_agree_accept_everything(backend, rule):
    tokens = torch.tensor([[3, 1], [0, 4]])
    logits = torch.full((2, 3, 5), -INF).scatter_(2, torch.tensor([[[3], [1], [2]], [[0], [4], [4]]]), 0.0)
    key = torch.zeros(2, dtype=torch.int64)
    count = torch.tensor([2, 2])
    for law in ({}, {"draft_logits": logits[:, :2]}):
        result = ops.verify(
            logits, tokens, count, rule=rule, seed=key, start=key, log_probs=True, **law, backend=backend
        )
        assert result.accepted.tolist() == [2, 2]
        assert result.token.tolist() == [2, 4]
        assert result.log_prob.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_disjoint_supports_reject_at_once_and_draw_from_the_target(backend, rule):
    rows = 50
    logits, draft = torch.zeros(rows, 2, 6), torch.zeros(rows, 1, 6)
    logits[..., 3:], draft[..., :3] = -INF, -INF
    key = torch.arange(rows)
    tokens = torch.full((rows, 1), 4)
    count = torch.ones(rows, dtype=torch.int64)
    result = ops.verify(logits, tokens, count, rule=rule, seed=key, start=key, draft_logits=draft, backend=backend)
    assert result.accepted.tolist() == [0] * rows
    assert set(result.token.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_residual_with_one_entry_leaves_no_choice(backend, rule):
    rows = 200
    p, q = torch.tensor([0.3, 0.3, 0.4]), torch.tensor([0.35, 0.35, 0.3])
    logits, draft = p.log().expand(rows, 2, 3), q.log().expand(rows, 1, 3)
    key = torch.arange(rows)
    tokens = torch.zeros(rows, 1, dtype=torch.int64)
    count = torch.ones(rows, dtype=torch.int64)
    result = ops.verify(logits, tokens, count, rule=rule, seed=key, start=key, draft_logits=draft, backend=backend)
    rejected = result.token[result.accepted == 0]
    assert 5 < len(rejected) < 100
    assert set(rejected.tolist()) == {2}


def impossible_drafts(backend):
    """A token that neither law can draw, one outside the vocabulary, one that the drafter cannot draw."""
    rows = 64
    logits = torch.tensor([-INF, 0.0, 1.0]).expand(rows, 2, 3)
    tokens = torch.tensor([[0], [-1], [3], [2]] * (rows // 4))
    draft = torch.tensor([-INF, 0.0, -INF]).expand(rows, 1, 3)
    key, count = torch.arange(rows), torch.ones(rows, dtype=torch.int64)
    drawn = tokens.clamp(0, 2)
    law = {"draft_logits": draft, "drawn": drawn}
    return [
        ops.verify(logits, tokens, count, rule=rule, seed=key, start=key, **law, backend=backend).accepted
        for rule in ("token", "block")
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_have_been_drawn_is_rejected(backend):
    for accepted in impossible_drafts(backend):
        assert not accepted.any()


def test_a_comparison_that_is_not_strict_is_noticed(monkeypatch):
    monkeypatch.setattr(reference, "accept", lambda log_p, log_q, u: log_p >= u.log() + log_q)
    assert impossible_drafts("reference")[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equality_is_no_acceptance(backend):
    """log p = log u + log q exactly, with u found by search: 2^-k is a number that Philox gives now and then."""
    rows = 2**16
    key, place = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    u = Philox().uniform(key, place, place, Purpose.ACCEPT)
    # log of float32 numbers, so that the score is exactly log u: softmax over {log u, log(1 - u)} has total 1
    logits = torch.stack([u.log(), (-u).log1p()], -1).float()
    tokens, count = torch.zeros(rows, 1, dtype=torch.int64), torch.ones(rows, dtype=torch.int64)
    result = ops.verify(logits.unsqueeze(1), tokens, count, rule="token", seed=key, start=place, backend=backend)
    expected = reference.log_prob(logits, place) > u.log()
    assert torch.equal(result.accepted.bool(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_an_undefined_row_has_a_status_and_spoils_no_other(backend, rule):
    case = proposal("dense", 12, 2, 50, torch.float32, generator(9))
    case["count"] = torch.full((12,), 2)
    before = ops.verify(rule=rule, **case, backend=backend)
    case["logits"] = case["logits"].clone()
    case["logits"][4, 0, 17] = NAN
    case["logits"][5, 0] = -INF
    case["draft_logits"] = case["draft_logits"].clone()
    case["draft_logits"][6, 0, 3] = NAN
    after = ops.verify(rule=rule, **case, backend=backend)
    sound = torch.tensor([0, 1, 2, 3, 7, 8, 9, 10, 11])
    assert all(torch.equal(a[sound], b[sound]) for a, b in zip(before, after, strict=True))
    assert after.status[[4, 5]].tolist() == [ops.Status.TARGET] * 2
    assert after.accepted[[4, 5]].tolist() == [0, 0]
    assert after.token[[4, 5]].tolist() == [0, 0]
    if rule != "match":
        assert after.status[6] == ops.Status.DRAFT
        assert after.accepted[6] == 0
        assert 0 <= after.token[6] < 50


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_no_drafts(backend):
    none = torch.zeros(0, dtype=torch.int64)
    empty = ops.verify(
        torch.zeros(0, 3, 5),
        torch.zeros(0, 2, dtype=torch.int64),
        none,
        rule="token",
        seed=none,
        start=none,
        backend=backend,
    )
    assert all(part.shape[0] == 0 for part in empty)
    logits, key = torch.randn(4, 1, 9, generator=generator()), torch.arange(4)
    tokens = torch.zeros(4, 0, dtype=torch.int64)
    for rule in RULES:
        result = ops.verify(logits, tokens, torch.zeros_like(key), rule=rule, seed=key, start=key, backend=backend)
        purpose = Purpose.TARGET if rule == "match" else Purpose.RESIDUAL
        drawn = ops.sample(logits[:, 0], seed=key, position=key, purpose=purpose, backend=backend)
        assert torch.equal(result.token, drawn.token)


@pytest.mark.parametrize("backend", FAST)
def test_every_output_is_written(backend):
    """Outputs come from uninitialised memory; torch can fill it with what shows."""
    case = proposal("dense", 12, 3, 50, torch.float32, generator(10))
    plain = [ops.verify(rule=rule, log_probs=True, **case, backend=backend) for rule in RULES]
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = [ops.verify(rule=rule, log_probs=True, **case, backend=backend) for rule in RULES]
    finally:
        torch.use_deterministic_algorithms(was)
    for one, other in zip(plain, poisoned, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
        assert not other.log_prob.isnan().any()


@pytest.mark.parametrize("backend", FAST)
def test_strides_batches_and_threads_change_no_bit(backend):
    case = proposal("compact", 5, 3, 6001, torch.bfloat16, generator(11))
    for rule in RULES:
        whole = ops.verify(rule=rule, log_probs=True, **case, backend=backend)
        wide = torch.nn.functional.pad(case["logits"], (3, 9))[..., 3:-9]
        torch.set_num_threads(2)
        try:
            others = [ops.verify(rule=rule, log_probs=True, **case | {"logits": wide}, backend=backend)]
        finally:
            torch.set_num_threads(1)
        for row in range(5):
            own = {name: value if name == "index" else value[row : row + 1] for name, value in case.items()}
            alone = ops.verify(rule=rule, log_probs=True, **own, backend=backend)
            assert all(torch.equal(a[row : row + 1], b) for a, b in zip(whole, alone, strict=True))
        assert all(torch.equal(*pair) for pair in zip(whole, *others, strict=True))


def peak_growth(call):
    """By how many bytes the process grew beyond its size before the call, at the worst moment."""

    def status(field):
        text = Path("/proc/self/status").read_text()
        return int(text.partition(f"{field}:")[2].split()[0]) * 1024

    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not serve the call
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


@pytest.mark.skipif(
    not (Path("/proc/self/clear_refs").exists() and hasattr(ctypes.CDLL(None), "malloc_trim")),
    reason="nothing to measure memory with",
)
@pytest.mark.parametrize("rule", RULES)
def test_no_buffer_is_as_wide_as_a_row(rule):
    width = 262147
    case = proposal("dense", 8, 2, width, torch.bfloat16, generator(12))
    limits = {"top_k": 1000, "top_p": 0.9, "min_p": 1e-6}
    limits |= {f"draft_{name}": value for name, value in limits.items()}
    for backend in FAST:
        name = backend.values[0]
        for given in (case, case | limits):
            ops.verify(rule=rule, **given, backend=name)
            assert peak_growth(lambda name=name, given=given: ops.verify(rule=rule, **given, backend=name)) < width * 4
    assert peak_growth(lambda: ops.verify(rule=rule, **case, backend="reference")) > 8 * width * 4
