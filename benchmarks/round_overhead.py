"""What a round costs beside the models' forward passes: ours and Transformers' assisted generation, on one toy pair.

    python benchmarks/round_overhead.py --json benchmarks/results/round_overhead_cpu.json

The pair is two small Llama models with random weights, the drafter's equal to the target's but for noise, so that some
drafts are accepted. Every call of a model's forward, or of the native operation in its place, is timed inside; what is
left of a call, divided by its rounds, is the overhead: preparing inputs, sampling the drafter, verifying, committing,
rolling back. The native operation that runs a drafter's steps chooses their tokens too, so its whole time is no
forward: it reports the nanoseconds that its passes took, those alone are counted as forward, and everything else of it
(choosing, sampling, its own call) is overhead. So it is with the operation that scores a draft and judges it. What a
call costs before its first round (checks, caches, the generation config) is measured by calls of one token and taken
off. Systems are interleaved; a figure is the median over repetitions.

The toy pair's weights stay in the caches, and with them whatever a round's bookkeeping touches. ``--sweep`` reads so
many megabytes before each pass of the target, as the weights of a larger one would be read, so that rounds begin cold.
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import transformers
import typer
from compare_transformers import machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from specdec_fast import fast_generate, last_speculation
from specdec_fast.lean_ops import Session

Run = Callable[[int, int], int]


class Clock:
    """Seconds spent inside models.

    Args:
        swept: read before each of the target's passes, as the weights of a larger one would be; counts as forward.
    """

    def __init__(self, swept: torch.Tensor | None = None) -> None:
        self.seconds = 0.0
        self.target: Any = None
        self._swept = swept
        self._inside = False

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed; a model that calls another one counts once."""

        @functools.wraps(
            function, assigned=("__module__", "__name__", "__doc__") if hasattr(function, "__name__") else ()
        )
        def timed(*arguments: Any, **named: Any) -> Any:
            if self._inside:
                return function(*arguments, **named)
            self._inside, begin = True, time.perf_counter()
            # The operation that reads is the target's, once the prompt is read
            if self._swept is not None and (
                not isinstance(arguments[0], LlamaForCausalLM) or arguments[0] is self.target
            ):
                self._swept.sum()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - begin
                self._inside = False

        return timed

    def reading(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """An operation that passes and choosing share: what its report says of passes, in nanoseconds, counts."""

        def read(*arguments: Any) -> Any:
            result = function(*arguments)
            self.seconds += 1e-9 * result[-1]
            return result

        return read

    def judging(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same of the target's pass and the rule behind it."""

        def judge(*arguments: Any) -> Any:
            begin = time.perf_counter()
            if self._swept is not None:
                self._swept.sum()
            self.seconds += time.perf_counter() - begin
            result = function(*arguments)
            self.seconds += 1e-9 * result[-2]
            return result

        return judge

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Times the forward of Llama models and the native operations."""
        ops = torch.ops.specdec_fast
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(LlamaForCausalLM, "forward", self.wrap(LlamaForCausalLM.forward)))
            for name in ("llama_forward", "llama_read"):
                if (native := getattr(ops, name, None)) is not None:
                    stack.enter_context(mock.patch.object(ops, name, self.wrap(native)))
            for name, counted in (("draft", self.reading), ("judge", self.judging)):
                stack.enter_context(mock.patch.object(Session, name, counted(getattr(Session, name))))
            yield


@dataclass
class Measured:
    """One system's repetitions: milliseconds a round."""

    overhead: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    rounds: int = 0


def toy_pair(vocabulary: int, noise: float) -> tuple[Any, Any]:
    """A target, and a drafter that is the target with noise on its weights."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    target = LlamaForCausalLM(config).eval()
    drafter = LlamaForCausalLM(config).eval()
    drafter.load_state_dict(target.state_dict())
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += noise * parameter.std() * torch.randn_like(parameter)
    return target, drafter


def systems(target: Any, drafter: Any, sample: bool, lookahead: int, batch: int) -> dict[str, Run]:
    """Each runs a call of so many tokens with a seed and returns its rounds."""
    prompt = torch.arange(1, 9).repeat(batch, 1)
    mine = {"do_sample": sample, **({"top_k": 0, "temperature": 1.0} if sample else {})}
    assistant = LlamaForCausalLM(drafter.config).eval()
    assistant.load_state_dict(drafter.state_dict())
    assistant.generation_config.num_assistant_tokens = lookahead
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    calls = [0]
    forward = target.forward

    def counted(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        return forward(*arguments, **named)

    def assisted(tokens: int, seed: int) -> int:
        torch.manual_seed(seed)
        calls[0] = 0
        with mock.patch.object(target, "forward", counted):
            target.generate(prompt, assistant_model=assistant, max_new_tokens=tokens, **mine)
        return calls[0]

    def ours(compile: str, **more: Any) -> Run:
        def run(tokens: int, seed: int) -> int:
            fast_generate(target, prompt, max_new_tokens=tokens, seed=seed, compile=compile, **mine, **more)
            speculation = last_speculation()
            assert speculation is not None
            return speculation.rounds

        return run

    draft = {"assistant_model": drafter, "num_assistant_tokens": lookahead}
    table = {"specdec_fast": ours("auto", **draft), "specdec_fast, plain": ours("auto", method="autoregressive")}
    if batch == 1:
        table = {"transformers assisted": assisted, **table}
    return table


def overheads(table: dict[str, Run], clock: Clock, tokens: int, repetitions: int) -> dict[str, Measured]:
    """Interleaved repetitions."""
    found = {name: Measured() for name in table}
    for run in table.values():
        run(tokens, 0)
    for repetition in range(repetitions):
        for name, run in table.items():
            parts = []
            for length in (1, tokens):
                clock.seconds, begin = 0.0, time.perf_counter()
                rounds = run(length, repetition)
                whole = time.perf_counter() - begin
                parts.append((whole - clock.seconds, clock.seconds, rounds))
            (first, _, one), (rest, forward, rounds) = parts
            own = found[name]
            own.overhead.append(1e3 * (rest - first) / (rounds - one))
            own.forward.append(1e3 * forward / rounds)
            own.rounds = rounds
    return found


def rows_of(found: dict[str, Measured], setting: dict[str, Any]) -> list[dict[str, Any]]:
    baseline = found.get("transformers assisted")
    rows = []
    for name, own in found.items():
        row = {
            **setting,
            "system": name,
            "overhead_ms": statistics.median(own.overhead),
            "lowest_ms": min(own.overhead),
            "highest_ms": max(own.overhead),
            "forward_ms": statistics.median(own.forward),
            "rounds": own.rounds,
        }
        if baseline is not None:
            row["ratio_to_transformers"] = statistics.median(
                mine / theirs for mine, theirs in zip(own.overhead, baseline.overhead, strict=True)
            )
        rows.append(row)
    return rows


def main(
    vocabulary: Annotated[list[int], typer.Option(help="Tokens of the toy pair; may be given more than once.")] = [  # noqa: B006
        1024,
        32000,
    ],
    lookahead: Annotated[int, typer.Option(help="Draft tokens a round.")] = 5,
    tokens: Annotated[int, typer.Option(help="New tokens a call.")] = 128,
    batch: Annotated[int, typer.Option(help="Rows; above 1 Transformers has no assisted generation.")] = 1,
    repetitions: Annotated[int, typer.Option()] = 9,
    sweep: Annotated[int, typer.Option(help="Megabytes read before each of the target's passes, to empty caches.")] = 0,
    noise: Annotated[float, typer.Option(help="Of the drafter's weights, in their standard deviations.")] = 0.1,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Milliseconds of a round beside the models' forward passes."""
    transformers.utils.logging.set_verbosity_error()
    rows: list[dict[str, Any]] = []
    clock = Clock(torch.ones(sweep << 18) if sweep else None)
    settings = [(size, sample) for size in vocabulary for sample in (False, True)]
    with clock.running():
        for size, sample in track(settings, "measuring", console=Console(stderr=True)):
            clock.target, drafter = toy_pair(size, noise)
            table = systems(clock.target, drafter, sample, lookahead, batch)
            setting = {"temperature": float(sample), "batch": batch, "lookahead": lookahead, "vocabulary": size}
            setting |= {"swept_megabytes": sweep} if sweep else {}
            rows += rows_of(overheads(table, clock, tokens, repetitions), setting)
    shown = Table("system", "V", "T", "overhead ms a round", "forward ms a round", "beside Transformers")
    for row in rows:
        shown.add_row(
            row["system"],
            str(row["vocabulary"]),
            f"{row['temperature']:g}",
            f"{row['overhead_ms']:.3f} ({row['lowest_ms']:.3f}-{row['highest_ms']:.3f})",
            f"{row['forward_ms']:.2f}",
            f"{row['ratio_to_transformers']:.3f}" if "ratio_to_transformers" in row else "",
        )
    Console().print(shown)
    if json_file is not None:
        about = {
            "command": "python benchmarks/round_overhead.py --json FILE",
            "machine": machine(),
            "rows": rows,
        }
        json_file.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
