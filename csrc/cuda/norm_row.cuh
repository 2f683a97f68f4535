// What the lanes of a row have in common in layer and RMS norm.
#pragma once
#include "fastsharp/dual_norm.hpp"
#include "launch.cuh"

namespace fastsharp::cuda {

// The two means along a row; zeros where there are none.
struct Pair {
    double mean = 0, along = 0;

    __device__ Pair(double first, double second) : mean(first), along(second) {}
    __device__ explicit Pair(const double* sums) {
        if (sums != nullptr) {
            mean = sums[0];
            along = sums[1];
        }
    }
};

struct RowStats {
    double mean, rstd, n;

    template <class T> __device__ RowStats(const Norm<T>& f, Extent e, i64 r)
        : mean(f.stats[2 * r]), rstd(f.stats[2 * r + 1]), n(static_cast<double>(e.columns)) {}
    template <class T> __device__ double normalised(T x) const { return (static_cast<double>(x) - mean) * rstd; }
    // The tangent of h for that of x, whose means are s.
    template <class T> __device__ double tangent(double h, T t, Pair s) const {
        return (static_cast<double>(t) - s.mean - h * s.along) * rstd;
    }
};

} // namespace fastsharp::cuda
