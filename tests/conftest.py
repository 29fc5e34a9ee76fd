"""What every test runs under: one thread, no network, no progress bars."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels on CPU tensors; read when Triton is first imported

import transformers

torch.set_num_threads(1)  # tiny models: more threads only wait for each other
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _constant_costs():
    """Nothing is measured: drafting hangs on no clock, and no test on what earlier ones have shown of a pair."""
    from specdec_fast import costs, warmup

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warmup, "observed", lambda *_: costs.Observed())
        patch.setattr(warmup, "WORTH_IT", float("inf"))
        yield


@pytest.fixture
def plain_drafters(monkeypatch):
    """Drafters by their own forward: in 8 bits they draw other tokens, and sampled output hangs on those."""
    from specdec_fast.drafters import model

    monkeypatch.setattr(model, "lean_model", lambda *_, **__: None)


@pytest.fixture
def climbed(monkeypatch):
    """Trees that a target judges, and what was said of them."""
    from specdec_fast import trees

    climb, found = trees.climb, []

    def counted(lean, first, tree, *arguments):
        found.append((tree, climb(lean, first, tree, *arguments)))
        return found[-1][1]

    monkeypatch.setattr(trees, "climb", counted)
    return found
