"""Attention masks and positions of rows that stand at different columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from specdec_fast.cache import has_state

__all__ = [
    "level_mask",
    "looked_up_positions",
    "positions_of",
    "ragged_masks",
    "text_positions",
    "windows_of",
]

UNBOUNDED = 1 << 30  # positions; more than any text has, and an int32


def level_mask(end: int, visible: Tensor | None) -> Tensor | None:
    """The two-dimensional mask ``generate`` itself would pass: ``[R, end]``, None where nothing is hidden."""
    if visible is None:
        return None
    if end <= visible.shape[1]:
        return visible[:, :end].long()
    return torch.nn.functional.pad(visible.long(), (0, end - visible.shape[1]), value=1)


def text_positions(columns: Tensor, visible: Tensor | None) -> Tensor:
    """Position ids ``[R, n]``: columns counted without the hidden ones; 0 for a hidden column."""
    if visible is None:
        return columns
    prompt = visible.shape[1]
    inside = (visible.long().cumsum(1) - 1).masked_fill(~visible, 0)
    hidden = prompt - visible.sum(1, keepdim=True)
    return torch.where(columns < prompt, inside.gather(1, columns.clamp(max=prompt - 1)), columns - hidden)


def positions_of(model: PreTrainedModel) -> int:
    """How many positions a model was made for."""
    config = model.config.get_text_config(decoder=True)
    said = (getattr(config, name, None) for name in ("max_position_embeddings", "max_target_positions"))
    return min((places for places in said if isinstance(places, int) and places > 0), default=UNBOUNDED)


def looked_up_positions(model: PreTrainedModel) -> int:
    """How many positions a model can be told.

    Rotary ones are computed and go on beyond those it was made for; others may be looked up in a table of as many.
    """
    made_for, decoder = positions_of(model), model.get_decoder()
    buffers = dict(decoder.named_buffers())
    computed = any(name.endswith("inv_freq") for name in buffers)
    kept = [*buffers.values(), *(values for name, values in decoder.named_parameters() if "position" in name)]
    tables = any(values.dim() > 1 and len(values) >= made_for for values in kept)
    return UNBOUNDED if computed and not tables else made_for


def ragged_masks(
    model: PreTrainedModel, columns: Tensor, end: int, visible: Tensor | None
) -> Tensor | dict[str, Tensor | None]:
    """Explicit masks for rows at different columns: ``[R, 1, n, end]``, one a layer type where there are several; None
    for layers that keep a state, whose columns are all of a text."""
    kv = torch.arange(end, device=columns.device)
    query = columns.unsqueeze(-1)
    seen = kv <= query
    if visible is not None:
        seen &= level_mask(end, visible).bool().unsqueeze(1)  # type: ignore[union-attr]
    # A hidden or ignored lane sees itself: a row of nothing would turn the softmax into NaN
    seen |= kv == query
    masks: dict[str, Tensor] = {}
    for name, size in windows_of(model).items():
        mask = (seen if size is None else seen & (kv > query - size)).unsqueeze(1)
        if model.config._attn_implementation == "eager":
            lowest = torch.finfo(model.dtype).min
            mask = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, lowest)
        masks[name] = mask
    if len(masks) == 1:
        return next(iter(masks.values()))
    states = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()) - set(masks)
    without: dict[str, None] = dict.fromkeys(states)
    return {**masks, **without}


def windows_of(model: PreTrainedModel) -> dict[str, int | None]:
    """Attention patterns of the model's layers: sliding-window size by layer type, None for full attention.

    Raises:
        ValueError: a layer type whose mask is not known here.
    """
    config = model.config.get_text_config(decoder=True)
    layers: list[Any] = DynamicCache(config=config).layers
    sizes = {getattr(layer, "sliding_window", None) for layer in layers if isinstance(layer, CacheLayerMixin)}
    names = set(getattr(config, "layer_types", None) or ())
    if any(map(has_state, layers)):
        names &= {"full_attention", "sliding_attention"}
        sizes = sizes or {None}
    if names - {"full_attention", "sliding_attention"} or len(sizes - {None}) > 1:
        raise ValueError(f"attention pattern {sorted(names)} has no ragged mask")
    return {"full_attention" if size is None else "sliding_attention": size for size in sizes}
