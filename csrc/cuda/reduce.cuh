// Reductions in an order fixed by the launch: butterfly in a warp, warps in order in a block, blocks in order in a second launch.
#pragma once
#include "fastsharp/krylov.hpp"
#include "launch.cuh"

namespace fastsharp::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffU;
constexpr int kBlock = 256; // the most threads of a block

// The sum over the warp, the same bits in every lane: at each level both partners add the same two numbers.
template <class T> __device__ inline T warp_sum(T x) {
    for (int step = kWarp / 2; step > 0; step /= 2)
        x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
}

// M sums over the warp at once, M a power of two: lane l gets the sum of s[l / (32 / M)]. While a lane holds several sums it
// keeps half of them and hands the partner the other half, so M sums take M - 1 + log2(32 / M) shuffles instead of 5 M. The
// tree of additions is warp_sum's, so the bits do not depend on M.
template <int M, int Step = kWarp / 2, class T> __device__ inline T warp_sums(T* s, int lane) {
    if constexpr (Step == 0) {
        return s[0];
    } else if constexpr (M == 1) {
        s[0] += __shfl_xor_sync(kAllLanes, s[0], Step);
        return warp_sums<1, Step / 2>(s, lane);
    } else {
        const bool upper = (lane & Step) != 0;
        for (int i = 0; i < M / 2; ++i) {
            const T keep = upper ? s[i + M / 2] : s[i];
            const T give = upper ? s[i] : s[i + M / 2];
            s[i] = keep + __shfl_xor_sync(kAllLanes, give, Step);
        }
        return warp_sums<M / 2, Step / 2>(s, lane);
    }
}

// partial[i][blockIdx.x] = the sum of x[i] over the block, warps in order; a row of partial has gridDim.x entries.
template <int B> __device__ inline void block_sums(const double (&x)[B], double* partial) {
    FS_SHARED(double, s, kBlock / kWarp * B);
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = 0; i < B; ++i) {
        const double sum = warp_sum(x[i]);
        if (thread % kWarp == 0)
            s[thread / kWarp * B + i] = sum;
    }
    __syncthreads();
    if (thread < B) {
        double total = 0;
        for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp)
            total += s[warp * B + thread];
        partial[static_cast<i64>(thread) * gridDim.x + blockIdx.x] = total;
    }
}

// Second stage, for sum blockIdx.x of member blockIdx.y: thread t adds partials t, t + Block, ...; then a tree over the threads.
// Sum i * width + k of a member goes to out[member][i][k].
template <int Block> __global__ void sum_partials(const double* partial, int count, i64 width, Scalars<double> out) {
    static_assert(Block > 0 && (Block & (Block - 1)) == 0, "the tree halves the block");
    FS_SHARED(double, s, Block);
    const int t = static_cast<int>(threadIdx.x);
    const i64 sum = blockIdx.x;
    const i64 member = blockIdx.y;
    const double* row = partial + (member * gridDim.x + sum) * count;
    double x = 0;
    for (int i = t; i < count; i += Block)
        x += row[i];
    s[t] = x;
    __syncthreads();
    for (int half = Block / 2; half > 0; half /= 2) {
        if (t < half)
            s[t] += s[t + half];
        __syncthreads();
    }
    if (t == 0)
        out.data[member * out.member + sum / width * out.row + sum % width] = s[0];
}

// partial is (E, b * width, config.grid).
inline void second_stage(const double* partial, LaunchConfig config, i64 E, i64 b, i64 width, Scalars<double> out, void* stream) {
    if (config.block < kBlock) { // the emulation runs small blocks
        FS_LAUNCH(sum_partials<kWarp>, b * width, E, kWarp, 0, stream, partial, config.grid, width, out);
    } else {
        FS_LAUNCH(sum_partials<kBlock>, b * width, E, kBlock, 0, stream, partial, config.grid, width, out);
    }
}

} // namespace fastsharp::cuda
