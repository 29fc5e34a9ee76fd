"""What the op tests share: the backends that can run here, batches to verify, and how outputs are compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from specdec_fast import dispatch, ops

__all__ = ["BACKENDS", "DTYPES", "FAST", "differing", "edge_rows", "filters", "proposal", "run_both", "verify_both"]

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _param(backend: str) -> Any:
    missing = dispatch.why_not("verify", backend)
    return pytest.param(backend, marks=pytest.mark.skipif(missing is not None, reason=f"{backend}: {missing}"))


FAST = [_param("cpu")]  # compared with the reference
BACKENDS = ["reference", *FAST]  # held to the law itself


def filters(rows: int, generator: torch.Generator, side: str = "") -> dict[str, Tensor]:
    """Sampling parameters that differ from row to row; row 7 is at temperature 0, some filters are off."""
    temperature = torch.rand(rows, generator=generator) + 0.5
    temperature[7 % rows], temperature[8 % rows], temperature[9 % rows] = 0, 0.01, 100
    return {
        f"{side}temperature": temperature,
        f"{side}top_k": torch.arange(rows, dtype=torch.int32) * 5,
        f"{side}top_p": torch.rand(rows, generator=generator) * 1.2,
        f"{side}min_p": torch.rand(rows, generator=generator) * 0.2,
    }


def edge_rows(logits: Tensor) -> Tensor:
    """Makes rows 0 to 5 of ``[B, V]`` what libraries have tripped over: NaN, all -inf, one entry, +inf, ties."""
    logits[0, 0] = NAN
    logits[1] = -INF
    logits[2] = -INF
    logits[2, -1] = 1.5
    logits[3, 0] = logits[3, -1] = INF
    logits[4] = 0
    logits[5, 1:] = -INF
    return logits


def proposal(
    kind: str, rows: int, gamma: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Any]:
    """Arguments of ``verify`` whose drafts are accepted now and then.

    ``kind``: *point*, *dense* (K = V), *wide* (K > V), *compact* (half of the ids, some of them no target id), *heads*
    (several entries of one id), *sparse*.
    """
    logits = torch.randn(rows, gamma + 1, width, generator=generator) * 3
    case: dict[str, Any] = {
        "count": torch.randint(0, gamma + 1, (rows,), generator=generator),
        "seed": torch.arange(rows) * 7 - 3,
        "start": torch.arange(rows) + 2**33,
    }
    noisy = logits[:, :gamma] + torch.randn(rows, gamma, width, generator=generator) * 0.7
    if kind == "point":
        case["tokens"] = noisy.argmax(-1)
    elif kind == "sparse":
        log_q, ids = noisy.double().log_softmax(-1).topk(min(6, width))
        case["tokens"] = ids[..., 0].clone()
        case |= {"sparse_ids": ids, "sparse_log_q": log_q}
        ids[:, :, -1] = -1
    else:
        index = None
        if kind == "wide":
            noisy = torch.cat([noisy, torch.randn(rows, gamma, 7, generator=generator)], -1)
        elif kind in ("compact", "heads"):
            index = torch.randperm(width, generator=generator)[: width // 2].sort().values
            if kind == "heads":
                index = index.repeat_interleave(torch.arange(len(index)) % 4)
            noisy = noisy[..., index]
            index[0], index[-1] = -1, width + 3
        uniform = torch.rand(noisy.shape, generator=generator).clamp(min=1e-7)
        drawn = (noisy - (-uniform.log()).log()).argmax(-1)
        case["tokens"] = drawn if index is None else index[drawn]
        case["draft_logits"] = noisy.to(dtype)
        if kind != "heads":
            case["drawn"] = drawn
        if index is not None:
            case["index"] = index.int()
    return case | {"logits": logits.to(dtype)}


def verify_both(backend: str, **arguments: Any) -> tuple[ops.Verification, ops.Verification]:
    """The reference's answer and the backend's, log-probabilities included."""
    expected = ops.verify(**arguments, log_probs=True, backend="reference")
    return expected, ops.verify(**arguments, log_probs=True, backend=backend)


def run_both(backend: str, *arguments: Any, **options: Any) -> tuple[ops.Sample, ops.Sample]:
    expected = ops.sample(*arguments, **options, backend="reference")
    return expected, ops.sample(*arguments, **options, backend=backend)


def differing(expected: Any, result: Any) -> int:
    """How many rows differ in what was decided; the log-probabilities of the others must agree."""
    decided = [name for name in expected._fields if not expected.__getattribute__(name).is_floating_point()]
    off = torch.zeros_like(expected.token, dtype=torch.bool)
    for name in decided:
        assert getattr(result, name).dtype == getattr(expected, name).dtype
        off |= getattr(expected, name) != getattr(result, name)
    for name in set(expected._fields) - set(decided):
        torch.testing.assert_close(
            getattr(result, name)[~off], getattr(expected, name)[~off], rtol=1e-10, atol=1e-10, equal_nan=True
        )
    return int(off.sum())
