"""Greedy output beside plain decoding's, token for token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec_fast import fast_generate
from specdec_fast.audit.common import EXACT, Generate, Progress, check, name_of, new_tokens, quiet
from specdec_fast.audit.law import SHAPES, Scorer
from specdec_fast.console import unit_of
from specdec_fast.sources import beginning

__all__ = ["Divergence", "GreedyAudit", "GreedyCase", "audit_greedy"]

CANDIDATES = 10  # logits whose rounding is looked at


@dataclass(frozen=True)
class Divergence:
    """The first difference of a greedy output from plain decoding."""

    position: int
    """How many new tokens agree before it."""
    tokens: tuple[int | None, int | None]
    """Plain decoding's and the generator's; None where an output has ended."""
    margin: float | None
    """How far plain decoding's score of its own token lies above that of the other; None where one has ended."""
    unit: float
    """Spacing of the model's number type at the larger score."""
    spread: float
    """By how much the best scores change, at most, between scoring one position and γ+1."""
    tie: bool
    """Whether rounding explains it: the margin is within a unit, or within what two scores can move."""


@dataclass(frozen=True)
class GreedyCase:
    """One prompt."""

    compared: int
    """New tokens of plain decoding."""
    divergence: Divergence | None


@dataclass(frozen=True)
class GreedyAudit:
    """Greedy output beside plain decoding's."""

    verdict: str
    """pass or fault."""
    reason: str
    dtype: str
    cases: list[GreedyCase]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)


def audit_greedy(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    *,
    generate: Generate = fast_generate,
    arguments: dict[str, Any] | None = None,
    tokens: int = 48,
    positions: int = 6,
    progress: Progress = quiet,
) -> GreedyAudit:
    """Compares greedy output with ``model.generate``'s, token for token.

    In float32 any difference is a fault. In lower precision one is told from a tie: at the first difference, the margin
    between the two tokens in plain decoding is set against how far the target's own scores move between scoring one
    position and several.

    Args:
        model: the target.
        prompts: ids ``[1, P]`` each, on the target's device; of an encoder-decoder model what it reads.
        generate: what is audited.
        arguments: more of its arguments, such as ``assistant_model``.
        tokens: new tokens a prompt.
        positions: γ+1, how many positions a round scores.
        progress: told of every prompt.

    Raises:
        ValueError: there is no prompt, or ``generate`` returned no continuation of one.
    """
    check(prompts, tokens=tokens, positions=positions)
    plainly: Any = model.generate
    cases = []
    for number, prompt in enumerate(prompts):
        progress("greedy", number, len(prompts))
        common = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": tokens}
        begin = beginning(model, prompt)
        expected = plainly(prompt, **common)[0, begin.shape[1] :].tolist()
        got = new_tokens(generate(model, prompt, **common, **(arguments or {})), begin)[0].tolist()
        found = None
        if got != expected:
            scorer = Scorer(model, prompt, {"do_sample": False}, tokens=tokens, positions=positions)
            found = _divergence(scorer, expected, got, model.dtype)
        cases.append(GreedyCase(len(expected), found))
    progress("greedy", len(prompts), len(prompts))
    exact = model.dtype in EXACT
    parted = [case.divergence for case in cases if case.divergence is not None]
    name = name_of(model.dtype)
    if not parted:
        verdict, reason = "pass", "the same tokens as plain decoding"
    elif exact:
        verdict, reason = "fault", f"{len(parted)} of {len(cases)} outputs differ from plain decoding in {name}"
    elif all(divergence.tie for divergence in parted):
        verdict = "pass"
        reason = f"{len(parted)} of {len(cases)} outputs part from plain decoding, each at a tie within {name} rounding"
    else:
        worst = sum(not divergence.tie for divergence in parted)
        verdict = "fault"
        reason = f"{worst} of {len(cases)} outputs part from plain decoding by more than {name} rounding explains"
    return GreedyAudit(verdict, reason, name, cases)


def _divergence(scorer: Scorer, expected: list[int], got: list[int], dtype: torch.dtype) -> Divergence:
    pairs = zip(expected, got, strict=False)
    where = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(got)))
    own = expected[where] if where < len(expected) else None
    other = got[where] if where < len(got) else None
    prefix = tuple(expected[:where])
    plain = scorer.plain_scores(prefix)
    several = [scorer.scores([prefix], shape)[0] for shape in SHAPES[1:]]
    best = plain.topk(min(CANDIDATES, len(plain))).indices
    spread = max(float((one[best] - plain[best]).abs().max()) for one in several)
    unit = unit_of(float(plain[best[0]]), dtype)
    if own is None or other is None:
        return Divergence(where, (own, other), None, unit, spread, False)
    margin = float(plain[own] - plain[other])
    # Either score may move by the spread, and one unit is the least step there is
    return Divergence(where, (own, other), margin, unit, spread, margin <= max(unit, 2 * spread))
