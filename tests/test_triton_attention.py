"""Decode attention: the Triton kernels and the reference against plain attention with a mask, and what is refused."""

import importlib

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from specdec_fast import attention_ops
from specdec_fast.attention_ops import decode_attention, seen_columns

triton = pytest.importorskip("triton", reason="triton is not installed")
launch = pytest.importorskip("specdec_fast.triton_kernels.launch_attention", reason="no Triton kernels here")
kernels = importlib.import_module("specdec_fast.triton_kernels.attention")

COMPILED = not triton.knobs.runtime.interpret  # conftest.py asks for the interpreter where there is no GPU
DEVICE = "cuda" if COMPILED else "cpu"
CLOSE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
NAN = float("nan")


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that is not written holds NaN: outputs and workspace alike."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with np.errstate(all="ignore"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_splits(monkeypatch):
    monkeypatch.setattr(launch, "SPLIT", 16)
    monkeypatch.setattr(launch, "TILE", 64)  # 16 columns a tile


def problem(rows, heads, kv_heads, queries, capacity, dim, dtype=torch.float32, seed=0):
    """Ragged starts, some padding, some windows; what nobody sees is NaN."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, queries, heads, dim, generator=generator).to(dtype).transpose(1, 2)
    key, value = torch.randn(2, rows, kv_heads, capacity, dim, generator=generator).to(dtype)
    start = torch.randint(0, capacity - queries + 1, (rows,), generator=generator)
    start[0], start[-1] = 0, capacity - queries
    hidden = torch.randint(0, 5, (rows,), generator=generator).minimum(start)
    window = torch.tensor([1, 0, 7, 300]).repeat(rows)[:rows]
    unseen = ~seen_columns(start, queries, capacity, hidden, window).any(1)
    key[unseen.unsqueeze(1).expand(key.shape[:3])] = NAN
    value[unseen.unsqueeze(1).expand(value.shape[:3])] = NAN
    tensors = {"query": query, "key": key, "value": value, "start": start, "hidden": hidden, "window": window}
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def sound(case):
    """The same without NaN."""
    return {name: tensor.nan_to_num() for name, tensor in case.items()}


def plain(case, scale=None):
    """Torch's attention in float64, with a mask."""
    seen = seen_columns(case["start"], case["query"].shape[2], case["key"].shape[2], case["hidden"], case["window"])
    query, key, value = (case[name].double().nan_to_num() for name in ("query", "key", "value"))
    out = scaled_dot_product_attention(query, key, value, attn_mask=seen.unsqueeze(1), scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


SHAPES = [
    # rows, heads, key heads, queries, capacity, head size
    (1, 4, 2, 1, 16, 16),
    (4, 6, 2, 3, 47, 20),
    (3, 4, 4, 5, 48, 80),
    (2, 8, 1, 9, 49, 96),  # more rows than a tile has
    (2, 2, 1, 2, 33, 256),
]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_attends_as_plain_attention_does(small_splits, shape, dtype):
    case = problem(*shape, dtype)
    result = decode_attention(**case, backend="triton")
    assert result.is_contiguous()
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), plain(case), rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_attends_as_plain_attention_does(shape):
    case = problem(*shape, torch.float32)
    torch.testing.assert_close(
        decode_attention(**case, scale=0.3, backend="reference").double(), plain(case, 0.3), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    "splits, options",
    [(1, {"scale": 0.7}), (4, {"scale": 0.7, "softcap": 5.0}), (4, {"window": 9}), (32, {"hidden": None})],
)
def test_splits_scale_and_softcap(monkeypatch, splits, options):
    monkeypatch.setattr(launch, "SPLIT", -(-64 // splits))
    case = sound(problem(2, 4, 2, 2, 64, 24)) | options
    results = [decode_attention(**case, backend=backend) for backend in ("triton", "reference")]
    torch.testing.assert_close(*results, rtol=5e-6, atol=5e-6)


def test_lanes_beyond_the_buffers_see_the_last_column(small_splits):
    case = sound(problem(2, 2, 2, 4, 20, 16))
    case["start"] += 3
    results = [decode_attention(**case, backend=backend) for backend in ("triton", "reference")]
    torch.testing.assert_close(*results, rtol=2e-6, atol=2e-6)
    assert not results[0].isnan().any()


def test_no_bit_depends_on_the_batch_or_on_strides(small_splits):
    case = problem(3, 4, 2, 3, 40, 16)
    whole = decode_attention(**case, backend="triton")
    for row in range(3):
        alone = {name: tensor[row : row + 1] for name, tensor in case.items()}
        assert torch.equal(decode_attention(**alone, backend="triton"), whole[row : row + 1])
    places = torch.stack([case[name] for name in ("start", "hidden", "window")], 1)
    moved = dict(zip(("start", "hidden", "window"), places.unbind(1), strict=True))
    moved |= {name: case[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("query", "key", "value")}
    assert torch.equal(decode_attention(**case | moved, backend="triton"), whole)


@pytest.mark.skipif(COMPILED, reason="a compiled kernel keeps the constants it was compiled with")
@pytest.mark.parametrize("fault", ["one column too many", "split left out", "padding seen", "heads swapped"])
def test_planted_faults_are_noticed(small_splits, monkeypatch, fault):
    case = problem(3, 4, 2, 3, 40, 16)
    expected = plain(case)
    wrong = dict(case)
    if fault == "one column too many":
        wrong["start"] = (case["start"] + 1).clamp(max=37)
    elif fault == "padding seen":
        wrong["hidden"] = torch.zeros_like(case["hidden"])
    elif fault == "heads swapped":
        wrong["key"] = case["key"].flip(1)
    else:
        kernel = launch.merge_kernel

        class Fault:
            def __getitem__(self, grid):
                return lambda *given, **options: kernel[grid](*given, **options | {"SPLITS": options["SPLITS"] - 1})

        monkeypatch.setattr(launch, "merge_kernel", Fault())
    result = decode_attention(**wrong, backend="triton")
    with pytest.raises(AssertionError):
        torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("overload", ["default", "reference", "triton"])
def test_the_operator_is_sound(overload):
    case = problem(2, 4, 2, 3, 20, 16)
    op = getattr(torch.ops.specdec_fast.decode_attention, overload)
    torch.library.opcheck(op, (*case.values(), 0.25, 0.0), test_utils=("test_schema", "test_faketensor"))


def test_no_rows_and_no_queries():
    empty = {name: tensor[:0] for name, tensor in problem(1, 2, 1, 2, 20, 16).items()}
    assert decode_attention(**empty, backend="triton").shape == (0, 2, 2, 16)
    none = problem(2, 2, 1, 2, 20, 16)
    none["query"] = none["query"][:, :, :0]
    assert decode_attention(**none, backend="triton").shape == (2, 0, 2, 16)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"key": torch.zeros(2, 3, 20, 16), "value": torch.zeros(2, 3, 20, 16)}, "KVH that divides 4"),
        ({"value": torch.zeros(2, 2, 20, 8)}, "of one shape"),
        ({"query": torch.zeros(2, 4, 3, 16).double()}, "query must be float32, bfloat16 or float16"),
        ({"value": torch.zeros(2, 2, 20, 16).half()}, "value must be float32.*like query"),
        ({"start": torch.zeros(3, dtype=torch.int64)}, r"start must be \[2\] torch.int64"),
        ({"hidden": torch.zeros(2)}, r"hidden must be \[2\] torch.int64"),
        ({"query": torch.zeros(2, 4, 3, 300), "key": torch.zeros(2, 2, 9, 300)}, "of one shape"),
    ],
)
def test_bad_arguments_are_named(change, message):
    case = {
        "query": torch.zeros(2, 4, 3, 16),
        "key": torch.zeros(2, 2, 20, 16),
        "value": torch.zeros(2, 2, 20, 16),
        "start": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        attention_ops.decode_attention(**case | change)
