"""``specdec-fast plan``: what speculation can bring a pair, before it is used."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from specdec_fast import console
from specdec_fast.cli_options import (
    DECODING,
    OUTPUT,
    ChatOption,
    DeviceOption,
    DrafterOption,
    DtypeOption,
    JsonFileOption,
    MethodOption,
    PickleOption,
    RemoteCodeOption,
    TargetOption,
    TracebackOption,
)
from specdec_fast.console import Session, Settings

if TYPE_CHECKING:
    from specdec_fast.plan import Acceptance, Forecast
    from specdec_fast.prepared import Prepared

__all__ = ["plan"]

MEASURED = "Measurement"
DRAWN = (".svg", ".png", ".pdf")
SHOWN = (1, 2, 3, 4, 6, 8, 12, 16)  # positions of a pass


def plan(
    target: TargetOption = None,
    drafter: DrafterOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: RemoteCodeOption = False,
    allow_pickle: PickleOption = False,
    method: MethodOption = "auto",
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", rich_help_panel=DECODING, help="0 is greedy.")
    ] = 0.0,
    chat: ChatOption = None,
    acceptance: Annotated[
        float | None,
        typer.Option(
            "--acceptance",
            metavar="A",
            rich_help_panel=MEASURED,
            show_default=False,
            help="Take this acceptance, the same at every position of a draft.",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            rich_help_panel=MEASURED,
            show_default=False,
            help="Measure the acceptance on these prompts: one a line, or a .json list of texts.",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", rich_help_panel=MEASURED, help="New tokens a prompt.")
    ] = 64,
    batch: Annotated[int, typer.Option("--batch", metavar="B", rich_help_panel=MEASURED, help="Rows of a call.")] = 1,
    repetitions: Annotated[
        int, typer.Option("--repetitions", metavar="N", rich_help_panel=MEASURED, help="How often a pass is timed.")
    ] = 5,
    json_file: JsonFileOption = None,
    plot: Annotated[
        str | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            rich_help_panel=OUTPUT,
            show_default=False,
            help="Draw speed against lookahead (.svg, .png, .pdf); needs matplotlib.",
        ),
    ] = None,
    show_traceback: TracebackOption = False,
) -> None:
    """Measure what a pair's rounds cost, and show what chains can bring at which acceptance and lookahead."""
    for name, value in (("--tokens", tokens), ("--batch", batch), ("--repetitions", repetitions)):
        if value < 1:
            raise ValueError(f"{name} {value} is out of range: use 1 or more")
    if temperature < 0:
        raise ValueError(f"--temperature {temperature:g} is out of range: use a number 0 or more")
    if acceptance is not None and not 0 <= acceptance <= 1:
        raise ValueError(f"--acceptance {acceptance:g} is out of range: use a number from 0 to 1")
    if acceptance is not None and prompts is not None:
        raise ValueError("--acceptance and --prompts exclude each other: leave one out")
    written = None if json_file is None else console.output_file("--json", json_file)
    drawn = None if plot is None else console.output_file("--plot", plot, DRAWN)
    pyplot = None if plot is None else _pyplot()
    settings = Settings(
        target=target,
        drafter=drafter,
        method=method,
        max_new_tokens=tokens,
        temperature=temperature,
        sample=temperature > 0,
        chat=chat,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    settings.check()
    texts = None if prompts is None else console.read_prompts(prompts)
    with console.working() as say:
        session = console.open_session(settings, say)
        found = _forecast(session, say, texts, acceptance, temperature, tokens, batch, repetitions)
    _show(found)
    if written is not None:
        written.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    if drawn is not None:
        _draw(pyplot, found, str(drawn))


def _forecast(
    session: Session,
    say: Any,
    texts: list[str] | None,
    acceptance: float | None,
    temperature: float,
    tokens: int,
    batch: int,
    repetitions: int,
) -> Forecast:
    from specdec_fast.plan import Acceptance, forecast

    say("Measuring passes and drafts")
    pair = _prepared(session, temperature, batch, repetitions, texts)
    sampled = temperature > 0
    costs, ran = pair.costs(do_sample=sampled), pair.speculation[sampled]
    if costs is None:
        raise ValueError(f"there is nothing to plan: {ran.method} drafts nothing here ({ran.reason})")
    known: Acceptance | None = None
    if acceptance is not None:
        known = Acceptance.even(acceptance)
    elif texts is not None:
        known = _measured(session, say, pair, texts, sampled, tokens)
        costs = pair.costs(do_sample=sampled) or costs
    found = forecast(costs, known)
    found.about.update(
        target=session.target_path,
        drafter=session.drafter_path,
        method=ran.method,
        verification=ran.verification,
        temperature=temperature,
        batch=batch,
    )
    return found


def _prepared(session: Session, temperature: float, batch: int, repetitions: int, texts: list[str] | None) -> Prepared:
    from specdec_fast.prepared import prepare

    text = texts[0] if texts else "Write a Python function that merges two sorted lists, and explain how it works."
    own = {name: value for name, value in session.speculation(None).items() if name != "seed"}
    own["draft_tree"] = "off"  # what is shown goes by the lookahead of chains
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": 0} if temperature else {}
    return prepare(
        session.target,
        do_sample=temperature > 0,
        batch=batch,
        inputs=session.encode(text)["input_ids"],
        repetitions=repetitions,
        **own,
        **sampling,
    )


def _measured(session: Session, say: Any, pair: Prepared, texts: list[str], sampled: bool, tokens: int) -> Acceptance:
    from specdec_fast.plan import measure_acceptance

    def prompts() -> Any:
        for number, text in enumerate(texts, 1):
            say(f"Measuring the acceptance, prompt {number} of {len(texts)}")
            yield session.encode(text)

    return measure_acceptance(pair, prompts(), max_new_tokens=tokens, do_sample=sampled)


def _show(found: Forecast) -> None:
    out, costs, about = console.output_console(), found.costs, found.about
    unit = 1e3 if costs.measured else 1.0
    sizes = [q for q in SHOWN if q <= len(costs.score)]
    head = console.plain_table()
    head.add_row("pair", f"{about['target']} <- {about['drafter'] or 'no drafter model'}")
    head.add_row("method", f"{about['method']}, rule {about['verification']}, T={about['temperature']:g}")
    passes = ", ".join(f"{unit * costs.scoring(q):.3g}" for q in sizes)
    head.add_row("target's pass", f"{passes} ms at {', '.join(map(str, sizes))} positions")
    head.add_row("draft", f"{unit * costs.start:.3g} ms and {unit * costs.step:.3g} ms a token")
    head.add_row("round beside", f"{unit * costs.rest:.3g} ms; plain decoding {1 / costs.round(0):.3g} tokens/s")
    out.print(head)
    columns = "acceptance", *(f"γ={gamma}" for gamma in found.gammas), "best"
    # Narrow enough for 80 columns, which is what a pipe gets
    table = Table(*columns, title="speed beside plain decoding", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for share, row in found.table.items():
        gamma, speed = found.best_of[share]
        cells = (Text(f"{s:.2f}", style="bold" if s == max(row) and s > 1 else "") for s in row)
        table.add_row(f"{share:.2f}", *cells, f"γ={gamma}, {speed:.2f}x" if gamma else "no drafting")
    out.print(table)
    if found.acceptance is None or found.best is None:
        return
    gamma, speed = found.best
    shares = ", ".join(f"{share:.2f}" for share in found.acceptance.positions)
    tested = found.acceptance.tested
    line = console.plain_table()
    line.add_row("acceptance", f"{shares}" + (f" (first position: {tested[0]} tested)" if tested else " (assumed)"))
    line.add_row("speed by γ", ", ".join(f"{g}: {s:.2f}" for g, s in enumerate(found.speeds)))
    line.add_row("best", f"γ={gamma}, {speed:.3f}x plain decoding" if gamma else "no drafting: no lookahead pays")
    out.print(line)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'specdec_fast[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw(pyplot: Any, found: Forecast, file: str) -> None:
    from specdec_fast.plan import LONGEST, speedup

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    gammas = list(range(LONGEST + 1))
    for share in found.table:
        speeds = [speedup((share,) * LONGEST, found.costs, gamma) for gamma in gammas]
        (drawn,) = axes.plot(gammas, speeds, linewidth=1.2, label=f"{share:.1f}")
        gamma, speed = found.best_of[share]
        axes.plot([gamma], [speed], "o", color=drawn.get_color(), markersize=4)
    if found.speeds and found.acceptance is not None and found.acceptance.tested:
        axes.plot(range(len(found.speeds)), found.speeds, "k", linewidth=2, label="measured")
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    axes.set_xlabel("lookahead γ")
    axes.set_ylabel("speed beside plain decoding")
    axes.legend(title="acceptance", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
