"""`sample` and `softmax`: every backend against the reference, the filters against Transformers', and the edges."""

import math

import pytest
import scipy.stats
import torch
from laws import chi_square
from op_cases import BACKENDS, DTYPES, FAST, INF, NAN, differing, edge_rows, filters, run_both
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specdec_fast import ops, reference
from specdec_fast.randomness import Philox, Purpose

# around the chunks of the CPU kernels and the lanes of their vectors, and what real models have
WIDTHS = (1, 2, 15, 16, 17, 111, 2047, 2048, 2049, 4095, 4097, 32001)
LARGE = (151936, 262147)


def keys(rows):
    return {"seed": torch.arange(rows) - 5, "position": torch.arange(rows) * 2**31}


def logits_of(rows, width, dtype=torch.float32, seed=0):
    return (torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 4).to(dtype)


def every_setting(rows):
    generator = torch.Generator().manual_seed(3)
    every = filters(rows, generator)
    return [{}, {"temperature": every["temperature"]}, *({name: every[name]} for name in list(every)[1:]), every]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_backend_samples_what_the_reference_samples(backend, dtype, width):
    logits = edge_rows(logits_of(12, width, dtype))
    for setting in every_setting(12):
        assert differing(*run_both(backend, logits, **keys(12), **setting)) == 0


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", LARGE)
def test_large_vocabularies_differ_only_at_an_edge(backend, dtype, width):
    """A token may differ only where u is within float error of an edge of the cumulative sum."""
    rows = 3
    logits = logits_of(rows, width, dtype)
    for setting in ({}, {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.01}):
        expected, result = run_both(backend, logits, **keys(rows), **setting)
        edges = ops.softmax(logits, **setting, backend="reference").cumsum(1)
        u = Philox().uniform(*keys(rows).values(), torch.zeros(rows, dtype=torch.int64), Purpose.TARGET)
        for row in (expected.token != result.token).nonzero().flatten().tolist():
            between = edges[row, min(expected.token[row], result.token[row])]
            assert abs(float(between - u[row])) < 1e-12
        torch.testing.assert_close(result.logsumexp, expected.logsumexp, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 111, 2049])
def test_softmax_is_the_references(backend, dtype, width):
    logits = edge_rows(logits_of(12, width, dtype))
    for setting in every_setting(12):
        expected, result = (ops.softmax(logits, **setting, backend=name) for name in ("reference", backend))
        torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-300, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "warpers, setting",
    [
        ([TemperatureLogitsWarper(0.7)], {"temperature": 0.7}),
        ([TopKLogitsWarper(9)], {"top_k": 9}),
        ([TopPLogitsWarper(0.8)], {"top_p": 0.8}),
        ([TopPLogitsWarper(0.0)], {"top_p": 0.0}),
        ([MinPLogitsWarper(0.1)], {"min_p": 0.1}),
        (
            [TemperatureLogitsWarper(1.7), TopKLogitsWarper(40), TopPLogitsWarper(0.7), MinPLogitsWarper(0.05)],
            {"temperature": 1.7, "top_k": 40, "top_p": 0.7, "min_p": 0.05},
        ),
    ],
)
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_filters_are_those_of_transformers(backend, warpers, setting, step):
    """`step` rounds the scores, so that many are equal; which of them Transformers' unstable sort drops is open."""
    logits = logits_of(40, 200, seed=1)
    if step:
        logits = (logits / step).round() * step
    scores = logits
    for warper in warpers:
        scores = warper(None, scores)
    p = ops.softmax(logits, **setting, backend=backend)
    expected = scores.double().softmax(-1)
    if step:
        p, expected = p.sort(1).values, expected.sort(1).values
    assert torch.equal(p > 0, expected > 0)
    torch.testing.assert_close(p, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_at_the_edge_of_top_p_go_by_id(backend):
    """Of equal scores the lower ids are dropped first, as a stable ascending sort has them."""
    p = ops.softmax(torch.tensor([[1.0, 2.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, -INF]]), top_p=0.5, backend=backend)
    assert (p > 0).tolist() == [[False, True, False, False, True], [False, False, True, True, False]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", [{"top_k": 0}, {"top_p": 1.0}, {"min_p": 0.0}, {"top_k": -1}, {"top_k": 99}])
def test_filters_that_are_off_change_nothing(backend, setting):
    logits = edge_rows(logits_of(8, 33))
    assert torch.equal(
        ops.softmax(logits, **setting, backend=backend).nan_to_num(), ops.softmax(logits, backend=backend).nan_to_num()
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_zero_is_the_lowest_of_the_largest(backend):
    logits = torch.tensor([[1.0, 3.0, 3.0], [NAN, 0.0, 0.0], [-INF, -INF, -INF], [0.0, INF, INF], [-0.0, 0.0, -1.0]])
    result = ops.sample(logits, **keys(5), temperature=0.0, top_k=1, backend=backend)
    assert result.token.tolist() == [1, 0, 0, 1, 0]
    assert result.status.tolist() == [0, ops.Status.TARGET, ops.Status.TARGET, 0, 0]
    torch.testing.assert_close(result.log_prob, torch.tensor([0, NAN, NAN, 0, 0]).double(), equal_nan=True)
    torch.testing.assert_close(result.logsumexp, torch.tensor([3.0, NAN, NAN, INF, 0]).double(), equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_undefined_row_has_a_status_and_spoils_no_other(backend):
    logits = logits_of(9, 50)
    alone = ops.sample(logits, **keys(9), backend=backend)
    spoilt = logits.clone()
    spoilt[4, 17], spoilt[5] = NAN, -INF
    result = ops.sample(spoilt, **keys(9), backend=backend)
    sound = torch.tensor([0, 1, 2, 3, 6, 7, 8])
    for before, after in zip(alone, result, strict=True):
        assert torch.equal(before[sound], after[sound])
    assert result.status[4:6].tolist() == [ops.Status.TARGET] * 2
    assert result.token[4:6].tolist() == [0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_extreme_temperatures(backend, temperature):
    logits = torch.tensor([[60.0, 59.9, -60.0, 0.0]])
    scores = (logits / temperature)[0].tolist()
    top = [math.exp(x - scores[0]) for x in scores]
    p = ops.softmax(logits, temperature=temperature, backend=backend)
    expected = torch.tensor([[x / sum(top) for x in top]], dtype=torch.float64)
    torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("backend", FAST)
def test_strides_batches_and_threads_change_no_bit(backend):
    wide = logits_of(6, 9001)
    whole = ops.sample(wide[:, :4500], **keys(6), temperature=0.8, backend=backend)
    copied = ops.sample(wide[:, :4500].contiguous(), **keys(6), temperature=0.8, backend=backend)
    torch.set_num_threads(2)
    try:
        threaded = ops.sample(wide[:, :4500], **keys(6), temperature=0.8, backend=backend)
    finally:
        torch.set_num_threads(1)
    strided = wide.t().contiguous().t()[:, :4500]
    for other in (copied, threaded, ops.sample(strided, **keys(6), temperature=0.8, backend=backend)):
        assert all(torch.equal(*pair) for pair in zip(whole, other, strict=True))
    for row in range(6):
        own = {name: key[row : row + 1] for name, key in keys(6).items()}
        alone = ops.sample(wide[row : row + 1, :4500], **own, temperature=0.8, backend=backend)
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    result = ops.sample(torch.zeros(0, 5), **keys(0), backend=backend)
    assert all(part.shape == (0,) for part in result)
    assert ops.softmax(torch.zeros(0, 5), backend=backend).shape == (0, 5)


@pytest.mark.parametrize("backend", FAST)
def test_every_output_is_written(backend):
    """Outputs come from uninitialised memory; torch can fill it with what shows."""
    logits = logits_of(8, 2100)
    q = ops.softmax(logits, backend=backend)
    order = torch.arange(2100, dtype=torch.int32)
    ends = torch.full((8, 3), 2000)

    def outputs():
        yield from ops.sample(logits, **keys(8), temperature=0.7, backend=backend)
        yield ops.softmax(logits, top_k=7, backend=backend)
        yield ops.project(q, torch.cat([order, order[-1:]]), order[:-1], backend=backend)
        yield ops.range_sums(q, ends - 1500, ends, order=order, backend=backend)

    plain = list(outputs())
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = list(outputs())
    finally:
        torch.use_deterministic_algorithms(was)
    assert all(torch.equal(*pair) for pair in zip(plain, poisoned, strict=True))


def drawn_counts(backend, logits, **setting):
    draws = torch.arange(200_000)
    seed = torch.full_like(draws, 11)
    token = ops.sample(logits.expand(len(draws), -1), seed=seed, position=draws, **setting, backend=backend).token
    return torch.bincount(token, minlength=37)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", [{}, {"temperature": 0.9, "top_k": 20, "top_p": 0.85, "min_p": 0.02}])
def test_the_drawn_law(backend, setting):
    logits = logits_of(1, 37, seed=5) / 4
    scores = logits / setting.get("temperature", 1.0)
    if setting:
        for warper in (TopKLogitsWarper(20), TopPLogitsWarper(0.85), MinPLogitsWarper(0.02)):
            scores = warper(None, scores)
    p = scores.double().softmax(-1)[0]
    assert chi_square(drawn_counts(backend, logits, **setting), p) > 1e-4


def test_the_law_of_a_row_without_its_last_tile_is_noticed():
    logits = logits_of(1, 37, seed=5) / 4
    assert chi_square(drawn_counts("reference", logits[:, :32]), logits.double().softmax(-1)[0]) < 1e-9


@pytest.mark.parametrize("backend", FAST)
def test_a_row_that_misses_a_tile_is_noticed(backend):
    """The comparison with the reference is no formality: a normaliser or a tail left out shows at once."""
    logits = logits_of(200, 2100) / 4
    whole = ops.sample(logits, **keys(200), backend="reference")
    cut = ops.sample(logits[:, :2048], **keys(200), backend=backend)
    assert int((whole.token != cut.token).sum()) > 3
    assert not torch.allclose(whole.logsumexp, cut.logsumexp, rtol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_are_those_of_the_key(backend):
    """The token is the inverse of the cumulative sum at the number of (seed, position, offset, purpose)."""
    logits = logits_of(500, 40)
    seed, position, offset = (torch.randint(-(2**62), 2**62, (500,)) for _ in range(3))
    offset = offset % 2**24
    drawn = ops.sample(logits, seed=seed, position=position, offset=offset, purpose=Purpose.DRAFT, backend=backend)
    u = Philox().uniform(seed, position, offset, Purpose.DRAFT)
    assert torch.equal(drawn.token, reference.draw(reference.masses(logits), u))
    other = ops.sample(logits, seed=seed, position=position, offset=offset, backend=backend)
    assert scipy.stats.binomtest(int((other.token == drawn.token).sum()), 500, 0.2).statistic < 0.6
