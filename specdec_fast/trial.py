"""What a model is tried with, and how far what it gives may lie from a plain pass."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["alike", "distance", "exact", "sees_ahead", "trial_ids"]

# Mean difference of two logits as a share of their spread. In bfloat16 SmolLM2-135M and Qwen2.5-Coder-0.5B differ from
# themselves by up to .06 where sums come in another order, and by .17 at least where a mask is off by one column.
TOLERANCE = 0.05
ROUNDED = 0.1
EXACT = 0.002  # of that distance, where products are rounded to float32


_ahead: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


def trial_ids(model: PreTrainedModel) -> Tensor:
    """Two texts, ``[2, 7]``. Of ordinary ids: the first ones are markers in many vocabularies, which a real model never
    meets in such an order, and there rounding alone moves its logits far."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return (torch.arange(1, 15, device=model.device) * 997).remainder(vocabulary).view(2, 7)


def distance(plain: Tensor, got: Tensor) -> float:
    """How far logits ``[n, V]`` are from those of a plain pass: above 1, farther than by rounding. NaN where scores are
    no numbers."""
    limit = TOLERANCE if plain.dtype == torch.float32 else ROUNDED
    plain, got = plain.float(), got.float()
    return float((plain - got).abs().mean() / (limit * plain.std()))


def exact(model: PreTrainedModel) -> bool:
    """Whether a model's products are rounded to float32."""
    kind = model.device.type
    full = kind != "cuda" or torch.get_float32_matmul_precision() == "highest"
    full = full and not torch.is_autocast_enabled(kind)
    return model.dtype in (torch.float32, torch.float64) and full


def alike(model: PreTrainedModel, one: Tensor, other: Tensor) -> bool:
    """Whether logits ``[n, V]`` that a model gave in two ways differ by rounding at most."""
    return distance(one, other) <= (EXACT if exact(model) else 1.0)


@torch.no_grad()
def sees_ahead(model: PreTrainedModel) -> bool:
    """Whether a token sees those behind it in a pass; tried where an attention says that it is not causal."""
    if model not in _ahead:
        _ahead[model] = not all(getattr(module, "is_causal", True) for module in model.get_decoder().modules())
        if _ahead[model]:
            ids = trial_ids(model)[:1, :4]
            alone, followed = (model(input_ids=text, use_cache=False).logits[0, :2] for text in (ids[:, :2], ids))
            _ahead[model] = not distance(alone, followed) <= 1
    return _ahead[model]
