"""Keyed uniform numbers: a number is a function of its key, never of what was drawn before.

A key is (row seed, position, offset, purpose, trial). It is laid out for Philox4x32-10 (Salmon,
Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) as

    key      seed[0:32], seed[32:64]
    counter  position[0:32], position[32:64], offset[0:24] | purpose << 24, trial

which is injective for any 64-bit seed and position, offset in [0, 2^24), purpose in [0, 2^8) and
trial in [0, 2^32). Of the block's words only the first two are used: with
n = (w0 >> 5) * 2^26 + (w1 >> 6), the uniform is max(n, 1/2) * 2^-53. It lies strictly inside (0, 1)
and P(u < h) = h for every h that is a multiple of 2^-53, but for u = 2^-54 in place of zero.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from specdec_fast import native

__all__ = ["Philox", "Purpose", "UniformSource", "philox_block", "philox_reference", "row_seeds", "seed_of_call"]

_WORD = 0xFFFFFFFF
_DOUBLE_WORD = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15
_SMALL = 32  # keys; beyond, the tensor code costs less than Python integers


class Purpose(enum.IntEnum):
    """What a number decides; streams of different purposes are disjoint."""

    DRAFT = 0
    ACCEPT = 1
    RESIDUAL = 2
    TARGET = 3
    REVEAL = 4
    CANDIDATE = 5
    THINNING = 6
    RACE = 7


class UniformSource(Protocol):
    """Where the engine's random numbers come from: the seam for enumerators and recorders."""

    def uniform(self, seed: Tensor, position: Tensor, offset: Tensor, purpose: Purpose, trial: int = 0) -> Tensor:
        """One number in (0, 1) per key.

        Args:
            seed, position, offset: int64 on one device, broadcast against each other; offset in
                [0, 2^24).
            purpose: what the number decides.
            trial: which of repeated draws, in [0, 2^32).

        Returns:
            float64 of the broadcast shape, on the same device.
        """
        ...


class Philox:
    """The default source: Philox4x32-10, the same bits on every backend."""

    def uniform(self, seed: Tensor, position: Tensor, offset: Tensor, purpose: Purpose, trial: int = 0) -> Tensor:
        """See `UniformSource.uniform`."""
        return torch.ops.specdec_fast.philox_uniform(seed, position, offset, purpose, trial)


def philox_block(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four counter words and two key words to four random words.

    All words are int64 tensors holding values in [0, 2^32), broadcast against each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64, so their two halves are exact
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (product1 >> 32 & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            (product0 >> 32 & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1, c2, c3


def philox_reference(seed: Tensor, position: Tensor, offset: Tensor, purpose: int, trial: int) -> Tensor:
    """`UniformSource.uniform` in plain tensor arithmetic, on any device: the truth.

    Args:
        seed, position, offset: int64, broadcast against each other.
        purpose: in [0, 2^8).
        trial: in [0, 2^32).

    Returns:
        float64 of the broadcast shape.

    Raises:
        ValueError: purpose or trial out of range, or a key that is not int64.
    """
    _check(seed, position, offset, purpose, trial)
    zero = torch.zeros_like(seed + position + offset)
    counter = (
        position & _WORD | zero,
        position >> 32 & _WORD,
        offset & 0xFFFFFF | purpose << 24,
        zero + trial,
    )
    w0, w1, _, _ = philox_block(counter, (seed & _WORD, seed >> 32 & _WORD))
    return ((w0 >> 5 << 26) + (w1 >> 6)).double().clamp_(min=0.5) * 2.0**-53


def row_seeds(seed: int | Sequence[int] | None, rows: int) -> Tensor:
    """One 64-bit seed per row, as the bits of an int64 tensor [rows].

    Args:
        seed: an int, from which row i gets a hash of it and i; one int per row, taken as they are;
            or None, which draws an int from torch's global generator. Any size and sign: seeds
            count modulo 2^64.
        rows: the number of rows, after `num_return_sequences`.

    Raises:
        TypeError: a seed that is no integer (bool and float included).
        ValueError: a sequence of another length.
    """
    if seed is None:
        seed = int(torch.randint(-(2**63), 2**63 - 1, ()))
    if isinstance(seed, Tensor):
        seed = seed.tolist()
    if isinstance(seed, Sequence):
        values = [_integer(value) for value in seed]
        if len(values) != rows:
            raise ValueError(f"seed must be an int or one int per row: {rows} needed, {len(values)} given")
    else:
        state = _mix(_integer(seed))
        values = [_mix(state + (row + 1) * _GOLDEN) for row in range(rows)]
    return torch.tensor([_signed(value) for value in values], dtype=torch.int64)


def seed_of_call(seed: int | Sequence[int] | None, call: int) -> int | Sequence[int] | None:
    """The seed of one of several calls that belong together: that of the first is the seed itself.

    Args:
        seed: an int, or None for none. One a row is taken for the first call alone.
        call: its number, from 0.
    """
    if seed is None or not call:
        return seed
    assert not isinstance(seed, Sequence | Tensor)
    return _mix(_mix(_integer(seed)) - call * _GOLDEN)


def _integer(value: object) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise TypeError(f"seed must be an int, a sequence of ints or None, not {value!r}")


def _mix(value: int) -> int:
    """The output function of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), modulo 2^64."""
    value &= _DOUBLE_WORD
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _DOUBLE_WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _DOUBLE_WORD
    return value ^ value >> 31


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def _check(seed: Tensor, position: Tensor, offset: Tensor, purpose: int, trial: int) -> None:
    for name, key in (("seed", seed), ("position", position), ("offset", offset)):
        if key.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, not {key.dtype}")
    if not 0 <= purpose < 2**8:
        raise ValueError(f"purpose is outside [0, 2^8): {purpose}")
    if not 0 <= trial < 2**32:
        raise ValueError(f"trial is outside [0, 2^32): {trial}")


def _small(seed: int, position: int, offset: int, purpose: int, trial: int) -> float:
    """One uniform in Python integers."""
    c0, c1, c2, c3 = position & _WORD, position >> 32 & _WORD, offset & 0xFFFFFF | purpose << 24, trial
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = product1 >> 32 ^ c1 ^ k0, product1 & _WORD
        c2, c3 = product0 >> 32 ^ c3 ^ k1, product0 & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return max((c0 >> 5 << 26) + (c1 >> 6), 0.5) * 2.0**-53


def _fallback(seed: Tensor, position: Tensor, offset: Tensor, purpose: int, trial: int) -> Tensor:
    """The op where no kernel is registered for the device."""
    keys = torch.broadcast_tensors(seed, position, offset)
    if keys[0].device.type != "cpu" or keys[0].numel() > _SMALL:
        return philox_reference(seed, position, offset, purpose, trial)
    _check(seed, position, offset, purpose, trial)
    seeds, positions, offsets = (key.reshape(-1).tolist() for key in keys)
    values = [_small(*key, purpose, trial) for key in zip(seeds, positions, offsets, strict=True)]
    return torch.tensor(values, dtype=torch.float64).view(keys[0].shape)


def _fake(seed: Tensor, position: Tensor, offset: Tensor, purpose: int, trial: int) -> Tensor:
    return (seed + position + offset).double()


_library = torch.library.Library("specdec_fast", "FRAGMENT")
_library.define("philox_uniform(Tensor seed, Tensor position, Tensor offset, int purpose, int trial) -> Tensor")
_library.impl("philox_uniform", _fallback, "CompositeExplicitAutograd")
_library.impl("philox_uniform", _fake, "Meta")
native.load_ops()
