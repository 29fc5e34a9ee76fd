"""Make the default drafter, a small Llama with a small vocabulary of its own, for one target.

    python train_drafter.py questions TARGET QUESTIONS --exclude JSONL...
    python train_drafter.py sample    TARGET SAMPLES --prose TEXT... --exclude JSONL... --questions QUESTIONS
    python train_drafter.py label     TARGET LABELLED --prose TEXT...
    python train_drafter.py tokenizer TARGET DRAFTER SAMPLES LABELLED
    python train_drafter.py grow      TARGET DRAFTER OLD SAMPLES
    python train_drafter.py train     TARGET DRAFTER SAMPLES LABELLED
    python train_drafter.py evaluate  TARGET DRAFTER --humaneval JSONL --mtbench JSONL

`questions` lets the target write users' questions, `sample` lets it answer prompts and keeps its most
probable next tokens beside every token it writes; `label` keeps the same for existing text. The vocabulary
is a subset of the target's, closed under its merges, so both split most text at the same places. The loss
at such a place is the cross entropy to the target's law, read in the drafter's tokens; it needs no common
vocabulary.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from drafter_data import (
    Batch,
    Tokens,
    Translation,
    batches,
    encode_prompt,
    evaluation_texts,
    load_shards,
    plain_texts,
    save_shard,
)
from drafter_prompts import BEGINNINGS, Overlap, Prompt, read_paragraphs, standard_library, stream
from drafter_sampler import Sample, sample_stream
from drafter_vocabulary import grow, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specdec_fast.cache import cache_argument, cache_of

MARK = "@@"
SHARD = "12MB"  # of weights a file at most

# --- the target's text ---------------------------------------------------------------------------


def questions(args: argparse.Namespace) -> None:
    """Let the target write the users' messages as well: what it thinks stands in that place of a chat.

    Idea: Xu et al., "Magpie" (arXiv 2406.08464). Half of each beginning's are drawn at temperature 0.8, half at 1.
    """
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    rng = random.Random(args.seed)
    before = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False).partition(MARK)[0]
    prefix = tokenizer.encode(before, add_special_tokens=False)
    excluded = Overlap(evaluation_texts(args.exclude))

    def begun() -> Iterator[tuple[list[int], float]]:
        while True:
            beginning = tokenizer.encode(rng.choice(BEGINNINGS), add_special_tokens=False)
            yield prefix + beginning, rng.choice([0.8, 1.0])

    start, seen = time.time(), set()
    with args.out.open("a", encoding="utf-8") as file:
        for item in sample_stream(
            model, begun(), stop_id=tokenizer.eos_token_id, batch=args.batch, max_new_tokens=96, top_k=1, seed=args.seed
        ):
            text = tokenizer.decode(item.ids[len(prefix) : -1]).strip()
            if item.ids[-1] == tokenizer.eos_token_id and len(text) > 10 and text not in seen and not excluded(text):
                seen.add(text)
                file.write(json.dumps(text) + "\n")
                file.flush()
            if time.time() - start > 60 * args.minutes or len(seen) >= args.count:
                break
    print(f"{len(seen)} questions, {time.time() - start:.0f} s")


def sample(args: argparse.Namespace) -> None:
    """Write shards of the target's answers until the time is up."""
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    rng = random.Random(args.seed)

    def prompts() -> Iterator[tuple[list[int], float]]:
        asked = [json.loads(line) for path in args.questions for line in path.read_text("utf-8").splitlines()]
        rng.shuffle(asked)
        for prompt in stream(args.seed, read_paragraphs(args.prose), Overlap(evaluation_texts(args.exclude))):
            if asked and rng.random() < args.questions_share:
                prompt = Prompt(asked.pop(), True)
            yield encode_prompt(tokenizer, prompt), rng.choice([0.0, 0.0, 0.0, 0.0, 0.7, 0.7, 1.0, 1.0])

    args.out.mkdir(parents=True, exist_ok=True)
    start, tokens, shard = time.time(), 0, []
    samples = sample_stream(
        model, prompts(), stop_id=tokenizer.eos_token_id, batch=args.batch, max_new_tokens=args.max_new_tokens,
        top_k=args.top_k, seed=args.seed,
    )  # fmt: skip
    for count, item in enumerate(samples, 1):
        shard.append(item)
        tokens += len(item.ids) - item.prompt_length
        if len(shard) == args.shard:
            save_shard(args.out / f"seed{args.seed}-{count:06d}.npz", shard)
            shard = []
            print(f"{count} samples, {tokens} tokens, {tokens / (time.time() - start):.0f} tokens/s", flush=True)
        if time.time() - start > 60 * args.minutes:
            break


@torch.inference_mode()
def label(args: argparse.Namespace) -> None:
    """Write shards of Python sources and prose with the target's next-token law beside every token."""
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    rng = random.Random(args.seed)
    excluded = Overlap(evaluation_texts(args.exclude))
    pieces = []
    for path in [*standard_library(), *args.prose]:
        text = path.read_text("utf-8", errors="replace")
        size = 1600  # characters, about 400 tokens
        cut = [text[i : i + size] for i in range(0, len(text), size)]
        keep = 40 if path.suffix != ".py" else len(cut)  # a few pieces of each long book
        pieces += rng.sample(cut, min(keep, len(cut)))
    rng.shuffle(pieces)
    args.out.mkdir(parents=True, exist_ok=True)
    start, tokens, shard = time.time(), 0, []
    for count, text in enumerate(pieces, 1):
        ids = tokenizer.encode(text, add_special_tokens=False)[: args.length]
        if len(ids) < 32 or excluded(text):
            continue
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
        top, top_ids = logits.topk(args.top_k, -1)
        top_probs = (top - logits.logsumexp(-1, keepdim=True)).exp()
        shard.append(
            Sample(
                np.array(ids, np.uint16),
                1,
                1.0,
                top_ids.numpy().astype(np.uint16),
                top_probs.numpy().astype(np.float16),
            )
        )
        tokens += len(ids)
        if len(shard) == args.shard:
            save_shard(args.out / f"text{args.seed}-{count:06d}.npz", shard)
            shard = []
            print(
                f"{count}/{len(pieces)} texts, {tokens} tokens, {tokens / (time.time() - start):.0f} tokens/s",
                flush=True,
            )
        if time.time() - start > 60 * args.minutes:
            break


# --- training ------------------------------------------------------------------------------------


class SparseLoss(torch.autograd.Function):
    """(1 − s)·cross entropy + s·total variation of softmax(hidden @ weightᵀ) to sparse laws, summed over places.

    Hidden `[N, H]`, weight `[V, H]`, ids and weights of the laws `[N, K]`, share s. The gradient is made on the way, a
    few rows at a time: only its bfloat16 form is ever `[N, V]`. The cross entropy alone is the value, whatever s is.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, ids: Tensor, weights: Tensor, share: float) -> Tensor:
        grad = torch.empty(len(hidden), len(weight), dtype=hidden.dtype)
        total = torch.zeros(())
        for h, i, w, out in zip(*(x.split(64) for x in (hidden, ids, weights, grad)), strict=True):
            log_q = (h @ weight.T).log_softmax(-1, dtype=torch.float32)
            total -= (w * log_q.gather(1, i)).sum()
            q, mass = log_q.exp_(), w.sum(-1, keepdim=True)
            if share:
                # Acceptance, the sum of min(p, q), grows with q where q < p alone: its gradient is q·(below − Q),
                # Q being what q has there. Laws may name a token twice.
                law = torch.zeros_like(q).scatter_add_(1, i, w)
                below = (q < law).float().mul_(q).mul_(share)
                mass = mass * (1 - share) + below.sum(-1, keepdim=True)
                q.mul_(mass).sub_(below)
                out.copy_(q.scatter_add_(1, i, w * (share - 1)))
            else:
                out.copy_(q.mul_(mass).scatter_add_(1, i, -w))
        ctx.save_for_backward(grad @ weight, grad.T @ hidden)
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * scale, grad_weight * scale, None, None, None


def new_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden, num_hidden_layers=args.layers,
        intermediate_size=args.intermediate,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, head_dim=64, max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@torch.no_grad()
def begin_with_target_embeddings(model: LlamaForCausalLM, target_folder: Path, translation: "Translation") -> None:
    """The principal components of the target's embeddings, scaled to the usual size of fresh ones."""
    table = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32).get_input_embeddings().weight
    whole = torch.from_numpy(np.flatnonzero(translation.single))
    rows = table[whole] - table[whole].mean(0)
    _, _, directions = torch.linalg.svd(rows, full_matrices=False)
    weight = model.model.embed_tokens.weight
    projected = rows @ directions[: weight.shape[1]].T
    weight[torch.from_numpy(translation.first[whole.numpy()])] = projected * (
        model.config.initializer_range / projected.std()
    )


def learning_rate(step: int, progress: float, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    return args.lr * min(1.0, (step + 1) / args.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def learnt(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Final hidden states, and ids and weights of the laws, where a batch has something to learn."""
    hidden = model.model(batch.ids[:, :-1], use_cache=False).last_hidden_state
    weights = batch.law_weights[:, 1:]
    chosen = weights.sum(-1) > 0
    return hidden[chosen], batch.law_ids[:, 1:][chosen], weights[chosen]


def loss_of(model: LlamaForCausalLM, batch: Batch, share: float = 0.0) -> tuple[Tensor, Tensor]:
    """Summed loss, `share` of it the total variation, and summed weight of a batch."""
    hidden, ids, weights = learnt(model, batch)
    return SparseLoss.apply(hidden, model.lm_head.weight, ids, weights, share), weights.sum()


@torch.no_grad()
def check(model: LlamaForCausalLM, held_out: list[Batch]) -> str:
    """Cross entropy, expected acceptance and agreement of the most probable token, a place on average."""
    sums = torch.zeros(4)
    for batch in held_out:
        for hidden, ids, weights in zip(*(x.split(256) for x in learnt(model, batch)), strict=True):
            log_q = (hidden @ model.lm_head.weight.T).log_softmax(-1, dtype=torch.float32)
            sums[0] -= (weights * log_q.gather(1, ids)).sum()
            law = torch.zeros_like(log_q).scatter_add_(1, ids, weights)
            sums[1] += torch.minimum(log_q.exp(), law).sum()
            sums[2] += (log_q.argmax(-1) == law.argmax(-1)).sum()
            sums[3] += len(hidden)
    loss, accepted, agreed = (sums[:3] / sums[3]).tolist()
    return f"loss {loss:.4f}, acceptance {accepted:.4f}, same first choice {agreed:.4f}"


def train(args: argparse.Namespace) -> None:
    """Train on samples and labelled text, a share of each; `--init` goes on from weights saved before."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    translation = Translation(args.target, tokenizer)
    rng = random.Random(args.seed)
    held_out: list[Tokens] = []
    samples: list[Tokens] = []
    texts: list[Tokens] = []
    known: set[Path] = set()

    def load() -> None:
        for i, item in enumerate(load_shards([args.samples], known)):
            (samples if i % 50 else held_out).append(translation(item, args.prompt_weight))
        texts.extend(translation(item, 0.0) for item in load_shards([args.labelled], known))

    load()
    plain: list[Tokens] = []
    if args.text_share:
        excluded = Overlap(evaluation_texts(args.exclude))
        plain = plain_texts([*standard_library(), *args.prose], tokenizer, excluded, k=held_out[0].law_ids.shape[1])
    named = {"samples": samples, "held out": held_out, "labelled texts": texts, "plain texts": plain}
    for name, items in named.items():
        print(f"{name}: {len(items)} items, {sum(len(i.ids) for i in items)} drafter tokens", flush=True)

    if args.init:
        model = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    else:
        model = new_model(args, tokenizer)
        begin_with_target_embeddings(model, args.target, translation)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    # The optimizer's weights stay in float32; the model computes in bfloat16.
    master = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in master.values() if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in master.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
    sources = [batches(items, args.batch, rng) for items in (samples, texts, plain)]
    checks = list(islice(batches(held_out, args.batch, random.Random(0), 0.0), 8))
    print(f"held-out samples at first: {check(model, checks)}", flush=True)
    start, next_save = time.time(), args.save_every / args.minutes
    step, tokens, running, running_weight = 0, 0, 0.0, 0.0
    while (progress := (time.time() - start) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress, args)
        share = args.text_share * (1 - progress)
        batch = next(rng.choices(sources, [1 - share, share / 3, share * 2 / 3])[0])
        total, weight = loss_of(model, batch, args.variation * progress)
        (total / weight).backward()
        for name, p in model.named_parameters():
            master[name].grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(list(master.values()), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(master[name])
        step += 1
        tokens += batch.ids.numel()
        running, running_weight = running + total.item(), running_weight + weight.item()
        if step % args.log == 0:
            print(
                f"step {step}, {tokens} tokens, {time.time() - start:.0f} s: loss {running / running_weight:.4f}, "
                f"held-out samples: {check(model, checks)}", flush=True,
            )  # fmt: skip
            running = running_weight = 0.0
        if progress > next_save:  # samples may still be arriving
            model.save_pretrained(args.out, max_shard_size=SHARD)
            load()
            next_save += args.save_every / args.minutes
    model.save_pretrained(args.out, max_shard_size=SHARD)
    if args.keep:
        model.float().load_state_dict(master | {"lm_head.weight": master["model.embed_tokens.weight"]})
        model.save_pretrained(args.keep)


# --- evaluation ----------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(args: argparse.Namespace) -> None:
    """Acceptance of the next token, position by position, along the target's own greedy and sampled answers."""
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.bfloat16).eval()
    target_tokenizer = AutoTokenizer.from_pretrained(args.target)
    drafter = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    drafter_tokenizer = AutoTokenizer.from_pretrained(args.out)
    translation = Translation(args.target, drafter_tokenizer)
    common = np.flatnonzero(translation.single)
    target_column, drafter_column = torch.from_numpy(common), torch.from_numpy(translation.first[common])
    shared = torch.full((drafter.config.vocab_size,), float("-inf"))
    shared[drafter_column] = 0.0

    sets: dict[str, list[Prompt]] = {}
    if args.humaneval:
        problems = [json.loads(line)["prompt"] for line in args.humaneval.read_text("utf-8").splitlines()]
        problems = problems[:: len(problems) // args.prompts][: args.prompts]
        sets["HumanEval, chat"] = [Prompt(f"Complete this function:\n\n```python\n{p}```", True) for p in problems]
        sets["HumanEval, plain"] = [Prompt(p, False) for p in problems]
    if args.mtbench:
        turns = [json.loads(line)["turns"][0] for line in args.mtbench.read_text("utf-8").splitlines()]
        sets["MT-Bench, chat"] = [Prompt(t, True) for t in turns[:: len(turns) // args.prompts][: args.prompts]]
    for name, prompts in sets.items():
        asked = [(encode_prompt(target_tokenizer, p), t) for p in prompts for t in (0.0, 1.0)]
        answers = sample_stream(
            target, cycle(asked), stop_id=target_tokenizer.eos_token_id, batch=len(asked), refill=len(asked),
            max_prompt=max(len(ids) for ids, _ in asked), max_new_tokens=args.new_tokens, seed=args.seed,
        )  # fmt: skip
        figures: dict[str, list[float]] = {
            "greedy TLI": [],
            "greedy text": [],
            "sampled TLI": [],
            "mass on common tokens": [],
        }
        for item in islice(answers, len(asked)):
            ids, n = item.ids.tolist(), item.prompt_length
            pieces = [translation.pieces[t] for t in ids]
            logits = drafter(torch.tensor([[d for ps in pieces for d in ps]])).logits[0].float() + shared
            q, best = logits.softmax(-1), logits.argmax(-1).tolist()
            at = sum(map(len, pieces[:n])) - 1  # the drafter's row that predicts the next token
            if item.temperature:
                p = target(torch.tensor([ids])).logits[0].float().softmax(-1)
            for j in range(n, len(ids)):
                if item.temperature:
                    p_common = p[j - 1, target_column]
                    figures["sampled TLI"].append(torch.minimum(p_common, q[at, drafter_column]).sum().item())
                    figures["mass on common tokens"].append(p_common.sum().item())
                else:
                    follows = best[at : at + len(pieces[j])] == pieces[j]
                    figures["greedy text"].append(follows)
                    figures["greedy TLI"].append(follows and len(pieces[j]) == 1)
                at += len(pieces[j])
        shown = ", ".join(f"{key} {np.mean(values):.3f}" for key, values in figures.items())
        print(f"{name}: {shown} ({len(figures['greedy TLI'])} + {len(figures['sampled TLI'])} positions)", flush=True)

    ids, cache = torch.tensor([[5]]), None
    drafter = drafter.to(torch.bfloat16)
    for step in range(300):
        if step == 100:
            start = time.process_time()
        output = drafter(ids, **{cache_argument(type(drafter)): cache}, use_cache=True)
        cache, ids = cache_of(output), output.logits[:, -1:].argmax(-1)
    cost = (time.process_time() - start) / 200 * 1e3
    print(f"drafter: {cost:.2f} ms of CPU time a token, eager, bfloat16, {args.threads} thread(s)")


# --- command line --------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(run) -> argparse.ArgumentParser:
        p = commands.add_parser(run.__name__, help=run.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.set_defaults(run=run)
        p.add_argument("target", type=Path, help="the target's folder")
        p.add_argument("out", type=Path, help="the folder to write (train, evaluate: the drafter's)")
        p.add_argument("--seed", type=int, default=0)
        p.add_argument("--threads", type=int, default=1)
        return p

    for p in (command(sample), command(label)):
        p.add_argument("--prose", type=Path, nargs="*", default=[], help="text files")
        p.add_argument("--exclude", type=Path, nargs="*", default=[], help="JSON lines whose texts nothing may repeat")
        p.add_argument("--minutes", type=float, default=60)
        p.add_argument("--top-k", type=int, default=12)
        p.add_argument("--shard", type=int, default=64, help="samples a file")
        p.add_argument("--batch", type=int, default=96, help="rows sampled at once")
        p.add_argument("--max-new-tokens", type=int, default=192)
        p.add_argument("--length", type=int, default=512, help="longest labelled text")

        p.add_argument("--questions", type=Path, nargs="*", default=[], help="files of the target's own questions")
        p.add_argument("--questions-share", type=float, default=0.8, help="of the prompts, as long as there are any")

    p = command(questions)
    p.add_argument("--exclude", type=Path, nargs="*", default=[], help="JSON lines whose texts nothing may repeat")
    p.add_argument("--minutes", type=float, default=10)
    p.add_argument("--count", type=int, default=20000)
    p.add_argument("--batch", type=int, default=96, help="rows sampled at once")

    p = command(tokenizer)
    p.add_argument("data", type=Path, nargs="+", help="folders of shards")
    p.add_argument("--size", type=int, default=8192)
    p.add_argument("--prior", type=float, default=3000.0, help="this over the token's rank is added to its mass")

    p = command(grow)
    p.add_argument("old", type=Path, help="folder of the trained drafter")
    p.add_argument("data", type=Path, nargs="+", help="folders of shards")
    p.add_argument("--size", type=int, default=12288, help="tokens in all")
    p.add_argument("--add-layers", type=int, default=0)
    p.add_argument("--prior", type=float, default=3000.0, help="this over the token's rank is added to its mass")

    p = command(train)
    p.add_argument("samples", type=Path)
    p.add_argument("labelled", type=Path)
    p.add_argument("--prose", type=Path, nargs="*", default=[], help="text files, beside the standard library")
    p.add_argument("--exclude", type=Path, nargs="*", default=[], help="JSON lines whose texts nothing may repeat")
    p.add_argument("--save-every", type=float, default=6, help="minutes between saves; new shards are read as well")
    p.add_argument("--init", type=Path, help="folder of a model to go on from")
    p.add_argument("--keep", type=Path, help="folder for the float32 weights")
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--layers", type=int, default=3)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--kv-heads", type=int, default=4)
    p.add_argument("--intermediate", type=int, default=768)
    p.add_argument("--batch", type=int, default=3072, help="tokens of a batch")
    p.add_argument("--minutes", type=float, default=60, help="the learning rate falls with the time used")
    p.add_argument("--warmup", type=int, default=50)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--text-share", type=float, default=0.6, help="of other text than samples; falls to 0")
    p.add_argument("--prompt-weight", type=float, default=0.0, help="of the prompts' tokens in the loss")
    p.add_argument("--variation", type=float, default=0.0, help="share of the total variation in the loss at the end")
    p.add_argument("--log", type=int, default=40)

    p = command(evaluate)
    p.add_argument("--humaneval", type=Path)
    p.add_argument("--mtbench", type=Path)
    p.add_argument("--prompts", type=int, default=8, help="of each set")
    p.add_argument("--new-tokens", type=int, default=96)

    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
