"""Whole generations on models of real shapes: Transformers' decoding and ours, one run.

    python benchmarks/end_to_end.py --device cuda --minutes 8 --json FILE

The targets have the function of a small model trained on Python sources and the cost of 0.5 B, 1 B and 8 B (see
``widen.py``); the drafters are small ones, as they are, for 0.5 B and 1 B, and widened to 0.5 B for 8 B. Acceptance is
therefore the small pair's, and every row says so. Rows go on from a file that is there; a cell is one target, pair,
temperature and batch size, all systems interleaved.

The bandwidth limit of plain decoding is the rate of a copy in the same run over the bytes that one pass must read: all
weights but the embedding table, and the valid part of the cache, half of the new tokens counted. It is a limit of
passes, so our plain decoding's share of it is that of the tokens behind the prompt, told from calls of two lengths;
the share of whole calls, which read a prompt besides, is there as well.
"""

from __future__ import annotations

import gc
import inspect
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import small_pair
import torch
import typer
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM
from widen import SHAPES, Shape, widen

from specdec_fast import bench, fast_generate, last_speculation
from specdec_fast.dispatch import layers
from specdec_fast.microbench.clock import copy_rate

TINY_SHAPE = Shape(192, 2, 6, 2, 64, 512, 600)
METHODS = {"same tokenizer": ("model",), "other tokenizer": ("tli", "projection", "slem")}


@dataclass(frozen=True)
class Cell:
    """One measurement: everybody on the same prompts."""

    target: str
    pair: str
    temperature: float
    batch: int


def cells(names: list[str], batches: list[int]) -> list[Cell]:
    """The batch of one at every target, then the others."""
    return [Cell(name, pair, t, b) for b in batches for name in names for t in (1.0, 0.0) for pair in METHODS]


def shapes_at(target: str, small: Shape) -> dict[str, Shape | None]:
    """What each role is widened to; None: as it is.

    The drafter that shares the tokenizer has the target's padded vocabulary, as models of one family have.

    Args:
        small: the small drafter's shape.
    """
    shape = TINY_SHAPE if target == "tiny" else SHAPES[target]
    drafter = SHAPES["0.5B"] if target == "8B" else replace(small, hidden=small.hidden + 64)
    other = SHAPES["0.5B"] if target == "8B" else None
    return {"target": shape, "drafter": replace(drafter, vocab=shape.vocab), "other": other}


def load(folder: Path) -> tuple[LlamaForCausalLM, Any]:
    """A small model in float32 and its tokenizer, padding on the left."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


def wide(folder: Path, shape: Shape | None, device: torch.device) -> tuple[LlamaForCausalLM, Any]:
    """A model for the measurement, in bfloat16 on the device."""
    model, tokenizer = load(folder)
    if shape is None:
        model = model.to(device=device, dtype=torch.bfloat16)
    else:
        model = widen(model, shape, dtype=torch.bfloat16, device=device)
    model.generation_config.eos_token_id = None  # every row writes as much
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def limit(shape: Shape, batch: int, columns: float, rate: float) -> float:
    """Tokens per second at which plain decoding reads as fast as a copy runs."""
    read = 2 * (shape.parameters_read() + batch * columns * shape.cache_entries())
    return batch * rate * 1e9 / read


def pace(run: Callable[[int], object], tokens: int, batch: int, wait: Callable[[], None], repetitions: int) -> float:
    """Tokens per second behind the prompt: between calls of a quarter as many tokens and of as many."""
    few, seconds = max(tokens // 4, 1), []
    for _ in range(repetitions):
        taken = []
        for count in (few, tokens):
            wait()
            begin = time.perf_counter()
            run(count)
            wait()
            taken.append(time.perf_counter() - begin)
        seconds.append(taken[1] - taken[0])
    return batch * (tokens - few) / max(statistics.median(seconds), 1e-9)


def measure(
    cell: Cell, pair: dict[str, Any], texts: list[str], *, tokens: int, repetitions: int, compile: str, rate: float
) -> list[dict[str, Any]]:
    """One row a system."""
    device = pair["target"].device
    batches = []
    for first in range(0, len(texts) - cell.batch + 1, cell.batch):
        chosen = texts[first : first + cell.batch]
        encoded = pair["tokenizer"](chosen, return_tensors="pt", padding=True, add_special_tokens=False)
        batches.append({name: encoded[name].to(device) for name in ("input_ids", "attention_mask")})
    batches = batches[: max(1, 2 // cell.batch)]
    options: dict[str, Any] = {
        "temperature": cell.temperature,
        "batch": cell.batch,
        "tokens": tokens,
        "lookahead": None,
    }
    if "compile" in inspect.signature(bench.systems).parameters:
        options["compile"] = compile
    table = bench.systems(pair, METHODS[cell.pair], **options)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    steps = bench.measure(table, batches, temperature=cell.temperature, repetitions=repetitions, synchronize=wait)
    rows = [row.to_dict() for row in list(steps)[-1]]
    said = last_speculation()
    chosen = "" if said is None else said.attention
    plain: dict[str, Any] = {**batches[0], "method": "autoregressive", "compile": compile}
    plain |= {"do_sample": True, "temperature": cell.temperature, "top_k": 0} if cell.temperature else {}
    decoded = pace(
        lambda count: fast_generate(pair["target"], **plain, max_new_tokens=count), tokens, cell.batch, wait, 3
    )
    columns = sum(b["input_ids"].shape[1] for b in batches) / len(batches) + tokens / 2
    bound = limit(Shape.of(pair["target"].config), cell.batch, columns, rate)
    for row in rows:
        row |= {"target": cell.target, "pair": cell.pair, "copy_gigabytes_per_second": rate}
        row |= {"compile": compile, "layers": layers(), "attention": chosen}
        alone = row["method"] == "autoregressive"
        row["share_of_limit_with_prompt"] = row["tokens_per_second"] / bound if alone else None
        own = alone and row["system"] == "specdec_fast"
        row["decode_tokens_per_second"], row["share_of_limit"] = (decoded, decoded / bound) if own else (None, None)
        row["acceptance_is"] = "that of the small pair the models are widened from"
    return rows


def run(
    work: Path, device: torch.device, done: list[dict[str, Any]], ends: float, *, tiny: bool, compile: str
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each cell that is not done, until the time is up."""
    how = {"compile": compile, "layers": layers()}
    same = [row for row in done if all(row.get(name) == value for name, value in how.items())]
    have = {Cell(row["target"], row["pair"], row["temperature"], row["batch"]) for row in same}
    names = ["tiny"] if tiny else [*SHAPES]
    left = [cell for cell in cells(names, [1] if tiny else [1, 4, 8]) if cell not in have]
    rate = copy_rate(device, 5 if tiny else 20, 2**20 if tiny else None)
    texts = small_pair.prompts(16, 200 if tiny else 1200, tiny=tiny)
    tokens, repetitions = (6, 1) if tiny else (96, 2)
    held: tuple[str, dict[str, tuple[LlamaForCausalLM, Any]]] = ("", {})
    for number, cell in enumerate(left):
        if time.monotonic() > ends:
            print(f"{len(left) - number} cells are left: the same command goes on with them")
            return
        if held[0] != cell.target:
            held = ("", {})
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            shapes = shapes_at(cell.target, Shape.of(AutoConfig.from_pretrained(work / "drafter")))
            held = (cell.target, {role: wide(work / role, shapes[role], device) for role in small_pair.ROLES})
        target, tokenizer = held[1]["target"]
        drafter, own = held[1]["drafter" if cell.pair == "same tokenizer" else "other"]
        pair = {"target": target, "tokenizer": tokenizer, "drafter": drafter, "drafter_tokenizer": own}
        yield measure(cell, pair, texts, tokens=tokens, repetitions=repetitions, compile=compile, rate=rate)


def main(
    device: Annotated[str, typer.Option(help="cuda; cpu tries the steps in small")] = "cuda",
    work: Annotated[Path, typer.Option(help="where the small pair is kept")] = Path("build/gpu"),
    minutes: Annotated[float, typer.Option(help="begin no further cell after this time")] = math.inf,
    compile: Annotated[
        str, typer.Option(help="as fast_generate takes it; inductor takes a quarter of a minute a shape")
    ] = "static",
    training: Annotated[float, typer.Option(help="seconds for the small target; a drafter gets half")] = 90.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows here, and go on from them")] = None,
) -> None:
    """Trains the small pair where it is not there, then measures cell by cell."""
    ends = time.monotonic() + 60 * minutes
    tiny, place = device == "cpu", torch.device(device)
    folder = work / "small_pair"
    for line in small_pair.prepare(folder, place, 0.1 if tiny else training, tiny=tiny):
        print(line, flush=True)
    rows = json.loads(json_file.read_text()) if json_file is not None and json_file.exists() else []
    for new in run(folder, place, rows, ends, tiny=tiny, compile="off" if tiny else compile):
        rows += new
        for row in new:
            print(f"{row['target']} {row['pair']} T={row['temperature']:g} B={row['batch']} {row['system']}", end=" ")
            print(f"{row['method']}: {row['tokens_per_second']:.1f} tokens/s", flush=True)
        if json_file is not None:
            json_file.write_text("[\n " + ",\n ".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    typer.run(main)
