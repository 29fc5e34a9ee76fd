"""``specdec-fast verify``: whether a pair's output has the target's law."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from specdec_fast import console
from specdec_fast.cli_options import (
    DECODING,
    OUTPUT,
    DeviceOption,
    DrafterOption,
    DtypeOption,
    LookaheadOption,
    MethodOption,
    MinPOption,
    PickleOption,
    RemoteCodeOption,
    TargetOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    TracebackOption,
    VerificationOption,
)
from specdec_fast.console import Session, Settings

if TYPE_CHECKING:
    from specdec_fast.audit import GreedyAudit, SamplingAudit

__all__ = ["verify"]

AUDIT = "Audit"
# Neither flat nor one-hot behind most models, and short: a prompt is read anew for every sample
PROMPTS = ("The capital of France is", "Water boils at", 'print("Hello', "One, two,")
BATCH = 64
VERDICTS = ("fault", "inconclusive", "pass")  # the first that any part has is the whole one's
COLOURS = {"fault": "bold red", "inconclusive": "bold yellow", "pass": "bold green"}


def verify(
    target: TargetOption = None,
    drafter: DrafterOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: RemoteCodeOption = False,
    allow_pickle: PickleOption = False,
    method: MethodOption = "auto",
    verification: VerificationOption = "auto",
    num_assistant_tokens: LookaheadOption = None,
    sample: Annotated[
        bool | None,
        typer.Option(
            "--sample/--greedy",
            rich_help_panel=DECODING,
            help="Audit one of the two. Default: sampling alone where a sampling option is given, else both.",
            show_default=False,
        ),
    ] = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    min_p: MinPOption = None,
    chat: Annotated[
        bool,
        typer.Option("--chat/--no-chat", rich_help_panel=DECODING, help="Put prompts into the target's chat template."),
    ] = False,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            rich_help_panel=AUDIT,
            show_default=False,
            help="Prompts, one a line, or a .json list of texts or of objects with a text. Default: four short ones.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            metavar="N",
            rich_help_panel=AUDIT,
            show_default=False,
            help="How many first sampled tokens to test. Default: 3, or γ + 2 up to 6 where γ is given.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            metavar="N",
            rich_help_panel=AUDIT,
            show_default=False,
            help="Of each prompt. Default: as many as a total variation of 0.03 needs.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", rich_help_panel=AUDIT, help="Of the greedy comparison.")
    ] = 48,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            metavar="N",
            rich_help_panel=AUDIT,
            show_default=False,
            help=f"Rows of one call. Default: {BATCH}, or 1 with --generate.",
        ),
    ] = None,
    significance: Annotated[
        float,
        typer.Option("--significance", metavar="P", rich_help_panel=AUDIT, help="Chance of a false alarm."),
    ] = 0.01,
    seed: Annotated[int, typer.Option("--seed", metavar="N", rich_help_panel=AUDIT, help="Of the samples.")] = 0,
    generate: Annotated[
        str | None,
        typer.Option(
            "--generate",
            metavar="MODULE:FUNCTION",
            rich_help_panel=AUDIT,
            show_default=False,
            help="Audit this callable, generate(model, input_ids, **kwargs) as model.generate, and not fast_generate.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print one JSON object.")] = False,
    show_traceback: TracebackOption = False,
) -> None:
    """Show whether the output has the target's law: greedy by comparison, sampled by chi-square.

    Exits with 0 where both pass, with 1 on a fault or where the samples prove too little.
    """
    tokens = tokens if tokens is not None else min(num_assistant_tokens or 1, 4) + 2
    settings = Settings(
        target=target,
        drafter=drafter,
        method=method,
        verification=verification,
        max_new_tokens=max(max_new_tokens, tokens),
        num_assistant_tokens=num_assistant_tokens,
        sample=sample,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        chat=chat,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    settings.check()
    if seed < 0:
        raise ValueError(f"--seed {seed} is out of range: use 0 or more")
    for name, value, least in (("--tokens", tokens, 2), ("--samples", samples, 1), ("--batch", batch, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} {value} is out of range: use a number {least} or more")
    if not 0 < significance < 1:
        raise ValueError(f"--significance {significance} is out of range: use a number between 0 and 1")
    texts = list(PROMPTS) if prompts is None else console.read_prompts(prompts)
    greedily = not settings.do_sample
    sampled = settings.do_sample or (sample is None and temperature is None)
    foreign = None
    if generate is not None:
        if (method, verification) != ("auto", "auto"):
            raise ValueError("--method and --verification choose what fast_generate does: leave them out of --generate")
        foreign = _callable(generate)
    with console.working() as say:
        if sampled:
            from specdec_fast.audit import statistics

            statistics.need_scipy()
        session = console.open_session(settings, say)
        ids = [session.encode(text)["input_ids"] for text in texts]
    from specdec_fast.audit import audit_greedy, audit_sampling
    from specdec_fast.options import DEFAULT_LOOKAHEAD

    audited = _Own() if foreign is None else foreign
    common: dict[str, Any] = {
        "generate": audited,
        "arguments": _own_arguments(session) if foreign is None else _foreign_arguments(session),
        "positions": 1 + (num_assistant_tokens or DEFAULT_LOOKAHEAD),
    }
    greedy_report: GreedyAudit | None = None
    sampling_report: SamplingAudit | None = None
    with _bar() as progress:
        if greedily:
            greedy_report = audit_greedy(session.target, ids, tokens=max_new_tokens, progress=progress, **common)
        if sampled:
            sampling = replace(session, settings=replace(settings, sample=True)).sampling()
            sampling_report = audit_sampling(
                session.target,
                ids,
                sampling=sampling,
                tokens=tokens,
                samples=samples,
                batch=batch or (BATCH if foreign is None else 1),
                seed=seed,
                significance=significance,
                progress=progress,
                **common,
            )
    parts = [part for part in (greedy_report, sampling_report) if part is not None]
    verdict = next(name for name in VERDICTS if any(part.verdict == name for part in parts))
    speculation = audited.to_dict() if isinstance(audited, _Own) else None
    if as_json:
        report = {
            "verdict": verdict,
            "reason": next(part.reason for part in parts if part.verdict == verdict),
            "greedy": None if greedy_report is None else greedy_report.to_dict(),
            "sampling": None if sampling_report is None else sampling_report.to_dict(),
            "speculation": speculation,
            "prompts": texts,
            "settings": _effective(session, generate, sampling if sampled else {"do_sample": False}),
        }
        print(json.dumps(report, ensure_ascii=False))
    else:
        _show(session, texts, greedy_report, sampling_report, speculation, verdict)
    raise typer.Exit(0 if verdict == "pass" else 1)


# What is audited -----------------------------------------------------------------------------------------------------


class _Own:
    """``fast_generate``, and what its calls did."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(("drafted", "accepted", "committed", "row_rounds"), 0)
        self._names: set[tuple[str, str]] = set()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from specdec_fast import fast_generate, last_speculation

        output = fast_generate(*arguments, **options)
        statistics = last_speculation()
        assert statistics is not None
        self._names.add((statistics.method, statistics.verification))
        for name in self._counts:
            self._counts[name] += getattr(statistics, name)
        return output

    def to_dict(self) -> dict[str, Any]:
        """The sums over all calls, and which methods and rules ran."""
        return {**self._counts, "ran": [{"method": m, "verification": v} for m, v in sorted(self._names)]}


def _own_arguments(session: Session) -> dict[str, Any]:
    arguments = session.speculation(None)
    del arguments["seed"]  # drawn from torch's generator, which the audit seeds
    return arguments


def _foreign_arguments(session: Session) -> dict[str, Any]:
    """What ``model.generate`` takes: tokenizers only where the two differ, as Transformers wants it."""
    from specdec_fast.methods import logit_width
    from specdec_fast.vocab import Vocabulary, same_tokenizer

    assert session.drafter is not None  # every method but "auto" is refused beside --generate
    arguments: dict[str, Any] = {"assistant_model": session.drafter}
    widths = (logit_width(session.target), logit_width(session.drafter))
    own, other = Vocabulary.of(session.tokenizer), Vocabulary.of(session.drafter_tokenizer)
    if not same_tokenizer(own, other, *widths):
        arguments |= {"tokenizer": session.tokenizer, "assistant_tokenizer": session.drafter_tokenizer}
    if session.settings.num_assistant_tokens is not None:
        arguments["num_assistant_tokens"] = session.settings.num_assistant_tokens
    return arguments


def _callable(name: str) -> Callable[..., Any]:
    """The callable behind ``module:function``; modules of the working folder are found too."""
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise ValueError(f"--generate {name}: write module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for attribute in path.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--generate {name} was not found: {error}") from error
    if not callable(found):
        raise ValueError(f"--generate {name} is no function")
    return found


# What is shown -------------------------------------------------------------------------------------------------------


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on a terminal, else one line a step."""
    out = console.error_console()
    last: list[Any] = [None, None]
    if not out.is_terminal:

        def line(what: str, done: int, whole: int) -> None:
            if what != last[0]:
                last[0] = what
                out.print(f"Auditing: {what}", soft_wrap=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True) as bar:

        def show(what: str, done: int, whole: int) -> None:
            if what != last[0]:
                if last[1] is not None:
                    bar.remove_task(last[1])
                last[:] = [what, bar.add_task(what, total=whole)]
            bar.update(last[1], completed=done, total=whole)

        yield show


def _effective(session: Session, generate: str | None, sampling: dict[str, Any]) -> dict[str, Any]:
    settings = asdict(session.settings)
    del settings["sample"]
    settings |= {name: sampling.get(name) for name in ("do_sample", "temperature", "top_p", "top_k", "min_p")}
    settings |= {"target": session.target_path, "drafter": session.drafter_path, "generate": generate}
    settings |= {"dtype": str(session.target.dtype).removeprefix("torch."), "device": str(session.target.device)}
    return settings


def _show(
    session: Session,
    texts: list[str],
    greedy: GreedyAudit | None,
    sampling: SamplingAudit | None,
    speculation: dict[str, Any] | None,
    verdict: str,
) -> None:
    out = console.output_console()
    facts = console.plain_table()
    facts.add_row("target", console.name_of(session.target_path))
    if session.drafter_path is not None:
        facts.add_row("drafter", console.name_of(session.drafter_path))
    if speculation is not None:
        ran = ", ".join(f"{one['method']} with rule {one['verification']}" for one in speculation["ran"])
        rounds = speculation["committed"] / max(speculation["row_rounds"], 1)
        drafted = f"{speculation['accepted']} of {speculation['drafted']} draft tokens accepted"
        facts.add_row("audited", f"{ran}; {drafted}, {rounds:.2f} tokens a round")
    out.print(facts)
    if greedy is not None:
        out.print()
        out.print(_greedy_table(session, greedy))
        out.print(_line("greedy", greedy.verdict, greedy.reason), soft_wrap=True)
    if sampling is not None:
        out.print()
        out.print(_sampling_table(texts, sampling))
        out.print(_line("sampling", sampling.verdict, sampling.reason), soft_wrap=True)
    out.print()
    out.print(Text.assemble("verdict: ", (verdict, COLOURS[verdict])))


def _line(what: str, verdict: str, reason: str) -> Text:
    return Text.assemble(f"{what}: ", (verdict, COLOURS[verdict]), f", {reason}")


def _greedy_table(session: Session, greedy: GreedyAudit) -> Table:
    table = console.plain_table(f"Greedy, {greedy.dtype}, beside model.generate")
    for number, case in enumerate(greedy.cases, 1):
        found = case.divergence
        if found is None:
            text = f"{case.compared} tokens, all the same"
        elif found.margin is None:
            text = f"one output ends behind token {found.position}"
        else:
            pair = " and ".join(repr(session.decode([token])) for token in found.tokens)
            text = (
                f"token {found.position + 1} differs: {pair} are {found.margin:.3g} apart, scores move by "
                f"{found.spread:.3g} ({'a tie' if found.tie else 'no tie'})"
            )
        table.add_row(f"prompt {number}", text)
    return table


def _sampling_table(texts: list[str], sampling: SamplingAudit) -> Table:
    title = f"First {sampling.tokens} sampled tokens, {sampling.samples} samples, {sampling.dtype}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("test", "samples", "cells", "chi-square", "p", "corrected", "finds"):
        table.add_column(name, justify="left" if name == "test" else "right", style="dim" if name == "test" else None)
    for test in sampling.tests:
        places = {"prompt": f"prompt {(test.prompt or 0) + 1}"}
        places["positions"] = f"tokens {test.positions[0]} and {test.positions[1]}"
        name = places.get(test.of, test.of)
        table.add_row(
            name,
            str(test.samples),
            str(test.cells),
            f"{test.statistic:.1f} on {test.degrees}",
            f"{test.p_value:.2g}",
            f"{test.corrected:.2g}",
            f"{test.detectable:.3f}",
        )
    told = ", ".join(f"{100 * part:.0f} %" for part in sampling.split)
    table.caption = f"told apart by cells, token by token: {told}; the target's own spread: {sampling.spread:.2g}"
    table.caption_justify = "left"
    return table
