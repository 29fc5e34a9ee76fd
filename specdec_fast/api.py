"""``fast_generate``: what ``model.generate`` takes and returns, faster and with the same law."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from specdec_fast import methods
from specdec_fast.cache import given_cache
from specdec_fast.inputs import refuse_inputs
from specdec_fast.loop import Loop
from specdec_fast.options import Options
from specdec_fast.outputs import SpeculativeOutput
from specdec_fast.pictures import given_pictures
from specdec_fast.randomness import UniformSource
from specdec_fast.settings import Settings

__all__ = ["SpeculativeOutput", "decoding_loop", "fast_generate"]


def fast_generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    synced_gpus: bool | None = None,
    assistant_model: PreTrainedModel | None = None,
    streamer: BaseStreamer | None = None,
    negative_prompt_ids: Tensor | None = None,
    negative_prompt_attention_mask: Tensor | None = None,
    *,
    tokenizer: Any = None,
    assistant_tokenizer: Any = None,
    method: str = "auto",
    verification: str = "auto",
    seed: int | Sequence[int] | None = None,
    num_assistant_tokens: int | None = None,
    num_assistant_tokens_schedule: str | None = None,
    assistant_confidence_threshold: float | None = None,
    assistant_temperature: float | None = None,
    prompt_lookup_num_tokens: int | None = None,
    max_matching_ngram_size: int | None = None,
    target_lookbehind: int | None = None,
    assistant_lookbehind: int | None = None,
    assistant_window: int | None = None,
    draft_tree: str = "auto",
    draft_memory: str = "auto",
    compile: str = "auto",  # the field's name for it, and nobody calls the builtin here
    source: UniformSource | None = None,
    **kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Generates with a drafter; the output has exactly the law of ``model`` alone.

    Takes every argument of ``model.generate`` and returns what it returns: ``sequences [B, L]``, or with
    ``return_dict_in_generate=True`` a ``GenerateDecoderOnlyOutput`` or ``GenerateEncoderDecoderOutput`` (scores,
    logits, the cache) that also carries the statistics as ``output.speculation``. After a plain tensor they are in
    :func:`specdec_fast.last_speculation`.

    Args:
        model: the target, a decoder-only or encoder-decoder model.
        inputs: prompt ids ``[B, P]``, left-padded where lengths differ (or ``input_ids=``). Of an encoder-decoder
            model what its encoder reads, as ``model.generate`` takes it. Pictures and sounds beside text are arguments
            of the model's own (``pixel_values=``, ...; ``docs/pictures.md``).
        assistant_model: the drafter. None: no drafter, or prompt lookup. For an encoder-decoder target one of its kind,
            a decoder made for the target's encoder, or any model that goes on with text (``docs/sources.md``).
        tokenizer, assistant_tokenizer: of target and drafter; needed where their vocabularies differ.
        method: "auto", "autoregressive", "model" (same tokenizer), "tli", "projection", "slem", "slrs" (string-level
            rejection sampling), "slrs_literal" or "prompt_lookup". "slrs_literal" runs the drafter on every text it can
            write and is refused where those are too many: an oracle for vocabularies of a few tokens.
            "auto" chooses by the tokenizers, the measured intersection mass, the sampling mode, each row's running
            acceptance, and without a drafter by how far the prompt repeats itself; the statistics say why.
        verification: "auto", "match" (sample and compare), "gumbel" (the same, the target's tokens being the winners of
            races whose numbers a drafter can know: the output is then the same with any drafter; Daliri et al., arXiv
            2408.07978), "token" (rejection sampling; Leviathan et al., arXiv 2211.17192) or "block" (the whole draft at
            once; Sun et al., arXiv 2403.10444, and of trees Weng et al., arXiv 2505.12398). All are lossless.
            "auto" takes "gumbel" where draft_tree="on", "block" where the drafter's law is known, else "match"; so it
            does, and "block" is refused, beside custom processors and criteria, who see each token.
        seed: an int, or one a row, makes a sampled result repeat; row i then does not depend on the batch it stands
            in (but for verification="token" beside a custom processor or criterion, where rows advance in step).
            Whisper's ``generate``, which decodes in parts, takes an int. None: from torch's global generator; how much
            is drafted then hangs on what was measured, so that under rules "token" and "block" a result need not
            repeat.
        num_assistant_tokens: lookahead, draft tokens a round (in target tokens); constant unless a schedule is given.
        num_assistant_tokens_schedule: "adaptive" (default: from the acceptance so far and from costs, measured or, with
            a seed, guessed from the models' sizes; none at all where drafting does not pay), "constant", "heuristic"
            or "heuristic_transient" as in Transformers.
        assistant_confidence_threshold: end a draft behind a token less probable than this.
        assistant_temperature: the drafter's own temperature; None: the target's. 0: its argmax.
        prompt_lookup_num_tokens, max_matching_ngram_size: draft from the text itself, and from a source that is text,
            so many tokens a round, and the longest suffix compared.
        target_lookbehind, assistant_lookbehind: tokens re-tokenised together with new text.
        assistant_window: the drafter reads the last so many of its tokens, at least half of them; None: all of them.
        draft_tree: "auto" lets a drafter propose several tokens for a place where that pays: methods "model" and "tli"
            with an adaptive lookahead, at T=0, by rule "gumbel", and without a seed by "block", on a CPU, for targets
            of at least 32 million parameters that run as one native operation. "on": for smaller ones and with a seed
            too, by rule "gumbel" where no other is named; refused where it cannot be. "off": drafts are chains.
        draft_memory: "auto" mends the scores that drafts are drawn from by what the target said at like places of
            the text (``docs/memory.md``): methods "model" and "tli" when sampling, natively on the CPU, for memories
            of 256 MB at most, and not with a seed by rules "token" and "block". "on": there and at T=0 too. "off".
        compile: "auto" runs short passes of a Llama-like target on the CPU as one native operation, on the same weights
            with float32 in between, and on a GPU what "static" does. "static": a static cache, and rounds that live on
            the device in tensors of fixed shape, on a GPU captured as CUDA graphs; for methods "model", "tli",
            "projection" and "autoregressive"; else the statistics say why not. "inductor": the same with both models'
            forwards compiled by ``torch.compile`` as ``compile_config`` says, which takes a while at first.
            "off": the model's own forward. ``disable_compile`` of the generation config makes "auto" that, and
            "inductor" "static"; a ``compile_config`` makes "auto" "inductor" on a GPU.
        source: where random numbers come from; None: Philox, keyed by seed and position.
        **kwargs: everything else of ``model.generate``.

    Raises:
        ValueError, TypeError: an argument cannot be honoured; raised before anything ran, naming the argument.
    """
    options = Options(
        assistant_model=assistant_model,
        tokenizer=tokenizer,
        assistant_tokenizer=assistant_tokenizer,
        method=method,
        verification=verification,
        seed=seed,
        num_assistant_tokens=num_assistant_tokens,
        num_assistant_tokens_schedule=num_assistant_tokens_schedule,
        assistant_confidence_threshold=assistant_confidence_threshold,
        assistant_temperature=assistant_temperature,
        prompt_lookup_num_tokens=prompt_lookup_num_tokens,
        max_matching_ngram_size=max_matching_ngram_size,
        target_lookbehind=target_lookbehind,
        assistant_lookbehind=assistant_lookbehind,
        assistant_window=assistant_window,
        draft_tree=draft_tree,
        draft_memory=draft_memory,
        compile=compile,
        streamer=streamer,
        source=source,
    )
    settings = Settings(model, generation_config, kwargs)
    common: dict[str, Any] = {
        "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
        "negative_prompt_ids": negative_prompt_ids,
        "negative_prompt_attention_mask": negative_prompt_attention_mask,
        "logits_processor": logits_processor,
        "stopping_criteria": stopping_criteria,
    }
    if "custom_generate" in kwargs:
        raise ValueError("custom_generate is what fast_generate sets itself: use specdec_fast.decoding_loop for it")
    strategy = settings.other_strategy()
    if strategy is None:
        methods.check_model(model, "model")
    generate: Any = model.generate  # of a mixin that the model's type does not show
    if strategy is not None:
        given = options.given - {"tokenizer", "streamer"}
        if given:
            names = ", ".join(sorted(given))
            raise ValueError(f"{strategy} cannot be combined with {names}: leave out the one or the other")
        extra = {} if tokenizer is None else {"tokenizer": tokenizer}
        extra |= {} if streamer is None else {"streamer": streamer}
        common |= {"generation_config": generation_config, "synced_gpus": synced_gpus, **extra, **kwargs}
        return generate(**common) if inputs is None else generate(inputs, **common)
    if synced_gpus:
        raise ValueError("synced_gpus is not supported: generate on one process, or use model.generate")
    if settings.get("token_healing"):
        raise ValueError("token_healing is not supported: call model.heal_tokens on the prompt, then fast_generate")
    name, cache = given_cache(kwargs)
    if cache is not None and not isinstance(cache, Cache):
        raise TypeError(f"{name} must be a Cache, such as DynamicCache, not {type(cache).__name__}")
    for name in _OTHER_SPECULATION:
        if kwargs.get(name) or getattr(generation_config, name, None):
            raise ValueError(f"{name} asks for an assisted decoding of Transformers' own: use model.generate for it")
    # Here as well as in the loop, because `generate` runs a vision encoder before it
    takes = inspect.signature(model.forward).parameters
    asked = (name for name, value in kwargs.items() if name in takes and value is not None)
    refuse_inputs(model, (name for name in asked if not hasattr(_DEFAULTS, name)))
    if assistant_model is None and prompt_lookup_num_tokens is None and method in ("auto", "autoregressive"):
        idle = sorted(options.given & _DRAFTER_KNOBS)
        if idle:
            warnings.warn(f"{', '.join(idle)} has no effect without a drafter", UserWarning, stacklevel=2)
    # The drafter's own config last: that is where Transformers' users had to put these knobs
    options = options.completed_by(
        generation_config, model.generation_config, getattr(assistant_model, "generation_config", None)
    )
    # `generate` builds the stop-string criterion itself, but not for a custom loop, which has no tokenizer there
    stop_strings = settings.take("stop_strings")
    if stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings needs the target's tokenizer: pass tokenizer")
        added = StopStringCriteria(stop_strings=stop_strings, tokenizer=tokenizer)
        common["stopping_criteria"] = StoppingCriteriaList([*(stopping_criteria or []), added])
    # Set, these would make `generate` check its own assisted decoding, which refuses batches
    for name in ("prompt_lookup_num_tokens", *_OTHER_SPECULATION):
        settings.take(name)
    loop = Loop(options, given_pictures(model, inputs, settings.kwargs))
    common |= {"generation_config": settings.config, "custom_generate": loop, **settings.kwargs}
    # By position, for models that call their input by a name of its own; not at all where it is given by that name
    result = generate(**common) if inputs is None else generate(inputs, **common)
    if not loop.calls:
        raise ValueError(
            f"model: {type(model).__name__} has a generate of its own that takes no other decoding loop, so nothing "
            "here had a part in what it wrote: use model.generate for it"
        )
    return result


def decoding_loop(**options: Any) -> Callable[..., Tensor | GenerateDecoderOnlyOutput]:
    """The loop as a callable for ``model.generate(custom_generate=...)``.

    Takes the keyword arguments that :func:`fast_generate` adds to ``generate``, ``streamer`` and the two tokenizers
    among them, because ``generate`` does not hand those on to a custom loop. Stop strings go in as a
    ``StopStringCriteria``, since ``generate`` refuses ``stop_strings`` beside a callable.

    Example:
        >>> loop = decoding_loop(assistant_model=drafter, tokenizer=t, assistant_tokenizer=d, seed=0)
        >>> model.generate(**inputs, custom_generate=loop, do_sample=True, max_new_tokens=64)
    """
    known = set(inspect.signature(Options).parameters)
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"decoding_loop does not know {', '.join(unknown)}: it takes {', '.join(sorted(known))}")
    return Loop(Options(**options))


_DRAFTER_KNOBS = {
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "assistant_temperature",
    "assistant_tokenizer",
    "assistant_window",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "target_lookbehind",
}
_OTHER_SPECULATION = ("assistant_early_exit", "assistant_ensemble_weight", "speculation_type", "use_mtp")


_DEFAULTS = GenerationConfig()
