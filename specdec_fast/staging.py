"""Numbers of the host on their way to a device, for which nobody waits.

``torch.tensor(..., device="cuda")`` copies from pageable memory and returns when the device has come to it: behind a
pass of the target that is the whole pass, and what was to be launched next is launched late.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["moved", "staged", "upload"]


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without a wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def staged(values: Sequence[Any], device: torch.device | None, dtype: torch.dtype = torch.long) -> Tensor:
    """A tensor of values on a device (None: the host), without a wait."""
    made = torch.tensor(values, dtype=dtype, device="cpu")
    return made if device is None or device.type == "cpu" else moved(made, device)


def upload(values: Sequence[Any], to: Tensor) -> None:
    """Writes values into the first places of a tensor, without a wait."""
    staging = torch.tensor(values, dtype=to.dtype, device="cpu")
    if to.device.type == "cuda":
        staging = staging.pin_memory()
    to[: staging.shape[0]].copy_(staging, non_blocking=True)
