// C = X1 Y1 + X2 Y2 by one block, kDepth of the depth staged in shared memory at a time: the one product behind all passes of an MLP.
#pragma once
#include "fastsharp/mlp.hpp"
#include "reduce.cuh"

namespace fastsharp::cuda {

constexpr int kSide = 16;  // threads along the columns of a product
constexpr int kDepth = 16; // staged at a time
constexpr int kDown = 4;   // rows of a thread
constexpr int kMostRows = kBlock / kSide * kDown;
template <class T> constexpr int kTile = static_cast<int>(kSamples<T>);
template <class T> constexpr int kAcross = kTile<T> / kSide; // columns of a thread
// one more than the staged rows and columns: threads that write a column then meet different banks
constexpr int kX = kMostRows + 1;
template <class T> constexpr int kY = kTile<T> + 1;

template <class T> struct Term { // X (rows, depth), Y (depth, columns), either by two strides
    const T* X = nullptr;
    i64 X_row = 0, X_column = 0;
    const T* Y = nullptr;
    i64 Y_row = 0, Y_column = 0, depth = 0;
};

template <class T> struct Staged {
    T* x; // (kDepth, kX)
    T* y; // (kDepth, kY)
};

// f(r, c, sum) for all entries of X1 Y1 + X2 Y2, each by one thread. What the block wrote before may be read. Positions in a layer are
// ints, which saves registers; addresses are not.
template <class T, class F>
__device__ inline void gemm(const Term<T>& first, const Term<T>& second, i64 rows, i64 columns, Staged<T> s, F f) {
    const int t = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int across = t % kSide, down = t / kSide, lanes = threads / kSide;
    const int height = lanes * kDown;
    for (int r = 0; r < rows; r += height) {
        for (int c = 0; c < columns; c += kTile<T>) {
            T sum[kDown][kAcross<T>] = {};
            for (int which = 0; which < 2; ++which) {
                const Term<T> term = which == 0 ? first : second;
                for (int k = 0; k < term.depth; k += kDepth) {
                    __syncthreads(); // before the stage is written again, and behind the phase before
                    for (int i = t; i < height * kDepth; i += threads) {
                        const int x = term.X_column == 1 ? i / kDepth : i % height; // neighbours read neighbours
                        const int d = term.X_column == 1 ? i % kDepth : i / height;
                        const bool there = r + x < rows && k + d < term.depth;
                        s.x[d * kX + x] = there ? term.X[(r + x) * term.X_row + (k + d) * term.X_column] : T(0);
                    }
                    for (int i = t; i < kTile<T> * kDepth; i += threads) {
                        const int y = term.Y_column == 1 ? i % kTile<T> : i / kDepth;
                        const int d = term.Y_column == 1 ? i / kTile<T> : i % kDepth;
                        const bool there = c + y < columns && k + d < term.depth;
                        s.y[d * kY<T> + y] = there ? term.Y[(k + d) * term.Y_row + (c + y) * term.Y_column] : T(0);
                    }
                    __syncthreads();
                    for (int d = 0; d < kDepth; ++d) {
                        T y[kAcross<T>];
                        for (int j = 0; j < kAcross<T>; ++j)
                            y[j] = s.y[d * kY<T> + across + kSide * j];
                        for (int i = 0; i < kDown; ++i) {
                            const T x = s.x[d * kX + down + lanes * i];
                            for (int j = 0; j < kAcross<T>; ++j)
                                sum[i][j] += x * y[j];
                        }
                    }
                }
            }
            for (int i = 0; i < kDown; ++i) {
                for (int j = 0; j < kAcross<T>; ++j) {
                    const i64 row = r + down + lanes * i, column = c + across + kSide * j;
                    if (row < rows && column < columns)
                        f(row, column, sum[i][j]);
                }
            }
        }
    }
}

} // namespace fastsharp::cuda
