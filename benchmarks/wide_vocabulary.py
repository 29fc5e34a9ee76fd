"""A small model on another vocabulary, to measure what hangs on sizes of vocabularies of which no model is at hand.

    python wide_vocabulary.py MODEL TOKENS.tiktoken OUT

TOKENS are lines of a token's bytes in base64 and its rank, byte-level BPE. A token that MODEL has keeps its row, any
other one gets the mean of the rows of its pieces; layers stay. What the model says is poorer and still text.
"""

import base64
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from specdec_fast.vocab import Vocabulary

WORD = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
ENDS = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = (  # that of o200k
    rf"[^\r\n\p{{L}}\p{{N}}]?{WORD}*{ENDS}+{SHORT}|[^\r\n\p{{L}}\p{{N}}]?{WORD}+{ENDS}*{SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@torch.no_grad()
def main(
    model: Annotated[Path, typer.Argument(help="Folder of a Llama-like model with chat markers.")],
    tokens: Annotated[Path, typer.Argument(help="The other vocabulary.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Writes the model and its tokenizer."""
    own = AutoTokenizer.from_pretrained(model)
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = TikTokenConverter(str(tokens), pattern=PATTERN, extra_special_tokens=marks).converted()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=marks[1], eos_token=marks[2], pad_token=marks[2])
    made.chat_template = own.chat_template
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    rows = loaded.get_input_embeddings().weight.float()
    known = Vocabulary.of(own)
    place = {known.bytes_of([i]): i for i in range(len(rows)) if i not in own.all_special_ids}
    wide = torch.zeros(len(made), rows.shape[1])
    kept = 0
    for line in tokens.read_bytes().splitlines():
        text, rank = base64.b64decode(line.split()[0]), int(line.split()[1])
        kept += text in place
        pieces = [place[text]] if text in place else known.encode(text.decode("utf-8", "replace"))[0]
        if pieces:  # pieces of a character may have none
            wide[rank] = rows[pieces].mean(0)
    for mark in marks:
        wide[made.convert_tokens_to_ids(mark)] = rows[own.convert_tokens_to_ids(mark)]
    loaded.resize_token_embeddings(len(made), mean_resizing=False)
    loaded.get_input_embeddings().weight.copy_(wide)
    loaded.tie_weights()
    for config in (loaded.config, loaded.generation_config):
        config.bos_token_id, config.eos_token_id = made.bos_token_id, made.eos_token_id
        config.pad_token_id = made.pad_token_id
    loaded.save_pretrained(out)
    made.save_pretrained(out)
    print(f"{len(made)} tokens, {kept} of them with a row of their own")


if __name__ == "__main__":
    typer.run(main)
