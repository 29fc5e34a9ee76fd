"""What an encoder made of each row's source, what a decoder keeps of it, and what is known of such models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from specdec_fast.cache import ragged_layers, takes

__all__ = [
    "CrossLayer",
    "Encoded",
    "counts_text",
    "layer_count",
    "readable",
    "reads_encoder",
    "source_in",
]


def reads_encoder(model: PreTrainedModel) -> bool:
    """Whether passes of a model may be given what an encoder made."""
    return model.config.is_encoder_decoder or takes(model, "encoder_outputs")


class Encoded:
    """What an encoder made of each row's source.

    Args:
        outputs: the encoder's output, of Transformers' type: tensors of ``B`` rows, ``[B, S, H]`` the first of them; or
            what gives it when somebody first asks.
        mask: ``[B, T]``, 0 where the encoder's input is padding; None where the model takes none, or nothing is.
        rows: how many there are, where the output is still to come.
    """

    def __init__(self, outputs: Any, mask: Tensor | None, rows: int | None = None):
        self._outputs, self.mask = outputs, mask
        self.rows: int = outputs[0].shape[0] if rows is None else rows
        self._last: tuple[tuple[int, ...], Any, Tensor | None] | None = None

    @property
    def outputs(self) -> Any:
        """The encoder's output."""
        if callable(self._outputs):
            self._outputs = self._outputs()
        return self._outputs

    def of(self, rows: Sequence[int]) -> tuple[Any, Tensor | None]:
        """Output and mask of some rows, which need not be different ones."""
        key = tuple(rows)
        if key == tuple(range(self.rows)):
            return self.outputs, self.mask
        if self._last is None or self._last[0] != key:
            parts = {
                name: part[list(rows)] for name, part in self.outputs.items() if isinstance(part, Tensor) and part.ndim
            }
            self._last = key, type(self.outputs)(**parts), None if self.mask is None else self.mask[list(rows)]
        return self._last[1:]

    def part(self, rows: Sequence[int]) -> Encoded:
        """Some rows, as if there were no others."""
        mask = None if self.mask is None else self.mask[list(rows)]
        return Encoded(lambda: self.of(rows)[0], mask, len(rows))


class CrossLayer(DynamicLayer):
    """Keys and values of what the encoder made: of all rows, and in :attr:`keys` of those of the next pass."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows, self._chosen = rows, list(range(rows))
        self._all: tuple[Tensor, Tensor] | None = None

    def choose(self, rows: list[int]) -> None:
        """Says which rows the next pass has."""
        if rows != self._chosen and self._all is not None:
            whole = len(rows) == self._rows
            self.keys, self.values = (part if whole else part[rows] for part in self._all)
        self._chosen = rows

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if len(self._chosen) == self._rows:
            self._all = key_states.contiguous(), value_states.contiguous()
            self.is_initialized = True
            self.keys, self.values = self._all
            return self._all
        if self._all is None:
            self.is_initialized = True
            shapes = [(self._rows, *states.shape[1:]) for states in (key_states, value_states)]
            self._all = key_states.new_zeros(shapes[0]), value_states.new_zeros(shapes[1])
        for whole, states in zip(self._all, (key_states, value_states), strict=True):
            whole[self._chosen] = states
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    @property
    def everything(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of all rows; None where the layer has none."""
        return self._all


def source_in(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of a source that a caller's cache holds, by layer; none where it holds no source.

    A configuration may make a cache of more layers than the decoder has.
    """
    layers: Any = cache.cross_attention_cache.layers
    filled = [index for index, layer in enumerate(layers) if layer.is_initialized]
    if not all(cache.is_updated.get(index) for index in filled):
        return []
    return [(layers[index].keys, layers[index].values) for index in filled]


def layer_count(model: PreTrainedModel) -> int:
    """Layers of a decoder. Some configurations give the encoder's number where Transformers asks for layers."""
    config = model.config.get_text_config(decoder=True)
    own = [getattr(config, name, None) for name in ("decoder_layers", "num_decoder_layers")]
    return max([ragged_layers(config) or 0, *(n for n in own if isinstance(n, int))])


def readable(model: PreTrainedModel) -> int | None:
    """How many ids a model reads as its text, None where it does not say. An encoder may have others."""
    part: Any = model.get_decoder() if model.config.is_encoder_decoder else model
    if not isinstance(part, PreTrainedModel):  # FSMT's decoder is a plain module
        return None
    return getattr(part.get_input_embeddings(), "num_embeddings", None)


def counts_text(model: PreTrainedModel) -> bool:
    """Whether ``generate`` counts a decoder's positions without padding. Whisper's are; most count columns."""
    ids, mask = torch.zeros((1, 2), dtype=torch.long, device=model.device), torch.tensor([[0, 1]], device=model.device)
    prepare: Any = model.prepare_inputs_for_generation
    given = prepare(ids, decoder_attention_mask=mask).get("decoder_position_ids")
    return given is not None and takes(model, "decoder_position_ids")
