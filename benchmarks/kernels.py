"""Microbenchmarks of the ops: ``specdec-fast bench kernels`` for a checkout that is not installed.

    python benchmarks/kernels.py --device cpu --quick --json FILE

Takes the command's options; ``--help`` lists them.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Transformers looks for a package of this name, and may find this file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from specdec_fast.cli import app

    app(["bench", "kernels", *sys.argv[1:]])
