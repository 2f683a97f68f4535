#!/usr/bin/env bash
# C++ tests of the kernels, without Python, torch or a GPU, under AddressSanitizer + UBSan and under ThreadSanitizer.
# Also plants faults and demands that they are caught. Usage: csrc/tests/run.sh [build folder]; exit status 0: all as it should be.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
csrc=$(dirname "$here")
build=${1:-$csrc/../build/csrc-tests}
mkdir -p "$build"
CXX=${CXX:-g++}
flags=(-std=c++17 -O1 -g -fno-omit-frame-pointer -ffp-contract=fast -pthread -Wall -Wextra -Wconversion -Wshadow -Werror -Wno-psabi
       -I"$csrc/include" -I"$csrc/cuda" -I"$csrc/tests")
asan=(-fsanitize=address,undefined -fno-sanitize-recover=all)
tsan=(-fsanitize=thread)
export ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS="halt_on_error=1 exitcode=66"

# ThreadSanitizer needs its shadow where address randomisation may put something else.
still=()
if setarch "$(uname -m)" -R true 2>/dev/null; then still=(setarch "$(uname -m)" -R); fi

compile() { # name sanitizer sources...
    local name=$1 kind=$2
    shift 2
    local -n extra=$kind
    "$CXX" "${flags[@]}" "${extra[@]}" "$@" -o "$build/$name.$kind" -ldl
}

rm -f "$build"/*.asan "$build"/*.tsan  # a stale program must not pass for a new one
limit() { while (($(jobs -rp | wc -l) >= ${JOBS:-2})); do sleep 0.2; done; }
started=()
start() { limit; compile "$@" & started+=($!); }
for kind in asan tsan; do
    start test_krylov_cpu $kind "$here/test_krylov_cpu.cpp" "$csrc/cpu/krylov.cpp"
    start test_krylov_cuda_host $kind "$here/test_krylov_cuda_host.cpp"
    start planted $kind "$here/planted.cpp"
done
for job in "${started[@]}"; do wait "$job" || { echo "FAILED: a test does not compile"; exit 1; }; done

failed=0
pass() { # command...
    if timeout 240 "$@" >"$build/log" 2>&1; then echo "ok      $(basename "${*: -1}")"; else
        failed=1; echo "FAILED  $*"; tail -40 "$build/log"; fi
}
caught() { # expected text, kind, fault
    local status=0
    timeout 120 "${still[@]}" "$build/planted.$2" "$3" >"$build/log" 2>&1 || status=$?
    if ((status != 0)) && grep -q "$1" "$build/log"; then echo "caught  $3 ($2: $1)"; else
        failed=1; echo "MISSED  $3: status $status under $2, expected '$1'"; tail -20 "$build/log"; fi
}
harmless() { # kind, kernel
    if timeout 120 "${still[@]}" "$build/planted.$1" "$2" >"$build/log" 2>&1; then echo "ok      $2 ($1)"; else
        failed=1; echo "FAILED  $2 under $1"; tail -20 "$build/log"; fi
}

pass "$build/test_krylov_cpu.asan"
pass "$build/test_krylov_cuda_host.asan"
pass "${still[@]}" "$build/test_krylov_cpu.tsan"
pass "${still[@]}" "$build/test_krylov_cuda_host.tsan"
for kind in asan tsan; do harmless $kind sound; harmless $kind early_return; done
caught "data race" tsan missing_barrier
caught "data race" tsan shuffle_for_a_barrier
caught "data race" tsan blocks_share_an_output
caught "use-after-poison" asan beyond_shared
caught "heap-buffer-overflow" asan beyond_global
caught "two source lines" asan two_barriers
caught "not in its own mask" asan lane_outside_mask
caught "has returned or does not exist" asan lane_has_returned
caught "a NaN from shared memory" asan uninitialised
exit $failed
