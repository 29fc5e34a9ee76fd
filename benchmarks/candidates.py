"""How often the target's next token is among a drafter's first few, by likelihood and by a shared race.

    python benchmarks/candidates.py --target PATH --prompts benchmarks/prompts_prose.json

The target writes to each prompt; at every place the drafter reads the same text in its own tokens. Printed are, for
1, 2, 3, 4, 6 and 8 candidates: at temperature 0 how often the argmax is among the drafter's likeliest; at temperature 1
the target's mass on the drafter's likeliest, how often the winner of a race (docs/trees.md) is among the first of the
drafter's race with the same numbers, and how often one of so many draws without replacement is accepted if each is
tried against what the ones before it have left, over eight of both a place. No clock has a part in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec_fast.pretrained import default_drafter
from specdec_fast.vocab import Vocabulary, intersection

COUNTS = (1, 2, 3, 4, 6, 8)
RACES = 8


def within(places: Tensor) -> list[float]:
    """The share of ``places [N]`` (of the right token among the candidates, 0 the first) below each count."""
    return [round((places < count).float().mean().item(), 3) for count in COUNTS]


def place_of(order: Tensor, token: int) -> int:
    found = (order == token).nonzero()
    return int(found[0]) if len(found) else 1 << 20


def tried(law: Tensor, guess: Tensor, generator: torch.Generator) -> int:
    """Which draw of ``guess [K]`` without replacement is accepted for ``law [K]``, part of one; a large number: none.

    Each is tried against what the ones before it have left of the law, as rule token tries a single one.
    """
    left, own, total = law.clone(), guess.clone(), 1.0
    for place in range(max(COUNTS)):
        token = int(torch.multinomial(own, 1, generator=generator))
        if torch.rand((), generator=generator) * own[token] < left[token] / total:
            return place
        taken = total * own
        total -= float(torch.minimum(left, taken).sum())
        left = (left - taken).clamp(min=0)
        own[token] = 0
        own /= own.sum()
    return 1 << 20


@torch.inference_mode()
def main(
    target: Annotated[str, typer.Option(help="the target's folder")],
    prompts: Annotated[Path, typer.Option(help="JSON list of messages")],
    drafter: Annotated[str, typer.Option(help="the drafter's folder")] = "",
    tokens: int = 96,
    threads: int = 1,
) -> None:
    """Prints one line a temperature."""
    torch.set_num_threads(threads)
    model, own = (AutoModelForCausalLM.from_pretrained(p, dtype=d).eval() for p, d in (
        (target, torch.bfloat16), (drafter or default_drafter(), torch.float32),
    ))  # fmt: skip
    names, own_names = (
        AutoTokenizer.from_pretrained(target),
        AutoTokenizer.from_pretrained(drafter or default_drafter()),
    )
    shared = intersection(
        Vocabulary.of(names),
        Vocabulary.of(own_names),
        target_size=model.config.vocab_size,
        drafter_size=own.config.vocab_size,
    )
    generator, tries = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    for temperature in (0, 1):
        likeliest, raced, drawn, masses = [], [], [], []
        for number, prompt in enumerate(json.loads(prompts.read_text("utf-8"))):
            chat = [{"role": "user", "content": prompt}]
            ids = names.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            torch.manual_seed(number)
            sampling = {"do_sample": False}
            if temperature:
                sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
            text = model.generate(**ids, max_new_tokens=tokens, pad_token_id=names.eos_token_id, **sampling)[0]
            scores = model(text.unsqueeze(0)).logits[0].float()
            for end in range(ids["input_ids"].shape[1], len(text)):
                context = own_names.encode(names.decode(text[:end]), add_special_tokens=False)
                guess = own(torch.tensor([context])).logits[0, -1, shared.drafter_ids]
                order = shared.target_ids[guess.topk(max(COUNTS)).indices]
                likeliest.append(place_of(order, int(text[end])))
                law = scores[end - 1].softmax(-1)
                masses.append([law[order[:count]].sum() for count in COUNTS])
                common = law[shared.target_ids].double()
                for _ in range(RACES if temperature else 0):
                    drawn.append(tried(common, guess.double().softmax(-1), tries))
                    u = torch.rand(scores.shape[1], generator=generator).clamp(1e-9, 1 - 1e-7)
                    noise = -(-u.log()).log()
                    winner = int((scores[end - 1] + noise).argmax())
                    first = (guess + noise[shared.target_ids]).topk(max(COUNTS)).indices
                    raced.append(place_of(shared.target_ids[first], winner))
        print(f"T={temperature}, {len(likeliest)} places, candidates {COUNTS}")
        print("  the token among the likeliest", within(torch.tensor(likeliest)))
        if temperature:
            mean = torch.tensor(masses).mean(0).tolist()
            print("  the target's mass on them    ", [round(part, 3) for part in mean])
            print("  the winner among the first   ", within(torch.tensor(raced)))
            print("  drawn and tried one by one   ", within(torch.tensor(drawn)))


if __name__ == "__main__":
    typer.run(main)
