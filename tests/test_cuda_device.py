"""The CUDA kernels on a device against the reference on the same device, by the queue and by clusters of every size.

A device without clusters runs the queue whatever size is asked for. Memory and race checkers are run over this file by
``benchmarks/gpu.sh``.
"""

import pytest
import test_ops_law as law
import torch
from op_cases import DTYPES, INF, NAN, differing, edge_rows, filters, proposal, run_both, verify_both

from specdec_fast import dispatch, ops
from specdec_fast.reference_ops import compressed_rows

MISSING = dispatch.why_not("verify", "cuda") or (None if torch.cuda.is_available() else "no CUDA device")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"cuda: {MISSING}")
DEVICE = "cuda"
TILE = 4096
WIDTHS = (1, 17, 111, TILE - 1, TILE, TILE + 1, 2 * TILE, 32000, 32001)
RULES = ("match", "token", "block")
KINDS = ("point", "dense", "wide", "compact", "heads", "sparse")
TEAM = "SPECDEC_FAST_CUDA_TEAM"


@pytest.fixture(params=["0", "1", "2", "4", "8"], ids="team{}".format)
def teams(request, monkeypatch):
    monkeypatch.setenv(TEAM, request.param)


@pytest.fixture(params=["0", "8"], ids="team{}".format)
def both(request, monkeypatch):
    monkeypatch.setenv(TEAM, request.param)


def moved(case):
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in case.items()}


def keys(rows):
    return moved({"seed": torch.arange(rows) - 5, "position": torch.arange(rows) * 2**31})


def generator(seed):
    return torch.Generator().manual_seed(seed)


# --- the reference's decisions ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_sample(teams, dtype, width):
    logits = edge_rows((torch.randn(14, width, generator=generator(width)) * 4).to(dtype)).to(DEVICE)
    setting = moved(filters(14, generator(width)))
    for case in ({}, {"temperature": setting["temperature"]}, setting):
        assert differing(*run_both("cuda", logits, **keys(14), **case)) == 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_verify(teams, rule, kind, dtype):
    for width in (16, 111, TILE + 1, 3 * TILE):
        case = proposal(kind, 30, 4, width, dtype, generator(width))
        case["logits"][:6, 1] = edge_rows(case["logits"][:6, 1].clone())
        if "draft_logits" in case:
            case["draft_logits"][10, 0, 0], case["draft_logits"][11, 0, 1] = NAN, INF
        setting, draft = filters(30, generator(1)), filters(30, generator(2), "draft_")
        draft["draft_temperature"] = draft["draft_temperature"].flip(0)
        for more in ({}, {"temperature": setting["temperature"]}, setting, setting | draft):
            assert differing(*verify_both("cuda", **moved(case | more), rule=rule)) == 0


@pytest.mark.parametrize("rule", ["token", "block"])
def test_mixed_kinds_ragged_counts_and_fewer_positions(both, rule):
    case = proposal("dense", 40, 4, 600, torch.float32, generator(6))
    sparse = proposal("sparse", 40, 4, 600, torch.float32, generator(6))
    case |= {name: sparse[name] for name in ("sparse_ids", "sparse_log_q")}
    case["kind"] = torch.randint(0, 3, (40, 4), generator=generator(7)).int()
    case["tokens"][3, 1], case["tokens"][4, 0] = -7, 600
    for positions in (1, 3, 5):
        part = moved(case | {"logits": case["logits"][:, :positions]})
        assert differing(*verify_both("cuda", **part, rule=rule)) == 0


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("kind", ["dense", "compact"])
def test_what_the_drafters_sample_hands_over_changes_nothing(both, rule, kind):
    case = moved(proposal(kind, 60, 3, 9000, torch.bfloat16, generator(4)))
    flat = case["draft_logits"].flatten(0, 1)
    handed = ops.sample(flat, **keys(180), temperature=0.9, backend="cuda").logsumexp.view(60, 3).clone()
    handed[5, 0] = NAN  # not known there
    case |= {"draft_temperature": torch.full((60,), 0.9, device=DEVICE), "draft_logsumexp": handed}
    assert differing(*verify_both("cuda", **case, rule=rule)) == 0


@pytest.mark.parametrize("width", [128256, 151936, 262147])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_large_vocabularies(teams, rule, width):
    """A token may differ where u is within float error of an edge; among 16 rows that is not seen."""
    case = proposal("compact", 16, 4, width, torch.bfloat16, generator(1))
    assert differing(*verify_both("cuda", **moved(case), rule=rule)) == 0
    common = {"top_k": torch.full((16,), 50, dtype=torch.int32), "top_p": torch.full((16,), 0.9)}
    assert differing(*verify_both("cuda", **moved(case | common), rule=rule)) == 0


def test_filters_on_rows_of_ties(both):
    logits = torch.randint(0, 3, (24, 5 * TILE + 9), generator=generator(12)).float()
    logits[:4], logits[4] = 4.25, -0.0
    logits[4, ::2] = 0
    top_p = torch.tensor([0.5, 0.25, 0.1, 0.9]).repeat(6)
    top_k = torch.tensor([1, 5, 700, 2049] * 6, dtype=torch.int32)
    for setting in ({"top_p": top_p}, {"top_k": top_k}, {"top_p": top_p, "top_k": top_k}, {"top_p": top_p * 0}):
        assert differing(*run_both("cuda", logits.to(DEVICE), **keys(24), **moved(setting))) == 0


def test_many_rows_take_several_tiles_at_once():
    case = proposal("dense", 160, 4, 9 * TILE + 5, torch.bfloat16, generator(2))
    assert differing(*verify_both("cuda", **moved(case), rule="token")) == 0


def test_softmax_project_and_range_sums():
    size = 3 * TILE + 5
    logits = edge_rows(torch.randn(14, size, generator=generator(13)) * 4).to(DEVICE)
    for setting in ({}, moved(filters(14, generator(14)))):
        expected, result = (ops.softmax(logits, **setting, backend=name) for name in ("reference", "cuda"))
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-15, equal_nan=True)
    row_start, column = compressed_rows(torch.randint(-1, 300, (size,), generator=generator(15)), 300)
    low, high = torch.randint(-5, size + 9, (2, 3, 40), generator=generator(16)).to(DEVICE)
    order = torch.randperm(size, generator=generator(17))[: size - 7].int().to(DEVICE)
    for dtype in (torch.float32, torch.float64):
        q = torch.randn(3, size, generator=generator(18)).to(DEVICE, dtype).softmax(-1)
        for op, arguments in (
            (ops.project, moved({"row_start": row_start, "column": column})),
            (ops.range_sums, {"low": low, "high": high}),
            (ops.range_sums, {"low": low, "high": high, "order": order}),
        ):
            expected, result = (op(q, **arguments, backend=name) for name in ("reference", "cuda"))
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-14)


# --- the law, and what would break it ---


@pytest.fixture
def law_on_the_device(monkeypatch):
    """The batches of test_ops_law.py live on the device."""
    for name in ("TARGET", "DRAFT", "KNOWN"):
        monkeypatch.setattr(law, name, getattr(law, name).to(DEVICE))
    with torch.device(DEVICE):
        yield law.TARGET.cpu()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gamma", [1, 3])
def test_committed_tokens_have_the_targets_law(law_on_the_device, rule, gamma):
    tokens, accepted = law.committed("cuda", rule, gamma)
    assert min(law.p_values(tokens.cpu(), law_on_the_device)) > 1e-5
    assert 0.05 < float(accepted.double().mean()) < 0.9 * gamma


@pytest.mark.parametrize("rule", ["token", "block"])
def test_the_same_with_a_compact_drafter_and_filters(law_on_the_device, rule):
    tokens, _ = law.committed("cuda", rule, 2, make=law.compact_proposals, temperature=0.8, min_p=0.1)
    p = (law_on_the_device / 0.8).softmax(-1)
    scores = (law_on_the_device / 0.8).masked_fill(p < 0.1 * p.amax(-1, keepdim=True), -INF)
    assert min(law.p_values(tokens.cpu(), scores)) > 1e-5


@pytest.mark.parametrize("fault", ["shared noise", "swapped", "last tile", "wrong normaliser", "wrong bonus row"])
def test_a_planted_fault_changes_the_law(law_on_the_device, fault):
    make = law.compact_proposals if fault in ("wrong normaliser", "shared noise") else law.proposals
    tokens, _ = law.committed("cuda", "token", 1, make=make, fault=fault)
    assert min(law.p_values(tokens.cpu(), law_on_the_device)) < 1e-9


# --- pinned outcomes and edges ---


@pytest.mark.parametrize("rule", RULES)
def test_pinned_outcomes(both, rule):
    """One-hot laws accept all, disjoint supports reject at once, a residual of one entry is that entry."""
    width, case = TILE + 50, moved({"seed": torch.arange(9), "start": torch.arange(9), "count": torch.full((9,), 3)})
    certain = torch.full((9, 4, width), -INF, device=DEVICE)
    certain[..., TILE + 7] = 0
    tokens = torch.full((9, 3), TILE + 7, device=DEVICE)
    result = ops.verify(certain, tokens, draft_logits=certain[:, :3], rule=rule, backend="cuda", **case)
    assert result.accepted.tolist() == [3] * 9 and result.token.tolist() == [TILE + 7] * 9
    other = torch.full((9, 3, width), -INF, device=DEVICE)
    other[..., 5] = 0
    result = ops.verify(certain, tokens * 0 + 5, draft_logits=other, rule=rule, backend="cuda", **case)
    assert result.accepted.tolist() == [0] * 9 and result.token.tolist() == [TILE + 7] * 9


def test_no_rows():
    empty = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert ops.sample(torch.zeros(0, 9, device=DEVICE), seed=empty, position=empty, backend="cuda").token.numel() == 0
    tokens, logits = empty.view(0, 2)[:, :2], torch.zeros(0, 3, 9, device=DEVICE)
    result = ops.verify(logits, tokens, empty, rule="block", seed=empty, start=empty, backend="cuda")
    assert result.accepted.numel() == 0


@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_extreme_temperatures_and_logits(both, temperature):
    case = proposal("dense", 30, 3, TILE + 9, torch.float32, generator(8))
    for name in ("logits", "draft_logits"):
        case[name] = (case[name] * 20).clamp(-60, 60)
    for rule in RULES:
        setting = {"temperature": temperature, "draft_temperature": temperature}
        assert differing(*verify_both("cuda", **moved(case), **setting, rule=rule)) == 0


def test_rows_of_infinities_and_masked_entries(both):
    logits = torch.randn(6, 151936, generator=generator(7))
    logits[:, 1000:150000] = -INF
    logits[3, 77] = logits[3, 150500] = INF
    assert differing(*run_both("cuda", logits.to(DEVICE), **keys(6))) == 0


def test_offsets_beyond_32_bits():
    """A row whose entries lie behind the 2^32nd of its tensor, through a row stride."""
    stride, width = 2**31 + 4096, 5000
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs a GPU with 10 GB of free memory")
    memory = torch.zeros(2 * stride + width, dtype=torch.bfloat16, device=DEVICE)
    logits = memory.as_strided((3, width), (stride, 1))
    logits.copy_(torch.randn(3, width, generator=generator(4)))
    assert differing(*run_both("cuda", logits, **keys(3))) == 0
    assert differing(*run_both("cuda", logits, **keys(3), top_p=0.9)) == 0


# --- bits, graphs, memory, torch ---


@pytest.mark.parametrize("setting", [{}, {"top_k": 300, "top_p": 0.95}], ids=["plain", "filtered"])
def test_bits_repeat_and_depend_on_neither_the_batch_nor_the_kernel(monkeypatch, setting):
    case = moved(proposal("dense", 64, 4, 32001, torch.float32, generator(3))) | setting
    monkeypatch.setenv(TEAM, "0")
    first = ops.verify(**case, rule="block", log_probs=True, backend="cuda")
    for team in [0] * 10 + [1, 2, 4, 8]:
        monkeypatch.setenv(TEAM, str(team))
        again = ops.verify(**case, rule="block", log_probs=True, backend="cuda")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    monkeypatch.delenv(TEAM)
    for row in (0, 31, 63):
        own = {name: value[row : row + 1] if isinstance(value, torch.Tensor) else value for name, value in case.items()}
        alone = ops.verify(**own, rule="block", log_probs=True, backend="cuda")
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(first, alone, strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("setting", [{}, {"top_k": 50, "top_p": 0.9}], ids=["plain", "filtered"])
def test_a_graph_replays_with_new_numbers_and_new_logits(both, rule, setting):
    rows = 8
    kinds = {"top_k": torch.int32, "top_p": torch.float32}
    law_ = {name: torch.full((rows,), value, dtype=kinds[name], device=DEVICE) for name, value in setting.items()}
    case = moved(proposal("dense", rows, 4, 32000, torch.bfloat16, generator(5))) | law_
    ops.verify(**case, rule=rule, log_probs=True, backend="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.verify(**case, rule=rule, log_probs=True, backend="cuda")
    for turn in range(3):
        case["start"] += 7
        case["count"].fill_(4 - turn)
        case["logits"][:, 1] = torch.randn_like(case["logits"][:, 1]) * 3
        for output in captured:  # every element is written
            output.fill_(-77)
        graph.replay()
        eager = ops.verify(**case, rule=rule, log_probs=True, backend="cuda")
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True)), turn


def test_every_element_is_written(both):
    """What the allocator hands out is filled with a pattern that no output or scratch word may keep."""
    case = moved(proposal("compact", 24, 4, TILE + 77, torch.float32, generator(9)))
    expected = ops.verify(**case, rule="block", log_probs=True, backend="reference")
    for fill in (NAN, -1e30):
        poison = [torch.full((size,), fill, dtype=torch.float64, device=DEVICE) for size in (1, 24, 120, 4096, 2**17)]
        del poison
        result = ops.verify(**case, rule="block", log_probs=True, backend="cuda")
        assert differing(expected, result) == 0


def test_no_buffer_is_as_long_as_a_row():
    case = moved(proposal("dense", 64, 4, 32000, torch.bfloat16, generator(6)))
    for setting in ({}, {"top_p": torch.full((64,), 0.9, device=DEVICE)}):
        ops.verify(**case, **setting, rule="token", backend="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ops.verify(**case, **setting, rule="token", backend="cuda")
        assert torch.cuda.max_memory_allocated() - before < 1_000_000


@pytest.mark.parametrize("op", ["sample", "verify", "softmax"])
def test_opcheck(op):
    key, wide = torch.arange(4), torch.randn(4, 3, 20, generator=generator(10))
    given = {"temperature": torch.full((4,), 0.8), "top_k": torch.full((4,), 9, dtype=torch.int32)}
    given |= {"top_p": torch.full((4,), 0.9), "min_p": torch.full((4,), 0.01)}
    setting = [value.to(DEVICE) for value in given.values()]
    wide, key = wide.to(DEVICE), key.to(DEVICE)
    arguments = {
        "sample": (wide[:, 0], *setting, key, key, None, 3),
        "softmax": (wide[:, 0], *setting),
        "verify": (
            *(wide, *setting, wide[:, :2].argmax(-1), key.clamp(max=2), None, wide[:, :2], *setting),
            *(None, None, None, None, None, key, key, 0, 2, True),
        ),
    }[op]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(torch.ops.specdec_fast, op).default, arguments, test_utils=tests)


def test_a_round_compiles_to_one_graph():
    case = moved(proposal("dense", 4, 2, 20, torch.float32, generator(11)))
    logits = case.pop("logits")

    def one_round(logits):
        first = ops.sample(logits[:, 0], seed=case["seed"], position=case["start"], temperature=0.7, backend="cuda")
        return first.token + 1, ops.verify(logits, rule="token", log_probs=True, backend="cuda", **case)

    token, verdict = torch.compile(one_round, fullgraph=True, backend="aot_eager")(logits)
    expected_token, expected = one_round(logits)
    assert torch.equal(token, expected_token)
    assert all(torch.equal(*pair) for pair in zip(verdict, expected, strict=True))
