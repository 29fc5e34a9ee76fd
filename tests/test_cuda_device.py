"""The CUDA kernels on a device against the reference on the same device."""

import pytest
import torch
from op_cases import DTYPES, INF, differing, edge_rows, filters, proposal, run_both, verify_both

from specdec_fast import dispatch, ops

MISSING = dispatch.why_not("verify", "cuda") or (None if torch.cuda.is_available() else "no CUDA device")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"cuda: {MISSING}")
DEVICE = "cuda"
TILE = 4096
WIDTHS = (1, 17, 111, TILE - 1, TILE, TILE + 1, 2 * TILE, 32000, 32001)


def moved(case):
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in case.items()}


def keys(rows):
    return moved({"seed": torch.arange(rows) - 5, "position": torch.arange(rows) * 2**31})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_sample(dtype, width):
    generator = torch.Generator().manual_seed(width)
    logits = edge_rows((torch.randn(12, width, generator=generator) * 4).to(dtype)).to(DEVICE)
    for setting in ({}, moved({"temperature": filters(12, generator)["temperature"]})):
        assert differing(*run_both("cuda", logits, **keys(12), **setting)) == 0


@pytest.mark.parametrize("rule", ["match", "token", "block"])
@pytest.mark.parametrize("kind", ["point", "dense", "wide", "compact", "sparse"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_verify(rule, kind, dtype):
    for width in (16, 111, TILE + 1, 3 * TILE):
        generator = torch.Generator().manual_seed(width)
        case = proposal(kind, 30, 4, width, dtype, generator)
        case["logits"][:6, 1] = edge_rows(case["logits"][:6, 1].clone())
        temperature = filters(30, generator)["temperature"]
        for setting in ({}, {"temperature": temperature}, {"draft_temperature": temperature.flip(0)}):
            assert differing(*verify_both("cuda", **moved(case | setting), rule=rule)) == 0


@pytest.mark.parametrize("width", [128256, 151936, 262147])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_large_vocabularies(rule, width):
    """A token may differ where u is within float error of an edge; among 16 rows that is not seen."""
    case = proposal("compact", 16, 4, width, torch.bfloat16, torch.Generator().manual_seed(1))
    assert differing(*verify_both("cuda", **moved(case), rule=rule)) == 0


def test_many_rows_take_several_tiles_at_once():
    case = proposal("dense", 160, 4, 9 * TILE + 5, torch.bfloat16, torch.Generator().manual_seed(2))
    assert differing(*verify_both("cuda", **moved(case), rule="token")) == 0


def test_bits_repeat_and_do_not_depend_on_the_batch():
    case = moved(proposal("dense", 64, 4, 32001, torch.float32, torch.Generator().manual_seed(3)))
    first = ops.verify(**case, rule="block", log_probs=True, backend="cuda")
    for _ in range(20):
        again = ops.verify(**case, rule="block", log_probs=True, backend="cuda")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for row in (0, 31, 63):
        own = {name: value[row : row + 1] for name, value in case.items()}
        alone = ops.verify(**own, rule="block", log_probs=True, backend="cuda")
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(first, alone, strict=True))


def test_offsets_beyond_32_bits():
    """A row whose entries lie behind the 2^32nd of its tensor, through a row stride."""
    stride, width = 2**31 + 4096, 5000
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs a GPU with 10 GB of free memory")
    memory = torch.zeros(2 * stride + width, dtype=torch.bfloat16, device=DEVICE)
    logits = memory.as_strided((3, width), (stride, 1))
    logits.copy_(torch.randn(3, width, generator=torch.Generator().manual_seed(4)))
    assert differing(*run_both("cuda", logits, **keys(3))) == 0


def test_a_graph_replays_with_new_numbers_and_new_logits():
    case = moved(proposal("dense", 8, 4, 32000, torch.bfloat16, torch.Generator().manual_seed(5)))
    ops.verify(**case, rule="token", log_probs=True, backend="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.verify(**case, rule="token", log_probs=True, backend="cuda")
    for turn in range(3):
        case["start"] += 7
        case["logits"][:, 1] = torch.randn_like(case["logits"][:, 1]) * 3
        for output in captured:  # every element is written
            output.fill_(-77)
        graph.replay()
        eager = ops.verify(**case, rule="token", log_probs=True, backend="cuda")
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True)), turn


def test_no_buffer_is_as_long_as_a_row():
    case = moved(proposal("dense", 64, 4, 32000, torch.bfloat16, torch.Generator().manual_seed(6)))
    ops.verify(**case, rule="token", backend="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.verify(**case, rule="token", backend="cuda")
    assert torch.cuda.max_memory_allocated() - before < 1_000_000


def test_rows_of_infinities_and_masked_entries():
    logits = torch.randn(6, 151936, generator=torch.Generator().manual_seed(7))
    logits[:, 1000:150000] = -INF
    logits[3, 77] = logits[3, 150500] = INF
    assert differing(*run_both("cuda", logits.to(DEVICE), **keys(6))) == 0
