"""A model's weights as the native passes read them (``csrc/pass.h``)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from specdec_fast.cache import multimodal

__all__ = [
    "embedded",
    "equal",
    "gates",
    "hooked",
    "layer_kind",
    "linears",
    "matrix",
    "norms_of",
    "packed",
    "plain",
    "state",
    "text_parts",
    "turns",
    "unpacked",
]

UNTURNED = "unturned"
ZERO = 128  # of a weight in 8 bits
SAMPLES = 64  # of each matrix, to see whether it has been changed


def text_parts(model: Any) -> list[Any]:
    """The part of a model that reads text, and its LM head; what sees pictures and hears sounds is left out."""
    if not multimodal(model):
        return [model.base_model, model]
    return [part for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None]


def hooked(model: Any) -> bool:
    """Whether something wants to know of calls of what reads text. Hooks that Transformers leaves behind wherever
    hidden states were once asked for do nothing where they are not."""
    parts = [model, model.base_model, *(module for part in text_parts(model) for module in part.modules())]
    hooks = [hook for part in parts for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())]
    left = "transformers.utils.output_capturing"
    changed = any("forward" in vars(part) for part in parts)
    return changed or any(getattr(hook, "__module__", "") != left for hook in hooks)


def linears(layer: Any) -> list[Any]:
    """The seven linear maps of a layer, in the order the native code takes them."""
    attention, mlp = layer.self_attn, layer.mlp
    inner = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*inner, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def gates(layers: list[Any]) -> bool:
    """Whether the layers' gates are GELU by tanh, and not SiLU.

    Raises:
        TypeError: they are neither.
    """
    names = {type(layer.mlp.act_fn).__name__ for layer in layers}
    if names <= {"SiLU", "SiLUActivation"}:
        return False
    if names <= {"GELUTanh", "PytorchGELUTanh"}:
        return True
    raise TypeError(f"{', '.join(names)} is neither SiLU nor GELU by tanh")


def norms_of(modules: list[Any]) -> tuple[Tensor, float]:
    """What RMS norms multiply by, ``[N, n]`` float32, and their epsilon.

    Raises:
        TypeError: one is no such norm.
        ValueError: they differ.
    """
    weights, epsilons = [], set()
    for module in modules:
        name, weight = type(module).__name__, module.weight.detach().float()
        if not name.endswith("RMSNorm"):
            raise TypeError(f"{name} is no RMSNorm")
        ours = name.startswith("Gemma")  # whose weights are what is added to 1
        weights.append(1 + weight if ours else weight)
        epsilons.add(float(module.eps if ours else module.variance_epsilon))
    if len(epsilons) > 1:
        raise ValueError("the norms differ")
    return torch.stack(weights), epsilons.pop()


def layer_kind(rotary: Any, layer: Any) -> str:
    """What rotary positions of a layer go by: empty where layers have the same, :data:`UNTURNED` where it has none."""
    if not getattr(layer.self_attn, "use_rope", True):
        return UNTURNED
    several = "layer_type" in inspect.signature(rotary.forward).parameters
    return layer.self_attn.layer_type if several else ""


def turns(rotary: Any, kinds: list[str], positions: int, dim: int) -> Tensor:
    """Cosine and sine of every position for each kind of layer: ``[T, P, 2, dim]`` float32.

    Raises:
        ValueError: only part of each head turns.
    """
    tables = []
    for kind in kinds:
        if kind == UNTURNED:
            still = torch.tensor([1.0, 0.0]).view(1, 2, 1)
            tables.append(still.expand(positions, 2, dim))
            continue
        which = (kind,) if kind else ()
        cos, sin = rotary(torch.empty(0, dtype=torch.float32), torch.arange(positions).unsqueeze(0), *which)
        if cos.shape[-1] != dim:
            raise ValueError("only part of each head turns")
        tables.append(torch.stack([cos[0], sin[0]], 1))
    return torch.stack(tables).contiguous()


def embedded(module: Any) -> tuple[Tensor, float]:
    """An embedding's weights ``[V, n]``, and what they are multiplied by.

    Raises:
        TypeError: it does something else.
    """
    if type(module).__name__ == "Gemma3TextScaledWordEmbedding":
        return module.weight.detach().contiguous(), float(module.embed_scale.to(module.weight.dtype))
    return plain(module, nn.Embedding).weight.detach().contiguous(), 1.0


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
    names = ("scaling", "variance_epsilon", "attention_scaling", "eps", "scalar_embed_scale")
    settings = [
        (type(m), [vars(m)[name] for name in names if type(vars(m).get(name)) is float]) for m in model.modules()
    ]
    places = [(p.data_ptr(), p.dtype, p.shape) for p in parameters]
    return [torch.cat(small), torch.cat(some), settings, places, str(vars(model)["config"]._attn_implementation)]


def equal(one: list[Any], other: list[Any]) -> bool:
    """Whether two states are the same."""
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)
