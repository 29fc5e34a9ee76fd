"""First figures of a GPU in minutes: whole generations by CUDA graphs, decode attention by split, products, passes.

    python benchmarks/gpu_quick.py --minutes 3 --json FILE

One prompt, and models as ``end_to_end.py`` builds them; nothing is compiled by inductor, which takes a quarter of a
minute a shape. ``first_seconds`` is a first call, captures included; rates are those of the calls behind it.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import end_to_end
import small_pair
import torch
import typer
from torch import Tensor
from transformers import AutoConfig
from widen import SHAPES, Shape

from specdec_fast import fast_generate, last_speculation
from specdec_fast.attention import NAME, twin
from specdec_fast.dispatch import layers
from specdec_fast.fused_layers import fused_count, why_no_kernels
from specdec_fast.microbench.clock import copy_rate
from specdec_fast.static_cache import capacity_for
from specdec_fast.static_runner import StaticRunner, empty_cache

Entry = dict[str, Any]
# Block, depth, stages and warps of a product's tiles
TILES = (
    (16, 256, 4, 4),
    (16, 256, 4, 2),
    (16, 128, 6, 4),
    (16, 512, 3, 4),
    (32, 256, 3, 4),
    (32, 128, 5, 4),
    (64, 128, 4, 4),
)


def in_a_graph(run: Callable[[], object], times: int, replays: int = 15) -> float:
    """Microseconds of one run, replayed in a CUDA graph of several."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            run()
    seconds = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) * 1000 / times)
    return statistics.median(seconds)


def attention() -> Iterator[Entry]:
    """Decode attention by columns a split, beside torch's over the valid part alone."""
    from specdec_fast.triton_kernels import launch_attention

    usual = launch_attention.SPLIT
    try:
        for heads, kv_heads, dim in ((32, 8, 128), (14, 2, 64)):
            for capacity, start in ((512, 400), (4096, 3500)):
                for queries in (1, 5):
                    q = torch.randn(1, heads, queries, dim, device="cuda", dtype=torch.bfloat16)
                    k, v = torch.randn(2, 1, kv_heads, capacity, dim, device="cuda", dtype=torch.bfloat16)
                    at, entry = torch.tensor([start], device="cuda"), {"what": "attention"}
                    entry |= {"shape": [heads, kv_heads, dim], "capacity": capacity, "start": start, "queries": queries}
                    for split in (32, 64, 128, 256):
                        launch_attention.SPLIT = split
                        entry[f"us_split_{split}"] = in_a_graph(
                            lambda q=q, k=k, v=v, at=at, scale=dim**-0.5: launch_attention.decode_attention(
                                q, k, v, at, None, None, scale, 0.0
                            ),
                            20,
                        )
                    seen = k[:, :, :start], v[:, :, :start]
                    entry["us_sdpa"] = in_a_graph(
                        lambda q=q, seen=seen: torch.nn.functional.scaled_dot_product_attention(
                            q, *seen, enable_gqa=True
                        ),
                        20,
                    )
                    yield entry
    finally:
        launch_attention.SPLIT = usual


def products() -> Iterator[Entry]:
    """Matrix products of a few rows, the weights of each from memory: torch's, and ours by tiles."""
    shapes = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (2048, 2048), (8192, 2048), (2048, 8192)]
    for n, k in [*shapes, (128256, 2048), (4864, 896)]:
        yield from _product(n, k, False)
    for n, k in ((14336, 4096), (8192, 2048), (4864, 896)):
        yield from _product(n, k, True)


def _product(n: int, k: int, gated: bool) -> Iterator[Entry]:
    """``gated``: two products of that shape, the one the other's gate."""
    from specdec_fast.triton_kernels import launch_layers

    usual, parts = launch_layers.tiles_for, 1 + gated
    count = max(2, int(1.5e8 / (n * k * parts)))
    weights = [[torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(parts)] for _ in range(count)]
    entry: Entry = {"what": "product", "shape": [n, k], "gated": gated}
    linear = torch.nn.functional.linear
    for rows in (1, 2, 5, 8):
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)

        def run(x: Tensor = x) -> None:
            for some in weights:
                first, *second = (linear(x, weight) for weight in some)
                if second:
                    torch.nn.functional.silu(first) * second[0]

        entry[f"us_rows_{rows}"] = in_a_graph(run, 1) / count
    x = torch.randn(5, k, device="cuda", dtype=torch.bfloat16)
    for tiles in TILES if n < 100_000 else ():
        name = "us_tiles_" + "_".join(map(str, tiles))
        try:
            launch_layers.tiles_for = lambda *_, tiles=tiles: launch_layers.Tiles(*tiles)

            def ours(x: Tensor = x) -> None:
                for some in weights:
                    launch_layers.layer_product(x, None, 0.0, some, [None] * parts, None, gated)

            entry[name] = in_a_graph(ours, 1) / count
        except Exception as error:  # tiles that this GPU has no room for: the next ones are wanted all the same
            entry[name] = f"{type(error).__name__}: {error}"[:120]
        finally:
            launch_layers.tiles_for = usual
    yield entry


@torch.no_grad()
def passes(name: str, work: Path, columns: int = 400) -> Iterator[Entry]:
    """One pass of a target over a static cache: plain layers and fused ones, by lanes."""
    device = torch.device("cuda")
    small = Shape.of(AutoConfig.from_pretrained(work / "drafter"))
    model, _ = end_to_end.wide(work / "target", end_to_end.shapes_at(name, small)["target"], device)
    start, scores, words = torch.tensor([columns], device=device), [], small.vocab  # behind them is padding
    for fused in (False, True):
        made = twin(model, NAME, fused=fused)
        runner = StaticRunner(made, empty_cache(made, 1, capacity_for(columns + 8)), 1)
        entry: Entry = {"what": "pass", "target": name, "fused": fused_count(made)}
        if fused and (reason := why_no_kernels("cuda")):
            yield {**entry, "error": reason}
            return
        for lanes in (1, 4, 8):
            tokens = torch.arange(1, lanes + 1, device=device).view(1, lanes)
            entry[f"us_lanes_{lanes}"] = in_a_graph(partial(runner.score, tokens, start), 1)
        scores.append(runner.score(tokens, start)[..., :words].float())
        if fused:
            entry["difference"] = float((scores[1] - scores[0]).abs().max() / scores[0].std())
        yield entry


def timed(run: Callable[[], Tensor], tokens: int, repetitions: int = 2) -> tuple[Entry, Tensor]:
    """Seconds of a first call, and tokens per second of the next ones."""

    def once() -> tuple[float, Tensor]:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        out = run()
        torch.cuda.synchronize()
        return time.perf_counter() - begin, out

    first, out = once()
    return {"first_seconds": first, "rates": [tokens / once()[0] for _ in range(repetitions)]}, out


def generations(name: str, work: Path, tokens: int = 96) -> Iterator[Entry]:
    """One target: Transformers' decoding and ours."""
    device = torch.device("cuda")
    shapes = end_to_end.shapes_at(name, Shape.of(AutoConfig.from_pretrained(work / "drafter")))
    held = {role: end_to_end.wide(work / role, shapes[role], device) for role in small_pair.ROLES}
    target, tokenizer = held["target"]
    encoded = tokenizer(small_pair.prompts(1, 1200, tiny=False), return_tensors="pt", add_special_tokens=False)
    inputs = {key: encoded[key].to(device) for key in ("input_ids", "attention_mask")}
    bound = end_to_end.limit(
        Shape.of(target.config), 1, inputs["input_ids"].shape[1] + tokens / 2, copy_rate(device, 20)
    )
    theirs: Entry = {**inputs, "max_new_tokens": 32, "do_sample": False}

    def entry(system: str, method: str, found: Entry, **more: Any) -> Entry:
        return {
            "what": "generation",
            "layers": layers(),
            "target": name,
            "system": system,
            "method": method,
            **found,
            **more,
        }

    found, expected = timed(lambda: target.generate(**theirs), 32, 1)
    yield entry("transformers", "autoregressive", found)
    mine = copy.deepcopy(held["drafter"][0])
    yield entry("transformers", "assisted", timed(lambda: target.generate(**theirs, assistant_model=mine), 32, 1)[0])
    greedy: Entry = {**inputs, "max_new_tokens": tokens, "do_sample": False, "compile": "static"}
    found, plain = timed(lambda: fast_generate(target, **greedy, method="autoregressive"), tokens)
    same: bool | None = bool(torch.equal(plain[:, : expected.shape[1]], expected))
    told = last_speculation()
    assert told is not None
    decoded = end_to_end.pace(
        lambda count: fast_generate(target, **greedy | {"max_new_tokens": count}, method="autoregressive"),
        tokens,
        1,
        torch.cuda.synchronize,
        3,
    )
    more = {"identical": same, "attention": told.attention, "limit": bound}
    yield entry("specdec_fast", "autoregressive", found, decode_rate=decoded, **more)
    for role, method in (("drafter", "model"), ("other", "tli")):
        own = {"assistant_model": held[role][0], "tokenizer": tokenizer, "assistant_tokenizer": held[role][1]}
        for gamma in (2, 3, None):
            for temperature in (0.0, 1.0):
                law = {"do_sample": True, "temperature": 1.0, "top_k": 0} if temperature else {}
                given = {**greedy, **law, **own, "method": method, "num_assistant_tokens": gamma}
                found, out = timed(lambda given=given: fast_generate(target, **given), tokens)
                said = last_speculation()
                assert said is not None
                counts = {
                    count: getattr(said, count)
                    for count in ("rounds", "drafted", "accepted", "loop", "loop_reason", "attention")
                }
                same = None if temperature else bool(torch.equal(out, plain))
                yield entry(
                    "specdec_fast", method, found, gamma=gamma, temperature=temperature, identical=same, **counts
                )


def main(
    work: Annotated[Path, typer.Option(help="where the small pair is kept, or trained")] = Path("build/gpu/small_pair"),
    minutes: Annotated[float, typer.Option(help="begin no further target after this time")] = math.inf,
    training: Annotated[float, typer.Option(help="seconds for the small target; a drafter gets half")] = 56.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the entries here")] = None,
) -> None:
    """A target after the other, then attention, passes and products."""
    ends = time.monotonic() + 60 * minutes
    for line in small_pair.prepare(work, torch.device("cuda"), training, tiny=False):
        print(line, flush=True)
    entries: list[Entry] = []

    def take(found: Iterator[Entry]) -> None:
        for one in found:
            entries.append(one)
            print(json.dumps(one), flush=True)
            if json_file is not None:
                json_file.write_text("[\n " + ",\n ".join(map(json.dumps, entries)) + "\n]\n")

    # What has run on a GPU before comes first: a kernel that fails may end the process
    steps = [partial(generations, name, work) for name in SHAPES]
    for step in [*steps, attention, *(partial(passes, name, work) for name in SHAPES), products]:
        if time.monotonic() < ends:
            try:
                take(step())
            except Exception as error:
                take(iter([{"what": "error", "step": str(step), "error": f"{type(error).__name__}: {error}"[:300]}]))
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    typer.run(main)
