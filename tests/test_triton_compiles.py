"""Every Triton kernel compiles for a GPU, on a machine that need not have one: what the interpreter cannot see."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("specdec_fast.triton_kernels.launch", reason="no Triton kernels beside this package")

SCRIPT = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from specdec_fast.triton_kernels import attention, filters, finish, judge, layers, maps, sample

TYPES = {
    "*bf16": "logits draft_logits",
    "*fp32": "temperature draft_temperature peaks q min_p amount weighted",
    "*fp64": "draft_logsumexp sparse_log_q tops totals log_ps log_ratios log_probability log_probabilities logsumexp"
    " out sums",
    "*i32": "kind index counters keep status row_start column order",
    "*i64": "tokens count drawn sparse_ids seed start position offset masses own rests accepted next_token token"
    " low high limits draft_limits places kept found whole hidden window",
    "i32": "stride stride_row stride_position width draft_stride_row draft_stride_position entries listed base"
    " positions drafted slots splits tiles length ranges longest more shift first query_row query_head query_position"
    " key_row key_head key_column value_row value_head value_column start_row hidden_row window_row heads group queries"
    " capacity dim",
    "fp32": "scale softcap",
}
TYPES = {name: kind for kind, names in TYPES.items() for name in names.split()}
CONSTANTS = dict(
    STEPS=17, LISTED=2, SPAN=2, BLOCK=128, TILES=4, PLACES=4, PURPOSE=3, SCALE=6, WAYS=16, PART=64, BY_MASS=True
)
OPTIONAL = "temperature draft_temperature kind draft_logits index drawn draft_logsumexp sparse_ids sparse_log_q"
OPTIONAL = {*OPTIONAL.split(), "limits", "draft_limits", "log_probabilities", "offset", "order", "min_p", "kept"}
BARE = [sample.sample_kernel, maps.range_sums_kernel, judge.judge_kernel, finish.finish_kernel, filters.floor_kernel]
FULL = [*BARE, sample.measure_kernel, sample.softmax_kernel, maps.project_kernel, maps.tile_sums_kernel]


def compiled(kernel, capability, left_out=(), **changed):
    signature = {n: "constexpr" if n in left_out else TYPES.get(n, "constexpr") for n in kernel.arg_names}
    signature |= {n: kind for n, kind in changed.items() if str(kind)[0] == "*" or kind in ("i32", "fp32")}
    values = {"RULE": 2, **CONSTANTS, **dict.fromkeys(left_out), **changed}
    constants = {(i,): values[n] for i, n in enumerate(kernel.arg_names) if signature[n] == "constexpr"}
    target = GPUTarget("cuda", capability, 32)
    assert triton.compile(ASTSource(kernel, signature, constants), target=target).asm["cubin"]


for kernel in FULL:
    compiled(kernel, 90)
compiled(filters.narrow_kernel, 90)
for kernel in BARE:
    compiled(kernel, 80, OPTIONAL, RULE=0)
compiled(filters.narrow_kernel, 80, OPTIONAL, BY_MASS=False, amount="*i32")
compiled(finish.finish_kernel, 100)
compiled(filters.narrow_kernel, 100)
for capability, element, dim in ((80, "*bf16", 64), (90, "*fp32", 16), (100, "*fp16", 64)):
    shape = dict(ROWS=16, COLUMNS=16, DIM=dim, SPLITS=16, SOFTCAPPED=capability > 80, WIDEN=False)
    states = dict.fromkeys(("query", "key", "value", "out"), element) | {"masses": "*fp32"}
    compiled(attention.attend_kernel, capability, () if capability > 80 else ("hidden", "window"), **states, **shape)
shape = dict(ROWS=16, WIDEN=False, DEPTH=256) | dict.fromkeys("rows inner count count_1 count_2".split(), "i32")
shape |= dict.fromkeys("x_row residual_row out_row".split(), "i32") | {"epsilon": "fp32"}
states = dict.fromkeys("x norm weight weight_1 weight_2 residual bias bias_1 bias_2 out".split(), "*bf16")
told = dict(PARTS=3, GATED=False, EVEN=False, BLOCK=32)
compiled(layers.product_kernel, 90, ("residual", "residual_row"), **shape | states | told)
compiled(layers.product_kernel, 90, ("residual", "residual_row", "bias", "bias_1", "bias_2"), **shape | states | told)
told = dict(PARTS=1, GATED=True, EVEN=True, BLOCK=16)
compiled(layers.product_kernel, 80, ("norm", "bias", "bias_1", "weight_2", "bias_2"), **shape | states | told)
states = dict.fromkeys("fused cosine sine query_norm key_norm keys values query".split(), "*bf16")
shape = dict(columns="*i64", kv_heads="i32", epsilon="fp32", DIM=128)
compiled(layers.place_kernel, 90, **shape | states)
compiled(layers.place_kernel, 100, ("query_norm", "key_norm"), **shape | states)
compiled(attention.merge_kernel, 90, SPLITS=16, PLACES=16, DIM=128, out="*bf16", masses="*fp32")
"""


def test_every_kernel_compiles(tmp_path):
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    settings |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    script = tmp_path / "compile_kernels.py"
    script.write_text(SCRIPT)
    result = subprocess.run([sys.executable, script], env=settings, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
