"""A model's weights as the native passes read them (``csrc/pass.h``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["equal", "linears", "matrix", "packed", "plain", "state", "unpacked"]

ZERO = 128  # of a weight in 8 bits
SAMPLES = 64  # of each matrix, to see whether it has been changed


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


@torch.no_grad()
def state(model: nn.Module, rounded: bool) -> list[Any]:
    """What the lean form copies, and how the rest is put together.

    Writing through ``.data`` leaves no trace in a version counter, so values are compared: norms, offsets and
    frequencies whole, matrices at a few places (an exact form has no copies of them).
    """
    parameters = list(model.parameters())
    small = [torch.empty(0)] + [p.detach().float().reshape(-1) for p in [*parameters, *model.buffers()] if p.ndim < 2]
    some = [torch.empty(0)] + [
        p.detach().reshape(-1)[:: max(1, p.numel() // SAMPLES)].float() for p in parameters if rounded and p.ndim >= 2
    ]
    names = ("scaling", "variance_epsilon", "attention_scaling")
    settings = [
        (type(m), [vars(m)[name] for name in names if type(vars(m).get(name)) is float]) for m in model.modules()
    ]
    places = [(p.data_ptr(), p.dtype, p.shape) for p in parameters]
    return [torch.cat(small), torch.cat(some), settings, places, str(vars(model)["config"]._attn_implementation)]


def equal(one: list[Any], other: list[Any]) -> bool:
    """Whether two states are the same."""
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)
