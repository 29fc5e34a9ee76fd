"""What a round of SLRS costs beside one of SLEM, on real vocabularies: drafting, verification, translation.

    python benchmarks/slrs_cost.py --target T --drafter D --json benchmarks/results/slrs_cost_cpu.json

SLEM, and SLRS under each rule, write the same prompts in turn, with the same fixed lookahead, at temperature 1. Seconds
are of processor time, not of the clock, so that a busy machine counts for little; one torch thread. A figure is the
median over calls of (seconds / rounds), the prompt's passes included; a ratio is the median of ratios to SLEM at the
same prompt and seed. Building the tables of the two vocabularies is timed by itself, and calls of the first repetition
("first"), which still meet many places of the vocabularies for the first time, are kept apart from the others. Without
``--drafter`` it is the shipped one, in float32. Results of other pairs in the JSON file are kept.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import transformers
import typer
from compare_transformers import PROMPTS, machine
from rich.console import Console
from rich.table import Table

from specdec_fast import fast_generate, last_speculation
from specdec_fast.methods import logit_width
from specdec_fast.pretrained import default_drafter, default_target, load
from specdec_fast.spelling import spelling
from specdec_fast.vocab import Vocabulary

SYSTEMS = {
    "slem": {"method": "slem"},
    "slrs match": {"method": "slrs", "verification": "match"},
    "slrs token": {"method": "slrs", "verification": "token"},
    "slrs block": {"method": "slrs", "verification": "block"},
}
PARTS = ("draft", "verify", "translate", "total")
COUNTS = ("drafted", "committed")


def per_round(found: Any) -> dict[str, float]:
    """One call's seconds and tokens over its rounds."""
    return {
        **{part: getattr(found, f"{part}_seconds") / found.rounds for part in PARTS},
        **{count: getattr(found, count) / found.rounds for count in COUNTS},
    }


def summarise(calls: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A row a system, from its calls in the order of SLEM's."""
    rows = []
    for name, own in calls.items():
        ratios = sorted(a["total"] / b["total"] for a, b in zip(own, calls["slem"], strict=True))
        rows.append(
            {
                "system": name,
                "calls": len(own),
                **{f"{part}_ms": 1e3 * statistics.median(call[part] for call in own) for part in PARTS},
                **{f"{count}_tokens": statistics.fmean(call[count] for call in own) for count in COUNTS},
                "ratio_to_slem": statistics.median(ratios),
                "lowest": ratios[0],
                "highest": ratios[-1],
            }
        )
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Prints the table of one pair."""
    table = Table(title=title)
    for heading in ("system", "draft ms", "verify ms", "translate ms", "round ms", "drafted", "committed", "/ slem"):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for row in rows:
        table.add_row(
            row["system"],
            *(f"{row[f'{part}_ms']:.2f}" for part in PARTS),
            *(f"{row[f'{count}_tokens']:.2f}" for count in COUNTS),
            f"{row['ratio_to_slem']:.2f} ({row['lowest']:.2f}-{row['highest']:.2f})",
        )
    Console().print(table)


def main(
    target: Annotated[Path | None, typer.Option(help="folder of the target; default: SmolLM2-135M-Instruct")] = None,
    drafter: Annotated[Path | None, typer.Option(help="folder of the drafter; default: the shipped one")] = None,
    name: Annotated[str, typer.Option(help="what the results call the pair; default: the folders' names")] = "",
    prompts: Annotated[int, typer.Option(help="how many, code and prose in turn")] = 4,
    tokens: Annotated[int, typer.Option(help="new tokens a call")] = 48,
    lookahead: Annotated[int, typer.Option(help="target tokens a draft")] = 5,
    repetitions: Annotated[int, typer.Option(help="measured repetitions, after the first")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="put the rows of this pair here")] = None,
) -> None:
    """Measures one pair."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    model, tokenizer = load(target or default_target(), dtype=torch.bfloat16)
    small, own = load(drafter or default_drafter(), dtype=torch.bfloat16 if drafter else torch.float32)
    pair = name or f"{target.name if target else 'default'} <- {drafter.name if drafter else 'shipped'}"
    texts = json.loads(PROMPTS.read_text())
    kinds = [[entry["text"] for entry in texts if entry["kind"] == kind] for kind in ("code", "prose")]
    chosen = [text for both in zip(*kinds, strict=True) for text in both][:prompts]
    begin = time.process_time()
    sizes = {"target_size": logit_width(model), "drafter_size": logit_width(small)}
    known = Vocabulary.of(tokenizer), Vocabulary.of(own)
    read = time.process_time() - begin
    spelling(*known, **sizes)
    tables = time.process_time() - begin - read
    calls: dict[bool, dict[str, list[dict[str, float]]]] = {
        first: {system: [] for system in SYSTEMS} for first in (True, False)
    }
    with mock.patch.object(time, "perf_counter", time.process_time):
        for repetition in range(repetitions + 1):
            for number, text in enumerate(chosen):
                inputs = tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}],
                    add_generation_prompt=True,
                    return_tensors="pt",
                    return_dict=True,
                )
                for system, how in SYSTEMS.items():
                    fast_generate(
                        model,
                        **inputs,
                        assistant_model=small,
                        tokenizer=tokenizer,
                        assistant_tokenizer=own,
                        num_assistant_tokens=lookahead,
                        do_sample=True,
                        seed=100 * repetition + number,
                        max_new_tokens=tokens,
                        **how,
                    )
                    calls[not repetition][system].append(per_round(last_speculation()))
    rows, first = summarise(calls[False]), summarise(calls[True])
    show(f"{pair}, milliseconds a round", rows)
    show("the first repetition", first)
    print(f"vocabularies read in {read:.2f} s, tables built in {tables:.2f} s")
    if json_file is not None:
        content = json.loads(json_file.read_text()) if json_file.exists() else {"pairs": {}}
        given = "".join(f" --{label} FOLDER" for label, path in (("target", target), ("drafter", drafter)) if path)
        content["machine"] = machine()
        content["pairs"][pair] = {
            "command": f"python benchmarks/slrs_cost.py{given} --prompts {prompts} --tokens {tokens} "
            f"--lookahead {lookahead} --repetitions {repetitions} --json FILE",
            "seconds": "processor time, one thread",
            "vocabularies": list(sizes.values()),
            "reading_seconds": read,
            "tables_seconds": tables,
            "rows": rows,
            "first": first,
        }
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
