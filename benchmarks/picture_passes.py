"""What a prompt with a picture costs here, and what drafting brings behind one, beside ``generate``.

    python benchmarks/picture_passes.py [--json FILE]

The target has the shape of SmolVLM-256M: its text is written by the default target's weights (SmolLM2-135M-Instruct),
its eyes (a vision tower of 93 million parameters, a token for 64 x 64 pixels) are random and as loud as words are, so
times are those of the model and texts are text, though not about the picture. The drafter is the shipped one, of
another tokenizer, which reads the text alone. Everything is interleaved; medians, and lowest to highest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from figures import report
from transformers import PreTrainedModel, SmolVLMConfig, SmolVLMForConditionalGeneration

from specdec_fast import fast_generate, last_speculation
from specdec_fast.pretrained import default_drafter, default_target, load

PICTURE = 10  # an id that no text here has
PROMPTS = (
    "Describe what could be seen in this picture, in a few sentences.",
    "Write a Python function that returns the sum of the squares of a list of numbers.",
    "Explain to a child why the sky is blue.",
)


def seeing(text: PreTrainedModel, side: int) -> PreTrainedModel:
    """A model of SmolVLM-256M's shape around a text model's weights, for pictures of so many pixels a side."""
    tower = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    tower |= {"image_size": side, "patch_size": 16}
    own = {"scale_factor": 4, "image_token_id": PICTURE, "pad_token_id": text.config.pad_token_id or 0}
    config = SmolVLMConfig(text_config=text.config.to_dict(), vision_config=tower, **own)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings
    torch.manual_seed(0)
    model: Any = SmolVLMForConditionalGeneration(config).to(text.dtype).eval()
    body: Any = text
    model.model.text_model.load_state_dict(body.model.state_dict())
    model.lm_head.load_state_dict(body.lm_head.state_dict())
    model.tie_weights()
    with torch.no_grad():
        loud = model.model.get_image_features(torch.randn(1, 1, 3, side, side, dtype=text.dtype)).pooler_output
        words = model.get_input_embeddings().weight
        model.model.connector.modality_projection.proj.weight *= words.std() / torch.cat(list(loud)).std()
    model.generation_config = text.generation_config
    return model


def main(
    tokens: Annotated[int, typer.Option(help="New tokens a call.")] = 64,
    repetitions: Annotated[int, typer.Option(help="Of every call.")] = 3,
    side: Annotated[int, typer.Option(help="Pixels of a picture's side.")] = 512,
    precision: Annotated[str, typer.Option("--dtype", help="Of both models.")] = "bfloat16",
    to: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    transformers.utils.logging.set_verbosity_error()
    dtype = getattr(torch, precision)
    text, tokenizer = load(default_target(), dtype=dtype)
    drafter, own = load(default_drafter(), dtype=dtype)
    target = seeing(text, side)
    pair = {"assistant_model": drafter, "tokenizer": tokenizer, "assistant_tokenizer": own}
    torch.manual_seed(1)
    picture = torch.randn(1, 1, 3, side, side, dtype=dtype)
    inputs = []
    for said in PROMPTS:
        chat = [{"role": "user", "content": said}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = ids["input_ids"]
        ids = torch.cat([ids[:, :3], torch.full((1, (side // 64) ** 2), PICTURE), ids[:, 3:]], 1)
        inputs.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": picture})
    seconds: dict[str, list[float]] = {}
    counts: dict[str, list[int]] = {}

    def timed(name: str, run: Callable[[dict[str, Any]], Any], warm: bool) -> None:
        begin = time.perf_counter()
        for given in inputs:
            run(given)
            told = last_speculation()
            if warm and told is not None and told.drafted and "drafted" in name:
                counts.setdefault(name, [0, 0])
                counts[name] = [a + b for a, b in zip(counts[name], (told.drafted, told.accepted), strict=True)]
        if warm:
            seconds.setdefault(name, []).append(time.perf_counter() - begin)

    for turn in range(repetitions + 1):
        for label, sampling in (("T=0", {"do_sample": False}), ("T=1", {"do_sample": True, "top_k": 0, "top_p": 1.0})):
            settings: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, **sampling}
            runs: dict[str, Callable[[dict[str, Any]], Any]] = {
                "generate": lambda given, s=settings: target.generate(**given, **s),
                "plain, its own forward": lambda given, s=settings: fast_generate(target, **given, **s, compile="off"),
                "plain": lambda given, s=settings: fast_generate(target, **given, **s),
                "drafted": lambda given, s=settings: fast_generate(target, **given, **s, **pair),
            }
            for name, run in runs.items():
                timed(f"{name}, {label}", run, turn > 0)
    one = {"max_new_tokens": 1, "do_sample": False}
    for name, run in (("generate", target.generate), ("plain", lambda **given: fast_generate(target, **given))):
        for turn in range(repetitions + 1):
            timed(f"{name}, the first token", lambda given, run=run: run(**given, **one), turn > 0)
    figures: dict[str, Any] = {"prompts": len(PROMPTS), "new_tokens": tokens, "side": side, "dtype": precision}
    figures["parameters"] = target.num_parameters()
    figures["seconds"] = {
        name: [round(statistics.median(line), 3), round(min(line), 3), round(max(line), 3)]
        for name, line in seconds.items()
    }
    figures["drafted_accepted"] = counts
    report(figures, to)


if __name__ == "__main__":
    typer.run(main)
