"""``specdec-fast bench``: measurements a user can repeat."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.progress import track
from rich.table import Table

from specdec_fast import console
from specdec_fast.cli_bench_kernels import kernels
from specdec_fast.cli_options import (
    DECODING,
    ChatOption,
    CompileOption,
    DeviceOption,
    DrafterOption,
    DtypeOption,
    JsonFileOption,
    LookaheadOption,
    PickleOption,
    RemoteCodeOption,
    TargetOption,
    TracebackOption,
)
from specdec_fast.console import Session, Settings

__all__ = ["bench"]

MEASURED = "Measurement"
COMPILES = ("auto", "off", "static", "inductor")
METHODS = "auto,tli,projection,slem,slrs"
SAME = "auto,prompt_lookup"
PROMPTS = (
    "Write a Python function that merges two sorted lists.",
    "Explain in a few sentences why the sky is blue.",
    "A train covers 180 km in 2 hours. How far does it get in 5 hours? Show the steps.",
    "Write a Python class for a stack with push, pop and peek.",
)

bench = typer.Typer(name="bench", help="Measure on this machine.", no_args_is_help=True)


@bench.callback()
def _root() -> None:
    pass


bench.command("kernels")(kernels)


@bench.command("generate")
def generate(
    target: TargetOption = None,
    drafter: DrafterOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: RemoteCodeOption = False,
    allow_pickle: PickleOption = False,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="A,B",
            rich_help_panel=DECODING,
            show_default=False,
            help=f"Default: {METHODS}; with one tokenizer {SAME}. Plain decoding is always measured.",
        ),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            "--temperature",
            metavar="T",
            rich_help_panel=DECODING,
            show_default=False,
            help="0 is greedy; may be given several times. Default: 0 and 1.",
        ),
    ] = None,
    num_assistant_tokens: LookaheadOption = None,
    compile: CompileOption = "auto",  # the field's name for it, and nobody calls the builtin here
    chat: ChatOption = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            rich_help_panel=MEASURED,
            show_default=False,
            help="Prompts, one a line, or a .json list of texts or of objects with a text. Default: four.",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", rich_help_panel=MEASURED, help="New tokens a row.")
    ] = 64,
    batch: Annotated[
        int, typer.Option("--batch", metavar="B", rich_help_panel=MEASURED, help="Rows of a call: prompts together.")
    ] = 1,
    repetitions: Annotated[
        int, typer.Option("--repetitions", metavar="N", rich_help_panel=MEASURED, help="Interleaved repetitions.")
    ] = 3,
    json_file: JsonFileOption = None,
    show_traceback: TracebackOption = False,
) -> None:
    """Tokens per second of Transformers' generate and assisted generation, our plain decoding and our methods."""
    for name, value in (("--tokens", tokens), ("--batch", batch), ("--repetitions", repetitions)):
        if value < 1:
            raise ValueError(f"{name} {value} is out of range: use 1 or more")
    settings = Settings(
        target=target,
        drafter=drafter,
        max_new_tokens=tokens,
        num_assistant_tokens=num_assistant_tokens,
        chat=chat,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    settings.check()
    if compile not in COMPILES:
        raise ValueError(f"--compile {compile} is not known: use one of {', '.join(COMPILES)}")
    temperatures = temperature or [0.0, 1.0]
    if any(t < 0 for t in temperatures):
        raise ValueError("--temperature is out of range: use a number 0 or more")
    written = None if json_file is None else console.output_file("--json", json_file)
    names = None if methods is None else _named(methods)
    texts = list(PROMPTS) if prompts is None else console.read_prompts(prompts)
    with console.working() as say:
        session = console.open_session(settings, say)
        if names is None:
            names = _usual(session)
        session.tokenizer.padding_side = "left"
        inputs = [_encoded(session, texts, first, batch) for first in range(0, len(texts), batch)]
    rows = []
    for t in temperatures:
        rows += _measured(session, names, inputs, t, batch, tokens, num_assistant_tokens, repetitions, compile)
    console.output_console().print(_table(rows))
    if written is not None:
        written.write_text(json.dumps(rows, indent=1) + "\n")


def _measured(
    session: Session,
    names: list[str],
    inputs: list[dict[str, Any]],
    temperature: float,
    batch: int,
    tokens: int,
    lookahead: int | None,
    repetitions: int,
    compile: str,
) -> list[dict[str, Any]]:
    from specdec_fast import bench as measuring

    pair = {
        "target": session.target,
        "tokenizer": session.tokenizer,
        "drafter": session.drafter,
        "drafter_tokenizer": session.drafter_tokenizer,
    }
    table = measuring.systems(
        pair, names, temperature=temperature, batch=batch, tokens=tokens, lookahead=lookahead, compile=compile
    )
    steps = measuring.measure(
        table, inputs, temperature=temperature, repetitions=repetitions, synchronize=session.synchronize
    )
    shown = console.error_console()
    done = track(steps, f"T={temperature:g}", total=repetitions, console=shown, disable=not shown.is_terminal)
    return [row.to_dict() for row in list(done)[-1]]


def _named(methods: str) -> list[str]:
    from specdec_fast.options import METHODS as KNOWN

    names = [name.strip() for name in methods.split(",") if name.strip()]
    for name in names:
        if name not in KNOWN:
            raise ValueError(f"--methods {name} is not known: use some of {', '.join(KNOWN)}")
    return names


def _usual(session: Session) -> list[str]:
    from specdec_fast.vocab import Vocabulary, same_tokenizer

    alike = same_tokenizer(Vocabulary.of(session.tokenizer), Vocabulary.of(session.drafter_tokenizer))
    return (SAME if alike else METHODS).split(",")


def _encoded(session: Session, texts: list[str], first: int, batch: int) -> dict[str, Any]:
    """One call's prompts, ``[B, P]`` padded on the left; the list begins anew where it does not fill a batch."""
    chosen = [texts[(first + i) % len(texts)] for i in range(batch)]
    if batch == 1:
        return session.encode(chosen[0])
    for text in chosen:
        session.encode(text)  # refuses what does not fit
    if session.chat:
        chosen = [
            session.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            for text in chosen
        ]
    if session.tokenizer.pad_token is None:
        session.tokenizer.pad_token = session.tokenizer.eos_token
    encoded = session.tokenizer(chosen, return_tensors="pt", padding=True, add_special_tokens=not session.chat)
    return {name: encoded[name].to(session.target.device) for name in ("input_ids", "attention_mask")}


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="tokens/s, medians of interleaved repetitions", title_justify="left")
    for name in ("system", "method", "rule", "T", "B", "tokens/s", "lowest-highest", "/ generate", "/ plain"):
        table.add_column(name, justify="left" if name in ("system", "method", "rule") else "right")
    for name in ("acceptance", "tokens/round", "as plain"):
        table.add_column(name, justify="right")
    for row in rows:
        chosen = row["ran"] if row["method"] == "auto" else None
        share, block, same = row["acceptance_rate"], row["block_efficiency"], row["identical_to_plain"]
        table.add_row(
            row["system"],
            row["method"] + (f" ({chosen})" if chosen else ""),
            row["verification"] or "",
            f"{row['temperature']:g}",
            str(row["batch"]),
            f"{row['tokens_per_second']:.1f}",
            f"{row['lowest']:.1f}-{row['highest']:.1f}",
            f"{row['ratio_to_transformers']:.2f}",
            f"{row['ratio_to_plain']:.2f}",
            "" if share is None else f"{share:.2f}",
            "" if block is None else f"{block:.2f}",
            "" if same is None else "yes" if same else "no",
        )
    return table
