"""Checks of what a call would have its target's forward pass read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec_fast.cache import CACHE_NAMES, takes
from specdec_fast.encoding import readable
from specdec_fast.masks import text_positions
from specdec_fast.sources import encoder_inputs
from specdec_fast.trial import distance, trial_ids

__all__ = ["check_counting", "check_ids", "check_positions", "refuse_inputs"]

_FORWARDED = ("attention_mask", "position_ids", *CACHE_NAMES, "use_cache", "logits_to_keep", "inputs_embeds")
_OF_DECODERS = ("decoder_input_ids", "decoder_attention_mask")


def refuse_inputs(model: PreTrainedModel, inputs: Iterable[str]) -> None:
    """Refuses arguments of the model's forward pass that the loop does not hand on."""
    known = {"input_ids", *_FORWARDED}
    if model.config.is_encoder_decoder:
        known |= {*_OF_DECODERS, *encoder_inputs(model)}
    if unknown := sorted(set(inputs) - known):
        only = "" if model.config.is_encoder_decoder else "only text prompts are, "
        raise ValueError(f"{', '.join(unknown)} is not supported: {only}use model.generate for others")


def check_ids(input_ids: Tensor, model: PreTrainedModel) -> None:
    """Refuses prompts ``[B, P]`` with ids that the model does not have."""
    known = readable(model)
    if known is not None and input_ids.numel():
        least, most = (int(end) for end in input_ids.aminmax())
        if least < 0 or most >= known:
            wrong = least if least < 0 else most
            name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
            raise ValueError(f"{name} holds {wrong}, the model reads ids from 0 to {known - 1}")


def check_positions(given: Tensor | None, columns: int, visible: Tensor | None) -> None:
    """The loop computes positions itself; others than those cannot be honoured."""
    if given is None:
        return
    place = torch.arange(columns, device=given.device).unsqueeze(0)
    own = place if visible is None else text_positions(place.expand_as(visible), visible).masked_fill(~visible, -1)
    if given.shape[-1] != columns or bool(((given != own) & (own >= 0)).any()):
        raise ValueError("position_ids other than the attention_mask's own count are not supported: leave them out")


@torch.no_grad()
def check_counting(model: PreTrainedModel) -> None:
    """Refuses models that ``generate`` tells other positions than a text's own count, or that make others themselves
    where it tells them none, as Kosmos-2 does."""
    if model.config.is_encoder_decoder or not takes(model, "position_ids"):
        return
    mask = torch.tensor([[0, 1, 1]], device=model.device)
    own = text_positions(torch.arange(3, device=model.device).unsqueeze(0), mask.bool())
    prepare: Any = model.prepare_inputs_for_generation
    given = {"attention_mask": mask, "position_ids": own.clone(), "use_cache": False, "is_first_iteration": True}
    try:
        told = prepare(torch.ones_like(mask), **given).get("position_ids")
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError):
        return  # it prepares something else than a text alone
    if told is not None:
        same = told.shape[-2:] == own.shape and bool((told[..., 1:] == own[..., 1:]).all())
    else:
        ids = trial_ids(model)[:1]
        place = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        mine, theirs = (
            model(input_ids=ids, use_cache=False, **more).logits[0] for more in ({"position_ids": place}, {})
        )
        same = distance(theirs, mine) <= 1
    if not same:
        raise ValueError(
            f"model: {type(model).__name__} counts positions in a way of its own: use model.generate for it"
        )
