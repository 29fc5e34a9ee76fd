"""An LM head for part of a vocabulary, so that the other logits are never computed."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec_fast.runner import Head

__all__ = ["dense_head", "pruned_head"]

WORTHWHILE = 0.75  # above this share of the rows a copy saves less than it costs in memory
SMALL = 4 << 20  # entries of a head that is read in well under a millisecond anyway
TOLERANCE = 0.02  # of the logits' spread: another summation order in bfloat16

_kept: weakref.WeakKeyDictionary[PreTrainedModel, dict[bytes, Head | None]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def pruned_head(model: PreTrainedModel, ids: Tensor) -> Head | None:
    """A copy of the head's rows for ``ids [K]``, in their order; the model itself stays as it is.

    Returns:
        A function from final hidden states ``[.., H]`` to logits ``[.., K]``. None where it would not pay, or where
        the copy does not give the model's own logits (soft-capping, a logit scale, a quantised head). Whatever it
        gives, the law is read off these very logits, so a copy that has grown stale costs acceptance at most.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta:
        return None
    if weight.numel() < SMALL or len(ids) > WORTHWHILE * weight.shape[0] or not len(ids):
        return None
    key = ids.cpu().numpy().tobytes() + str((weight._version, weight.data_ptr())).encode()
    with _lock:
        kept = _kept.setdefault(model, {})
        if key not in kept:
            kept.clear()
            kept[key] = _copy(model, weight, getattr(head, "bias", None), ids.to(weight.device))
        return kept[key]


def dense_head(model: PreTrainedModel, ids: Tensor) -> Head:
    """Logits of ``ids [K]`` out of the whole head's, without a copy: for a plain linear head and rare passes."""
    head: Any = model.get_output_embeddings()
    ids = ids.to(head.weight.device)

    def logits(hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, head.weight, head.bias)[..., ids]

    return logits


@torch.no_grad()
def _copy(model: PreTrainedModel, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Head | None:
    rows = weight[ids].detach()
    offset = None if bias is None else bias[ids].detach()

    def head(hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, rows, offset)

    probe = torch.arange(1, 9, device=weight.device).unsqueeze(0).remainder(weight.shape[0])
    try:
        full = model(input_ids=probe, use_cache=False).logits[..., ids].float()
        own = head(model.base_model(input_ids=probe, use_cache=False).last_hidden_state).float()
    except (AttributeError, TypeError, RuntimeError):
        return None
    return head if bool((full - own).abs().amax() <= TOLERANCE * full.std()) else None
