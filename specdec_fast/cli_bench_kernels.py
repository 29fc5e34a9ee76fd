"""``specdec-fast bench kernels``: what the ops cost, beside the reference and other projects' kernels."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from specdec_fast import console
from specdec_fast.cli_options import OUTPUT, JsonFileOption, TracebackOption
from specdec_fast.microbench import DTYPES, LAWS, OPS, RULES

__all__ = ["kernels"]

SHAPE, OTHERS, MEASURED = "Shapes (each may be given several times)", "Other projects", "Measurement"


def _several(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, rich_help_panel=SHAPE, show_default=False, help=text)


def _folder(name: str, text: str) -> Any:
    return typer.Option(name, metavar="DIR", rich_help_panel=OTHERS, show_default=False, help=text)


def kernels(
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", rich_help_panel=MEASURED, help="cpu, cuda or auto.")
    ] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", rich_help_panel=MEASURED, help="A small grid: about a minute.")
    ] = False,
    op: Annotated[list[str] | None, _several("--op", "NAME", "verify, sample, softmax, project, range_sums.")] = None,
    rule: Annotated[list[str] | None, _several("--rule", "NAME", "match, token, block.")] = None,
    law: Annotated[
        list[str] | None,
        _several("--law", "NAME", "point, dense, compact, or handed: dense, with the drafter's logsumexp known."),
    ] = None,
    filters: Annotated[
        bool | None, _several("--filters/--no-filters", "", "The target's top-k 50 and top-p 0.9.")
    ] = None,
    dtype: Annotated[list[str] | None, _several("--dtype", "NAME", "float32, bfloat16, float16.")] = None,
    batch: Annotated[list[int] | None, _several("--batch", "B", "Rows.")] = None,
    gamma: Annotated[list[int] | None, _several("--gamma", "N", "Draft positions.")] = None,
    vocab: Annotated[list[int] | None, _several("--vocab", "V", "Entries of the vocabulary.")] = None,
    acceptance: Annotated[list[float] | None, _several("--acceptance", "P", "Of a draft token, built in.")] = None,
    vllm: Annotated[str | None, _folder("--vllm", "vLLM 0.33: a checkout or its unpacked sdist.")] = None,
    sglang: Annotated[str | None, _folder("--sglang", "SGLang 0.5.23: a checkout or its unpacked wheel.")] = None,
    flashinfer: Annotated[str | None, _folder("--flashinfer", "FlashInfer 0.6.18: a folder with include/.")] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compiled/--no-compiled",
            rich_help_panel=OTHERS,
            show_default=False,
            help="torch.compile of the reference, seconds a shape. Default: yes, with --quick no.",
        ),
    ] = None,
    repetitions: Annotated[
        int | None,
        typer.Option(
            "--repetitions",
            metavar="N",
            rich_help_panel=MEASURED,
            show_default=False,
            help="Interleaved repetitions. Default: 50 on a GPU, 7 on a CPU.",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes",
            metavar="N",
            rich_help_panel=MEASURED,
            show_default=False,
            help="Begin no further shape after this time.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", rich_help_panel=MEASURED, help="Keep the rows of --json's file, measure the rest."),
    ] = False,
    json_file: JsonFileOption = None,
    markdown: Annotated[
        str | None,
        typer.Option(
            "--markdown", metavar="FILE", rich_help_panel=OUTPUT, show_default=False, help="Write the table here."
        ),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            rich_help_panel=OUTPUT,
            show_default=False,
            help="Draw the plot here, .svg or .png; needs matplotlib.",
        ),
    ] = None,
    show_traceback: TracebackOption = False,
) -> None:
    """Microseconds and bandwidth of the ops, beside the reference, its compiled form and other projects' kernels.

    Runs the ops' tests first and reports nothing where they fail. Every row holds a command that repeats it.
    """
    begin = time.monotonic()
    named = {"op": op, "rule": rule, "law": law, "dtype": dtype, "batch": batch, "gamma": gamma, "vocab": vocab}
    shapes: dict[str, list[Any]] = {name: list(values or ()) for name, values in named.items()}
    shapes |= {"filters": [] if filters is None else [filters], "acceptance": list(acceptance or ())}
    _check(shapes, quick=quick, repetitions=repetitions, minutes=minutes, resume=resume, json_file=json_file)
    if plot is not None:
        _plottable()
    import torch

    from specdec_fast.microbench import cases, clock, measure, peers, report

    place = _device(device)
    compiled = not quick if compiled is None else compiled
    if any(shapes.values()):
        chosen = cases.selected(shapes, place.type)
    else:
        chosen = cases.quick_grid() if quick else cases.grid(place.type)
    folders = {"vllm": vllm, "sglang": sglang, "flashinfer": flashinfer}
    done = json.loads(Path(json_file).read_text()) if resume and json_file and Path(json_file).exists() else []
    with console.working() as say:
        say("Loading")
        others = [peers.load(name, folder) for name, folder in folders.items() if folder is not None]
        files = measure.test_files([case.op for case in chosen], place)
        if files:
            say("Running the ops' tests")
        tested = measure.run_tests(files) if files else None
        say("Measuring the rate of a copy")
        count = repetitions or (50 if place.type == "cuda" else 7)
        plan = measure.Plan(clock.clock_for(place), count, others, compiled)
    shown = console.error_console()
    if tested is None:
        why = "pytest is not installed" if files else "the tests are not part of this installation"
        tested = f"not run: {why}. Every variant is held to the reference on the inputs that are timed."
    shown.print(f"tests: {tested}", soft_wrap=True)
    limit = float("inf") if minutes is None else begin + 60 * minutes
    rows = list(done)
    steps = measure.run(chosen, plan, done, lambda: limit - time.monotonic())
    with torch.inference_mode():
        for new in track(steps, "Measuring", total=len(chosen), console=shown, disable=not shown.is_terminal):
            rows += new
            if json_file is not None and new:  # what a run cut short has measured stays
                _write(json_file, report.as_json(rows))
    for shown_case in report.tables(rows):
        console.output_console().print(shown_case, "")
    missing = len({case for case in chosen} - {_case(row) for row in rows})
    if missing:
        shown.print(f"{missing} shapes are left: the same command with --resume measures them", soft_wrap=True)
    if json_file is not None:
        _write(json_file, report.as_json(rows))
    if markdown is not None:
        _write(markdown, report.markdown(rows, _command()))
    if plot is not None:
        report.draw(rows, Path(plot).expanduser())


def _case(row: dict[str, Any]) -> Any:
    from specdec_fast.microbench.cases import Case

    return Case(**{name: row[name] for name in Case.__dataclass_fields__})


def _check(
    shapes: dict[str, list[Any]],
    *,
    quick: bool,
    repetitions: int | None,
    minutes: float | None,
    resume: bool,
    json_file: str | None,
) -> None:
    for name, known in (("op", OPS), ("rule", RULES), ("law", LAWS), ("dtype", DTYPES)):
        for value in shapes[name]:
            if value not in known:
                raise ValueError(f"--{name} {value} is not known: use {', '.join(known)}")
    for name, least in (("batch", 1), ("gamma", 1), ("vocab", 64)):
        for value in shapes[name]:
            if value < least:
                raise ValueError(f"--{name} {value} is out of range: use {least} or more")
    for value in shapes["acceptance"]:
        if not 0.05 <= value <= 0.999:
            raise ValueError(f"--acceptance {value:g} is out of range: use 0.05 to 0.999")
    if quick and any(shapes.values()):
        raise ValueError("--quick has shapes of its own: leave it out, or the options that name some")
    if repetitions is not None and repetitions < 1:
        raise ValueError(f"--repetitions {repetitions} is out of range: use 1 or more")
    if minutes is not None and minutes <= 0:
        raise ValueError(f"--minutes {minutes:g} is out of range: use a number above 0")
    if resume and json_file is None:
        raise ValueError("--resume needs --json FILE, whose rows it keeps")


def _plottable() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install matplotlib")


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is not known: use cpu, cuda or auto")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return torch.device(name)


def _write(file: str, text: str) -> None:
    path = Path(file).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
