"""What the enumeration tests run (method, rule, sampling, vocabularies), and how far a law is from the target's."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from enumeration import Law, Tokens
from laws import warpers
from tables import PAIRS, TableModel, exact_laws, tables

from specdec_fast import fast_generate, warmup
from specdec_fast.costs import Costs
from specdec_fast.engine import Engine
from specdec_fast.options import METHODS, VERIFICATIONS
from specdec_fast.randomness import UniformSource

__all__ = ["CERTAIN", "COMBINATIONS", "SAMPLINGS", "SLOW", "TEXT", "Setting", "distance", "prompts"]

SAMPLINGS = {"plain": {}, "top_p": {"temperature": 1.3, "top_p": 0.9}, "top_k": {"top_k": 2}}
COMBINATIONS = [(method, rule) for method in METHODS if method != "auto" for rule in VERIFICATIONS[1:]]
# Rule gumbel knows as little of a drafter as rule match does
COMBINATIONS = [(m, r) for m, r in COMBINATIONS if r != "gumbel" or m in ("autoregressive", "model", "slem")]
TEXT = {method for method, _ in COMBINATIONS} - {"autoregressive", "model", "prompt_lookup"}
"""Methods that need two tokenizers."""
CERTAIN = {"autoregressive", "slem", "prompt_lookup"}
"""Methods that draft nothing, or text without a law."""
SLOW = "slrs"
"""A method that walks and races token by token, row by row."""
CHEAP = Costs((1.0, 1.05, 1.1, 1.15), step=0.2)
"""Costs at which an adaptive lookahead drafts on behind a token the drafter is sure of, and ends behind another."""
LETTERS = ("a", "b", "c", "d", "e", "f")


@cache
def _models(target: Tokens, drafter: Tokens, seed: int, kinds: tuple[str, str]) -> tuple[TableModel, TableModel]:
    p, q = tables(target, drafter, seed, *kinds)
    return TableModel(p), TableModel(q)


@dataclass(frozen=True)
class Setting:
    """Arguments of ``fast_generate`` on table models.

    Args:
        method, rule: as ``fast_generate`` names them.
        sampling: a key of `SAMPLINGS`.
        vocabulary: a key of `tables.PAIRS`, or how many ids target and drafter share.
        gamma: lookahead.
        kinds: of target's and drafter's tables, see `tables.tables`.
        seed: of the tables.
        more: other arguments of ``fast_generate``.
    """

    method: str
    rule: str
    sampling: str
    vocabulary: str | int
    gamma: int
    kinds: tuple[str, str] = ("", "")
    seed: int = 0
    more: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def pieces(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if isinstance(self.vocabulary, int):
            return LETTERS[: self.vocabulary], LETTERS[: self.vocabulary]
        pair = PAIRS[self.vocabulary]
        return pair.target, pair.drafter

    @property
    def target(self) -> TableModel:
        return _models(*self.pieces, self.seed, self.kinds)[0]

    @property
    def arguments(self) -> dict[str, Any]:
        chosen: dict[str, Any] = {"method": self.method, "verification": self.rule}
        if self.method not in ("autoregressive", "prompt_lookup"):
            chosen |= {"assistant_model": _models(*self.pieces, self.seed, self.kinds)[1]}
        if self.method in TEXT:
            chosen |= PAIRS[str(self.vocabulary)].tokenizers
        if self.method == "prompt_lookup":
            chosen |= {"prompt_lookup_num_tokens": self.gamma, "max_matching_ngram_size": 2}
        elif self.method != "autoregressive":
            chosen |= {"num_assistant_tokens": self.gamma}
        return {"top_k": 0, **SAMPLINGS[self.sampling], **chosen, **self.more}

    def generate(self, prompts: list[Tokens], seeds: list[int], source: UniformSource, new: int) -> torch.Tensor:
        """``new`` tokens behind prompts of any length: ``[B, new]``."""
        width = max(map(len, prompts))
        with mock.patch.object(warmup, "constant_costs", lambda *sizes: CHEAP):
            return self._generate(width, prompts, seeds, source, new)

    def _generate(
        self, width: int, prompts: list[Tokens], seeds: list[int], source: UniformSource, new: int
    ) -> torch.Tensor:
        output = fast_generate(
            self.target,
            torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]),
            attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
            do_sample=True,
            max_new_tokens=new,
            pad_token_id=0,
            seed=seeds,
            source=source,
            **self.arguments,
        )
        return output[:, width:]

    def end_to_end(self, prompts: list[Tokens], seeds: list[int], source: UniformSource) -> list[Tokens]:
        """γ + 3 tokens."""
        return [tuple(row) for row in self.generate(prompts, seeds, source, self.gamma + 3).tolist()]

    def one_round(self, prompts: list[Tokens], seeds: list[int], source: UniformSource) -> list[Tokens]:
        """The blocks that the first round commits, with room for γ + 1 tokens."""
        with _stopped_after_a_round() as texts:
            self.generate(prompts, seeds, source, self.gamma + 1)
        return [tuple(text[len(prompt) :]) for text, prompt in zip(texts, prompts, strict=True)]


@contextlib.contextmanager
def _stopped_after_a_round() -> Iterator[list[list[int]]]:
    """``fast_generate`` as it is, but that its loop ends after one round; what the rows hold then."""
    texts: list[list[int]] = []
    run = Engine.run

    @torch.no_grad()
    def one_round(engine: Engine) -> torch.Tensor:
        engine._round()
        texts.extend(engine.rows.tokens)
        return engine.rows.ids[:, : max(engine.rows.length)]

    Engine.run = one_round
    try:
        yield texts
    finally:
        Engine.run = run


def prompts(setting: Setting, count: int, *, longest: int = 7, seed: int = 0) -> list[Tokens]:
    """Random prompts of different lengths, all different."""
    generator = random.Random(seed)
    width = len(setting.pieces[0])
    made: dict[Tokens, None] = {}
    while len(made) < count:
        made[tuple(generator.randrange(width) for _ in range(generator.randint(2, longest)))] = None
    return list(made)


def distance(setting: Setting, law: Law, case: Sequence[Tokens], steps: int) -> float:
    """Total variation of a law from the target's own, each row continued by the target to ``steps`` tokens.

    The mass of runs that were left out counts as if all of it were wrong.
    """
    assert abs(sum(law.mass.values()) + law.lost - 1) < 1e-9, "the runs do not add up to a law"
    chain = warpers(**SAMPLINGS[setting.sampling])
    next_laws = [exact_laws(setting.target.table, prompt, steps, chain) for prompt in case]
    found: dict[tuple[Tokens, ...], float] = {}
    for blocks, mass in law.mass.items():
        for whole, share in _continued(blocks, next_laws, steps):
            found[whole] = found.get(whole, 0.0) + mass * share
    wanted = dict(_continued(((),) * len(case), next_laws, steps))
    apart = sum(abs(found.get(whole, 0.0) - wanted.get(whole, 0.0)) for whole in found.keys() | wanted.keys())
    return 0.5 * apart + law.lost


def _continued(
    blocks: tuple[Tokens, ...], next_laws: list[dict[Tokens, list[float]]], steps: int
) -> Iterator[tuple[tuple[Tokens, ...], float]]:
    """Every way the rows can go on from their blocks to ``steps`` tokens each, and its probability."""
    if not blocks:
        yield (), 1.0
        return
    partial = {blocks[0]: 1.0}
    for length in range(len(blocks[0]), steps):
        partial = {
            (*text, token): mass * share
            for text, mass in partial.items()
            for token, share in enumerate(next_laws[0][text])
            if share > 0 and len(text) == length
        }
    for rest, mass in _continued(blocks[1:], next_laws[1:], steps):
        for text, share in partial.items():
            yield (text, *rest), mass * share
