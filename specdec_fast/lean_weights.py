"""A model's weights as the native passes read them (``csrc/pass.h``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["linears", "matrix", "packed", "plain", "unpacked"]

ZERO = 128  # of a weight in 8 bits


def linears(layer: Any) -> list[Any]:
    """The seven linear maps of a layer, in the order the native code takes them.

    Raises:
        TypeError: the layer is built differently.
    """
    attention, mlp = layer.self_attn, layer.mlp
    if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        raise TypeError(f"{type(mlp.act_fn).__name__} is no SiLU")
    inner = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*inner, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def plain(module: Any, kind: type) -> Any:
    """The module, where it is exactly of this kind; a TypeError else."""
    if type(module) is not kind:
        raise TypeError(f"{type(module).__name__} is no plain {kind.__name__}")
    return module


def matrix(module: Any, rounded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A linear map: weights ``[N, K]``, float32 scales ``[N]`` (or none) and offsets ``[N]`` (or none)."""
    linear = plain(module, nn.Linear)
    weights = linear.weight.detach()
    offsets = torch.empty(0) if linear.bias is None else linear.bias.detach().float()
    if not rounded:
        return weights.contiguous(), torch.empty(0), offsets
    scales = weights.float().abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return packed((weights.float() / scales.unsqueeze(1)).round_().add_(ZERO).to(torch.uint8)), scales, offsets


def packed(weights: Tensor) -> Tensor:
    """Bytes ``[N, K]``, each :data:`ZERO` above its weight, as ``csrc/pass.h`` reads them: ``[N/16, K/4, 16, 4]``."""
    n, k = weights.shape
    whole = torch.nn.functional.pad(weights, (0, -k % 4, 0, -n % 16), value=ZERO)
    return whole.view(-1, 16, whole.shape[1] // 4, 4).transpose(1, 2).contiguous()


def unpacked(weights: Tensor) -> Tensor:
    """``[N, K]`` of :func:`packed`, with what it filled in."""
    return weights.transpose(1, 2).reshape(weights.shape[0] * 16, -1)
