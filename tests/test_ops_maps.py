"""`project` and `range_sums` against their definitions."""

import pytest
import torch
from op_cases import BACKENDS

from specdec_fast import ops
from specdec_fast.reference_ops import compressed_rows


def law(rows, width, dtype=torch.float64, seed=0):
    logits = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return logits.double().softmax(-1).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("entries, width", [(1, 1), (7, 3), (300, 111), (111, 32001)])
def test_projection_adds_up_what_stands_for_a_token(backend, dtype, entries, width):
    index = torch.randint(-1, width + 1, (entries,), generator=torch.Generator().manual_seed(1))
    q = law(3, entries, dtype)
    psi = ops.project(q, *compressed_rows(index, width), backend=backend)
    expected = torch.zeros(3, width, dtype=torch.float64)
    for d, t in enumerate(index.tolist()):
        if 0 <= t < width:
            expected[:, t] += q[:, d]
    torch.testing.assert_close(psi, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_range_has_its_mass(backend):
    q = law(2, 40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))[:30]
    low, high = torch.cartesian_prod(torch.arange(-2, 33), torch.arange(-2, 33)).T.unsqueeze(1).expand(2, 2, -1)
    for given in (order.int(), None):
        sums = ops.range_sums(q, low, high, order=given, backend=backend)
        listed = q if given is None else q[:, order]
        for column, (a, b) in enumerate(zip(low[0].tolist(), high[0].tolist(), strict=True)):
            mass = listed[:, max(a, 0) : max(b, 0)].sum(1)
            torch.testing.assert_close(sums[:, column], mass, rtol=0, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_and_no_rows(backend):
    q = law(4, 50)
    row_start, column = compressed_rows(torch.arange(25) % 6, 6)
    low, high = torch.zeros(4, 1, dtype=torch.int64), torch.full((4, 1), 9)
    for view in (q[:, ::2], q.T.contiguous().T[:, 1:26], q[::2, :25]):
        for run in (
            lambda value: ops.project(value, row_start, column, backend=backend),
            lambda value: ops.range_sums(value, low[: len(value)], high[: len(value)], backend=backend),
        ):
            assert torch.equal(run(view), run(view.contiguous()))
    assert ops.project(q[:0], row_start, column, backend=backend).shape == (0, 6)
    assert ops.range_sums(q[:0], low[:0], high[:0], backend=backend).shape == (0, 1)


def test_ids_outside_the_vocabulary_are_an_error_and_no_access():
    """The reference raises what torch's indexing raises; the kernels must check for themselves."""
    q = law(1, 5)
    start, column = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([4, 5], dtype=torch.int32)
    ends = torch.zeros(1, 1, dtype=torch.int64)
    for backend in BACKENDS:
        name = backend if isinstance(backend, str) else backend.values[0]
        with pytest.raises((RuntimeError, IndexError), match=r"column must be in \[0, 5\)|out of range|out of bounds"):
            ops.project(q, start, column, backend=name)
        with pytest.raises((RuntimeError, IndexError), match=r"order must be in \[0, 5\)|out of range|out of bounds"):
            ops.range_sums(q, ends, ends, order=column, backend=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [63, 64, 65, 1000, 3000])
def test_a_range_has_the_same_mass_whatever_else_is_asked(backend, length):
    """Few ranges and many, on both sides of a tile of the CPU kernels."""
    q = law(2, 3000)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(3))[:length].int()
    ends = torch.arange(0, length + 1).expand(2, -1)
    low, high = ends.flip(1) // 2, ends
    every = ops.range_sums(q, low, high, order=order, backend=backend)
    exact = torch.nn.functional.pad(q[:, order.long()].cumsum(1), (1, 0))
    expected = (exact.gather(1, high) - exact.gather(1, low)).clamp(min=0)
    torch.testing.assert_close(every, expected, rtol=0, atol=1e-14)
    for column in (0, 1, length // 2, length):
        alone = ops.range_sums(q, low[:, [column]], high[:, [column]], order=order, backend=backend)
        assert torch.equal(alone, every[:, [column]])
