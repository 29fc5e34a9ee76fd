"""Milliseconds of a native pass (``specdec_fast/lean.py``) by the number of its positions, beside the bytes it reads.

    python benchmarks/short_passes.py --model PATH [--rounded] [--context 60]
    python benchmarks/short_passes.py --model PATH --positions 16,64,256,1024 --context 0 --own
    python benchmarks/short_passes.py --shape gemma3 --positions 1,2,4,6,8 --own

Positions are interleaved: every count once, then every count again. ``--rounded`` runs the model as a drafter, on
weights of 8 bits. The rate is the weights' bytes over the median; compare it with what the machine's memory gives.
``--own`` times the model's own forward pass in turns with it, as a prompt is read without the operation. ``--shape``
takes random weights of a known shape (Gemma 3 of 270 million parameters, Qwen 3 of .6 billion) in a folder's place.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated, Any

import torch
import transformers
import typer

from specdec_fast.lean import MOST_LANES, lean_model
from specdec_fast.pretrained import default_drafter, load
from specdec_fast.runner import Runner

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3TextConfig",
        {
            "vocab_size": 262144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 512,
        },
    ),
    "qwen3": (
        "Qwen3Config",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
    ),
}


def made(shape: str) -> Any:
    """A model of random weights."""
    name, values = SHAPES[shape]
    config = getattr(transformers, name)(**values)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def main(
    model: Annotated[str, typer.Option(help="Folder of a Llama-like model; default: the shipped drafter.")] = "",
    rounded: Annotated[bool, typer.Option(help="On weights of 8 bits, as a drafter runs.")] = False,
    context: Annotated[int, typer.Option(help="Tokens in the cache before each pass.")] = 60,
    repetitions: Annotated[int, typer.Option(help="Passes of each size.")] = 15,
    positions: Annotated[str, typer.Option(help="Their sizes.")] = "1,2,4,6,8,12,16",
    own: Annotated[bool, typer.Option(help="The model's own forward pass, too.")] = False,
    shape: Annotated[str, typer.Option(help=f"Random weights of one of these shapes: {', '.join(SHAPES)}.")] = "",
) -> None:
    sizes = [int(size) for size in positions.split(",")]
    loaded = made(shape) if shape else load(model or default_drafter(), dtype=torch.bfloat16)[0]
    lean = lean_model(loaded, rounded=rounded)
    if lean is None:
        raise typer.BadParameter("this model has no native pass here", param_hint="--model")
    size = sum(weights.nbytes for weights in lean._weights)
    runners = [Runner(loaded, 1, lean=lean)] + [Runner(loaded, 1)] * own
    ids = torch.randint(100, 1000, (1, context + max(sizes)), generator=torch.Generator().manual_seed(0))
    seconds: dict[tuple[int, int], list[float]] = {(n, r): [] for n in sizes for r in range(len(runners))}
    if context:
        for runner in runners:
            runner.feed([0], ids[:, :context], [context], [1])
    for _ in range(repetitions):
        for (n, r), values in seconds.items():
            runners[r].rollback(0, context)
            begin = time.perf_counter()
            runners[r].feed([0], ids[:, context : context + n], [n], [n if n <= MOST_LANES else 1])
            values.append(time.perf_counter() - begin)
    print(f"{size / 1e6:.0f} MB of weights, {context} tokens in the cache, {torch.get_num_threads()} threads")
    for n in sizes:
        median, *other = (statistics.median(seconds[n, r]) for r in range(len(runners)))
        line = f"{n:4d} positions: {1e3 * median:8.2f} ms ({1e3 * min(seconds[n, 0]):.2f})"
        line += f", {size / median / 1e9:5.1f} GB/s"
        print(line + "".join(f", own {1e3 * value:8.2f} ms, {value / median:.2f} times" for value in other))


if __name__ == "__main__":
    typer.run(main)
