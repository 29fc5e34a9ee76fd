"""Expected acceptance and block efficiency of every method and rule, on the same positions of the same texts.

    python benchmarks/acceptance.py --json benchmarks/results/acceptance.json --plot benchmarks/results/acceptance.svg

Positions are a fixed even sample of those where the target's and the drafter's tokenisation of a text both have a
boundary (``--anywhere``: where the target's has). Models read the plain text, no chat template. Laws are those of the
drafters that ``fast_generate`` uses.

First token, "1st": the probability that the first draft token is accepted, a sum over the vocabulary without any
sampling noise. With p the target's law and q the drafter's:

- union: the drafter draws on all of its vocabulary, a draw outside the intersection is always rejected:
  ``Σ over the intersection of min(p, q)``;
- TLI: ``Σ min(p, q/Z)``, Z the mass of the intersection;
- projection: ``Σ min(p, ψ)``, ψ the law of the first target token of the drafter token's text;
- SLRS: ``Σ min(p, ψ)``, ψ the law of the cover walk. It costs a drafter pass for most tokens; those that matter most
  are asked for, and what is left gives a lower and an upper bound, both exact. The table shows the lower one;
- SLEM: the law of a re-tokenised text has no short form. "SLEM" is ``p(x)`` averaged over drafts x of the drafter
  itself, so it is noisy; "SLEM*" is a stand-in without noise, rule *match* on projection's ψ: the sum ``Σ p ψ``.

Rules: *match* accepts ``Σ p ψ`` in place of ``Σ min(p, ψ)``; for one token *block* is *token*. At T=0 all of
these are 1 where the proposal is the target's argmax, else 0, and the rules are the same.

Tokens a round, "round": the block efficiency at a fixed lookahead γ, 1 + the expected number of accepted draft tokens.
Drafts are drawn, with the same numbers for all methods; given a draft the expectation is exact
(:mod:`acceptance_laws` says how), so nothing but the choice of drafts is left to chance. The standard errors are those
of the mean over positions: how far another sample of positions and drafts might be. Methods are compared position by
position, and the errors of ratios and differences are those of paired values.

A run that was cut short goes on with ``--resume``: pairs and kinds of text that the JSON file holds are not done again.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from acceptance_laws import METHODS, RULES, Outcome, Pair, Probe, boundaries
from compare_transformers import machine
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specdec_fast.pretrained import default_drafter, default_target, load
from specdec_fast.vocab import Vocabulary

TEMPERATURES = (0.0, 0.6, 1.0)
CONTEXT = 24  # target tokens before the first position
WINDOW = 160  # target tokens of a text that are read
LIBRARY = ("textwrap", "heapq", "csv", "shlex", "statistics", "argparse", "configparser", "calendar", "ast", "zipfile")
TITLES = {"union": "union", "tli": "TLI", "slem": "SLEM", "slem*": "SLEM*", "projection": "projection", "slrs": "SLRS"}
COLOURS = {"union": "#9aa0a6", "tli": "#4e79a7", "slem": "#f28e2b", "projection": "#59a14f", "slrs": "#b07aa1"}


@dataclass(frozen=True)
class Source:
    """Texts of one kind.

    Args:
        kind: code, prose, ...
        name: what they are called in the results.
        texts: all there are.
    """

    kind: str
    name: str
    texts: list[str]

    @classmethod
    def parse(cls, given: str) -> Source:
        """``KIND:NAME=PATH``, a file or a folder of ``.txt`` and ``.py`` files; ``.jsonl#FIELD+FIELD`` joins fields.

        Raises:
            typer.BadParameter: it is not of that form, or there is no text.
        """
        found = re.fullmatch(r"([^:=]+):([^=]+)=([^#]+)(?:#(.+))?", given)
        if found is None:
            raise typer.BadParameter(f"--texts must look like KIND:NAME=PATH or KIND:NAME=PATH#FIELD+FIELD: {given}")
        kind, name, path, fields = found.groups()
        place = Path(path)
        if not place.exists():
            raise typer.BadParameter(f"--texts: there is no {path}")
        if fields:
            texts = [_joined(json.loads(line), fields.split("+")) for line in place.read_text().splitlines() if line]
        else:
            files = sorted(place.iterdir()) if place.is_dir() else [place]
            texts = [file.read_text(errors="replace") for file in files if file.suffix in (".txt", ".py")]
        if not texts:
            raise typer.BadParameter(f"--texts: {path} holds no text")
        return cls(kind, name, [_passage(text) for text in texts])


def _joined(entry: dict[str, Any], fields: Sequence[str]) -> str:
    parts = [entry[field] for field in fields]
    joined = "".join(part if part.endswith("\n") else part + "\n" for part in parts)
    return re.sub(r"<<[^<>\n]*>>", "", joined)  # the calculator's notes in GSM8K


def _passage(text: str) -> str:
    """A long text from a paragraph in its middle on."""
    if len(text) < 8000:
        return text
    text = text[len(text) // 2 :]
    return text[text.find("\n\n") + 2 :][:4000]


def default_sources() -> list[Source]:
    """What Python itself carries: source code, and the prose of its language reference."""
    code = [inspect.getsource(importlib.import_module(name)) for name in LIBRARY]
    topics = importlib.import_module("pydoc_data.topics").topics
    prose = [text for _, text in sorted(topics.items()) if len(text) > 2000]
    return [
        Source("code", "Python standard library", [_passage(text) for text in code]),
        Source("prose", "Python language reference", prose),
    ]


def sample(
    source: Source, pair: Pair, texts: int, positions: int, anywhere: bool = False
) -> list[tuple[list[int], list[int]]]:
    """Some texts in target ids, each with the lengths behind which everything is measured.

    Texts that fit into the window go first; of longer ones the beginning is read. ``anywhere``: where the target's
    tokenisation alone has a boundary, as in generation.
    """
    target, own = Vocabulary.of(pair.tokenizer), Vocabulary.of(pair.own)
    found = []
    for text in source.texts:
        ids, ends = boundaries(text, target, own)
        if anywhere:
            ends = list(range(1, len(ids) + 1))
        room = min(len(ids), WINDOW)
        able = [end for end in ends if CONTEXT <= end < room]
        if len(able) >= max(positions, room // 3):
            even = [able[int((i + 0.5) * len(able) / positions)] for i in range(positions)]
            found.append((len(ids) > WINDOW, ids[:room], even))
    if len(found) < texts:
        raise typer.BadParameter(f"{source.name}: {texts} texts are wanted, {len(found)} are long enough")
    whole = [entry for entry in found if not entry[0]]
    chosen = whole if len(whole) >= texts else found
    return [chosen[int((i + 0.5) * len(chosen) / texts)][1:] for i in range(texts)]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """A mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def ratio_and_error(over: Sequence[float], under: Sequence[float]) -> tuple[float, float]:
    """A ratio of paired means and its standard error (to first order)."""
    ratio = sum(over) / sum(under) if sum(under) else math.inf
    if not sum(under) or len(over) < 2:
        return ratio, 0.0
    spread = [a - ratio * b for a, b in zip(over, under, strict=True)]
    return ratio, statistics.stdev(spread) / math.sqrt(len(spread)) / statistics.fmean(under)


def summarise(measured: Sequence[Sequence[Outcome]]) -> list[dict[str, Any]]:
    """One row a method and rule, from the outcomes of every position."""
    by_method: dict[str, list[Outcome]] = {}
    for outcomes in measured:
        for outcome in outcomes:
            by_method.setdefault(outcome.method, []).append(outcome)
    rows = []
    for method, own in by_method.items():
        for rule in RULES if own[0].first else ("match",):
            low = [o.first[rule][0] if o.first else statistics.fmean(o.drafted) for o in own]
            row: dict[str, Any] = {"method": method, "rule": rule, "positions": len(own), "exact": bool(own[0].first)}
            row["first"], row["first_error"] = mean_and_error(low)
            row["first_at_most"] = statistics.fmean(o.first[rule][1] for o in own) if own[0].first else row["first"]
            for other, first in _compared(by_method, rule).items() if own[0].first else ():
                difference = [a - b for a, b in zip(low, first, strict=True)]
                row[f"less_{other}"], row[f"less_{other}_error"] = mean_and_error(difference)
                if other == "tli":
                    row["to_tli"], row["to_tli_error"] = ratio_and_error(low, first)
            rounds = [1 + statistics.fmean(o.accepted[rule]) for o in own if o.accepted]
            row["rounds"] = len(rounds)
            row["round"], row["round_error"] = mean_and_error(rounds)
            rows.append(row)
    if "projection" in by_method:
        products = [o.first["match"][0] for o in by_method["projection"]]
        first, error = mean_and_error(products)
        stand_in = {"method": "slem*", "rule": "match", "positions": len(products), "exact": True}
        rows.append({**stand_in, "first": first, "first_error": error, "first_at_most": first})
    return rows


def _compared(by_method: dict[str, list[Outcome]], rule: str) -> dict[str, list[float]]:
    """What others are compared with, position by position: TLI under the same rule, SLEM, and what stands for it."""
    compared = {}
    if "tli" in by_method:
        compared["tli"] = [o.first[rule][0] for o in by_method["tli"]]
    if "slem" in by_method:
        compared["slem"] = [statistics.fmean(o.drafted) for o in by_method["slem"]]
    if "projection" in by_method:
        compared["slem*"] = [o.first["match"][0] for o in by_method["projection"]]
    return compared


def measure(
    pair: Pair,
    source: Source,
    *,
    texts: int,
    positions: int,
    rounds: int,
    lookahead: int,
    drafts: int,
    anywhere: bool = False,
) -> Iterator[Any]:
    """Yields after each step, last of all the rows."""
    chosen = sample(source, pair, texts, positions, anywhere)
    probe = Probe(pair, [ids for ids, _ in chosen], lookahead=lookahead)
    measured: dict[float, list[list[Outcome]]] = {temperature: [] for temperature in TEMPERATURES}
    drafted = {int((i + 0.5) * positions / rounds) for i in range(rounds)}
    for step in range(positions):
        probe.move([lengths[step] for _, lengths in chosen])
        for temperature in TEMPERATURES:
            measured[temperature] += probe.measure(temperature, drafts if step in drafted else 0)
        yield None
    place = {"pair": pair.name, "kind": source.kind, "texts": source.name}
    yield [
        {**place, "temperature": temperature, **row}
        for temperature, outcomes in measured.items()
        for row in summarise(outcomes)
    ]


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What SLRS and rule *block* are asked for, and whether it was reached: yes, no, or open (bounds too wide)."""
    known = {(r["pair"], r["kind"], r["temperature"], r["method"], r["rule"]): r for r in rows}
    checks = []

    def check(place: tuple[Any, ...], goal: str, value: float, error: float, least: float, wide: float = 0.0) -> None:
        names = dict(zip(("pair", "kind", "temperature"), place, strict=True))
        reached = "yes" if value >= least else "open" if value + wide >= least else "no"
        checks.append({**names, "goal": goal, "value": value, "error": error, "at_most": value + wide})
        checks[-1]["reached"] = reached

    for place in sorted({key[:3] for key in known}):
        slrs, tli = known[(*place, "slrs", "token")], known[(*place, "tli", "token")]
        wide = slrs["first_at_most"] - slrs["first"]
        if place[1] == "code":
            ratio = slrs["to_tli"], slrs["to_tli_error"], 1.10, wide / tli["first"] if tli["first"] else 0.0
            check(place, "SLRS / TLI >= 1.10", *ratio)
        else:
            check(place, "SLRS - TLI >= -0.02", slrs["less_tli"], slrs["less_tli_error"], -0.02, wide)
        for name in ("slem*", "slem"):
            check(place, f"SLRS - {TITLES[name]} >= 0", slrs[f"less_{name}"], slrs[f"less_{name}_error"], -1e-6, wide)
        blocks = [known[(*place, method, "block")] for method in METHODS if method != "slem"]
        least = min(row["round"] - known[(*place, row["method"], "token")]["round"] for row in blocks)
        check(place, "block - token >= 0, every method", least, 0.0, -1e-9)
    return checks


def tabulate(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the table."""
    columns = ["union", "tli", "slem", "slem*", "projection", "slrs"]
    headings = ["target ← drafter", "text", "T", "what", "rule", *(TITLES[name] for name in columns)]
    known = {(r["pair"], r["kind"], r["temperature"], r["method"], r["rule"]): r for r in rows}
    lines = []
    for place in dict.fromkeys((r["pair"], r["kind"], r["temperature"]) for r in rows):
        for what, rules in (("first", ("match", "token")), ("round", RULES)):
            for rule in ("match",) if place[2] == 0 else rules:
                cells = [known.get((*place, name, rule), {}).get(what) for name in columns]
                if any(cell is not None for cell in cells):
                    shown = ["" if cell is None else f"{cell:.3f}" for cell in cells]
                    title = {"first": "1st", "round": "round"}[what]
                    label = "any" if place[2] == 0 else "token, block" if (what, rule) == ("first", "token") else rule
                    lines.append([place[0], place[1], f"{place[2]:g}", title, label, *shown])
    return headings, lines


def markdown(rows: list[dict[str, Any]], checks: list[dict[str, Any]], caption: str) -> str:
    """The table and the goals as a page."""
    headings, lines = tabulate(rows)
    text = f"# Expected acceptance\n\n{caption}\n\n"
    text += "| " + " | ".join(headings) + " |\n|" + "---|" * 5 + "---:|" * (len(headings) - 5) + "\n"
    text += "".join("| " + " | ".join(line) + " |\n" for line in lines)
    text += "\n| target ← drafter | text | T | goal | value | ± | reached |\n|---|---|---|---|---:|---:|---|\n"
    for c in checks:
        where = f"| {c['pair']} | {c['kind']} | {c['temperature']:g} | {c['goal']} "
        text += f"{where}| {c['value']:.3f} | {c['error']:.3f} | {c['reached']} |\n"
    return text


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """The plot: for each pair the first token (above) and the tokens a round (below)."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "acceptance"
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    figure, axes = pyplot.subplots(2, len(pairs), figsize=(7.4 * len(pairs), 6.4), sharey="row", squeeze=False)
    for column, pair in enumerate(pairs):
        own = [row for row in rows if row["pair"] == pair]
        groups = list(dict.fromkeys((row["kind"], row["temperature"]) for row in own))
        for line, what in enumerate(("first", "round")):
            axis = axes[line][column]
            for i, method in enumerate(METHODS):
                best = "match" if method == "slem" else "token" if what == "first" else "block"
                for rule in dict.fromkeys((best, "match" if method == "slem" else "token")):
                    found = {
                        (r["kind"], r["temperature"]): r for r in own if (r["method"], r["rule"]) == (method, rule)
                    }
                    places = [g + (i - 2) * 0.16 for g in range(len(groups))]
                    values = [found[group].get(what, 0.0) for group in groups]
                    if rule == best:
                        label = TITLES[method] if (line, column) == (0, 0) else None
                        axis.bar(places, values, 0.15, color=COLOURS[method], label=label)
                    else:
                        axis.hlines(values, [x - 0.07 for x in places], [x + 0.07 for x in places], "black", lw=0.8)
            axis.set_xticks(range(len(groups)), [f"{kind}\nT={temperature:g}" for kind, temperature in groups])
            axis.tick_params(axis="x", labelsize=8)
            axis.set_axisbelow(True)
            axis.grid(axis="y", alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][column].set_title(pair, fontsize=10)
        axes[1][column].set_ylim(bottom=1)
    axes[0][0].set_ylabel("first draft token accepted\n(rule token; SLEM: match)")
    axes[1][0].set_ylabel("tokens a round\n(rule block, line: token; SLEM: match)")
    figure.legend(loc="upper center", ncols=len(METHODS), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def models(others: Sequence[str]) -> Iterator[Pair]:
    """The default target with the shipped drafter, and with each other model in both directions."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = default_target()
    target = load(folder, dtype=torch.bfloat16)
    small = load(default_drafter(), dtype=torch.float32)
    name = folder.name
    for given in others:
        other, separator, path = given.partition("=")
        if not separator:
            raise typer.BadParameter(f"--other must look like NAME=FOLDER: {given}")
        loaded = load(path, dtype=torch.bfloat16)
        yield Pair(f"{name} ← {other}", *target, *loaded)
        yield Pair(f"{other} ← {name}", *loaded, *target)
    yield Pair(f"{name} ← shipped", *target, *small)


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table, and the goals that were missed."""
    headings, lines = tabulate(rows)
    table = Table(title="expected acceptance of the first draft token, and tokens a round")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i > 4 else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    Console(width=150).print(table)
    missed = {"no": "missed", "open": "not decided by the bounds"}
    for check in goals(rows):
        if check["reached"] != "yes":
            where = f"{check['pair']}, {check['kind']}, T={check['temperature']:g}"
            value = f"{check['value']:.3f} ± {check['error']:.3f}"
            Console(soft_wrap=True).print(f"{missed[check['reached']]}: {where}: {check['goal']}: {value}")


def _json(content: dict[str, Any]) -> str:
    """One line a row, numbers to five digits."""

    def line(row: dict[str, Any]) -> str:
        short = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
        return "  " + json.dumps(short, ensure_ascii=False)

    parts = [f" {json.dumps(key)}: {json.dumps(content[key], ensure_ascii=False)}" for key in ("command", "caption")]
    parts.append(f' "machine": {json.dumps(content["machine"])}')
    parts += [f' "{key}": [\n' + ",\n".join(map(line, content[key])) + "\n ]" for key in ("rows", "goals")]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _command(others: Sequence[str], given: Sequence[str], *, anywhere: bool, **sizes: int) -> str:
    """What to type to do the same, without the places where models and texts lie."""
    command = "python benchmarks/acceptance.py"
    command += "".join(f" --other {other.partition('=')[0]}=FOLDER" for other in others)
    for source in given:
        head, _, tail = source.partition("=")
        fields = tail.partition("#")[2]
        command += f" --texts '{head}=PATH{'#' + fields if fields else ''}'"
    for name, size in sizes.items():
        command += f" --{'sampled' if name == 'texts' else name} {size}"
    return f"{command}{' --anywhere' if anywhere else ''} --json FILE --plot FILE"


def main(
    texts: Annotated[list[str] | None, typer.Option(help="KIND:NAME=PATH[#FIELD+FIELD]; default: Python's own")] = None,
    other: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER of a model with another tokenizer")] = None,
    sampled: Annotated[int, typer.Option(help="texts of each kind")] = 6,
    positions: Annotated[int, typer.Option(help="positions in each text")] = 6,
    rounds: Annotated[int, typer.Option(min=1, help="at how many of them whole rounds are measured")] = 3,
    lookahead: Annotated[int, typer.Option(help="draft tokens a round")] = 4,
    drafts: Annotated[int, typer.Option(min=1, help="drafts a position")] = 1,
    anywhere: Annotated[bool, typer.Option("--anywhere", help="at any of the target's token boundaries")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="keep what the file of --json holds, do the rest")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="two texts of each kind, two positions")] = False,
    threads: Annotated[int, typer.Option(help="torch threads; 0: as torch likes")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write rows and goals here, the table beside")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the plot here (.svg or .png; needs matplotlib)")] = None,
) -> None:
    """Measures every method, prints one table and the goals."""
    if threads:
        torch.set_num_threads(threads)
    if quick:
        sampled, positions, rounds = 2, 2, 1
    rounds = min(rounds, positions)
    sources = [Source.parse(given) for given in texts] if texts else default_sources()
    sizes: dict[str, Any] = {"texts": sampled, "positions": positions, "rounds": rounds}
    sizes |= {"lookahead": lookahead, "drafts": drafts, "anywhere": anywhere}
    command = _command(other or [], texts or [], **sizes)
    where = "at any of the target's token boundaries" if anywhere else "where both tokenisations have a boundary"
    caption = (
        f"{sampled * positions} positions of {sampled} texts for each pair and kind of text, {where} "
        f"({', '.join(f'{s.kind}: {s.name}' for s in sources)}), lookahead {lookahead}, drafters in 8 bits, targets in "
        "bfloat16. 1st: probability that the first draft token is accepted, computed without sampling (SLRS: the lower "
        "of two exact bounds; SLEM: averaged over drafts; SLEM\\*: a stand-in without noise, rule match on the law of "
        "projection). round: expected tokens a round, bonus token included, exact given the drafts, at "
        f"{rounds * sampled} of these positions."
    )
    rows: list[dict[str, Any]] = []
    if resume and json_file is not None and json_file.exists():
        before = json.loads(json_file.read_text())
        if before["command"] != command:
            raise typer.BadParameter(f"--resume: {json_file} is of another run: {before['command']}")
        rows = before["rows"]
    done = {(row["pair"], row["kind"]) for row in rows}
    for pair in models(other or []):
        for source in sources:
            if (pair.name, source.kind) in done:
                continue
            steps = measure(pair, source, **sizes)
            for step in track(steps, description=f"{pair.name}, {source.kind}", total=positions + 1):
                rows += step or []
            if json_file is not None:  # after each step of minutes, so that a run cut short has something to show
                content = {"command": command, "caption": caption, "machine": machine()}
                content |= {"rows": rows, "goals": goals(rows)}
                json_file.parent.mkdir(parents=True, exist_ok=True)
                json_file.write_text(_json(content))
    show(rows)
    if json_file is not None:
        json_file.with_suffix(".md").write_text(markdown(rows, goals(rows), f"{caption} Command: `{command}`."))
    if plot is not None:
        draw(rows, plot)


if __name__ == "__main__":
    typer.run(main)
