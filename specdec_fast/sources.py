"""What the models of a call read beside the text: a source, as each of them encodes it."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from specdec_fast.drafters.begun import mark_of
from specdec_fast.encoded import why_not_encoded
from specdec_fast.encoding import Encoded, reads_encoder
from specdec_fast.options import Options
from specdec_fast.pictures import Shown

__all__ = ["Sources", "beginning", "encoder_inputs", "main_input", "sources_of"]


@dataclass(frozen=True)
class Sources:
    """What models of a call read beside the text.

    Args:
        target, drafter: what the model's encoder, or the other's, made of it; None: the model reads nothing else.
        ids: each row's source in the target's ids, where it is text; prompt lookup looks there too.
        shown: what a drafter with the target's tokenizer has seen of a prompt with pictures; None: it reads text.
    """

    target: Encoded | None = None
    drafter: Encoded | None = None
    ids: list[list[int]] | None = None
    shown: Shown | None = None


def main_input(model: PreTrainedModel) -> str:
    """What ``generate`` calls the input of an encoder-decoder model. Some models call it other than their encoder."""
    own = getattr(getattr(model, "encoder", None), "main_input_name", None)
    return own or model.main_input_name


def beginning(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """What a result begins with, ``[B, n]``: the prompt, or the mark of an encoder-decoder model, which reads that."""
    mark = mark_of(model)
    return input_ids if mark is None else input_ids.new_full((len(input_ids), 1), mark)


def encoder_inputs(model: PreTrainedModel) -> set[str]:
    """Arguments of ``generate`` that are for the encoder of an encoder-decoder model, or say what it made."""
    encoder: Any = model.get_encoder()
    return {"encoder_outputs", main_input(model), *inspect.signature(encoder.forward).parameters}


def sources_of(
    model: PreTrainedModel,
    options: Options,
    arguments: dict[str, Any],
    inputs: Tensor | None,
    batch: int,
    method: str,
) -> Sources:
    """What a call's models read beside the text. The drafter's encoder runs here, unless it is the target's.

    Args:
        arguments: as ``generate`` hands them to a loop.
        inputs: ``[N, ..]`` the encoder's input, for ``batch / N`` rows each.
        method: of the call; "model" says that ids of the target are ids of the drafter.

    Raises:
        ValueError: a model cannot be decoded with what it would read.
    """
    drafter = options.assistant_model if method not in ("autoregressive", "prompt_lookup") else None
    if not model.config.is_encoder_decoder:
        if drafter is not None and drafter.config.is_encoder_decoder:
            raise ValueError(
                f"assistant_model: {type(drafter).__name__} is an encoder-decoder model, and the target reads no "
                "source that it could encode: pass a decoder-only model"
            )
        return Sources()
    outputs = arguments["encoder_outputs"]
    if isinstance(outputs, tuple):
        outputs = BaseModelOutput(last_hidden_state=outputs[0])
    mask = arguments.get("attention_mask")
    target = Encoded(outputs, mask)
    if target.rows != batch:
        raise ValueError(f"model: {type(model).__name__} does not write one text a source: use model.generate for it")
    _check(model, target, "model")
    text = inputs is not None and inputs.ndim == 2 and not inputs.is_floating_point() and bool((inputs >= 0).all())
    if text and inputs is not None and mask is not None:
        text = inputs.shape == mask[:: batch // len(inputs)].shape  # else it is no source, but stands for one
    each = batch // inputs.shape[0] if inputs is not None else 1
    hidden = None if mask is None else mask[::each]
    ids = _ids(inputs, hidden) if inputs is not None and text else None
    repeated = None if ids is None else [ids[row // each] for row in range(batch)]
    if drafter is None or not reads_encoder(drafter):
        return Sources(target, None, repeated)
    if not drafter.config.is_encoder_decoder:  # a decoder made for this very encoder
        own = Encoded(_moved(outputs, drafter), None)
    elif method == "model" and _same_encoder(model, drafter):
        own = Encoded(_moved(outputs, drafter), None if mask is None else mask.to(drafter.device))
    else:
        _check_reads(model, drafter, inputs, untold=method != "model" and ids is None)
        assert inputs is not None
        if ids is not None and method != "model":
            inputs, hidden = _translated(ids, options)
        own = _encoded(drafter, inputs, hidden).part([row // each for row in range(batch)])
    _check(drafter, own, "assistant_model")
    return Sources(target, own, repeated)


def _check(model: PreTrainedModel, encoded: Encoded, argument: str) -> None:
    if (why := why_not_encoded(model, encoded)) is not None:
        raise ValueError(
            f"{argument}: {type(model).__name__} cannot be rolled back to a rejected token: {why}. "
            + ("Use model.generate for it" if argument == "model" else "Pass another drafter")
        )


def _ids(inputs: Tensor, mask: Tensor | None) -> list[list[int]]:
    shown = [[True] * inputs.shape[1]] * len(inputs) if mask is None else mask.bool().tolist()
    return [
        [token for token, seen in zip(text, row, strict=True) if seen]
        for text, row in zip(inputs.tolist(), shown, strict=True)
    ]


def _translated(ids: list[list[int]], options: Options) -> tuple[Tensor, Tensor]:
    """Sources in the drafter's ids, with the marks its tokenizer adds, and their mask."""
    texts = [options.tokenizer.decode(text, skip_special_tokens=True) for text in ids]
    nothing = [options.assistant_tokenizer.eos_token_id or options.assistant_tokenizer.pad_token_id or 0]
    read = [options.assistant_tokenizer(text)["input_ids"] or nothing for text in texts]
    made = [torch.tensor(text, dtype=torch.long) for text in read]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(made, batch_first=True), pad([torch.ones_like(text) for text in made], batch_first=True)


def _moved(outputs: Any, drafter: PreTrainedModel) -> Any:
    return BaseModelOutput(last_hidden_state=outputs[0].to(drafter.device, drafter.dtype))


_same: weakref.WeakKeyDictionary[PreTrainedModel, weakref.WeakKeyDictionary[PreTrainedModel, tuple[Any, bool]]]
_same = weakref.WeakKeyDictionary()


def _same_encoder(model: PreTrainedModel, drafter: PreTrainedModel) -> bool:
    """Whether a drafter's encoder has the target's weights, as one has that was distilled with its encoder kept. Looked
    at once a pair."""
    encoders: list[Any] = [one.get_encoder() for one in (model, drafter)]
    if type(encoders[0]) is not type(encoders[1]):
        return False
    tensors = [dict(encoder.state_dict(keep_vars=True)) for encoder in encoders]
    state = [(t.data_ptr(), 0 if t.is_inference() else t._version) for own in tensors for t in own.values()]
    kept = _same.setdefault(model, weakref.WeakKeyDictionary())
    if drafter not in kept or kept[drafter][0] != state:
        own, other = tensors
        alike = own.keys() == other.keys() and all(
            tensor.shape == other[name].shape
            and tensor.dtype == other[name].dtype
            and torch.equal(tensor, other[name].to(tensor.device))
            for name, tensor in own.items()
        )
        kept[drafter] = state, alike
    return kept[drafter][1]


def _check_reads(model: PreTrainedModel, drafter: PreTrainedModel, inputs: Tensor | None, untold: bool) -> None:
    """Refuses a drafter whose encoder cannot read what the target's does.

    Args:
        untold: whether it would have to be told the source in other ids, and nobody knows its text.
    """
    name, own = type(drafter).__name__, main_input(drafter)
    if own != main_input(model):
        raise ValueError(
            f"assistant_model: {name} reads {own}, and the target {main_input(model)}: pass a drafter of its kind"
        )
    wrong = untold or inputs is None or inputs.is_floating_point() or bool((inputs < 0).any())
    if inputs is None or (own == "input_ids" and wrong):
        raise ValueError(
            f"assistant_model: {name} has an encoder of its own, which needs the source itself: pass input_ids in "
            "place of inputs_embeds or encoder_outputs"
        )


@torch.no_grad()
def _encoded(drafter: PreTrainedModel, inputs: Tensor, mask: Tensor | None) -> Encoded:
    """What the drafter's own encoder makes of sources.

    Raises:
        ValueError: it cannot read them.
    """
    encoder: Any = drafter.get_encoder()
    dtype = drafter.dtype if inputs.is_floating_point() else inputs.dtype
    given: dict[str, Any] = {main_input(drafter): inputs.to(drafter.device, dtype), "return_dict": True}
    mask = None if mask is None else mask.to(drafter.device)
    if mask is not None and "attention_mask" in inspect.signature(encoder.forward).parameters:
        given["attention_mask"] = mask
    try:
        made = encoder(**given)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what a forward of its own kind can throw
        said = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"assistant_model: the encoder of {type(drafter).__name__} cannot read the source ({type(error).__name__}: "
            f"{said}): pass another drafter, or a shorter source"
        ) from error
    return Encoded(made, mask)
