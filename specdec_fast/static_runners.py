"""Which passes of fixed shape a model needs, whether it can run them, and the cache and runner for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from specdec_fast import static_recurrent, static_runner, static_sources
from specdec_fast.cache import ragged_layers
from specdec_fast.encoding import Encoded
from specdec_fast.static_cache import StaticCache
from specdec_fast.static_recurrent import StaticRecurrentRunner, StaticUnit
from specdec_fast.static_runner import StaticRunner
from specdec_fast.static_sources import SourceShape, StaticEncodedRunner

__all__ = ["empty_cache", "host_runner_for", "static_runner_for", "why_not_rounds", "why_not_static"]


def why_not_static(model: PreTrainedModel, encoded: Encoded | None = None, prompt: Tensor | None = None) -> str | None:
    """Why a model cannot run passes of fixed shape; None where it can.

    Args:
        encoded: what it reads beside the text; None: nothing.
        prompt: ``[B, P]`` ids that texts begin with.
    """
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(places) > 1:
        return f"{type(model).__name__} is spread over several devices"
    if encoded is not None:
        return static_sources.why_not_static(model, encoded, prompt)
    if ragged_layers(model.config) is None:
        return static_recurrent.why_not_static(model)
    return static_runner.why_not_static(model)


def why_not_rounds(model: PreTrainedModel, encoded: Encoded | None = None) -> str | None:
    """Why rounds on the device cannot roll a model back that runs passes of fixed shape; None where they can."""
    if encoded is None and ragged_layers(model.config) is None:
        return f"{type(model).__name__} keeps a state, which the host rolls back"
    return None


def empty_cache(
    model: PreTrainedModel, rows: int, capacity: int, encoded: Encoded | None = None, shape: SourceShape | None = None
) -> StaticCache:
    """A static cache for a model that :func:`why_not_static` has nothing against, its buffers allocated.

    Args:
        encoded, shape: of a model that reads what an encoder made, and what sources of this shape need.
    """
    if encoded is not None and shape is not None:
        return static_sources.empty_cache(model, rows, capacity, encoded, shape)
    if ragged_layers(model.config) is None:
        return static_recurrent.empty_cache(model, rows, capacity)
    return static_runner.empty_cache(model, rows, capacity)


def static_runner_for(
    model: PreTrainedModel, cache: StaticCache, rows: int, *, encoded: Encoded | None = None, **settings: Any
) -> StaticRunner:
    """The runner of rounds on the device that suits a model; other arguments are :class:`StaticRunner`'s.

    Args:
        encoded: what the model reads beside the text, of so many rows; None: nothing.
    """
    if encoded is not None:
        return StaticEncodedRunner(model, cache, rows, encoded=encoded, **settings)
    return StaticRunner(model, cache, rows, **settings)


def host_runner_for(
    model: PreTrainedModel, cache: StaticCache, rows: int, *, encoded: Encoded | None = None, **settings: Any
) -> StaticRunner | StaticRecurrentRunner:
    """:func:`static_runner_for` for the loop on the host, which rolls models with states back as well."""
    if isinstance(cache, StaticUnit):
        return StaticRecurrentRunner(model, cache, rows, **settings)
    return static_runner_for(model, cache, rows, encoded=encoded, **settings)
