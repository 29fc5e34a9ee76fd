"""Generation settings as a call finds them: its own arguments, a config it was given, the model's."""

from __future__ import annotations

import copy
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

__all__ = ["Settings"]


class Settings:
    """Reads generation settings where ``generate`` would, without changing what the caller handed in."""

    def __init__(self, model: PreTrainedModel, config: GenerationConfig | None, kwargs: dict[str, Any]):
        self.config = config
        self.kwargs = dict(kwargs)
        self._default = getattr(model, "generation_config", None)

    def get(self, name: str) -> Any:
        if self.kwargs.get(name) is not None:
            return self.kwargs[name]
        for config in (self.config, self._default):
            if getattr(config, name, None) is not None:
                return getattr(config, name)
        return None

    def take(self, name: str) -> Any:
        """The setting, which ``generate`` will then not see."""
        value = self.get(name)
        self.kwargs.pop(name, None)
        if value is not None and getattr(self.config, name, None) is not None:
            self.config = copy.deepcopy(self.config)
            setattr(self.config, name, None)
        if getattr(self._default, name, None) is not None:
            self.kwargs[name] = None
        return value

    def other_strategy(self) -> str | None:
        """The argument that asks for a decoding strategy other than greedy and sampling."""
        if (self.get("num_beams") or 1) > 1:
            return "num_beams"
        for name in ("penalty_alpha", "dola_layers", "constraints", "force_words_ids"):
            if self.get(name):
                return name
        return "cache_implementation='paged'" if self.get("cache_implementation") == "paged" else None
