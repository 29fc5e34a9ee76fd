"""Chooses drafter and rule for a call, builds the drafter, and says why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from specdec_fast import sampling
from specdec_fast.branching import Branching, nodes_for
from specdec_fast.cache import CACHE_NAMES, cache_argument, ragged_layers
from specdec_fast.choice import Choice, across_vocabularies, any_common_text, lacks_for_trees, races, without_drafter
from specdec_fast.drafters.auto import AutoDrafter, Candidate
from specdec_fast.drafters.base import Drafter, Passes
from specdec_fast.drafters.begun import Begun, mark_of
from specdec_fast.drafters.literal import LiteralSlrsDrafter
from specdec_fast.drafters.model import CompactDrafter, Context, ModelWriter, SameText, SlemDrafter, Watcher
from specdec_fast.drafters.none import NoDrafter
from specdec_fast.drafters.projection import ProjectionDrafter, ProjectionWriter
from specdec_fast.drafters.prompt_lookup import PromptLookup
from specdec_fast.drafters.slrs import SlrsDrafter
from specdec_fast.lean import why_not_lean
from specdec_fast.memory import footprint
from specdec_fast.options import DEFAULT_LOOKAHEAD, DEFAULT_NGRAM, LOOKBEHIND, Options
from specdec_fast.recurrent import why_not_recurrent
from specdec_fast.sources import Sources
from specdec_fast.spelling import spelling
from specdec_fast.stops import Stops
from specdec_fast.text import Reader, TextProposer
from specdec_fast.token_map import token_map
from specdec_fast.trial import sees_ahead
from specdec_fast.vocab import Vocabulary, intersection, same_tokenizer

__all__ = [
    "Parts",
    "Plan",
    "asks",
    "build_drafter",
    "check_length",
    "check_model",
    "logit_width",
    "make_plan",
    "reason_of",
]

_MENDED = {"model", "tli"}  # by a memory
MOST_REMEMBERED = 256 << 20  # bytes that memories take where nobody has asked for them
# Methods that say by what law they drew; what the others propose is certain
LAW_KNOWN = ("model", "tli", "projection", "slrs", "slrs_literal")
# Acceptance hoped for before a method was tried (docs/auto.md)
HOPES = {"tli": 0.45, "projection": 0.5, "slrs": 0.65}
# SLRS looks at the law of some tokens with drafter passes of its own, about three a round. What a round's cost beyond
# another's is worth in acceptance, for a drafter as large as its target (docs/auto.md)
LOOKING = 2.0


Parts = tuple[PreTrainedModel, Options, int, LogitsProcessorList, bool, Sources, torch.device]
"""What a drafter is built from beside a plan, as :func:`build_drafter` takes it."""


@dataclass(frozen=True)
class Plan:
    """What a call will do.

    Args:
        method: resolved, never "auto"; the one to begin with.
        verification: resolved name of the rule.
        reason: one line for the statistics.
        lookahead: draft tokens a round, or what the schedule starts from.
        schedule: how the lookahead changes.
        others: methods that a row's running acceptance may change to.
        rows: those that draft; None: all.
        tree: nodes of each row's draft at most, where it may branch; 0: it is a chain.
        remembers: whether what the target says mends what drafters draw from (:mod:`specdec_fast.memory`).
    """

    method: str
    verification: str
    reason: str
    lookahead: int
    schedule: str
    others: tuple[str, ...] = ()
    rows: frozenset[int] | None = None
    tree: int = 0
    remembers: bool = False

    @property
    def drawn(self) -> bool:
        """Whether the nodes of trees are draws, which are judged by the law that they were drawn from."""
        return self.verification == "block"


def check_model(model: PreTrainedModel, argument: str) -> None:
    """Refuses by name what cannot be decoded here.

    Raises:
        ValueError: ``argument`` is encoder-only or keeps a state that it cannot go on from.
        TypeError: it is no model.
    """
    name = type(model).__name__
    if not hasattr(model, "config") or not hasattr(model, "can_generate"):
        raise TypeError(f"{argument} must be a Transformers model, not {name}: load it with AutoModelForCausalLM")
    if not model.can_generate():
        raise ValueError(f"{argument}: {name} cannot generate text: load it with AutoModelForCausalLM")
    if model.config.is_encoder_decoder:
        return  # tried with what its encoder makes (:mod:`specdec_fast.sources`)
    ragged, stateful = ragged_layers(model.config) is not None, getattr(model, "_is_stateful", False)
    if not stateful and not cache_argument(type(model)):
        raise ValueError(
            f"{argument}: {name} has no key-value cache to roll back (its forward takes neither "
            f"{' nor '.join(CACHE_NAMES)}): use model.generate for it"
        )
    if argument != "model" and sees_ahead(model):
        raise ValueError(
            f"{argument}: a token of {name} sees those behind it, so a prompt that is read together with a draft is "
            "another one: use model.generate for it"
        )
    if stateful or not ragged:
        why = "its cache does not hold it" if ragged else why_not_recurrent(model)
        if why is not None:
            raise ValueError(
                f"{argument}: {name} keeps a recurrent state, which cannot be rolled back to a rejected token: {why}. "
                "Use model.generate for it"
            )


def check_length(model: PreTrainedModel, columns: int) -> None:
    """Refuses texts on which what a token sees changes with the length of the pass that it is read in.

    Where rotary frequencies change with the length, Transformers computes keys anew or keeps old ones, depending on the
    length of each single forward pass; a pass that holds drafts has another length. Doge, beyond ``keep_window_size``
    columns, chooses among all of a pass, those behind a token included.

    Raises:
        ValueError: ``columns`` reach beyond the length up to which neither happens.
    """
    config = model.config.get_text_config(decoder=True)
    kept = getattr(config, "keep_window_size", None)
    if isinstance(kept, int) and columns > kept:
        raise ValueError(
            f"model: {type(model).__name__} sees other tokens in passes over several beyond {kept} tokens, and this "
            f"call may reach {columns}: lower max_new_tokens, or use model.generate"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *(nested for nested in rope.values() if isinstance(nested, dict))):
        if kind.get("rope_type") not in ("dynamic", "longrope"):
            continue
        original = kind.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        fixed = original or config.max_position_embeddings
        if columns > fixed:
            raise ValueError(
                f"model: {type(model).__name__} with {kind['rope_type']} rotary scaling changes its frequencies beyond "
                f"{fixed} tokens, and this call may reach {columns}: lower max_new_tokens, or use model.generate"
            )


def logit_width(model: PreTrainedModel) -> int:
    """How many logits a position has, padding of the vocabulary included."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.is_floating_point():
        return weight.shape[0]
    return model.config.get_text_config(decoder=True).vocab_size


def make_plan(
    model: PreTrainedModel,
    options: Options,
    processors: LogitsProcessorList,
    stops: Stops,
    do_sample: bool,
    prompts: Tensor,
    mask: Tensor | None,
) -> Plan:
    """Resolves ``method`` and ``verification``.

    Args:
        prompts: ``[B, P]`` ids.
        mask: ``[B, >= P]``, 0 at padding; its last columns are those of ``prompts``.

    Raises:
        ValueError: they contradict the other arguments, or would not be lossless.
    """
    in_order = stops.in_order or sampling.manner_of(processors) is sampling.Manner.IN_ORDER
    if options.method == "auto" and options.assistant_model is None and options.prompt_lookup_num_tokens is None:
        choice = without_drafter(prompts, mask, in_order)
    else:
        choice = _choice(model, options, do_sample, in_order)
    missing = lacks_for_trees(model, options, choice, do_sample, in_order)
    if missing and options.draft_tree == "on":
        raise ValueError(f"draft_tree='on' needs {missing}: mend that, or use draft_tree='auto'")
    _refuse_memory(options, choice)
    if choice.method != "autoregressive" and sampling.holds_a_cache(processors):
        choice = Choice("autoregressive", "a guidance processor runs a model of its own at every token")
    method = choice.method
    verification, why = _verification(options, method, do_sample, in_order)
    if not missing and do_sample and races(options):
        verification, why = "gumbel", "drafts branch, and the target's own draws need no law of the drafter"
    given, default = options.num_assistant_tokens, DEFAULT_LOOKAHEAD
    if method == "prompt_lookup":
        given, default = options.prompt_lookup_num_tokens or given, 2 * DEFAULT_LOOKAHEAD
    # A number that the caller chose is kept, unless the schedule was chosen as well
    schedule = options.num_assistant_tokens_schedule or ("adaptive" if given is None else "constant")
    return Plan(
        method,
        verification,
        f"{choice.reason}; {why}",
        given or default,
        schedule,
        choice.others,
        choice.rows,
        0 if missing else nodes_for(prompts.shape[0]),
        _remembers(model, options, verification, prompts.shape[0], in_order, choice),
    )


def reason_of(plan: Plan, drafter: Drafter) -> str:
    """Why this method ran, and what the running acceptance has changed."""
    changes = drafter.summary() if isinstance(drafter, AutoDrafter) else ""
    return "; ".join(filter(None, [plan.reason, changes]))


def asks(plan: Plan, options: Options) -> bool:
    """Whether the plan's drafter asks behind every token if it should draft on.

    Each answer waits for the drafter's device, so only drafters on the CPU ask; a threshold that the caller gave is
    kept.
    """
    drafter = options.assistant_model
    given = options.assistant_confidence_threshold
    asking = plan.method in ("model", "tli", "projection", "slem", "slrs")
    return asking and given is None and drafter is not None and drafter.device.type == "cpu"


def _choice(model: PreTrainedModel, options: Options, do_sample: bool, in_order: bool) -> Choice:
    wanted, drafter = options.method, options.assistant_model
    if wanted in ("model", "tli", "projection", "slem", "slrs", "slrs_literal"):
        if drafter is None:
            raise ValueError(f"method={wanted!r} needs a drafter: pass assistant_model")
        if wanted != "model":
            _need_tokenizers(options, f"method={wanted!r}")
            _need_common_text(model, options)
        elif not _same_tokenizer(model, options):
            raise ValueError(
                "method='model' needs a drafter with the target's tokenizer, and these two differ: use method='tli' "
                "or 'slem', or leave method out"
            )
        return Choice(wanted, f"method={wanted!r} was asked for")
    if wanted != "auto":
        if drafter is not None:
            raise ValueError(f"method={wanted!r} uses no drafter model: leave out assistant_model or method")
        return Choice(wanted, f"method={wanted!r} was asked for")
    if drafter is None:
        return Choice("prompt_lookup", "prompt_lookup_num_tokens was given")
    if options.prompt_lookup_num_tokens is not None:
        raise ValueError("assistant_model and prompt_lookup_num_tokens exclude each other: leave one out")
    if _same_tokenizer(model, options):
        return Choice("model", "target and drafter share a tokenizer")
    widths = logit_width(model), logit_width(drafter)
    branches = not lacks_for_trees(model, options, Choice("tli", ""), do_sample, in_order)
    return across_vocabularies(options, do_sample, in_order, widths, _size(drafter, model), branches)


def _size(drafter: PreTrainedModel, model: PreTrainedModel) -> float:
    """The drafter's parameters beside the target's."""
    return drafter.num_parameters() / max(model.num_parameters(), 1)


def _need_tokenizers(options: Options, cause: str) -> None:
    missing = [name for name in ("tokenizer", "assistant_tokenizer") if getattr(options, name) is None]
    if missing:
        raise ValueError(f"{cause} needs both tokenizers: pass {' and '.join(missing)}")


def _need_common_text(model: PreTrainedModel, options: Options) -> None:
    """Refuses methods by which the drafter could propose nothing."""
    assert options.assistant_model is not None
    target, own = Vocabulary.of(options.tokenizer), Vocabulary.of(options.assistant_tokenizer)
    widths = {"target_size": logit_width(model), "drafter_size": logit_width(options.assistant_model)}
    missing = ""
    if options.method == "tli":
        missing = "" if len(intersection(target, own, **widths).target_ids) else "tokens"
    elif options.method == "projection":
        missing = "" if len(token_map(target, own, **widths)) else "text"
    elif not any_common_text(target, own, **widths):
        missing = "text"
    if missing:
        raise ValueError(
            f"method={options.method!r} has nothing to draft, since tokenizer and assistant_tokenizer have no "
            f"{missing} in common: pass another assistant_model, or leave it out"
        )


def _same_tokenizer(model: PreTrainedModel, options: Options) -> bool:
    """By content where both tokenizers are known. Without them equal widths are taken for the same tokenizer.

    That is lossless whatever the truth: a drafter that means other words by the same ids is only rejected more often.
    """
    assert options.assistant_model is not None
    target_width, drafter_width = logit_width(model), logit_width(options.assistant_model)
    if options.tokenizer is None and options.assistant_tokenizer is None:
        if target_width != drafter_width:
            raise ValueError(
                f"the target has {target_width} logits and assistant_model {drafter_width}, so their tokenizers may "
                "differ: pass tokenizer and assistant_tokenizer"
            )
        return True
    if options.assistant_tokenizer is None and target_width == drafter_width:
        return True  # as in Transformers: a tokenizer for stop strings, no second one needed
    _need_tokenizers(options, "a drafter with another vocabulary")
    return same_tokenizer(
        Vocabulary.of(options.tokenizer), Vocabulary.of(options.assistant_tokenizer), target_width, drafter_width
    )


def _verification(options: Options, method: str, do_sample: bool, in_order: bool) -> tuple[str, str]:
    if not do_sample:
        return "match", "greedy decoding keeps what equals the argmax"
    if options.verification == "block" and in_order and method != "autoregressive":
        raise ValueError(
            "verification='block' judges a whole draft at once, but a custom logits processor or stopping "
            "criterion must see each token before the next one is scored: use verification='token' or "
            "'match', or leave it out"
        )
    if options.verification != "auto":
        return options.verification, f"verification={options.verification!r} was asked for"
    if in_order:
        # Rows advance in step, so where a row's rounds begin, and with it its numbers, hangs on the others
        return "match", "a custom callable sees the whole batch, and the target's own draws do not depend on it"
    if method in LAW_KNOWN:
        return "block", "the drafter's law is known"
    return "match", "the target's own draws need no law of the drafter"


def _refuse_memory(options: Options, choice: Choice) -> None:
    """Raises where a memory was asked for and cannot be."""
    if options.draft_memory != "on":
        return
    drafter = options.assistant_model
    if drafter is None or not _MENDED & {choice.method, *choice.others}:
        raise ValueError(
            f"draft_memory='on' needs method 'model' or 'tli', and the method is {choice.method!r}: "
            "name one of these, or use draft_memory='auto'"
        )
    if (why := why_not_lean(drafter)) is not None:
        raise ValueError(f"draft_memory='on' needs a drafter that runs natively: {why}; use draft_memory='auto'")


def _remembers(
    model: PreTrainedModel, options: Options, verification: str, rows: int, in_order: bool, choice: Choice
) -> bool:
    """Whether drafters that draw have a memory where they can.

    In order nobody tells it anything. Where nobody has asked for it: a seed gives the same tokens by every backend, of
    which only the native operations have one, so there is none where these hang on the draft; and memory is bounded.
    """
    drafter = options.assistant_model
    if drafter is None or in_order or options.draft_memory == "off" or not _MENDED & {choice.method, *choice.others}:
        return False
    widths = logit_width(drafter), logit_width(model)
    if choice.method == "model" and widths[0] > widths[1]:  # some entries are no token of the target
        return False
    repeats = options.seed is not None or options.source is not None
    affordable = rows * footprint(min(widths)) <= MOST_REMEMBERED
    return options.draft_memory == "on" or (affordable and not (repeats and verification in ("token", "block")))


def contexts_of(model: PreTrainedModel, options: Options, rows: int) -> list[Context]:
    """The rows' texts in the ids of a drafter with a tokenizer of its own."""
    drafter = options.assistant_model
    assert drafter is not None
    target, own = Vocabulary.of(options.tokenizer), Vocabulary.of(options.assistant_tokenizer)
    lookbehind, marks = options.assistant_lookbehind or LOOKBEHIND, (mark_of(drafter), mark_of(model))
    contexts: list[Context] = [
        Reader(target, options.assistant_tokenizer, own, lookbehind=lookbehind) for _ in range(rows)
    ]
    return contexts if marks == (None, None) else [Begun(context, *marks) for context in contexts]


def build_drafter(
    plan: Plan,
    model: PreTrainedModel,
    options: Options,
    rows: int,
    processors: LogitsProcessorList,
    do_sample: bool,
    sources: Sources,
    device: torch.device,
    watcher: Watcher | None = None,
    branching: Branching | None = None,
    passes: Passes | None = None,
) -> Drafter:
    """The drafter of a plan, for ``rows`` rows whose tokens live on ``device``.

    Args:
        sources: what the call's models read beside the text.
        watcher: whether to draft on; asked where :func:`asks` says so.
        branching: how far trees grow, where the plan has some.
        passes: runs drafters that have no native form; None: they run as they are.
    """
    if plan.method == "autoregressive":
        return NoDrafter(device)
    if plan.method == "prompt_lookup":
        longest = options.max_matching_ngram_size or DEFAULT_NGRAM
        return PromptLookup(rows, longest, device, only=plan.rows, sources=sources.ids)
    if plan.others:
        alone = [replace(plan, method=method, others=()) for method in (plan.method, *plan.others)]
        rest = model, options, rows, processors, do_sample, sources, device, watcher, None, passes
        assert options.assistant_model is not None
        handicaps = {"slrs": LOOKING * _size(options.assistant_model, model)}
        tried = [
            Candidate(own.method, partial(build_drafter, own, *rest), HOPES[own.method], handicaps.get(own.method, 0.0))
            for own in alone
        ]
        return AutoDrafter(tried, rows)
    drafter = options.assistant_model
    assert drafter is not None
    warpers = sampling.drafter_warpers(processors, do_sample=do_sample, temperature=options.assistant_temperature)
    confidence = options.assistant_confidence_threshold or 0.0
    window = options.assistant_window
    encoded = sources.drafter
    how: dict[str, Any] = {
        "confidence": confidence,
        "watcher": watcher,
        "window": window,
        "passes": passes,
        "encoded": encoded,
    }
    raced = plan.verification == "gumbel"
    # An argmax seldom changes by what a memory knows, and its cost is not won back
    remembers = plan.remembers and (warpers is not None or options.draft_memory == "on")
    if plan.method == "model":
        same = ModelWriter(
            drafter,
            [SameText() for _ in range(rows)],
            warpers=warpers,
            **how,
            races=raced,
            remembers=remembers,
            shown=sources.shown,
        )
        return CompactDrafter(same, None, device, branching)
    target, own = Vocabulary.of(options.tokenizer), Vocabulary.of(options.assistant_tokenizer)
    contexts = contexts_of(model, options, rows)
    if plan.method in ("slem", "slrs_literal"):
        proposer = TextProposer(options.tokenizer, target, own, lookbehind=options.target_lookbehind or LOOKBEHIND)
        if plan.method == "slem" or not do_sample or warpers is None:  # at T=0 one text has all the mass
            writer = ModelWriter(drafter, contexts, warpers=warpers, **how, lawless=True)
            return SlemDrafter(writer, proposer, device)
        if encoded is not None:
            raise ValueError(
                "method='slrs_literal' runs drafters that read nothing but the text: use method='slrs' for an "
                "assistant_model that reads what an encoder made"
            )
        return LiteralSlrsDrafter(
            drafter,
            contexts,
            proposer,
            warpers=warpers,
            confidence=confidence,
            window=window,
            eos=own.roles["eos"],
            width=logit_width(drafter),
            lookahead=plan.lookahead,
            device=device,
        )
    widths = {"target_size": logit_width(model), "drafter_size": logit_width(drafter)}
    if plan.method == "projection":
        table = token_map(target, own, **widths)
        projecting = ProjectionWriter(drafter, contexts, warpers=warpers, choices=table.drafter_ids, **how)
        return ProjectionDrafter(projecting, table, device)
    if plan.method == "slrs":
        return SlrsDrafter(
            drafter,
            contexts,
            spelling(target, own, **widths),
            target,
            warpers=warpers,
            **how,
            device=device,
        )
    shared = intersection(target, own, **widths)
    writer = ModelWriter(
        drafter,
        contexts,
        warpers=warpers,
        choices=shared.drafter_ids,
        **how,
        races=raced,
        names=shared.target_ids,
        remembers=remembers,
    )
    return CompactDrafter(writer, shared.target_ids, device, branching)
