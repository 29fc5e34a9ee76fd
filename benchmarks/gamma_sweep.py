"""What ``plan`` says of a pair beside what constant lookaheads reach: every one of them and the defaults, interleaved.

    python benchmarks/gamma_sweep.py --target PATH --drafter PATH --methods tli,projection --temperature 1 --json FILE

For each method the pair is made ready (``prepare``), the acceptance is measured on the prompts by long constant drafts,
and ``specdec_fast.plan`` computes from it and from the measured costs what each lookahead is worth. Then plain
decoding, constant lookaheads and the adaptive one write the same number of tokens behind the same prompts in turns.
Constant lookaheads of ``auto`` are left out: its adaptive one is what a user gets who names nothing.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from compare_transformers import machine
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec_fast import last_speculation, prepare
from specdec_fast.plan import Forecast, forecast, measure_acceptance
from specdec_fast.prepared import Prepared

PROMPTS = Path(__file__).parent / "prompts_mixed.json"
PARTS = ("draft", "verify", "total")


def main(
    target: Annotated[str, typer.Option(help="In Hugging Face layout.")],
    drafter: Annotated[str, typer.Option(help="In Hugging Face layout.")],
    methods: Annotated[str, typer.Option(help="Of fast_generate.")] = "tli",
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    prompts: Annotated[Path, typer.Option(help="A .json list of texts.")] = PROMPTS,
    gammas: Annotated[str, typer.Option(help="Constant lookaheads.")] = "1,2,3,4,5,6",
    tokens: Annotated[int, typer.Option(help="New tokens a call.")] = 48,
    repetitions: Annotated[int, typer.Option()] = 1,
    acceptance_tokens: Annotated[int, typer.Option(help="New tokens a call that measures acceptance; 0: none.")] = 48,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Speed by lookahead, expected and measured."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval() for path in (target, drafter)]
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (target, drafter)]
    inputs = [_encoded(tokenizers[0], text) for text in json.loads(prompts.read_text())]
    own: dict[str, Any] = {"temperature": temperature, "top_k": 0} if temperature else {}
    own |= {"do_sample": temperature > 0, "inputs": inputs[0]["input_ids"], "repetitions": 5}
    common = {"do_sample": temperature > 0, "max_new_tokens": tokens, "eos_token_id": None}
    whole = {"assistant_model": models[1], "tokenizer": tokenizers[0], "assistant_tokenizer": tokenizers[1]}
    pairs = {name: prepare(models[0], **whole, method=name, **own) for name in methods.split(",")}
    expected = {
        name: _expected(pair, inputs, {**common, "max_new_tokens": acceptance_tokens})
        for name, pair in pairs.items()
        if name != "auto" and acceptance_tokens
    }
    sides: dict[str, tuple[Prepared, dict[str, Any]]] = {
        "plain": (prepare(models[0], method="autoregressive", **own), {})
    }
    for name, pair in pairs.items():
        if name != "auto":
            sides |= {f"{name}, γ={g}": (pair, {"num_assistant_tokens": g}) for g in map(int, gammas.split(","))}
        sides[f"{name}, adaptive"] = pair, {}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    counts: dict[str, dict[str, float]] = {name: {} for name in sides}
    for repetition in range(repetitions):
        for name in seconds:
            seconds[name].append(0.0)
        for number, prompt in enumerate(inputs):
            order = list(sides) if (number + repetition) % 2 else list(sides)[::-1]
            for name in order:
                pair, more = sides[name]
                torch.manual_seed(1000 * repetition + number)  # and no `seed`: that would be the constant table
                begin = time.perf_counter()
                pair.generate(**prompt, **common, **more)
                seconds[name][-1] += time.perf_counter() - begin
                _count(counts[name])
    rows = []
    for name in sides:
        method, _, gamma = name.partition(", γ=")
        known, rounds = expected.get(method), max(counts[name]["rounds"], 1)
        ratios = [a / b for a, b in zip(seconds["plain"], seconds[name], strict=True)]
        rows.append(
            {
                "name": name,
                "expected": known.speeds[int(gamma)] if known is not None and gamma else None,
                "measured": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "tokens_per_second": repetitions * len(inputs) * tokens / sum(seconds[name]),
                "block_efficiency": counts[name]["committed"] / rounds,
                "drafted": counts[name]["drafted"] / rounds,
                "round_ms": {part: 1e3 * counts[name][f"{part}_seconds"] / rounds for part in PARTS},
            }
        )
    about = {
        "command": f"python benchmarks/gamma_sweep.py --target TARGET --drafter DRAFTER --methods {methods} "
        f"--temperature {temperature:g} --gammas {gammas} --tokens {tokens} --repetitions {repetitions} "
        f"--acceptance-tokens {acceptance_tokens} --prompts {prompts.name}",
        "machine": machine(),
        "plan": {name: known.to_dict() for name, known in expected.items()},
        "rows": rows,
    }
    _show(about)
    if json_file is not None:
        json_file.write_text(json.dumps(about, indent=1) + "\n")


def _expected(pair: Prepared, inputs: list[dict[str, torch.Tensor]], call: dict[str, Any]) -> Forecast:
    acceptance = measure_acceptance(pair, inputs, **call)
    costs = pair.costs(do_sample=call["do_sample"])
    assert costs is not None
    return forecast(costs, acceptance)


def _encoded(tokenizer: Any, text: str) -> dict[str, torch.Tensor]:
    message = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _count(counts: dict[str, float]) -> None:
    speculation = last_speculation()
    assert speculation is not None
    for name in ("rounds", "committed", "drafted", *(f"{part}_seconds" for part in PARTS)):
        counts[name] = counts.get(name, 0) + getattr(speculation, name)


def _show(about: dict[str, Any]) -> None:
    for name, plan in about["plan"].items():
        costs, best = plan["costs"], plan["best_at_acceptance"]
        shares = ", ".join(f"{share:.2f}" for share in plan["acceptance"]["positions"][:8])
        passes = ", ".join(f"{1e3 * seconds:.1f}" for seconds in costs["score"][:8])
        print(f"{name}: pass of 1, 2, ... positions {passes} ms; draft {1e3 * costs['start']:.2f} ms and ", end="")
        print(
            f"{1e3 * costs['step']:.2f} a token; round beside {1e3 * costs['rest']:.2f} ms; acceptance {shares}; ",
            end="",
        )
        print(f"best γ={best['gamma']}, {best['speedup']:.3f}x")
    table = Table("", "expected", "measured", "tokens/s", "a round", "drafted", "draft ms", "verify ms", "round ms")
    for row in about["rows"]:
        table.add_row(
            row["name"],
            "" if row["expected"] is None else f"{row['expected']:.3f}",
            f"{row['measured']:.3f} ({row['lowest']:.3f}-{row['highest']:.3f})",
            f"{row['tokens_per_second']:.1f}",
            f"{row['block_efficiency']:.2f}",
            f"{row['drafted']:.2f}",
            *(f"{row['round_ms'][part]:.1f}" for part in PARTS),
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    typer.run(main)
