"""What models that read a source cost here: passes by positions, and whole calls beside ``generate`` and its assistant.

    python benchmarks/source_passes.py --kind whisper [--json FILE]
    python benchmarks/source_passes.py --kind t5 --rows 1,4 --tokens 32
    python benchmarks/source_passes.py --kind whisper --device cuda

The models are of real shapes (T5 base, BART large, Whisper small) with random weights in bfloat16: times are theirs,
texts are not. The drafter is what distilling makes of them: the same encoder, and the first decoder layers of the
target, whose other layers add so little (``--upper``) that a share of what it writes is accepted; the figures say
which. Everything is interleaved; medians. On a GPU calls come by captured passes of fixed shape and by the model's own
forward (``off``).
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from figures import report
from state_passes import medians
from torch import Tensor
from transformers import PreTrainedModel

from specdec_fast import fast_generate, last_speculation
from specdec_fast.encoded import EncodedRunner, why_not_encoded
from specdec_fast.encoding import Encoded
from specdec_fast.static_cache import capacity_for, rows_for
from specdec_fast.static_model import timer
from specdec_fast.static_sources import StaticEncodedRunner, empty_cache, shape_of, why_not_static

_BART = {"encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096, "encoder_attention_heads": 16, "decoder_attention_heads": 16}
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {"vocab_size": 50265, "d_model": 1024, "encoder_layers": 12, "decoder_layers": 12, **_BART},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": 51865,
            "d_model": 768,
            "encoder_layers": 12,
            "decoder_layers": 12,
            "encoder_attention_heads": 12,
            "decoder_attention_heads": 12,
            "encoder_ffn_dim": 3072,
            "decoder_ffn_dim": 3072,
            "num_mel_bins": 80,
        },
    ),
}
KEPT = 2  # decoder layers of the drafter
SMALL: dict[str, Any] = {"d_model": 64, "num_layers": 3, "num_heads": 2, "d_ff": 64, "d_kv": 32}
SMALL |= {
    f"{side}_{name}": n
    for side in ("encoder", "decoder")
    for name, n in (("layers", 3), ("ffn_dim", 64), ("attention_heads", 2))
}
Kind = StrEnum("Kind", list(SHAPES))


def built(kind: str, upper: float, small: bool) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A target, and its drafter: the same but for all decoder layers behind the first few."""
    name, config, shape = SHAPES[kind]
    shape = {key: SMALL.get(key, value) for key, value in shape.items()} if small else shape
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "decoder_start_token_id": 2}
    none = dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"))
    made = getattr(transformers, config)(**shape, **special)
    target: Any = getattr(transformers, name)(made).to(torch.bfloat16).eval()
    layers = target.decoder.block if kind == "t5" else target.model.decoder.layers
    with torch.no_grad():
        for layer in layers[KEPT:]:
            for part, weights in layer.named_parameters():
                if part.endswith(("o.weight", "wo.weight", "out_proj.weight", "fc2.weight")):
                    weights.mul_(upper)
    drafter = copy.deepcopy(target)
    if kind == "t5":
        drafter.decoder.block = drafter.decoder.block[:KEPT]
        drafter.config.num_decoder_layers = KEPT
    else:
        drafter.model.decoder.layers = drafter.model.decoder.layers[:KEPT]
        drafter.config.decoder_layers = KEPT
    for model in (target, drafter):
        for setting, value in {**special, **none, "num_beams": 1, "is_multilingual": False}.items():
            setattr(model.generation_config, setting, value)
        if kind == "whisper":
            model.generation_config.no_timestamps_token_id = 50363
    return target, drafter


SIZES = (1, 2, 5, 9, 17)  # positions of a pass


def fixed_passes(target: PreTrainedModel, made: Encoded, repetitions: int) -> dict[str, float] | str:
    """Milliseconds of passes of fixed shape behind a text, captured on a GPU; why there are none."""
    if (why := why_not_encoded(target, made) or why_not_static(target, made)) is not None:
        return why
    with torch.no_grad():
        cache = empty_cache(target, rows_for(made.rows), capacity_for(96), made, shape_of(target, made))
        runner = StaticEncodedRunner(target, cache, made.rows, encoded=made)
        start = torch.full((cache.rows,), 24, device=target.device)

        def passed(n: int) -> Callable[[], Tensor]:
            text = torch.full((cache.rows, n), 7, device=target.device)
            return lambda: runner.score(text, start)

        clocks = {f"{n} positions": timer(passed(n), target.device) for n in SIZES}
        turns = [{name: clock() for name, clock in clocks.items()} for _ in range(repetitions + 1)][1:]
    return {name: round(1e3 * statistics.median(turn[name] for turn in turns), 3) for name in clocks}


def main(
    kind: Annotated[Kind, typer.Option(help="Which model.")] = Kind.whisper,
    tokens: Annotated[int, typer.Option(help="New tokens a call.")] = 48,
    repetitions: Annotated[int, typer.Option(help="Of every pass and call.")] = 5,
    read: Annotated[int, typer.Option(help="Tokens of a text that is read.")] = 200,
    rows: Annotated[str, typer.Option(help="Batch sizes of the calls.")] = "1,4",
    upper: Annotated[
        float, typer.Option(help="What the target's other layers add, as a share of usual weights.")
    ] = 0.3,
    device: Annotated[str, typer.Option(help="Of the models.")] = "cpu",
    small: Annotated[bool, typer.Option(help="Narrow models, to try this script itself.")] = False,
    to: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    target, drafter = (model.to(device) for model in built(kind, upper, small))
    on_gpu = target.device.type == "cuda"

    def source(batch: int) -> dict[str, torch.Tensor]:
        if kind == "whisper":
            return {"input_features": torch.randn(batch, 80, 3000, dtype=torch.bfloat16, device=device)}
        return {"input_ids": torch.randint(3, 30000, (batch, read), device=device)}

    def waited(run: Callable[[], Any]) -> Callable[[], None]:
        def whole() -> None:
            run()
            if on_gpu:
                torch.cuda.synchronize()

        return whole

    figures: dict[str, Any] = {"model": str(kind), "parameters": target.num_parameters(), "upper": upper}
    if on_gpu:
        figures["gpu"] = torch.cuda.get_device_name()
    begun = torch.randint(3, 30000, (1, 96), device=device)
    for batch in map(int, rows.split(",")):
        inputs = source(batch)
        with torch.no_grad():
            made = Encoded(target.get_encoder()(**inputs), None)
        runner = EncodedRunner(target, batch, encoded=made)
        everyone = list(range(batch))
        runner.feed(everyone, begun[:, :24].expand(batch, -1), [24] * batch, [1] * batch)

        def passed(positions: int, runner: Any = runner, batch: int = batch, everyone: list[int] = everyone) -> None:
            for row in everyone:
                runner.rollback(row, 24)
            text = begun[:, 24 : 24 + positions].expand(batch, -1)
            runner.feed(everyone, text, [positions] * batch, [positions] * batch)

        passes = medians({f"{n} positions": waited(lambda n=n, run=passed: run(n)) for n in SIZES}, repetitions)
        figures[f"passes_ms_{batch}_rows"] = passes
        figures[f"fixed_passes_ms_{batch}_rows"] = fixed_passes(target, made, repetitions)
        said: dict[str, Any] = {}

        def drafted(name: str, how: dict[str, Any], inputs: Any = inputs, said: Any = said) -> None:
            fast_generate(target, **inputs, assistant_model=drafter, max_new_tokens=tokens, **how)
            counts = last_speculation()
            said[name] = [counts.rounds, counts.drafted, counts.accepted, counts.loop, counts.loop_reason]

        calls: dict[str, Callable[[], Any]] = {
            "encoder": lambda inputs=inputs: target.get_encoder()(**inputs),
        }
        for name, sampling in (("T=0", {"do_sample": False}), ("T=1", {"do_sample": True, "top_k": 0})):
            both: dict[str, Any] = {**inputs, **sampling, "max_new_tokens": tokens}
            calls[f"generate, {name}"] = lambda both=both: target.generate(**both)
            if batch == 1:
                calls[f"assisted, {name}"] = lambda both=both: target.generate(**both, assistant_model=drafter)
            for compile in ("auto", "off") if on_gpu else ("auto",):
                label, how = f"{name}{', off' if compile == 'off' else ''}", {**sampling, "compile": compile}
                plain = {**both, "method": "autoregressive", "compile": compile}
                calls[f"plain, {label}"] = lambda plain=plain: fast_generate(target, **plain)
                calls[f"drafted, {label}"] = lambda label=label, how=how, run=drafted: run(label, how)
        with torch.no_grad():
            figures[f"calls_ms_{batch}_rows"] = medians({name: waited(run) for name, run in calls.items()}, repetitions)
        figures[f"rounds_drafted_accepted_{batch}_rows"] = said
    report(figures, to)


if __name__ == "__main__":
    typer.run(main)
