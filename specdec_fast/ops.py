"""The hot path's operations: one surface over every backend.

``B`` rows, ``G`` (γ) draft positions, ``P`` positions of the target's logits (``G + 1`` where the round ends for sure),
``V`` target entries a row, ``K`` compact (drafter) entries. Logits are float32, bfloat16 or float16, with any row
stride and unit stride over the vocabulary. Everything a CUDA graph replays is a tensor on the device; outputs have
fixed shapes, padded with -1.

**The law of a row**, the same in every op, is defined on float32 numbers:

    s_j = float32(logit_j) / temperature                     # IEEE float32 division; -inf is a forbidden entry
                                                             # and entries of +inf share all the mass equally
    top_k: keep s_j >= the k-th largest                      # ties with it are kept
    top_p: in ascending order (ties: lower id first) drop entry j while the mass up to and with j is at most
           (1 - top_p) of the mass kept so far; the last one always stays
    min_p: keep s_j - max s >= log(min_p)
    p_j  = exp(s_j - max s) / sum over the entries kept      # float64, or within 1e-9 of it in total variation

in Transformers' order (``TopKLogitsWarper``, ``TopPLogitsWarper``, ``MinPLogitsWarper``), which differ only by their
float32 sums. ``top_k <= 0``, ``top_p >= 1`` and ``min_p <= 0`` keep everything. At temperature 0 the law is the point
mass on the largest logit, the lowest id among equals, and filters change nothing. A row that holds a NaN, or nothing
but ``-inf``, is *undefined*: ``status`` says so, its token is 0, and no other row is touched.

**Draws** invert the cumulative sum in the order of the ids with one keyed 53-bit uniform: the smallest j with
``p_0 + ... + p_j > u``. Keys are those of :mod:`specdec_fast.randomness` as verification uses them.

**Backends** return the same token for the same key, except where ``u`` is within float error of an edge of the
cumulative sum. ``backend="auto"`` takes the fastest that is there for the device; ``"reference"``, ``"cpu"``,
``"triton"`` and ``"cuda"`` insist on one, per call or through the environment variable ``SPECDEC_FAST_BACKEND``. The
torch operators behind the functions are ``torch.ops.specdec_fast.<op>``: the default overload is picked by the
dispatcher (reference where no kernel is registered), ``.reference`` is the reference, ``.triton`` the Triton kernels.
"""

from __future__ import annotations

import enum
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from specdec_fast import native, reference_ops
from specdec_fast.dispatch import block_backend, overload, run_triton, status
from specdec_fast.randomness import Purpose

__all__ = [
    "RULES",
    "LawKind",
    "Sample",
    "Status",
    "Verification",
    "project",
    "range_sums",
    "sample",
    "softmax",
    "status",
    "verify",
]


class LawKind(enum.IntEnum):
    """How the law q of a drafted position is given."""

    POINT = 0  # q = 1 at the draft token
    COMPACT = 1  # softmax of draft_logits over the compact vocabulary
    SPARSE = 2  # sparse_ids with log masses


class Status(enum.IntFlag):
    """What was undefined where the next token was drawn."""

    TARGET = 1  # the target's row: the token is 0 and means nothing
    DRAFT = 2  # the drafter's row: nothing was subtracted, the token is from p


class Sample(NamedTuple):
    """``token [B]`` int64, its ``log_prob [B]`` and the row's ``logsumexp [B]`` float64, ``status [B]`` int32."""

    token: Tensor
    log_prob: Tensor
    logsumexp: Tensor
    status: Tensor


class Verification(NamedTuple):
    """``accepted [B]`` and ``token [B]`` int64, ``log_prob [B, P]`` float64 (``[B, 0]``), ``status [B]`` int32."""

    accepted: Tensor
    token: Tensor
    log_prob: Tensor
    status: Tensor


RULES = {"match": 0, "token": 1, "block": 2}
"""How the operator numbers the rules."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Number = float | Tensor | None


def sample(
    logits: Tensor,
    *,
    seed: Tensor,
    position: Tensor,
    offset: Tensor | None = None,
    purpose: Purpose = Purpose.TARGET,
    temperature: Number = None,
    top_k: int | Tensor | None = None,
    top_p: Number = None,
    min_p: Number = None,
    backend: str | None = None,
) -> Sample:
    """One token a row, with its log-probability and the row's logsumexp.

        u = philox(seed, position, offset, purpose)
        token = smallest j with p_0 + ... + p_j > u          # argmax at temperature 0
        log_prob = log p[token]
        logsumexp = log(sum of exp(s_j) over the entries kept)

    Args:
        logits: ``[B, V]``.
        seed, position, offset: ``[B]`` int64, the key; offset None counts as 0. A target's own draw has (seed, absolute
            position, 0, TARGET); a drafter's (seed, committed tokens at the round's start, step, DRAFT).
        purpose: what the number decides.
        temperature, top_p, min_p: a number or ``[B]`` float32; None: 1, off, off.
        top_k: a number or ``[B]`` int32; None: off.
        backend: see the module.

    Returns:
        :class:`Sample`. At temperature 0 ``log_prob`` is 0 and ``logsumexp`` the largest logit. Undefined rows: token
        0, NaN, NaN, ``Status.TARGET``.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a backend that is not there.
    """
    _check_logits("logits", logits, 2)
    rows = logits.shape[0]
    _check("seed", seed, logits, (rows,), torch.int64)
    _check("position", position, logits, (rows,), torch.int64)
    _check("offset", offset, logits, (rows,), torch.int64)
    law = _parameters(logits, "", temperature, top_k, top_p, min_p)
    op = overload("sample", logits, backend)
    return Sample(*op(logits, *law, seed, position, offset, int(purpose)))


def verify(
    logits: Tensor,
    tokens: Tensor,
    count: Tensor,
    *,
    rule: str,
    seed: Tensor,
    start: Tensor,
    base: int = 0,
    temperature: Number = None,
    top_k: int | Tensor | None = None,
    top_p: Number = None,
    min_p: Number = None,
    kind: Tensor | None = None,
    draft_logits: Tensor | None = None,
    index: Tensor | None = None,
    drawn: Tensor | None = None,
    draft_logsumexp: Tensor | None = None,
    sparse_ids: Tensor | None = None,
    sparse_log_q: Tensor | None = None,
    draft_temperature: Number = None,
    draft_top_k: int | Tensor | None = None,
    draft_top_p: Number = None,
    draft_min_p: Number = None,
    log_probs: bool = False,
    backend: str | None = None,
) -> Verification:
    """How many draft tokens stay, and the token behind them.

    With x_1 ... x_L a row's draft (L = count), p_i the target's law behind i of its tokens (``logits[:, i]``), q_i the
    law x_i was drawn from, and keys (seed, start, base + offset, purpose):

        match:  t_i from p_i with the number (seed, start + base + i, 0, TARGET)
                accepted = length of the longest prefix with t_{i-1} = x_i;  token = t_accepted
        token:  x_i stays if log p_{i-1}(x_i) > log ACCEPT(i - 1) + log q_i(x_i) and q_i(x_i) > 0
                accepted = how many stay before the first that does not
                token from max(0, p_accepted - q_{accepted+1}), from p_L if all stay, with RESIDUAL(accepted)
        block:  L = min(L, the first i whose p_i is undefined)
                w_0 = 1;  w_i = min(1, w_{i-1} p_{i-1}(x_i) / q_i(x_i)), 0 where that is not defined
                R_i = sum max(0, w_i p_i - q_{i+1});  h_i = R_i / (R_i + 1 - w_i), 0/0 = 1;  h_L = w_L
                accepted = largest i with ACCEPT(i - 1) < h_i, or 0
                token from max(0, w_i p_i - q_{i+1}), from p_L if i = L, with RESIDUAL(i)

    A residual without mass, or with an undefined q, is replaced by p. Rows at temperature 0 accept what equals the
    target's argmax, under every rule and whatever q. A draft token outside ``[0, V)`` is rejected.

    Sources: Leviathan et al. (arXiv 2211.17192) and Chen et al. (2302.01318) for *token*, Sun et al. (2403.10444) for
    *block*.

    Args:
        logits: ``[B, P, V]`` the target's, ``P >= 1``. A row whose P positions are all used up gets token -1.
        tokens: ``[B, G]`` int64 target ids; behind a row's count they are not looked at.
        count: ``[B]`` int64 in ``[0, G]``.
        rule: ``"match"``, ``"token"`` or ``"block"``.
        seed, start: ``[B]`` int64: row seed, committed tokens at the round's start.
        base: drafted position that offset 0 of this call stands for.
        temperature, top_k, top_p, min_p: the target's law, as in :func:`sample`.
        kind: ``[B, G]`` int32 of :class:`LawKind`. None: COMPACT if ``draft_logits`` are given, else SPARSE if
            ``sparse_ids`` are, else POINT. A kind whose tensors are not given counts as POINT, and so does COMPACT in a
            row with ``draft_temperature`` 0.
        draft_logits: ``[B, G, K]``, a float type of its own.
        index: ``[K]`` int32, ascending: the target id of each compact entry. Entries of one id stand for it together
            (projection: drafter tokens sorted by the first target token of their text). Ids outside ``[0, V)`` (-1 in
            front, V or more behind) hold mass that no target token gets. None: entry k is id k; K may differ from V.
        drawn: ``[B, G]`` int64, the compact entry each token was drawn as, which must be the only one of its id. None:
            all entries that stand for the token.
        draft_logsumexp: ``[B, G]`` float64, :func:`sample`'s of the same rows and parameters; with it a row without
            filters is read for a residual only. None: computed.
        sparse_ids: ``[B, G, S]`` int64, distinct within a position, padded with -1.
        sparse_log_q: ``[B, G, S]`` float64, their log masses (which may sum to less than 1).
        draft_temperature, draft_top_k, draft_top_p, draft_min_p: the law of ``draft_logits``.
        log_probs: also return ``log p`` of the tokens that stay and of the next one.
        backend: see the module.

    Returns:
        :class:`Verification`; ``log_prob`` is padded with -1 behind the next token.

    Raises:
        ValueError: a shape, dtype or device that does not fit, an unknown rule, or a backend that is not there.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
    _check_logits("logits", logits, 3)
    rows = logits.shape[0]
    if logits.shape[1] == 0:
        raise ValueError("logits must have at least one position: [B, P, V] with P >= 1")
    drafted = (rows, tokens.shape[1] if tokens.ndim == 2 else -1)
    _check("tokens", tokens, logits, drafted, torch.int64)
    _check("count", count, logits, (rows,), torch.int64)
    _check("seed", seed, logits, (rows,), torch.int64)
    _check("start", start, logits, (rows,), torch.int64)
    _check("kind", kind, logits, drafted, torch.int32)
    _check("drawn", drawn, logits, drafted, torch.int64)
    _check("draft_logsumexp", draft_logsumexp, logits, drafted, torch.float64)
    if draft_logits is not None:
        _check_logits("draft_logits", draft_logits, 3)
        _check("draft_logits", draft_logits, logits, (*drafted, draft_logits.shape[2]), draft_logits.dtype)
        _check("index", index, logits, draft_logits.shape[2:], torch.int32)
    elif not (index is None and drawn is None and draft_logsumexp is None):
        raise ValueError("index, drawn and draft_logsumexp describe draft_logits, which are not given")
    if (sparse_ids is None) != (sparse_log_q is None):
        raise ValueError("sparse_ids and sparse_log_q come together")
    if sparse_ids is not None:
        sparse = (*drafted, sparse_ids.shape[-1])
        _check("sparse_ids", sparse_ids, logits, sparse, torch.int64)
        _check("sparse_log_q", sparse_log_q, logits, sparse, torch.float64)
    law = _parameters(logits, "", temperature, top_k, top_p, min_p)
    draft_law = _parameters(logits, "draft_", draft_temperature, draft_top_k, draft_top_p, draft_min_p)
    if backend is None and rule == "block":
        backend = block_backend(rows * logits.shape[1], logits.device.type)
    op = overload("verify", logits, backend)
    return Verification(
        *op(
            logits,
            *law,
            tokens,
            count,
            kind,
            draft_logits,
            *draft_law,
            index,
            drawn,
            draft_logsumexp,
            sparse_ids,
            sparse_log_q,
            seed,
            start,
            base,
            RULES[rule],
            log_probs,
        )
    )


def softmax(
    logits: Tensor,
    *,
    temperature: Number = None,
    top_k: int | Tensor | None = None,
    top_p: Number = None,
    min_p: Number = None,
    backend: str | None = None,
) -> Tensor:
    """The law of each row as the module defines it, for callers who need every probability.

    Args:
        logits: ``[B, V]``.
        temperature, top_k, top_p, min_p: as in :func:`sample`.
        backend: see the module.

    Returns:
        ``[B, V]`` float64 that sum to 1; an undefined row is all NaN.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a backend that is not there.
    """
    _check_logits("logits", logits, 2)
    law = _parameters(logits, "", temperature, top_k, top_p, min_p)
    return overload("softmax", logits, backend)(logits, *law)


def project(q: Tensor, row_start: Tensor, column: Tensor, *, backend: str | None = None) -> Tensor:
    """A law on the drafter's vocabulary, read as target tokens: ``ψ(t) = sum of q(d) over the d that stand for t``.

        psi[n, t] = sum of q[n, column[j]] for row_start[t] <= j < row_start[t + 1], in that order

    Args:
        q: ``[N, K]`` float32 or float64, with unit stride over the vocabulary.
        row_start, column: the map's compressed rows, int32: ``[V + 1]`` ascending from 0, and drafter ids in
            ``[0, K)``. :func:`specdec_fast.reference_ops.compressed_rows` makes them of one target id a drafter token.
        backend: see the module.

    Returns:
        ``[N, V]`` float64.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a backend that is not there.
    """
    _check_masses("q", q)
    if row_start.ndim != 1 or row_start.shape[0] == 0:
        raise ValueError(f"row_start must be [V + 1], not {list(row_start.shape)}")
    _check("row_start", row_start, q, tuple(row_start.shape), torch.int32)
    _check("column", column, q, (column.numel(),), torch.int32)
    return overload("project", q, backend)(q, row_start, column)


def range_sums(
    q: Tensor, low: Tensor, high: Tensor, *, order: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Masses of ranges of a law in a given order: with both vocabularies sorted by bytes, the masses of prefixes.

        edge[n, j] = q[n, order[0]] + ... + q[n, order[j - 1]]
        sums[n, r] = max(0, edge[n, high[n, r]] - edge[n, low[n, r]])        # 0 where high <= low

    Args:
        q: ``[N, K]`` float32 or float64.
        low, high: ``[N, R]`` int64; clamped to ``[0, length]``.
        order: ``[L]`` int32 ids in ``[0, K)``; None: as they stand, ``L = K``.
        backend: see the module.

    Returns:
        ``[N, R]`` float64, each within about 1e-15 of the row's total mass.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a backend that is not there.
    """
    _check_masses("q", q)
    ranges = (q.shape[0], low.shape[-1] if low.ndim else -1)
    _check("low", low, q, ranges, torch.int64)
    _check("high", high, q, ranges, torch.int64)
    if order is not None:
        _check("order", order, q, (order.numel(),), torch.int32)
    return overload("range_sums", q, backend)(q, order, low, high)


def _check_logits(name: str, logits: Tensor, dims: int) -> None:
    if logits.ndim != dims or logits.shape[-1] == 0:
        shape = "[B, V]" if dims == 2 else "[B, P, V]"
        raise ValueError(f"{name} must be {shape} with V >= 1, not {list(logits.shape)}")
    if logits.dtype not in _FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, not {logits.dtype}")


def _check_masses(name: str, q: Tensor) -> None:
    if q.ndim != 2 or q.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be [N, K] float32 or float64, not {list(q.shape)} {q.dtype}")


def _check(name: str, value: Tensor | None, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if value is None:
        return
    if tuple(value.shape) != tuple(shape) or value.dtype != dtype or value.device != like.device:
        wanted = f"{list(shape)} {dtype} on {like.device}"
        raise ValueError(f"{name} must be {wanted}, not {list(value.shape)} {value.dtype} on {value.device}")


def _parameters(
    logits: Tensor, side: str, temperature: Number, top_k: int | Tensor | None, top_p: Number, min_p: Number
) -> tuple[Tensor | None, ...]:
    """One tensor a row of each, or None where it changes nothing."""
    given = (("temperature", temperature), ("top_k", top_k), ("top_p", top_p), ("min_p", min_p))
    result = []
    for name, value in given:
        dtype = torch.int32 if name == "top_k" else torch.float32
        if isinstance(value, Tensor):
            _check(side + name, value, logits, logits.shape[:1], dtype)
        elif value is not None:
            value = logits.new_full(logits.shape[:1], value, dtype=dtype)
        result.append(value)
    return tuple(result)


_LAW = "Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p"
_DRAFT_LAW = _LAW.replace("? ", "? draft_")
_SCHEMAS = {
    "sample": (
        f"(Tensor logits, {_LAW}, Tensor seed, Tensor position, Tensor? offset, int purpose)"
        " -> (Tensor token, Tensor log_prob, Tensor logsumexp, Tensor status)"
    ),
    "verify": (
        f"(Tensor logits, {_LAW}, Tensor tokens, Tensor count, Tensor? kind, Tensor? draft_logits, {_DRAFT_LAW},"
        " Tensor? index, Tensor? drawn, Tensor? draft_logsumexp, Tensor? sparse_ids, Tensor? sparse_log_q,"
        " Tensor seed, Tensor start, int base, int rule, bool log_probs)"
        " -> (Tensor accepted, Tensor token, Tensor log_prob, Tensor status)"
    ),
    "softmax": f"(Tensor logits, {_LAW}) -> Tensor",
    "project": "(Tensor q, Tensor row_start, Tensor column) -> Tensor",
    "range_sums": "(Tensor q, Tensor? order, Tensor low, Tensor high) -> Tensor",
}


def _fake_sample(logits: Tensor, *rest: object) -> tuple[Tensor, ...]:
    rows = logits.shape[:1]
    wide = logits.new_empty(rows, dtype=torch.float64)
    return logits.new_empty(rows, dtype=torch.int64), wide, wide.clone(), logits.new_empty(rows, dtype=torch.int32)


def _fake_verify(logits: Tensor, *rest: object) -> tuple[Tensor, ...]:
    rows, positions = logits.shape[:2]
    accepted = logits.new_empty((rows,), dtype=torch.int64)
    log_prob = logits.new_empty((rows, positions if rest[-1] else 0), dtype=torch.float64)
    return accepted, accepted.clone(), log_prob, logits.new_empty((rows,), dtype=torch.int32)


def _fake_softmax(logits: Tensor, *rest: object) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float64)


def _fake_project(q: Tensor, row_start: Tensor, column: Tensor) -> Tensor:
    return q.new_empty((q.shape[0], row_start.shape[0] - 1), dtype=torch.float64)


def _fake_range_sums(q: Tensor, order: Tensor | None, low: Tensor, high: Tensor) -> Tensor:
    return q.new_empty(low.shape, dtype=torch.float64)


_library = torch.library.Library("specdec_fast", "FRAGMENT")
for _op, _schema in _SCHEMAS.items():
    _library.define(_op + _schema)
    _library.impl(_op, getattr(reference_ops, _op), "CompositeExplicitAutograd")
    _library.define(f"{_op}.reference{_schema}")
    _library.impl(f"{_op}.reference", getattr(reference_ops, _op), "CompositeExplicitAutograd")
    _library.define(f"{_op}.triton{_schema}")
    _library.impl(f"{_op}.triton", partial(run_triton, _op), "CompositeExplicitAutograd")
    for _name in (_op, f"{_op}.reference", f"{_op}.triton"):
        _library.impl(_name, globals()[f"_fake_{_op}"], "Meta")
_library.define("cpu_capability() -> int")
native.load_ops()
