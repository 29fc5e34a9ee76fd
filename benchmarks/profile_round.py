"""Where the time of a call goes on a CPU: before the first round, in it, and in the rounds behind it, part by part.

    python benchmarks/profile_round.py --trace FOLDER

The pair is the default target and the drafter that ships with the package, or ``--target`` and ``--drafter``. Parts are
timed from inside by wrapping what they call; a part's time is its own, without that of parts it calls, and the wrapping
costs about a microsecond each. The operation that runs a drafter's steps reports what its passes took; the rest of it
is choosing. Of the one that scores a draft and judges it, the rest is verification. ``--trace`` also writes a Chrome
trace of one more call at each temperature, made by torch's profiler with the same names (chrome://tracing or
ui.perfetto.dev show it). ``docs/profile.md`` reads the result.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table

from specdec_fast import fast_generate, last_speculation, pretrained
from specdec_fast.drafters.model import ModelWriter
from specdec_fast.engine import Engine
from specdec_fast.fused import Fused
from specdec_fast.lean_ops import Session
from specdec_fast.text import TextProposer

TARGET, DRAFTER, CHOOSING, DRAFTING = "target's pass", "drafter's passes", "choosing", "rest of drafting"
TRANSLATING, VERIFYING, COMMIT = "text into the other's tokens", "verification", "commit"
REST, OUTSIDE = "rest of the round", "outside of rounds"
PARTS = (TARGET, DRAFTER, CHOOSING, TRANSLATING, DRAFTING, VERIFYING, COMMIT, REST)
TEXT = (
    "Write a Python class for a bank account with methods to deposit, withdraw and transfer money, which raise an "
    "error where the balance does not suffice. Then write tests for each of them."
)


class Profile:
    """Seconds of each part, round by round; the first entry is what came before the first round.

    Args:
        marked: also mark the parts for torch's profiler.
    """

    def __init__(self, marked: bool = False):
        self.rounds: list[Counter[str]] = [Counter()]
        self._marked = marked
        self._inner = [0.0]  # seconds of wrapped calls inside each one that is open
        self._drafting = 0

    def part(
        self, name: str, function: Callable[..., Any], passed: Callable[[Any], int] | None = None
    ) -> Callable[..., Any]:
        """The function, its own time counted under a name; a model's pass is the drafter's inside of drafting.

        Args:
            passed: reads from its result how many nanoseconds of it were passes of a model, the drafter's of one that
                chooses, the target's of another.
        """

        @functools.wraps(function, assigned=("__doc__",), updated=())  # the signature stays
        def timed(*arguments: Any, **named: Any) -> Any:
            own = DRAFTER if name == TARGET and self._drafting else name
            if name == REST:
                self.rounds.append(Counter())
            self._drafting += name == DRAFTING
            self._inner.append(0.0)
            mark = torch.profiler.record_function(own) if self._marked else contextlib.nullcontext()
            begin = time.perf_counter()
            try:
                with mark:
                    result = function(*arguments, **named)
            finally:
                whole = time.perf_counter() - begin
                self.rounds[-1][own] += whole - self._inner.pop()
                self._inner[-1] += whole
                self._drafting -= name == DRAFTING
            if passed is not None:  # the operation does both
                passes = 1e-9 * passed(result)
                self.rounds[-1].update({DRAFTER if name == CHOOSING else TARGET: passes, name: -passes})
            return result

        return timed

    @contextlib.contextmanager
    def running(self, *models: Any) -> Iterator[None]:
        """Times calls inside."""
        ops = torch.ops.specdec_fast
        kinds = {type(part) for model in models for part in (model, model.base_model)}
        wrapped: list[tuple[Any, ...]] = [
            (Engine, "_round", REST),
            (Engine, "_commit", COMMIT),
            (Engine, "_learn", COMMIT),
            (Engine, "_settle", COMMIT),
            (Engine, "_draft", DRAFTING),
            (ModelWriter, "read", TRANSLATING),
            (TextProposer, "propose", TRANSLATING),
            (Fused, "verify", VERIFYING),
            (Engine, "_judge", VERIFYING),
            (ops, "llama_read", TARGET),
            (ops, "llama_forward", TARGET),
            (Session, "judge", VERIFYING, lambda report: report[-2]),
            (Session, "draft", CHOOSING, lambda report: report[-1]),
            *((kind, "forward", TARGET) for kind in kinds),
        ]
        with contextlib.ExitStack() as stack:
            for owner, attribute, *how in wrapped:
                timed = self.part(how[0], getattr(owner, attribute), *how[1:])
                stack.enter_context(mock.patch.object(owner, attribute, timed))
            yield


def table_of(profile: Profile, seconds: float, title: str) -> Table:
    """First round, later rounds, and shares of the call."""
    first, later = profile.rounds[1], profile.rounds[2:]
    table = Table("part", "first round, ms", "a later round, ms", "share of the call", title=title)
    for name in PARTS:
        usual = statistics.median([own[name] for own in later]) if later else 0.0
        share = sum(own[name] for own in profile.rounds[1:]) / seconds
        table.add_row(name, f"{1e3 * first[name]:.3f}", f"{1e3 * usual:.3f}", f"{share:.1%}")
    inside = sum(sum(own.values()) for own in profile.rounds[1:])
    table.add_row(OUTSIDE, f"{1e3 * (seconds - inside):.3f}", "", f"{1 - inside / seconds:.1%}")
    return table


def main(
    target: Annotated[Path | None, typer.Option(help="Folder of the target.")] = None,
    drafter: Annotated[Path | None, typer.Option(help="Folder of the drafter.")] = None,
    tokens: Annotated[int, typer.Option(help="New tokens a call.")] = 128,
    lookahead: Annotated[int, typer.Option(help="Draft tokens a round; 0: the adaptive lookahead decides.")] = 0,
    trace: Annotated[Path | None, typer.Option(help="Folder for Chrome traces.")] = None,
) -> None:
    """What a call's parts take, at T=0 and T=1."""
    model, tokenizer = pretrained.load(target or pretrained.default_target(), dtype=torch.bfloat16)
    other, own = pretrained.load(drafter or pretrained.default_drafter(), dtype=torch.bfloat16)
    pair = {"assistant_model": other, "tokenizer": tokenizer, "assistant_tokenizer": own}
    chat = [{"role": "user", "content": TEXT}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    console = Console()
    for sample in (False, True):
        settings: dict[str, Any] = {"do_sample": sample, "max_new_tokens": tokens}
        settings |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}
        settings |= {"num_assistant_tokens": lookahead} if lookahead else {}

        def call(settings: dict[str, Any] = settings) -> None:
            fast_generate(model, **inputs, **pair, **settings)

        for _ in range(2):  # costs are measured once a pair
            call()
        profile = Profile()
        with profile.running(model, other):
            begin = time.perf_counter()
            call()
            seconds = time.perf_counter() - begin
        done = last_speculation()
        assert done is not None
        title = (
            f"T={int(sample)}, {torch.get_num_threads()} threads, {done.method}: {done.committed} tokens in "
            f"{done.rounds} rounds, {done.drafted} drafted, {done.accepted} accepted, {1e3 * seconds:.0f} ms; "
            f"passes: {done.forward}"
        )
        console.print(table_of(profile, seconds, title))
        if trace is not None:
            trace.mkdir(parents=True, exist_ok=True)
            with torch.profiler.profile() as recorded, Profile(marked=True).running(model, other):
                call()
            recorded.export_chrome_trace(str(trace / f"temperature_{int(sample)}.json"))


if __name__ == "__main__":
    typer.run(main)
