"""Every Triton kernel compiles for a GPU, on a machine that need not have one: what the interpreter cannot see."""

import json
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
from specdec_fast.triton_kernels import attention, filters, finish, judge, layers, maps, rounds, sample

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


def compiled(kernel, capability, left_out=(), options=None, even=(), **changed):
    signature = {n: "constexpr" if n in left_out else TYPES.get(n, "constexpr") for n in kernel.arg_names}
    changed = {n: kind for n, kind in changed.items() if n in kernel.arg_names}
    signature |= {n: kind for n, kind in changed.items() if str(kind)[0] == "*" or kind in ("i32", "i64", "fp32")}
    values = {"RULE": 2, **CONSTANTS, **dict.fromkeys(left_out), **changed}
    constants = {(i,): values[n] for i, n in enumerate(kernel.arg_names) if signature[n] == "constexpr"}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in even}
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.asm["cubin"]
    return made


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
shape = dict(ROWS=16, WIDEN=False, DEPTH=256, GROUP=16, PLACES=256)
shape |= dict.fromkeys("rows inner count count_1 count_2 places x_row residual_row out_row".split(), "i32")
shape |= {"epsilon": "fp32", "squares": "*fp32", "parts": "*fp32"}
states = dict.fromkeys("x norm scaled weight weight_1 weight_2 residual bias bias_1 bias_2 out".split(), "*bf16")
product = shape | states
BIASES, NEXT, SUM = ("bias", "bias_1", "bias_2"), ("norm", "scaled", "parts"), ("residual", "residual_row")
told = dict(PARTS=3, GATED=False, EVEN=False, BLOCK=32)
compiled(layers.product_kernel, 90, (*SUM, *NEXT), **product | told)
compiled(layers.product_kernel, 90, (*SUM, *NEXT, *BIASES), **product | told)
told = dict(PARTS=1, GATED=True, EVEN=True, BLOCK=16)
compiled(layers.product_kernel, 80, (*BIASES, *NEXT, *SUM, "squares", "weight_2"), **product | told)
compiled(layers.scale_kernel, 90, x="*bf16", x_row="i32", norm="*bf16", scaled="*bf16", parts="*fp32", inner="i32",
         groups="i32", WIDTH=1024, GROUP=16)
states = dict.fromkeys("fused cosine sine query_norm key_norm keys values query".split(), "*bf16")
shape = dict(columns="*i64", kv_heads="i32", epsilon="fp32", DIM=128)
compiled(layers.place_kernel, 90, **shape | states)
compiled(layers.place_kernel, 100, ("query_norm", "key_norm"), **shape | states)
numbers = {name: "*i64" for name in "hidden columns told ids length limit most places shift room committed unread tail"
           " text lane drafted accepted ends report".split()}
numbers |= {"done": "*i1", "status": "*i32", "scaling": "fp32", "half": "i32", "frequencies": "*fp32"}
numbers |= dict.fromkeys("rows lanes last window_0 window_1 ids_row gamma tokens_row".split(), "i32")
compiled(rounds.places_kernel, 90, **numbers | dict(most="i64", positions="*i64", LANES=8, WINDOWS=2))
for window in (0, 1):  # none, and one: arguments of 1 are constants where nothing is said against it
    own = rounds.places_kernel
    assert {own.params[own.arg_names.index(f"window_{window}")].do_not_specialize} == {True}
for name in ("rows", "count", "count_1", "count_2"):
    assert layers.product_kernel.params[layers.product_kernel.arg_names.index(name)].do_not_specialize
compiled(rounds.turns_kernel, 90, **numbers | dict(positions="*i64", cosine="*bf16", sine="*bf16", HALF=32))
compiled(rounds.begin_kernel, 90, **numbers)
compiled(rounds.tail_kernel, 90, **numbers | dict(columns="i32", LANES=2))
compiled(rounds.draft_kernel, 90, **numbers | dict(lanes="i32", positions="i64"))
compiled(rounds.commit_kernel, 90, **numbers | dict(columns="i32", PLACES=8, ENDS=64))
compiled(attention.merge_kernel, 90, SPLITS=16, PLACES=16, DIM=128, out="*bf16", masses="*fp32")
"""


# What a multiprocessor must do for a kilobyte of weights while it reads them: products in the tiles they are cut into
PRODUCTS = """
import json
import re
from specdec_fast.triton_kernels.launch_layers import tiles_for

EVEN = {name for name, kind in product.items() if kind == "i32" or str(kind)[0] == "*"} - {"rows"}
UNUSED = ("weight_1", "weight_2")
found = {}
for name, outputs, inner, gated, parts, left_out in (
    ("queries, keys and values", 6144, 4096, False, 3, (*SUM, *NEXT, *BIASES)),
    ("heads", 4096, 4096, False, 1, ("squares", *UNUSED, *BIASES)),
    ("gate and up", 14336, 4096, True, 1, (*SUM, *NEXT, *BIASES, "weight_2")),
    ("many outputs", 8192, 4096, False, 1, (*NEXT, "squares", *UNUSED, *BIASES)),
    ("queries, keys and values of 896", 1152, 896, False, 3, (*SUM, *NEXT)),
    ("gate and up of 896", 4864, 896, True, 1, (*SUM, *NEXT, *BIASES, "weight_2")),
    ("heads of 448", 448, 448, False, 1, ("squares", *UNUSED, *BIASES)),
):
    tiles = tiles_for(outputs, inner, gated)
    assert inner % tiles.depth == 0
    told = dict(PARTS=parts, GATED=gated, EVEN=True, BLOCK=tiles.block, DEPTH=tiles.depth)
    options = dict(num_warps=tiles.warps, num_stages=tiles.stages)
    made = compiled(layers.product_kernel, 90, left_out, options=options, even=EVEN, **product | told)
    lines = made.asm["sass"].splitlines()
    places = {line.split(":")[0].strip(): i for i, line in enumerate(lines) if re.match(r"\\s*\\.?L\\w*:", line)}
    loops = []
    for i, line in enumerate(lines):
        jump = re.search(r"BRA\\S* .*?(\\.?L_?\\w+)", line)
        if jump and places.get(jump[1], i) < i:
            loops.append(lines[places[jump[1]] : i])
    body = max(loops, key=lambda part: sum("LDGSTS" in line for line in part), default=[])
    found[name] = {
        "copies": sum("LDGSTS" in line for line in body),
        "local": sum(bool(re.search(r"\\b(LDL|STL)\\b", line)) for line in lines),
        "slots": len(body) * tiles.warps / 4 / (tiles.block * tiles.depth * (4 if gated else 2) / 1024),
        "shared": made.metadata.shared,
    }
print(json.dumps(found))
"""


def run(script, tmp_path):
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    settings |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    file = tmp_path / "compile_kernels.py"
    file.write_text(script)
    result = subprocess.run([sys.executable, file], env=settings, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_every_kernel_compiles_and_products_keep_up_with_memory(tmp_path):
    """A multiprocessor of an H200 reads a kilobyte in some 55 cycles of each of its four schedulers, and nothing of
    what a product does besides may take a good part of them: the norm of its input did, before it was shared out."""
    found = json.loads(run(SCRIPT + PRODUCTS, tmp_path))
    for name, product in found.items():
        assert product["copies"], f"{name}: no asynchronous copies in a loop"
        assert not product["local"], f"{name}: registers are spilled"
        assert product["slots"] <= 16, f"{name}: {product['slots']:.0f} instruction slots a kilobyte"
        assert product["shared"] <= 72 * 1024, f"{name}: less than three programs a multiprocessor"
