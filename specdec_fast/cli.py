"""The command line: ``specdec-fast generate``, ``demo``, ``verify``, ``plan``, ``bench`` and ``env``."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from specdec_fast import __version__, console, environment
from specdec_fast.cli_bench import bench
from specdec_fast.cli_options import (
    DECODING,
    OUTPUT,
    TRACEBACK,
    ChatOption,
    DeviceOption,
    DrafterOption,
    DtypeOption,
    LookaheadOption,
    MaxNewTokensOption,
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
from specdec_fast.cli_plan import plan
from specdec_fast.cli_verify import verify
from specdec_fast.console import Session, Settings

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """Turns whatever goes wrong into one line and an exit status."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        given = arguments[0] if arguments else options.get("args")
        given = sys.argv[1:] if given is None else given
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a model writes characters some terminals lack
        options["standalone_mode"] = False
        try:
            status = super().main(*arguments, **options)
            sys.stdout.flush()
        except KeyboardInterrupt:
            status = 130
        except BrokenPipeError:
            # The reader has left; Python would complain about it once more when it closes stdout
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 1  # as typer, which catches the same before this flush
        except Exception as error:
            if "--traceback" in given or os.environ.get(TRACEBACK, "0") not in ("", "0"):
                traceback.print_exc()
            line = Text.assemble(("error: ", "bold red"), _one_line(error))
            console.error_console().print(line, soft_wrap=True)
            status = 2
        sys.exit(status if isinstance(status, int) else 0)


# What the API calls by an argument's name is an option here
_NAMES = {"allow_pickle=True": "--allow-pickle", "trust_remote_code=True": "--trust-remote-code"}


def _one_line(error: Exception) -> str:
    if hasattr(error, "format_message"):  # a mistake on the command line, as click and typer report it
        text = error.format_message()
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    else:
        text = str(error)
        expected = isinstance(error, ValueError | TypeError | OSError | ImportError | RuntimeError)
        if not (expected and text):
            text = f"{type(error).__name__}: {text} (--traceback shows where)"
    for name, option in _NAMES.items():
        text = text.replace(name, option)
    return " ".join(text.split())


app = typer.Typer(
    cls=_Commands,
    name="specdec-fast",
    help="Lossless speculative decoding for Hugging Face models, with any drafter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The console script."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        print(f"specdec-fast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", show_default=False, help="The prompt; - reads it from stdin.")
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", metavar="FILE", help="Read the prompt from a file (- for stdin).")
    ] = None,
    target: TargetOption = None,
    drafter: DrafterOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: RemoteCodeOption = False,
    allow_pickle: PickleOption = False,
    method: MethodOption = "auto",
    verification: VerificationOption = "auto",
    max_new_tokens: MaxNewTokensOption = 256,
    num_assistant_tokens: LookaheadOption = None,
    sample: Annotated[
        bool | None,
        typer.Option(
            "--sample/--greedy",
            rich_help_panel=DECODING,
            help="Sample, or take the most probable token. Default: greedy, unless a sampling option is given.",
            show_default=False,
        ),
    ] = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    min_p: MinPOption = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="N", rich_help_panel=DECODING, help="Makes a sampled text repeat."),
    ] = None,
    chat: ChatOption = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", rich_help_panel=OUTPUT, help="Print one JSON object: text, counts, speed, statistics."),
    ] = False,
    stream: Annotated[
        bool,
        typer.Option("--stream/--no-stream", rich_help_panel=OUTPUT, help="Write the text while it is generated."),
    ] = True,
    show_traceback: TracebackOption = False,
) -> None:
    """Generate text: the text to stdout, progress and statistics to stderr."""
    settings = Settings(
        target=target,
        drafter=drafter,
        method=method,
        verification=verification,
        max_new_tokens=max_new_tokens,
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
    text = _read_prompt(prompt, file)
    with console.working() as say:
        session = console.open_session(settings, say)
        inputs = session.encode(text)
    from specdec_fast import fast_generate, last_speculation
    from specdec_fast.sources import beginning

    arguments = {**inputs, **session.sampling(), **session.speculation(seed), "max_new_tokens": max_new_tokens}
    streaming = stream and not as_json
    if streaming:
        arguments["streamer"] = console.TextStream(session.tokenizer, console.write_out)
    # Nothing moves on the screen until the whole text is there
    waiting = nullcontext() if streaming else console.working()
    with waiting as say:
        if say is not None:
            say("Generating")
        begin = time.perf_counter()
        ids = fast_generate(session.target, **arguments)
        session.synchronize()
        seconds = time.perf_counter() - begin
    new = ids[0, beginning(session.target, inputs["input_ids"]).shape[1] :]
    written = session.decode(new)
    statistics = last_speculation()
    assert statistics is not None
    speed = len(new) / seconds
    if as_json:
        report = {
            "text": written,
            "prompt_tokens": inputs["input_ids"].shape[1],
            "new_tokens": len(new),
            "seconds": seconds,
            "tokens_per_second": speed,
            "speculation": statistics.to_dict(),
            "settings": _effective(session),
        }
        print(json.dumps(report, ensure_ascii=False))
        return
    if not streaming:
        console.write_out(written)
    console.write_out("\n")
    table = console.plain_table()
    table.add_row("speed", f"{speed:.1f} tokens/s ({len(new)} tokens in {seconds:.2f} s, first-call costs included)")
    for name, value in console.figures(statistics.to_dict()):
        table.add_row(name, value)
    table.add_row("why", statistics.reason)
    out = console.error_console()
    out.print()
    out.print(table)


def _read_prompt(prompt: str | None, file: str | None) -> str:
    """The prompt from whichever of the three ways was used, without the line end that closes a file."""
    if prompt is not None and file is not None:
        raise ValueError("there are two prompts: leave out --file or the argument")
    if prompt is None and file is None:
        raise ValueError("there is no prompt: give it as an argument, with --file, or - to read stdin")
    if prompt is not None and prompt != "-":
        # As the bytes that were typed: where the locale is not UTF-8, Python hands on surrogates
        data = prompt.encode("utf-8", "surrogateescape")
    elif file is None or file == "-":
        data = sys.stdin.buffer.read()
    else:
        data = Path(file).expanduser().read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt is not UTF-8 text: {error}") from error
    if prompt is None or prompt == "-":
        text = text.removesuffix("\n").removesuffix("\r")
    if not text.strip():
        raise ValueError("the prompt is empty")
    return text


def _effective(session: Session) -> dict[str, Any]:
    """The settings with every default resolved."""
    settings = asdict(session.settings)
    del settings["sample"]
    drawn = session.sampling()
    settings |= {name: drawn.get(name) for name in ("do_sample", "temperature", "top_p", "top_k", "min_p")}
    settings["target"] = session.target_path
    settings["drafter"] = session.drafter_path
    settings["dtype"] = str(session.target.dtype).removeprefix("torch.")
    settings["device"] = str(session.target.device)
    settings["chat"] = session.chat
    return settings


@app.command()
def demo(
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", metavar="TEXT", show_default=False, help="Default: a request for a small function."),
    ] = None,
    target: TargetOption = None,
    drafter: DrafterOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: RemoteCodeOption = False,
    allow_pickle: PickleOption = False,
    method: MethodOption = "auto",
    verification: VerificationOption = "auto",
    max_new_tokens: MaxNewTokensOption = 256,
    num_assistant_tokens: LookaheadOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    min_p: MinPOption = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", rich_help_panel=DECODING, help="For sampling.")] = 0,
    chat: ChatOption = None,
    show_traceback: TracebackOption = False,
) -> None:
    """Decode one prompt with Transformers alone and with a drafter, and compare text and speed."""
    settings = Settings(
        target=target,
        drafter=drafter,
        method=method,
        verification=verification,
        max_new_tokens=max_new_tokens,
        num_assistant_tokens=num_assistant_tokens,
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
    from specdec_fast.demo import PROMPT, run

    run(settings, _read_prompt(PROMPT if prompt is None else prompt, None))


app.command()(verify)
app.command()(plan)
app.add_typer(bench)


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    show_traceback: TracebackOption = False,
) -> None:
    """Show versions, devices, what is built (and if not, why) and where the default models are."""
    report = environment.report()
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
        return
    lines = [(name, version or "not installed") for name, version in report["versions"].items()]
    lines += [(device["name"], device["about"]) for device in report["devices"]]
    for name, part in report["native"].items():
        if name == "build":
            lines.append(("built", _build_line(part)))
        else:
            lines.append((name, f"loaded from {part['path']}" if part["loaded"] else f"not loaded: {part['reason']}"))
    lines += [(f"backend {name}", _backend_line(part)) for name, part in report["backends"].items()]
    if report["problem"]:
        lines.append(("problem", report["problem"]))
    for name, place in report["models"].items():
        lines.append((f"default {name}", f"{place['path']} ({place['state']})" if place["path"] else place["state"]))
    # Not a table: a path that is cut or wrapped cannot be copied
    width = max(len(name) for name, _ in lines)
    out = console.output_console()
    for name, text in lines:
        out.print(Text.assemble((name.ljust(width), "dim"), "  ", text), soft_wrap=True)


def _build_line(record: dict[str, Any] | None) -> str:
    if record is None:
        return "no record: the package was not built where it lies"
    line = f"by Python {record['python']} with torch {record['torch'] or 'missing'}"
    if cuda := record.get("cuda"):
        line += f", CUDA {cuda['release']} for {', '.join(cuda['architectures'])}"
    return line


def _backend_line(part: dict[str, Any]) -> str:
    line = ", ".join(part["ops"])
    if "capability" in part:
        line += f" ({part['capability']})"
    by_reason: dict[str, list[str]] = {}
    for op, reason in part["missing"].items():
        by_reason.setdefault(reason, []).append(op)
    if len(by_reason) == 1 and not part["ops"]:
        return f"none: {next(iter(by_reason))}"
    return "; ".join([line or "none", *(f"not {', '.join(ops)}: {reason}" for reason, ops in by_reason.items())])


if __name__ == "__main__":
    main()
