"""Whether a call's rounds can live on the device, why not, and what its drafter is there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from specdec_fast import sampling, warmup
from specdec_fast.compiled import Compilation
from specdec_fast.costs import Observed, Outlook, constant_costs
from specdec_fast.device_law import DeviceLaw
from specdec_fast.device_projection import device_tables
from specdec_fast.device_round import State
from specdec_fast.device_session import DrafterPart, Session
from specdec_fast.drafters.head import pruned_head
from specdec_fast.encoding import Encoded, source_in
from specdec_fast.host_model import HostModel
from specdec_fast.host_passes import HostPasses
from specdec_fast.lean import LeanModel, lean_model
from specdec_fast.masks import looked_up_positions, positions_of
from specdec_fast.methods import Plan, asks, contexts_of, logit_width
from specdec_fast.options import Options
from specdec_fast.randomness import Philox
from specdec_fast.runner import Runner
from specdec_fast.runners import runner_for
from specdec_fast.sources import Sources
from specdec_fast.static_model import for_passes
from specdec_fast.static_runners import why_not_rounds, why_not_static
from specdec_fast.static_sources import attention_of, first_of_its_length
from specdec_fast.stats import Speculation
from specdec_fast.stops import Stops
from specdec_fast.token_map import TokenMap, token_map
from specdec_fast.vocab import Vocabulary, intersection

__all__ = ["Call", "drafter_part", "mode_of", "open_session", "resident_outlook", "why_not_resident"]

METHODS = ("autoregressive", "model", "tli", "projection")
PREPARED = 8  # draft tokens of the largest round that is captured for a prepared pair


def mode_of(options: Options, model: PreTrainedModel, disabled: bool, config: Any) -> str:
    """How short passes run: "off", "native", "static" or "inductor".

    Args:
        disabled: Transformers' ``disable_compile``.
        config: its ``CompileConfig``, or None. It is for GPUs, or for every device where it says so.
    """
    if options.compile == "off" or (disabled and options.compile == "auto"):
        return "off"
    if options.compile == "auto":
        on_gpu = model.device.type == "cuda"
        if config is not None and (on_gpu or getattr(config, "_compile_all_devices", False)):
            return "inductor"
        return "static" if on_gpu else "native"
    return "static" if disabled else options.compile


@dataclass(frozen=True)
class Call:
    """What a call asks for.

    Args:
        visible: ``[B, P]`` bool, the prompt columns that are not padding; None: all.
        prompt, longest: columns of the target's cache that the prompt fills, and that the text may reach.
        recorded: whether scores are to be kept.
        embeds: whether prompts are embeddings.
        sources: what its models read beside the text.
        ids: ``[B, P]`` the prompt.
        cache: that it goes on from; None: none.
    """

    plan: Plan
    options: Options
    processors: LogitsProcessorList
    stops: Stops
    do_sample: bool
    visible: Tensor | None
    prompt: int
    longest: int
    recorded: bool
    embeds: bool
    use_cache: bool
    prefill_chunk: int | None
    sources: Sources = field(default_factory=Sources)
    ids: Tensor | None = None
    cache: Any = None

    def runner(self, model: PreTrainedModel, rows: int, lean: LeanModel | None) -> Runner:
        """The target as it is."""
        chunk = self.prefill_chunk
        return runner_for(
            model,
            rows,
            visible=self.visible,
            use_cache=self.use_cache,
            prefill_chunk=chunk,
            lean=lean,
            encoded=self.sources.target,
            most=self.longest + self.plan.tree,  # a tree may stand behind the last token
        )


def open_session(
    model: PreTrainedModel, mode: str, config: Any, batch: int, call: Call, statistics: Speculation
) -> tuple[Session | HostModel | None, HostPasses | None]:
    """A session for a call whose rounds can live on the device, or a static target for the loop on the host.

    The statistics say why it is not the former; None: the model runs as it is. Beside it what runs drafters of the loop
    on the host at fixed shapes, None: they run as they are.

    Args:
        mode: of :func:`mode_of`.
        config: Transformers' ``CompileConfig``, or None.
        batch: rows.
    """
    if mode not in ("static", "inductor"):
        if mode == "native" and config is not None:
            said = "compile_config is for GPUs, as in generate; compile='inductor' compiles here too"
            statistics.loop_reason = "; ".join(filter(None, [statistics.loop_reason, said]))
        return None, None
    how, plan, encoded = Compilation.of(mode, model, config), call.plan, call.sources.target
    if how.compiled and (encoded is not None or why_not_rounds(model)):
        kept = "read a source" if encoded is not None else "keep a state"
        how = Compilation(captured=how.captured, why_not=f"passes of {type(model).__name__} {kept}: not compiled")
    passes = HostPasses(how, model.device, call.longest, call.prompt, PREPARED if warmup.preparing() else 0)
    model, switched = for_passes(model, how.compiled)
    why_not = why_not_static(model, encoded, call.ids)
    if (told := looked_up_positions(model)) < call.longest - 1 and why_not is None:  # the last token is not read
        why_not = f"the text may leave the {told} positions of {type(model).__name__}, which end its own forward"
    if encoded is not None and why_not is None:
        why_not = _other_source(call, encoded)
        if why_not is None and how.captured and (alone := first_of_its_length(model, encoded)):
            statistics.loop_reason = alone
            return None, None
    statistics.loop_reason = why_not or why_not_resident(model, call, how) or ""
    if statistics.loop_reason and how.why_not:
        statistics.loop_reason += f"; {how.why_not}"
    if why_not or not call.use_cache or not _padded_left(call.visible):
        return None, passes
    statistics.forward = "inductor" if how.compiled else "static"
    statistics.attention = (switched if encoded is None else attention_of(model)) or ""
    sizes: tuple[Any, ...] = (model, how, batch, call.longest, call.prompt)
    if statistics.loop_reason:
        drafter = call.options.assistant_model
        why = (
            None
            if drafter is None or lean_model(drafter) is not None
            else passes.why_not(drafter, call.sources.drafter)
        )
        if why is not None:
            statistics.loop_reason += f"; the drafter's passes are its own: {why}"
        passes.target = True
        ready = PREPARED + 1 if warmup.preparing() else 0
        given: dict[str, Any] = {"visible": call.visible, "prefill_chunk": call.prefill_chunk, "encoded": encoded}
        target = HostModel(*sizes, **given, ready=ready)
        statistics.static_bytes = target.bytes
        return target, passes
    session = Session(
        *sizes,
        law=DeviceLaw.of(call.processors, do_sample=call.do_sample),
        rule=plan.verification,
        drafter=drafter_part(model, batch, call, how),
        others=[
            partial(_candidate, model, batch, replace(call, plan=replace(plan, method=name)), how)
            for name in plan.others
        ],
        visible=call.visible,
        prefill_chunk=call.prefill_chunk,
        ends=sorted(call.stops.eos) if call.stops.pads else [],
        encoded=encoded,
    )
    statistics.loop, statistics.loop_reason = "device", how.why_not
    statistics.static_bytes = session.bytes
    return session, passes


def resident_outlook(
    model: PreTrainedModel, session: Session, call: Call, horizon: int
) -> tuple[Outlook, Observed | None]:
    """:func:`specdec_fast.warmup.outlook_for` for rounds that live on the device.

    Args:
        horizon: tokens a row may write.
    """
    plan, options = call.plan, call.options
    pair = model, options.assistant_model
    constant = constant_costs(*(0 if one is None else one.num_parameters() for one in pair))
    if plan.schedule != "adaptive" or plan.method == "autoregressive":
        return Outlook(constant), None
    known = warmup.observed(*pair, (plan.method, "device", session.state.ids.shape[0], call.do_sample))
    if options.seed is not None:
        return Outlook(constant), known
    if warmup.preparing():
        session.make(PREPARED)
    return known.counted(session.costs() if horizon >= warmup.WORTH_IT else constant), known


def why_not_resident(model: PreTrainedModel, call: Call, how: Compilation) -> str | None:
    """Why the rounds of a call cannot live on the device; None where they can."""
    plan, options, visible = call.plan, call.options, call.visible
    drafter = options.assistant_model
    if reason := why_not_rounds(model, call.sources.target):
        return reason
    if plan.method not in METHODS:
        return f"method {plan.method} needs the host between draft and verification"
    if plan.verification == "gumbel" and call.do_sample:
        return "rule gumbel has no operation there"
    if sampling.manner_of(call.processors) is not sampling.Manner.POINTWISE:
        return "a logits processor looks at the text"
    if call.stops.in_order:
        return "a custom stopping criterion sees every token"
    if call.recorded:
        return "scores or logits of every token were asked for"
    if call.embeds or not call.use_cache:
        return "the prompt is given as embeddings" if call.embeds else "use_cache=False keeps no cache"
    if options.source is not None and type(options.source) is not Philox:
        return "the source of random numbers is not Philox"
    if not _padded_left(visible):
        return "padding is not on the left"
    if len(call.stops.eos) > State.ENDS:
        return f"more than {State.ENDS} ids end a row"
    if plan.method == "autoregressive" or drafter is None:
        return None
    if options.assistant_window is not None:
        return "assistant_window: the drafter's text is cut on the host"
    if drafter.device != model.device:
        return "the drafter is on another device"
    if reason := why_not_static(for_passes(drafter, how.compiled)[0], call.sources.drafter):
        return f"the drafter: {reason}"
    if reason := why_not_rounds(drafter, call.sources.drafter):
        return f"the drafter: {reason}"
    if positions_of(drafter) < call.longest:
        return f"the text may leave the drafter's {positions_of(drafter)} positions"
    return None


def _other_source(call: Call, encoded: Encoded) -> str | None:
    """Why buffers for what was encoded would not hold what is read: a cache's source counts, where it has one."""
    held = source_in(call.cache) if call.cache is not None else []
    if not held:
        return None
    columns = held[0][0].shape[2]
    return None if columns == encoded.outputs[0].shape[1] else f"the cache is of another source, of {columns} states"


def _map_of(model: PreTrainedModel, options: Options) -> TokenMap:
    assert options.assistant_model is not None
    sizes = {"target_size": logit_width(model), "drafter_size": logit_width(options.assistant_model)}
    return token_map(Vocabulary.of(options.tokenizer), Vocabulary.of(options.assistant_tokenizer), **sizes)


def _padded_left(visible: Tensor | None) -> bool:
    """Whether padding, if any, is in front of each row's text."""
    return visible is None or (bool((visible.long().diff(dim=1) >= 0).all()) and bool(visible[:, -1].all()))


def _candidate(model: PreTrainedModel, batch: int, call: Call, how: Compilation) -> DrafterPart | None:
    """The drafter of a method that a row may change to; None where it needs the host."""
    return None if why_not_resident(model, call, how) else drafter_part(model, batch, call, how)


def watches(plan: Plan, options: Options, how: Compilation) -> bool:
    """Whether the lookahead ends drafts where the drafter is unsure.

    Where rounds are compiled or captured a draft costs its whole bucket wherever it ends, so nothing would be saved.
    """
    return plan.schedule == "adaptive" and asks(plan, options) and not (how.compiled or how.captured)


def drafter_part(model: PreTrainedModel, rows: int, call: Call, how: Compilation) -> DrafterPart | None:
    """The drafter of a call that :func:`why_not_resident` has nothing against."""
    options, drafter = call.options, call.options.assistant_model
    if call.plan.method == "autoregressive" or drafter is None:
        return None
    drafter, _ = for_passes(drafter, how.compiled)
    warpers = sampling.drafter_warpers(
        call.processors, do_sample=call.do_sample, temperature=options.assistant_temperature
    )
    law = DeviceLaw.of(warpers, do_sample=warpers is not None)
    stop: dict[str, Any] = {
        "confidence": options.assistant_confidence_threshold or 0.0,
        "watched": watches(call.plan, options, how),
        "encoded": call.sources.drafter,
    }
    if call.plan.method == "model":
        return DrafterPart(drafter, law, **stop, shown=call.sources.shown)
    target, own = Vocabulary.of(options.tokenizer), Vocabulary.of(options.assistant_tokenizer)
    contexts, pruned = contexts_of(model, options, rows), None if call.sources.drafter else pruned_head
    if call.plan.method == "projection":
        table = _map_of(model, options)
        head, tensors = pruned and pruned(drafter, table.drafter_ids), dict(device_tables(table))
        if head is None:
            tensors["picks"] = table.drafter_ids
        listed = int(tensors["number"].amax())
        return DrafterPart(drafter, law, head, tensors, contexts, listed=listed, **stop)
    shared = intersection(target, own, target_size=logit_width(model), drafter_size=logit_width(drafter))
    head = pruned and pruned(drafter, shared.drafter_ids)
    tensors = {"index": shared.target_ids.int(), "target_ids": shared.target_ids, "choices": shared.drafter_ids}
    if head is None:
        tensors["picks"] = shared.drafter_ids
    return DrafterPart(drafter, law, head, tensors, contexts, **stop)
