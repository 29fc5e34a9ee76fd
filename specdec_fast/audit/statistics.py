"""Chi-square with an allowance for rounding, its power, and the correction for several tests.

Counts of ``N`` samples fall into cells whose masses ``m`` the target's law gives. Pearson's statistic then has, in the
limit, a noncentral chi-square law with noncentrality ``N Σ (c - m)² / m``, where ``c`` are the masses that the samples
really have (zero for a lossless sampler).

*Power.* By Cauchy and Schwarz ``(Σ |c - m|)² ≤ Σ (c - m)² / m · Σ m``, so masses at a total variation of δ have a
noncentrality of at least ``4 N δ²``, whichever cells the difference lies in. What a test detects follows from that
bound; it holds for every direction, and only for what the cells tell apart.

*Rounding.* Where the target's own law moves by rounding, the sampler's law lies somewhere among the laws measured. The
largest noncentrality of one of those is subtracted by taking the noncentral law for the null hypothesis.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence

import numpy as np

__all__ = ["POWER", "chi_square", "detectable", "holm", "need_scipy", "p_value", "samples_for"]

POWER = 0.99
NEGLIGIBLE = 1e-9  # below this scipy's noncentral law loses accuracy and the central one is the same


def need_scipy() -> None:
    """Says early what would else fail late.

    Raises:
        ImportError: the extra is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise ImportError("the audit of sampled output needs scipy: pip install 'specdec-fast[verify]'")


def chi_square(counts: np.ndarray, masses: np.ndarray) -> float:
    """Pearson's statistic of counts ``[C]`` against masses ``[C]`` that sum to 1; infinite where a mass is 0."""
    expected = masses * counts.sum()
    possible = expected > 0
    if counts[~possible].any():
        return math.inf
    return float(((counts - expected)[possible] ** 2 / expected[possible]).sum())


def p_value(statistic: float, degrees: int, allowance: float = 0.0) -> float:
    """The chance of a statistic this large or larger.

    Args:
        degrees: of freedom.
        allowance: noncentrality that rounding alone may cause.
    """
    if degrees == 0:
        return 0.0 if statistic > 0 else 1.0
    from scipy import stats

    if allowance < NEGLIGIBLE:
        return float(stats.chi2.sf(statistic, degrees))
    return float(stats.ncx2.sf(statistic, degrees, allowance))


def detectable(samples: int, degrees: int, significance: float, allowance: float = 0.0) -> float:
    """The smallest total variation over the cells that is found with a chance of at least 99 %.

    Args:
        samples: how many fell into the cells.
        significance: of this one test, corrected for the others (Bonferroni; Holm is never weaker).
        allowance: as in :func:`p_value`.

    Returns:
        1 where no difference is found that surely, or the cells tell nothing apart.
    """
    if degrees == 0 or samples == 0:
        return 1.0
    from scipy import optimize, stats

    if allowance < NEGLIGIBLE:
        critical = float(stats.chi2.isf(significance, degrees))
    else:
        critical = float(stats.ncx2.isf(significance, degrees, allowance))
    least = max(allowance, NEGLIGIBLE)
    most = 2 * (critical + least) + 100
    while stats.ncx2.sf(critical, degrees, most) < POWER:
        most *= 2
    found = optimize.brentq(lambda value: stats.ncx2.sf(critical, degrees, value) - POWER, least, most)
    return min(1.0, math.sqrt(float(found) / (4 * samples)))


def samples_for(
    resolution: float, degrees: int, significance: float, spread: float = 0.0, *, most: int = 1 << 22
) -> int | None:
    """How many samples a test needs to detect ``resolution``; None where no number up to ``most`` is enough.

    Args:
        spread: noncentrality a sample that rounding alone may cause.
    """

    def enough(samples: int) -> bool:
        return detectable(samples, degrees, significance, samples * spread) <= resolution

    if degrees == 0 or not enough(most):
        return None
    too_few, number = 0, most
    while number - too_few > 1:
        middle = (too_few + number) // 2
        if enough(middle):
            number = middle
        else:
            too_few = middle
    return number


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, 1979): each may be compared with the significance of them all."""
    corrected = [0.0] * len(values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = largest
    return corrected
