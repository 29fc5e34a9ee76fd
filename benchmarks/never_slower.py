"""Whether speculation ever costs more than it brings: many pairs, prompts and temperatures beside plain decoding.

    python benchmarks/never_slower.py --target PATH --other PATH --json benchmarks/results/never_slower_cpu.json

A cell is a pair, a kind of prompt and a temperature; in each, ``fast_generate`` with its defaults and our own plain
decoding take turns. The pairs: the target with the shipped drafter; the other target with the first one as its drafter;
the target with a drafter of random weights, which is never right; and the target with prompt lookup. A cell's figure is
the median over repetitions of (seconds of plain decoding / seconds with speculation). Every call runs as many tokens as
it is told, so both sides write the same amount. Before a cell is timed both sides run once, as they would in any
process that has generated before; what a pair's first call costs is printed apart.

Measuring takes many minutes. The file is written after every cell and cells that it holds are not run again, so the
work can be cut into pieces (``--seconds``).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from compare_transformers import machine
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from specdec_fast import fast_generate, last_speculation
from specdec_fast.pretrained import default_drafter

PROMPTS = {
    "code": "Write a Python function that merges two sorted lists into one sorted list, with a docstring.",
    "prose": "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "chat": "What are the advantages and disadvantages of living in a big city?",
    "repetition": "Repeat this list three times, word for word: red apple, green pear, yellow lemon, blue plum, "
    "red apple, green pear, yellow lemon, blue plum, red apple, green pear, yellow lemon, blue plum.",
}
PAIRS = ("shipped", "other", "random", "prompt_lookup")


class Models:
    """Loads what a cell needs, once."""

    def __init__(self, target: str, other: str):
        self._paths = {"target": target, "other": other, "shipped": default_drafter()}
        self._models: dict[str, Any] = {}
        self._tokenizers: dict[str, Any] = {}

    def model(self, name: str) -> Any:
        if name not in self._models:
            if name == "random":
                self._models[name] = self._random()
            else:
                dtype = torch.float32 if name == "shipped" else torch.bfloat16
                self._models[name] = AutoModelForCausalLM.from_pretrained(self._paths[name], dtype=dtype).eval()
        return self._models[name]

    def tokenizer(self, name: str) -> Any:
        if name not in self._tokenizers:
            self._tokenizers[name] = AutoTokenizer.from_pretrained(self._paths[name])
        return self._tokenizers[name]

    def _random(self) -> Any:
        """A drafter of a few million parameters with the target's vocabulary, of no use at all."""
        config = LlamaConfig(
            vocab_size=self.model("target").config.vocab_size,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=8192,
        )
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()

    def pair(self, name: str) -> tuple[Any, Any, dict[str, Any]]:
        """Target, its tokenizer, and what ``fast_generate`` is told of the drafter."""
        if name == "prompt_lookup":
            return self.model("target"), self.tokenizer("target"), {"method": "prompt_lookup"}
        target, drafter = ("other", "target") if name == "other" else ("target", name)
        own: dict[str, Any] = {"assistant_model": self.model(drafter)}
        if name != "random":
            own |= {"tokenizer": self.tokenizer(target), "assistant_tokenizer": self.tokenizer(drafter)}
        return self.model(target), self.tokenizer(target), own


def cells() -> list[tuple[str, str, float]]:
    """Every cell, pairs that share models next to each other."""
    return [(pair, kind, temperature) for pair in PAIRS for kind in PROMPTS for temperature in (0.0, 1.0)]


def measure(models: Models, cell: tuple[str, str, float], tokens: int, repetitions: int) -> dict[str, Any]:
    """Both sides in turns."""
    pair, kind, temperature = cell
    target, tokenizer, own = models.pair(pair)
    message = [{"role": "user", "content": PROMPTS[kind]}]
    encoded = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    common = {**inputs, **sampling, "max_new_tokens": tokens, "min_new_tokens": 0, "eos_token_id": None}
    counts = {"drafted": 0, "accepted": 0, "rounds": 0}

    def run(arguments: dict[str, Any], seed: int) -> float:
        torch.manual_seed(seed)  # and no `seed`: that would be the constant table
        begin = time.perf_counter()
        fast_generate(target, **common, **arguments)
        return time.perf_counter() - begin

    sides: dict[str, Callable[[int], float]] = {
        "plain": lambda seed: run({"method": "autoregressive"}, seed),
        "speculative": lambda seed: run(own, seed),
    }
    first = {name: side(1000) for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(repetitions):
        for name in list(sides) if repetition % 2 else list(sides)[::-1]:
            seconds[name].append(sides[name](repetition))
            if name == "speculative":
                speculation = last_speculation()
                assert speculation is not None
                for count in counts:
                    counts[count] += getattr(speculation, count)
                method = speculation.method
    ratios = [plain / other for plain, other in zip(seconds["plain"], seconds["speculative"], strict=True)]
    return {
        "pair": pair,
        "prompt": kind,
        "temperature": temperature,
        "method": method,
        "ratio_to_plain": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "plain_tokens_per_second": tokens / statistics.median(seconds["plain"]),
        "tokens_per_second": tokens / statistics.median(seconds["speculative"]),
        "first_call_seconds": first["speculative"],
        **counts,
    }


def main(
    target: Annotated[str, typer.Option(help="The first target, in Hugging Face layout.")],
    other: Annotated[str, typer.Option(help="The other one.")],
    json_file: Annotated[Path, typer.Option("--json", help="Where the cells are kept.")],
    tokens: Annotated[int, typer.Option(help="New tokens a call.")] = 96,
    repetitions: Annotated[int, typer.Option(help="Of each side in a cell.")] = 11,
    seconds: Annotated[float, typer.Option(help="Begin no cell after this.")] = 200.0,
    pairs: Annotated[str, typer.Option(help="Measure cells of these pairs alone.")] = ",".join(PAIRS),
) -> None:
    """The worst of all cells, beside plain decoding."""
    unknown = set(pairs.split(",")) - set(PAIRS)
    if unknown:
        raise SystemExit(f"--pairs {', '.join(sorted(unknown))} is not known: use some of {', '.join(PAIRS)}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    settings = {"new_tokens": tokens, "repetitions": repetitions}
    about: dict[str, Any] = {
        "command": "python benchmarks/never_slower.py --target SMOLLM2 --other QWEN --json FILE",
        "machine": machine(),
        "settings": settings,
        "rows": [],
    }
    if json_file.exists():
        kept = json.loads(json_file.read_text())
        if kept["settings"] != settings:
            raise SystemExit(f"{json_file} was measured with other settings: {kept['settings']}")
        about["rows"] = kept["rows"]
    done = {(row["pair"], row["prompt"], row["temperature"]) for row in about["rows"]}
    models, begin = Models(target, other), time.perf_counter()
    for cell in cells():
        if cell in done or cell[0] not in pairs.split(","):
            continue
        if time.perf_counter() - begin > seconds:
            break
        row = measure(models, cell, tokens, repetitions)
        about["rows"].append(row)
        json_file.write_text(json.dumps(about, indent=1) + "\n")
        print(f"{row['pair']:14s} {row['prompt']:11s} T={row['temperature']:g} {row['ratio_to_plain']:.3f}", flush=True)
    table = Table("pair", "prompt", "T", "method", "beside plain", "tokens/s", "accepted / drafted", "first call")
    for row in sorted(about["rows"], key=lambda row: row["ratio_to_plain"]):
        table.add_row(
            row["pair"],
            row["prompt"],
            f"{row['temperature']:g}",
            row["method"],
            f"{row['ratio_to_plain']:.3f} ({row['lowest']:.3f}-{row['highest']:.3f})",
            f"{row['tokens_per_second']:.1f} ({row['plain_tokens_per_second']:.1f} plain)",
            f"{row['accepted']} / {row['drafted']}",
            f"{row['first_call_seconds']:.2f} s",
        )
    Console(width=130).print(table)
    left = len(cells()) - len(about["rows"])
    print(f"{len(about['rows'])} cells" + (f", {left} to go" if left else ""))


if __name__ == "__main__":
    typer.run(main)
