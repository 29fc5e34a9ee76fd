"""Lossless speculative decoding for Hugging Face models, with any drafter.

>>> from specdec_fast import fast_generate
>>> output = fast_generate(target, **inputs, assistant_model=drafter,
...                        tokenizer=target_tokenizer, assistant_tokenizer=drafter_tokenizer)
"""

from specdec_fast.api import decoding_loop, fast_generate
from specdec_fast.stats import Speculation, last_speculation

__all__ = ["Speculation", "__version__", "decoding_loop", "fast_generate", "last_speculation"]

__version__ = "0.1.0"
