"""Milliseconds of a native pass (``specdec_fast/lean.py``) by the number of its positions, beside the bytes it reads.

    python benchmarks/short_passes.py --model PATH [--rounded] [--context 60]

Positions are interleaved: every count once, then every count again. ``--rounded`` runs the model as a drafter, on
weights of 8 bits. The rate is the weights' bytes over the median; compare it with what the machine's memory gives.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import torch
import typer

from specdec_fast.lean import lean_model
from specdec_fast.pretrained import default_drafter, load
from specdec_fast.runner import Runner

POSITIONS = (1, 2, 4, 6, 8, 12, 16)


def main(
    model: Annotated[str, typer.Option(help="Folder of a Llama-like model; default: the shipped drafter.")] = "",
    rounded: Annotated[bool, typer.Option(help="On weights of 8 bits, as a drafter runs.")] = False,
    context: Annotated[int, typer.Option(help="Tokens in the cache before each pass.")] = 60,
    repetitions: Annotated[int, typer.Option(help="Passes of each size.")] = 15,
) -> None:
    loaded, _ = load(model or default_drafter(), dtype=torch.bfloat16)
    lean = lean_model(loaded, rounded=rounded)
    if lean is None:
        raise typer.BadParameter("this model has no native pass here", param_hint="--model")
    size = sum(weights.nbytes for weights in lean._weights)
    runner = Runner(loaded, 1, lean=lean)
    ids = torch.randint(100, 1000, (1, context + max(POSITIONS)), generator=torch.Generator().manual_seed(0))
    runner.feed([0], ids[:, :context], [context], [1])
    seconds: dict[int, list[float]] = {n: [] for n in POSITIONS}
    for _ in range(repetitions):
        for n in POSITIONS:
            runner.rollback(0, context)
            begin = time.perf_counter()
            runner.feed([0], ids[:, context : context + n], [n], [n])
            seconds[n].append(time.perf_counter() - begin)
    print(f"{size / 1e6:.0f} MB of weights, {context} tokens in the cache, {torch.get_num_threads()} threads")
    for n, values in seconds.items():
        median = statistics.median(values)
        print(f"{n:3d} positions: {1e3 * median:7.2f} ms ({1e3 * min(values):.2f}), {size / median / 1e9:5.1f} GB/s")


if __name__ == "__main__":
    typer.run(main)
