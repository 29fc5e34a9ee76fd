#!/usr/bin/env bash
# Everything a GPU must show, in steps of less than ten minutes; what was done is kept and gone on from.
#
#     benchmarks/gpu.sh build OUT      the package for this GPU, in build/gpu
#     benchmarks/gpu.sh test OUT       the tests that need a GPU; small shapes under compute-sanitizer
#     benchmarks/gpu.sh kernels OUT    first measurements, then the microbenchmarks
#     benchmarks/gpu.sh e2e OUT        whole generations on models of real shapes
#     benchmarks/gpu.sh sources OUT    encoder-decoder models of real shapes
#     benchmarks/gpu.sh quick OUT      of each a little, without inductor: what four minutes allow
#
# SPECDEC_FAST_LAYERS=plain or fused runs decoder layers so in e2e and quick; by default the faster of both is taken.
#
# Each writes small JSON and text files into OUT, at most 10 in all, and prints a summary. Repeat a step until it says
# that nothing is left. Needs Python with torch and transformers (PYTHON names it), nothing of the network, nothing
# outside the repository. Supported from Python 3.12, torch 2.11+cu130, triton 3.6, transformers 5.17 on.
#
# build/peers/{vllm,sglang,flashinfer}, where they are there, are measured as well. SPECDEC_FAST_DEVICE=cpu tries the
# steps themselves on a machine without a GPU, in small. SPECDEC_FAST_WORK takes the place of build/gpu.
set -uo pipefail

usage() {
    sed -n '2,13s/^# \{0,1\}//p' "$0"
    exit 2
}
[ $# -eq 2 ] || usage
step=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit 1

export SPECDEC_FAST_DEVICE=${SPECDEC_FAST_DEVICE:-cuda}
export SPECDEC_FAST_WORK=${SPECDEC_FAST_WORK:-$root/build/gpu}
python=${PYTHON:-python3}
mkdir -p "$SPECDEC_FAST_WORK/tmp"
# Nothing is written outside the work folder, and the checkout does not hide the built package
export TMPDIR=$SPECDEC_FAST_WORK/tmp TRITON_CACHE_DIR=$SPECDEC_FAST_WORK/triton
export TORCHINDUCTOR_CACHE_DIR=$SPECDEC_FAST_WORK/inductor PYTHONPATH=$SPECDEC_FAST_WORK/lib PYTHONSAFEPATH=1
export PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
began=$SECONDS
failed=0

# run SECONDS COMMAND...: stops it in time, and notes a failure
run() {
    local limit=$1 code=0
    shift
    timeout --kill-after=10 "$limit" "$@" || code=$?
    if [ "$code" -ne 0 ]; then
        echo "exit status $code: $*" | tail -c 300
        failed=1
    fi
    return "$code"
}

left() { # seconds of this step's 580
    echo $((580 - SECONDS + began))
}

minutes() { # for a command that ends by itself, with a minute to spare
    local whole=$(($(left) / 60 - 1))
    echo $((whole > 1 ? whole : 1))
}

built() {
    if [ ! -d "$SPECDEC_FAST_WORK/lib/specdec_fast" ]; then
        echo "nothing is built yet: benchmarks/gpu.sh build $out" >&2
        exit 1
    fi
}

step_build() {
    run 60 "$python" benchmarks/gpu.py environment "$out" || exit 1
    run "$(left)" "$python" benchmarks/gpu.py build "$out"
}

suite() {
    local tests=()
    if [ "$SPECDEC_FAST_DEVICE" = cpu ]; then
        tests=(tests/test_ops_maps.py -k views)
    else
        for file in tests/test_cuda_device.py tests/test_triton*.py tests/test_ops_*.py tests/test_attention*.py \
            tests/test_fused*.py tests/test_round_ops.py tests/test_static*.py tests/test_dispatch.py; do
            [ -e "$file" ] && tests+=("$file")
        done
    fi
    run 300 "$python" -m pytest -q -p no:cacheprovider "${tests[@]}" 2>&1 | tail -n 30
    return "${PIPESTATUS[0]}"
}

# sanitize TOOL: small shapes under compute-sanitizer, or why the machine does not allow it
sanitize() {
    local log=$SPECDEC_FAST_WORK/sanitizer.log code=0
    timeout --kill-after=10 90 "$sanitizer" --tool "$1" --error-exitcode 9 --print-limit 5 \
        "$python" benchmarks/gpu.py check >"$log" 2>&1 || code=$?
    if grep -q "ERROR SUMMARY: 0 errors\|RACECHECK SUMMARY: 0 hazards" "$log" && [ "$code" -eq 0 ]; then
        echo "compute-sanitizer $1: clean"
    elif [ "$code" -eq 9 ] || grep -q "ERROR SUMMARY: [1-9]\|hazards displayed" "$log"; then
        echo "compute-sanitizer $1: ERRORS"
        grep "=====" "$log" | head -n 12
        failed=1
    elif [ "$code" -eq 124 ]; then
        echo "compute-sanitizer $1: not done in 90 s"
    else
        echo "compute-sanitizer $1: the machine refuses it: $(grep -m1 -i "error\|not supported\|unable\|denied" "$log")"
    fi
}

step_test() {
    built
    {
        if "$python" -c "import pytest" 2>/dev/null; then
            suite || failed=1
        else
            echo "pytest is not installed: no test suite, only the check of small shapes"
        fi
        run 120 "$python" benchmarks/gpu.py check || failed=1
        sanitizer=$("$python" -c "import json; print(json.load(open('$out/environment.json'))['compute_sanitizer'] or '')")
        if [ "$SPECDEC_FAST_DEVICE" = cpu ]; then
            echo "compute-sanitizer: no CUDA device"
        elif [ -z "$sanitizer" ]; then
            echo "compute-sanitizer: not there"
        else
            for tool in memcheck racecheck; do
                [ "$(left)" -gt 95 ] && sanitize "$tool"
            done
        fi
        [ "$failed" -eq 0 ] && echo "test: green" || echo "test: RED"
    } >"$out/tests.txt" 2>&1
    cat "$out/tests.txt"
    grep -q "^test: green" "$out/tests.txt" || failed=1
}

step_kernels() {
    built
    local peers=() name shape
    for name in vllm sglang flashinfer; do
        [ -d "build/peers/$name" ] && peers+=("--$name" "$root/build/peers/$name")
    done
    if ! grep -q '"copy_gig\|"skipped' "$out/first.json" 2>/dev/null; then
        run 120 "$python" benchmarks/gpu.py first "$out"
    fi
    local bench=("$python" -m specdec_fast.cli bench kernels --device "$SPECDEC_FAST_DEVICE" --resume
        --json "$out/kernels.json" --markdown "$out/kernels.md" "${peers[@]}")
    if [ "$SPECDEC_FAST_DEVICE" = cpu ]; then
        run 120 "${bench[@]}" --op project --vocab 500 --batch 2 --repetitions 2 --no-compiled >/dev/null
        return
    fi
    # The compiled reference takes seconds a shape: at the usual ones alone
    shape=(--vocab 151936 --gamma 4 --batch 1 --batch 8 --batch 64)
    run "$(left)" "${bench[@]}" "${shape[@]}" --compiled --minutes 2 >/dev/null
    run "$(left)" "${bench[@]}" --no-compiled --minutes "$(minutes)" >"$SPECDEC_FAST_WORK/kernels.log"
}

step_e2e() {
    built
    run "$(left)" env PYTHONPATH="$PYTHONPATH:$root/benchmarks" "$python" benchmarks/end_to_end.py --device "$SPECDEC_FAST_DEVICE" --work "$SPECDEC_FAST_WORK" \
        --minutes "$(minutes)" --json "$out/e2e.json"
}

step_sources() {
    built
    local kind small=()
    [ "$SPECDEC_FAST_DEVICE" = cpu ] && small=(--small --repetitions 1 --tokens 4 --rows 1)
    for kind in whisper t5; do
        run 280 env PYTHONPATH="$PYTHONPATH:$root/benchmarks" "$python" benchmarks/source_passes.py --kind "$kind" \
            --device "$SPECDEC_FAST_DEVICE" "${small[@]}" --json "$out/sources_$kind.json"
    done
}

step_quick() {
    built
    run "$(left)" env PYTHONPATH="$PYTHONPATH:$root/benchmarks" "$python" benchmarks/gpu_quick.py \
        --work "$SPECDEC_FAST_WORK/small_pair" --minutes "$(minutes)" --json "$out/quick.json"
}

case $step in
build) step_build ;;
test) step_test ;;
kernels) step_kernels ;;
e2e) step_e2e ;;
sources) step_sources ;;
quick) step_quick ;;
*) usage ;;
esac
"$python" benchmarks/gpu.py summary "$out" || failed=1
verdict="done"
[ "$failed" -eq 0 ] || verdict=FAILED
echo "$step: $verdict in $((SECONDS - began)) s"
exit "$failed"
