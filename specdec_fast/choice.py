"""What ``method="auto"`` takes, and why (``docs/auto.md``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from specdec_fast.intersection_mass import intersection_mass
from specdec_fast.options import Options
from specdec_fast.randomness import Philox
from specdec_fast.token_map import token_map
from specdec_fast.vocab import Vocabulary, intersection

__all__ = [
    "Choice",
    "across_vocabularies",
    "any_common_text",
    "lacks_for_trees",
    "races",
    "repetition",
    "without_drafter",
]

NEARLY_ALL = 0.95  # of the drafter's mass on shared tokens: what projection adds is then within its cost
ALL = 0.999  # ... and TLI loses nothing that another method would keep
MERGING = 0.03  # share of the target's tokens that are several of the drafter's, from which SLRS may pay
SMALL = 0.1  # of the target's parameters: a larger drafter's own looks cost more than SLRS brings
ALL_TOKENS = 0.98  # of the drafter's, shared: what a tree of them brings is more than the rest could
LARGE = 32_000_000  # parameters: a pass over less is bound by its arithmetic, and every position costs
NGRAM = 3
REPETITIVE = 0.12  # share of a prompt's n-grams that stood in it before, from which looking up pays
LEAST_REPEATED = 8  # and so many of them: a share of a short prompt says little


@dataclass(frozen=True)
class Choice:
    """A decision and its reason.

    Args:
        method: the one to begin with.
        reason: one line for the statistics.
        others: what the running acceptance may change to.
        rows: those that draft; None: all.
    """

    method: str
    reason: str
    others: tuple[str, ...] = ()
    rows: frozenset[int] | None = None


def across_vocabularies(
    options: Options, do_sample: bool, in_order: bool, widths: tuple[int, int], size: float, branches: bool = False
) -> Choice:
    """For a drafter with a tokenizer of its own.

    Args:
        in_order: whether a callable must see every token in order.
        widths: how many logits target and drafter have.
        size: the drafter's parameters beside the target's.
        branches: whether drafts of TLI would be trees.
    """
    if not do_sample and branches:
        shared = intersection(
            Vocabulary.of(options.tokenizer),
            Vocabulary.of(options.assistant_tokenizer),
            target_size=widths[0],
            drafter_size=widths[1],
        )
        share = len(shared.target_ids) / max(widths[1], 1)
        if share >= ALL_TOKENS:
            return Choice("tli", f"the tokenizers differ, but {share:.1%} of the drafter's tokens are the target's too")
    target, drafter = Vocabulary.of(options.tokenizer), Vocabulary.of(options.assistant_tokenizer)
    assert options.assistant_model is not None
    sizes = {"target_size": widths[0], "drafter_size": widths[1]}
    if not any_common_text(target, drafter, **sizes):
        return Choice("autoregressive", "the tokenizers differ, and have no text in common")
    if not do_sample:
        return Choice("slem", "the tokenizers differ and decoding is greedy")
    if options.assistant_temperature == 0:
        return Choice("slem", "the tokenizers differ and the drafter proposes its argmax, which needs no law")
    if options.verification == "match" or (in_order and options.verification == "auto"):
        return Choice("slem", "the tokenizers differ and the target's own draws are compared, which needs no law")
    common = bool(len(intersection(target, drafter, **sizes).target_ids))
    mass = intersection_mass(options.assistant_model, drafter, target, **sizes)
    part = "mass" if mass.positions else "vocabulary"
    measured = f"the tokenizers differ, and {mass.shared:.1%} of the drafter's {part} is on tokens that both have"
    methods = ["tli", "projection"] if mass.shared >= NEARLY_ALL else ["projection", "tli"]
    if mass.shared >= ALL or not common:
        methods = methods[:1]
    if mass.shared < ALL and mass.merged >= MERGING and size <= SMALL:
        methods.insert(1, "slrs")
    kept = "TLI throws hardly any of it away" if methods[0] == "tli" else "projection keeps the others too"
    # Where rows advance in step, what a row has accepted hangs on the others
    return Choice(methods[0], f"{measured}: {kept}", () if in_order else tuple(methods[1:]))


def any_common_text(target: Vocabulary, drafter: Vocabulary, *, target_size: int, drafter_size: int) -> bool:
    """Whether anything that the drafter may write is text of the target's."""
    sizes = {"target_size": target_size, "drafter_size": drafter_size}
    return bool(len(intersection(target, drafter, **sizes).target_ids) or len(token_map(target, drafter, **sizes)))


def lacks_for_trees(model: PreTrainedModel, options: Options, choice: Choice, do_sample: bool, in_order: bool) -> str:
    """What drafts lack to branch; empty where they may.

    Whether a call's passes run as the one operation that judges trees has no part in it: the rule, and with it what a
    seed gives, should not hang on that.
    """
    drafter = options.assistant_model
    schedule = options.num_assistant_tokens_schedule
    if options.draft_tree == "off":
        return "draft_tree other than 'off'"
    if choice.method not in ("model", "tli") or choice.others or drafter is None:
        return "method='model' or method='tli'"
    if do_sample and options.verification not in ("auto", "block", "gumbel"):
        return "verification='block' or verification='gumbel'"
    if in_order:
        return "no custom processor or criterion"
    if (schedule or ("adaptive" if options.num_assistant_tokens is None else "constant")) != "adaptive":
        return "num_assistant_tokens_schedule='adaptive'"
    if options.assistant_confidence_threshold is not None:
        return "no assistant_confidence_threshold"
    if type(options.source or Philox()) is not Philox:
        return "Philox as the source of numbers"
    if model.device.type != "cpu" or drafter.device.type != "cpu":
        return "both models on the CPU"
    if do_sample and not races(options) and options.assistant_temperature == 0:
        return "a drafter that draws (an assistant_temperature above 0) or verification='gumbel'"
    if options.draft_tree == "on":
        return ""
    if model.num_parameters() < LARGE:
        return f"a target of at least {LARGE} parameters"
    # What a seed gives is then the same by every backend, of which only the native operations have trees
    repeats = options.seed is not None or options.source is not None
    return "verification='gumbel', where a seed is given" if do_sample and repeats and not races(options) else ""


def races(options: Options) -> bool:
    """Whether the trees of a sampling call are judged by rule *gumbel* rather than *block*."""
    return options.verification == "gumbel" or (options.verification == "auto" and options.draft_tree == "on")


def without_drafter(prompts: Tensor, mask: Tensor | None, in_order: bool) -> Choice:
    """For a call without a drafter model.

    Args:
        prompts: ``[B, P]``.
        mask: ``[B, >= P]`` 0 at padding, its last columns those of ``prompts``; None: no padding.
        in_order: whether a callable must see every token in order.
    """
    if in_order:
        return Choice("autoregressive", "no drafter was given, and a custom callable sees every token in order")
    texts = prompts.tolist()
    if mask is not None:
        shown = mask[:, mask.shape[1] - prompts.shape[1] :].tolist()
        texts = [[t for t, seen in zip(*row, strict=False) if seen] for row in zip(texts, shown, strict=False)]
    found = [repetition(text, NGRAM) for text in texts]
    rows = [row for row, (share, repeated) in enumerate(found) if share >= REPETITIVE and repeated >= LEAST_REPEATED]
    share = max((share for share, _ in found), default=0.0)
    if not rows:
        return Choice("autoregressive", f"no drafter was given, and at most {share:.0%} of a prompt repeats itself")
    which = "the prompt repeats itself" if len(found) == 1 else f"{len(rows)} of {len(found)} prompts repeat themselves"
    measured = f"no drafter was given, and {which} (up to {share:.0%} of the n-grams stood there before)"
    return Choice("prompt_lookup", measured, rows=frozenset(rows))


def repetition(tokens: Sequence[int], n: int) -> tuple[float, int]:
    """The share of a text's n-grams that stood in it before, and how many those are."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    repeated = len(grams) - len(set(grams))
    return (repeated / len(grams) if grams else 0.0), repeated
