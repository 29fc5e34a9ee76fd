"""How a call is timed.

Variants are interleaved: every one of them once, then every one again, so that a machine that changes its speed changes
it for all. *Cold* calls go through copies of their inputs whose total is more than twice the last cache; *warm* ones
repeat the same inputs. On a GPU a variant that never waits for the device is captured in a CUDA graph of many calls,
and the time of a call is that of a replay over their number; others are timed between two events, launches included.
"""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["STATES", "Clock", "GpuClock", "HostClock", "Timing", "Variant", "clock_for", "copy_rate"]

STATES = ("cold", "warm")
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
LEAST_SECONDS = 2e-3  # a variant's share of one repetition, where calls are short
MOST_CALLS = 20  # ... and how many calls that may be


@dataclass
class Variant:
    """One way to do the same.

    Args:
        name: what the rows call it.
        calls: one a copy of the inputs.
        capturable: whether it may be tried in a CUDA graph.
        read: from what a peer's call leaves to ``accepted [B]`` and ``token [B]``; not timed.
    """

    name: str
    calls: Sequence[Callable[[], Any]]
    capturable: bool = True
    read: Callable[[Any], tuple[Tensor, Tensor]] | None = None


@dataclass
class Timing:
    """Microseconds of one variant in one state."""

    samples: list[float] = field(default_factory=list)
    graph: bool = False

    def median(self) -> float:
        return statistics.median(self.samples)

    def quartiles(self) -> tuple[float, float]:
        """The 25th and the 75th percentile."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


class Clock(ABC):
    """Times variants; ``cache`` is the size of the device's last cache in bytes."""

    device: torch.device
    cache: int

    @abstractmethod
    def run(self, variants: Sequence[Variant], repetitions: int) -> dict[tuple[str, str], Timing]:
        """Interleaved timings by (name, state)."""

    def copies(self, needed: int, whole: int, most: int = 2**30) -> int:
        """Copies of the inputs so that what a call needs is not in the cache.

        Args:
            needed: bytes that a call must read.
            whole: bytes of its inputs.
            most: bytes that all copies may take.
        """
        wanted = -(-2 * self.cache // max(needed, 1)) + 1
        return max(1, min(wanted, most // max(whole, 1)))


class HostClock(Clock):
    """On the CPU: wall time of single calls."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.cache = _last_cache()

    def run(self, variants: Sequence[Variant], repetitions: int) -> dict[tuple[str, str], Timing]:
        times = {(variant.name, state): Timing() for variant in variants for state in STATES}
        number = {variant.name: _calls(_seconds(variant.calls[0])) for variant in variants}
        turn = dict.fromkeys(number, 0)
        for _ in range(repetitions):
            for variant in variants:
                name = variant.name
                for _ in range(number[name]):
                    call = variant.calls[turn[name] % len(variant.calls)]
                    turn[name] += 1
                    times[name, "cold"].samples.append(_seconds(call) * 1e6)
                call = variant.calls[0]
                call()
                for _ in range(number[name]):
                    times[name, "warm"].samples.append(_seconds(call) * 1e6)
        return times


class GpuClock(Clock):
    """On a GPU: replays of CUDA graphs between two events."""

    def __init__(self, device: torch.device, calls: int = 20) -> None:
        self.device = device
        self.cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.calls = calls

    def run(self, variants: Sequence[Variant], repetitions: int) -> dict[tuple[str, str], Timing]:
        runs = {}
        times = {}
        for variant in variants:
            captured = variant.capturable and _never_waits(variant.calls[0])
            for state in STATES:
                chosen = variant.calls if state == "cold" else variant.calls[:1]
                calls = [chosen[i % len(chosen)] for i in range(max(self.calls if captured else 1, len(chosen)))]
                calls = calls if captured else calls[: self.calls]
                key = variant.name, state
                runs[key] = (_captured(calls) if captured else _in_order(calls)), len(calls)
                times[key] = Timing(graph=captured)
        for run, _ in runs.values():
            run()
        torch.cuda.synchronize(self.device)
        for _ in range(repetitions):
            for key, (run, number) in runs.items():
                times[key].samples.append(_device_seconds(run) * 1e6 / number)
        return times


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return GpuClock(device) if device.type == "cuda" else HostClock()


def copy_rate(device: torch.device, repetitions: int, size: int | None = None) -> float:
    """GB/s of a copy of a buffer beyond every cache, bytes read and bytes written counted."""
    source = torch.ones(size or COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _device_seconds if device.type == "cuda" else _seconds
    times = [seconds(lambda: target.copy_(source)) for _ in range(repetitions + 1)][1:]
    return 2 * source.numel() / statistics.median(times) / 1e9


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _calls(seconds: float) -> int:
    return max(1, min(MOST_CALLS, int(LEAST_SECONDS / max(seconds, 1e-9))))


def _device_seconds(run: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _never_waits(call: Callable[[], object]) -> bool:
    """Whether a call, warmed up, leaves the host free: what a graph can hold."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.synchronize()
    return True


def _captured(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    for call in dict.fromkeys(calls):
        call()  # whatever a first call allocates or compiles for its tensors
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _in_order(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _last_cache() -> int:
    """Bytes of the CPU's last cache; 32 MB where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes, default=2**25)
