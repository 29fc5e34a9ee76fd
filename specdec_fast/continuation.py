"""A caller's cache, taken in at the start of a call and handed back at its end."""

from __future__ import annotations

import copy
from typing import Any

import torch

from specdec_fast.cache import RaggedCache, read_cache, write_cache
from specdec_fast.runner import Runner

__all__ = ["load", "store"]


def load(target: Runner, cache: Any, past: int) -> None:
    """Copies a caller's cache of ``past`` columns, found readable by :func:`check_cache`, into a runner's."""
    for group, own in target.caches:
        source = cache if len(group) == target.rows else _row_of(cache, group[0])
        read_cache(source, own)
        for row in group:
            target.length[row] = past


def _row_of(cache: Any, row: int) -> Any:
    """One row of a cache, as a cache."""
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in part.layers:
        if getattr(layer, "is_initialized", False):
            layer.keys, layer.values = layer.keys[row : row + 1], layer.values[row : row + 1]
    return part


def store(target: Runner, cache: Any, columns: int) -> None:
    """Writes the columns of the result into a Transformers cache."""
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
