"""A model's modules and weights.

Torch's own generators hand every entry up through one frame for each module above it, which for a model of thirty
layers is half a millisecond each time; a call of a small model asks a dozen times.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["buffers_of", "modules_of", "parameter_count", "parameters_of"]


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Each module once, in the order of ``model.modules()``."""
    found: dict[int, nn.Module] = {}
    waiting: list[nn.Module] = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting.extend(child for child in reversed(module._modules.values()) if child is not None)
    return list(found.values())


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """Each parameter once, tied ones too, in the order of ``model.parameters()``."""
    found = {id(p): p for module in modules_of(model) for p in module._parameters.values() if p is not None}
    return list(found.values())


def buffers_of(model: nn.Module) -> list[Tensor]:
    """Each buffer once, in the order of ``model.buffers()``."""
    found = {id(b): b for module in modules_of(model) for b in module._buffers.values() if b is not None}
    return list(found.values())


def parameter_count(model: nn.Module) -> int:
    """Numbers among a model's parameters, as ``num_parameters`` of a Transformers model counts them."""
    if getattr(model, "is_loaded_in_4bit", False):  # several numbers an entry
        return int(model.num_parameters())  # type: ignore[operator]
    return sum(parameter.numel() for parameter in parameters_of(model))
