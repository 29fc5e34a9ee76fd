"""Microbenchmarks of the ops: what a call costs, beside the reference and whatever else can do the same.

Everything runs on the same inputs (:mod:`.cases`), is first held to the reference on these very inputs
(:mod:`.variants`), and is timed interleaved in one process (:mod:`.clock`). :mod:`.peers` adapts kernels of other
projects from folders that the user names; :mod:`.measure` makes rows of it all and :mod:`.report` shows them.
"""

__all__ = ["DTYPES", "LAWS", "OPS", "RULES"]

OPS = ("verify", "sample", "softmax", "project", "range_sums")
RULES = ("match", "token", "block")
LAWS = ("point", "dense", "handed", "compact")  # handed: dense, and the drafter's logsumexp is known
DTYPES = ("float32", "bfloat16", "float16")
