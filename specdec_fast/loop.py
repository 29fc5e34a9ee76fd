"""The loop that ``generate`` calls in the place of its own: from its arguments to the parts of a generation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationMixin,
)

from specdec_fast import costs, dispatch, methods, sampling, warmup
from specdec_fast.branching import Branching
from specdec_fast.cache import CACHE_NAMES, check_cache, columns_of, given_cache, multimodal
from specdec_fast.continuation import columns_before, load, new_cache, store
from specdec_fast.device_engine import DeviceEngine
from specdec_fast.device_plan import Call, mode_of, open_session, resident_outlook
from specdec_fast.device_session import Session
from specdec_fast.drafters.base import Drafter
from specdec_fast.drafters.none import NoDrafter
from specdec_fast.engine import Engine
from specdec_fast.fused import Fused
from specdec_fast.host_model import HostModel
from specdec_fast.inputs import check_counting, check_ids, check_positions, refuse_unsupported
from specdec_fast.lean import lean_model, why_not_lean
from specdec_fast.lookahead import Adaptive, Lookahead, lookahead_for
from specdec_fast.options import Options
from specdec_fast.outputs import SpeculativeEncoderDecoderOutput, SpeculativeOutput
from specdec_fast.pictures import Prompt, beside_text, check_pictures, placeholders
from specdec_fast.randomness import Philox, row_seeds, seed_of_call
from specdec_fast.record import Record, by_step
from specdec_fast.runner import Runner
from specdec_fast.sources import sources_of
from specdec_fast.state import Rows
from specdec_fast.stats import Speculation, remember
from specdec_fast.stops import Stops
from specdec_fast.trial import sees_ahead
from specdec_fast.verification import Apart, rule_for

__all__ = ["Loop"]

_CACHE_FIELD = next(name for name in CACHE_NAMES if name in GenerateDecoderOnlyOutput.__dataclass_fields__)


class Loop:
    """What ``generate`` calls instead of its own decoding loop."""

    def __init__(self, options: Options, pictures: dict[str, Tensor] | None = None):
        """
        Args:
            options: of :func:`specdec_fast.fast_generate`.
            pictures: of :func:`~specdec_fast.pictures.given_pictures`; None: nobody knows what a drafter would see.
        """
        self._options, self._pictures = options, pictures
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
        methods.check_model(model, "model")
        refuse_unsupported(model, config, model_kwargs)
        dispatch.check_default(input_ids.device.type)
        if options.assistant_model is not None:
            methods.check_model(options.assistant_model, "assistant_model")
        do_sample = bool(config.do_sample)
        stops = Stops(stopping_criteria)
        encodes = model.config.is_encoder_decoder
        mask = model_kwargs.get("decoder_attention_mask" if encodes else "attention_mask")
        mode = mode_of(options, model, bool(config.disable_compile), config.compile_config)
        lean = lean_model(model, rounded=False) if mode == "native" and not encodes else None
        plan = methods.make_plan(model, options, logits_processor, stops, do_sample, input_ids, mask)
        if plan.method == "autoregressive" and options.speculate:
            warnings.warn(f"decoding without a drafter: {plan.reason}", UserWarning, stacklevel=2)
        wanted = str(config.cache_implementation or "")
        if "offloaded" in wanted or wanted == "quantized":
            own = "the loop keeps a cache that it can roll back, in the model's precision and on its device"
            warnings.warn(f"cache_implementation={wanted!r} is not used: {own}", UserWarning, stacklevel=2)
        batch, columns = input_ids.shape
        pictures = [] if encodes else beside_text(model, model_kwargs)
        marks = placeholders(model) if multimodal(model) else set()
        check_ids(input_ids, model, marks if pictures else set())
        sources = sources_of(model, options, model_kwargs, inputs_tensor, batch, plan.method)
        seeds = row_seeds(self._seed(model, options), batch)
        limit = stops.max_length if stops.max_length is not None else config.max_length
        pad = config._pad_token_tensor
        if stops.pads and pad is None:
            raise ValueError("rows that end early need padding: set pad_token_id")

        embeds = None if encodes else model_kwargs.get("inputs_embeds")
        both_ways = not encodes and sees_ahead(model)  # a prompt's tokens see the text behind them, but no answer
        if pictures or both_ways:
            what = () if pictures else (f"prompts that {type(model).__name__} reads both ways",)
            check_pictures(model, input_ids, embeds is not None, config.use_cache is not False, *what)
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
        ahead = [0] * batch
        if not encodes:
            first = check_counting(model)
            new = 1 if pictures else shift + columns - past if past and multimodal(model) else None
            ahead = check_positions(model_kwargs.get("position_ids"), shift + columns, visible, batch, new)
            if first is None:
                ahead = [0] * batch if visible is None else (~visible).sum(1).tolist()
            else:
                ahead = [first + places for places in ahead]
        lean = None if any(ahead) else lean  # which counts by itself
        native = lean is not None
        methods.check_length(model, shift + limit)
        held: Cache | None = cache if isinstance(cache, Cache) and past else None
        drafter_model = None if plan.method in ("autoregressive", "prompt_lookup") else options.assistant_model
        if pictures or both_ways:
            prompt = Prompt(model, input_ids, model_kwargs, config, shift + columns, visible, ahead)
            alone = held is not None or plan.method != "model" or options.assistant_window is not None
            if pictures and drafter_model is not None and not alone:
                sources = replace(sources, shown=prompt.read_by(drafter_model, self._pictures))
            held, past = prompt.read(held)
        if drafter_model is not None and (pictures or marks.intersection(input_ids.unique().tolist())):
            sees = "reads the text alone" if sources.shown is None else "sees what the target sees"
            plan = replace(plan, reason=f"{plan.reason}; the drafter {sees}")
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
            why = why or "positions are ahead of the text's count"
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
                marks if sources.shown is None else (),
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
                load(target, held, past)
            if any(ahead):
                target.go_ahead(ahead)
            held = None
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
        fields: dict[str, Any] = {"scores": by_step(record.scores), "logits": by_step(record.logits)}
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
