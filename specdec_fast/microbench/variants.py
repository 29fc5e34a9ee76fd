"""Ways to run a case: our backends, the reference, the reference compiled, other compositions, and peers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from specdec_fast import dispatch, ops, reference_ops
from specdec_fast.microbench.cases import Case, accepted, build
from specdec_fast.microbench.clock import Variant
from specdec_fast.microbench.peers import Peer

__all__ = ["COMPILED", "REFERENCE", "SAME", "SCATTER", "backends", "check", "variants"]

REFERENCE = "reference"
COMPILED = "compiled reference"
SAME = "same vocabulary"  # the dense law of the same vocabulary, by our best backend
SCATTER = "scatter, then verify"  # compact logits written into rows as long as the target's, then the same kernel
OWN = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

Inputs = dict[str, Any]


def backends(op: str, device: torch.device) -> list[str]:
    """Our fast backends that can run an op on a device, the best first."""
    return [name for name in OWN[device.type] if dispatch.why_not(op, name) is None]


def variants(case: Case, copies: Sequence[Inputs], *, peers: Sequence[Peer], compiled: bool) -> list[Variant]:
    """Everything that can run a case, the reference first.

    Args:
        case: the shape.
        copies: its inputs, several times.
        peers: other projects' kernels.
        compiled: whether the reference is also compiled, which takes seconds a shape.
    """
    function = getattr(ops, case.op)
    device = _device(copies[0])
    found = [Variant(REFERENCE, [_bound(function, inputs, REFERENCE) for inputs in copies], capturable=False)]
    if compiled:
        found.append(Variant(COMPILED, [_compiled(case, inputs) for inputs in copies], capturable=False))
    own = backends(case.op, device)
    found += [Variant(name, [_bound(function, inputs, name) for inputs in copies]) for name in own]
    if case.op == "verify" and case.law == "compact":
        best = own[0] if own else REFERENCE
        dense = build(replace(case, law="dense"), device)
        same = [_bound(ops.verify, _copied(dense), best) for _ in copies]
        found += [Variant(SAME, same), Variant(SCATTER, [_scattered(inputs, best) for inputs in copies])]
    for peer in peers:
        if peer.takes(case):
            found.append(Variant(peer.name, [peer.prepare(case, inputs) for inputs in copies], read=peer.read))
    return found


def check(case: Case, found: Sequence[Variant], inputs: Inputs) -> None:
    """Holds every variant to the reference on the very inputs that are timed.

    Ours must return the reference's tokens; a peer draws numbers of its own and must accept what the inputs are built
    to have accepted, and go on with a token that can be drawn there.

    Raises:
        RuntimeError: one of them does not.
    """
    expected: Any = found[0].calls[0]()
    pattern = torch.tensor(accepted(case)) if case.op == "verify" else None
    if pattern is not None:
        _same(REFERENCE, "accepts what the inputs are built for", expected.accepted.cpu(), pattern)
    for variant in found[1:]:
        result: Any = variant.calls[0]()
        if variant.name in (COMPILED, SAME):  # same numbers by construction; another law
            continue
        if isinstance(expected, Tensor):
            close = torch.allclose(result, expected, rtol=1e-9, atol=1e-12)
            if not close:
                raise RuntimeError(f"{variant.name} differs from the reference at {case}")
        elif case.op == "sample":
            _same(variant.name, "draws the reference's token", result.token, expected.token)
        elif variant.name == SCATTER or variant.name in dispatch.BACKENDS:
            for name in ("accepted", "token"):
                _same(variant.name, f"returns the reference's {name}", getattr(result, name), getattr(expected, name))
        else:
            assert pattern is not None and variant.read is not None
            kept, token = variant.read(result)
            _same(variant.name, "accepts what the inputs are built for", kept.cpu(), pattern)
            _possible(variant.name, inputs, pattern, token.cpu())


def _same(name: str, what: str, result: Tensor, expected: Tensor) -> None:
    if not torch.equal(result.long(), expected.long()):
        raise RuntimeError(f"red: not true that {name} {what}: {result.tolist()}, not {expected.tolist()}")


def _possible(name: str, inputs: Inputs, kept: Tensor, token: Tensor) -> None:
    logits = inputs["logits"]
    for row, (place, drawn) in enumerate(zip(kept.tolist(), token.tolist(), strict=True)):
        if not 0 <= drawn < logits.shape[-1] or float(logits[row, place, drawn]) == -torch.inf:
            raise RuntimeError(f"red: {name} draws {drawn} in row {row}, which has no mass there")


def _device(inputs: Inputs) -> torch.device:
    return next(value.device for value in inputs.values() if isinstance(value, Tensor))


def _copied(inputs: Inputs) -> Inputs:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _bound(function: Callable[..., Any], inputs: Inputs, backend: str) -> Callable[[], Any]:
    return lambda: function(**inputs, backend=backend)


def _compiled(case: Case, inputs: Inputs) -> Callable[[], Any]:
    """The reference under ``torch.compile``; where it waits for the host the graph breaks."""
    function = _compile(case.op)
    law = [_filter(inputs, name) for name in ("top_k", "top_p")]
    logits = inputs.get("logits")
    if case.op == "verify":
        names = ("draft_logits", *(None,) * 4, "index", "drawn", "draft_logsumexp", None, None, "seed", "start")
        rest = [None if name is None else inputs.get(name) for name in names]
        rule = ("match", "token", "block").index(str(case.rule))
        arguments = [logits, None, *law, None, inputs["tokens"], inputs["count"], None, *rest, 0, rule, False]
    elif case.op == "sample":
        arguments = [logits, None, *law, None, inputs["seed"], inputs["position"], None, 3]
    elif case.op == "softmax":
        arguments = [logits, None, *law, None]
    elif case.op == "project":
        arguments = [inputs["q"], inputs["row_start"], inputs["column"]]
    else:
        arguments = [inputs["q"], inputs["order"], inputs["low"], inputs["high"]]
    return lambda: function(*arguments)


def _filter(inputs: Inputs, name: str) -> Tensor | None:
    if name not in inputs:
        return None
    logits = inputs["logits"]
    dtype = torch.int32 if name == "top_k" else torch.float32
    return torch.full(logits.shape[:1], inputs[name], dtype=dtype, device=logits.device)


_compiled_ops: dict[str, Callable[..., Any]] = {}


def _compile(op: str) -> Callable[..., Any]:
    if op not in _compiled_ops:
        torch._dynamo.config.recompile_limit = 256
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # the breaks are known
        _compiled_ops[op] = torch.compile(getattr(reference_ops, op))
    return _compiled_ops[op]


def _scattered(inputs: Inputs, backend: str) -> Callable[[], Any]:
    dense = {name: value for name, value in inputs.items() if name not in ("index", "drawn")}
    index, width = inputs["index"].long(), inputs["logits"].shape[-1]
    short = dense.pop("draft_logits")

    def run() -> Any:
        rows = short.new_full((*short.shape[:2], width), -torch.inf)
        rows.index_copy_(2, index, short)
        return ops.verify(**dense, draft_logits=rows, drawn=inputs["tokens"], backend=backend)

    return run
