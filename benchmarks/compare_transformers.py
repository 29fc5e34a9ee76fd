"""Tokens per second beside Transformers: plain and assisted generation, same models, prompts and lookahead.

    python benchmarks/compare_transformers.py --json benchmarks/results/compare_transformers_cpu.json

Runs are interleaved: every system writes the first prompt, then every system the second, and so on for several
repetitions, so that a machine that changes its speed changes it for all of them. A figure is the median over
repetitions of (tokens written for all prompts / seconds spent on them); ratios are medians of ratios within a
repetition.

Things to know when reading the table. The ratios are to Transformers' plain decoding and to its assisted
generation at the same temperature, which is SLEM at T=0 and TLI at T=1 (it offers no choice); "auto" is this package
with nothing but the drafter given. Transformers counts its lookahead in drafter tokens under SLEM, here it is
counted in target tokens. And Transformers' sampled TLI draws from a wrong law (the scores of its pruned head are
scattered in another order than they were taken in), which changes its acceptance and makes its output not the
target's; its row is there for the speed alone. "tli-unpruned" is the same with that pruning switched off inside
Transformers: the baseline that draws from the right law.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.generation import candidate_generator

from specdec_fast import fast_generate, last_speculation
from specdec_fast.pretrained import default_drafter, default_target, load

PROMPTS = Path(__file__).with_name("prompts.json")
Run = Callable[[dict[str, torch.Tensor], int], torch.Tensor]


def machine() -> dict[str, Any]:
    """What the figures were measured on, by its features."""
    capabilities = torch.backends.cpu.get_cpu_capability()
    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    return {
        "device": "cpu",
        "architecture": platform.machine(),
        "capability": capabilities,
        "amx_bf16": "amx_bf16" in flags,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def systems(target: Any, drafter: Any, tokenizer: Any, own: Any, lookahead: int, tokens: int) -> dict[str, Run]:
    """Everything that is compared: name to a function from (inputs, seed) to ``sequences [1, L]``."""
    both = {"tokenizer": tokenizer, "assistant_tokenizer": own}
    length = {"max_new_tokens": tokens, "min_new_tokens": 0}

    def transformers_plain(sample: bool) -> Run:
        def run(inputs: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
            torch.manual_seed(seed)
            return target.generate(**inputs, do_sample=sample, **length)

        return run

    def transformers_assisted(sample: bool, tokenizer: Any = tokenizer, own: Any = own) -> Run:
        # Its TLI prunes the drafter for good, so each system has a drafter of its own
        mine = copy.deepcopy(drafter)
        mine.generation_config.num_assistant_tokens = lookahead
        mine.generation_config.num_assistant_tokens_schedule = "constant"
        mine.generation_config.assistant_confidence_threshold = 0.0

        def run(inputs: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
            torch.manual_seed(seed)
            pair = {"tokenizer": tokenizer, "assistant_tokenizer": own}
            return target.generate(**inputs, assistant_model=mine, do_sample=sample, **pair, **length)

        return run

    def ours(method: str, sample: bool) -> Run:
        speculative = {} if method == "autoregressive" else {"assistant_model": drafter, **both}
        if method not in ("autoregressive", "auto"):  # "auto" stands for the defaults: its lookahead adapts
            speculative["num_assistant_tokens"] = lookahead

        def run(inputs: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
            return fast_generate(
                target,
                **inputs,
                method=method,
                do_sample=sample,
                seed=seed,
                **speculative,
                **length,
            )

        return run

    def transformers_unpruned() -> Run:
        """Its TLI without the pruning that permutes q: the law is right then. Not offered by its interface."""
        translators = candidate_generator.AssistantVocabTranslatorCache
        run = transformers_assisted(True, copy.deepcopy(tokenizer), copy.deepcopy(own))  # it keeps a map a tokenizer
        pruning = translators.get_translator

        def whole(*arguments: Any, **named: Any) -> Any:
            return pruning(*arguments, **{**named, "assistant_prune_lm_head": False})

        def patched(inputs: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
            with mock.patch.object(translators, "get_translator", whole):
                return run(inputs, seed)

        return patched

    table: dict[str, Run] = {}
    for sample, law, method in ((False, "T=0", "slem"), (True, "T=1", "tli")):
        table[f"transformers plain {law}"] = transformers_plain(sample)
        table[f"specdec_fast plain {law}"] = ours("autoregressive", sample)
        table[f"transformers {method} {law}"] = transformers_assisted(sample)
        table[f"specdec_fast {method} {law}"] = ours(method, sample)
        table[f"specdec_fast auto {law}"] = ours("auto", sample)
    table["transformers tli-unpruned T=1"] = transformers_unpruned()
    return table


def summarise(rates: dict[str, list[float]], efficiency: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row a system: median rate, spread, and ratios to Transformers within each repetition."""
    rows = []
    for name, values in rates.items():
        system, method, law = name.split()
        row: dict[str, Any] = {
            "system": system,
            "method": method,
            "temperature": float(law[2:]),
            "tokens_per_second": statistics.median(values),
            "lowest": min(values),
            "highest": max(values),
        }
        for label, other in (
            ("ratio_to_transformers_plain", f"transformers plain {law}"),
            ("ratio_to_transformers_assisted", f"transformers {'tli' if law == 'T=1' else 'slem'} {law}"),
        ):
            row[label] = statistics.median(a / b for a, b in zip(values, rates[other], strict=True))
        if efficiency[name]:
            row["block_efficiency"] = statistics.fmean(efficiency[name])
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    table = Table(
        title="tokens/s, medians of interleaved repetitions",
        caption="Transformers' sampled TLI draws from a wrong law: its row is for speed alone",
    )
    for heading in ("system", "method", "T", "tokens/s", "lowest-highest", "/ plain", "/ assisted", "block efficiency"):
        table.add_column(heading, justify="left" if heading in ("system", "method") else "right")
    for row in rows:
        table.add_row(
            row["system"],
            row["method"],
            f"{row['temperature']:g}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['lowest']:.1f}-{row['highest']:.1f}",
            f"{row['ratio_to_transformers_plain']:.2f}",
            f"{row['ratio_to_transformers_assisted']:.2f}",
            f"{row['block_efficiency']:.2f}" if "block_efficiency" in row else "",
        )
    Console().print(table)


def main(
    target: Annotated[Path | None, typer.Option(help="folder of the target; default: SmolLM2-135M-Instruct")] = None,
    drafter: Annotated[Path | None, typer.Option(help="folder of the drafter; default: the shipped one")] = None,
    prompts: Annotated[Path, typer.Option(help="JSON list of {kind, text}")] = PROMPTS,
    tokens: Annotated[int, typer.Option(help="new tokens a prompt")] = 96,
    lookahead: Annotated[int, typer.Option(help="num_assistant_tokens of every system")] = 5,
    repetitions: Annotated[int, typer.Option(help="interleaved repetitions")] = 5,
    temperature: Annotated[float | None, typer.Option(help="only the systems of this temperature: 0 or 1")] = None,
    threads: Annotated[int, typer.Option(help="torch threads; 0: as torch likes")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
) -> None:
    """Measures all systems and prints one table."""
    transformers.logging.set_verbosity_error()
    if threads:
        torch.set_num_threads(threads)
    target_folder, drafter_folder = target or default_target(), drafter or default_drafter()
    model, tokenizer = load(target_folder, dtype=torch.bfloat16)
    # float32: at one position of a few million parameters bfloat16 is the slower of the two, for every system
    small, own = load(drafter_folder, dtype=torch.float32)
    texts = json.loads(prompts.read_text())
    encoded = [
        dict(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": entry["text"]}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        )
        for entry in texts
    ]
    compared = systems(model, small, tokenizer, own, lookahead, tokens)
    if temperature is not None:
        compared = {name: run for name, run in compared.items() if name.endswith(f"T={temperature:g}")}
    rates: dict[str, list[float]] = {name: [] for name in compared}
    efficiency: dict[str, list[float]] = {name: [] for name in compared}
    for run in compared.values():  # first calls build maps and caches
        run(encoded[0], 0)
    for repetition in track(range(repetitions), description="repetitions"):
        written = dict.fromkeys(compared, 0)
        seconds = dict.fromkeys(compared, 0.0)
        for number, inputs in enumerate(encoded):
            for name, run in compared.items():
                begin = time.perf_counter()
                result = run(inputs, 1000 * repetition + number)
                seconds[name] += time.perf_counter() - begin
                written[name] += result.shape[1] - inputs["input_ids"].shape[1]
                speculation = last_speculation()
                if name.startswith("specdec_fast") and speculation is not None:
                    efficiency[name].append(speculation.block_efficiency)
        for name in compared:
            rates[name].append(written[name] / seconds[name])
    rows = summarise(rates, efficiency)
    show(rows)
    if json_file is not None:
        settings = {
            "target": target_folder.name,
            "drafter": "shipped" if drafter is None else drafter_folder.name,
            "dtype": "target bfloat16, drafter float32",
            "prompts": len(encoded),
            "new_tokens": tokens,
            "lookahead": lookahead,
            "repetitions": repetitions,
        }
        only = "" if temperature is None else f" --temperature {temperature:g}"
        command = (
            f"python benchmarks/compare_transformers.py --tokens {tokens} --lookahead {lookahead} "
            f"--repetitions {repetitions}{only} --json FILE"
        )
        note = (
            "Transformers' sampled TLI draws from a wrong law, which changes its acceptance: its row is for speed alone"
        )
        content = {"command": command, "machine": machine(), "settings": settings, "note": note, "rows": rows}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
