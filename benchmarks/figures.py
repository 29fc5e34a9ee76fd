"""How a benchmark of passes hands over what it has measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers


def report(figures: dict[str, Any], to: Path | None) -> None:
    """Prints figures with the versions they were made by, and writes them to a file, where one was named."""
    figures |= {"torch": torch.__version__, "transformers": transformers.__version__}
    text = json.dumps(figures, indent=1)
    print(text)
    if to is not None:
        to.write_text(text + "\n")
