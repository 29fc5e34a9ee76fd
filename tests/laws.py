"""What the law tests share: tiny models and tokenizers, exact laws, chi-square, and sources of numbers to order.

The exact laws are computed here from the target's own logits in float64 and with nothing of the package, so that they
do not share its mistakes.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import scipy.stats
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec_fast import fused, reference
from specdec_fast.drafters import model as drafter_models
from specdec_fast.randomness import Philox, Purpose

__all__ = [
    "DRAFTER_PIECES",
    "EOS",
    "SAMPLING",
    "TARGET_PIECES",
    "Problem",
    "Reading",
    "Recorder",
    "block_ways",
    "cells",
    "chi_square",
    "exact_drafters",
    "inside",
    "joint_law",
    "lazy_block_ways",
    "lazy_token_ways",
    "match_ways",
    "model",
    "pair_counts",
    "pairs_p_value",
    "plain_rules",
    "token_ways",
    "tokenizer",
    "total_variation",
    "warpers",
]

EOS = "</s>"
# Shared: </s>, a, b, c, d, ab. Only the target has cd and ca, only the drafter bc, dd and cab; hardly an id agrees.
TARGET_PIECES = (EOS, "a", "b", "c", "d", "ab", "cd", "ca")
DRAFTER_PIECES = ("d", "bc", "a", EOS, "ab", "c", "b", "dd", "cab")
_SPLIT = {"ab": "a b", "cd": "c d", "ca": "c a", "bc": "b c", "dd": "d d", "cab": "c ab"}

SAMPLING = {
    "plain": {},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
    "top_k": {"top_k": 3},
}


def tokenizer(pieces: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose id ``i`` is ``pieces[i]``."""
    state = {
        "type": "BPE",
        "vocab": {piece: i for i, piece in enumerate(pieces)},
        "merges": [_SPLIT[piece].split() for piece in pieces if piece in _SPLIT],
    }
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    whole = json.loads(backend.to_str())
    whole["model"].update(state)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole)), eos_token=EOS)


@cache
def model(width: int, seed: int, *, sharpness: float = 1.5) -> LlamaForCausalLM:
    """A tiny Llama with random weights and no special ids of its own.

    Args:
        width: logits of a position.
        seed: of its weights.
        sharpness: standard deviation of its logits, about.
    """
    config = LlamaConfig(
        vocab_size=width,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        initializer_range=0.5,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = LlamaForCausalLM(config).eval()
        made.lm_head.weight.data.normal_(0.0, sharpness / 4)
    return made


def warpers(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> LogitsProcessorList:
    """Transformers' own warpers, in the order ``generate`` applies them."""
    chain = LogitsProcessorList()
    if temperature != 1.0:
        chain.append(TemperatureLogitsWarper(temperature))
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        chain.append(TopPLogitsWarper(top_p))
    return chain


@torch.no_grad()
def joint_law(
    target: PreTrainedModel, prompt: Tensor, steps: int, chain: LogitsProcessorList, eos: int | None = None
) -> Tensor:
    """The law of the first ``steps`` tokens behind ``prompt [P]``: ``[V] * steps`` float64 that sum to 1.

    Behind ``eos`` comes ``eos`` for ever: the tests pad with it.
    """
    width = target.config.vocab_size
    law = torch.ones((1,), dtype=torch.float64)
    for step in range(steps):
        prefixes = torch.tensor(list(itertools.product(range(width), repeat=step)), dtype=torch.long)
        prefixes = prefixes.reshape(width**step, step)
        text = torch.cat([prompt.expand(width**step, -1), prefixes], 1)
        logits = torch.cat([target(input_ids=part, use_cache=False).logits[:, -1] for part in text.split(2048)])
        scores = chain(text, logits.float())
        next_law = scores.double().softmax(-1)
        if eos is not None and step:
            ended = (prefixes == eos).any(1)
            next_law[ended] = torch.nn.functional.one_hot(torch.tensor(eos), width).double()
        law = (law.reshape(-1, 1) * next_law).reshape(-1)
    return law.reshape((width,) * steps)


def pair_counts(sequences: Tensor, first: int, width: int) -> Tensor:
    """How often each pair stands in columns ``first`` and ``first + 1``: ``[V, V]``."""
    code = sequences[:, first] * width + sequences[:, first + 1]
    return torch.bincount(code, minlength=width * width).reshape(width, width)


def chi_square(counts: Tensor, law: Tensor) -> float:
    """The p-value of Pearson's test; 0 where something happened that cannot. Thin bins are merged into one."""
    observed, expected = counts.reshape(-1).double().numpy(), law.reshape(-1).double().numpy() * int(counts.sum())
    # Scores are float32, batched in various shapes: a filter's edge is the same, a mass of 0 is exactly 0
    if observed[expected == 0].any():
        return 0.0
    thick = expected >= 5
    observed = np.append(observed[thick], observed[~thick].sum())
    expected = np.append(expected[thick], expected[~thick].sum())
    if expected[-1] < 5:  # too thin even together: with the thinnest of the others
        place = int(expected[:-1].argmin())
        observed[place] += observed[-1]
        expected[place] += expected[-1]
        observed, expected = observed[:-1], expected[:-1]
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return float(scipy.stats.chi2.sf(statistic, len(expected) - 1))


def pairs_p_value(
    target: PreTrainedModel, prompt: Tensor, text: Tensor, width: int, chain: LogitsProcessorList | None = None
) -> float:
    """The least p-value of each two neighbours among four tokens behind a prompt, ``text [N, P + 4]``, by their law."""
    law = joint_law(target, prompt[0], 4, LogitsProcessorList() if chain is None else chain)
    parts = law.sum((2, 3)), law.sum((0, 3)), law.sum((0, 1))
    counts = (pair_counts(text, prompt.shape[1] + first, width) for first in range(3))
    return min(chi_square(counted, part) for counted, part in zip(counts, parts, strict=True))


def total_variation(one: dict, other: dict) -> float:
    """Half the sum of absolute differences of two laws on any keys."""
    return 0.5 * sum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in one.keys() | other.keys())


class Recorder:
    """Philox that takes down every key it is asked for.

    Args:
        forget_round: plants the fault of keys by absolute position alone, which give a later round the numbers that
            an earlier one has looked at.
    """

    def __init__(self, *, forget_round: bool = False):
        self.keys: list[tuple[int, int, int, Purpose, int]] = []
        self._forget_round = forget_round
        self._philox = Philox()

    def uniform(self, seed: Tensor, position: Tensor, offset: Tensor, purpose: Purpose, trial: int = 0) -> Tensor:
        if self._forget_round:
            position, offset = position + offset, torch.zeros_like(offset)
        keys = [key.reshape(-1).tolist() for key in torch.broadcast_tensors(seed, position, offset)]
        self.keys.extend((*key, purpose, trial) for key in zip(*keys, strict=True))
        return self._philox.uniform(seed, position, offset, purpose, trial)

    def repeated(self, *, but: Purpose | None = None) -> set[tuple[int, int, int, Purpose, int]]:
        """Keys drawn more than once, those of one purpose left out."""
        return {key for key, times in Counter(self.keys).items() if times > 1 and key[3] is not but}


def plain_rules(patch) -> None:
    """Every decision in Python, where a fault can be planted: neither rules nor draws as one operation."""
    patch.setattr(fused.Fused, "verify", lambda self, *given: self.rule.verify(*given))
    patch.setattr(fused.Fused, "judging", lambda *_: None)

    def drawn(scores, draws, step):
        return reference.draw(reference.masses(scores), draws.draft(step)), None

    patch.setattr(drafter_models, "drafted_token", drawn)
    patch.setattr(drafter_models, "draws_natively", lambda *_: False)


def exact_drafters(patch) -> None:
    """Drafters on their own weights: a test that computes their laws needs the very numbers."""
    patch.setattr(drafter_models, "lean_model", lambda model: None)


class Reading:
    """Philox with one stream in place of another: noise that two decisions share.

    Args:
        swap: maps a purpose to the one whose numbers it is given instead.
    """

    def __init__(self, swap: Callable[[Purpose], Purpose]):
        self._swap = swap
        self._philox = Philox()

    def uniform(self, seed: Tensor, position: Tensor, offset: Tensor, purpose: Purpose, trial: int = 0) -> Tensor:
        return self._philox.uniform(seed, position, offset, self._swap(purpose), trial)


class Problem:
    """Laws of target and drafter on every prefix, as scores.

    Args:
        p: list over positions 0..γ of scores ``[V] * i + [V]``.
        q: list over positions 0..γ-1 of scores ``[V] * i + [K]``; K columns stand for target tokens ``index``.
        stop: ``stop(prefix, mass)`` whether a draft ends behind the token drawn, given its mass.
    """

    def __init__(self, p, q, index=None, stop=lambda prefix, mass: False):
        self.p, self.q, self.stop = p, q, stop
        self.gamma, self.width = len(q), p[0].shape[-1]
        self.index = index
        self.p_mass = [scores.double().softmax(-1) for scores in p]
        self.q_mass = [scores.double().softmax(-1) for scores in q]

    def drafts(self):
        """Every draft of γ columns: columns, tokens, weight, count."""
        columns = self.q[0].shape[-1] if self.q else 0
        for chosen in itertools.product(range(columns), repeat=self.gamma):
            tokens = chosen if self.index is None else tuple(int(self.index[k]) for k in chosen)
            weight, count = 1.0, self.gamma
            for i, k in enumerate(chosen):
                # What a padded drafter head draws beyond the target's vocabulary has no law behind it: rejected anyway
                known = tuple(min(t, self.width - 1) for t in tokens[:i])
                mass = float(self.q_mass[i][known][k])
                weight *= mass
                if self.stop(tokens[: i + 1], mass):
                    count = min(count, i + 1)
            if weight > 0:
                yield chosen, tokens, weight, count

    def clip(self, tokens):
        return tuple(min(t, self.width - 1) for t in tokens)

    def rest(self, tokens, position, weight=1.0):
        """max(0, weight * p - q) behind ``tokens[:position]``."""
        p = self.p_mass[position][self.clip(tokens[:position])].tolist()
        return [max(0.0, weight * x - y) for x, y in zip(p, self.mass(tokens, position), strict=True)]

    def mass(self, tokens, position):
        """ψ of every target token behind ``tokens[:position]``."""
        psi = [0.0] * self.width
        for k, mass in enumerate(self.q_mass[position][self.clip(tokens[:position])].tolist()):
            token = k if self.index is None else int(self.index[k])
            if token < self.width:
                psi[token] = mass
        return psi

    def ratio(self, tokens, position):
        """p/q of the token drafted at a position."""
        column = tokens[position] if self.index is None else self.index.tolist().index(tokens[position])
        prefix = self.clip(tokens[:position])
        p = float(self.p_mass[position][prefix][tokens[position]]) if tokens[position] < self.width else 0.0
        return p / float(self.q_mass[position][prefix][column])

    def joint(self):
        law = {}
        for tokens in itertools.product(range(self.width), repeat=self.gamma + 1):
            weight = 1.0
            for i, token in enumerate(tokens):
                weight *= float(self.p_mass[i][tokens[:i]][token])
            law[tokens] = weight
        return law

    def completed(self, blocks):
        """Blocks with weights, continued by the target to γ+1 tokens."""
        law = {}
        for block, weight in blocks.items():
            partial = {block: weight}
            while len(next(iter(partial))) <= self.gamma:
                partial = {
                    (*tokens, t): w * mass
                    for tokens, w in partial.items()
                    for t, mass in enumerate(self.p_mass[len(tokens)][tokens].tolist())
                    if mass > 0
                }
            for tokens, w in partial.items():
                law[tokens] = law.get(tokens, 0.0) + w
        return law


def cells(weights):
    """Where each entry lies on (0, 1): triples entry, low, high."""
    total, edge = sum(weights), 0.0
    for entry, weight in enumerate(weights):
        if weight > 1e-13 * total:
            yield entry, edge, edge + weight / total
        edge += weight / total


def token_ways(problem, tokens, count):
    """The ways a draft can fare under rule *token*: numbers that lead there and the probability."""
    spans, chance = [], 1.0
    for i in range(count):
        ratio = min(1.0, problem.ratio(tokens, i))
        if ratio < 1 - 1e-13:
            coin = (Purpose.ACCEPT, i, (ratio, 1.0))
            for _, low, high in cells(problem.rest(tokens, i)):
                yield [*spans, coin, (Purpose.RESIDUAL, i, (low, high))], chance * (1 - ratio) * (high - low)
        if ratio == 0:
            return
        spans.append((Purpose.ACCEPT, i, (0.0, ratio)))
        chance *= ratio
    for _, low, high in cells(problem.p_mass[count][problem.clip(tokens[:count])].tolist()):
        yield [*spans, (Purpose.RESIDUAL, count, (low, high))], chance * (high - low)


def block_weights(problem, tokens, count):
    weights = [1.0]
    for i in range(count):
        weights.append(min(1.0, weights[-1] * problem.ratio(tokens, i)))
    return weights


def block_ways(problem, tokens, count):
    """The same for rule *block*: the last position whose coin wins, and what comes behind it."""
    weights = block_weights(problem, tokens, count)
    spans, chance = [], 1.0
    for i in range(count, -1, -1):
        if i == count:
            rest, wins = problem.p_mass[i][problem.clip(tokens[:i])].tolist(), weights[i]
        else:
            rest = problem.rest(tokens, i, weights[i])
            whole = sum(rest) + 1 - weights[i]
            wins = sum(rest) / whole if i and whole else 1.0
        if wins > 1e-13:
            coin = [(Purpose.ACCEPT, i - 1, (0.0, wins))] if i else []
            for _, low, high in cells(rest):
                yield [*spans, *coin, (Purpose.RESIDUAL, i, (low, high))], chance * wins * (high - low)
        if wins > 1 - 1e-13:
            return
        spans.append((Purpose.ACCEPT, i - 1, (wins, 1.0)))
        chance *= 1 - wins


def race_ways(weight, p, psi, seen, offset, trial=0):
    """The ways a race of :mod:`specdec_fast.thinning` can go: numbers, probability, winner (None: lost)."""
    rest = [max(0.0, weight * x - y) for x, y in zip(p, psi, strict=True)]
    bound = [rest[t] if t in seen else weight * x for t, x in enumerate(p)]
    for t, low, high in cells([*bound, 1 - weight]):
        candidate, chance = (Purpose.CANDIDATE, offset, (low, high), trial), high - low
        if t == len(p) or t in seen:
            yield [candidate], chance, None if t == len(p) else t
            continue
        kept = rest[t] / bound[t]
        if kept > 1e-13:
            yield [candidate, (Purpose.THINNING, offset, (0.0, kept), trial)], chance * kept, t
        if kept < 1 - 1e-13:
            for spans, more, winner in race_ways(weight, p, psi, {*seen, t}, offset, trial + 1):
                coin = (Purpose.THINNING, offset, (kept, 1.0), trial)
                yield [candidate, coin, *spans], chance * (1 - kept) * more, winner


def _races(problem, tokens, weights, position):
    """From a position downwards, until a race is won."""
    p = problem.p_mass[position][problem.clip(tokens[:position])].tolist()
    for spans, chance, winner in race_ways(
        weights[position], p, problem.mass(tokens, position), {tokens[position]}, position
    ):
        if winner is not None:
            yield spans, chance
            continue
        for further, more in _races(problem, tokens, weights, position - 1):
            yield [*spans, *further], chance * more


def lazy_token_ways(problem, tokens, count):
    """Rule *token* where the law is asked token by token."""
    rejections = {}
    for spans, chance in token_ways(problem, tokens, count):
        if spans[-1][1] == count:
            yield spans, chance
        else:  # a rejection: what its residual draw had is shared out anew among the ways of a race
            coins, whole = rejections.get(spans[-1][1], (spans[:-1], 0.0))
            rejections[spans[-1][1]] = coins, whole + chance
    for position, (coins, whole) in rejections.items():
        for spans, chance in _races(problem, tokens, [1.0] * (position + 1), position):
            yield [*coins, *spans], whole * chance


def lazy_block_ways(problem, tokens, count):
    """Rule *block* where the law is asked token by token."""
    weights = block_weights(problem, tokens, count)
    last = [(Purpose.ACCEPT, count - 1, (0.0, weights[-1]))] if count else []
    if weights[-1] > 1e-13:
        for _, low, high in cells(problem.p_mass[count][problem.clip(tokens[:count])].tolist()):
            yield [*last, (Purpose.RESIDUAL, count, (low, high))], weights[-1] * (high - low)
    if weights[-1] < 1 - 1e-13:
        coin = (Purpose.ACCEPT, count - 1, (weights[-1], 1.0))
        for spans, chance in _races(problem, tokens, weights, count - 1):
            yield [coin, *spans], (1 - weights[-1]) * chance


def match_ways(problem, tokens, count):
    """The same for rule *match*: the target's own draws."""
    spans, chance = [], 1.0
    for i in range(count + 1):
        kept = None
        for token, low, high in cells(problem.p_mass[i][problem.clip(tokens[:i])].tolist()):
            span = (Purpose.TARGET, i, (low, high))
            if i < count and token == tokens[i]:
                kept = span
            else:
                yield [*spans, span], chance * (high - low)
        if kept is None:
            return
        spans.append(kept)
        chance *= kept[2][1] - kept[2][0]


def inside(span, where):
    """A number in a cell: near its low end, near its high end, or in between."""
    low, high = span
    return low + (high - low) * (1e-9, 0.43, 1 - 1e-9)[where]
