#!/usr/bin/env bash
# C++ tests of the kernels, without Python, torch or a GPU, under AddressSanitizer + UBSan and under ThreadSanitizer.
# Also demands that faults are caught: those of planted.cpp, and those that it puts into copies of the CUDA kernels themselves.
# Usage: csrc/tests/run.sh [build folder]; JOBS=N at a time (the number of cores); exit status 0: all as it should be.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
csrc=$(dirname "$here")
build=${1:-$csrc/../build/csrc-tests}
CXX=${CXX:-g++}
flags=(-std=c++17 -g1 -fno-omit-frame-pointer -ffp-contract=fast -pthread -Wall -Wextra -Wconversion -Wshadow -Werror -Wno-psabi
       -I"$csrc/include" -I"$csrc/cuda" -I"$csrc/tests")
asan=(-fsanitize=address,undefined -fno-sanitize-recover=all)
tsan=(-fsanitize=thread)
export ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS="halt_on_error=1 exitcode=66"

# ThreadSanitizer needs its shadow where address randomisation may put something else.
still=()
if setarch "$(uname -m)" -R true 2>/dev/null; then still=(setarch "$(uname -m)" -R); fi

rm -rf "$build"/{objects,mutants,results,programs}  # a stale program must not pass for a new one
mkdir -p "$build"/{objects,mutants,results,programs}
cd "$build"
limit() { while (($(jobs -rp | wc -l) >= ${JOBS:-$(nproc)})); do sleep 0.1; done; }
compile() { # sanitizer, g++ arguments...
    local -n extra=$1
    "$CXX" "${flags[@]}" "${extra[@]}" "${@:2}"
}

# Without optimisation where the time goes into the compiler, and for CUDA kernels into changes of thread, rather than into arithmetic.
declare -A level=([asan]=-O0 [tsan]=-O1) # of the CPU kernels
started=()
start() { limit; compile "$@" & started+=($!); }
for kind in asan tsan; do
    for source in "$csrc"/cpu/*.cpp "$here"/test_{krylov,dual,mlp}_cpu.cpp; do
        start $kind ${level[$kind]} -c "$source" -o "objects/cpu_$(basename "$source" .cpp).$kind.o"
    done
    for source in "$csrc"/cuda/*.cu; do start $kind -O0 -x c++ -c "$source" -o "objects/cuda_$(basename "$source" .cu).$kind.o"; done
    for test in krylov dual mlp; do
        start $kind -O0 -c "$here/test_${test}_cuda_host.cpp" -o objects/host_$test.$kind.o
        start $kind -O0 -DFS_FLOAT_ALONE -c "$here/test_${test}_cuda_host.cpp" -o objects/float_$test.$kind.o
    done
    start $kind -O0 "$here/planted.cpp" -o programs/planted.$kind
done
for job in "${started[@]}"; do wait "$job" || { echo "FAILED: a test does not compile"; exit 1; }; done
for kind in asan tsan; do
    kernels=$(printf '%s\n' objects/cpu_*.$kind.o | grep -v "/cpu_test_")
    # shellcheck disable=SC2086
    for test in krylov dual mlp; do compile $kind $kernels objects/cpu_test_${test}_cpu.$kind.o -o programs/test_${test}_cpu.$kind -ldl; done
    # shellcheck disable=SC2086
    for test in krylov dual mlp; do
        compile $kind objects/cuda_*.$kind.o $kernels objects/host_$test.$kind.o -o programs/test_${test}_cuda_host.$kind -ldl
    done
done

# Every check runs in the background and leaves one file of results; they are shown in order at the end.
count=0
result() { limit; count=$((count + 1)); "$@" >"results/$(printf %03d $count)" 2>&1 & }
program() { if [ "$1" = tsan ]; then "${still[@]}" timeout 240 "${@:2}"; else timeout 240 "${@:2}"; fi; }
pass() { # kind, program, arguments...
    local log
    if log=$(program "$1" "programs/$2.$1" "${@:3}" 2>&1); then echo "ok      ${*:2} ($1)"; else
        echo "FAILED  ${*:2} ($1)"; tail -40 <<<"$log"; fi
}
# ThreadSanitizer sees a race only where the two accesses come close in time, which on a loaded machine a run may miss. So a race
# gets several runs; one that is never seen is said to be so and fails nothing, as long as one race at least was caught.
races=10 # runs of a program with a race
caught() { # expected text, what, kind, command...
    local log status run runs=1
    if [ "$1" = "data race" ]; then runs=$races; fi
    for ((run = 1; run <= runs; run++)); do
        status=0
        log=$(program "$3" "${@:4}" 2>&1) || status=$?
        if ((status != 0)) && grep -q "$1" <<<"$log"; then echo "caught  $2 ($3: $1)"; return; fi
    done
    if [ "$1" = "data race" ]; then echo "unseen  $2 (by chance: no '$1' in $runs runs under $3, status $status)"; return; fi
    echo "MISSED  $2: status $status under $3, expected '$1'"
    tail -20 <<<"$log"
}
planted() { caught "$1" "$3" "$2" "programs/planted.$2" "$3"; } # expected text, kind, fault

# A copy of the CUDA sources in which `sed` made a fault in one file; `unit` is compiled again, for float alone.
mutant() { # what, expected text, kind, unit, file, sed script
    local folder=mutants/${1// /_} source test
    mkdir "$folder"
    cp "$csrc"/cuda/* "$folder"
    sed -i "$6" "$folder/$5"
    if cmp -s "$folder/$5" "$csrc/cuda/$5"; then echo "FAILED  $1: '$6' does not apply to $5"; return; fi
    sed -i -E '/^FS_INSTANTIATE\((double|Half|BFloat16)/d' "$folder/$4.cu"
    compile "$3" -w -O0 -x c++ -c "$folder/$4.cu" -o "$folder/$4.o" || { echo "FAILED  $1: does not compile"; return; }
    test=krylov
    case $4 in dual_*) test=dual ;; mlp) test=mlp ;; esac
    # the mutant comes first, so that its inline functions are the ones linked
    source=$(printf '%s\n' objects/cuda_*."$3".o objects/cpu_*."$3".o | grep -vE "/(cuda_$4|cpu_test_.*)\.")
    # shellcheck disable=SC2086
    compile "$3" "$folder/$4.o" $source objects/float_$test."$3".o -o "$folder/program" -ldl
    caught "$2" "$1" "$3" "$folder/program"
}

for kind in tsan asan; do
    result pass $kind test_krylov_cuda_host
    result pass $kind test_dual_cuda_host
    result pass $kind test_krylov_cpu
    result pass $kind test_dual_cpu
    result pass $kind test_mlp_cpu
    result pass $kind test_mlp_cuda_host
    result pass $kind planted sound
    result pass $kind planted early_return
done
result planted "data race" tsan missing_barrier
result planted "data race" tsan shuffle_for_a_barrier
result planted "data race" tsan blocks_share_an_output
result planted "data race" tsan blocks_share_thread_zero
result planted "use-after-poison" asan beyond_shared
result planted "heap-buffer-overflow" asan beyond_global
result planted "more shared memory" asan too_much_shared
result planted "two source lines" asan two_barriers
result planted "not in its own mask" asan lane_outside_mask
result planted "has returned or does not exist" asan lane_has_returned
result planted "a NaN from shared memory" asan uninitialised
result mutant "dots without its last barrier" "data race" tsan dots dots.cu 's/^    __syncthreads();$//'
result mutant "dots without its first barrier" "data race" tsan dots dots.cu 's/^    __syncthreads(); .*//'
result mutant "blocks of dots share their partial sums" "data race" tsan dots dots.cu 's/gridDim.x + blockIdx.x\]/gridDim.x]/'
result mutant "block sums without a barrier" "data race" tsan alpha reduce.cuh '/block_sums(const/,/^}/s/__syncthreads();//'
result mutant "C in shared memory without a barrier" "data race" tsan combine combine.cu 's/__syncthreads();//'
result mutant "one element beyond a vector" "heap-buffer-overflow" asan dots chunk.cuh 's/i < left ?/i <= left ?/'
result mutant "a short chunk taken for a whole one" "heap-buffer-overflow" asan update chunk.cuh 's/n - start >= kChunk/n - start >= kChunk - 1/'
result mutant "a row beyond the basis" "heap-buffer-overflow" asan update update.cu 's/(r + u < p.j ? r + u : p.j - 1)/(r + u)/'
result mutant "one element beyond shared memory" "use-after-poison" asan combine combine.cu 's/copy\[i\] =/copy[i + 1] =/'
result mutant "packs at any address" "misaligned address" asan update plan.cuh 's/% 16 == 0/% 4 == 0/'
result mutant "w'w of vector 0 for all" "dots\[" asan dots dots.cu 's/square(x\[i\]/square(x[0]/'
result mutant "row sums without the first barrier" "data race" tsan dual_softmax_ce rows.cuh '/row_sums(/,/^}/s/^    __syncthreads();$//'
result mutant "row sums without the last barrier" "data race" tsan dual_softmax_ce rows.cuh '/row_sums(/,/^}/s/^    __syncthreads(); .*//'
result mutant "sums over shares without a barrier" "data race" tsan dual_activation rows.cuh '/add_partials_kernel(/,/^}/s/^        __syncthreads();$//'
result mutant "one share too many" "heap-buffer-overflow" asan dual_norm rows.cuh 's/share < shares \&\&/share <= shares \&\&/'
result mutant "one row too many" "heap-buffer-overflow" asan dual_activation dual_activation.cu 's/< e.rows ? (share + 1) \* each : e.rows/< e.rows ? (share + 1) * each : e.rows + 1/'
result mutant "registers taken for the whole row" "room\[" asan dual_norm rows.cuh 's/e.columns <= kChunk \*/e.columns <= 4 * kChunk */'
result mutant "an ignored row is read" "== gap" asan dual_softmax_ce dual_softmax_ce.cu 's/if (weight == 0)/if (weight < 0)/'
result mutant "a sum that misses its rescaling" "room\[" asan dual_softmax_ce dual_softmax_ce.cu 's/s\[0\] \*= share_of(m, top);$/;/'
result mutant "the second term without its mean" "room\[" asan dual_norm norm_row.cuh 's/ - s.mean - h \* s.along/ - h * s.along/'
result mutant "members share a basis" "got" asan update update.cu 's/p.V + e \* p.V_member/p.V/'
result mutant "a stage written too early" "data race" tsan mlp mlp_gemm.cuh 's/__syncthreads(); \/\/ before the stage.*//'
result mutant "classes summed without a barrier" "data race" tsan mlp mlp.cu '/void loss_hessian(/,/^}/s/^    __syncthreads();$//'
result mutant "columns beyond a layer" "heap-buffer-overflow" asan mlp mlp_gemm.cuh 's/if (row < rows && column < columns)/if (row < rows)/'
result mutant "depth beyond a layer" "heap-buffer-overflow" asan mlp mlp_gemm.cuh 's/ && k + d < term.depth/ || true/'
result mutant "no curvature of the activation" "mlp\[" asan mlp mlp.cu 's/const bool curved = q.curved \&\& !gauss/const bool curved = false/'
result mutant "slabs that overwrite each other" "mlp\[" asan mlp mlp.cu 's/rows.out_slab = q.n/rows.out_slab = 0/'
result mutant "every row by the weights of net 0" "mlp\[" asan mlp mlp.cu 's/rows.theta + e \* q.n/rows.theta/'
wait
cat results/*
if grep -qE "^(FAILED|MISSED)" results/*; then exit 1; fi
grep -q "^caught .*data race" results/* || { echo "FAILED  not one race was seen"; exit 1; }
[ "$(cat results/* | grep -cE "^(ok|caught|unseen)")" = "$count" ]  # none went missing
