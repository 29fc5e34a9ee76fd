"""The reference operations against plain formulas, at their edges, and the law they draw from."""

import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import chi_square

from specdec_fast import reference
from specdec_fast.randomness import Philox, Purpose

INF = float("inf")
NAN = float("nan")
SMALLEST = 2.0**-54  # what Philox gives in place of zero
LARGEST = 1 - 2.0**-53

logits = st.floats(-60, 60, width=32) | st.just(-INF)
rows_of_logits = st.integers(1, 9).flatmap(
    lambda width: st.lists(st.lists(logits, min_size=width, max_size=width), min_size=1, max_size=4)
)
uniforms = st.floats(SMALLEST, LARGEST) | st.sampled_from([SMALLEST, 5e-17, 0.5, LARGEST])


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def softmax(row):
    """In Python numbers, summed exactly."""
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    total = math.fsum(weights)
    return [w / total for w in weights]


def first_above(weights, level):
    """The inverse of the cumulative sum, entry by entry: None where rounding cannot tell."""
    total, edge = math.fsum(weights), 0.0
    for i, weight in enumerate(weights):
        edge += weight / total
        if abs(edge - level) < 1e-13:
            return None
        if edge > level:
            return i
    return None


# masses and log_prob


@given(rows_of_logits)
def test_masses_and_log_prob_are_the_softmax(rows):
    rows = [row for row in rows if max(row) > -INF]
    if not rows:
        return
    scores = torch.tensor(rows, dtype=torch.float32)
    expected = f64(*map(softmax, rows)).reshape(scores.shape)
    torch.testing.assert_close(reference.masses(scores), expected, rtol=1e-13, atol=0)
    for token in range(scores.shape[1]):
        tokens = torch.full((len(rows),), token)
        torch.testing.assert_close(reference.log_prob(scores, tokens).exp(), expected[:, token], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [1, 111, 32001])
def test_every_float_type_and_odd_widths(dtype, width):
    scores = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0)).mul(4).to(dtype)
    p = reference.masses(scores)
    assert p.dtype == torch.float64
    torch.testing.assert_close(p, scores.double().softmax(-1), rtol=1e-13, atol=0)
    tokens = torch.tensor([[0, width // 2, width - 1]] * 2)
    torch.testing.assert_close(
        reference.log_prob(scores, tokens), p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).log(), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_extreme_temperatures(temperature):
    scores = torch.tensor([[60.0, 59.9, -60.0, 0.0]]) / temperature
    torch.testing.assert_close(reference.masses(scores), f64(softmax(scores[0].tolist())), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    "row, expected",
    [
        ([0.0, -INF, 0.0], [0.5, 0.0, 0.5]),
        ([-INF, 3.0, -INF], [0.0, 1.0, 0.0]),
        ([1e30, 0.0, -1e30], [1.0, 0.0, 0.0]),
        ([INF, 5.0, -INF], [1.0, 0.0, 0.0]),
        ([INF, 5.0, INF], [0.5, 0.0, 0.5]),
        ([INF, INF, INF], [1 / 3] * 3),
        ([7.0, 7.0, 7.0], [1 / 3] * 3),
    ],
)
def test_defined_rows(row, expected):
    scores = torch.tensor([row, row])
    torch.testing.assert_close(reference.masses(scores), f64(expected, expected), rtol=1e-15, atol=0)
    for token, mass in enumerate(expected):
        log_p = reference.log_prob(scores, torch.tensor([token, token]))
        torch.testing.assert_close(log_p.exp(), f64(mass, mass), rtol=1e-14, atol=0)
        assert (log_p.exp() == 0).all() == (mass == 0)


@pytest.mark.parametrize("row", [[NAN, 0.0, 0.0], [0.0, INF, NAN], [-INF, NAN, -INF], [-INF, -INF, -INF]])
def test_an_undefined_row_spoils_no_other(row):
    scores = torch.tensor([[0.0, 1.0, 2.0], row, [2.0, 1.0, 0.0]])
    p = reference.masses(scores)
    assert p[1].isnan().all()
    assert reference.draw(p, f64(0.9, 0.9, 0.9)).tolist() == [2, -1, 1]
    log_p = reference.log_prob(scores, torch.tensor([2, 0, 0]))
    assert log_p[[0, 2]].isfinite().all()
    # and no draft token is accepted there, whatever u
    assert not reference.accept(log_p[1:2], f64(-1.0), f64(SMALLEST)).item()


def test_ids_outside_the_row_have_no_mass():
    scores = torch.zeros(5, 3)
    tokens = torch.tensor([-1, 3, 10**9, -(10**9), 2])
    assert reference.log_prob(scores, tokens).tolist() == [-INF] * 4 + [pytest.approx(-math.log(3))]


def test_no_rows():
    assert reference.masses(torch.zeros(0, 5)).shape == (0, 5)
    assert reference.log_prob(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)).shape == (0,)
    assert reference.draw(torch.zeros(0, 5, dtype=torch.float64), f64()).shape == (0,)
    assert reference.residual(torch.zeros(0, 5), torch.zeros(0, 5)).shape == (0, 5)
    assert reference.draw(torch.zeros(2, 0, dtype=torch.float64), f64(0.5, 0.5)).tolist() == [-1, -1]


def test_a_view_gives_what_its_copy_gives():
    wide = torch.randn(4, 14, generator=torch.Generator().manual_seed(1))
    view = wide[:, ::2]
    assert torch.equal(reference.masses(view), reference.masses(view.clone()))


# accept


@given(st.floats(1e-12, 1.0), st.floats(1e-12, 1.0), uniforms)
def test_accept_is_the_comparison_with_the_ratio(p, q, u):
    ratio = p / q
    if abs(u - ratio) > 1e-12 * ratio:
        assert reference.accept(f64(p).log(), f64(q).log(), f64(u)).item() == (u < ratio)


@pytest.mark.parametrize("u", [5e-324, SMALLEST, 0.5, LARGEST])
@pytest.mark.parametrize("log_q", [-INF, -700.0, -1.0, 0.0])
def test_a_token_that_p_forbids_is_never_accepted(log_q, u):
    assert not reference.accept(f64(-INF), f64(log_q), f64(u)).item()


@pytest.mark.parametrize("log_p", [-INF, -700.0, 0.0])
def test_a_token_that_q_cannot_draw_is_not_accepted(log_p):
    assert not reference.accept(f64(log_p), f64(-INF), f64(SMALLEST)).item()


@pytest.mark.parametrize("log_p, log_q", [(NAN, -1.0), (-1.0, NAN), (NAN, NAN)])
def test_an_undefined_law_accepts_nothing(log_p, log_q):
    assert not reference.accept(f64(log_p), f64(log_q), f64(SMALLEST)).item()


def test_certain_on_both_sides_is_accepted():
    assert reference.accept(f64(0.0, 0.0), f64(0.0, 0.0), f64(SMALLEST, LARGEST)).all()


def test_accept_is_strict_where_both_sides_are_equal():
    # log u + log q = log p exactly: planted `<=` would accept
    assert not reference.accept(f64(0.5).log(), f64(0.0), f64(0.5)).item()


# subtract_at and residual


@given(st.data())
def test_subtract_at_is_a_loop(data):
    width = data.draw(st.integers(1, 9))
    index = data.draw(st.none() | st.lists(st.integers(0, width - 1), unique=True).map(sorted))
    columns = data.draw(st.integers(0, width)) if index is None else len(index)
    rows = data.draw(st.integers(0, 3))
    p, q = torch.rand(rows, width, dtype=torch.float64), torch.rand(rows, columns, dtype=torch.float64)
    p_before, q_before = p.clone(), q.clone()
    result = reference.subtract_at(p, q, None if index is None else torch.tensor(index, dtype=torch.long))
    expected = p.clone()
    for row in range(rows):
        for k, column in enumerate(range(columns) if index is None else index):
            expected[row, column] -= q[row, k]
    assert torch.equal(result, expected)
    assert torch.equal(p, p_before) and torch.equal(q, q_before)


def test_residual_is_what_p_has_more():
    p = f64([0.5, 0.3, 0.2], [0.1, 0.1, 0.8])
    q = f64([0.2, 0.6, 0.2], [0.8, 0.1, 0.1])
    torch.testing.assert_close(reference.residual(p, p - q), f64([0.3, 0.0, 0.0], [0.0, 0.0, 0.7]))


@pytest.mark.parametrize("difference", [[0.0, 0.0], [-0.5, -0.1], [NAN, 0.5], [INF, 0.0]])
def test_without_a_residual_p_is_drawn_from(difference):
    p = f64([0.25, 0.75])
    other = f64([0.5, -0.5])
    rest = reference.residual(torch.cat([p, p]), torch.cat([f64(difference), other]))
    assert rest.tolist() == [[0.25, 0.75], [0.5, 0.0]]


# draw


@settings(max_examples=300)
@given(st.lists(st.just(0.0) | st.floats(1e-9, 1.0), min_size=1, max_size=12), uniforms, st.floats(1e-300, 1e300))
def test_draw_is_the_first_entry_whose_cumulative_mass_exceeds_u(weights, u, scale):
    if not any(weights):
        return
    token = reference.draw((f64(weights) * scale), f64(u)).item()
    assert weights[token] > 0
    expected = first_above(weights, u)
    assert expected is None or token == expected


@pytest.mark.parametrize("u", [5e-324, SMALLEST, 5e-17, 0.1, 1 / 3, 0.5, LARGEST, 1 - 2.0**-54])
def test_no_u_draws_an_entry_without_mass(u):
    generator = torch.Generator().manual_seed(2)
    for width in (1, 2, 111, 4097):
        weights = torch.rand(8, width, dtype=torch.float64, generator=generator)
        weights *= torch.rand(8, width, generator=generator) < 0.3
        weights[:, 0] *= torch.tensor([0.0, 1.0] * 4)
        weights[:, -1] *= torch.tensor([0.0, 0.0, 1.0, 1.0] * 2)
        token = reference.draw(weights, torch.full((8,), u, dtype=torch.float64))
        for row, t in enumerate(token.tolist()):
            if weights[row].sum() == 0:
                assert t == -1
            else:
                assert weights[row, t] > 0


@pytest.mark.parametrize("tiny", [5e-324, 1e-310, 1e-200])
def test_rows_of_vanishing_mass(tiny):
    weights = f64([0.0, tiny, 0.0], [tiny, 0.0, tiny])
    for u in (SMALLEST, 0.4999, LARGEST):
        first, second = reference.draw(weights, f64(u, u)).tolist()
        assert first == 1
        assert second in (0, 2)


@pytest.mark.parametrize(
    "row, token", [([0.0, 0.0], -1), ([NAN, 1.0], -1), ([1.0, NAN], -1), ([0.0, 1.0], 1), ([1.0, 0.0], 0)]
)
def test_rows_with_one_answer(row, token):
    for u in (SMALLEST, 0.5, LARGEST):
        assert reference.draw(f64(row, [0.5, 0.5]), f64(u, 0.75)).tolist() == [token, 1]


def test_entries_end_where_their_mass_does():
    weights = f64([0.25, 0.0, 0.25, 0.5])
    for u, token in ((0.25 - 2**-54, 0), (0.25, 2), (0.5 - 2**-53, 2), (0.5, 3)):
        assert reference.draw(weights, f64(u)).item() == token


def test_padding_is_never_drawn():
    """Entries at -inf (a padded head, a filter) on rows that sum to 1 but for rounding."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(2000, 64, generator=generator)
    scores[:, 50:] = -INF
    u = torch.full((2000,), LARGEST, dtype=torch.float64)
    assert reference.draw(reference.masses(scores), u).max() < 50


def philox(draws, purpose=Purpose.RESIDUAL):
    key = torch.arange(draws)
    return Philox().uniform(torch.tensor(7), key, torch.zeros_like(key), purpose)


@pytest.mark.parametrize("width", [3, 7, 64])
def test_the_drawn_law(width):
    draws = 200_000
    scores = torch.randn(1, width, generator=torch.Generator().manual_seed(width)) * 2
    scores[0, width // 2] = -INF
    p = reference.masses(scores)
    token = reference.draw(p.expand(draws, -1), philox(draws))
    assert chi_square(torch.bincount(token, minlength=width), p[0]) > 1e-4


def test_the_accepted_share_is_the_ratio():
    draws = 200_000
    for p, q in ((0.3, 0.4), (0.01, 0.9), (0.7, 0.2)):
        kept = reference.accept(
            torch.full((draws,), math.log(p)).double(), torch.full((draws,), math.log(q)).double(), philox(draws)
        )
        share = min(1.0, p / q)
        assert scipy.stats.binomtest(int(kept.sum()), draws, share).pvalue > 1e-4
