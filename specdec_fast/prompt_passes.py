"""Prompts read by passes of fixed shape, on a GPU.

A pass over a prompt of some hundred tokens is a few milliseconds of a GPU's work, and Python takes ten to forty to ask
for it: hundreds of modules, a thousand launches. A captured pass of fixed shape is asked for in one go, as rounds are.
It reads the weights once for every so many tokens, so long prompts and large models are read as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec_fast.compiled import capture, notice
from specdec_fast.staging import upload
from specdec_fast.static_cache import StaticCache
from specdec_fast.static_runner import StaticRunner, static_forward

__all__ = ["LANES", "capture_all", "lanes_for_prompt", "read_prompts"]

LANES = (16, 64, 256)  # tokens of a row in such a pass
MOST_TOKENS = 1024  # of a prompt, and of a pass of all rows
MOST_READ = 2**30  # bytes of a layer's weights that all passes of a prompt may read, where there are several


def lanes_for_prompt(tokens: int, rows: int, layer_bytes: float) -> int:
    """Lanes of the passes for a prompt of so many tokens; 0 where it is to be read otherwise.

    Args:
        rows: of the cache.
        layer_bytes: of the weights of a layer, on average.
    """
    able = [lanes for lanes in LANES if lanes * rows <= MOST_TOKENS]
    if not able or not 1 < tokens <= MOST_TOKENS:
        return 0
    lanes = next((lanes for lanes in able if lanes >= tokens), able[-1])
    passes = -(-tokens // lanes)
    return lanes if passes == 1 or passes * layer_bytes <= MOST_READ else 0


@torch.no_grad()
def read_prompts(runner: StaticRunner, rows: Sequence[int], texts: Sequence[Sequence[int]]) -> bool:
    """Reads a text a row behind what it holds; False, and nothing done, where that is better done otherwise.

    Args:
        runner: over a static cache, which keeps the captured passes.
    """
    model, cache, longest = runner.model, runner.cache, max(map(len, texts), default=0)
    layer_bytes = sum(p.nbytes for p in model.parameters()) / max(len(cache.windows), 1)
    lanes = lanes_for_prompt(longest, cache.rows, layer_bytes)
    if not lanes or model.base_model is model:
        return False
    for at in range(0, longest, lanes):
        # Lanes that hold nothing, and rows that take no part, write behind their text, where it is overwritten
        tokens = [[0] * lanes for _ in range(cache.rows)]
        start = [*runner.length, *[0] * (cache.rows - runner.rows)]
        for row, text in zip(rows, texts, strict=True):
            piece = list(text[at : at + lanes])
            tokens[row][: len(piece)] = piece
            start[row] += min(at, len(text))
        _run(runner, tokens, start)
    for row, text in zip(rows, texts, strict=True):
        runner.length[row] += len(text)
    return True


@torch.no_grad()
def capture_all(*runners: StaticRunner | None) -> None:
    """Captures the passes of every size for models whose prompts are read so, so that no call has to wait for that."""
    for runner in runners:
        if runner is not None and runner.reader is read_prompts:
            for lanes in LANES:
                if lanes_for_prompt(lanes, runner.cache.rows, 0):
                    _ready(runner, lanes)


def _ready(runner: StaticRunner, lanes: int) -> Any:
    """The captured pass of so many lanes; None where it cannot be captured."""
    graphs, key = runner.cache.graphs, lanes
    if key not in graphs:
        with notice(f"capturing a pass of {lanes} tokens of a prompt"):
            graphs[key] = _captured(runner, lanes)
    return graphs[key]


def _run(runner: StaticRunner, tokens: list[list[int]], start: list[int]) -> None:
    device, found = runner.cache.device, _ready(runner, len(tokens[0]))
    if found is None:
        runner.score(torch.tensor(tokens, device=device), torch.tensor(start, device=device), forward=_leaving)
        return
    graph, own, first = found
    upload(tokens, own)
    upload(start, first)
    graph.replay()


def _captured(runner: StaticRunner, lanes: int) -> tuple[Any, Tensor, Tensor] | None:
    cache = runner.cache
    own = torch.zeros((cache.rows, lanes), dtype=torch.long, device=cache.device)
    # It runs a few times before it is captured: into the last column, which is nobody's
    first = torch.full((cache.rows,), cache.capacity - 1, device=cache.device)
    made, _ = capture(lambda: runner.score(own, first, forward=_leaving), cache.device)
    return None if made is None else (made[0], own, first)


def _leaving(
    model: Any, cache: StaticCache, head: object, tokens: Tensor, lane: Tensor | None, positions: int, ids: int
) -> Tensor:
    """:func:`static_forward` for what it leaves in the cache, without the LM head."""
    return static_forward(model, cache, _nothing, tokens, None, positions, ids)


def _nothing(hidden: Tensor) -> Tensor:
    return hidden[:, :1, :1]
