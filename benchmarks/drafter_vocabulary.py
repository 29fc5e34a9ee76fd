"""The drafter's vocabulary: chosen by the target's mass, closed under its merges; and a drafter given more tokens."""

import argparse
import json
from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
from drafter_data import load_shards
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def choose_tokens(target: dict, mass: Counter[str], size: int, kept: Iterable[str] = ()) -> list[str]:
    """The `size` tokens (less the specials) of most mass, closed under the target's merges, commonest first.

    Those of `kept`, so closed themselves, are among them.

    Closed means: with a token come the tokens that it is merged from. The merges left out never take
    part in a text that has only chosen tokens, so both tokenizers then agree.
    """
    made_of = {a + b: (a, b) for a, b in reversed(target["model"]["merges"])}
    alphabet = sorted({c for token in made_of for c in token} | byte_alphabet())
    chosen = set(alphabet) | set(kept)

    def needs(token: str) -> set[str]:
        return set() if token in chosen or len(token) == 1 else {token}.union(*map(needs, made_of[token]))

    for token, _ in mass.most_common():
        if token in made_of and len(chosen) + len(needs(token)) + len(SPECIALS) <= size:
            chosen |= needs(token)
    return sorted(chosen, key=lambda token: (-mass[token], token))


def byte_alphabet() -> set[str]:
    """The 256 characters that stand for bytes in a byte-level vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {chr(b) for b in plain} | {chr(256 + i) for i in range(256 - len(plain))}


def make_tokenizer(target: dict, tokens: list[str]) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(SPECIALS + tokens)}
    spec = {
        name: target[name] for name in ("version", "truncation", "padding", "normalizer", "pre_tokenizer", "decoder")
    }
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] = [{"id": i, "content": text, **special} for i, text in enumerate(SPECIALS)]
    spec["post_processor"] = None
    merges = [[a, b] for a, b in target["model"]["merges"] if a in vocab and b in vocab and a + b in vocab]
    spec["model"] = target["model"] | {"vocab": vocab, "merges": merges}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<|im_start|>", eos_token="<|im_end|>",
        pad_token="<|im_end|>", unk_token="<|endoftext|>", model_max_length=2048, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def token_mass(target: dict, args: argparse.Namespace) -> Counter[str]:
    """What the target's laws give each of its tokens on the samples of `args.data`, and a prior by rank."""
    text = {i: token for token, i in target["model"]["vocab"].items()}
    mass = np.zeros(max(text) + 1)
    for item in load_shards(args.data):
        np.add.at(mass, item.top_ids.ravel(), item.top_probs.ravel().astype(np.float64))
    mass += args.prior / (1 + np.arange(len(mass)))
    return Counter({text[i]: float(m) for i, m in enumerate(mass) if m > 0})


def tokenizer(args: argparse.Namespace) -> None:
    """Choose the vocabulary by the target's own next-token mass on samples and text."""
    target = json.loads((args.target / "tokenizer.json").read_text("utf-8"))
    counts = token_mass(target, args)
    for size in sorted({2048, 4096, 6144, args.size, 12288, 16384}):
        chosen = set(choose_tokens(target, counts, size)) | set(SPECIALS)
        covered = sum(m for token, m in counts.items() if token in chosen)
        print(f"{size} tokens: {covered / counts.total():.4f} of the target's mass")
    made = make_tokenizer(target, choose_tokens(target, counts, args.size))
    made.chat_template = AutoTokenizer.from_pretrained(args.target).chat_template
    made.save_pretrained(args.out)
    inside = sum(token in target["model"]["vocab"] for token in made.get_vocab())
    print(f"{len(made)} tokens, {inside} of them in the target's vocabulary")


@torch.no_grad()
def grow(args: argparse.Namespace) -> None:
    """Make a drafter with more tokens, and more layers, out of a trained one.

    Old tokens keep their ids and rows. A new token's row is what the linear map that fits the old rows best (least
    squares over the tokens in both vocabularies) makes of the target's row. New layers add nothing at first.
    """
    target = json.loads((args.target / "tokenizer.json").read_text("utf-8"))
    old_tokenizer = PreTrainedTokenizerFast.from_pretrained(args.old)
    old = LlamaForCausalLM.from_pretrained(args.old, dtype=torch.float32)
    ids = old_tokenizer.get_vocab()
    kept = [token for token in sorted(ids, key=ids.__getitem__) if token not in SPECIALS]
    chosen = choose_tokens(target, token_mass(target, args), args.size, kept)
    known = set(kept)
    new = [token for token in chosen if token not in known]
    made = make_tokenizer(target, kept + new)
    made.chat_template = old_tokenizer.chat_template
    made.save_pretrained(args.out)

    config = LlamaConfig(**old.config.to_dict() | {"num_hidden_layers": old.config.num_hidden_layers + args.add_layers})
    config.vocab_size = len(made)
    model = LlamaForCausalLM(config)
    rows = old.model.embed_tokens.weight
    model.load_state_dict({k: v for k, v in old.state_dict().items() if v is not rows and v.shape != rows.shape}, False)
    for layer in model.model.layers[old.config.num_hidden_layers :]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    table = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).get_input_embeddings().weight
    table = torch.cat([table, torch.ones(len(table), 1)], 1)
    place = target["model"]["vocab"]
    both = [token for token in kept if token in place]
    fit = torch.linalg.lstsq(table[[place[t] for t in both]], rows[[ids[t] for t in both]]).solution
    model.model.embed_tokens.weight[: len(rows)] = rows
    model.model.embed_tokens.weight[len(rows) :] = table[[place[t] for t in new]] @ fit
    model.save_pretrained(args.out)
    print(f"{len(rows)} + {len(new)} tokens, {sum(p.numel() for p in model.parameters())} parameters")
