// The three fused passes of a Lanczos step, for T in {float, double}. V is (j, n) by rows with stride ldv >= n; w is (n,).
//
//   alpha    out[0] = v'w
//   dots     w <- w - ab[0] V[j-1] - ab[1] V[j-2]  (a zero coefficient skips its term; the second needs j >= 2)
//            out[:j] = V w,  out[j] = w'w
//   update   w <- w - V'c,  out[0] = w'w
//
// Scalars (ab, c, out) are float64 behind pointers of the same device as the vectors: a step needs no synchronisation.
// Nothing is allocated: `work` holds the partial sums, workspace_size() doubles. Arguments are checked by the caller.
#pragma once
#include "fastsharp/status.hpp"
#include "fastsharp/types.hpp"

namespace fastsharp {

namespace cpu {

// Doubles needed by any of the three at this size; alpha and update are the case j = 0.
i64 workspace_size(i64 n, i64 j);

template <class T> Status alpha(const T* v, const T* w, i64 n, double* out, double* work, int threads);
template <class T> Status dots(const T* V, i64 ldv, T* w, const double* ab, i64 j, i64 n, double* out, double* work, int threads);
template <class T> Status update(const T* V, i64 ldv, T* w, const double* c, i64 j, i64 n, double* out, double* work, int threads);

// out[0] = the sum of x: the plain read stream against which the bench measures the other three.
template <class T> Status read_stream(const T* x, i64 n, double* out, double* work, int threads);

} // namespace cpu

namespace cuda {

// Threads and blocks of the first stage. The default is a function of n alone, so that results do not depend on the GPU.
struct LaunchConfig {
    int grid;
    int block; // a multiple of 32

    static LaunchConfig of(i64 n);
};

i64 workspace_size(LaunchConfig config, i64 j);

template <class T> Status alpha(const T* v, const T* w, i64 n, double* out, double* work, LaunchConfig config, int device, void* stream);
template <class T> Status dots(const T* V, i64 ldv, T* w, const double* ab, i64 j, i64 n, double* out, double* work, LaunchConfig config,
                               int device, void* stream);
template <class T> Status update(const T* V, i64 ldv, T* w, const double* c, i64 j, i64 n, double* out, double* work, LaunchConfig config,
                                 int device, void* stream);

} // namespace cuda

} // namespace fastsharp
