"""Arithmetic every kernel shares: keyed uniforms, exponentials, and masses as 64-bit fixed point.

Masses are summed as integers. Integer sums are the same in any order, so a row's bits depend on neither the layout the
compiler chose nor the batch around it, and a cumulative sum ends exactly at the sum.
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)  # stands for +inf where differences are taken
TARGET = tl.constexpr(3)  # randomness.Purpose
ACCEPT = tl.constexpr(1)
RESIDUAL = tl.constexpr(2)


@triton.jit
def uniform(seed, position, offset, purpose: tl.constexpr):
    """``randomness.philox_reference`` of one key (trial 0), bit for bit; int64 in, float64 in (0, 1) out."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word = ((offset & 0xFFFFFF) | (purpose << 24)).to(tl.uint32)
    w0, w1, _, _ = tl.philox(seed, low, high, word, low * 0)
    numerator = (((w0 >> 5).to(tl.int64) << 26) | (w1 >> 6).to(tl.int64)).to(tl.float64)
    return tl.maximum(numerator, 0.5) * 1.1102230246251565e-16


@triton.jit
def exponential(x):
    """exp(x) of float64 x < 700, within 1e-11 of its value; e^-708 for anything below.

    A float64 exponential of a math library costs about 25 double-precision instructions an entry, a float32 one is a
    thousand times too coarse for a law within 1e-9. So: x = n ln 2 + r with |r| <= ln(2)/2, and of the series of exp(r)
    the terms up to r^4 in float64 (five multiply-adds), the rest, which is below 5e-5, in float32.
    """
    x = tl.maximum(x, -708.0)
    shifted = x * 1.4426950408889634 + 6755399441055744.0  # rounded to an integer, which is in the low bits
    r = x - (shifted - 6755399441055744.0) * 0.6931471805599453
    f = r.to(tl.float32)
    rest = 2.48430842e-05 + f * 2.76025867e-06
    rest = 0.0013888876419514418 + f * (0.00019841249741148204 + f * rest)
    rest = 0.008333333767950535 + f * rest
    y = 0.041666666666666664 + r * rest.to(tl.float64)
    y = 0.5 + r * (0.16666666666666666 + r * y)
    y = 1.0 + r * (1.0 + r * y)
    exponent = shifted.to(tl.int64, bitcast=True) << 52
    return (y.to(tl.int64, bitcast=True) + exponent).to(tl.float64, bitcast=True)


@triton.jit
def in_units_of_the_peak(weight):
    """Weights in [0, 1] in units of 2^-50, int64: 8192 of them add up without overflow.

    Adding 6 leaves the rounded fraction in the low bits, which is cheaper than a conversion.
    """
    return (weight + 6.0).to(tl.int64, bitcast=True) - 0x4018000000000000


@triton.jit
def in_units_of_one(mass):
    """Masses of a law, which add up to 1 at most, in units of 2^-60, int64."""
    return (mass * 1152921504606846976.0).to(tl.int64)


@triton.jit
def level_of(u, total):
    """The integer a cumulative sum has to exceed for ``u`` of ``total``."""
    return tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)
