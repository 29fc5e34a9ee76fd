"""What a decoder-only model reads in a prompt beside its text: pictures, videos, sounds.

They are read once, in the pass over the prompt, which is ``generate``'s own; behind it there is nothing but text over a
cache, as where a caller hands one in. A model may count the positions of that text in a way of its own (Qwen-VL gives
a picture as many as its longer side has tokens): by how much they differ from the text's count is a number a row, which
every later pass adds.
"""

from __future__ import annotations

import copy
import inspect
import re
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from specdec_fast.cache import CACHE_NAMES, cache_argument, multimodal, ragged_layers
from specdec_fast.continuation import load, load_text, new_cache
from specdec_fast.recurrent import form_of
from specdec_fast.runner import Runner
from specdec_fast.runners import runner_for
from specdec_fast.trial import alike, sees_ahead, trial_ids

__all__ = [
    "TEXT",
    "Prompt",
    "Shown",
    "beside_text",
    "check_pictures",
    "given_pictures",
    "is_nothing",
    "placeholders",
    "reads_more",
]

TEXT = ("attention_mask", "position_ids", *CACHE_NAMES, "use_cache", "logits_to_keep", "inputs_embeds")
"""What a forward pass over text reads beside its ids."""
_A_COLUMN_EACH = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_TYPES = {"token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"}  # 0 is text
_NEVER = {"labels"}


def reads_more(model: PreTrainedModel) -> set[str]:
    """Arguments of ``generate`` that a model's pass over the prompt can read beside text; none for a language model."""
    if not multimodal(model):
        return set()
    own: Any = model.prepare_inputs_for_generation
    names = {*inspect.signature(model.forward).parameters, *inspect.signature(own).parameters}
    return names - {"input_ids", *TEXT, *_NEVER}


def beside_text(model: PreTrainedModel, arguments: dict[str, Any]) -> list[str]:
    """What of these a pass over the prompt reads beside text, by name."""
    if not reads_more(model):
        return []
    return sorted(name for name, value in arguments.items() if name not in {"input_ids", *TEXT} and _says(name, value))


def is_nothing(value: Any) -> bool:
    """Whether an argument is there for its name alone: `generate` hands a multimodal model an empty dict where there is
    nothing but text."""
    return value is None or (isinstance(value, dict) and not value)


def _says(name: str, value: Any) -> bool:
    """Whether an argument says something beside text, which the types that processors give for text do not."""
    return not is_nothing(value) and not (name in _TYPES and isinstance(value, Tensor) and not bool(value.any()))


def placeholders(model: PreTrainedModel) -> set[int]:
    """Ids that stand in a prompt for what is no text."""
    named = re.compile(r"(image|img|video|audio|speech)_token_(id|index)")
    found = (value for name, value in vars(model.config).items() if named.fullmatch(name))
    return {value for value in found if isinstance(value, int)}


def check_pictures(
    model: PreTrainedModel, ids: Tensor, embeds: bool, use_cache: bool, what: str = "prompts with pictures or sounds"
) -> None:
    """Refuses prompts ``[B, P]`` that are read apart from the text behind them and cannot be."""
    if embeds:
        raise ValueError(f"inputs_embeds is not supported for {what}: pass input_ids")
    if not use_cache:
        raise ValueError(f"use_cache=False is not supported for {what}, which are read once: leave it out")
    last = set(ids[:, -1].tolist()) & placeholders(model)
    if last:
        raise ValueError(f"input_ids ends with {last.pop()}, which stands for a picture or a sound: put text behind it")


def given_pictures(model: PreTrainedModel, ids: Tensor | None, arguments: dict[str, Any]) -> dict[str, Tensor] | None:
    """A caller's prompt with pictures, as another model of its kind would take it; None where there are none.

    Args:
        ids: ``[N, P]``, unless they are among the ``arguments`` of ``generate``.
    """
    names = beside_text(model, {name: value for name, value in arguments.items() if name in reads_more(model)})
    ids = arguments.get("input_ids") if ids is None else ids
    embeds, cache = arguments.get("inputs_embeds") is not None, arguments.get("use_cache") is not False
    if not names or (ids is None and not embeds):
        return None
    check_pictures(model, torch.zeros((1, 1)) if ids is None else ids, embeds, cache)
    given = {name: arguments.get(name) for name in (*names, "attention_mask")} | {"input_ids": ids}
    return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Shown:
    """What a drafter has read of prompts with pictures: all of each row but its last token.

    Args:
        cache: of ``columns`` columns.
        texts: what of them is no padding, in its ids.
        hidden: how many are padding, a number a row.
        ahead: of :class:`Prompt`.
    """

    cache: Cache
    columns: int
    texts: list[list[int]]
    hidden: list[int]
    ahead: list[int]

    def load(self, runner: Runner) -> None:
        """Has a drafter's runner, which reads texts without padding, go on behind it."""
        load_text(runner, self.cache, self.columns, self.hidden)
        runner.go_ahead(self.ahead)


@dataclass
class Prompt:
    """A prompt with pictures.

    Args:
        model: that reads it.
        ids: ``[B, n]``, as ``generate`` takes them: all of the text, or what a cache does not hold.
        arguments: as ``generate`` hands them to a loop.
        config: of the call.
        columns: of all text.
        visible: ``[B, columns]`` bool; None: all.
        ahead: of :func:`specdec_fast.inputs.check_positions`.
    """

    model: PreTrainedModel
    ids: Tensor
    arguments: dict[str, Any]
    config: GenerationConfig
    columns: int
    visible: Tensor | None
    ahead: list[int]

    @torch.no_grad()
    def read(self, cache: Cache | None) -> tuple[Cache | None, int]:
        """Reads it by the model's own pass; the cache, None where it is empty, and how many of its columns go on.

        Args:
            cache: that holds the text in front; None: there is none.

        Raises:
            ValueError: text behind it cannot be read apart from it.
        """
        whole = sees_ahead(self.model)
        if whole and self.columns < 2:
            raise ValueError(
                f"input_ids: {type(self.model).__name__} reads a prompt both ways, so one of a single token would be "
                "read together with a draft: make it longer, or use model.generate"
            )
        if not whole and self.columns - 1 <= (0 if cache is None else cache.get_seq_length()):
            return cache, self.columns - 1  # the one token is the first round's
        padded = self.visible is not None and not bool(self.visible.all())
        tried, names = _tried.setdefault(self.model, {}), beside_text(self.model, self.arguments)
        form = f"{form_of(self.model)} {names} {padded}"
        expected = None
        if form not in tried:
            other = self._fresh(True) if cache is None else copy.deepcopy(cache)
            expected = self._pass(other, self.ids.shape[1]).logits[:, -1]
            del other
        read = self._fresh(whole) if cache is None else cache
        self._pass(read, self.ids.shape[1] - (not whole))
        if expected is not None and bool(expected.isfinite().all()):  # else it says nothing of the model
            tried[form] = self._goes_on(read, expected)
        if not tried.get(form, True):
            raise ValueError(
                f"model: {type(self.model).__name__} gives other logits where text is read apart from the prompt in "
                "front of it: use model.generate for it"
            )
        return read, self.columns - 1

    def read_by(self, drafter: PreTrainedModel, given: dict[str, Tensor] | None) -> Shown | None:
        """What a drafter with the target's ids reads of it, with its own eyes; None where it cannot.

        Args:
            given: of :func:`given_pictures`.
        """
        names = set(given or ()) - {"input_ids", "attention_mask"}
        if (
            given is None
            or self.columns < 2
            or not names <= reads_more(drafter)
            or placeholders(drafter) != placeholders(self.model)
        ):
            return None
        read: list[Cache] = []

        def prefill(
            model: PreTrainedModel, input_ids: Tensor, generation_config: GenerationConfig, **arguments: Any
        ) -> Tensor:
            own = replace(self, model=model, ids=input_ids, arguments=arguments, config=generation_config)
            if input_ids.shape == self.ids.shape:
                read.append(own._fresh(False))
                own._pass(read[0], input_ids.shape[1] - 1)
            return input_ids

        prefill.__name__ = "prefill"
        each = len(self.ids) // len(given["input_ids"])
        settings = GenerationConfig(max_new_tokens=1, do_sample=True, num_return_sequences=each)
        plainly: Any = copy.copy(drafter)  # the same modules, without beams and the like of its own
        plainly.generation_config = GenerationConfig()
        try:
            with torch.no_grad():
                moved = {name: _moved(value, drafter) for name, value in given.items()}
                plainly.generate(**moved, generation_config=settings, custom_generate=prefill)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # what a forward of its own kind can throw: its pictures may be of other sizes
            return None
        if not read:
            return None
        hidden = [0] * len(self.ids) if self.visible is None else (~self.visible).sum(1).tolist()
        texts = [line[n:-1] for line, n in zip(self.ids.tolist(), hidden, strict=True)]
        return Shown(read[0], self.columns - 1, texts, hidden, self.ahead)

    def _fresh(self, whole: bool) -> Cache:
        # Layers with a window drop what it has left behind, and the last column is read again
        return DynamicCache() if whole and ragged_layers(self.model.config) is not None else new_cache(self.model)

    def _pass(self, cache: Cache, columns: int) -> Any:
        """``generate``'s pass over so many of the columns that the cache does not hold."""
        cut = self.ids.shape[1] - columns
        arguments = {name: value for name, value in self.arguments.items() if name not in CACHE_NAMES}
        if cache.get_seq_length() and arguments.get("attention_mask") is None:
            # By a mask's length `generate` tells whether the ids are of all text
            arguments["attention_mask"] = self.ids.new_ones((len(self.ids), self.columns))
        if cut:
            for name in _A_COLUMN_EACH:
                if isinstance(arguments.get(name), Tensor):
                    arguments[name] = arguments[name][..., :-cut]
        arguments[cache_argument(type(self.model))] = cache
        own: Any = self.model
        return own._prefill(self.ids[:, :columns], self.config, arguments)

    def _goes_on(self, cache: Cache, expected: Tensor) -> bool:
        """Whether the last token, read as text behind what was read, has the logits ``[B, V]`` of the whole prompt, and
        tokens behind it those of passes of their own."""
        rows, more = self.ids.shape[0], trial_ids(self.model)[:1, :2]
        tokens = torch.cat([self.ids[:, -1:].to(more.device), more.expand(rows, -1)], 1)
        runner: Runner = runner_for(self.model, rows, visible=self.visible)
        load(runner, cache, self.columns - 1)
        runner.go_ahead(self.ahead)
        everyone = list(range(rows))
        try:
            together = runner.feed(everyone, tokens, [3] * rows, [3] * rows)
            for row in everyone:
                runner.rollback(row, self.columns - 1)
            apart = [runner.feed(everyone, part, [1] * rows, [1] * rows) for part in tokens.split(1, 1)]
        except torch.OutOfMemoryError:
            raise  # says nothing of the model
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
            return False
        one = torch.cat(apart, 1)
        alone = all(alike(self.model, expected[row : row + 1], one[row, :1]) for row in everyone)
        return alone and all(alike(self.model, one[row], together[row]) for row in everyone)


def _moved(value: Any, model: PreTrainedModel) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)


_tried: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, bool]] = weakref.WeakKeyDictionary()
