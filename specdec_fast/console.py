"""What the commands share: where output goes, loading with progress, streaming, figures.

Torch and Transformers are imported inside the functions that need them: help and mistakes on the
command line should not wait for them.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import torch

__all__ = [
    "Session",
    "Settings",
    "TextStream",
    "computes_bfloat16",
    "counted",
    "error_console",
    "figures",
    "name_of",
    "open_session",
    "output_console",
    "output_file",
    "plain_table",
    "read_prompts",
    "unit_of",
    "working",
    "write_out",
]

DTYPES = ("auto", "bfloat16", "float32", "float16")
_RANGES = (
    ("max_new_tokens", 1, math.inf),
    ("num_assistant_tokens", 1, math.inf),
    ("temperature", 0, math.inf),
    ("top_p", 0, 1),
    ("top_k", 0, math.inf),
    ("min_p", 0, 1),
)
SMALL_DRAFTER = 32_000_000  # parameters
WITHOUT_DRAFTER = ("autoregressive", "prompt_lookup")


def error_console() -> Console:
    """Progress, statistics and errors. Made anew each time, because tests and pipes replace ``sys.stderr``."""
    return Console(stderr=True, highlight=False, markup=False)


def output_console() -> Console:
    """Results. Without markup: a path or a model's text may hold square brackets."""
    return Console(highlight=False, markup=False)


@contextmanager
def working() -> Iterator[Callable[[str], None]]:
    """Shows what is being waited for: a spinner on a terminal, else a line a step."""
    console = error_console()
    if not console.is_terminal:
        yield lambda line: console.print(line, soft_wrap=True)
        return
    with console.status("") as status:
        yield lambda line: status.update(Text(line))


def _silence() -> None:
    """Keeps the libraries' own logging and progress bars off the screen; a warning becomes one line."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning):
            text = Text.assemble(("warning: ", "yellow"), " ".join(str(message).split()))
            error_console().print(text, soft_wrap=True)

    warnings.showwarning = show
    from transformers.utils import logging

    logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()


@dataclass(frozen=True)
class Settings:
    """What the user asked for; None means not given."""

    target: str | None = None
    drafter: str | None = None
    method: str = "auto"
    verification: str = "auto"
    max_new_tokens: int = 256
    num_assistant_tokens: int | None = None
    sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    chat: bool | None = None
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    allow_pickle: bool = False

    @property
    def do_sample(self) -> bool:
        """Sampling is asked for by name or by one of its parameters.

        Raises:
            ValueError: the options contradict each other.
        """
        given = [name for name in ("temperature", "top_p", "top_k", "min_p") if getattr(self, name) is not None]
        if self.temperature == 0:
            given.remove("temperature")
            if self.sample or given:
                other = "--sample" if self.sample else _option(given[0])
                raise ValueError(f"--temperature 0 is greedy decoding: leave it out, or leave out {other}")
            return False
        if self.sample is False and given:
            raise ValueError(f"--greedy and {_option(given[0])} exclude each other: leave one out")
        return bool(self.sample or given)

    def check(self) -> None:
        """Refuses what can be refused without importing anything slow.

        Raises:
            ValueError: an option is unknown or contradicts another.
        """
        _ = self.do_sample
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype} is not known: use one of {', '.join(DTYPES)}")
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                allowed = f"{least} or more" if most == math.inf else f"from {least} to {most}"
                raise ValueError(f"{_option(name)} {value} is out of range: use a number {allowed}")
        if self.drafter is not None and self.method in WITHOUT_DRAFTER:
            raise ValueError(f"--method {self.method} uses no drafter: leave out --drafter or --method")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass
class Session:
    """Loaded models and the settings they are used with."""

    settings: Settings
    target: Any
    tokenizer: Any
    drafter: Any | None
    drafter_tokenizer: Any | None
    target_path: str
    drafter_path: str | None

    @property
    def _has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def chat(self) -> bool:
        """Whether prompts go into the chat template."""
        return self._has_template if self.settings.chat is None else self.settings.chat

    def encode(self, prompt: str) -> dict[str, Any]:
        """``input_ids`` and ``attention_mask`` of a prompt, ``[1, P]`` on the target's device.

        Raises:
            ValueError: there is nothing to encode, no chat template, or too little room behind the prompt.
        """
        if self.settings.chat and not self._has_template:
            raise ValueError("--chat: the target's tokenizer has no chat template; leave it out")
        if self.chat:
            message = [{"role": "user", "content": prompt}]
            encoded = self.tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            encoded = self.tokenizer(prompt, return_tensors="pt")
        length = encoded["input_ids"].shape[1]
        if not length:
            raise ValueError("the prompt has no tokens")
        self._check_room(length)
        return {name: encoded[name].to(self.target.device) for name in ("input_ids", "attention_mask")}

    def _check_room(self, length: int) -> None:
        for model, name in ((self.target, "target"), (self.drafter, "drafter")):
            if model is None:
                continue
            config = model.config.get_text_config(decoder=True)
            if name == "drafter" and getattr(config, "rope_parameters", None):
                continue  # rotary positions have no end; beyond it a drafter is only rejected more often
            room = getattr(config, "max_position_embeddings", None)
            new = self.settings.max_new_tokens
            apart = model.config.is_encoder_decoder  # what is read stands elsewhere than what is written
            if room is not None and (max(length, new) if apart else length + new) > room:
                raise ValueError(
                    f"{length} tokens of prompt and {self.settings.max_new_tokens} new ones do not fit the {name}'s "
                    f"{room} positions: shorten the prompt or lower --max-new-tokens"
                )

    def sampling(self) -> dict[str, Any]:
        """What both ``model.generate`` and ``fast_generate`` get, with every default spelled out."""
        settings = self.settings
        if not settings.do_sample:
            return {"do_sample": False}
        own = self.target.generation_config
        values: dict[str, Any] = {"do_sample": True}
        # Transformers' own defaults: sampling without --top-k is not the unfiltered law there either
        for name, fallback in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 50), ("min_p", None)):
            given = getattr(settings, name)
            stored = getattr(own, name, None)
            value = given if given is not None else stored if stored is not None else fallback
            if value is not None:
                values[name] = value
        return values

    def speculation(self, seed: int | None) -> dict[str, Any]:
        """What only ``fast_generate`` gets."""
        settings = self.settings
        return {
            "assistant_model": self.drafter,
            "tokenizer": self.tokenizer,
            "assistant_tokenizer": self.drafter_tokenizer,
            "method": settings.method,
            "verification": settings.verification,
            "num_assistant_tokens": settings.num_assistant_tokens,
            "seed": seed,
        }

    def decode(self, tokens: Any) -> str:
        """The text of new tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def synchronize(self) -> None:
        """Waits for the device, so that a clock read next to it is honest."""
        if self.target.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.target.device)


def open_session(settings: Settings, say: Callable[[str], None]) -> Session:
    """Loads what the settings name, or the default pair.

    Args:
        say: called with one line before each slow step.

    Raises:
        ValueError, FileNotFoundError, ImportError, RuntimeError: with one line that says what to do.
    """
    settings.check()
    say("Importing torch and transformers")
    from specdec_fast.options import Options

    # The same checks as in the call itself, before anything is loaded
    Options(
        method=settings.method,
        verification=settings.verification,
        num_assistant_tokens=settings.num_assistant_tokens,
    )
    device = _device(settings.device)
    _silence()
    from specdec_fast import pretrained

    dtype = _dtype(settings.dtype, device)
    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": settings.trust_remote_code,
        "allow_pickle": settings.allow_pickle,
    }
    drafter = drafter_tokenizer = drafter_path = None
    if settings.method not in WITHOUT_DRAFTER:  # first: a mistake here should not cost a download
        drafter_path = _expand(settings.drafter) or _default_drafter()
        say(f"Loading the drafter {name_of(drafter_path)}")
        drafter, drafter_tokenizer = pretrained.load(drafter_path, **options)
        if settings.dtype == "auto" and device.type == "cpu" and drafter.num_parameters() < SMALL_DRAFTER:
            drafter = drafter.float()  # one position of a small model: bfloat16 saves no time there, converting costs
        drafter = drafter.to(device)
    target_path = _expand(settings.target) or str(pretrained.default_target(say))
    say(f"Loading the target {name_of(target_path)}")
    target, tokenizer = pretrained.load(target_path, **options)
    return Session(settings, target.to(device), tokenizer, drafter, drafter_tokenizer, target_path, drafter_path)


def _default_drafter() -> str:
    from specdec_fast import pretrained

    try:
        return str(pretrained.default_drafter())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} with --drafter, or use --method prompt_lookup") from error


def name_of(path: str) -> str:
    """A model's name for people: the folder's, or the name on the hub."""
    folder = Path(path)
    if folder == Path(__file__).parent / "drafter":
        return "shipped with specdec_fast"
    return folder.resolve().name if folder.is_dir() else path


def _expand(path: str | None) -> str | None:
    return None if path is None else os.path.expanduser(path)


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not usable here: {str(error).partition(chr(10))[0]}") from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name != "auto":
        return getattr(torch, name)
    if computes_bfloat16(device):
        return torch.bfloat16
    return torch.float32 if device.type == "cpu" else torch.float16


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; emulated, it is slower than float32."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # newer than torch 2.10
    if capabilities is None:
        return torch.cpu._is_avx512_bf16_supported()
    found = capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def read_prompts(file: str) -> list[str]:
    """The prompts of a file: one a line, or a ``.json`` list of texts or of objects with a text.

    Raises:
        ValueError, OSError: it holds none, or something else.
    """
    path = Path(file).expanduser()
    text = path.read_bytes().decode("utf-8")
    found: Any = json.loads(text) if path.suffix == ".json" else text.splitlines()
    entries = found if isinstance(found, list) else [found]
    entries = [entry.get("text") if isinstance(entry, dict) else entry for entry in entries]
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"--prompts {file} must hold a list of texts, or of objects with a text")
    prompts = [entry for entry in entries if entry.strip()]
    if not prompts:
        raise ValueError(f"--prompts {file} holds no prompt")
    return prompts


def output_file(option: str, file: str, suffixes: tuple[str, ...] = ()) -> Path:
    """Where a result will be written, looked at before anything is measured; its folder is made.

    Raises:
        ValueError, OSError: nothing can be written there, or not in a format that is known.
    """
    path = Path(file).expanduser()
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{option} {file} has no suffix that says what to draw: use one of {', '.join(suffixes)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option} {file} cannot be written: name another file")
    return path


class TextStream:
    """A streamer that writes new text as it comes: whole characters only, and never the prompt.

    Transformers' ``TextStreamer`` decodes every line on its own, at which SentencePiece tokenizers drop the first
    space of a line's indentation, and it holds a word back until the next one begins.

    Args:
        tokenizer: the target's.
        write: takes text.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        self._tokenizer = tokenizer
        self._write = write
        self._tokens: list[int] = []
        self._start = 0  # a token's text depends on the one before it: decoding begins there
        self._written = 0
        self._prompt = True

    def put(self, value: Any) -> None:
        """Takes the prompt ``[1, P]`` first, then new tokens ``[n]``."""
        if self._prompt:
            self._prompt = False
            return
        self._tokens.extend(value.tolist())
        self._flush(last=False)

    def end(self) -> None:
        """Writes what was held back."""
        self._flush(last=True)

    def _flush(self, *, last: bool) -> None:
        text = self._decode(self._tokens[self._start :])
        if text.endswith("\ufffd") and not last:
            return  # the first bytes of a character
        known = self._decode(self._tokens[self._start : self._written])
        if len(text) > len(known):
            self._write(text[len(known) :])
        # Where a token shows nothing, such as a special one, the one before stays the context
        if self._decode(self._tokens[self._written :]):
            self._start = self._written
        self._written = len(self._tokens)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def write_out(text: str) -> None:
    """Writes a piece of a text to stdout at once."""
    if sys.stdout.isatty():
        text = text.replace("\x1b", "\u241b")  # a model's text must not steer the terminal
    sys.stdout.write(text)
    sys.stdout.flush()


def _percent(part: float, whole: float) -> str:
    """A share, and a dash where there is nothing to share."""
    return f"{100 * part / whole:.0f} %" if whole > 0 else "-"


def counted(number: float, what: str) -> str:
    """A number of things, with its plural."""
    return f"{number:.3g} {what}" + ("" if number == 1 else "s")


def figures(statistics: dict[str, Any]) -> list[tuple[str, str]]:
    """The statistics of one call, named, for a table."""
    total, draft, translate = (statistics[f"{name}_seconds"] for name in ("total", "draft", "translate"))
    verify = statistics["verify_seconds"]
    lines = [("method", f"{statistics['method']}, rule {statistics['verification']}")]
    if statistics["drafted"]:
        accepted = f"{statistics['accepted']} of {statistics['drafted']} draft tokens"
        lines.append(("acceptance rate", f"{100 * statistics['acceptance_rate']:.1f} % ({accepted})"))
    lines.append(("block efficiency", f"{statistics['block_efficiency']:.2f} tokens a round"))
    shares = {
        "draft": draft - translate,
        "translate": translate,
        "verify": verify,
        "other": max(total - draft - verify, 0.0),
    }
    lines.append(("time", ", ".join(f"{name} {_percent(part, total)}" for name, part in shares.items())))
    return lines


def unit_of(value: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of a type around a value."""
    import torch

    info = torch.finfo(dtype)
    return info.eps * 2.0 ** (math.frexp(max(abs(value), info.tiny))[1] - 1)


def plain_table(title: str | None = None) -> Table:
    """A table without lines, for names and figures."""
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table
