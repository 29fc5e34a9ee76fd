"""Tune a drafter to the target's whole laws, and to the memory that mends it when it drafts (docs/memory.md).

    python tune_drafter.py states TARGET STATES SAMPLES
    python tune_drafter.py tune   TARGET DRAFTER SAMPLES STATES --init WEIGHTS...

`train_drafter.py` learns from the target's most probable next tokens. At temperature 1 a seventh of what the target
says lies behind them, and a drafter that never saw it gives the rest of its law to other tokens. `states` keeps the
target's final hidden states for samples made before, of which its laws are one product away. `tune` mends the
drafter's laws as a memory would, from the places of the same text before, and learns through it: hidden states learn
to be alike where the drafter's errors are. A share of the texts goes without, as greedy calls do.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from drafter_data import Translation, alike
from torch import Tensor
from torch.nn.functional import normalize, pad
from train_drafter import SHARD, learning_rate
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from specdec_fast.memory import DOUBT, FADING, MOST, RECENT, SHARPNESS, SLOTS

ROWS = 64  # places whose laws are looked at together

# --- the target's hidden states ------------------------------------------------------------------


@torch.inference_mode()
def states(args: argparse.Namespace) -> None:
    """Write the target's final hidden states beside shards of samples, bfloat16 `[tokens, H]` each."""
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.bfloat16).eval().model
    shards = sorted(args.samples.glob("*.npz"))
    random.Random(args.seed).shuffle(shards)
    args.out.mkdir(parents=True, exist_ok=True)
    start, total = time.time(), 0
    for path in shards:
        out = args.out / f"{path.stem}.npy"
        if out.exists():
            continue
        with np.load(path) as shard:
            lengths, ids = shard["length"], torch.from_numpy(shard["ids"].astype(np.int64))
        texts = ids.split(lengths.tolist())
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        group: list[int] = []
        for i in [*np.argsort(lengths, kind="stable"), None]:  # texts of like length together
            if group and (i is None or (len(group) + 1) * len(texts[i]) > args.batch):
                batch = torch.nn.utils.rnn.pad_sequence([texts[g] for g in group], batch_first=True)
                hidden = model(batch, use_cache=False).last_hidden_state
                for g, rows in zip(group, hidden, strict=True):
                    found[g] = rows[: len(texts[g])]
                group = []
            group += [] if i is None else [int(i)]
        with out.with_suffix(".part").open("wb") as file:
            np.save(file, torch.cat(found).view(torch.int16).numpy())
        out.with_suffix(".part").rename(out)
        total += len(ids)
        print(f"{path.stem}: {total} tokens, {total / (time.time() - start):.0f} tokens/s", flush=True)
        if time.time() - start > 60 * args.minutes:
            break


# --- data ----------------------------------------------------------------------------------------


@dataclass
class Item:
    """A text `[N]`, and behind its prompt the target's states, most probable tokens and their probabilities."""

    ids: np.ndarray
    prompt_length: int
    states: np.ndarray  # [N - prompt_length, H], as bits
    top_ids: np.ndarray  # [N - prompt_length, K]
    top_probs: np.ndarray


def load(samples: Path, folder: Path, known: set[Path]) -> Iterator[Item]:
    """The items of all shards that have their states, less those of `known` ones; what is read becomes known."""
    for path in sorted(set(samples.glob("*.npz")) - known):
        if not (folder / f"{path.stem}.npy").exists():
            continue
        known.add(path)
        kept = np.load(folder / f"{path.stem}.npy", mmap_mode="r")
        with np.load(path) as shard:
            data = {name: shard[name] for name in shard.files}
        at = top = 0
        for n, m in zip(data["length"].tolist(), data["prompt_length"].tolist(), strict=True):
            rows = slice(top, top + n - m)
            own = kept[at + m - 1 : at + n - 1]
            yield Item(data["ids"][at : at + n], m, own, data["top_ids"][rows], data["top_probs"][rows])
            at, top = at + n, top + n - m


@dataclass
class Places:
    """A text in the drafter's tokens, and the places `[T]` at which it drafts a token of the target's."""

    ids: list[int]
    positions: Tensor  # [T] of the drafter's tokens
    states: Tensor  # [T, H] the target's
    entry: Tensor  # [T] of the common tokens, one whose probability is known; -1: none is
    probability: Tensor  # [T] its own, or what all of them have


class Common:
    """The tokens that target and drafter share, and the target's rows for them."""

    def __init__(self, target: Path, drafter: PreTrainedTokenizerFast):
        self.translation = Translation(target, drafter)
        shared = np.flatnonzero(self.translation.single)
        table = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).get_output_embeddings().weight
        self.head = table.detach()[torch.from_numpy(shared)].contiguous()
        self.columns = torch.from_numpy(self.translation.first[shared])
        self.entry_of = np.full(len(self.translation.single), -1)
        self.entry_of[shared] = np.arange(len(shared))

    def __call__(self, item: Item) -> Places:
        pieces = [self.translation.pieces[t] for t in item.ids]
        ends = np.cumsum([len(p) for p in pieces]) - 1
        entries = self.entry_of[item.top_ids]
        first, rows = (entries >= 0).argmax(1), np.arange(len(entries))
        probs = item.top_probs.astype(np.float32)
        entry = entries[rows, first]  # -1 where none of them is common
        rest = np.maximum(1 - probs.sum(1), 1e-3)
        return Places(
            [p for ps in pieces for p in ps],
            torch.from_numpy(ends[item.prompt_length - 1 : -1]),
            torch.from_numpy(np.array(item.states)).view(torch.bfloat16),
            torch.from_numpy(entry),
            torch.from_numpy(np.where(entry >= 0, probs[rows, first], rest)),
        )


# --- the loss ------------------------------------------------------------------------------------


def differences(target: Tensor, drafter: Tensor) -> tuple[Tensor, Tensor]:
    """The target's log-probabilities among the common tokens, and what they are less the drafter's."""
    log_p = target.float().log_softmax(-1)
    return log_p.bfloat16(), (log_p - drafter.float().log_softmax(-1)).bfloat16()


def slopes(
    logits: Tensor, mending: Tensor, log_p: Tensor, entry: Tensor, probability: Tensor, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient `[N, V]` by the mended logits, cross entropy and acceptance `[N]`."""
    log_q, p = (logits.float() + mending.float()).log_softmax(-1), log_p.float().exp()
    p = p / p.sum(-1, keepdim=True)
    told = p.gather(1, entry.clamp(min=0)[:, None]).clamp(min=1e-4)
    mass = torch.where(entry[:, None] >= 0, probability[:, None] / told, probability[:, None]).clamp(0, 1)
    p = p * mass  # of all the target's tokens
    q = log_q.exp()
    # Acceptance, the sum of min(p, q), grows with q where q < p alone: its gradient is q·(below − Q), Q being what q
    # has there.
    below = torch.where(q < p, q, 0.0) * share
    slope = q * (mass * (1 - share) + below.sum(-1, keepdim=True)) - below - p * (1 - share)
    return slope.bfloat16(), -(p * log_q).sum(-1), torch.minimum(p, q).sum(-1)


class WholeLoss(torch.autograd.Function):
    """(1 − s)·cross entropy + s·total variation of mended laws, summed over the places of B texts.

    Hidden states `[N, D]` of all places and weights `[V, D]` of the common tokens give the drafter's logits; `mending`
    `[B, T, T]` says by how much of each place's difference each place is mended (the differences are taken as given).
    `head` `[V, H]` makes the target's logits of its states. `steps` are `differences` and `slopes`, compiled or not.
    Returns a scalar to go backward from, and the sums of cross entropy and acceptance.
    """

    @staticmethod
    def forward(ctx, hidden, weight, mending, texts: list[Places], mended: list[bool], head, share: float, steps):
        lengths = [len(t.positions) for t in texts]
        n = sum(lengths)
        rest = -n % ROWS  # one shape is compiled
        hidden, told, entry, probability = (
            pad(torch.cat(parts), [0] * (2 * parts[0].ndim - 1) + [rest])
            for parts in (
                [hidden], [t.states for t in texts], [t.entry for t in texts], [t.probability for t in texts],
            )
        )  # fmt: skip
        log_p, apart = (torch.empty(len(hidden), len(weight), dtype=hidden.dtype) for _ in range(2))
        for i in range(0, len(hidden), ROWS):
            at = slice(i, i + ROWS)
            log_p[at], apart[at] = steps[0](told[at] @ head.T, hidden[at] @ weight.T)
        sums, by_mending, slope = torch.zeros(2), torch.zeros_like(mending), log_p  # it takes the laws' place
        for i in range(0, len(hidden), ROWS):
            at = slice(i, i + ROWS)
            extra, spans, begin = torch.zeros(ROWS, len(weight), dtype=hidden.dtype), [], 0
            for b, length in enumerate(lengths):
                low, high = max(i, begin), min(i + ROWS, begin + length)
                if low < high and mended[b]:
                    own = mending[b, low - begin : high - begin, : high - begin].to(hidden.dtype)
                    extra[low - i : high - i] = own @ apart[begin:high]
                    spans.append((b, low, high, begin))
                begin += length
            slope[at], *figures = steps[1](
                hidden[at] @ weight.T, extra, log_p[at], entry[at], probability[at], share
            )  # fmt: skip
            sums += torch.stack([f[: n - i].sum() for f in figures])
            slope[n:] = 0
            for b, low, high, begin in spans:
                grad = slope[low:high] @ apart[begin:high].T
                by_mending[b, low - begin : high - begin, : high - begin] = grad.float()
        ctx.save_for_backward((slope @ weight)[:n], slope.T @ hidden, by_mending)
        ctx.mark_non_differentiable(sums)
        return torch.zeros(()), sums

    @staticmethod
    def backward(ctx, scale: Tensor, _):
        hidden, weight, mending = ctx.saved_tensors
        return hidden * scale, weight * scale, mending * scale, None, None, None, None, None


def mending_of(hidden: Tensor, positions: Tensor, late: Tensor) -> Tensor:
    """By how much of each place's difference a place is mended, as `specdec_fast.memory.mended` does it.

    Args:
        hidden: `[B, T, D]` the drafter's hidden states.
        positions: `[B, T]` of them; -1: no place.
        late: `[B, T]` how many of the places before the target has not told of yet.

    Returns:
        `[B, T, T]` float32.
    """
    direction = normalize(hidden.float(), dim=-1)
    order = torch.arange(positions.shape[1])
    behind = order[:, None] - order
    there = positions >= 0
    known = (behind > late[..., None]) & (behind <= SLOTS + late[..., None])
    known = known & there[:, None, :] & there[:, :, None]
    apart = (positions[:, :, None] - positions[:, None, :] - 1).clamp(min=0)
    alike = (SHARPNESS * (direction @ direction.transpose(1, 2) - 1)).exp()
    weight = torch.where(known, alike + RECENT * (-apart / FADING).exp(), 0.0)
    heaviest, which = weight.topk(min(MOST, weight.shape[-1]), -1)
    parts = heaviest / (DOUBT + heaviest.sum(-1, keepdim=True))
    return torch.zeros_like(weight).scatter(2, which, parts)


# --- tuning --------------------------------------------------------------------------------------


class Tuning:
    """A drafter's model at work on texts."""

    def __init__(self, model: LlamaForCausalLM, common: Common, steps: tuple[Callable, Callable]):
        self.model, self.common, self.steps = model, common, steps

    def loss(self, items: list[Item], late: Tensor, without: float, share: float) -> tuple[Tensor, Tensor, int]:
        """Of some texts: what to go backward from, sums of cross entropy and acceptance, and the places.

        Args:
            late: probabilities that 0, 1, 2, ... of the places before are not told of yet.
            without: a memory, share of the texts.
            share: of the total variation.
        """
        texts = [self.common(item) for item in items]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(t.ids) for t in texts], batch_first=True)
        positions = torch.nn.utils.rnn.pad_sequence([t.positions for t in texts], batch_first=True, padding_value=-1)
        hidden = self.model.model(ids, use_cache=False).last_hidden_state
        hidden = hidden.gather(1, positions.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1]))
        mending = mending_of(hidden, positions, late.multinomial(positions.numel(), True).view_as(positions))
        mended = (torch.rand(len(texts)) >= without).tolist()
        weight = self.model.lm_head.weight[self.common.columns]
        chosen = hidden[positions >= 0]
        loss, sums = WholeLoss.apply(
            chosen, weight, mending, texts, mended, self.common.head, share, self.steps
        )  # fmt: skip
        return loss, sums, len(chosen)

    @torch.no_grad()
    def check(self, items: list[Item]) -> str:
        """Expected acceptance at T = 1, without a memory and with one to which all or all but one place were told."""
        shown = []
        for name, late, without in (("none", 0, 1.0), ("memory", 0, 0.0), ("a place late", 1, 0.0)):
            accepted, count = 0.0, 0
            for i in range(0, len(items), 8):
                _, sums, n = self.loss(items[i : i + 8], torch.eye(2)[late], without, 1.0)
                accepted, count = accepted + float(sums[1]), count + n
            shown.append(f"{name} {accepted / max(count, 1):.4f}")
        return ", ".join(shown)


def groups(items: list[Item], size: int, rng: random.Random) -> Iterator[list[Item]]:
    """Items of like length together, about `size` tokens of the target's, for ever."""
    while True:
        yield from alike(rng.sample(items, len(items)), size, rng)


def tune(args: argparse.Namespace) -> None:
    """Tune the mean of some weights.

    What is kept is the mean of the steps, the last ones most, and a share of what they began with: without a memory
    tuned weights do worse than these, and between the two they do well both ways (Wortsman et al., "Robust fine-tuning
    of zero-shot models", arXiv 2109.01903).
    """
    common = Common(args.target, PreTrainedTokenizerFast.from_pretrained(args.out))
    known: set[Path] = set()
    items: list[Item] = []
    held_out: list[Item] = []

    def more() -> None:
        for i, item in enumerate(load(args.samples, args.states, known)):
            (items if i % 50 else held_out).append(item)

    more()
    print(f"{len(items)} texts, {len(held_out)} held out", flush=True)
    models = [LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in args.init]
    parameters = [dict(m.named_parameters()) for m in models]
    # The optimizer's weights stay in float32; the model computes in bfloat16.
    master = {n: torch.stack([p[n].detach() for p in parameters]).mean(0) for n in parameters[0]}
    first, mean = ({n: p.clone() for n, p in master.items()} for _ in range(2))
    model = models[0].to(torch.bfloat16)

    @torch.no_grad()
    def read(weights: dict[str, Tensor]) -> None:
        for name, p in model.named_parameters():
            p.copy_(weights[name])

    read(master)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in master.values() if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in master.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    work = Tuning(model, common, (torch.compile(differences, dynamic=False), torch.compile(slopes, dynamic=False)))
    checks = held_out[:48]
    print(f"held-out texts at first: {work.check(checks)}", flush=True)
    source, late = groups(items, args.batch, rng), torch.tensor([0.5, 0.3, 0.2])
    start, next_log, step = time.time(), 1.0, 0
    sums, places = torch.zeros(2), 0
    while (progress := (time.time() - start) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress, args)
        loss, figures, n = work.loss(next(source), late, args.without, args.variation)
        (loss / n).backward()
        for name, p in model.named_parameters():
            master[name].grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(list(master.values()), 1.0)
        optimizer.step()
        read(master)
        step, sums, places = step + 1, sums + figures, places + n
        weight = min(0.998, step / (step + 10))
        for name, p in mean.items():
            p.lerp_(master[name], 1 - weight)
        if time.time() - start > 60 * next_log:
            entropy, accepted = (sums / places).tolist()
            read(mean)
            print(
                f"step {step}, {time.time() - start:.0f} s, {len(items)} texts: cross entropy {entropy:.4f}, "
                f"acceptance {accepted:.4f}; held-out texts: {work.check(checks)}", flush=True,
            )  # fmt: skip
            read(master)
            before, next_log, sums, places = len(items), next_log + args.log, torch.zeros(2), 0
            more()  # states may still be arriving
            if len(items) > 1.05 * before:
                source = groups(items, args.batch, rng)
    for name, p in mean.items():
        p.lerp_(first[name], args.begin)
    read(mean)
    print(f"held-out texts at last: {work.check(checks)}", flush=True)
    model.save_pretrained(args.out, max_shard_size=SHARD)
    if args.keep:
        model.float().load_state_dict(mean | {"lm_head.weight": mean["model.embed_tokens.weight"]})
        model.save_pretrained(args.keep)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run in (states, tune):
        p = commands.add_parser(run.__name__, help=run.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.set_defaults(run=run)
        p.add_argument("target", type=Path, help="the target's folder")
        p.add_argument("out", type=Path, help="the folder to write (tune: the drafter's, with its tokenizer)")
        p.add_argument("samples", type=Path, help="the target's answers, by train_drafter.py sample")
        if run is tune:
            p.add_argument("states", type=Path, help="the target's states for them")
            p.add_argument("--init", type=Path, nargs="+", required=True, help="weights, whose mean it begins with")
            p.add_argument("--begin", type=float, default=0.5, help="share of the first weights in what is kept")
            p.add_argument("--keep", type=Path, help="folder for the float32 weights")
            p.add_argument("--lr", type=float, default=3e-4)
            p.add_argument("--warmup", type=int, default=40)
            p.add_argument("--without", type=float, default=0.35, help="a memory, share of the texts")
            p.add_argument("--variation", type=float, default=0.7, help="share of the total variation in the loss")
            p.add_argument("--log", type=float, default=3, help="minutes between looks at held-out texts")
        p.add_argument("--batch", type=int, default=6000 if run is states else 3072, help="tokens of a batch")
        p.add_argument("--minutes", type=float, default=60)
        p.add_argument("--seed", type=int, default=0)
        p.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
