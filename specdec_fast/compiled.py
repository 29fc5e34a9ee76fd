"""What is kept between calls for passes of fixed shape: caches, rows, compiled passes, captured rounds.

A :class:`Pair` belongs to a target, a drafter and a shape (rows, columns), both rounded up to few sizes, so that other
prompts and batches find it again. Pairs are held weakly by their models and go with them; a target keeps a few, the
ones used last. Memory is that of the two caches, and of what a graph needs.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from specdec_fast.attention import is_twin, parts_of
from specdec_fast.costs import Costs
from specdec_fast.device_round import State
from specdec_fast.encoding import Encoded
from specdec_fast.runner import Head
from specdec_fast.static_cache import StaticCache
from specdec_fast.static_runner import Forward, static_forward
from specdec_fast.static_runners import empty_cache
from specdec_fast.static_sources import SourceShape, shape_of

__all__ = [
    "BRANCHES",
    "Captured",
    "Compilation",
    "Compiled",
    "Pair",
    "branch",
    "capture",
    "check_out",
    "first_line",
    "forget",
    "hand_back",
    "handing_back",
    "kept_bytes",
    "notice",
]

MOST_KEPT = 4  # pairs of one target
MOST_OF_SOURCES = 8  # of one whose sources have shapes as well
WARM_UPS = 3  # runs before a capture
NOTICE = 3.0  # seconds after which a first call says what it is doing


@dataclass(frozen=True)
class Compilation:
    """How passes of fixed shape run.

    Args:
        compiled: by ``torch.compile``; else as they are.
        settings: its arguments.
        captured: rounds as CUDA graphs.
        why_not: compiled or captured.
    """

    compiled: bool = False
    settings: tuple[tuple[str, Any], ...] = ()
    captured: bool = False
    why_not: str = ""

    @classmethod
    def of(cls, mode: str, model: PreTrainedModel, config: Any) -> Compilation:
        """For ``compile="static"`` or ``"inductor"``.

        Args:
            model: the target.
            config: Transformers' ``CompileConfig``, or None.
        """
        captured = model.device.type == "cuda"
        if mode != "inductor":
            return cls(captured=captured)
        quantizer = getattr(model, "hf_quantizer", None)
        if not model._can_compile_fullgraph or (quantizer is not None and not quantizer.is_compileable):
            return cls(captured=captured, why_not=f"{type(model).__name__} cannot be compiled as one graph")
        given = {} if config is None else config.to_dict()
        settings: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": given.get("backend", "inductor")}
        if given.get("options"):
            settings["options"] = given["options"]
        elif str(given.get("mode") or "").startswith("max-autotune"):
            settings["mode"] = "max-autotune-no-cudagraphs"  # rounds are captured whole, here
        return cls(True, tuple(settings.items()), captured)


class Compiled:
    """:func:`static_forward`, compiled anew for each number of lanes.

    Args:
        settings: of ``torch.compile``.
        what: it is, for the line that a first call prints.
    """

    def __init__(self, settings: dict[str, Any], what: str):
        self._settings = settings
        self._what = what
        self._made: dict[tuple[int, bool], Forward] = {}

    def __call__(
        self, model: Any, cache: StaticCache, head: Head | None, tokens: Tensor, lane: Tensor | None, *rest: int
    ) -> Tensor:
        key = (tokens.shape[1], lane is None)
        if key in self._made:
            return self._made[key](model, cache, head, tokens, lane, *rest)
        # Dynamo counts compilations by code object, and gives up on one with many: each shape has its own
        own = types.FunctionType(
            static_forward.__code__.replace(co_name=f"static_forward_{key[0]}"),
            static_forward.__globals__,
            f"static_forward_{key[0]}",
        )
        made = torch.compile(own, **self._settings)
        for tensor in cache.tensors():
            torch._dynamo.mark_static_address(tensor)
        with notice(f"compiling {self._what} for {key[0]} positions of {cache.rows} rows, {cache.capacity} columns"):
            result = made(model, cache, head, tokens, lane, *rest)
        self._made[key] = made
        return result


class Captured:
    """A pass of fixed shape as a CUDA graph, captured at its first use for each number of lanes.

    Args:
        forward: the pass.
        graphs: where they are kept, by what they depend on; an entry of None: it cannot be captured.
    """

    def __init__(self, forward: Forward, graphs: dict[Any, Any]):
        self._forward = forward
        self._graphs = graphs

    def __call__(
        self, model: Any, cache: StaticCache, head: Head | None, tokens: Tensor, lane: Tensor | None, *rest: int
    ) -> Tensor:
        if lane is not None:
            return self._forward(model, cache, head, tokens, lane, *rest)
        key = ("pass", tokens.shape[1], *rest)  # a window of a drafter's text is among the rest
        if key not in self._graphs:
            own, before = tokens.clone(), [state.clone() for state in cache.states()]
            with notice(f"capturing a pass of {tokens.shape[1]} positions"):
                made, _ = capture(lambda: self._forward(model, cache, head, own, None, *rest), cache.device)
            for state, old in zip(cache.states(), before, strict=True):
                state.copy_(old)
            self._graphs[key] = None if made is None else (*made, own)
        if self._graphs[key] is None:
            return self._forward(model, cache, head, tokens, None, *rest)
        graph, logits, own = self._graphs[key]
        own.copy_(tokens)
        graph.replay()
        return logits


def first_line(error: BaseException) -> str:
    """Of what an error says; its name where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def capture(run: Callable[[], Tensor], device: torch.device) -> tuple[tuple[Any, Tensor] | None, str]:
    """A CUDA graph of a function and the tensor it returns, or None and why not.

    The function runs a few times before, on a stream beside the current one: libraries choose their kernels and
    workspaces in their first calls.

    Args:
        run: works on ``device`` alone, which need not be the current one.
    """
    with torch.cuda.device(device):
        try:
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = run()
        except RuntimeError as error:
            torch.cuda.synchronize()
            return None, f"a round cannot be captured ({first_line(error)})"
    return (graph, result), ""


BRANCHES = hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node")
"""Whether this torch captures conditional nodes; that the CUDA release has them too (12.4) shows in a capture."""


def branch(wanted: Tensor, run: Callable[[], None]) -> None:
    """Runs a function; into a graph that is being captured it goes as a part that the device runs or skips.

    Args:
        wanted: bool without dimensions, on the device: whether to run it at each replay.
        run: writes what it gives into tensors that were there before.
    """
    if not torch.cuda.is_current_stream_capturing():
        run()
        return
    graph: Any = torch.cuda.CUDAGraph.get_currently_capturing_graph()
    graph.begin_capture_to_if_node(wanted)
    try:
        run()
    finally:
        graph.end_capture_to_conditional_node()


@contextmanager
def notice(doing: str) -> Iterator[None]:
    """Says on stderr what takes long, and when it is done; nothing of what is quick."""
    told = threading.Event()

    def tell() -> None:
        told.set()
        print(f"specdec_fast: {doing} (once) ...", file=sys.stderr, flush=True)

    timer = threading.Timer(NOTICE, tell)
    timer.daemon = True
    begin = time.perf_counter()
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if told.is_set():
            print(f"specdec_fast: done in {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)


@dataclass(eq=False)
class Pair:
    """Everything of fixed address for one target, drafter and shape.

    Args:
        key: what it is for.
        target, drafter: the caches.
        state: the rows.
        choices: of the drafter, on its device; see :class:`specdec_fast.device_round.DeviceWriter`.
        forwards: passes of target and drafter.
        parameters: fused sampling parameters ``[B]`` of target and drafter.
        graphs: captured rounds, by what they depend on.
        costs: of rounds, by the same.
    """

    key: tuple[Any, ...]
    target: StaticCache
    drafter: StaticCache | None
    state: State
    choices: dict[str, Tensor]
    forwards: tuple[Forward, Forward]
    parameters: tuple[dict[str, Tensor], dict[str, Tensor]]
    head: Head | None = None
    graphs: dict[Any, Any] = field(default_factory=dict)
    costs: dict[Any, Costs] = field(default_factory=dict)
    weights: tuple[int, ...] = ()
    parts: list[Any] = field(default_factory=list)
    drafter_model: weakref.ref[PreTrainedModel] | None = None
    busy: bool = False

    @property
    def bytes(self) -> int:
        """Memory of caches and rows."""
        return self.target.bytes + (self.drafter.bytes if self.drafter else 0) + self.state.ids.nbytes

    def serves(self, drafter: PreTrainedModel | None) -> bool:
        """Whether it was made for this drafter."""
        return drafter is None if self.drafter_model is None else self.drafter_model() is drafter

    def set_parameters(self, side: int, values: dict[str, float]) -> dict[str, Tensor]:
        """Writes a law's fused parameters; returns those of its names."""
        own = self.parameters[side]
        for name, value in values.items():
            own[name].fill_(value)
        return {name: own[name] for name in values}


def _parameters(rows: int, device: torch.device) -> dict[str, Tensor]:
    names = ("temperature", "top_k", "top_p", "min_p")
    return {
        name: torch.zeros(rows, dtype=torch.int32 if name == "top_k" else torch.float32, device=device)
        for name in names
    }


_kept: weakref.WeakKeyDictionary[PreTrainedModel, list[Pair]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()  # a model may go, and its pairs with it, while this thread looks among them


def check_out(
    model: PreTrainedModel,
    drafter: PreTrainedModel | None,
    rows: int,
    capacity: tuple[int, int],
    how: Compilation,
    *,
    head: Head | None = None,
    choices: dict[str, Tensor] | None = None,
    encoded: tuple[Encoded | None, Encoded | None] = (None, None),
) -> Pair:
    """A pair that nobody else uses, kept from an earlier call or made.

    Args:
        model, drafter: that have nothing against static caches.
        rows: of the caches.
        capacity: of the target's and of the drafter's.
        how: passes run.
        head: of the drafter.
        choices: tensors of the drafter's writer: ``index``, ``choices`` and ``picks``, those that it has, a map's.
        encoded: what the model and the drafter read beside the text.
    """
    shapes = tuple(
        shape_of(one, read) if one is not None and read is not None else None
        for one, read in zip((model, drafter), encoded, strict=True)
    )
    names = tuple(sorted((name, len(t), _digest(t)) for name, t in (choices or {}).items()))
    kind = model.device.type  # of buffers as of passes: autocast changes it from one call to the next
    within = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    # Buffers made in inference mode cannot be written to outside of it
    dtypes = (*(one.dtype for one in (model, drafter) if one is not None), within, torch.is_inference_mode_enabled())
    implementation = tuple(str(m.config._attn_implementation) for m in (model, drafter) if m is not None)
    key = (rows, capacity, how.compiled, repr(how.settings), how.captured, names, implementation, dtypes, shapes)
    both = [one for one in (model, drafter) if one is not None]
    tensors = itertools.chain.from_iterable((*one.parameters(), *one.buffers()) for one in both)
    weights = tuple(tensor.data_ptr() for tensor in tensors)
    # Hooks, modules and settings are in graphs too
    parts = [parts_of(one) for one in both if not is_twin(one)] if how.captured else []
    with _lock:
        found = _kept.setdefault(model, [])
        pair = next((one for one in found if one.key == key and not one.busy and one.serves(drafter)), None)
        if pair is not None:
            found.remove(pair)
            found.append(pair)  # used last
            pair.busy = True
    if pair is None:
        pair = _made(model, drafter, key, rows, capacity, how, choices or {}, tuple(zip(encoded, shapes, strict=True)))
        pair.busy = True
        with _lock:
            found = _kept.setdefault(model, [])
            found.append(pair)
            most = MOST_KEPT if encoded == (None, None) else MOST_OF_SOURCES
            for old in [p for p in found if not p.busy][: max(len(found) - most, 0)]:
                found.remove(old)
    if pair.weights != weights or pair.parts != parts or pair.head is not head:
        for graphs in (pair.graphs, pair.target.graphs, *([pair.drafter.graphs] if pair.drafter else [])):
            graphs.clear()  # they read the old ones
    pair.weights, pair.parts, pair.head = weights, parts, head
    return pair


_digests: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _digest(tensor: Tensor) -> int:
    """A hash of what a tensor holds, kept while it lives: a map of two vocabularies is tens of megabytes."""
    known = _digests.get(tensor)
    if known is None or known[0] != tensor._version:
        _digests[tensor] = known = tensor._version, hash(tensor.cpu().numpy().tobytes())
    return known[1]


def hand_back(pair: Pair) -> None:
    """Gives a pair back, emptied of what it held."""
    pair.target.forget()
    if pair.drafter is not None:
        pair.drafter.forget()
    pair.state.clear()
    pair.busy = False


def forget(model: PreTrainedModel, pair: Pair) -> None:
    """Keeps a target's pair no longer."""
    with _lock:
        _kept[model] = [kept for kept in _kept.get(model, []) if kept is not pair]


@contextmanager
def handing_back(pair: Pair) -> Iterator[None]:
    """Gives a pair back where what runs inside fails."""
    try:
        yield
    except BaseException:
        hand_back(pair)
        raise


def kept_bytes(model: PreTrainedModel) -> int:
    """Memory kept for a target's later calls, graphs' own not counted."""
    with _lock:
        return sum(pair.bytes for pair in _kept.get(model, []))


def _made(
    model: PreTrainedModel,
    drafter: PreTrainedModel | None,
    key: tuple[Any, ...],
    rows: int,
    capacity: tuple[int, int],
    how: Compilation,
    choices: dict[str, Tensor],
    sources: tuple[tuple[Encoded | None, SourceShape | None], ...],
) -> Pair:
    def forward(one: PreTrainedModel | None) -> Forward:
        return Compiled(dict(how.settings), f"passes of {type(one).__name__}") if how.compiled else static_forward

    device = model.device
    pair = Pair(
        key,
        empty_cache(model, rows, capacity[0], *sources[0]),
        None if drafter is None else empty_cache(drafter, rows, capacity[1], *sources[1]),
        State.empty(rows, capacity[0], device),
        {name: tensor.to(device) for name, tensor in choices.items()},
        (forward(model), forward(drafter)),
        (_parameters(rows, device), _parameters(rows, device)),
    )
    if drafter is not None:
        owner, own = weakref.ref(model), weakref.ref(pair)
        pair.drafter_model = weakref.ref(drafter, lambda _: _drop(owner, own))
    return pair


def _drop(owner: weakref.ref[PreTrainedModel], pair: weakref.ref[Pair]) -> None:
    """Forgets a pair whose drafter is gone."""
    model, gone = owner(), pair()
    if model is None or gone is None:
        return
    with _lock:
        pairs = _kept.get(model, [])
        if any(p is gone for p in pairs):
            _kept[model] = [p for p in pairs if p is not gone]
