"""What the native passes take and give (``csrc/llama.cpp``, ``csrc/score.cpp``, ``csrc/draft.cpp``).

Between two passes of a target everything that the machine does runs cold, the weights having gone through its caches: a
tensor made or read there costs ten to sixty microseconds, a list hardly anything. So tokens, counts and keys go to and
fro as lists, and what the passes of a call have in common is known to the native code by a number.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec_fast.cache import RaggedCache

__all__ = ["Choosing", "Drafted", "Judged", "Judging", "KeptModel", "Session", "Told"]


class Choosing(NamedTuple):
    """How a drafter's tokens are drawn.

    Args:
        temperature: 0: the argmax.
        top_k, top_p, min_p: 0, 1 and 0: off.
        confidence: a draft ends behind a token less probable than this; 0: never.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    confidence: float = 0.0


class Drafted(NamedTuple):
    """What a drafter wrote in one call, ``R`` rows of up to ``G`` tokens; behind a row's count nothing is meant.

    Args:
        drawn: ``[R][G]`` entries; -1 where the scores were no law.
        scores: ``[R, G, K]`` float32 they were drawn from, after temperature and filters; None of an argmax. Behind the
            longest draft they are not written.
        logsumexp: ``[R, G]`` float64 of those scores; None of an argmax.
        counts: tokens of each row.
        levels: ``[R][G]`` of the confidence in each token, where drafts end by that; None else.
    """

    drawn: list[list[int]]
    scores: Tensor | None
    logsumexp: Tensor | None
    counts: list[int]
    levels: list[list[int]] | None


class Told(NamedTuple):
    """A draft as an operation that judges it takes it, ``R`` rows.

    Args:
        tokens: ``[R][G]`` target ids, at least as many as a row's count.
        drawn: ``[R][G]`` the entry of the scores that each was drawn as; None: they are the tokens.
        scores: ``[R, >= G, K]`` float32 they were drawn from; None: they were certain.
        logsumexp: ``[R, >= G]`` float64 of those.
        narrow: ``[K]`` int32, ascending: the target id of each entry; None: it is one.
    """

    tokens: list[list[int]]
    drawn: list[list[int]] | None = None
    scores: Tensor | None = None
    logsumexp: Tensor | None = None
    narrow: Tensor | None = None


class Judged(NamedTuple):
    """What a target said of the drafts it has read.

    Args:
        accepted: how many tokens of each row's draft stay.
        token: what comes next in each row, -1 where the target's scores are no law.
        seconds: that judging took beside the pass.
    """

    accepted: list[int]
    token: list[int]
    seconds: float


class Judging(NamedTuple):
    """How a target judges drafts: its sampling, and a rule by number (:data:`specdec_fast.ops.RULES`)."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    rule: int


class KeptModel:
    """A model that the native code keeps, for as long as this object lives."""

    def __init__(self, *parts: Any):
        self.number: int = torch.ops.specdec_fast.llama_model(*parts)
        weakref.finalize(self, torch.ops.specdec_fast.llama_forget, self.number)


class Session:
    """A model beside the caches of a call, that the native code keeps for as long as this object lives.

    Args:
        owner: whose passes they are.
        model: its weights.
        cache: with some room.
        rotations: cosine and sine of every position, ``[P, 2, dim]`` float32.
        capability: the instruction set, by number.
    """

    def __init__(self, owner: Any, model: KeptModel, cache: RaggedCache, rotations: Tensor, capability: int):
        layers = cache.ragged
        keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
        self.owner, self.capability, self.grown = owner, capability, cache.window.grown
        self.end = min(layers[0].room, rotations.shape[0])
        self.number: int = torch.ops.specdec_fast.llama_open(model.number, rotations, keys, values, capability)
        weakref.finalize(self, torch.ops.specdec_fast.llama_close, self.number)


_library = torch.library.Library("specdec_fast", "FRAGMENT")
_library.define(
    "llama_model(Tensor embedding, Tensor[] weights, Tensor[] scales, Tensor[] offsets, Tensor norms, "
    "Tensor head_norms, int[] windows, int heads, int kv_heads, int dim, float scaling, float epsilon) -> int"
)
_library.define("llama_forget(int model) -> ()")
_library.define("llama_capability() -> int")
_library.define(
    "llama_open(int model, Tensor rotations, Tensor(a!)[] keys, Tensor(b!)[] values, int capability) -> int"
)
_library.define("llama_close(int session) -> ()")
_library.define(
    "llama_read(int session, int[] tokens, int[] lengths, int[] rows, int[] columns, int[] hidden, int[] tails) "
    "-> Tensor"
)
_library.define(
    "llama_judge(int session, int[] first, int[] drafts, int[] counts, int[] rows, int[] columns, int[] hidden, "
    "int[] drawn, Tensor? scores, Tensor? logsumexp, Tensor? index, int[] seed, int[] start, float temperature, "
    "int top_k, float top_p, float min_p, int rule) -> int[]"
)
_library.define(
    "llama_draft(int session, int[] tokens, int[] lengths, int[] rows, int[] columns, int[] hidden, int[] steps, "
    "Tensor? choices, int[] seed, int[] start, float temperature, int top_k, float top_p, float min_p, float least, "
    "int levels, float[] stops) -> (Tensor[] laws, int[] report)"
)
_library.define(
    "llama_forward(int session, Tensor tokens, Tensor columns, int[] rows, int[] hidden, int[] lanes) -> Tensor"
)
