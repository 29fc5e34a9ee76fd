"""A decoder's text behind the mark that its model begins every text with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

__all__ = ["Begun", "mark_of"]


def mark_of(model: PreTrainedModel) -> int | None:
    """The id that an encoder-decoder model's texts begin with; None where there is none, or the model is another."""
    if not model.config.is_encoder_decoder:
        return None
    configs = model.generation_config, model.config
    given = [getattr(config, "decoder_start_token_id", None) for config in configs]
    found: Any = next((mark for mark in [*given, model.generation_config.bos_token_id] if mark is not None), None)
    return found[0] if isinstance(found, list) else found


class Begun:
    """The context of a drafter that begins its texts with a mark of its own, or of a target that does.

    Args:
        context: of the text.
        mark: the drafter's; None: it has none.
        dropped: the target's, which is no text; None: it has none.
    """

    def __init__(self, context: Any, mark: int | None, dropped: int | None):
        self._context, self._dropped = context, dropped
        self._marks = [] if mark is None else [mark]
        self.ids: list[int] = [*self._marks, *context.ids]

    def append(self, source_ids: Sequence[int]) -> int:
        """Adds target ids; returns how many of the ids before are unchanged."""
        if self._dropped is not None and source_ids:
            source_ids = source_ids[1:] if source_ids[0] == self._dropped else source_ids
            self._dropped = None
        kept = self._context.append(source_ids) if source_ids else len(self._context.ids)
        self.ids[len(self._marks) + kept :] = self._context.ids[kept:]
        return len(self._marks) + kept
