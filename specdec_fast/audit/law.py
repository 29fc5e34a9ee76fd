"""The target's own law, from forward passes of the target and Transformers' own processors alone.

Nothing of the engine takes part, so that the audit does not share its mistakes. A law of the first few tokens over a
real vocabulary has too many outcomes to count, so they are put into *cells* that the law itself decides: the tree of
texts is unfolded along its probable branches, a branch with at least the least mass is a cell, and what is left of
each node is a cell of its own or part of the common rest.

In low precision a law depends on how many positions a forward pass scores. Each is therefore computed in three shapes:
one position at a time, as plain decoding does; the last of γ+1 positions behind a cache, and one position of a single
pass over the text and γ more tokens, as speculative decoding does, the last two in batches. The third runs on the
weights widened to float32, where such a copy is small enough: an engine that rounds less than the model's own forward
(a fused pass that stays in float32 between two matrices) has a law nearer to that one.
"""

from __future__ import annotations

import copy
import heapq
import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from specdec_fast.cache import cache_argument, cache_of

__all__ = ["SHAPES", "Cells", "Scorer", "cells_of"]

SHAPES = ("one position", "γ+1 positions", "whole text")
LARGEST = 1 << 31  # parameters of a target that is copied, four bytes each
ROWS = 16  # of a pass in a batch: more change nothing but its cost


class Scorer:
    """Scores of the target behind a prompt, processed as ``model.generate`` would.

    Args:
        model: the target.
        prompt: ``[1, P]``; of an encoder-decoder model what it reads.
        sampling: ``do_sample`` and what else ``model.generate`` takes to choose a law.
        tokens: how many are generated; some processors ask.
        positions: γ+1.
    """

    def __init__(
        self, model: PreTrainedModel, prompt: Tensor, sampling: dict[str, Any], *, tokens: int, positions: int
    ):
        self._model: Any = model
        self._wide: Any = _widened(model)
        self._positions = positions
        self._processors, self.ends, self._prompt, self._read = _prepared(model, prompt, sampling, tokens)
        self._steps: dict[tuple[int, ...], tuple[Any, Tensor]] = {}
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def scores(self, prefixes: Sequence[tuple[int, ...]], shape: str) -> Tensor:
        """Processed scores behind prefixes of one length: ``[n, V]`` float32."""
        logits = {
            SHAPES[0]: lambda: torch.cat([self._step(prefix)[1] for prefix in prefixes]),
            SHAPES[1]: lambda: self._behind_a_cache(prefixes),
            SHAPES[2]: lambda: self._in_one_pass(prefixes),
        }[shape]()
        processors: Any = self._processors
        return processors(self._texts(prefixes), logits.float())

    @torch.no_grad()
    def plain_scores(self, prefix: tuple[int, ...]) -> Tensor:
        """Processed scores behind one prefix, token by token as in plain decoding: ``[V]`` float32."""
        output = self._forward(1, input_ids=self._prompt, use_cache=True)
        for token in prefix:
            ids = torch.tensor([[token]], dtype=torch.long, device=self._prompt.device)
            output = self._forward(1, input_ids=ids, cache=cache_of(output), use_cache=True)
        processors: Any = self._processors
        return processors(self._texts([prefix]), output.logits[:, -1].float())[0]

    def law(self, prefixes: Sequence[tuple[int, ...]], shape: str) -> Tensor:
        """The laws behind prefixes of one length: ``[n, V]`` float64 on the CPU."""
        return self.scores(prefixes, shape).cpu().double().softmax(-1)

    def forget(self) -> None:
        """Frees the caches of the texts scored token by token."""
        self._steps.clear()

    def _texts(self, prefixes: Sequence[tuple[int, ...]]) -> Tensor:
        new = torch.tensor(list(prefixes), dtype=torch.long, device=self._prompt.device).view(len(prefixes), -1)
        return torch.cat([self._prompt.expand(len(prefixes), -1), new], 1)

    @torch.no_grad()
    def _step(self, prefix: tuple[int, ...]) -> tuple[Any, Tensor]:
        """Cache and logits ``[1, V]`` behind a prefix, from the prompt in one pass and then token by token."""
        known = self._steps.get(prefix)
        if known is None:
            arguments: dict[str, Any] = {"input_ids": self._prompt}
            if prefix:
                # A copy, because a cache cannot be rolled back in every model
                past = copy.deepcopy(self._step(prefix[:-1])[0])
                ids = torch.tensor([prefix[-1:]], dtype=torch.long, device=self._prompt.device)
                arguments = {"input_ids": ids, "cache": past}
            output = self._forward(1, use_cache=True, **arguments)
            known = self._steps[prefix] = (cache_of(output), output.logits[:, -1])
        return known

    @torch.no_grad()
    def _behind_a_cache(self, prefixes: Sequence[tuple[int, ...]]) -> Tensor:
        texts = _rows(self._texts(prefixes))
        first = max(texts.shape[1] - self._positions, 0)
        arguments: dict[str, Any] = {}
        if first:
            arguments["cache"] = cache_of(self._forward(1, input_ids=texts[:, :first], use_cache=True))
        output = self._forward(1, input_ids=texts[:, first:], use_cache=True, **arguments)
        return output.logits[: len(prefixes), -1]

    @torch.no_grad()
    def _in_one_pass(self, prefixes: Sequence[tuple[int, ...]]) -> Tensor:
        texts = _rows(self._texts(prefixes))
        behind = texts[:, -1:].expand(-1, self._positions - 1)  # whatever stands there is not seen from before it
        ids = torch.cat([texts, behind], 1)
        output = self._forward(self._positions, self._wide, input_ids=ids, use_cache=False)
        return output.logits[: len(prefixes), -self._positions]

    def _forward(self, keep: int, model: Any = None, **arguments: Any) -> Any:
        if self._keeps:
            arguments["logits_to_keep"] = keep
        if "cache" in arguments:
            arguments[cache_argument(type(self._model))] = arguments.pop("cache")
        model = self._model if model is None else model
        if self._read is not None:
            ids = arguments["decoder_input_ids"] = arguments.pop("input_ids")
            states = self._read.to(model.dtype).expand(len(ids), -1, -1)
            arguments["encoder_outputs"] = BaseModelOutput(last_hidden_state=states)
        return model(**arguments, return_dict=True)


_wide: weakref.WeakKeyDictionary[PreTrainedModel, PreTrainedModel] = weakref.WeakKeyDictionary()


def _widened(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float32 of a model in low precision; the model itself where it is exact, quantised or large."""
    plain = {parameter.dtype for parameter in model.parameters()} <= {torch.bfloat16, torch.float16}
    if not plain or getattr(model, "hf_quantizer", None) is not None or model.num_parameters() > LARGEST:
        return model
    if model not in _wide:
        _wide[model] = copy.deepcopy(model).float()
    return _wide[model]


def _rows(texts: Tensor) -> Tensor:
    return texts.repeat(-(-ROWS // len(texts)), 1) if len(texts) < ROWS else texts


def _prepared(
    model: PreTrainedModel, prompt: Tensor, sampling: dict[str, Any], tokens: int
) -> tuple[LogitsProcessorList, frozenset[int], Tensor, Tensor | None]:
    """The processors, the ids that end a text, and what it begins with, as ``model.generate`` prepares them; and what
    an encoder made of the prompt, ``[1, S, H]``."""
    found: dict[str, Any] = {}

    def look(
        model: PreTrainedModel, input_ids: Tensor, logits_processor: Any, generation_config: Any, **more: Any
    ) -> Tensor:
        found.update(processors=logits_processor, config=generation_config, text=input_ids, more=more)
        return input_ids

    generate: Any = model.generate
    generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, custom_generate=look, **sampling)
    ends = found["config"].eos_token_id
    read = found["more"].get("encoder_outputs")
    ends = frozenset([ends] if isinstance(ends, int) else ends or ())
    return found["processors"], ends, found["text"], None if read is None else read[0]


@dataclass
class Cells:
    """A partition of the first tokens behind one prompt, and its masses."""

    masses: dict[str, np.ndarray]
    """``[C]`` of each shape."""
    split: list[float]
    """How much of the law is told apart at each position: the mass of the texts whose next token is looked at."""
    _children: dict[tuple[int, ...], dict[int, int]] = field(repr=False)
    """Cell of each branch that is one, by prefix."""
    _others: dict[tuple[int, ...], int] = field(repr=False)
    """Cell of a prefix's other branches."""
    _possible: dict[tuple[int, ...], set[int]] = field(repr=False)
    """Tokens that have any mass in one of the shapes, by prefix."""

    @property
    def count(self) -> int:
        return len(self.centre)

    @property
    def centre(self) -> np.ndarray:
        """The mean of the measured laws, which the samples are compared with."""
        return np.mean(list(self.masses.values()), axis=0)

    @property
    def spread(self) -> float:
        """Total variation of the law between one position at a time and the other shapes, over the cells."""
        plain, *others = self.masses.values()
        return max(float(np.abs(plain - other).sum() / 2) for other in others)

    @property
    def noncentrality(self) -> float:
        """What one of the measured laws adds to the statistic for each sample, at most."""
        centre = self.centre
        used = centre > 0
        return max(float(((law - centre)[used] ** 2 / centre[used]).sum()) for law in self.masses.values())

    def merged(self, least: float) -> Cells:
        """The same with cells put together, the lightest first, until each has a mass of ``least`` at least."""
        group = np.zeros(self.count, dtype=np.int64)
        groups, mass = 0, 0.0
        order = np.argsort(self.centre, kind="stable").tolist()
        for i, cell in enumerate(order):
            group[cell] = groups
            mass += float(self.centre[cell])
            left = float(self.centre[order[i + 1 :]].sum())
            if mass >= least and left >= least:
                groups, mass = groups + 1, 0.0
        return replace(
            self,
            masses={shape: np.bincount(group, law) for shape, law in self.masses.items()},
            _children={p: {t: int(group[c]) for t, c in own.items()} for p, own in self._children.items()},
            _others={prefix: int(group[cell]) for prefix, cell in self._others.items()},
        )

    def place(self, tokens: Sequence[int]) -> tuple[int, bool]:
        """The cell of a sample, and whether the law gives all its tokens, as far as they were looked at, any mass."""
        prefix: tuple[int, ...] = ()
        while True:
            token = tokens[len(prefix)]
            possible = token in self._possible[prefix]
            inner = (*prefix, token)
            if possible and inner in self._others:
                prefix = inner
                continue
            return self._children[prefix].get(token, self._others[prefix]), possible


def cells_of(scorer: Scorer, tokens: int, least: float) -> Cells:
    """Unfolds the law of the first ``tokens`` tokens into cells of at least the mass ``least``."""
    laws: dict[tuple[int, ...], dict[str, Tensor]] = {}
    leaves: dict[tuple[int, ...], float] = {}
    queue: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    while queue:
        negative, prefix = heapq.heappop(queue)
        law = scorer.law([prefix], SHAPES[0])[0]
        laws[prefix] = {SHAPES[0]: law}
        branches = -negative * law
        for token in branches.ge(least).nonzero().flatten().tolist():
            inner, mass = (*prefix, token), float(branches[token])
            if len(inner) < tokens and token not in scorer.ends and mass >= 2 * least:
                heapq.heappush(queue, (-mass, inner))
            else:
                leaves[inner] = mass
    scorer.forget()
    for length in range(tokens):
        level = [prefix for prefix in laws if len(prefix) == length]
        for shape in SHAPES[1:] if level else ():
            for prefix, law in zip(level, scorer.law(level, shape), strict=True):
                laws[prefix][shape] = law
    return _partition(laws, leaves, tokens, least)


def _partition(
    laws: dict[tuple[int, ...], dict[str, Tensor]],
    leaves: dict[tuple[int, ...], float],
    tokens: int,
    least: float,
) -> Cells:
    """Numbers the cells and adds up their masses."""
    reach: dict[str, dict[tuple[int, ...], float]] = {shape: {(): 1.0} for shape in SHAPES}
    for shape in SHAPES:
        for prefix in sorted([*laws, *leaves], key=len):
            if prefix:
                reach[shape][prefix] = reach[shape][prefix[:-1]] * float(laws[prefix[:-1]][shape][prefix[-1]])
    kept: dict[tuple[int, ...], list[tuple[int, ...]]] = {prefix: [] for prefix in laws}
    for inner in sorted([*laws, *leaves]):
        if inner:
            kept[inner[:-1]].append(inner)

    def other(prefix: tuple[int, ...], shape: str) -> float:
        return max(0.0, reach[shape][prefix] - sum(reach[shape][inner] for inner in kept[prefix]))

    # A list of columns, one mass a shape; what is too light to be a cell goes into the last one
    columns: list[list[float]] = []
    children: dict[tuple[int, ...], dict[int, int]] = {prefix: {} for prefix in laws}
    others: dict[tuple[int, ...], int] = {}
    light: list[tuple[int, ...]] = []
    for prefix in laws:
        for inner in kept[prefix]:
            if inner in leaves:
                children[prefix][inner[-1]] = len(columns)
                columns.append([reach[shape][inner] for shape in SHAPES])
        if other(prefix, SHAPES[0]) >= least:
            others[prefix] = len(columns)
            columns.append([other(prefix, shape) for shape in SHAPES])
        else:
            light.append(prefix)
    rest = [sum(other(prefix, shape) for prefix in light) for shape in SHAPES]
    if rest[0] >= least or not columns:
        place = len(columns)
        columns.append(rest)
    else:
        place = min(range(len(columns)), key=lambda cell: columns[cell][0])
        columns[place] = [own + more for own, more in zip(columns[place], rest, strict=True)]
    others.update(dict.fromkeys(light, place))
    table = np.array(columns, dtype=np.float64)
    return Cells(
        masses={shape: table[:, i] / table[:, i].sum() for i, shape in enumerate(SHAPES)},
        split=[sum(reach[SHAPES[0]][prefix] for prefix in laws if len(prefix) == i) for i in range(tokens)],
        _children=children,
        _others=others,
        _possible={
            prefix: set(torch.stack(list(own.values())).amax(0).gt(0).nonzero().flatten().tolist())
            for prefix, own in laws.items()
        },
    )
