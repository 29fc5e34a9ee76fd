"""What a drafter's memory (docs/memory.md) brings: calls with and without it beside plain decoding, interleaved.

    python benchmarks/draft_memory.py --target PATH --prompts benchmarks/prompts_prose.json --temperature 1

Each prompt is a message of a chat. Printed are, over all calls, tokens a round, milliseconds a round, and tokens a
second beside plain decoding, for the lookahead that adapts and for one that does not, and for trees (docs/trees.md)
where they are asked for.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec_fast import fast_generate, last_speculation
from specdec_fast.pretrained import default_drafter

CONSTANT = {"num_assistant_tokens": 4, "num_assistant_tokens_schedule": "constant"}


def main(
    target: Annotated[str, typer.Option(help="the target's folder")],
    prompts: Annotated[Path, typer.Option(help="JSON list of messages")],
    drafter: Annotated[str, typer.Option(help="the drafter's folder")] = "",
    method: str = "tli",
    temperature: float = 1.0,
    tokens: int = 96,
    repetitions: int = 2,
    branching: Annotated[bool, typer.Option(help="trees as well, of draws and of races")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="where the figures go")] = None,
) -> None:
    """Prints one line a system."""
    if not temperature and branching:
        raise typer.BadParameter("greedy trees are all of one kind: leave out --branching")
    model, own = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval() for path in (
        target, drafter or default_drafter(),
    ))  # fmt: skip
    names, own_names = (AutoTokenizer.from_pretrained(path) for path in (target, drafter or default_drafter()))
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    parties = {"assistant_model": own, "tokenizer": names, "assistant_tokenizer": own_names, "method": method}
    systems: dict[str, dict[str, Any]] = {"plain": {"method": "autoregressive"}}
    for memory in ("off", "on"):
        own_way = {**parties, "draft_memory": memory}
        systems[f"adaptive, memory {memory}"] = {**own_way, "draft_tree": "off"}
        systems[f"4 tokens, memory {memory}"] = {**own_way, **CONSTANT, "draft_tree": "off"}
        if branching:
            systems[f"trees of draws, memory {memory}"] = {**own_way, "draft_tree": "on", "verification": "block"}
            systems[f"trees of races, memory {memory}"] = {**own_way, "draft_tree": "on"}
    asked = []
    for prompt in json.loads(prompts.read_text("utf-8")):
        chat = [{"role": "user", "content": prompt}]
        asked.append(names.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True))
    sums = {name: torch.zeros(5, dtype=torch.float64) for name in systems}
    for repetition in range(repetitions + 1):
        for number, inputs in enumerate(asked if repetition else asked[:3]):  # the first ones warm up
            for name, arguments in systems.items():
                torch.manual_seed(1000 * repetition + number)
                begin = time.perf_counter()
                text = fast_generate(model, **inputs, max_new_tokens=tokens, **sampling, **arguments)
                seconds = time.perf_counter() - begin
                counts, length = last_speculation(), text.shape[1] - inputs["input_ids"].shape[1]
                if repetition:
                    sums[name] += torch.tensor(
                        [length, seconds, counts.rounds, counts.drafted, counts.accepted], dtype=torch.float64
                    )
    plain = float(sums["plain"][0] / sums["plain"][1])
    rows = []
    for name, (length, seconds, rounds, drafted, accepted) in ((name, line.tolist()) for name, line in sums.items()):
        rows.append(
            {
                "system": name,
                "tokens_per_round": round(length / rounds, 3),
                "ms_per_round": round(1e3 * seconds / rounds, 2),
                "drafted_per_round": round(drafted / rounds, 2),
                "accepted_per_round": round(accepted / rounds, 3),
                "tokens_per_second": round(length / seconds, 1),
                "ratio_to_plain": round(length / seconds / plain, 3),
            }
        )
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    if json_file is not None:
        settings = {"temperature": temperature, "tokens": tokens, "prompts": prompts.name, "repetitions": repetitions}
        json_file.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    typer.run(main)
