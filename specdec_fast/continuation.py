"""A caller's cache, taken in at the start of a call and handed back at its end."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from specdec_fast.cache import RaggedCache, keeps_nothing, read_cache, write_cache
from specdec_fast.encoded import EncodedRunner
from specdec_fast.recurrent import RecurrentRunner
from specdec_fast.runner import Runner
from specdec_fast.static_sources import StaticEncodedRunner

__all__ = ["columns_before", "load", "load_text", "new_cache", "store"]


def load(target: Runner, cache: Any, past: int) -> None:
    """Copies a caller's cache of ``past`` columns, found readable by :func:`check_cache`, into a runner's."""
    if isinstance(target, RecurrentRunner | EncodedRunner | StaticEncodedRunner):
        target.load(cache, past)
        return
    for group, own in target.caches:
        source = cache if len(group) == target.rows else _row_of(cache, group[0])
        read_cache(source, own)
        for row in group:
            target.length[row] = past


def load_text(target: Runner, cache: Any, past: int, hidden: list[int]) -> None:
    """:func:`load` into a runner that reads texts without the ``hidden`` columns of padding in front of each row's."""
    if isinstance(target, RecurrentRunner):
        own, target.hidden = target.hidden, hidden
        load(target, cache, past)
        target.hidden = own
    else:
        load(target, cache, past)
        for group, unit in target.caches:
            for layer in unit.ragged:
                for place, row in enumerate(group) if layer.is_initialized else ():
                    for buffer in (layer.keys, layer.values):
                        assert buffer is not None
                        buffer[place, :, : past - hidden[row]] = buffer[place, :, hidden[row] : past].clone()
    target.length = [past - left_out for left_out in hidden]


def new_cache(model: PreTrainedModel) -> Cache:
    """An empty cache, as ``generate`` makes one."""
    if not model.config.is_encoder_decoder:
        return DynamicCache(config=model.config)
    decoder = model.config.get_text_config(decoder=True)
    return EncoderDecoderCache(DynamicCache(config=decoder), DynamicCache(config=decoder))


def _row_of(cache: Any, row: int) -> Any:
    """One row of a cache, as a cache."""
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in part.layers:
        if getattr(layer, "is_initialized", False) and not keeps_nothing(layer):
            layer.keys, layer.values = layer.keys[row : row + 1], layer.values[row : row + 1]
    return part


def store(target: Runner, cache: Any, columns: int) -> None:
    """Writes the columns of the result into a Transformers cache."""
    if isinstance(target, RecurrentRunner | EncodedRunner | StaticEncodedRunner):
        target.store(cache, columns)
        return
    caches = [own for _, own in target.caches]
    if len(caches) == 1:
        write_cache(caches[0], cache, columns)
        return
    joined = RaggedCache(target.rows, caches[0].layer_count)
    layers: Any = joined.cache.layers
    for index, layer in enumerate(layers):
        parts: Any = [own.cache.layers[index] for own in caches]
        if parts[0].is_initialized:
            layer.keys = torch.cat([part.keys[:, :, :columns] for part in parts])
            layer.values = torch.cat([part.values[:, :, :columns] for part in parts])
            layer.is_initialized = True
    write_cache(joined, cache, columns)


def columns_before(
    config: GenerationConfig,
    columns: int,
    past: int,
    mask: Tensor | None,
    embeds: Tensor | None,
    name: str,
    encodes: bool,
) -> int:
    """Columns of the target's text in front of those of ``input_ids``; ``name`` is that of the cache's argument.

    Args:
        encodes: whether the model has an encoder.
    """
    if embeds is not None:
        if past:
            raise ValueError(f"inputs_embeds cannot continue {name}: pass input_ids")
        return embeds.shape[1] - columns
    if not past:
        return 0
    # As `generate`: the mask covers all text; ids that are as long as it repeat what the cache holds. Without one they
    # do so for a decoder-only model, and go on behind it for one with an encoder
    whole = mask.shape[1] if mask is not None else getattr(config, "_mask_length", -1 if encodes else columns)
    if whole == columns:
        ids = "decoder_input_ids" if encodes else "input_ids"
        if past >= columns:
            raise ValueError(f"{name} holds {past} columns and {ids} has {columns}: at least one token must be new")
        return 0
    return past
