"""Loading of the compiled parts, once, and the reasons why one is missing.

A missing binary costs speed, never a feature: nothing is warned about at import, and `status` says
what is there. One that is older than the sources beside it, in a checkout, is not loaded, and that is warned
about. SPECDEC_FAST_DISABLE_NATIVE=1 forces the Python implementations.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

__all__ = ["disabled", "load_ops", "load_text", "status"]

DISABLE = "SPECDEC_FAST_DISABLE_NATIVE"
STALE = "built from other sources than csrc/ holds now: `pip install --no-build-isolation -e .` builds it again"

_PACKAGE = Path(__file__).parent
_UNBUILT = {
    "_ops_cpu": "",
    "_ops_cuda": "; a build makes it where torch has CUDA and nvcc is found, or SPECDEC_FAST_CUDA_HOME names a toolkit",
}
_lock = threading.Lock()
_modules: dict[str, ModuleType | None] = {}
_reasons: dict[str, str] = {}


class _Absent(Exception):
    """A part that is not there, in words for the user."""


def disabled() -> bool:
    """Whether the user chose to run without compiled parts."""
    return os.environ.get(DISABLE, "0") not in ("", "0")


def load_ops() -> bool:
    """Register the CPU and CUDA kernels with torch's dispatcher; False when those of the CPU are not there."""
    _load("_ops_cuda", _register_cuda)
    return _load("_ops_cpu", _register_ops) is not None


def load_text() -> ModuleType | None:
    """The pybind11 module `specdec_fast._text`, or None."""
    return _load("_text", lambda: importlib.import_module("specdec_fast._text"))


def status() -> dict[str, Any]:
    """What is loaded, from where, and why not.

    `{"_ops_cpu": {"loaded": bool, "path": str | None, "reason": str | None}, "_ops_cuda": ...,
    "_text": ..., "build": the record the build left, or None}`.
    """
    load_ops()
    load_text()
    report: dict[str, Any] = {}
    for name in ("_ops_cpu", "_ops_cuda", "_text"):
        module = _modules[name]
        report[name] = {
            "loaded": module is not None,
            "path": getattr(module, "__file__", None),
            "reason": _reasons.get(name),
        }
    report["build"] = _build_record()
    return report


def _load(name: str, load: Any) -> ModuleType | None:
    with _lock:
        if name not in _modules:
            _modules[name] = None
            if disabled():
                _reasons[name] = f"disabled by {DISABLE}"
            else:
                try:
                    if _stale():
                        raise _Absent(STALE)
                    _modules[name] = load()
                except _Absent as absent:
                    _reasons[name] = _build_reason(name) or str(absent)
                except Exception as error:  # a stale or foreign binary fails in many ways
                    _reasons[name] = _build_reason(name) or f"{type(error).__name__}: {error}"
        return _modules[name]


def _register_ops() -> ModuleType:
    return _register("_ops_cpu")


def _register_cuda() -> ModuleType:
    # Without CUDA, torch lacks what the library asks it for
    if (_PACKAGE / "_ops_cuda.so").exists() and torch.version.cuda is None:
        raise _Absent("this torch is built without CUDA")
    return _register("_ops_cuda")


def _register(name: str) -> ModuleType:
    path = _PACKAGE / f"{name}.so"
    if not path.exists():
        raise _Absent(f"{name}.so is not in the package folder: it was not built{_UNBUILT[name]}")
    torch.ops.load_library(str(path))
    module = ModuleType(name)  # stands for the library, which is no Python module
    module.__file__ = str(path)
    return module


@functools.cache
def _stale() -> bool:
    """Whether the binaries of a checkout were built from other sources than it holds; warns once."""
    root, record = _PACKAGE.parent, _build_record()
    if record is None or not (root / "csrc" / "building.py").exists():
        return False
    files = [*root.glob("csrc/*.[ch]*"), *root.glob("kernels/cuda/*.cu*")]
    now = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()
    if record.get("sources") == now:
        return False
    warnings.warn(f"specdec_fast runs without its compiled parts: they were {STALE}", RuntimeWarning, stacklevel=2)
    return True


def _build_reason(name: str) -> str | None:
    record = _build_record()
    return record["failed"].get(name) if record else None


def _build_record() -> dict[str, Any] | None:
    try:
        return json.loads((_PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return None
