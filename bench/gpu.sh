#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under nine minutes:  bash bench/gpu.sh [--quick] [--dry-run]
#
#   --quick     kernel tests, memcheck alone, small benchmarks: about three minutes
#   --dry-run   the halves that need no GPU, to test this script where there is none
#   OUT=DIR     where results go (bench/results/gpu), at most 8 files: environment.txt build.log registers.txt tests.log
#               sanitizer.log bench.json rows.jsonl bench.log
# Needs torch, nvcc, pybind11, ninja, setuptools, numpy, pytest and no network. What else is missing only skips, and is named.
set -uo pipefail
quick=0 dry=0
for argument in "$@"; do
    case $argument in
        --quick) quick=1 ;;
        --dry-run) dry=1 ;;
        -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        *) echo "gpu.sh: unknown argument $argument; see --help" >&2; exit 2 ;;
    esac
done
cd "$(dirname "$0")/.."
out=${OUT:-bench/results/gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=0
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

run() { # title, log file, command...
    local title=$1 log=$out/$2 began=$SECONDS
    shift 2
    echo "=== $title: $*" >>"$log"
    if "$@" >>"$log" 2>&1; then echo "ok      $title ($((SECONDS - began)) s)"; else
        failed=1
        echo "FAILED  $title ($((SECONDS - began)) s), see $(basename "$log")"
        tail -25 "$log"
    fi
}

: >"$out/environment.txt"
: >"$out/build.log"
: >"$out/tests.log"
: >"$out/bench.log"

if ((dry)); then export FASTSHARP_CUDA=${FASTSHARP_CUDA:-0}; else export FASTSHARP_CUDA=1; fi
# the architecture at hand alone: the fat build belongs to a release
if ((!dry)) && [ -z "${FASTSHARP_CUDA_ARCHS:-}" ]; then
    FASTSHARP_CUDA_ARCHS=$(python3 -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
    export FASTSHARP_CUDA_ARCHS
fi
run "build" build.log python3 setup.py build_ext --inplace
# registers, spills and shared memory of every kernel, as ptxas reported them
cat build/native-*/_cuda/*.ptxas.txt >"$out/registers.txt" 2>/dev/null || echo "no report: _cuda was not built" >"$out/registers.txt"
{
    python3 -m fastsharp.cli info
    command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    command -v nvcc >/dev/null && nvcc --version | tail -2
    git rev-parse HEAD 2>/dev/null
} >>"$out/environment.txt" 2>&1
cat "$out/environment.txt"
for rival in curvlinops hessian_eigenthings pyhessian scipy; do
    python3 -c "import $rival" 2>/dev/null || echo "missing $rival: what compares with it is skipped" | tee -a "$out/environment.txt"
done

# pyproject's options name a plugin that a bare machine may lack
pytest=(python3 -m pytest -q -ra -o addopts= -W ignore::pytest.PytestConfigWarning)
if ((quick)); then run "kernel tests" tests.log "${pytest[@]}" tests/ops; else run "tests" tests.log "${pytest[@]}" tests; fi
tail -3 "$out/tests.log"

if ((dry)); then
    echo "skipped compute-sanitizer: --dry-run"
elif ! command -v compute-sanitizer >/dev/null; then
    echo "skipped compute-sanitizer: not on the PATH" | tee "$out/sanitizer.log"
else
    : >"$out/sanitizer.log"
    # torch's caching allocator would hide an overrun inside its blocks
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    tools=(memcheck racecheck initcheck synccheck)
    ((quick)) && tools=(memcheck)
    for tool in "${tools[@]}"; do
        run "compute-sanitizer $tool" sanitizer.log compute-sanitizer --tool "$tool" --error-exitcode 9 "${pytest[@]}" tests/ops -k cuda -x
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
fi

if ((dry)); then export FASTSHARP_BENCH_N=20000 FASTSHARP_BENCH_REPS=1; elif ((quick)); then export FASTSHARP_BENCH_N=1000000; fi
if python3 -c "import pytest_benchmark" 2>/dev/null; then json=(--benchmark-json="$out/bench.json"); else
    echo "missing pytest_benchmark: no bench.json, the rows are written all the same" | tee -a "$out/environment.txt"
    stub=$(mktemp -d)
    trap 'rm -rf "$stub"' EXIT
    cat >"$stub/benchmark_stub.py" <<'PLUGIN'
import pytest


class Stub:
    def __init__(self):
        self.extra_info = {}

    def __call__(self, function, *args, **kwargs):
        return function(*args, **kwargs)

    def pedantic(self, target, args=(), kwargs=None, **options):
        return target(*args, **(kwargs or {}))


@pytest.fixture
def benchmark():
    return Stub()
PLUGIN
    export PYTHONPATH=$stub:$PYTHONPATH
    json=(-p benchmark_stub)
fi
# benchmarks append rows beside themselves: those of this run go into the folder, the recorded ones stay as they were
kept=$(mktemp -d)
cp -r bench/results/. "$kept"
run "benchmarks" bench.log "${pytest[@]}" -s bench/bench_*.py "${json[@]}"
for rows in bench/results/*.jsonl; do
    [ -e "$rows" ] || continue
    before=0
    [ -e "$kept/$(basename "$rows")" ] && before=$(wc -l <"$kept/$(basename "$rows")")
    tail -n +$((before + 1)) "$rows" >>"$out/rows.jsonl"
    if [ -e "$kept/$(basename "$rows")" ]; then cp "$kept/$(basename "$rows")" "$rows"; else rm "$rows"; fi
done
rm -rf "$kept"
grep -E "%|ratio|passed|failed" "$out/bench.log" | tail -40
echo "results: $out ($(find "$out" -maxdepth 1 -type f | wc -l) files)"
exit $failed
