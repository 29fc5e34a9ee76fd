"""What a call returns where a dict is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.generation import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from specdec_fast.stats import Speculation

__all__ = ["SpeculativeEncoderDecoderOutput", "SpeculativeOutput"]


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """Transformers' own output with the statistics of the call beside it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.speculation: Speculation | None = None


@dataclass
class SpeculativeEncoderDecoderOutput(GenerateEncoderDecoderOutput):
    """The same of an encoder-decoder model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.speculation: Speculation | None = None
