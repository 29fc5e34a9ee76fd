"""Which backend runs an op, and why another does not.

A backend that is missing costs speed, never a feature: ``auto`` goes on to the next one, and says so once
where none but the reference is left.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from specdec_fast import native

__all__ = [
    "BACKENDS",
    "CAPABILITIES",
    "DEFAULT",
    "LAYERS_VARIABLE",
    "OPS",
    "VARIABLE",
    "block_backend",
    "check_default",
    "layers",
    "overload",
    "run_triton",
    "runs_natively",
    "setting_problem",
    "status",
    "triton_kernel",
    "why_not",
]

BACKENDS = ("reference", "cpu", "triton", "cuda")
OPS = ("sample", "verify", "softmax", "project", "range_sums", "decode_attention")
CAPABILITIES = ("plain", "avx2", "avx512")
VARIABLE = "SPECDEC_FAST_BACKEND"
CAPABILITY_VARIABLE = "SPECDEC_FAST_CPU_CAPABILITY"
LAYERS_VARIABLE = "SPECDEC_FAST_LAYERS"
TEAM_VARIABLE = "SPECDEC_FAST_CUDA_TEAM"  # of kernels/cuda/plan.cuh
FEW_POSITIONS = 64  # of all rows, up to which a GPU's blocks would wait for the one that ends a row
TRITON_MODULE = "specdec_fast.triton_kernels.launch"

_WRITTEN = {"cpu": OPS[:-1], "cuda": OPS[:-1]}  # the ops of a backend that has not all of them
_DEVICES = {"cpu": "cpu", "cuda": "cuda"}  # the kind of device a compiled backend needs
_PREFERRED = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_chosen: dict[tuple[str, str, str], str] = {}
_native: dict[tuple[str, str], bool] = {}
_told: set[str] = set()


def overload(op: str, like: Tensor, backend: str | None) -> Callable[..., Any]:
    """The operator that runs ``op`` for tensors like ``like``.

    Args:
        op: its name in ``torch.ops.specdec_fast``.
        like: a tensor on the device of the call.
        backend: one of :data:`BACKENDS`, ``"auto"``, or None: what ``SPECDEC_FAST_BACKEND`` said when the package was
            imported.

    Raises:
        ValueError: an unknown backend, one that is not there, or one for another kind of device.
    """
    return getattr(getattr(torch.ops.specdec_fast, op), _overload_name(op, like.device.type, backend or DEFAULT))


@torch.compiler.assume_constant_result
def block_backend(positions: int, device: str) -> str | None:
    """The backend of rule *block* where nobody asks for one; None: the usual one.

    The CUDA queue ends a row by one block's work, which many rows hide and few do not: a millisecond at a vocabulary of
    128,256, on an H200. Triton's kernels share it out.

    Args:
        positions: of all rows.
        device: kind of.
    """
    if device != "cuda" or positions > FEW_POSITIONS or DEFAULT != "auto" or os.environ.get(TEAM_VARIABLE):
        return None
    return "triton" if _overload_name("verify", device, DEFAULT) == "default" and _has_triton() else None


@functools.cache
def _has_triton() -> bool:
    return why_not("verify", "triton") is None


def runs_natively(op: str) -> bool:
    """Whether an op on the CPU is the C++ kernel's by default."""
    key = (op, DEFAULT)
    if key not in _native:
        _native[key] = DEFAULT in ("auto", "cpu") and not why_not(op, "cpu")
    return _native[key]


@torch.compiler.assume_constant_result
def _overload_name(op: str, device: str, backend: str) -> str:
    key = (op, device, backend)
    if key not in _chosen:
        name = _best(op, device) if backend == "auto" else _insist(op, device, backend)
        _chosen[key] = name if name in ("reference", "triton") else "default"
    return _chosen[key]


def _insist(op: str, device: str, backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be auto, {', '.join(BACKENDS)}, not {backend!r} (argument or {VARIABLE})")
    missing = why_not(op, backend)
    if missing:
        raise ValueError(f"backend {backend!r} is not there: {missing}")
    if device != _DEVICES.get(backend, device):
        raise ValueError(f"backend {backend!r} needs tensors on a {backend} device, not on a {device} one")
    return backend


def why_not(op: str, backend: str) -> str | None:
    """Why a backend cannot run an op on this machine; None where it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        try:
            triton_kernel(op)
        except Exception as error:  # a broken Triton fails in ways other than ImportError
            return f"{type(error).__name__}: {error}"
        if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
            return None
        return "there is no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, very slowly)"
    if op not in _WRITTEN.get(backend, OPS):
        return f"the {backend} kernels are those of {', '.join(_WRITTEN[backend])}"
    part = native.status()[f"_ops_{backend}"]
    if not part["loaded"]:
        return part["reason"]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"specdec_fast::{op}", backend.upper()):
        return f"{part['path']} has no kernel for {op}: it was built from older sources, build or install it again"
    if backend == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


def check_default(device: str) -> None:
    """Refuses environment variables by which the rules cannot run on a kind of device.

    Raises:
        ValueError: an unknown name, a backend that is not there, or one for another kind of device.
    """
    if problem := setting_problem():
        raise ValueError(problem)
    for op in ("sample", "verify"):
        _overload_name(op, device, DEFAULT)


def layers() -> str:
    """How decoder layers are to run on a GPU, as ``SPECDEC_FAST_LAYERS`` says.

    Returns:
        ``"plain"``: as the model has them, ``"fused"``: as few operations, or ``"auto"``, the default: the faster way.
    """
    return os.environ.get(LAYERS_VARIABLE) or "auto"


def setting_problem() -> str | None:
    """What is wrong with an environment variable that chooses kernels; None where nothing is."""
    asked = os.environ.get(CAPABILITY_VARIABLE)
    if asked and asked not in CAPABILITIES:
        return f"{CAPABILITY_VARIABLE} must be one of {', '.join(CAPABILITIES)}, not {asked!r}"
    if layers() not in ("auto", "plain", "fused"):
        return f"{LAYERS_VARIABLE} must be auto, plain or fused, not {layers()!r}"
    if DEFAULT == "auto":
        return None
    if DEFAULT not in BACKENDS:
        return f"{VARIABLE} must be auto, {', '.join(BACKENDS)}, not {DEFAULT!r}"
    missing = why_not("verify", DEFAULT)
    return f"{VARIABLE}={DEFAULT} is not there: {missing}" if missing else None


def triton_kernel(op: str) -> Callable[..., Any]:
    """The function that launches the Triton kernels of an op; its arguments are those of the op's schema."""
    return getattr(importlib.import_module(TRITON_MODULE), op)


def run_triton(op: str, *arguments: Any) -> Any:
    """Launches the Triton kernels of an op on the device of its first argument, whichever is the current one.

    Raises:
        RuntimeError: Triton cannot compile or launch a kernel there; its own errors are of no kind that callers know.
    """
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            return triton_kernel(op)(*arguments)
        except Exception as error:
            if not type(error).__module__.startswith("triton"):
                raise
            raise RuntimeError(f"{op} does not run on {device}: {error}") from error


def status() -> dict[str, dict[str, Any]]:
    """What each backend can run here, and why not the rest.

    ``{"cpu": {"ops": [...], "missing": {op: reason}, "capability": str}, ...}``; the instruction set of the CPU kernels
    is there where they are.
    """
    report: dict[str, dict[str, Any]] = {}
    for backend in BACKENDS:
        reasons = {op: why_not(op, backend) for op in OPS}
        missing = {op: reason for op, reason in reasons.items() if reason}
        report[backend] = {"ops": [op for op in OPS if op not in missing], "missing": missing}
    if "sample" in report["cpu"]["ops"]:
        report["cpu"]["capability"] = CAPABILITIES[torch.ops.specdec_fast.cpu_capability()]
    return report


def _best(op: str, device: str) -> str:
    missing: dict[str, str] = {}
    for name in _PREFERRED.get(device, ("reference",)):
        if op not in _WRITTEN.get(name, OPS):
            continue
        if reason := why_not(op, name):
            missing[name] = reason
        else:
            break
    if missing and name == "reference" and not native.disabled() and device not in _told:
        _told.add(device)
        lost, reasons = " and ".join(missing), "; ".join(missing.values())
        warnings.warn(f"{op} runs without its {lost} kernels, which only costs speed: {reasons}", stacklevel=5)
    return name


DEFAULT = os.environ.get(VARIABLE) or "auto"
