// X = C V for C (k, j) on a GPU: Ritz vectors. V comes from memory once for all k.
//
// A warp takes a chunk of 256 columns and four combinations, whose sums it holds in registers; the next warp of the block takes the
// next four of the same columns, so that all but the first find the rows in L1. C lies in shared memory where it fits
// (k j <= 6144), else it is read through L1.
// v1  a warp holding eight combinations: 128 registers for the sums alone, so half the warps, and idle sums for the usual k = 5.
// v2  four combinations to a warp, the neighbours sharing columns.      <- this file
//
// Note on numerical properties: every entry of X is a sum over the rows in order, in double, rounded once; the bits do not depend on
// the launch.
#include "chunk.cuh"
#include "plan.cuh"

namespace fastsharp::cuda {

namespace {

constexpr int kTogether = 4;           // combinations of a warp
constexpr i64 kShared = i64{48} << 10; // bytes that any GPU gives to a block unasked

template <class S, class T, bool Packed> __global__ void __launch_bounds__(kBlock, 2)
    combine_kernel(const double* C, i64 ldc, i64 k, const S* V, i64 ldv, i64 j, i64 n, T* X, i64 ldx, bool staged) {
    FS_DYNAMIC_SHARED(double, copy); // (j, k)
    const Place at;
    if (staged) {
        for (i64 i = threadIdx.x; i < k * j; i += blockDim.x)
            copy[i] = C[i % k * ldc + i / k];
        __syncthreads();
    }
    const i64 c_row = staged ? 1 : ldc; // from one combination to the next
    const i64 c_column = staged ? k : 1;
    const i64 groups = (k + kTogether - 1) / kTogether;
    // Task t is group t mod groups of chunk t / groups.
    for (i64 task = at.first; task / groups * kChunk < n; task += at.step) {
        const i64 first = task % groups * kTogether;
        const int count = static_cast<int>(k - first < kTogether ? k - first : kTogether);
        at_chunk<S, Packed>(n, task / groups, [&](i64 start, i64 left, auto part) {
            const double* c = (staged ? copy : C) + first * c_row;
            const S* row = V + start;
            double sum[kTogether][kPerLane] = {};
            for (i64 r = 0; r < j; ++r) {
                T y[kPerLane];
                part.load(row, left, at.lane, y);
                for (int i = 0; i < kTogether; ++i) {
                    if (i < count)
                        subtract(-c[i * c_row], y, sum[i]);
                }
                row += ldv;
                c += c_column;
            }
            for (int i = 0; i < kTogether; ++i) {
                if (i < count)
                    part.store(X + (first + i) * ldx + start, left, at.lane, sum[i]);
            }
        });
    }
}

} // namespace

template <class S, class T> Status combine(const double* C, i64 ldc, i64 k, const S* V, i64 ldv, i64 j, i64 n, T* X, i64 ldx,
                                           LaunchConfig config, int device, void* stream) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess)
        return status_of("combine", guard.error());
    const bool packed = aligned(V, 1, 0, j, ldv) && aligned(X, 1, 0, k, ldx);
    auto kernel = packed ? combine_kernel<S, T, true> : combine_kernel<S, T, false>;
    const i64 bytes = k * j * static_cast<i64>(sizeof(double));
    const bool staged = bytes <= kShared;
    FS_LAUNCH(kernel, config.grid, 1, config.block, staged ? bytes : 0, stream, C, ldc, k, V, ldv, j, n, X, ldx, staged);
    return status_of("combine", cudaGetLastError());
}

#define FS_INSTANTIATE(S, T)                                                                                                               \
    template Status combine<S, T>(const double*, i64, i64, const S*, i64, i64, i64, T*, i64, LaunchConfig, int, void*);
FS_INSTANTIATE(float, float)
FS_INSTANTIATE(double, double)
FS_INSTANTIATE(Half, float)
FS_INSTANTIATE(BFloat16, float)
#undef FS_INSTANTIATE

} // namespace fastsharp::cuda
