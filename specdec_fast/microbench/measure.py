"""From a case to rows, and the tests that come first."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec_fast.microbench.cases import Case, build
from specdec_fast.microbench.clock import STATES, Clock, Timing, copy_rate
from specdec_fast.microbench.peers import Peer
from specdec_fast.microbench.variants import COMPILED, REFERENCE, SAME, SCATTER, check, variants

__all__ = ["Plan", "key", "machine", "measure", "run", "run_tests", "test_files"]

TESTS = {
    "sample": ("test_ops_sample.py",),
    "softmax": ("test_ops_sample.py",),
    "verify": ("test_ops_verify.py",),
    "project": ("test_ops_maps.py",),
    "range_sums": ("test_ops_maps.py",),
}
GPU_TESTS = ("test_cuda_device.py", "test_triton.py")
OTHERS = {  # row field: what the time is divided into
    "ratio_to_reference": REFERENCE,
    "ratio_to_compiled": COMPILED,
    "ratio_to_same_vocabulary": SAME,
    "ratio_to_scatter": SCATTER,
    "ratio_to_vllm": "vllm",
    "ratio_to_sglang": "sglang",
    "ratio_to_flashinfer": "flashinfer",
}


@dataclass
class Plan:
    """What the rows of one run share.

    Args:
        clock: of the device.
        repetitions: interleaved repetitions.
        peers: other projects' kernels.
        compiled: whether the compiled reference is among the variants.
        copied: GB/s of a copy in this run.
    """

    clock: Clock
    repetitions: int
    peers: Sequence[Peer] = ()
    compiled: bool = False
    copied: float = 0.0

    def __post_init__(self) -> None:
        self.copied = self.copied or copy_rate(self.clock.device, self.repetitions)


def test_files(ops: Sequence[str], device: torch.device) -> list[Path]:
    """The tests of these ops beside the package; none in an installation without them."""
    folder = Path(__file__).resolve().parents[2] / "tests"
    names = [name for op in ops for name in TESTS[op]] + list(GPU_TESTS if device.type == "cuda" else ())
    files = [folder / name for name in dict.fromkeys(names)]
    return [file for file in files if file.exists()]


def run_tests(files: Sequence[Path]) -> str | None:
    """Runs them in a process of its own; None where pytest is not installed, else its last line.

    Raises:
        RuntimeError: they fail.
    """
    if importlib.util.find_spec("pytest") is None:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(command, cwd=files[0].parent.parent, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    if done.returncode:
        failed = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1])
        raise RuntimeError(f"the ops' tests are red, so nothing is measured: {failed}")
    return lines[-1]


def machine(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return f"{facts.name}, {facts.L2_cache_size / 2**20:.0f} MB L2, torch {torch.__version__}"
    features = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{features}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def measure(case: Case, plan: Plan) -> list[dict[str, Any]]:
    """One row a variant and state.

    Raises:
        RuntimeError: a variant does not return what the reference does.
    """
    clock = plan.clock
    first = build(case, clock.device)
    whole = sum(value.nbytes for value in first.values() if isinstance(value, Tensor))
    copies = [first]
    for _ in range(clock.copies(case.bytes_needed(), whole) - 1):
        copies.append({n: v.clone() if isinstance(v, Tensor) else v for n, v in first.items()})
    found = variants(case, copies, peers=plan.peers, compiled=plan.compiled)
    check(case, found, first)
    times = clock.run(found, plan.repetitions)
    return [
        _row(case, plan, variant.name, state, {other.name: times[other.name, state] for other in found})
        for variant in found
        for state in STATES
    ]


def _row(case: Case, plan: Plan, name: str, state: str, times: dict[str, Timing]) -> dict[str, Any]:
    microseconds = times[name].median()
    low, high = times[name].quartiles()
    rate = case.bytes_needed() / microseconds / 1e3
    shape = asdict(case)
    row: dict[str, Any] = {"op": shape.pop("op"), "backend": name, **shape, "state": state}
    row |= {
        "microseconds": microseconds,
        "low": low,
        "high": high,
        "samples": len(times[name].samples),
        "graph": times[name].graph,
        "bytes": case.bytes_needed(),
        "bytes_read_once": case.bytes_read_once(),
        "gigabytes_per_second": rate,
        "copy_gigabytes_per_second": plan.copied,
        "share_of_copy": rate / plan.copied,
    }
    for field, other in OTHERS.items():
        row[field] = times[other].median() / microseconds if other in times else None
    device = plan.clock.device.type
    row["machine"] = machine(plan.clock.device)
    row["reproduce"] = f"specdec-fast bench kernels --device {device} {case.options()}"
    return row


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a measured case from another, machine included."""
    names = ("op", "dtype", "batch", "gamma", "vocab", "rule", "law", "filters", "acceptance", "machine")
    return tuple(row[name] for name in names)


def run(
    cases: Sequence[Case], plan: Plan, done: Sequence[dict[str, Any]], left: Callable[[], float]
) -> Iterator[list[dict[str, Any]]]:
    """The rows of every case that ``done`` does not hold, until no seconds are left."""
    have = {key(row) for row in done}
    here = machine(plan.clock.device)
    for case in cases:
        if key(asdict(case) | {"machine": here}) in have:
            yield []
        elif left() > 0:
            yield measure(case, plan)
        else:
            return
