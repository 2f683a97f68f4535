// Reductions in an order fixed by the launch: butterfly in a warp, warps in order in a block, blocks in order in a second launch.
#pragma once
#include "fastsharp/types.hpp"
#include "launch.cuh"

namespace fastsharp::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffU;

// The sum over the warp, the same bits in every lane: at each level both partners add the same two numbers.
template <class T> __device__ inline T warp_sum(T x) {
    for (int step = kWarp / 2; step > 0; step /= 2)
        x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
}

// out[k] = sum of partial[k][0 .. count), k = blockIdx.x: thread t adds t, t + 256, ...; then a tree over the threads.
constexpr int kSecondStage = 256;

template <int Block> __global__ void sum_partials(const double* partial, int count, double* out) {
    static_assert(Block > 0 && (Block & (Block - 1)) == 0, "the tree halves the block");
    FS_SHARED(double, s, Block);
    const int t = static_cast<int>(threadIdx.x);
    const double* row = partial + static_cast<i64>(blockIdx.x) * count;
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
        out[blockIdx.x] = s[0];
}

} // namespace fastsharp::cuda
