"""The small operations of a round: kernels against torch, whole rounds by kernels, what stays inside its tensors."""

import copy
from collections import Counter

import pytest
import torch
from tiny import build_model, drafters, model, noisy, prompts, taught, taught_prompts
from torch.utils._python_dispatch import TorchDispatchMode

from specdec_fast import attention, device_plan, device_round, fast_generate, fused_layers, last_speculation, round_ops
from specdec_fast.fused_layers import fuse_turns
from specdec_fast.round_ops import pass_places, pass_turns, trial, why_no_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = tuple(round_ops._REFERENCES)


@pytest.fixture
def kernels(monkeypatch):
    """The operations run as kernels, here through Triton's interpreter; yields the names of those that ran."""
    launch = pytest.importorskip("specdec_fast.triton_kernels.launch", reason="no Triton kernels here")
    ran = set()
    for name in NAMES:
        run = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda *given, name=name, run=run: (ran.add(name), run(*given))[1])
    monkeypatch.setattr(round_ops, "why_no_kernels", lambda _: None)
    return ran


def close(got, right):
    if right.dtype.is_floating_point:
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(got, right)


def test_kernels_give_what_torch_gives():
    pytest.importorskip("specdec_fast.triton_kernels.launch", reason="no Triton kernels here")
    for got, right in zip(trial(DEVICE, "triton"), trial(DEVICE, "reference"), strict=True):
        close(got, right)


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_that_is_wrong_is_not_used(monkeypatch, name):
    """On a device that would have kernels; every one of them is asked about."""
    launch = pytest.importorskip("specdec_fast.triton_kernels.launch", reason="no Triton kernels here")
    tried = why_no_kernels.__wrapped__
    monkeypatch.setattr(round_ops, "trial", lambda _, backend: trial(DEVICE, backend))
    assert tried("cuda") is None
    right = getattr(launch, name)

    def wrong(*given):
        found = right(*given)
        parts = [found] if isinstance(found, torch.Tensor) else found
        parts[0].view(-1)[-1] += 1
        return found

    monkeypatch.setattr(launch, name, wrong)
    assert tried("cuda") == "the kernels of rounds give other values than their reference"

    def fails(*given):
        raise RuntimeError("out of resource")

    monkeypatch.setattr(launch, name, fails)
    assert tried("cuda") == "the kernels of rounds fail (RuntimeError: out of resource)"


def test_other_devices_and_forced_backends_have_the_reference(monkeypatch):
    tried = why_no_kernels.__wrapped__
    assert "not for a cpu device" in tried("cpu")
    monkeypatch.setattr(round_ops.dispatch, "DEFAULT", "reference")
    assert "where a backend is forced" in tried("cuda")


def test_places_are_those_of_the_attention(kernels):
    start, hidden = (torch.tensor(values, device=DEVICE) for values in ([0, 5, 17], [0, 2, 1]))
    columns, positions, told = pass_places(start, hidden, 4, 19, 16, [0, 7])
    assert columns.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8], [17, 18, 18, 18]]
    assert positions.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [15, 15, 15, 15]]
    for one, window in zip(told, (None, 7), strict=True):
        assert torch.equal(one, attention.places(start, hidden, window))
    assert pass_places(start, hidden, 4, 19, 16, [])[2].shape == (0, 3, 1, 1, 3)
    assert pass_places(start, hidden, 4, 19, 16, [0, 7, 9])[2].shape == (3, 3, 1, 1, 3)
    assert kernels == {"pass_places"}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
def test_turns_are_those_of_the_model(kernels, architecture):
    original = build_model(architecture).to(DEVICE)
    made = attention.twin(original, attention.NAME)
    kinds = [type(module) for module in original.modules()]
    assert fuse_turns(made) == 1
    assert [type(module) for module in original.modules()] == kinds
    positions = torch.tensor([[0, 3, 9], [120, 121, 4000]], device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(2, 3, 32, device=DEVICE, dtype=dtype)
        for got, right in zip(
            made.model.rotary_emb(x, positions), original.model.rotary_emb(x, positions), strict=True
        ):
            torch.testing.assert_close(got, right, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert kernels == {"pass_turns"}


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_turns_that_are_stretched(kernels, kind):
    """Frequencies of their own, and for yarn a factor on the results."""
    more = {"factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    more |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    original = build_model("llama", rope_parameters={"rope_type": kind, **more}).to(DEVICE)
    made = attention.twin(original, attention.NAME)
    assert fuse_turns(made) == 1 and original.model.rotary_emb.rope_type == kind
    assert (original.model.rotary_emb.attention_scaling != 1) == (kind == "yarn")
    positions, x = torch.tensor([[0, 3, 99]], device=DEVICE), torch.zeros(1, 3, 32, device=DEVICE)
    for got, right in zip(made.model.rotary_emb(x, positions), original.model.rotary_emb(x, positions), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)
    assert kernels == {"pass_turns"}


def test_turns_that_hang_on_the_text_stay_as_they_are():
    original = build_model("llama")
    original.model.rotary_emb.rope_type = "dynamic"
    assert fuse_turns(attention.twin(original, attention.NAME)) == 0


def test_what_is_not_contiguous_is_read_where_it_lies(kernels):
    frequencies, positions = torch.rand(16, device=DEVICE)[::2], torch.arange(12, device=DEVICE).view(4, 3).T
    for got, right in zip(
        pass_turns(frequencies, positions, 1.5, torch.float32),
        round_ops._turns(frequencies, positions, 1.5, torch.float32),
        strict=True,
    ):
        close(got, right)
    ids = torch.arange(60, device=DEVICE).view(3, 20)[:, 2:-3]
    length, unread = (torch.tensor(values, device=DEVICE) for values in ([3, 15, 9], [0, 4, 8]))
    same = [torch.full((3,), value, device=DEVICE) for value in (9, 15, 40, 1, 2)]
    row = (ids, length, length > 9, *same, 4)
    for got, right in zip(round_ops.round_begin(*row), round_ops._begin(*row), strict=True):
        close(got, right)
    for got, right in zip(
        round_ops.draft_tail(ids, length, unread, 2), round_ops._tail(ids, length, unread, 2), strict=True
    ):
        close(got, right)
    start = torch.tensor([[3, 9], [4, 9]], device=DEVICE)[:, 0]
    for got, right in zip(
        pass_places(start, start - 1, 2, 9, 9, [0]), round_ops._places(start, start - 1, 2, 9, 9, [0]), strict=True
    ):
        close(got, right)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", ["autoregressive", "model", "tli", "projection"])
@pytest.mark.parametrize("sampled", [False, True])
def test_whole_rounds_by_kernels_give_the_same_tokens(kernels, plain_drafters, monkeypatch, method, sampled, rows):
    """Ragged batches, a stop in the middle, a draft that is cut at the end: tokens and counts of the reference."""
    settings = {"do_sample": sampled, "max_new_tokens": 13, "seed": 3} | ({"top_k": 0} if sampled else {})
    options = {"method": method}
    if method != "autoregressive":
        options = {**drafters()[method], "num_assistant_tokens": 3}
        options["assistant_model"] = copy.deepcopy(options["assistant_model"]).to(DEVICE)
    target = copy.deepcopy(taught()[0]).to(DEVICE)
    inputs = {name: value.to(DEVICE) for name, value in taught_prompts(rows, padded=True).items()}
    plain = fast_generate(target, **inputs, **settings, method="autoregressive")
    settings["eos_token_id"] = int(plain[0, -4])
    found = []
    for reason in ("torch's", None):
        monkeypatch.setattr(round_ops, "why_no_kernels", lambda _, reason=reason: reason)
        kernels.clear()
        output = fast_generate(target, **inputs, **options, **settings, compile="static")
        said = last_speculation()
        assert said.loop == "device"
        found.append((output.tolist(), said.rounds, said.drafted, said.accepted, said.committed))
    assert found[0] == found[1]
    drafting = (
        set() if method == "autoregressive" else {"draft_begin"} | ({"draft_tail"} if method == "model" else set())
    )
    assert kernels == {"pass_places", "round_begin", "round_commit"} | drafting


VIEWS = {"view", "t", "transpose", "expand", "unsqueeze", "squeeze", "slice", "select", "unbind", "split", "alias"}
VIEWS |= {"_unsafe_view", "split_with_sizes", "scalar_tensor", "detach", "_local_scalar_dense", "_reshape_alias"}


class Launches(TorchDispatchMode):
    """Counts operations that a GPU would have to launch, a kernel at least for each."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, operator, types, given=(), named=None):
        name = operator.overloadpacket.__name__
        if name not in VIEWS:
            self.count[name] += 1
        return operator(*given, **(named or {}))


@pytest.mark.parametrize("gamma", [0, 3])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_round_is_few_operations(monkeypatch, gamma, sampled):
    """Beside seven a layer: they were 288 and 103 for two layers when each sum was one of its own."""

    def fused(one, compiled):
        made = attention.twin(one, attention.NAME)
        fuse_turns(made)
        assert fused_layers.fuse_layers(made, "reference") == 2
        return made, "fused"

    def attended(query, key, value, *rest, **named):
        return torch.ops.specdec_fast.decode_attention.reference(
            query, key, value, named["start"], named["hidden"], named["window"], named["scale"], 0.0
        )

    monkeypatch.setattr(attention, "decode_attention", attended)
    monkeypatch.setattr(attention, "why_no_kernel", lambda *_: None)
    monkeypatch.setattr(device_plan, "for_passes", fused)
    found, run = [], device_round.Round.__call__

    def counted(self, state, bucket):
        if bucket != gamma:
            return run(self, state, bucket)
        with Launches() as launches:
            report = run(self, state, bucket)
        found.append(launches.count)
        return report

    monkeypatch.setattr(device_round.Round, "__call__", counted)
    options = {"assistant_model": noisy("llama"), "num_assistant_tokens": gamma} if gamma else {}
    law = {"do_sample": sampled} | ({"top_k": 0} if sampled else {})
    fast_generate(model("llama"), **prompts(1), **options, **law, max_new_tokens=12, compile="static")
    count = found[0]
    passes, drafts = 1 + gamma, gamma
    assert count["decode_attention"] == count["layer_heads"] == 2 * passes
    norms = 6 * passes  # the last norm, on a CPU; two with all its parts on a GPU
    stops = 4 * drafts  # whether a row goes on is asked where nothing is captured alone
    assert sum(count.values()) - norms - stops <= 19 * passes + 6 * drafts + 8, count


@pytest.mark.parametrize("fault", ["accepts one less", "keeps another token", "one column on", "done early"])
def test_planted_faults_of_a_commit_are_noticed(kernels, monkeypatch, fault):
    """Greedy text is not that of ``generate`` any more, or does not end where it does."""
    target, drafter = (copy.deepcopy(one).to(DEVICE) for one in (model("llama"), noisy("llama")))
    asked = {name: value.to(DEVICE) for name, value in prompts(2, padded=True).items()} | {"max_new_tokens": 12}
    expected = target.generate(**asked, do_sample=False)
    asked["eos_token_id"] = int(expected[0, -3])
    expected = target.generate(**asked, do_sample=False)
    pair = {"assistant_model": drafter, "num_assistant_tokens": 3, "compile": "static", "do_sample": False}
    assert torch.equal(fast_generate(target, **asked, **pair), expected)
    right, rounds = round_ops._REFERENCES["round_commit"], []

    def wrong(tokens, drafted, accepted, token, status, ids, length, done, most, ends):
        rounds.append(1)
        if len(rounds) > 60:
            raise RuntimeError("it does not end")
        if fault == "accepts one less":
            accepted = (accepted - 1).clamp(min=0)
        if fault == "one column on":
            tokens = tokens.roll(1, 1)
        report = right(tokens, drafted, accepted, token, status, ids, length, done, most, ends)
        if fault == "keeps another token":
            ids.scatter_add_(1, (length - 1).unsqueeze(1), torch.ones_like(ids[:, :1]))
        if fault == "done early":
            done |= report[:, 1] > 0
        return report

    launch = pytest.importorskip("specdec_fast.triton_kernels.launch")
    monkeypatch.setattr(launch, "round_commit", wrong)
    try:
        output = fast_generate(target, **asked, **pair)
    except RuntimeError as error:
        assert "does not end" in str(error)
    else:
        assert not torch.equal(output, expected)


@pytest.mark.parametrize("reason", ["torch's", None])
def test_commits_write_inside_their_tensors_alone(kernels, monkeypatch, reason):
    """Texts at the end of their columns, drafts longer than what is left: nothing around the rows changes."""
    monkeypatch.setattr(round_ops, "why_no_kernels", lambda _: reason)
    gamma, columns = 5, 9
    around = torch.full((4, columns + 4), 77, device=DEVICE)
    ids = around[1:3, 2:-2]
    ids.fill_(1)
    length, most = (torch.tensor(values, device=DEVICE) for values in ([8, 4], [9, 9]))
    done = torch.zeros(2, dtype=torch.bool, device=DEVICE)
    block = torch.arange(20, 30, device=DEVICE).view(2, gamma)
    each = torch.full((2,), 5, device=DEVICE)
    status, ends = torch.zeros(2, dtype=torch.int32, device=DEVICE), torch.full((64,), -9, device=DEVICE)
    report = round_ops.round_commit(block, each, each, each, status, ids, length, done, most, ends)
    assert ids.tolist() == [[1] * 8 + [20], [1] * 4 + [25, 26, 27, 28, 29]]
    assert report.tolist() == [[1, 5, 5, *range(20, 25), 5], [5, 5, 5, *range(25, 30), 5]]
    assert done.tolist() == [True, True] and length.tolist() == [9, 9]
    ids.fill_(77)
    assert (around == 77).all()
    if reason:
        return
    assert kernels == {"round_commit"}
    with pytest.raises(ValueError, match="must be contiguous: they are written in place"):
        round_ops.round_commit(block, each, each, each, status, ids.T.contiguous().T, length, done, most, ends)
