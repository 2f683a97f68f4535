// How the dual kernels cut (b, rows, columns): a block to one row of one vector, or a warp to one strip of 256 columns; what they share.
//
// Vectors are the fastest index of the tasks, so the b blocks or warps that meet the same primal row run side by side and find it in L1 or
// L2: memory gives it once, whatever b is, and the bits of a vector do not depend on b. Sums over a row: lanes, warps, in order; sums over
// rows: within a share in order, then shares in a launch of their own. Both cuts are functions of rows and columns alone.
#pragma once
#include <type_traits>

#include "chunk.cuh"
#include "fastsharp/dual_rows.hpp"
#include "plan.cuh"

namespace fastsharp::cuda {

template <class T> __device__ inline T* at(Rows<T> m, i64 k, i64 r) {
    return m.data == nullptr ? nullptr : m.data + k * m.vector + r * m.row;
}
template <class T> __device__ inline T* at(Columns<T> v, i64 k) { return v.data == nullptr ? nullptr : v.data + k * v.vector; }

// f(vector, row) for the rows of this block; all of its threads take every step, so that f may hold barriers.
template <class F> __device__ inline void for_each_row(Extent e, F f) {
    for (i64 task = blockIdx.x; task < e.b * e.rows; task += gridDim.x)
        f(task % e.b, task / e.b);
}

// A thread's place in a row that the block shares.
__device__ inline Place in_row() {
    Place at;
    at.first = at.warp;
    at.step = at.warps;
    return at;
}

// x[i] <- the sum of x[i] over the block, the same bits in every thread. One M to a kernel.
template <int M> __device__ inline void row_sums(double (&x)[M], const Place& at) {
    FS_SHARED(double, s, kBlock / kWarp * M);
    for (int i = 0; i < M; ++i)
        x[i] = warp_sum(x[i]);
    if (at.warps == 1)
        return;
    for (int i = 0; i < M && at.lane == 0; ++i)
        s[at.warp * M + i] = x[i];
    __syncthreads();
    for (int i = 0; i < M; ++i) {
        x[i] = 0;
        for (int warp = 0; warp < at.warps; ++warp)
            x[i] += s[warp * M + i];
    }
    __syncthreads(); // before the next sums are written
}

// f(vector, share of the rows, start, columns left, Part, lane) for the strips of this warp.
template <class T, bool Packed, class F> __device__ inline void for_each_strip(Extent e, i64 shares, F f) {
    const Place at;
    const i64 strips = (e.columns + kChunk - 1) / kChunk;
    for (i64 task = at.first; task < e.b * strips * shares; task += at.step) {
        const i64 k = task % e.b;
        const i64 strip = task / e.b % strips;
        const i64 share = task / e.b / strips;
        at_chunk<T, Packed>(e.columns, strip, [&](i64 start, i64 left, auto part) { f(k, share, start, left, part, at.lane); });
    }
}

// A lane's part of a row of p; `missing` where there is no p.
template <class P, class T> __device__ inline void load(P part, const T* p, i64 start, i64 left, int lane, T missing, T (&x)[kPerLane]) {
    if (p != nullptr) {
        part.load(p + start, left, lane, x);
        return;
    }
    for (int i = 0; i < kPerLane; ++i)
        x[i] = missing;
}

// A lane's sums over a share of the rows.
template <class P> __device__ inline void store(P part, double* p, i64 start, i64 left, int lane, const double (&x)[kPerLane]) {
    for (int i = 0; i < kPerLane; ++i) {
        if (part.has(left, lane, i))
            p[start + part.place(lane, i)] = x[i];
    }
}

// Second stage: out_k += the sum over shares of entries [first, first + columns) of partial (shares, b, width). A block takes 32 columns
// of one vector: its warps the shares in turn, then the warps in order.
template <class T>
__global__ void add_partials_kernel(const double* partial, i64 shares, i64 b, i64 columns, i64 width, i64 first, Columns<T> out) {
    FS_SHARED(double, s, kBlock);
    const Place at;
    const int thread = static_cast<int>(threadIdx.x);
    const i64 groups = (columns + kWarp - 1) / kWarp;
    for (i64 task = blockIdx.x; task < b * groups; task += gridDim.x) {
        const i64 k = task / groups;
        const i64 c = task % groups * kWarp + at.lane;
        double sum = 0;
        for (i64 share = at.warp; share < shares && c < columns; share += at.warps)
            sum += partial[(share * b + k) * width + first + c];
        s[thread] = sum;
        __syncthreads();
        if (at.warp == 0 && c < columns) {
            sum = 0;
            for (int warp = 0; warp < at.warps; ++warp)
                sum += s[warp * kWarp + at.lane];
            T* to = out.data + k * out.vector + c;
            *to = static_cast<T>(static_cast<double>(*to) + sum);
        }
        __syncthreads(); // before the next sums are written
    }
}

inline i64 blocks_for(i64 tasks, RowLaunch launch) { return tasks < launch.grid ? tasks : launch.grid; }
inline i64 row_blocks(Extent e, RowLaunch launch) { return blocks_for(e.b * e.rows, launch); }
inline i64 strip_blocks(Extent e, i64 shares, RowLaunch launch) {
    return blocks_for(ceil_div(e.b * ceil_div(e.columns, kChunk) * shares, launch.strip_block / kWarp), launch);
}

template <class T>
void add_partials(Extent e, const double* partial, i64 width, i64 first, Columns<T> out, RowLaunch launch, void* stream) {
    if (out.data == nullptr)
        return;
    const i64 blocks = blocks_for(e.b * ceil_div(e.columns, kWarp), launch);
    FS_LAUNCH(add_partials_kernel<T>, blocks, 1, launch.strip_block, 0, stream, partial, launch.shares, e.b, e.columns, width, first, out);
}

template <class T> bool aligned(Extent e, Rows<T> m) { return aligned(m.data, e.b, m.vector, e.rows, m.row); }
template <class T> bool aligned(Extent e, Columns<T> v) { return aligned(v.data, e.b, v.vector); }

// True where no lane has more than one chunk of a row: what it has loaded stays in its registers between two sweeps.
inline bool held(Extent e, RowLaunch launch) { return e.columns <= kChunk * (launch.row_block / kWarp); }

// f(true_type or false_type).
template <class F> void with(bool x, F f) {
    if (x)
        f(std::true_type{});
    else
        f(std::false_type{});
}

} // namespace fastsharp::cuda
