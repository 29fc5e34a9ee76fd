"""What the native passes take and give (``csrc/llama.cpp``, ``csrc/score.cpp``, ``csrc/draft.cpp``).

Between two passes of a target everything that the machine does runs cold, the weights having gone through its caches: a
tensor made or read there costs ten to sixty microseconds, a list hardly anything. So tokens, counts and keys go to and
fro as lists, and what the passes of a call have in common is known to the native code by a number.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec_fast.cache import RaggedCache
from specdec_fast.memory import Memory

__all__ = [
    "MOST",
    "Choices",
    "Choosing",
    "Drafted",
    "Index",
    "Judged",
    "Judging",
    "KeptModel",
    "Laws",
    "Room",
    "Session",
    "Told",
    "joined",
    "level",
    "numbers",
]

ENTRIES = ("judge", "draft", "branch", "climb")
MOST = 4096  # numbers of a call that go in and come out without the dispatcher


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


class Laws:
    """The law that each token of a draft was drawn from.

    Args:
        scores: ``[R, >= G, K]`` float32, after temperature and filters. Behind the longest draft they mean nothing.
        logsumexp: ``[R, >= G]`` float64 of those, where it is known.
    """

    room: Room | None = None
    """Where the native code has written them, until tensors are asked for."""

    def __init__(self, scores: Tensor | None, logsumexp: Tensor | None):
        self._scores, self._logsumexp = scores, logsumexp
        self.shape: tuple[int, int, int] = (0, 0, 0)

    @property
    def scores(self) -> Tensor:
        if self._scores is None:
            assert self.room is not None
            self._scores = self.room.scores[: math.prod(self.shape)].view(self.shape).clone()
        return self._scores

    @property
    def logsumexp(self) -> Tensor | None:
        if self._logsumexp is None and self.room is not None:
            self._logsumexp = self.room.sums[: math.prod(self.shape[:2])].view(self.shape[:2]).clone()
        return self._logsumexp


class Room:
    """Memory for the laws of one draft after another.

    Args:
        tokens, width: draft tokens, and scores of each.
    """

    def __init__(self, tokens: int, width: int):
        self.tokens, self.width = tokens, width
        self.scores, self.sums = torch.empty(tokens * width), torch.empty(tokens, dtype=torch.float64)
        self.at = self.scores.data_ptr(), self.sums.data_ptr()
        self.user: weakref.ref[Laws] | None = None

    def free(self, tokens: int, width: int) -> bool:
        """Whether it holds so much and nobody looks at the laws in it any more."""
        used = self.user is not None and self.user() is not None
        return not used and width == self.width and tokens <= self.tokens

    def laws(self, shape: tuple[int, int, int]) -> Laws:
        """The laws that are about to be written, ``[R, G, K]``."""
        laws = Laws(None, None)
        laws.room, laws.shape = self, shape
        self.user = weakref.ref(laws)
        return laws


class Drafted(NamedTuple):
    """What a drafter wrote in one call, ``R`` rows of up to ``G`` tokens; behind a row's count nothing is meant.

    Args:
        drawn: ``[R][G]`` entries; -1 where the scores were no law.
        laws: they were drawn from; None of an argmax.
        counts: tokens of each row.
        levels: ``[R][G]`` of the confidence in each token, where drafts end by that; None else.
    """

    drawn: list[list[int]]
    laws: Laws | None
    counts: list[int]
    levels: list[list[int]] | None


class Choices:
    """A drafter's id of each logit, ``ids [K]`` int64."""

    def __init__(self, ids: Tensor):
        self.ids = ids.contiguous()
        self.at = self.ids.data_ptr()
        self.list = numbers(ids)


class Index:
    """Target ids of a drafter's entries.

    Args:
        ids: ``[K]`` int64, ascending.
    """

    def __init__(self, ids: Tensor):
        self.ids, self.narrow = ids, ids.int().contiguous()
        self.at = self.narrow.data_ptr()
        self.list = numbers(ids)


def joined(texts: list[list[int]]) -> list[int]:
    """The texts behind one another."""
    return texts[0] if len(texts) == 1 else list(itertools.chain.from_iterable(texts))


def level(lists: list[list[int]], length: int) -> list[int]:
    """The first entries of each list behind one another, as many of each."""
    if len(lists) == 1:
        return lists[0][:length]
    return [entry for line in lists for entry in (line + [0] * length)[:length]]


def numbers(tensor: Tensor) -> Sequence[int]:
    """Integers ``[K]`` that are looked up one by one, without a tensor a time."""
    view: Any = memoryview(tensor.cpu().contiguous().numpy())  # type: ignore[arg-type]  # which is a buffer
    return view


class Told(NamedTuple):
    """A draft as an operation that judges it takes it, ``R`` rows.

    Args:
        tokens: ``[R][G]`` target ids, at least as many as a row's count.
        drawn: ``[R][G]`` the entry of the scores that each was drawn as; None: they are the tokens.
        laws: they were drawn from; None: they were certain.
        table: the target id of each entry; None: it is one.
        memory: to be told what the target says of them.
    """

    tokens: list[list[int]]
    drawn: list[list[int]] | None = None
    laws: Laws | None = None
    table: Index | None = None
    memory: Memory | None = None


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
        self.number: int = torch.ops.specdec_fast.llama_hold(*parts)
        weakref.finalize(self, torch.ops.specdec_fast.llama_forget, self.number)


class Session:
    """A model beside the caches of a call, that the native code keeps for as long as this object lives.

    Args:
        owner: whose passes they are.
        model: its weights.
        cache: with some room.
        rotations: cosine and sine of every position, ``[T, P, 2, dim]`` float32, of every table that layers turn by.
        capability: the instruction set, by number.
    """

    def __init__(self, owner: Any, model: KeptModel, cache: RaggedCache, rotations: Tensor, capability: int):
        layers = cache.ragged
        keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
        self.owner, self.capability, self.grown = owner, capability, cache.window.grown
        self.end = min(layers[0].room, rotations.shape[1])
        self.number: int = torch.ops.specdec_fast.llama_open(model.number, rotations, keys, values, capability)
        self._numbers, self._reals = (ctypes.c_int64 * MOST)(), (ctypes.c_double * MOST)()
        self._at = ctypes.c_void_p(ctypes.addressof(self._numbers)), ctypes.c_void_p(ctypes.addressof(self._reals))
        self._others = _entries()
        self._judge, self._draft = self._others["judge"], self._others["draft"]
        self._room: Room | None = None
        weakref.finalize(self, torch.ops.specdec_fast.llama_close, self.number)

    def judge(self, numbers: list[int], reals: list[float], size: int) -> list[int] | None:
        """Calls the entry beside ``llama_judge``, whose comment says what the numbers are.

        Args:
            size: numbers of the report.

        Returns:
            the report; None where the operation must be called, which takes more, and says what is wrong.
        """
        return self._call(self._judge, numbers, reals, size)

    def draft(self, numbers: list[int], reals: list[float], size: int) -> list[int] | None:
        """The same beside ``llama_draft``."""
        return self._call(self._draft, numbers, reals, size)

    def told(self, name: str, numbers: list[int], reals: list[float], size: int) -> list[int]:
        """Calls ``llama_branch`` or ``llama_climb``."""
        said = self._call(self._others[name], numbers, reals, size)
        if said is None:  # too much, or something is wrong, and the operation says what
            said = getattr(torch.ops.specdec_fast, f"llama_{name}")(numbers, reals)
        return said

    def _call(self, entry: Any, numbers: list[int], reals: list[float], size: int) -> list[int] | None:
        count = len(numbers)
        if max(count, len(reals), size) > MOST:
            return None
        board: Any = self._numbers
        board[:count] = numbers
        more: Any = self._reals
        more[: len(reals)] = reals
        return None if entry(*self._at, count) else board[:size]

    def room(self, tokens: int, width: int) -> Room:
        """Memory for the laws of so many draft tokens that nobody looks at."""
        if self._room is None or not self._room.free(tokens, width):
            self._room = Room(max(tokens, 16), width)
        return self._room


@functools.cache
def _entries() -> dict[str, Any]:
    """The functions behind ``llama_judge`` and its like, called without torch's dispatcher."""
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    ops = torch.ops.specdec_fast
    return {name: kind(getattr(ops, f"llama_{name}_entry")()) for name in ENTRIES}


_library = torch.library.Library("specdec_fast", "FRAGMENT")
_library.define(
    "llama_hold(Tensor embedding, Tensor[] weights, Tensor[] scales, Tensor[] offsets, Tensor norms, "
    "Tensor head_norms, int[] windows, int[] tables, int heads, int kv_heads, int dim, float scaling, float epsilon, "
    "float scale, bool curved) -> int"
)
_library.define("llama_forget(int model) -> ()")
_library.define("llama_capability() -> int")
_library.define(
    "llama_open(int model, Tensor rotations, Tensor(a!)[] keys, Tensor(b!)[] values, int capability) -> int"
)
_library.define("llama_close(int session) -> ()")
_library.define("llama_memory(int rows, int hidden, int entries, Tensor? index) -> int")
_library.define("llama_memory_forget(int memory) -> ()")
_library.define("llama_memory_hear(int memory, int[] rows, int[] nodes, int[] positions, Tensor logits) -> ()")
_library.define(
    "llama_read(int session, int[] tokens, int[] lengths, int[] rows, int[] columns, int[] hidden, int[] tails) "
    "-> Tensor"
)
_library.define(
    "llama_judge(int session, int[] first, int[] drafts, int[] counts, int[] rows, int[] columns, int[] hidden, "
    "int[] drawn, Tensor? scores, Tensor? logsumexp, Tensor? index, int[] seed, int[] start, float temperature, "
    "int top_k, float top_p, float min_p, int rule, int memory=0) -> int[]"
)
_library.define(
    "llama_draft(int session, int[] tokens, int[] lengths, int[] rows, int[] columns, int[] hidden, int[] steps, "
    "Tensor? choices, int[] seed, int[] start, float temperature, int top_k, float top_p, float min_p, float least, "
    "int levels, float[] stops, int memory=0) -> (Tensor[] laws, int[] report)"
)
_library.define(
    "llama_forward(int session, Tensor tokens, Tensor columns, int[] rows, int[] hidden, int[] lanes) -> Tensor"
)
# Both take numbers and reals as csrc/branch.cpp and csrc/climb.cpp lay them out
_library.define("llama_branch(int[] numbers, float[] reals) -> int[]")
_library.define("llama_climb(int[] numbers, float[] reals) -> int[]")
_library.define(
    "race(Tensor logits, Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor seed, "
    "Tensor position, Tensor? ids, int most) -> (Tensor, Tensor)"
)
for _entry in ENTRIES:
    _library.define(f"llama_{_entry}_entry() -> int")
