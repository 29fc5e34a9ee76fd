"""What models whose layers keep a state cost here: passes by positions, and whole calls beside ``generate``.

    python benchmarks/state_passes.py --kind lfm2 [--json FILE]
    python benchmarks/state_passes.py --kind qwen3_5 --tokens 32

The models are of real shapes (LFM2-350M, Qwen3.5 of .7 billion parameters) with random weights in bfloat16: times are
theirs, texts are not. Every pass stands behind a rollback, so putting older states back is among them; what is called
``fed again`` had to read that many accepted tokens once more. The drafter is such a model of two layers: greedily none
of its tokens is the target's, while at T=1 two laws that know nothing are so flat that many are accepted. Everything is
interleaved; medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from figures import report
from transformers import PreTrainedModel

from specdec_fast import fast_generate, last_speculation
from specdec_fast.recurrent import RecurrentRunner

SHAPES: dict[str, dict[str, Any]] = {
    "lfm2": {
        "vocab_size": 65536,
        "hidden_size": 1024,
        "intermediate_size": 6656,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    },
    "qwen3_5": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
    },
}
SMALL: dict[str, dict[str, Any]] = {
    "lfm2": {"full_attn_idxs": [1]},
    "qwen3_5": {"head_dim": 64, "linear_num_key_heads": 4, "linear_num_value_heads": 8},
}
DRAFTER = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {"lfm2": "Lfm2Config", "qwen3_5": "Qwen3_5TextConfig"}
Kind = StrEnum("Kind", list(SHAPES))


def medians(runs: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Milliseconds of each, in turns; the first turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repetitions + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: round(1e3 * statistics.median(values), 2) for name, values in seconds.items()}


def main(
    kind: Annotated[Kind, typer.Option(help="Which model.")] = Kind.lfm2,
    tokens: Annotated[int, typer.Option(help="New tokens a call.")] = 48,
    repetitions: Annotated[int, typer.Option(help="Of every pass and call.")] = 5,
    context: Annotated[int, typer.Option(help="Tokens in front of each pass, and in a prompt.")] = 40,
    rows: Annotated[str, typer.Option(help="Batch sizes of the calls.")] = "1,4",
    to: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    nothing = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}

    def built(**shape: Any) -> PreTrainedModel:
        config = getattr(transformers, CONFIGS[kind])(**shape, **nothing)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    model, drafter = built(**SHAPES[kind]), built(**{**SHAPES[kind], **DRAFTER, **SMALL[kind]})
    ids = torch.randint(1, 30000, (1, context + 64))
    runner = RecurrentRunner(model, 1)
    runner.feed([0], ids[:, :context], [context], [1])

    def passed(positions: int, again: int) -> None:
        runner.rollback(0, context)
        if again:  # tokens that stay, behind which something is rejected
            runner.feed([0], ids[:, context : context + again + 1], [again + 1], [again + 1])
            runner.rollback(0, context + again)
        runner.feed([0], ids[:, context + again :][:, :positions], [positions], [positions])

    passes = medians({f"{n} positions": lambda n=n: passed(n, 0) for n in (1, 2, 5, 9, 17)}, repetitions)
    twice = medians(
        {"8 positions": lambda: passed(8, 0), "5 and 8, 4 of them fed again": lambda: passed(4, 4)}, repetitions
    )
    figures: dict[str, Any] = {"model": str(kind), "parameters": model.num_parameters(), "passes_ms": passes}
    figures["fed_again_ms"] = twice
    plain = {"method": "autoregressive", "max_new_tokens": tokens}
    said: dict[str, Any] = {}

    def drafted(prompts: torch.Tensor, name: str, sampling: dict[str, Any]) -> None:
        fast_generate(model, prompts, assistant_model=drafter, max_new_tokens=tokens, **sampling)
        counts = last_speculation()
        said[f"{len(prompts)} rows, {name}"] = [counts.rounds, counts.drafted, counts.accepted]

    for batch in map(int, rows.split(",")):
        prompts = torch.randint(1, 30000, (batch, context))
        calls: dict[str, Callable[[], Any]] = {}
        for name, sampling in (("T=0", {"do_sample": False}), ("T=1", {"do_sample": True, "top_k": 0})):
            calls[f"generate, {name}"] = lambda s=sampling, p=prompts: model.generate(p, max_new_tokens=tokens, **s)
            calls[f"plain, {name}"] = lambda s=sampling, p=prompts: fast_generate(model, p, **plain, **s)
            calls[f"drafted, {name}"] = lambda s=sampling, p=prompts, n=name: drafted(p, n, s)
        figures[f"calls_ms_{batch}_rows"] = medians(calls, repetitions)
    figures["rounds_drafted_accepted"] = said
    report(figures, to)


if __name__ == "__main__":
    typer.run(main)
