"""Rows as a table, as Markdown and as a plot."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

__all__ = ["as_json", "draw", "markdown", "name_of", "tables"]

Row = dict[str, Any]
HEADINGS = ("cold µs", "quartiles", "warm µs", "GB/s", "of copy", "x reference")
OTHERS = {
    "compiled": "x compiled reference",
    "same_vocabulary": "x same vocabulary",
    "scatter": "x scatter",
    "vllm": "x vLLM",
    "sglang": "x SGLang",
    "flashinfer": "x FlashInfer",
}


def as_json(rows: Sequence[Row]) -> str:
    """A list, one line a row, numbers to six digits."""

    def short(value: Any) -> Any:
        return float(f"{value:.6g}") if isinstance(value, float) else value

    lines = [json.dumps({name: short(value) for name, value in row.items()}, ensure_ascii=False) for row in rows]
    return "[\n " + ",\n ".join(lines) + "\n]\n"


def name_of(row: Row) -> str:
    """``verify token dense, filters, bfloat16, B=1 γ=4 V=151936``."""
    words = " ".join(str(row[name]) for name in ("op", "rule", "law") if row[name])
    words += ", filters" if row["filters"] else ""
    words += "" if row["acceptance"] in (None, 0.8) else f", acceptance {row['acceptance']:g}"
    gamma = "" if row["op"] == "sample" else f" γ={row['gamma']}"
    return f"{words}, {row['dtype']}, B={row['batch']}{gamma} V={row['vocab']}"


def _cases(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Row]]]:
    """Rows by case, backend and state."""
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        found.setdefault(name_of(row), {}).setdefault(row["backend"], {})[row["state"]] = row
    return found


def _others(rows: Iterable[Row]) -> list[str]:
    found = list(rows)
    return [name for name in OTHERS if any(row[f"ratio_to_{name}"] is not None for row in found)]


def _cells(states: dict[str, Row], others: Sequence[str]) -> list[str]:
    """One backend at one case; what depends on the state is that of cold inputs."""
    cold, warm = states["cold"], states["warm"]
    ratios = [cold[f"ratio_to_{name}"] for name in ("reference", *others)]
    return [
        cold["backend"] + (" (graph)" if cold["graph"] else ""),
        _number(cold["microseconds"]),
        f"{_number(cold['low'])}-{_number(cold['high'])}",
        _number(warm["microseconds"]),
        _number(cold["gigabytes_per_second"]),
        f"{cold['share_of_copy']:.0%}",
        *("" if ratio is None else _number(ratio) for ratio in ratios),
    ]


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """For the terminal, one a case."""
    for case, backends in _cases(rows).items():
        others = _others(row for states in backends.values() for row in states.values())
        shown = Table(title=case, title_justify="left", box=None, title_style="bold")
        shown.add_column("", no_wrap=True, min_width=20)
        for heading in [*HEADINGS, *(OTHERS[name] for name in others)]:
            shown.add_column(heading, justify="right")
        for states in backends.values():
            shown.add_row(*_cells(states, others))
        yield shown


def markdown(rows: Sequence[Row], command: str) -> str:
    """The table with how it came about."""
    others = _others(rows)
    headings = ["", "", *HEADINGS, *(OTHERS[name] for name in others)]
    lines = [" | ".join(headings), "|".join(["---", "---", *("---:" for _ in headings[2:])])]
    for case, backends in _cases(rows).items():
        for number, states in enumerate(backends.values()):
            lines.append(" | ".join(["" if number else case, *_cells(states, others)]))
    copied = ", ".join(dict.fromkeys(_number(row["copy_gigabytes_per_second"]) for row in rows))
    machines = "; ".join(dict.fromkeys(row["machine"] for row in rows))
    text = (
        f"{machines}. Copy: {copied} GB/s. Medians of interleaved calls, temperature 1; cold: inputs rotated past "
        "twice the last cache. GB/s: the bytes without which the outcome cannot be known, over the time; of copy: "
        "the share of the rate of a copy in the same run. x: times as fast as that, cold. Acceptance 0.8 where "
        "nothing is said."
    )
    return f"{text} Command: `{command}`.\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n"


def draw(rows: Sequence[Row], file: Path) -> None:
    """Times as fast as the reference, and the share of the copy rate; inputs cold.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kernels"
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    cold = [row for row in rows if row["state"] == "cold" and row["backend"] != "reference"]
    labels = list(dict.fromkeys(map(name_of, cold)))
    backends = list(dict.fromkeys(row["backend"] for row in cold))
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 1.4 + 0.24 * len(labels)), sharey=True)
    for axis, field in zip(axes, ("ratio_to_reference", "share_of_copy"), strict=True):
        for number, backend in enumerate(backends):
            own = [row for row in cold if row["backend"] == backend]
            places = [len(labels) - labels.index(name_of(row)) for row in own]
            axis.plot([row[field] for row in own], places, "o", color=f"C{number}", label=backend, markersize=5)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_xscale("log")
    axes[0].axvline(1, color="black", lw=0.8)
    axes[0].set_yticks(range(len(labels), 0, -1), labels, fontsize=7)
    axes[0].set_xlabel("times as fast as the reference")
    axes[1].set_xlim(left=0)
    axes[1].set_xlabel("share of the copy rate")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=len(backends), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / (1.4 + 0.24 * len(labels))))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)
