"""How much of a drafter's law lies on the tokens that a target with another vocabulary has too.

At every position of a fixed text the drafter's law q, at temperature 1 and without filters, is summed over the
intersection T∩D: what TLI keeps of it. The same text in both vocabularies shows how often the target writes as one
token what the drafter writes as several, which only string-level rejection sampling can propose. One forward pass of
the drafter over a few hundred tokens; kept as long as the model and the vocabularies are.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec_fast import reference
from specdec_fast.masks import positions_of
from specdec_fast.vocab import Vocabulary, intersection

__all__ = ["SAMPLE", "IntersectionMass", "intersection_mass"]

SAMPLE = '''def moving_average(values, width):
    """Mean of each window of `width` neighbouring values."""
    if width < 1:
        raise ValueError("width must be positive")
    total = sum(values[:width])
    averages = [total / width]
    for old, new in zip(values, values[width:]):
        total += new - old
        averages.append(total / width)
    return averages


When the rain stopped, the children ran down to the river to see how high the water had come. The old bridge was still
standing, although two of its planks were gone, and on the other side a dog was barking at something nobody could see.

A shop sells pencils at 3 for 45 cents. How much do 14 pencils cost? One pencil costs 45 / 3 = 15 cents, so 14 pencils
cost 14 * 15 = 210 cents, which is $2.10. With a discount of 10% they cost $2.10 - $0.21 = $1.89.
'''
POSITIONS = 16  # whose laws are summed at a time: in float64 they take a megabyte each and more


@dataclass(frozen=True)
class IntersectionMass:
    """What was measured.

    Attributes:
        shared: mean mass of the drafter's law on tokens that the target has byte for byte.
        merged: share of the target's tokens of the text that are several of the drafter's.
        positions: how many; 0 where the drafter's tokenizer cannot write the text, and ``shared`` is then the share of
            its ids.
    """

    shared: float
    merged: float
    positions: int


_Made = dict[tuple[int, int], IntersectionMass]
_OfTarget = weakref.WeakKeyDictionary[Vocabulary, _Made]
_kept: weakref.WeakKeyDictionary[PreTrainedModel, weakref.WeakKeyDictionary[Vocabulary, _OfTarget]]
_kept = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def intersection_mass(
    model: PreTrainedModel, drafter: Vocabulary, target: Vocabulary, *, target_size: int, drafter_size: int
) -> IntersectionMass:
    """Measures a drafter once for each target vocabulary.

    What was measured guides a choice between methods that are all lossless, so one that has grown stale (the model was
    trained on meanwhile) costs speed at most.

    Args:
        model: the drafter.
        drafter, target: the vocabularies.
        target_size, drafter_size: width of the models' logits; ids beyond them do not count.
    """
    with _lock:
        made = _kept.setdefault(model, weakref.WeakKeyDictionary())
        of_target = made.setdefault(drafter, weakref.WeakKeyDictionary()).setdefault(target, {})
        sizes = target_size, drafter_size
        if sizes not in of_target:
            of_target[sizes] = _measured(model, drafter, target, target_size, drafter_size)
        return of_target[sizes]


def _measured(
    model: PreTrainedModel, drafter: Vocabulary, target: Vocabulary, target_size: int, drafter_size: int
) -> IntersectionMass:
    shared = intersection(target, drafter, target_size=target_size, drafter_size=drafter_size).drafter_ids
    ids, _ = drafter.encode(SAMPLE)
    masses = _masses(model, ids, shared)
    if not len(masses):
        return IntersectionMass(len(shared) / drafter_size, 0.0, 0)
    return IntersectionMass(min(float(masses.mean()), 1.0), _merged(target, drafter, ids), len(masses))


@torch.no_grad()
def _masses(model: PreTrainedModel, ids: list[int], members: Tensor) -> Tensor:
    """The mass on some ids at each position of a text: ``[N]`` float64. Positions without a law (NaN) are left out."""
    ids = ids[: positions_of(model)]
    if not ids or model.main_input_name != "input_ids":
        return torch.zeros(0, dtype=torch.float64)
    inputs = {"input_ids": torch.tensor([ids], device=model.device)}
    if model.config.is_encoder_decoder:  # writes the text that it reads
        inputs["decoder_input_ids"] = inputs["input_ids"]
    logits = model(**inputs, use_cache=False).logits[0]
    members = members.to(logits.device)
    masses = torch.cat([reference.masses(part)[:, members].sum(-1) for part in logits.split(POSITIONS)])
    return masses[masses.isfinite()].cpu()


def _merged(target: Vocabulary, drafter: Vocabulary, written: list[int]) -> float:
    """The share of the target's tokens of the text that begin and end where tokens of the drafter do, not one."""
    place = {end: i for i, end in enumerate(_ends(drafter, written))}
    ends = [place.get(end) for end in _ends(target, target.encode(SAMPLE)[0])]
    steps = [b - a for a, b in pairwise(ends) if a is not None and b is not None]
    return sum(step > 1 for step in steps) / max(len(ends) - 1, 1)


def _ends(vocabulary: Vocabulary, ids: list[int]) -> list[int]:
    """How many bytes of a text stand before each of its tokens, and behind the last."""
    return list(accumulate((len(vocabulary.bytes_of([i])) for i in ids), initial=0))
