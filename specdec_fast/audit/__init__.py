"""Does a generator's output have the target's law? Greedy output is compared, sampled output tested.

Any callable ``generate(model, input_ids, **kwargs)`` that takes what ``model.generate`` takes can be audited. What it
returns is compared with the target's own law, which is computed without it (:mod:`specdec_fast.audit.law`). See
``docs/audit.md`` for what is tested and what a verdict means.
"""

from specdec_fast.audit.greedy import Divergence, GreedyAudit, GreedyCase, audit_greedy
from specdec_fast.audit.sampled import RESOLUTION, SIGNIFICANCE, SampledTest, SamplingAudit, audit_sampling

__all__ = [
    "RESOLUTION",
    "SIGNIFICANCE",
    "Divergence",
    "GreedyAudit",
    "GreedyCase",
    "SampledTest",
    "SamplingAudit",
    "audit_greedy",
    "audit_sampling",
]
