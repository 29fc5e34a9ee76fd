"""What ``specdec-fast env`` reports."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

from specdec_fast import __version__, console

__all__ = ["report"]


def report() -> dict[str, Any]:
    """Versions, devices, native parts, backends of the ops and default models, ready for JSON."""
    from specdec_fast import dispatch, native, ops

    versions: dict[str, str | None] = {"specdec_fast": __version__, "python": sys.version.split()[0]}
    # A CUDA wheel has its toolkit in the version; in a tree that is not installed there is none to ask for
    for name in ("specdec_fast", "torch", "transformers", "tokenizers", "triton"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions.setdefault(name, None)
    return {
        "versions": versions,
        "devices": _devices(),
        "native": native.status(),
        "backends": ops.status(),
        "problem": dispatch.setting_problem(),
        "models": _models(),
    }


def _devices() -> list[dict[str, Any]]:
    import torch

    cpu = torch.device("cpu")
    features = [torch.backends.cpu.get_cpu_capability(), console.counted(torch.get_num_threads(), "thread")]
    features.append("bfloat16" if console.computes_bfloat16(cpu) else "no bfloat16 instructions")
    found: list[dict[str, Any]] = [
        {"name": "cpu", "about": ", ".join(features), "bfloat16": console.computes_bfloat16(cpu)}
    ]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        about = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute capability {facts.major}.{facts.minor}"
        device = torch.device("cuda", index)
        found.append({"name": str(device), "about": about, "bfloat16": console.computes_bfloat16(device)})
    return found


def _models() -> dict[str, dict[str, Any]]:
    from specdec_fast import pretrained

    target = pretrained.cache_folder() / pretrained.TARGET_NAME
    cached = target.is_dir()
    models: dict[str, dict[str, Any]] = {
        "target": {
            "path": str(target),
            "cached": cached,
            "state": "cached" if cached else "not there yet: fetched when first used, 93 MB",
        }
    }
    try:
        models["drafter"] = {"path": str(pretrained.default_drafter()), "cached": True, "state": "in the package"}
    except FileNotFoundError as error:
        models["drafter"] = {"path": None, "cached": False, "state": str(error)}
    return models
