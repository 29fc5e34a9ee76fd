"""CUDA graphs imitated on a CPU: the operations of one run, on the memory of that run, again and again.

What Python decided while they were recorded stays as it was, tensors that the function made itself are made once, and
what it returns is overwritten by each replay. So what goes wrong with a captured round or pass goes wrong here.
"""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from specdec_fast import compiled, device_session, host_passes, prompt_passes

aten = torch.ops.aten
# What needs a number of the device on the host
WAITING = {
    aten._local_scalar_dense.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
}


def _is_mask(index):
    return index is not None and index.dtype == torch.bool


class Recorder(TorchDispatchMode):
    """Takes operations down with what they were given and what they gave."""

    now = None

    def __init__(self):
        super().__init__()
        self.steps = []

    def __enter__(self):
        Recorder.now = self
        return super().__enter__()

    def __exit__(self, *raised):
        Recorder.now = None
        return super().__exit__(*raised)

    def __torch_dispatch__(self, operation, types, given=(), named=None):
        masked = operation is aten.index.Tensor and any(map(_is_mask, given[1]))
        listed = (
            operation is aten.lift_fresh.default and given[0].ndim
        )  # a number alone may be one of the host's to fill
        if operation in WAITING or masked or listed:
            raise RuntimeError(f"{operation} makes a device wait, or the host, while a graph is being captured")
        found = operation(*given, **(named or {}))
        self.steps.append((operation, given, named or {}, found))
        return found


class Graph:
    """The operations of a run.

    Attributes:
        taken: of its conditional parts at each replay, whether they ran.
    """

    def __init__(self, run):
        with Recorder() as recorder:
            self.result = run()
        self._steps = recorder.steps
        self.replays, self.taken = 0, []

    def replay(self):
        self.replays += 1
        made = {}
        self._run(self._steps, made)
        self.result.copy_(made[id(self.result)])

    def _run(self, steps, made):
        def now(value):
            return made.get(id(value), value) if isinstance(value, torch.Tensor) else value

        for operation, given, named, before in steps:
            if operation is branch:
                self.taken.append(bool(now(given)))
                if self.taken[-1]:
                    self._run(before, made)
                continue
            found = operation(*tree_map(now, given), **tree_map(now, named))
            for old, new in zip(tree_flatten(before)[0], tree_flatten(found)[0], strict=True):
                made[id(old)] = new


def branch(wanted, run):
    """A part that a graph runs or skips."""
    if Recorder.now is None:
        run()
        return
    outer, Recorder.now.steps = Recorder.now.steps, []
    run()
    inner, Recorder.now.steps = Recorder.now.steps, outer
    outer.append((branch, wanted, None, inner))


def imitate(monkeypatch):
    """Captures on a CPU what is captured on a GPU, for calls with compile="static"; returns the graphs as they come."""
    made, of = [], compiled.Compilation.of.__func__

    def capture(run, device):
        with torch.no_grad():
            for _ in range(compiled.WARM_UPS):
                run()
            try:
                made.append(Graph(run))
            except RuntimeError as error:
                return None, f"a round cannot be captured ({error})"
        return (made[-1], made[-1].result), ""

    def captured(cls, mode, model, config):
        how = of(cls, mode, model, config)
        return cls(how.compiled, how.settings, True, how.why_not)

    monkeypatch.setattr(compiled.Compilation, "of", classmethod(captured))
    monkeypatch.setattr(compiled, "_kept", weakref.WeakKeyDictionary())  # graphs of other tests are none of this one's
    for module in (compiled, device_session, host_passes, prompt_passes):
        monkeypatch.setattr(module, "capture", capture)
    monkeypatch.setattr(device_session, "branch", branch)
    monkeypatch.setattr(device_session, "BRANCHES", True)
    return made
