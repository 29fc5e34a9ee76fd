"""Which form of a model runs passes of fixed shape: its attention, and layers as they are or as few operations.

Fused layers (:mod:`specdec_fast.fused_layers`) save launches and may still lose: what a product costs hangs on the GPU,
the shapes and the libraries there. So both forms are tried, on the model itself, before the first call: the one must
give the other's logits, and is taken if it is faster.
"""

from __future__ import annotations

import statistics
import threading
import time
import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec_fast import attention, dispatch, round_ops
from specdec_fast.cache import ragged_layers
from specdec_fast.compiled import capture, first_line, notice
from specdec_fast.encoding import reads_encoder
from specdec_fast.fused_layers import fused_count, why_no_kernels
from specdec_fast.static_cache import capacity_for
from specdec_fast.static_runner import StaticRunner, empty_cache
from specdec_fast.trial import distance, trial_ids

__all__ = ["for_passes"]

CONTEXT = 64  # tokens in front of a pass that is timed
LANES = (1, 5)  # of a draft step or plain decoding, and of a scoring pass
TIMES = 7  # that each is timed
REPLAYS = 8  # behind each other, so that what launching a graph takes is hidden
WORTH = 0.97  # of the time of plain layers, at which fused ones are taken

_found: weakref.WeakKeyDictionary[PreTrainedModel, tuple[bool, str]] = weakref.WeakKeyDictionary()
_same: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()
_looking = threading.Lock()


def for_passes(model: PreTrainedModel, compiled: bool = False) -> tuple[PreTrainedModel, str | None]:
    """The model to run passes of fixed shape with, and what there is to say of it.

    Args:
        compiled: whether ``torch.compile`` will have the passes; layers are fused then only where that was asked for,
            since it joins small operations itself.

    Returns:
        the model or a :func:`~specdec_fast.attention.twin` of it, which attention takes the place of which, and how its
        layers run where that was a choice.
    """
    if reads_encoder(model) or ragged_layers(model.config) is None:
        return model, None  # such a model has a twin of its own there (:mod:`specdec_fast.static_sources`)
    if model.device.type == "cuda":
        round_ops.why_no_kernels("cuda")  # tried here: a round may be captured, or watched for waits
    made, switched = attention.for_static_cache(model)
    if made is not model and model.device.type == "cuda" and not _alike(model, made):
        return model, "the model's own attention: a twin gives other logits"
    asked = dispatch.layers()
    if made is model or not _can_fuse(made) or asked == "plain" or (asked == "auto" and compiled):
        return made, switched
    if asked == "fused":
        reason = why_no_kernels(model.device.type)
        fuse, said = reason is None, "fused layers" if reason is None else f"the model's own layers: {reason}"
        if reason:
            warnings.warn(f"layers run as they are, which only costs speed: {reason}", stacklevel=2)
    else:
        with _looking:
            if made not in _found:
                with notice(f"choosing how layers of {type(model).__name__} run"):
                    _found[made] = _compared(model, made)
            fuse, said = _found[made]
    return attention.twin(model, attention.NAME, fused=True) if fuse else made, f"{switched}; {said}"


@torch.no_grad()
def _alike(model: PreTrainedModel, made: PreTrainedModel) -> bool:
    """Whether a twin, whose norms and rotary embeddings are ours, gives the model's logits. Tried once."""
    with _looking:
        if made not in _same:
            try:
                ids = trial_ids(model)
                plain, got = (one(input_ids=ids, use_cache=False).logits.flatten(0, 1) for one in (model, made))
                _same[made] = distance(plain, got) <= 1
            except Exception:  # what a forward of its own kind can throw: the model is tried as it is, further on
                _same[made] = False
        return _same[made]


def _can_fuse(made: PreTrainedModel) -> bool:
    """Whether fused layers may be asked about: ours is the attention, and a norm's square needs bfloat16's range."""
    ours = made.config._attn_implementation == attention.NAME
    return ours and made.device.type == "cuda" and made.dtype == torch.bfloat16


@torch.no_grad()
def _compared(model: PreTrainedModel, plain: PreTrainedModel) -> tuple[bool, str]:
    """Whether fused layers are right and faster, and what there is to say."""
    own = "the model's own layers"
    if reason := why_no_kernels(model.device.type):
        return False, f"{own}: {reason}"
    try:
        fused = attention.twin(model, attention.NAME, fused=True)
        if not fused_count(fused):
            return False, f"{own}: none of them can be fused"
        passes = [[_pass(one, lanes) for one in (plain, fused)] for lanes in LANES]
        for before, after in passes:
            if not distance(before()[0], after()[0]) <= 1:
                return False, f"{own}: fused ones give other logits"
        clocks = [[timer(run, model.device) for run in both] for both in passes]
        seconds = [[[clock() for clock in both] for both in clocks] for _ in range(TIMES)]
    except Exception as error:  # kernels that do not compile for these shapes, no memory, a forward of its own kind
        return False, f"{own}: fused ones fail ({first_line(error)})"
    share = statistics.median(sum(both[1] for both in one) / sum(both[0] for both in one) for one in seconds)
    if share > WORTH:
        return False, f"{own}: fused ones take {share:.2f} of their time"
    return True, f"fused layers: they take {share:.2f} of the time of its own"


def _pass(model: PreTrainedModel, lanes: int) -> Callable[[], Tensor]:
    """A pass of one row behind a text, which can be run again and again."""
    text = trial_ids(model).flatten().repeat(-(-CONTEXT // 14))[:CONTEXT].unsqueeze(0)
    runner = StaticRunner(model, empty_cache(model, 1, capacity_for(CONTEXT + lanes)), 1)
    runner.feed([0], text, [CONTEXT], [1])
    start = torch.full((1,), CONTEXT, device=model.device)
    return lambda: runner.score(text[:, :lanes], start)


def timer(run: Callable[[], Tensor], device: torch.device) -> Callable[[], float]:
    """What gives the seconds of a run each time it is called; on a GPU those of a CUDA graph of it.

    Raises:
        RuntimeError: it cannot be captured.
    """
    if device.type != "cuda":

        def clock() -> float:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin

        return clock
    made, reason = capture(run, device)
    if made is None:
        raise RuntimeError(reason)
    graph = made[0]

    def replayed() -> float:
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1000 / REPLAYS

    replayed()
    return replayed
