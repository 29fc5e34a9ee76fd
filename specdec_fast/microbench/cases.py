"""What is measured: shapes, and the tensors of each.

Logits fall off as those of a language model do, ``-1.2 log(rank)`` over shuffled ids, and the drafter's are the
target's with as much noise as makes ``sum of min(p, q)`` the acceptance that is asked for. How many tokens each row
accepts is fixed in advance, a stratified sample of the geometric law of that acceptance, and built into the inputs, so
that everybody accepts the same whatever random numbers it draws: a token that must stay has ``p >= q`` (for a point
mass and for rule *match*: ``p`` of almost 1), one that must not has ``p = 0``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from specdec_fast.microbench import LAWS
from specdec_fast.reference_ops import compressed_rows

__all__ = ["Case", "accepted", "build", "grid", "quick_grid", "selected"]

VOCABULARIES = (32000, 128256, 151936, 262144)
BATCHES = (1, 4, 8, 16, 64, 256)
LOOKAHEADS = (1, 4, 8)
ACCEPTANCES = (0.6, 0.8, 0.9)
SHARED = 0.72  # of the vocabulary: what Qwen 2.5 shares with Llama 3
RANGES = 64  # a law's ranges in range_sums
FILTERS = {"top_k": 50, "top_p": 0.9}
SHARP = 40.0  # above every other logit: probability 1 up to 1e-12


@dataclass(frozen=True)
class Case:
    """One shape of one op.

    ``rows`` of the vocabulary are B for ``sample`` (one draft step), B·(γ+1) for ``softmax``, B·γ for ``project`` and
    ``range_sums`` (the laws of one draft). ``rule``, ``law``, ``filters`` (the target's top-k and top-p) and
    ``acceptance`` are for ``verify``; ``filters`` for ``sample`` as well.
    """

    op: str
    dtype: str
    batch: int
    gamma: int
    vocab: int
    rule: str | None = None
    law: str | None = None
    filters: bool = False
    acceptance: float | None = None

    @property
    def compact(self) -> int:
        """Entries of the drafter's law, K."""
        return int(self.vocab * SHARED) if self.law == "compact" else self.vocab

    @property
    def size(self) -> int:
        """Bytes of one logit."""
        return getattr(torch, self.dtype).itemsize

    def bytes_read_once(self) -> int:
        """Bytes of every row that the op is given, read once, and of what it must write."""
        if self.op == "verify":
            return (self.batch * (self.gamma + 1) * self.vocab + self._draft_rows(self.gamma)) * self.size
        if self.op == "sample":
            return self.batch * self.vocab * self.size
        if self.op == "softmax":
            return self.batch * (self.gamma + 1) * self.vocab * (self.size + 8)
        laws = self.batch * self.gamma
        if self.op == "project":  # the map; laws in, laws of float64 out
            return self.vocab * 4 + (self.vocab + 1) * 4 + laws * self.vocab * (self.size + 8)
        return self.vocab * 4 + laws * (self.vocab * self.size + RANGES * 24)

    def bytes_needed(self) -> int:
        """Bytes without which the outcome cannot be known: nothing behind the first rejection, but for rule *block*."""
        if self.op != "verify" or self.rule == "block":
            return self.bytes_read_once()
        total = 0
        for kept in accepted(self):
            total += min(kept + 1, self.gamma + 1) * self.vocab
            if self.law == "handed":  # the row that is subtracted
                total += self.compact if kept < self.gamma else 0
            elif self.law != "point" and self.rule != "match":
                total += min(kept + 1, self.gamma) * self.compact
        return total * self.size

    def _draft_rows(self, rows: int) -> int:
        return 0 if self.law == "point" or self.rule == "match" else self.batch * rows * self.compact

    def options(self) -> str:
        """What to put behind ``specdec-fast bench kernels`` to measure this case alone."""
        words = []
        for field in fields(self):
            value, name = getattr(self, field.name), field.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            elif value is not None:
                words.append(f"--{name} {value}")
        return " ".join(words)


def accepted(case: Case) -> list[int]:
    """How many draft tokens each row keeps: a stratified sample of ``min(γ, geometric)``, the same everywhere."""
    assert case.acceptance is not None
    kept = []
    for row in range(case.batch):
        share = (row + 0.5) / case.batch
        longest = math.floor(math.log(share) / math.log(case.acceptance))
        kept.append(min(case.gamma, longest))
    order = torch.randperm(case.batch, generator=torch.Generator().manual_seed(1)).tolist()
    return [kept[i] for i in order]


def build(case: Case, device: torch.device) -> dict[str, Any]:
    """The op's arguments, by name."""
    generator = torch.Generator(device).manual_seed(case.vocab + case.batch)
    if case.op == "verify":
        return _verify(case, generator)
    base = _falling(case.vocab, generator)
    filters = dict(FILTERS) if case.filters else {}
    if case.op in ("sample", "softmax"):
        rows = case.batch * (1 if case.op == "sample" else case.gamma + 1)
        logits = torch.empty(rows, case.vocab, dtype=getattr(torch, case.dtype), device=device)
        for row, shift in enumerate(_shifts(rows, case.vocab, generator)):
            logits[row] = base.roll(shift)
        if case.op == "softmax":
            return {"logits": logits, **filters}
        keys = torch.arange(rows, device=device)
        return {"logits": logits, "seed": keys, "position": keys + 100, **filters}
    laws = base.softmax(0).to(getattr(torch, case.dtype)).repeat(case.batch * case.gamma, 1)
    if case.op == "project":
        index = torch.randint(0, case.vocab, (case.vocab,), generator=generator, device=device)
        row_start, column = compressed_rows(index, case.vocab)
        return {"q": laws, "row_start": row_start, "column": column}
    ends = torch.randint(0, case.vocab + 1, (2, laws.shape[0], RANGES), generator=generator, device=device)
    order = torch.randperm(case.vocab, generator=generator, device=device).int()
    return {"q": laws, "low": ends.amin(0), "high": ends.amax(0), "order": order}


def _falling(vocab: int, generator: torch.Generator) -> Tensor:
    """Logits ``[V]`` float32 of a law that falls off with the rank."""
    ranks = torch.randperm(vocab, generator=generator, device=generator.device) + 1
    return -1.2 * ranks.float().log()


def _shifts(rows: int, vocab: int, generator: torch.Generator) -> list[int]:
    return torch.randint(0, vocab, (rows,), generator=generator, device=generator.device).tolist()


def _noisy(base: Tensor, acceptance: float, generator: torch.Generator) -> Tensor:
    """``base`` with as much noise as leaves ``sum of min(p, q) = acceptance``, by bisection."""
    noise = torch.randn(base.shape, generator=generator, device=base.device)
    p, low, high = base.double().softmax(0), 0.0, 8.0
    for _ in range(30):
        middle = (low + high) / 2
        q = (base + middle * noise).double().softmax(0)
        low, high = (middle, high) if float(torch.minimum(p, q).sum()) > acceptance else (low, middle)
    return base + low * noise


def _verify(case: Case, generator: torch.Generator) -> dict[str, Any]:
    assert case.acceptance is not None
    device, dtype = generator.device, getattr(torch, case.dtype)
    batch, gamma, vocab = case.batch, case.gamma, case.vocab
    base = _falling(vocab, generator)
    other = _noisy(base, case.acceptance, generator)
    gain = base.softmax(0) - other.softmax(0)
    logits = torch.empty(batch, gamma + 1, vocab, dtype=dtype, device=device)
    index = None
    if case.law == "compact":
        index = torch.randperm(vocab, generator=generator, device=device)[: case.compact].sort().values
    with_law = case.law != "point"
    draft = torch.empty(batch, gamma, case.compact, dtype=dtype, device=device) if with_law else None
    tokens = torch.empty(batch, gamma, dtype=torch.int64, device=device)
    sure = case.rule == "match" or not with_law
    kept = accepted(case)
    for row in range(batch):
        shifts = _shifts(gamma + 1, vocab, generator)
        for place, shift in enumerate(shifts):
            logits[row, place] = base.roll(shift)
            if place == gamma:
                continue
            shifted = gain.roll(shift)
            if index is not None:
                shifted = torch.full_like(gain, -math.inf).index_copy_(0, index, shifted[index])
            token = shifted.argmax()  # p >= q there, also where q lacks some of its mass and p some of its tokens
            if draft is not None:
                law = other.roll(shift)
                draft[row, place] = law if index is None else law[index]
            if place >= kept[row]:
                logits[row, place, token] = -math.inf
            elif sure:
                logits[row, place, token] = SHARP
            elif index is not None:  # q's mass is that of the intersection alone
                logits[row, place, token] += 1.0
            tokens[row, place] = token
    keys = torch.arange(batch, device=device)
    case_tensors: dict[str, Any] = {
        "logits": logits,
        "tokens": tokens,
        "count": torch.full((batch,), gamma, device=device),
        "rule": case.rule,
        "seed": keys,
        "start": keys + 100,
    }
    if draft is not None:
        case_tensors["draft_logits"] = draft
        case_tensors["drawn"] = tokens if index is None else torch.searchsorted(index, tokens)
    if index is not None:
        case_tensors["index"] = index.int()
    if case.law == "handed" and draft is not None:
        case_tensors["draft_logsumexp"] = _logsumexp(draft)
    return case_tensors | (FILTERS if case.filters else {})


def _logsumexp(logits: Tensor) -> Tensor:
    """``[B, γ]`` float64 of ``[B, γ, V]``, a row at a time: float64 copies of everything would not fit."""
    return torch.stack([row.double().logsumexp(-1) for row in logits])


def grid(device: str) -> list[Case]:
    """Everything, the shapes of the goals first."""
    batches = BATCHES if device == "cuda" else tuple(b for b in BATCHES if b <= 16)
    usual = {"op": "verify", "rule": "token", "law": "dense", "acceptance": 0.8, "gamma": 4, "vocab": 151936}
    cases = list(_goals())
    for batch in batches:
        for dtype in ("bfloat16", "float32"):
            here = usual | {"dtype": dtype, "batch": batch}
            cases += _product(here, rule=("token", "block"), law=LAWS)
            cases += _product(here, rule=("match",), law=("point",))
            cases += _product(here | {"filters": True}, rule=("token", "block"))
            cases += _others({"dtype": dtype, "batch": batch, "gamma": 4, "vocab": 151936})
    cases += _product(usual | {"dtype": "bfloat16"}, vocab=VOCABULARIES, batch=batches, gamma=LOOKAHEADS)
    cases += _product(usual | {"dtype": "bfloat16"}, batch=batches, acceptance=ACCEPTANCES, rule=("token", "block"))
    plain = {"op": "sample", "gamma": 4}
    cases += _product(plain, vocab=VOCABULARIES, batch=batches, dtype=("bfloat16", "float32"))
    return list(dict.fromkeys(cases))


def quick_grid() -> list[Case]:
    """The shapes of the goals, and one of everything else."""
    one = {"batch": 1, "gamma": 4, "vocab": 151936}
    usual = one | {"op": "verify", "dtype": "bfloat16", "acceptance": 0.8}
    cases = list(_goals())
    cases += _product(usual, rule=("block",), law=("dense",))
    cases += _product(usual, rule=("match",), law=("point",))
    cases += _product(usual, rule=("token",), law=("handed", "compact"))
    cases += _product(usual, rule=("token",), law=("dense",), filters=(True,))
    return list(dict.fromkeys([*cases, *_others(one | {"dtype": "bfloat16"})]))


def _goals() -> Iterator[Case]:
    for batch in (1, 8):
        for dtype in ("bfloat16", "float32"):
            shape = {"dtype": dtype, "batch": batch, "gamma": 4, "vocab": 151936}
            yield Case(op="verify", rule="token", law="dense", acceptance=0.8, **shape)  # type: ignore[arg-type]
            yield Case(op="sample", **shape)  # type: ignore[arg-type]


def _others(shape: dict[str, Any]) -> list[Case]:
    """The ops beside ``verify``; ``project`` and ``range_sums`` read float32 or float64 laws."""
    masses = shape | {"dtype": "float32"}
    return [
        Case(op="sample", **shape),
        Case(op="sample", filters=True, **shape),
        Case(op="softmax", **shape),
        Case(op="project", **masses),
        Case(op="range_sums", **masses),
    ]


def _product(fixed: dict[str, Any], **choices: Iterable[Any]) -> list[Case]:
    """A case for every combination."""
    found = [fixed]
    for name, values in choices.items():
        found = [case | {name: value} for case in found for value in values]
    return [Case(**case) for case in found]


def selected(given: dict[str, list[Any]], device: str) -> list[Case]:
    """Every combination of what the user named, with the usual shape for what was left out.

    Args:
        given: field of :class:`Case` to its values; an empty list was not named.
        device: for the usual batch sizes.
    """
    usual: dict[str, list[Any]] = {
        "op": ["verify"],
        "dtype": ["bfloat16"],
        "batch": [1, 8] if device == "cpu" else [1, 8, 64],
        "gamma": [4],
        "vocab": [151936],
        "rule": ["token"],
        "law": ["dense"],
        "filters": [False],
        "acceptance": [0.8],
    }
    cases = _product({}, **{name: given.get(name) or values for name, values in usual.items()})
    return list(dict.fromkeys(_trimmed(case) for case in cases))


def _trimmed(case: Case) -> Case:
    """Without what the op does not look at."""
    if case.op == "verify":
        return replace(case, law="point") if case.rule == "match" else case
    dtype = "float32" if case.op in ("project", "range_sums") else case.dtype
    filters = case.filters and case.op in ("sample", "softmax")
    return replace(case, rule=None, law=None, acceptance=None, filters=filters, dtype=dtype)
