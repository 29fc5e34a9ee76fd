"""``prepare``: a pair made ready before its first call."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from specdec_fast import methods, warmup
from specdec_fast.api import fast_generate
from specdec_fast.costs import Costs, Observed
from specdec_fast.device_plan import mode_of
from specdec_fast.options import Options
from specdec_fast.sources import main_input
from specdec_fast.stats import Speculation, last_speculation, remember

__all__ = ["Prepared", "prepare"]

TOKENS = 8  # that a call writes to make a pair ready
_PAIR = ("assistant_model", "tokenizer", "assistant_tokenizer")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_COMPILATION = ("disable_compile", "compile_config")
_OF_A_CALL = ("seed", "streamer", "source")


@dataclass
class Prepared:
    """A target, its drafter and the settings they were prepared with. Made by :func:`prepare`.

    Args:
        model: the target.
        options: what every call gets, keyword arguments of :func:`specdec_fast.fast_generate`.
    """

    model: PreTrainedModel
    options: dict[str, Any]
    speculation: dict[bool, Speculation] = field(default_factory=dict)
    """By ``do_sample``: the statistics of the call that made it ready; method, rule and their reason among them."""
    seconds: float = 0.0
    """What preparing took."""
    _observed: dict[bool, Observed] = field(default_factory=dict)

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Tensor | GenerateDecoderOnlyOutput:
        """:func:`specdec_fast.fast_generate` with the pair and its settings; arguments given here come first.

        Raises:
            TypeError: an argument is part of the pair.
            ValueError, TypeError: as ``fast_generate``.
        """
        wrong = [name for name in ("model", *_PAIR) if name in kwargs]
        if wrong:
            raise TypeError(f"{', '.join(wrong)} belongs to the prepared pair: leave it out, or prepare another pair")
        return fast_generate(self.model, inputs, **{**self.options, **kwargs})

    def costs(self, *, do_sample: bool = False) -> Costs | None:
        """The costs of a round's parts as measured so far; None where rounds do not look at them.

        Args:
            do_sample: of sampled or of greedy calls.
        """
        known = self._observed.get(do_sample)
        return known.outlook().costs if known is not None and known.ready else None


def prepare(
    model: PreTrainedModel,
    *,
    assistant_model: PreTrainedModel | None = None,
    tokenizer: Any = None,
    assistant_tokenizer: Any = None,
    do_sample: bool | None = None,
    batch: int = 1,
    inputs: Tensor | None = None,
    repetitions: int = 3,
    **options: Any,
) -> Prepared:
    """Makes a pair ready: vocabulary tables, native forms of the models, measured costs, compiled passes.

    :func:`specdec_fast.fast_generate` does the same at its first call of a pair and keeps it as long as both models
    are there; so what is prepared here serves calls of ``fast_generate`` too. Nothing of the caller's is changed, and
    torch's random numbers go on as if nothing had run.

    Args:
        model, assistant_model, tokenizer, assistant_tokenizer: as ``fast_generate`` takes them.
        do_sample: prepare for greedy or for sampled calls; None: for both.
        batch: rows of the calls to come.
        inputs: ``[B, P]`` prompt ids to prepare on, in place of a few ids of the vocabulary; drafts of real text give a
            truer picture of what drafting costs. Of an encoder-decoder model what its encoder reads.
        repetitions: how often each pass is timed.
        **options: what every call shall get, ``method`` or ``temperature`` for example. On a GPU, and with
            ``compile="static"`` or ``"inductor"``, give ``max_new_tokens`` and ``inputs`` of the calls' size: what is
            compiled depends on them.

    Returns:
        an object whose ``generate`` takes what ``fast_generate`` takes.

    Raises:
        ValueError, TypeError: an argument cannot be honoured; raised before anything ran.

    Example:
        >>> pair = prepare(target, assistant_model=drafter, tokenizer=t, assistant_tokenizer=d)
        >>> output = pair.generate(**inputs, do_sample=True, max_new_tokens=256)
    """
    for name, value in (("batch", batch), ("repetitions", repetitions)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is out of range: use a whole number, 1 or more")
    of_a_call = [name for name in _OF_A_CALL if name in options]
    if of_a_call:
        raise TypeError(f"{', '.join(of_a_call)} belongs to a single call: give it to generate")
    known = set(inspect.signature(Options).parameters)
    pair = {"assistant_model": assistant_model, "tokenizer": tokenizer, "assistant_tokenizer": assistant_tokenizer}
    asked = Options(**pair, **{name: value for name, value in options.items() if name in known})
    methods.check_model(model, "model")
    if assistant_model is not None:
        methods.check_model(assistant_model, "assistant_model")
    everything = {name: value for name, value in {**pair, **options}.items() if value is not None}
    prepared = Prepared(model, everything)
    if inputs is None:
        if model.config.is_encoder_decoder and (reads := main_input(model)) != "input_ids":
            raise ValueError(f"inputs: {type(model).__name__} reads {reads}, which cannot be made up: give some")
        inputs = _some_ids(model)
    if inputs.shape[0] != batch:
        inputs = inputs[:1].expand(batch, *inputs.shape[1:])
    begin, before = time.perf_counter(), last_speculation()
    disabled, config = (options.get(name, getattr(model.generation_config, name, None)) for name in _COMPILATION)
    fixed_shape = mode_of(asked, model, bool(disabled), config) in ("static", "inductor")
    length = options.get("max_new_tokens", 256) if fixed_shape else TOKENS
    devices = [inputs.device] if inputs.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for sampled in (False, True) if do_sample is None else (do_sample,):
            call = {**everything, "max_new_tokens": length, "do_sample": sampled}
            if not sampled:
                call = {name: value for name, value in call.items() if name not in _SAMPLING}
            with warmup.measuring(repetitions) as found:
                fast_generate(model, inputs.to(model.device), **call)
            speculation = last_speculation()
            assert speculation is not None
            prepared.speculation[sampled] = speculation
            if found:
                prepared._observed[sampled] = found[-1]
    if before is not None:
        remember(before)
    prepared.seconds = time.perf_counter() - begin
    return prepared


def _some_ids(model: PreTrainedModel) -> Tensor:
    """Ids that are no special ones in most vocabularies, ``[1, 32]``."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return (torch.arange(1, 33) * 97 + vocabulary // 2).remainder(vocabulary).unsqueeze(0)
