"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "DECODING",
    "MODELS",
    "OUTPUT",
    "TRACEBACK",
    "ChatOption",
    "DeviceOption",
    "DrafterOption",
    "DtypeOption",
    "JsonFileOption",
    "LookaheadOption",
    "MaxNewTokensOption",
    "MethodOption",
    "MinPOption",
    "PickleOption",
    "RemoteCodeOption",
    "TargetOption",
    "TemperatureOption",
    "TopKOption",
    "TopPOption",
    "TracebackOption",
    "VerificationOption",
]

TRACEBACK = "SPECDEC_FAST_TRACEBACK"
MODELS, DECODING, OUTPUT = "Models", "Decoding", "Output"
TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="PATH",
        rich_help_panel=MODELS,
        help="Folder of the target in Hugging Face layout, or its name on the hub. "
        "Default: SmolLM2-135M-Instruct, fetched once.",
    ),
]
DrafterOption = Annotated[
    str | None,
    typer.Option(
        "--drafter",
        metavar="PATH",
        rich_help_panel=MODELS,
        help="The same for the drafter; its tokenizer may be another one. Default: the drafter in this package.",
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="NAME",
        rich_help_panel=MODELS,
        help="bfloat16, float32, float16 or auto: bfloat16 where the device computes in it.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="NAME", rich_help_panel=MODELS, help="cpu, cuda, cuda:1 or auto.")
]
RemoteCodeOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", rich_help_panel=MODELS, help="Run Python code that comes with a model."),
]
PickleOption = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        rich_help_panel=MODELS,
        help="Read pickled weights, which can run code, for want of safe ones.",
    ),
]
MethodOption = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="NAME",
        rich_help_panel=DECODING,
        help="auto, autoregressive, model, tli, projection, slem, slrs, slrs_literal or prompt_lookup.",
    ),
]
VerificationOption = Annotated[
    str,
    typer.Option(
        "--verification", metavar="RULE", rich_help_panel=DECODING, help="auto, match, gumbel, token or block."
    ),
]
MaxNewTokensOption = Annotated[
    int,
    typer.Option("--max-new-tokens", metavar="N", rich_help_panel=DECODING, help="Stop here at the latest."),
]
LookaheadOption = Annotated[
    int | None,
    typer.Option(
        "--num-assistant-tokens",
        metavar="N",
        rich_help_panel=DECODING,
        show_default=False,
        help="Lookahead: draft tokens a round.",
    ),
]
JsonFileOption = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        rich_help_panel=OUTPUT,
        show_default=False,
        help="Write what is measured here as JSON.",
    ),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        metavar="T",
        rich_help_panel=DECODING,
        help="Sample at this temperature; 0 is greedy.",
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="P",
        rich_help_panel=DECODING,
        help="Sample from the most probable tokens that hold this share of the mass.",
    ),
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        metavar="K",
        rich_help_panel=DECODING,
        help="Sample from the K most probable tokens, 0 for all. Default when sampling: the model's own setting, "
        "else 50, as in Transformers.",
    ),
]
MinPOption = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        metavar="P",
        rich_help_panel=DECODING,
        help="Sample from tokens at least this probable, relative to the most probable one.",
    ),
]
CompileOption = Annotated[
    str,
    typer.Option(
        "--compile",
        metavar="HOW",
        rich_help_panel=DECODING,
        help="How short passes run: auto, off, static (rounds of fixed shape that live on the device) or inductor "
        "(those compiled).",
    ),
]
ChatOption = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        rich_help_panel=DECODING,
        help="Put the prompt into the target's chat template. Default: where it has one.",
        show_default=False,
    ),
]
TracebackOption = Annotated[
    bool,
    typer.Option("--traceback", rich_help_panel=OUTPUT, help=f"Show where an error came from (also {TRACEBACK}=1)."),
]
