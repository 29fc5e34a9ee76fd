"""Checks of what a call would have its target's forward pass read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from specdec_fast.cache import multimodal, takes
from specdec_fast.encoding import readable
from specdec_fast.masks import text_positions
from specdec_fast.pictures import TEXT, is_nothing, reads_more
from specdec_fast.sources import encoder_inputs
from specdec_fast.trial import distance, trial_ids

__all__ = ["check_counting", "check_ids", "check_positions", "refuse_inputs", "refuse_unsupported"]

_OF_DECODERS = ("decoder_input_ids", "decoder_attention_mask")


def refuse_inputs(model: PreTrainedModel, inputs: Iterable[str]) -> None:
    """Refuses arguments of the model's forward pass that the loop does not hand on."""
    known = {"input_ids", *TEXT, *reads_more(model)}
    if model.config.is_encoder_decoder:
        known |= {*_OF_DECODERS, *encoder_inputs(model)}
    if unknown := sorted(set(inputs) - known):
        only = "" if model.config.is_encoder_decoder else "only text prompts are, "
        raise ValueError(f"{', '.join(unknown)} is not supported: {only}use model.generate for others")


def refuse_unsupported(model: PreTrainedModel, config: GenerationConfig, arguments: dict[str, Any]) -> None:
    """Refuses what a call asks for and the loop cannot give, or would have its forward pass read.

    Args:
        arguments: as ``generate`` hands them to a loop.
    """
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise ValueError(f"{name} is not supported: leave it out, or use model.generate for it")
    refuse_inputs(model, (name for name, value in arguments.items() if not is_nothing(value)))


def check_ids(input_ids: Tensor, model: PreTrainedModel, others: set[int]) -> None:
    """Refuses prompts ``[B, P]`` with ids that the model does not have, but for ``others``: they stand for no text."""
    known = readable(model)
    if others:
        input_ids = input_ids[~torch.isin(input_ids, torch.tensor(sorted(others), device=input_ids.device))]
    if known is not None and input_ids.numel():
        least, most = (int(end) for end in input_ids.aminmax())
        if least < 0 or most >= known:
            wrong = least if least < 0 else most
            name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
            raise ValueError(f"{name} holds {wrong}, the model reads ids from 0 to {known - 1}")


def check_positions(
    given: Tensor | None, columns: int, visible: Tensor | None, rows: int, new: int | None = None
) -> list[int]:
    """By how much the positions behind a prompt are ahead of the text's own count, a number a row.

    The loop goes on from the prompt's last position, as ``generate`` does.

    Args:
        given: ``[.., B, n]`` positions of the call's last columns; None: the text's own count.
        columns: of all text.
        visible: ``[B, columns]`` bool; None: all.
        new: how many columns may be ahead of the count, and equally far: those behind a picture, or behind a cache that
            holds one. None: none may.

    Raises:
        ValueError: they are not.
    """
    if given is None:
        return [0] * rows
    place = torch.arange(columns, device=given.device).expand(rows, -1)
    seen = None if visible is None else visible.to(given.device)
    own = text_positions(place, seen)
    if new is not None:
        given, own = given[..., -new:], own[:, -new:]
        seen = None if seen is None else seen[:, -new:]
    fits = given.shape[-1] == own.shape[-1]
    if fits:
        ahead = (given - own).reshape(-1, rows, own.shape[-1])
        ahead = ahead[1:] if len(ahead) == 4 else ahead  # the first are the text's own, for masks
        least = ahead[:1, :, -1:] if new is not None else 0
        differs = ahead != least
        fits = not bool((differs if seen is None else differs & seen).any())
    if not fits:
        raise ValueError("position_ids other than the attention_mask's own count are not supported: leave them out")
    return ahead[0, :, -1].tolist() if new is not None else [0] * rows


@torch.no_grad()
def check_counting(model: PreTrainedModel) -> int | None:
    """From which number ``generate`` counts positions: PaliGemma's from 1. None: the model counts columns by itself,
    padding among them.

    Raises:
        ValueError: it tells the model others than a count, or the model makes others itself where it is told none, as
            Kosmos-2 does.
    """
    if model.config.is_encoder_decoder or not takes(model, "position_ids"):
        return 0
    mask = torch.tensor([[0, 1, 1]], device=model.device)
    own = text_positions(torch.arange(3, device=model.device).unsqueeze(0), mask.bool())
    prepare: Any = model.prepare_inputs_for_generation
    given = {"attention_mask": mask, "position_ids": own.clone(), "use_cache": False, "is_first_iteration": True}
    try:
        told = prepare(torch.ones_like(mask), **given).get("position_ids")
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError):
        return 0  # it prepares something else than a text alone
    first: int | None = 0
    if told is not None:
        first = int(told[..., 1].flatten()[-1])
        same = told.shape[-2:] == own.shape and bool((told[..., 1:] == own[..., 1:] + first).all())
        same = same and (not first or multimodal(model))
    else:
        ids = trial_ids(model)[:1]
        place = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        mine, theirs = (
            model(input_ids=ids, use_cache=False, **more).logits[0] for more in ({"position_ids": place}, {})
        )
        same = distance(theirs, mine) <= 1
        first = None if multimodal(model) else 0
    if not same:
        raise ValueError(
            f"model: {type(model).__name__} counts positions in a way of its own: use model.generate for it"
        )
    return first
