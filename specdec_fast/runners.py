"""Which runner a model needs."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from specdec_fast.cache import ragged_layers
from specdec_fast.encoded import EncodedRunner
from specdec_fast.encoding import Encoded
from specdec_fast.recurrent import RecurrentRunner
from specdec_fast.runner import Runner

__all__ = ["runner_for"]


def runner_for(model: PreTrainedModel, rows: int, *, encoded: Encoded | None = None, **settings: Any) -> Runner:
    """The runner that suits a model; other arguments are :class:`~specdec_fast.runner.Runner`'s.

    Args:
        encoded: what the model reads beside the text, of so many rows; None: nothing.
    """
    if encoded is not None:
        return EncodedRunner(model, rows, encoded=encoded, **settings)
    kind = Runner if ragged_layers(model.config) is not None else RecurrentRunner
    return kind(model, rows, **settings)
