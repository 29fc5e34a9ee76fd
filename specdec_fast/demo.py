"""One prompt, decoded by Transformers alone and then with a drafter: the two texts and what they cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from specdec_fast import fast_generate, last_speculation
from specdec_fast.cache import cache_argument, cache_of
from specdec_fast.console import (
    Session,
    Settings,
    TextStream,
    counted,
    figures,
    name_of,
    open_session,
    output_console,
    plain_table,
    unit_of,
    working,
    write_out,
)
from specdec_fast.stats import Speculation

__all__ = ["PROMPT", "Margin", "margin_at", "run"]

PROMPT = "Write a Python class Stack with push, pop, peek and is_empty."
WARM_UP = 8  # tokens: enough for a few rounds of any method
PLAIN, FAST = "Transformers: model.generate", "specdec_fast: fast_generate"


@dataclass(frozen=True)
class _Decoded:
    """One timed call."""

    tokens: list[int]
    text: str
    seconds: float

    @property
    def speed(self) -> float:
        return len(self.tokens) / self.seconds


def run(settings: Settings, prompt: str) -> None:
    """Decodes twice and prints everything to stdout, progress to stderr."""
    out = output_console()
    with working() as say:
        session = open_session(settings, say)
        if session.target.config.is_encoder_decoder:
            raise ValueError(
                "--target: the demo goes on with its prompt, which an encoder-decoder model only reads: use "
                "specdec-fast generate"
            )
        inputs = session.encode(prompt)
        say(f"Warming up ({WARM_UP} tokens each, not counted)")
        _plain(session, inputs, min(WARM_UP, settings.max_new_tokens))
        _fast(session, inputs, min(WARM_UP, settings.max_new_tokens))
    _describe(out, session, prompt)

    plain = _timed(out, session, PLAIN, inputs, _plain)
    fast = _timed(out, session, FAST, inputs, _fast)
    statistics = last_speculation()
    assert statistics is not None

    _side_by_side(out, session, plain, fast)
    table = plain_table()
    ratio = fast.speed / plain.speed
    table.add_row("model.generate", _speed(plain))
    table.add_row("fast_generate", _speed(fast))
    table.add_row("speed-up", Text(f"{ratio:.2f} times" + ("" if ratio >= 1 else " (slower)"), style="bold"))
    for name, value in figures(statistics.to_dict()):
        table.add_row(name, value)
    for name, text in _agreement(session, inputs, plain, fast, statistics):
        table.add_row(name, text)
    out.print()
    out.print(table)


def _plain(session: Session, inputs: dict[str, Any], count: int, **extra: Any) -> Tensor:
    """The target alone, by Transformers."""
    torch.manual_seed(session.settings.seed or 0)
    return session.target.generate(**inputs, **session.sampling(), max_new_tokens=count, **extra)


def _fast(session: Session, inputs: dict[str, Any], count: int, **extra: Any) -> Any:
    options = session.speculation(session.settings.seed or 0) | extra
    return fast_generate(session.target, **inputs, **session.sampling(), max_new_tokens=count, **options)


def _timed(out: Console, session: Session, title: str, inputs: dict[str, Any], call: Any) -> _Decoded:
    """Runs a call once, streaming, by the wall clock."""
    out.rule(Text(title, style="bold"), align="left")
    stream = TextStream(session.tokenizer, write_out)
    session.synchronize()
    begin = time.perf_counter()
    ids = call(session, inputs, session.settings.max_new_tokens, streamer=stream)
    session.synchronize()
    seconds = time.perf_counter() - begin
    write_out("\n\n")
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return _Decoded(new, session.decode(new), seconds)


# What is shown -------------------------------------------------------------------------------------------------------


def _describe(out: Console, session: Session, prompt: str) -> None:
    device, dtype = session.target.device, str(session.target.dtype).removeprefix("torch.")
    where = counted(torch.get_num_threads(), "thread") if device.type == "cpu" else torch.cuda.get_device_name(device)
    sampling = session.sampling()
    greedy = not sampling.pop("do_sample")
    manner = ", ".join(f"{name} {value}" for name, value in sampling.items()) + f", seed {session.settings.seed or 0}"
    table = plain_table()
    table.add_row("target", f"{name_of(session.target_path)}, {_size(session.target)}")
    if session.drafter is not None and session.drafter_path is not None:
        table.add_row("drafter", f"{name_of(session.drafter_path)}, {_size(session.drafter)}")
    table.add_row("on", f"{device}, {where}, {dtype}")
    table.add_row("decoding", "greedy" if greedy else manner)
    table.add_row("prompt", prompt)
    out.print(table)
    out.print()


def _size(model: Any) -> str:
    return f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.3g} million parameters"


def _speed(decoded: _Decoded) -> str:
    return f"{decoded.speed:.1f} tokens/s ({len(decoded.tokens)} tokens in {decoded.seconds:.2f} s)"


def _side_by_side(out: Console, session: Session, plain: _Decoded, fast: _Decoded) -> None:
    """Both texts; greedy ones are marked from the first difference on."""
    same = session.decode(plain.tokens[: _first_difference(plain.tokens, fast.tokens)])
    table = Table(expand=True, padding=(0, 1))
    table.add_column(PLAIN, ratio=1, overflow="fold")
    table.add_column(FAST, ratio=1, overflow="fold")
    cells = []
    for decoded in (plain, fast):
        cell = Text(decoded.text.replace("\x1b", "\u241b"))
        if not session.settings.do_sample:  # samples are different texts from the start
            cell.stylize("yellow", len(same))
        cells.append(cell)
    table.add_row(*cells)
    out.print(table)


# Are they the same? --------------------------------------------------------------------------------------------------


def _agreement(
    session: Session, inputs: dict[str, Any], plain: _Decoded, fast: _Decoded, statistics: Speculation
) -> list[tuple[str, str | Text]]:
    """Whether the two outputs are identical and, where rounding parted them, by how little."""
    if session.sampling()["do_sample"]:
        if statistics.verification != "match" and statistics.method != "autoregressive":
            return [("identical", "not comparable: the same law, other draws (rule match repeats plain draws)")]
        # Transformers draws from another generator, so plain decoding is repeated here, by the same seed
        own = _fast(session, inputs, session.settings.max_new_tokens, assistant_model=None, method="autoregressive")
        tokens = own[0, inputs["input_ids"].shape[1] :].tolist()
        if tokens == fast.tokens:
            return [("identical", "yes, to plain decoding with the same seed")]
        where = _first_difference(tokens, fast.tokens)
        if session.target.dtype == torch.float32:
            verdict = "more than rounding explains, almost surely; please report it"
        else:
            verdict = (
                f"{_dtype_name(session)} rounding moves draws near a boundary; --dtype float32 tells if it was that"
            )
        return [
            ("identical", f"no, other than plain decoding with the same seed from token {where + 1} on"),
            ("that is", verdict),
        ]
    if plain.tokens == fast.tokens:
        return [("identical", Text("yes, token for token", style="bold green"))]
    where = _first_difference(plain.tokens, fast.tokens)
    common = torch.tensor([plain.tokens[:where]], dtype=torch.long, device=session.target.device)
    margin = margin_at(session.target, torch.cat([inputs["input_ids"], common], 1))
    rivals = {tokens[where] for tokens in (plain.tokens, fast.tokens) if where < len(tokens)}
    pair = " or ".join(repr(session.decode([token])) for token in margin.tokens)
    apart = counted(margin.value / margin.unit, f"{_dtype_name(session)} unit")
    noise = counted(margin.noise / margin.unit, "unit")
    about = f"{margin.value:.3g}, or {apart}, between {pair}; two passes over this text differ by {noise}"
    if rivals <= set(margin.tokens) and margin.is_tie:
        verdict = f"a tie within {_dtype_name(session)} resolution; --dtype float32 decides it"
    else:
        verdict = "more than rounding explains; please report it"
    return [("identical", f"no, from token {where + 1} on"), ("margin there", about), ("that is", verdict)]


def _first_difference(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _dtype_name(session: Session) -> str:
    return str(session.target.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Margin:
    """How far apart a target's two best next tokens are."""

    tokens: tuple[int, int]
    value: float
    """Difference of their logits, from one forward pass."""
    unit: float
    """Spacing of the model's number type at the larger logit."""
    noise: float
    """By how much the ten best logits change, at most, when the last token has a pass of its own."""

    @property
    def is_tie(self) -> bool:
        """Rounding can decide: either logit may move by the noise, and one unit is the least step there is."""
        return self.value <= max(self.unit, 2 * self.noise)


@torch.no_grad()
def margin_at(model: Any, ids: Tensor) -> Margin:
    """Looks at the target's choice behind a text ``[1, n]``, n > 1, in one forward pass."""
    whole = model(ids, use_cache=False).logits[0, -1].float()
    before = model(ids[:, :-1], use_cache=True)
    past = {cache_argument(type(model)): cache_of(before)}
    stepwise = model(ids[:, -1:], **past, use_cache=True).logits[0, -1].float()
    values, tokens = whole.topk(min(10, whole.shape[0]))
    first, second = (int(token) for token in tokens[:2])
    return Margin(
        tokens=(first, second),
        value=float(values[0] - values[1]),
        unit=unit_of(float(values[0]), model.dtype),
        noise=float((stepwise[tokens] - values).abs().max()),
    )
