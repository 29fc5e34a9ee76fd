"""Turns logits into the scores whose softmax is the law p, exactly as ``model.generate`` would.

The processors are Transformers' own, in the order ``generate`` built them. What differs is only how they are called:

- *pointwise* ones look at nothing but the scores, so all positions of all rows go through them at once;
- *prefix* ones also look at a row's text: they are called with the true prefix of every position;
- temperature, top-k, top-p and min-p, the usual lists, are parameters of the operations in :mod:`specdec_fast.ops`:
  no sorting of the vocabulary;
- anything else (a custom processor, a grammar, one that knows the row number) is called as plain decoding calls it:
  with the whole batch, once for each committed position, in order.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as hf

from specdec_fast import ops

__all__ = ["Manner", "apply", "drafter_warpers", "holds_a_cache", "manner_of", "parameters", "process", "warp"]

_WARPERS: tuple[type, ...] = tuple(
    getattr(hf, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TopHLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
    )
    if hasattr(hf, name)
)
_POINTWISE = (*_WARPERS, hf.InfNanRemoveLogitsProcessor, hf.LogitNormalization, hf.SuppressTokensLogitsProcessor)
_PREFIX = (
    hf.MinLengthLogitsProcessor,
    hf.MinNewTokensLengthLogitsProcessor,
    hf.RepetitionPenaltyLogitsProcessor,
    hf.NoRepeatNGramLogitsProcessor,
    hf.NoBadWordsLogitsProcessor,
    hf.SequenceBiasLogitsProcessor,
    hf.ForcedBOSTokenLogitsProcessor,
    hf.ForcedEOSTokenLogitsProcessor,
    hf.ExponentialDecayLengthPenalty,
    hf.SuppressTokensAtBeginLogitsProcessor,
    hf.WhisperTimeStampLogitsProcessor,
)
_CACHED = (hf.UnbatchedClassifierFreeGuidanceLogitsProcessor, hf.ClassifierFreeGuidanceLogitsProcessor)


class Manner(enum.Enum):
    """How a list of processors has to be called."""

    POINTWISE = "all positions of all rows at once"
    PREFIX = "each position with its own prefix"
    IN_ORDER = "the whole batch, one committed position after the other"


def manner_of(processors: LogitsProcessorList) -> Manner:
    """The least restrictive manner that is right for every processor of the list.

    Types are compared exactly: a subclass may do anything.
    """
    kinds = {type(processor) for processor in processors}
    if kinds <= set(_POINTWISE):
        return Manner.POINTWISE
    return Manner.PREFIX if kinds <= {*_POINTWISE, *_PREFIX} else Manner.IN_ORDER


def apply(processors: LogitsProcessorList, ids: Tensor, scores: Tensor) -> Tensor:
    """One call of the processors, as ``generate`` calls them: ``ids [N, L]``, ``scores [N, V]``."""
    return processors(ids, scores)  # type: ignore[arg-type]  # annotated with legacy tensor types


_PARAMETERS = (
    (hf.TemperatureLogitsWarper, "temperature"),
    (hf.TopKLogitsWarper, "top_k"),
    (hf.TopPLogitsWarper, "top_p"),
    (hf.MinPLogitsWarper, "min_p"),
)


def parameters(processors: LogitsProcessorList) -> dict[str, float] | None:
    """The processors as parameters of :func:`specdec_fast.ops.sample`: each kind once, in Transformers' order.

    Returns:
        None where parameters cannot say it.
    """
    if not processors:
        return {}
    kinds = [kind for kind, _ in _PARAMETERS]
    if not {type(p) for p in processors} <= set(kinds):
        return None
    places = [kinds.index(type(p)) for p in processors]
    usual = all(
        getattr(p, "filter_value", -torch.inf) == -torch.inf and getattr(p, "min_tokens_to_keep", 1) == 1
        for p in processors
    )
    if not usual or any(a >= b for a, b in pairwise(places)):
        return None
    names = dict(_PARAMETERS)
    return {names[type(p)]: float(getattr(p, names[type(p)])) for p in processors}


def warp(warpers: LogitsProcessorList, scores: Tensor) -> Tensor:
    """Scores ``[N, K]`` float32 after a drafter's warpers; filters leave ``-inf``.

    The law of what this returns is the drafter's, whatever it filters, so nothing hangs on the last bit of a threshold.
    """
    usual = parameters(warpers)
    if usual is None or usual.keys() <= {"temperature"}:
        empty = torch.zeros((scores.shape[0], 1), dtype=torch.long, device=scores.device)
        return apply(warpers, empty, scores)
    kept = ops.softmax(scores, **usual) > 0  # type: ignore[arg-type]
    return torch.where(kept, scores / usual.get("temperature", 1.0), -torch.inf)


def holds_a_cache(processors: LogitsProcessorList) -> bool:
    """Whether a processor runs a model of its own along the text (guidance), so that drafting gains nothing."""
    return any(isinstance(processor, _CACHED) for processor in processors)


def process(
    processors: LogitsProcessorList,
    manner: Manner,
    logits: Tensor,
    prefix: Callable[[int, int], Tensor],
    rows: Sequence[int],
    valid: list[int],
) -> Tensor:
    """Scores of every drafted position, for the manners that need no order.

    Args:
        logits: ``[R, n, V]`` float32; may be overwritten.
        prefix: ``prefix(r, i)`` gives row r's ids before position i, ``[1, length]``.
        rows: which rows of the batch these ``R`` are.
        valid: how many positions each row has.

    Returns:
        ``[R, n, V]`` float32; positions behind a row's own are whatever.
    """
    count, n, width = logits.shape
    if not processors:
        return logits
    if manner is Manner.POINTWISE:
        ids = torch.zeros((count * n, 1), dtype=torch.long, device=logits.device)
        return apply(processors, ids, logits.reshape(count * n, width)).view(count, n, width)
    result = torch.empty_like(logits)
    for r, row in enumerate(rows):
        own = LogitsProcessorList([_of_row(processor, row) for processor in processors])
        for i in range(valid[r]):
            result[r, i] = apply(own, prefix(r, i), logits[r, i : i + 1])[0]
    return result


def _of_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    """The processor as a batch of that row alone would have it."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(ignored, Tensor):
        return processor
    own: Any = copy.copy(processor)
    own.prompt_ignore_length = ignored[row : row + 1]
    return own


def drafter_warpers(
    processors: LogitsProcessorList, *, do_sample: bool, temperature: float | None
) -> LogitsProcessorList | None:
    """The drafter's sampling: the target's temperature and filters, each once, on the drafter's own vocabulary.

    Args:
        processors: the target's.
        do_sample: whether the target samples.
        temperature: the drafter's own (``assistant_temperature``); None: the target's.

    Returns:
        None where the drafter proposes its argmax.
    """
    if temperature is None:
        if not do_sample:
            return None
        return LogitsProcessorList([p for p in processors if type(p) in _WARPERS])
    if temperature == 0:
        return None
    others = [p for p in processors if type(p) in _WARPERS and not isinstance(p, hf.TemperatureLogitsWarper)]
    return LogitsProcessorList([hf.TemperatureLogitsWarper(float(temperature)), *(others if do_sample else [])])
