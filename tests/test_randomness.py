"""Keyed uniforms: published vectors, one number for one key on every implementation, row seeds."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_fast import native
from specdec_fast.randomness import (
    Philox,
    Purpose,
    _fallback,
    philox_block,
    philox_reference,
    row_seeds,
)

INT64 = st.integers(-(2**63), 2**63 - 1)
ONES = 0xFFFFFFFF
# Random123 1.14, tests/kat_vectors, philox4x32 10
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(value):
    return (value + 2**63) % 2**64 - 2**63


def int64(*values):
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_block_gives_the_published_words(counter, key, expected):
    words = philox_block([torch.tensor(word) for word in counter], [torch.tensor(word) for word in key])
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
@pytest.mark.parametrize("uniform", [philox_reference, _fallback, torch.ops.specdec_fast.philox_uniform])
def test_key_layout(uniform, counter, key, expected):
    """The documented packing, read backwards from the published counters."""
    position = signed(counter[0] | counter[1] << 32)
    offset, purpose = counter[2] & 0xFFFFFF, counter[2] >> 24
    seed = signed(key[0] | key[1] << 32)
    u = uniform(torch.tensor(seed), torch.tensor(position), torch.tensor(offset), purpose, counter[3])
    assert u.item() == ((expected[0] >> 5) * 2**26 + (expected[1] >> 6)) * 2.0**-53


@settings(max_examples=200, deadline=None)
@given(
    keys=st.lists(st.tuples(INT64, INT64, st.integers(0, 2**24 - 1)), min_size=1, max_size=40),
    purpose=st.integers(0, 255),
    trial=st.integers(0, 2**32 - 1),
)
def test_every_implementation_draws_the_same_bits(keys, purpose, trial):
    seed, position, offset = (torch.tensor(column) for column in zip(*keys, strict=True))
    expected = philox_reference(seed, position, offset, purpose, trial)
    for uniform in (_fallback, torch.ops.specdec_fast.philox_uniform):
        assert torch.equal(uniform(seed, position, offset, purpose, trial), expected)
    assert ((expected > 0) & (expected < 1)).all()


@pytest.mark.parametrize(
    "shapes",
    [
        ((), (), ()),
        ((3, 1), (1, 5), (5,)),
        ((4,), (1,), ()),
        ((2, 1, 1), (3, 1), (7,)),
        ((0,), (1,), ()),
        ((100, 1), (1, 300), (300,)),
    ],
)
def test_broadcasting_and_strides(shapes):
    seed, position, offset = (torch.randint(0, 2**20, shape) for shape in shapes)
    expected = philox_reference(*torch.broadcast_tensors(seed, position, offset), 1, 2)
    for uniform in (philox_reference, _fallback, torch.ops.specdec_fast.philox_uniform):
        result = uniform(seed, position, offset, 1, 2)
        assert result.dtype == torch.float64
        assert torch.equal(result, expected)
        flipped = uniform(*(key.expand(expected.shape).transpose(0, -1) for key in (seed, position, offset)), 1, 2)
        assert torch.equal(flipped, expected.transpose(0, -1))


def test_distinct_keys_give_distinct_numbers():
    seed, position, offset = torch.meshgrid(torch.arange(8), torch.arange(40), torch.arange(10), indexing="ij")
    streams = [Philox().uniform(seed, position, offset, purpose, trial) for purpose in Purpose for trial in range(4)]
    numbers = torch.stack(streams).flatten()
    assert numbers.unique().numel() == numbers.numel()


def test_numbers_are_uniform_and_uncorrelated():
    u = Philox().uniform(row_seeds(1, 64)[:, None], torch.arange(2000), int64(0), Purpose.ACCEPT)
    counts = torch.histc(u, 64, 0, 1)
    expected = u.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 110.0  # chi-square(63): p = 2e-4
    centred = u - 0.5
    assert abs((centred[:, 1:] * centred[:, :-1]).mean().item()) < 5 / 12 / u.numel() ** 0.5
    assert abs((centred[1:] * centred[:-1]).mean().item()) < 5 / 12 / u.numel() ** 0.5


@pytest.mark.parametrize("word, uniform", [(0, 2.0**-54), (ONES, 1 - 2.0**-53)])
def test_extremes_stay_inside_the_unit_interval(monkeypatch, word, uniform):
    words = (torch.tensor(word),) * 4
    monkeypatch.setattr("specdec_fast.randomness.philox_block", lambda counter, key: words)
    assert philox_reference(int64(0), int64(0), int64(0), 0, 0).item() == uniform


@pytest.mark.parametrize("uniform", [philox_reference, _fallback, torch.ops.specdec_fast.philox_uniform])
def test_bad_keys_are_refused(uniform):
    key = int64(1)
    for arguments, message in [
        ((key.int(), key, key, 0, 0), "int64"),
        ((key, key, key, 256, 0), "purpose"),
        ((key, key, key, 0, -1), "trial"),
        ((int64(1, 2), int64(1, 2, 3), key, 0, 0), "broadcast|match"),
    ]:
        with pytest.raises((RuntimeError, ValueError), match=message):
            uniform(*arguments)


def test_op_contract():
    arguments = (row_seeds(0, 3)[:, None], torch.arange(3)[:, None], torch.arange(4), 1, 0)
    torch.library.opcheck(torch.ops.specdec_fast.philox_uniform.default, arguments)


def test_op_compiles_fullgraph():
    def draw(seed, position, offset):
        return torch.ops.specdec_fast.philox_uniform(seed, position, offset, 2, 0) + 1

    arguments = (row_seeds(0, 3)[:, None], torch.arange(3)[:, None], torch.arange(4))
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), draw(*arguments))


def test_fallback_draws_what_the_kernel_draws():
    script = (
        "import torch; from specdec_fast import native; from specdec_fast.randomness import *;"
        "assert not native.load_ops(), native.status();"
        "k = torch.arange(50);"
        "print(Philox().uniform(row_seeds(3, 2)[:, None], k, k[:1], Purpose.DRAFT, 9).tolist())"
    )
    environment = os.environ | {"SPECDEC_FAST_DISABLE_NATIVE": "1"}
    output = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    k = torch.arange(50)
    assert output.stdout.strip() == str(Philox().uniform(row_seeds(3, 2)[:, None], k, k[:1], Purpose.DRAFT, 9).tolist())


@pytest.mark.skipif(not native.load_ops(), reason="the CPU kernels are not built")
def test_native_kernel_is_the_one_registered():
    registered = torch._C._dispatch_dump("specdec_fast::philox_uniform")
    assert "CPU: registered" in registered


def test_row_seeds_hash_the_row_number():
    seeds = row_seeds(7, 5)
    assert seeds.shape == (5,) and seeds.dtype == torch.int64
    assert seeds.unique().numel() == 5
    assert torch.equal(row_seeds(7, 3), seeds[:3])
    assert not torch.equal(row_seeds(8, 5), seeds)


def test_row_seeds_travel_with_their_rows():
    seeds = row_seeds(7, 5)
    assert torch.equal(row_seeds(seeds.tolist(), 5), seeds)
    assert torch.equal(row_seeds(seeds, 5), seeds)


@given(st.integers())
def test_seeds_count_modulo_two_to_the_64(seed):
    assert torch.equal(row_seeds(seed, 2), row_seeds(seed % 2**64, 2))
    assert row_seeds([seed], 1).item() == signed(seed)


def test_seed_none_follows_the_global_generator():
    torch.manual_seed(5)
    first, second = row_seeds(None, 2), row_seeds(None, 2)
    torch.manual_seed(5)
    assert torch.equal(row_seeds(None, 2), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("seed", [True, 1.0, "1", [1, 2.5], [1, True], object()])
def test_seeds_that_are_no_integers_are_refused(seed):
    with pytest.raises(TypeError, match="seed must be an int"):
        row_seeds(seed, 2)


def test_a_seed_sequence_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"seed .* 3 needed, 2 given"):
        row_seeds([1, 2], 3)
