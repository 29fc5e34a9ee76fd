"""Tokens per second of one pair: Transformers' decoding and ours, interleaved in one run."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec_fast import fast_generate, last_speculation, prepare
from specdec_fast.sources import beginning
from specdec_fast.vocab import Vocabulary, same_tokenizer

__all__ = ["Row", "System", "measure", "systems"]

Inputs = dict[str, Tensor]


@dataclass
class System:
    """One way to generate.

    Args:
        target: the model.
        system: "transformers" or "specdec_fast".
        method: as :func:`specdec_fast.fast_generate` names it; "assisted" is Transformers' own.
        run: from inputs and a seed to ``sequences [B, L]``.
        ready: makes ready what a first call would, given inputs of the calls to come; None: nothing.
    """

    target: Any
    system: str
    method: str
    run: Callable[[Inputs, int], Tensor]
    ready: Callable[[Inputs], object] | None = None
    rates: list[float] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    ran: tuple[str, str] | None = None
    """Method and rule that the last call chose."""
    passes: str | None = None
    """How its short passes ran, and where its rounds lived."""


@dataclass(frozen=True)
class Row:
    """One line of the table; rates are medians over repetitions, ratios medians of ratios within a repetition.

    ``identical_to_plain``: whether every greedy text equals the same system's plain one; None when sampling.
    """

    system: str
    method: str
    ran: str | None
    verification: str | None
    passes: str | None
    temperature: float
    batch: int
    tokens_per_second: float
    lowest: float
    highest: float
    ratio_to_transformers: float
    ratio_to_plain: float
    acceptance_rate: float | None
    block_efficiency: float | None
    identical_to_plain: bool | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def systems(
    pair: dict[str, Any],
    methods: Sequence[str],
    *,
    temperature: float,
    batch: int,
    tokens: int,
    lookahead: int | None,
    compile: str = "auto",
) -> list[System]:
    """Transformers' plain and assisted decoding, ours, and our methods.

    Args:
        pair: target, tokenizer, drafter, drafter_tokenizer.
        methods: of :func:`specdec_fast.fast_generate`; plain decoding is always measured.
        temperature: 0: greedy.
        batch: rows a call; above 1 Transformers has no assisted decoding. Nor has it across tokenizers for
            encoder-decoder models.
        tokens: new ones a row.
        lookahead: draft tokens a round of every system; None: each one's defaults.
        compile: of :func:`specdec_fast.fast_generate`.
    """
    target, drafter = pair["target"], pair["drafter"]
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    common = {"max_new_tokens": tokens, **sampling}
    table = [
        System(target, "transformers", "autoregressive", _seeded(lambda inputs: target.generate(**inputs, **common)))
    ]
    if batch == 1 and drafter is not None:
        own, other = (Vocabulary.of(pair[name]) for name in ("tokenizer", "drafter_tokenizer"))
        padded = target.config.get_text_config().vocab_size != drafter.config.get_text_config().vocab_size
        foreign = padded or not same_tokenizer(own, other)  # padding makes them different ones for Transformers
        mine = copy.deepcopy(drafter)  # its TLI prunes the drafter for good
        if lookahead is not None:
            mine.generation_config.num_assistant_tokens = lookahead
            mine.generation_config.num_assistant_tokens_schedule = "constant"
            mine.generation_config.assistant_confidence_threshold = 0.0
        theirs: dict[str, Any] = {"assistant_model": mine, **common}
        if foreign:
            theirs |= {"tokenizer": pair["tokenizer"], "assistant_tokenizer": pair["drafter_tokenizer"]}
        if not (foreign and target.config.is_encoder_decoder):  # which Transformers has not
            run = _seeded(lambda inputs: target.generate(**inputs, **theirs))
            table.append(System(target, "transformers", "assisted", run))
    for method in dict.fromkeys(["autoregressive", *methods]):
        arguments: dict[str, Any] = {"method": method, "compile": compile, **common}
        if method not in ("autoregressive", "prompt_lookup"):
            arguments |= {"assistant_model": drafter, "tokenizer": pair["tokenizer"]}
            arguments["assistant_tokenizer"] = pair["drafter_tokenizer"]
        if method != "autoregressive" and lookahead is not None:
            arguments["num_assistant_tokens"] = lookahead
        table.append(
            System(target, "specdec_fast", method, _seeded(_ours(target, arguments)), _prepared(target, arguments))
        )
    return table


def _seeded(generate: Callable[[Inputs], Tensor]) -> Callable[[Inputs, int], Tensor]:
    # Torch's generator, not the argument ``seed``: with that the lookahead would go by constant costs
    def run(inputs: Inputs, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return generate(inputs)

    return run


def _ours(target: Any, arguments: dict[str, Any]) -> Callable[[Inputs], Tensor]:
    def generate(inputs: Inputs) -> Tensor:
        everything: dict[str, Any] = {**inputs, **arguments}
        result = fast_generate(target, **everything)
        assert isinstance(result, Tensor)
        return result

    return generate


def _prepared(target: Any, arguments: dict[str, Any]) -> Callable[[Inputs], object]:
    def ready(inputs: Inputs) -> object:
        return prepare(target, batch=inputs["input_ids"].shape[0], inputs=inputs["input_ids"], **arguments)

    return ready


def measure(
    table: list[System],
    prompts: Sequence[Inputs],
    *,
    temperature: float,
    repetitions: int,
    synchronize: Callable[[], None] = lambda: None,
) -> Iterator[list[Row]]:
    """Runs everything interleaved: every system on the first prompt, then every system on the second, and so on.

    Yields after each repetition, so that progress can be shown; the last list is the result.
    """
    for system in table:  # a first call builds maps, caches and copies
        if system.ready is not None:
            system.ready(prompts[0])
        system.run(prompts[0], 0)
    for repetition in range(repetitions):
        written = [0] * len(table)
        seconds = [0.0] * len(table)
        for number, inputs in enumerate(prompts):
            for i, system in enumerate(table):
                synchronize()
                begin = time.perf_counter()
                result = system.run(inputs, 1000 * repetition + number)
                synchronize()
                seconds[i] += time.perf_counter() - begin
                front = beginning(system.target, inputs["input_ids"]).shape[1]
                written[i] += int(result.shape[0] * (result.shape[1] - front))
                if repetition == 0:
                    system.results.append(result)
                if system.system == "specdec_fast":
                    _note(system)
        for i, system in enumerate(table):
            system.rates.append(written[i] / seconds[i])
        yield _rows(table, prompts, temperature)


def _note(system: System) -> None:
    speculation = last_speculation()
    assert speculation is not None
    system.ran = speculation.method, speculation.verification
    system.passes = f"{speculation.forward}, {speculation.loop}"
    for name in ("drafted", "accepted", "committed", "row_rounds"):
        system.counts[name] = system.counts.get(name, 0) + getattr(speculation, name)


def _rows(table: list[System], prompts: Sequence[Inputs], temperature: float) -> list[Row]:
    plain = {system.system: system for system in table if system.method == "autoregressive"}
    batch = prompts[0]["input_ids"].shape[0]
    rows = []
    for system in table:
        own, counts = plain[system.system], system.counts
        same = all(map(torch.equal, system.results, own.results))
        rows.append(
            Row(
                system=system.system,
                method=system.method,
                ran=system.ran[0] if system.ran else None,
                verification=system.ran[1] if system.ran else None,
                passes=system.passes,
                temperature=temperature,
                batch=batch,
                tokens_per_second=statistics.median(system.rates),
                lowest=min(system.rates),
                highest=max(system.rates),
                ratio_to_transformers=_ratio(system.rates, plain["transformers"].rates),
                ratio_to_plain=_ratio(system.rates, own.rates),
                acceptance_rate=counts["accepted"] / counts["drafted"] if counts.get("drafted") else None,
                block_efficiency=counts["committed"] / counts["row_rounds"] if counts.get("row_rounds") else None,
                identical_to_plain=None if temperature else same,
            )
        )
    return rows


def _ratio(mine: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, other, strict=True))
