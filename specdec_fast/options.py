"""The knobs of a call, checked before anything runs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import CompileConfig, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from specdec_fast.lookahead import SCHEDULES
from specdec_fast.randomness import UniformSource

__all__ = ["METHODS", "VERIFICATIONS", "Options"]

METHODS = ("auto", "autoregressive", "model", "tli", "projection", "slem", "slrs", "slrs_literal", "prompt_lookup")
VERIFICATIONS = ("auto", "match", "gumbel", "token", "block")
TREES = ("auto", "on", "off")
MEMORIES = ("auto", "on", "off")
COMPILES = ("auto", "off", "static", "inductor")
DEFAULT_LOOKAHEAD = 5
DEFAULT_NGRAM = 3
LOOKBEHIND = 10
_TRANSFORMERS_DEFAULTS: dict[str, Any] = getattr(GenerationConfig, "_get_default_generation_params", dict)()


@dataclass
class Options:
    """What ``fast_generate`` takes beside ``model.generate``'s own arguments; None means not given.

    See :func:`specdec_fast.fast_generate` for what each one does.
    """

    assistant_model: PreTrainedModel | None = None
    tokenizer: Any = None
    assistant_tokenizer: Any = None
    method: str = "auto"
    verification: str = "auto"
    seed: int | Sequence[int] | None = None
    num_assistant_tokens: int | None = None
    num_assistant_tokens_schedule: str | None = None
    assistant_confidence_threshold: float | None = None
    assistant_temperature: float | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    target_lookbehind: int | None = None
    assistant_lookbehind: int | None = None
    assistant_window: int | None = None
    draft_tree: str = "auto"
    draft_memory: str = "auto"
    compile: str = "auto"
    streamer: BaseStreamer | None = None
    source: UniformSource | None = None

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("verification", self.verification, VERIFICATIONS)
        _one_of("draft_tree", self.draft_tree, TREES)
        _one_of("draft_memory", self.draft_memory, MEMORIES)
        if isinstance(self.compile, CompileConfig):
            raise TypeError("compile takes a name: give a CompileConfig as compile_config, and compile='inductor'")
        _one_of("compile", self.compile, COMPILES)
        if self.num_assistant_tokens_schedule is not None:
            _one_of("num_assistant_tokens_schedule", self.num_assistant_tokens_schedule, SCHEDULES)
        for name in ("num_assistant_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size"):
            _whole(name, getattr(self, name), 1)
        for name in ("target_lookbehind", "assistant_lookbehind"):
            _whole(name, getattr(self, name), 1)
        _whole("assistant_window", self.assistant_window, 2)
        _within("assistant_confidence_threshold", self.assistant_confidence_threshold, 0.0, 1.0)
        _within("assistant_temperature", self.assistant_temperature, 0.0, float("inf"))
        if self.assistant_model is not None and not isinstance(self.assistant_model, PreTrainedModel):
            raise TypeError(
                f"assistant_model must be a Transformers model, not {type(self.assistant_model).__name__}: load it "
                "with AutoModelForCausalLM.from_pretrained"
            )

    @property
    def given(self) -> set[str]:
        """Names of the options that are not at their default."""
        return {field.name for field in fields(self) if getattr(self, field.name) != field.default}

    @property
    def speculate(self) -> bool:
        """Whether the caller asked for more than plain decoding."""
        return (
            self.assistant_model is not None
            or self.prompt_lookup_num_tokens is not None
            or self.method not in ("auto", "autoregressive")
        )

    def completed_by(self, *configs: Any, prepared: bool = False) -> Options:
        """The same, with what was not given in the call taken from generation configs, the first that has it.

        Args:
            prepared: ``generate`` has prepared the configs. They then hold Transformers' own defaults too (20 draft
                tokens, a confidence of 0.4), which are nobody's choice and do not count.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in (
            "num_assistant_tokens",
            "num_assistant_tokens_schedule",
            "assistant_confidence_threshold",
            "prompt_lookup_num_tokens",
            "max_matching_ngram_size",
            "target_lookbehind",
            "assistant_lookbehind",
            "assistant_window",
        ):
            for config in configs:
                value = getattr(config, name, None)
                if values[name] is None and not (prepared and value == _TRANSFORMERS_DEFAULTS.get(name)):
                    values[name] = value
        return Options(**values)


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not known: use one of {', '.join(map(repr, known))}")


def _whole(name: str, value: Any, least: int) -> None:
    if value is None:
        return
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {value!r}") from None
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name}={value!r} is out of range: use {least} or more")


def _within(name: str, value: Any, least: float, most: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name}={value!r} is out of range: use a number from {least:g} to {most:g}")
