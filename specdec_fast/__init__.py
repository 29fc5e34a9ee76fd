"""Lossless speculative decoding for Hugging Face models, with any drafter.

>>> from specdec_fast import fast_generate
>>> output = fast_generate(target, **inputs, assistant_model=drafter,
...                        tokenizer=target_tokenizer, assistant_tokenizer=drafter_tokenizer)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec_fast.api import decoding_loop, fast_generate
    from specdec_fast.prepared import Prepared, prepare
    from specdec_fast.stats import Speculation, last_speculation

__all__ = [
    "Prepared",
    "Speculation",
    "__version__",
    "decoding_loop",
    "fast_generate",
    "last_speculation",
    "prepare",
]

__version__ = "0.1.0"

# Imported when first asked for: the command line must not wait for torch and transformers
_HOMES = {
    "Prepared": "prepared",
    "Speculation": "stats",
    "decoding_loop": "api",
    "fast_generate": "api",
    "last_speculation": "stats",
    "prepare": "prepared",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"specdec_fast.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
