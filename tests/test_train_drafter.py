"""How the default drafter is made: gradients are those of their formulas, samples are the target's own."""

import itertools
import pathlib
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))
from drafter_sampler import choose, sample_stream
from train_drafter import SparseLoss
from tune_drafter import Places, WholeLoss, differences, mending_of, slopes

from specdec_fast.lean import lean_model
from specdec_fast.memory import mended


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_sparse_loss_has_the_gradient_of_its_formula(share):
    torch.manual_seed(0)
    hidden, weight = torch.randn(70, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    ids, weights = torch.randint(11, (70, 4)), torch.rand(70, 4)  # a law may name a token twice
    weights /= weights.sum(-1, keepdim=True)
    found = torch.autograd.grad(SparseLoss.apply(hidden, weight, ids, weights, share), [hidden, weight])
    log_q = (hidden @ weight.T).log_softmax(-1)
    law = torch.zeros_like(log_q).scatter_add(1, ids, weights)
    cross_entropy, acceptance = -(law * log_q).sum(), torch.minimum(log_q.exp(), law).sum()
    expected = torch.autograd.grad((1 - share) * cross_entropy - share * acceptance, [hidden, weight])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.7])
def test_the_loss_of_whole_laws_has_the_gradient_of_its_formula(share):
    torch.manual_seed(0)
    lengths, use = (50, 0, 40, 3), [True, True, False, True]
    hidden, weight = torch.randn(sum(lengths), 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    mending = (0.2 * torch.rand(4, 50, 50)).tril(-1).requires_grad_()
    every = torch.randn(20, 6)  # the target's rows, of which the drafter has the first 11
    texts, laws = [], []
    for n in lengths:
        states = torch.randn(n, 6)
        law = (states @ every.T).softmax(-1)
        entry = torch.where(torch.rand(n) < 0.8, law[:, :11].argmax(-1), -1)
        probability = torch.where(entry >= 0, law.gather(1, entry.clamp(min=0)[:, None])[:, 0], law[:, :11].sum(-1))
        texts.append(Places([], torch.arange(n), states, entry, probability))
        laws.append(law[:, :11])
    loss, sums = WholeLoss.apply(
        hidden, weight, mending, texts, use, every[:11].contiguous(), share, (differences, slopes)
    )  # fmt: skip
    found = torch.autograd.grad(loss, [hidden, weight, mending])
    logits = list((hidden @ weight.T).split(lengths))
    for b, (law, n) in enumerate(zip(laws, lengths, strict=True)):
        if use[b]:
            apart = law.log() - logits[b].log_softmax(-1)
            logits[b] = logits[b] + mending[b, :n, :n] @ apart.detach()
    log_q, law = torch.cat(logits).log_softmax(-1), torch.cat(laws)
    cross_entropy, acceptance = -(law * log_q).sum(), torch.minimum(log_q.exp(), law).sum()
    expected = torch.autograd.grad((1 - share) * cross_entropy - share * acceptance, [hidden, weight, mending])
    torch.testing.assert_close(sums, torch.stack([cross_entropy, acceptance]).detach(), rtol=1e-2, atol=1e-2)
    for ours, exact in zip(found, expected, strict=True):  # differences and slopes are rounded to bfloat16
        assert (ours - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("late", [0, 2])
def test_a_drafter_is_tuned_by_what_its_memory_does(late):
    torch.manual_seed(0)
    hidden, apart = torch.randn(2, 90, 3), torch.randn(90, 5)
    positions = torch.arange(90).expand(2, -1) + torch.arange(90) // 7  # some tokens are written in several pieces
    positions = torch.where((torch.arange(90) < 80) | torch.tensor([[True], [False]]), positions, -1)
    mending = mending_of(hidden, positions, torch.full((2, 90), late))
    assert not mending[1, 80:].any()
    for n in (0, 1, 5, 75, 89):
        before = slice(0, max(n - late, 0))
        at = positions[0]
        expected = mended(
            torch.zeros(5), hidden[0, n], int(at[n]), apart[before], hidden[0, before], at[before].tolist()
        )
        torch.testing.assert_close(mending[0, n] @ apart, expected, rtol=1e-4, atol=1e-5)


def test_samples_hold_the_targets_own_laws():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    if lean_model(model, rounded=False) is None:
        pytest.skip("needs the compiled CPU operations: without a C++ compiler none were built")
    asked = [(list(range(3, 4 + n)), t) for n in (0, 9, 23, 2, 14, 70) for t in (0.0, 0.7)]
    samples = sample_stream(
        model, itertools.cycle(asked), stop_id=5, batch=6, refill=3, ahead=5, max_new_tokens=12, top_k=4
    )
    for item in itertools.islice(samples, 20):
        start, ids = item.prompt_length, torch.tensor(item.ids.astype(int))
        assert ids[:start].tolist() in [text for text, _ in asked]
        with torch.no_grad():
            law = model(ids[None]).logits[0, start - 1 : -1].softmax(-1)
        kept = law.gather(1, torch.tensor(item.top_ids.astype(int)))
        torch.testing.assert_close(kept, torch.tensor(item.top_probs).float(), rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(kept[:, 0], law.amax(-1), rtol=1e-4, atol=1e-4)
        if not item.temperature:
            assert ids[start:].tolist() == item.top_ids[:, 0].tolist()


def test_drawn_tokens_follow_the_law_at_their_temperature():
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(1)).expand(40000, 20)
    temperature = torch.tensor([1.0, 0.5]).repeat(20000)
    tokens, _, _ = choose(logits, temperature, 4, torch.Generator().manual_seed(2))
    for t in (1.0, 0.5):
        seen = torch.bincount(tokens[temperature == t], minlength=20) / 20000
        assert (seen - (logits[0] / t).softmax(-1)).abs().sum() / 2 < 0.02
