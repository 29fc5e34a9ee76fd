"""``fast_generate``: what ``model.generate`` takes and returns, faster and with the same law."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationMixin,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from specdec_fast import costs, dispatch, methods, sampling, warmup
from specdec_fast.branching import Branching
from specdec_fast.cache import CACHE_NAMES, check_cache, columns_of, given_cache
from specdec_fast.continuation import columns_before, load, new_cache, store
from specdec_fast.device_engine import DeviceEngine
from specdec_fast.device_plan import Call, mode_of, open_session, resident_outlook
from specdec_fast.device_session import Session
from specdec_fast.drafters.base import Drafter
from specdec_fast.drafters.none import NoDrafter
from specdec_fast.engine import Engine
from specdec_fast.fused import Fused
from specdec_fast.host_model import HostModel
from specdec_fast.inputs import check_counting, check_ids, check_positions, refuse_inputs
from specdec_fast.lean import lean_model, why_not_lean
from specdec_fast.lookahead import Adaptive, Lookahead, lookahead_for
from specdec_fast.options import Options
from specdec_fast.outputs import SpeculativeEncoderDecoderOutput, SpeculativeOutput
from specdec_fast.randomness import Philox, UniformSource, row_seeds, seed_of_call
from specdec_fast.record import Record
from specdec_fast.runner import Runner
from specdec_fast.settings import Settings
from specdec_fast.sources import sources_of
from specdec_fast.state import Rows
from specdec_fast.stats import Speculation, remember
from specdec_fast.stops import Stops
from specdec_fast.verification import Apart, rule_for

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
            model what its encoder reads, as ``model.generate`` takes it.
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
    loop = _Loop(options)
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
    return _Loop(Options(**options))


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
_CACHE_FIELD = next(name for name in CACHE_NAMES if name in GenerateDecoderOnlyOutput.__dataclass_fields__)


class _Loop:
    """What ``generate`` calls instead of its own decoding loop."""

    def __init__(self, options: Options):
        self._options = options
        self.calls = 0
        # `generate` looks at the signature to see which of its arguments a custom loop wants
        self.__name__ = "specdec_fast"

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        inputs_tensor: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        options = self._options.completed_by(generation_config, prepared=True)
        config = generation_config
        _refuse_unsupported(model, config, model_kwargs)
        dispatch.check_default(input_ids.device.type)
        if options.assistant_model is not None:
            methods.check_model(options.assistant_model, "assistant_model")
        do_sample = bool(config.do_sample)
        stops = Stops(stopping_criteria)
        encodes = model.config.is_encoder_decoder
        mask = model_kwargs.get("decoder_attention_mask" if encodes else "attention_mask")
        mode = mode_of(options, model, bool(config.disable_compile), config.compile_config)
        lean = lean_model(model, rounded=False) if mode == "native" and not encodes else None
        native = lean is not None
        plan = methods.make_plan(model, options, logits_processor, stops, do_sample, input_ids, mask)
        if plan.method == "autoregressive" and options.speculate:
            warnings.warn(f"decoding without a drafter: {plan.reason}", UserWarning, stacklevel=2)
        wanted = str(config.cache_implementation or "")
        if "offloaded" in wanted or wanted == "quantized":
            own = "the loop keeps a cache that it can roll back, in the model's precision and on its device"
            warnings.warn(f"cache_implementation={wanted!r} is not used: {own}", UserWarning, stacklevel=2)
        batch, columns = input_ids.shape
        check_ids(input_ids, model)
        sources = sources_of(model, options, model_kwargs, inputs_tensor, batch, plan.method)
        seeds = row_seeds(self._seed(model, options), batch)
        limit = stops.max_length if stops.max_length is not None else config.max_length
        pad = config._pad_token_tensor
        if stops.pads and pad is None:
            raise ValueError("rows that end early need padding: set pad_token_id")

        embeds = None if encodes else model_kwargs.get("inputs_embeds")
        name, cache = given_cache(model_kwargs)
        past = columns_of(cache, name) if isinstance(cache, Cache) else 0
        if past and config.use_cache is False:
            raise ValueError(f"use_cache=False cannot continue {name}: leave out one of them")
        shift = columns_before(config, columns, past, mask, embeds, name, encodes)
        if isinstance(cache, Cache):
            check_cache(cache, name, batch, model.config, shift + max(limit, columns + 1) - 1)
        visible = None if mask is None else mask.bool().to(input_ids.device)
        if visible is not None and visible.shape[1] != shift + columns:
            masked = "decoder_attention_mask" if encodes else "attention_mask"
            raise ValueError(
                f"{masked} has {visible.shape[1]} columns for {shift + columns} of text: give it one a token"
            )
        if not encodes:
            check_counting(model)
            check_positions(model_kwargs.get("position_ids"), shift + columns, visible)
        methods.check_length(model, shift + limit)
        record = Record(
            scores=[[] for _ in range(batch)] if config.return_dict_in_generate and config.output_scores else None,
            logits=[[] for _ in range(batch)] if config.return_dict_in_generate and config.output_logits else None,
        )
        statistics = Speculation(plan.method, plan.verification, plan.reason, forward="native" if native else "eager")
        call = Call(
            plan=plan,
            options=options,
            processors=logits_processor,
            stops=stops,
            do_sample=do_sample,
            visible=visible,
            prompt=shift + columns,
            longest=shift + max(limit, columns + 1),
            recorded=not record.empty,
            embeds=embeds is not None,
            use_cache=config.use_cache is not False,
            prefill_chunk=config.prefill_chunk_size,
            sources=sources,
            ids=input_ids,
            cache=cache if past else None,
        )
        if mode == "native" and lean is None:
            why = "it reads what an encoder made" if encodes else why_not_lean(model, rounded=False)
            statistics.loop_reason = f"passes are the model's own: {why}"
        opened, passes = open_session(model, mode, config.compile_config, batch, call, statistics)
        try:
            resident = opened if isinstance(opened, Session) else None
            device = input_ids.device if resident is None else torch.device("cpu")
            rows = Rows(
                input_ids.to(device),
                None if visible is None else visible[:, shift:],
                seeds,
                limit,
                0 if pad is None else int(pad),
            )
            parts: methods.Parts = model, options, batch, logits_processor, do_sample, sources, device
            target: Runner
            if resident is not None:
                target = resident.target
            else:
                target = opened.runner if isinstance(opened, HostModel) else call.runner(model, batch, lean)
            # Processed scores are wanted by nobody but the rule, whose operation takes the usual ones as parameters
            inside = do_sample and record.scores is None and bool(logits_processor)
            inside = inside and not stops.in_order and sampling.parameters(logits_processor) is not None
            seen = not record.empty or stops.in_order or (bool(logits_processor) and not inside)
            if plan.tree and (seen or resident is not None or not target.quick([plan.tree + 1] * batch)):
                plan = replace(plan, tree=0)  # chains then, by the same rule
            if resident is None:
                outlook, known = warmup.outlook_for(plan, parts, rows.tokens, lean, limit - columns, passes)
            else:
                outlook, known = resident_outlook(model, resident, call, limit - columns)
            history: dict[str, Any] = {"horizon": limit - columns}
            if resident is None:  # on a device the drafter has read the prompt before the first round
                history["unread"] = [len(text) for text in rows.tokens]
            lookahead: Lookahead
            if plan.tree:
                lookahead = Branching(batch, 3 * plan.lookahead, outlook, nodes=plan.tree, drawn=plan.drawn, **history)
            else:
                watched = methods.asks(plan, options) if resident is None else resident.watched
                # Rounds on a device score as many lanes as are asked for, whether anybody drafts or not
                kind = (
                    ("constant", batch, 0)
                    if plan.method == "autoregressive"
                    else (plan.schedule, batch, plan.lookahead)
                )
                lookahead = lookahead_for(*kind, outlook, **history, watched=watched)
            meter = costs.Meter() if known is not None else None
            warpers = logits_processor if inside else None
            everything: dict[str, Any] = {
                "rows": rows,
                "rule": Apart(Fused(rule_for(plan.verification, do_sample=do_sample), not do_sample, warpers)),
                "processors": LogitsProcessorList() if inside else logits_processor,
                "stops": stops,
                "lookahead": lookahead,
                "source": options.source or Philox(),
                "statistics": statistics,
                "pad": rows.pad,
                "shift": shift,
                "embeds": embeds,
                "record": record,
                "streamer": options.streamer,
                "meter": meter,
            }
            engine: Engine
            drafter: Drafter
            if resident is not None and not plan.others:
                drafter = NoDrafter(device)
            else:
                watcher = lookahead if isinstance(lookahead, Adaptive) and lookahead.watches else None
                branching = lookahead if isinstance(lookahead, Branching) else None
                drafter = methods.build_drafter(
                    plan, *parts[:-1], input_ids.device, watcher=watcher, branching=branching, passes=passes
                )
            if past:
                load(target, cache, past)
            if options.streamer is not None:
                options.streamer.put(input_ids.to("cpu", copy=True))
            if resident is None:
                engine = Engine(target=target, drafter=drafter, **everything)
            else:
                engine = DeviceEngine(target=target, drafter=drafter, launcher=resident, **everything)
            sequences = engine.run().to(input_ids.device)
            if known is not None and meter is not None and isinstance(lookahead, Adaptive):
                known.take(meter)
                known.count(lookahead.tested, lookahead.accepted, (lookahead.sure_tested, lookahead.sure_accepted))
            statistics.reason = methods.reason_of(plan, drafter)
            if options.streamer is not None:
                options.streamer.end()
            remember(statistics)
            handed_in = getattr(cache, "_is_user_defined", False)
            if handed_in or config.return_dict_in_generate:
                engine.fill()
            if config.use_cache is False:
                cache = None
            elif handed_in or config.return_dict_in_generate:
                cache = cache if isinstance(cache, Cache) else new_cache(model)
                store(target, cache, shift + sequences.shape[1] - 1)
        finally:
            for taken in (passes, opened):
                if taken is not None:
                    taken.close()
        if not config.return_dict_in_generate:
            return sequences.clone()
        fields: dict[str, Any] = {"scores": _by_step(record.scores), "logits": _by_step(record.logits)}
        made: Any = SpeculativeEncoderDecoderOutput if encodes else SpeculativeOutput
        output = made(sequences=sequences.clone(), **fields, **{_CACHE_FIELD: cache})
        output.speculation = statistics
        return output

    def _seed(self, model: PreTrainedModel, options: Options) -> int | Sequence[int] | None:
        """The seed of this call. A ``generate`` of the model's own (Whisper's) calls the loop once a window and once
        more for what it throws away, of rows that come and go: no number may be drawn twice there."""
        call, self.calls = self.calls, self.calls + 1
        kind: Any = type(model)
        if kind.generate is GenerationMixin.generate or not model.config.is_encoder_decoder:
            return options.seed
        if isinstance(options.seed, Sequence | Tensor):
            raise ValueError(
                f"seed: {type(model).__name__}'s generate decodes in parts whose rows come and go: give one int"
            )
        return seed_of_call(options.seed, call)


def _refuse_unsupported(model: PreTrainedModel, config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    methods.check_model(model, "model")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise ValueError(f"{name} is not supported: leave it out, or use model.generate for it")
    # `generate` hands a multimodal model an empty dict where there is nothing but text
    empty = [name for name, value in model_kwargs.items() if value is None or (isinstance(value, dict) and not value)]
    refuse_inputs(model, model_kwargs.keys() - set(empty))


def _by_step(kept: list[list[Tensor]] | None) -> tuple[Tensor, ...] | None:
    """Scores as ``generate`` returns them: one ``[B, V]`` a step."""
    return None if kept is None else tuple(torch.stack(step) for step in zip(*kept, strict=True))
