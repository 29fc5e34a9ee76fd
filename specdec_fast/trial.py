"""What a model is tried with, and how far what it gives may lie from a plain pass."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["distance", "trial_ids"]

# Mean difference of two logits as a share of their spread. In bfloat16 SmolLM2-135M and Qwen2.5-Coder-0.5B differ from
# themselves by up to .06 where sums come in another order, and by .17 at least where a mask is off by one column.
TOLERANCE = 0.05
ROUNDED = 0.1


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
