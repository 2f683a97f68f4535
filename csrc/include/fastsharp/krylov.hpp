// The fused passes of a Krylov method for vectors of T in {float, double} and a basis stored as S: S = T, or half or bfloat16
// under T = float. E members, each with its own basis V (j, n) and b vectors w (b, n).
//
//   alpha    out[e] = v'w
//   dots     w <- w - ab[0] v_j - ab[1] v_{j-1}  (a zero coefficient skips its term; a null v_{j-1} too; null ab: no removal)
//            out[e][i][:j] = V w_i,  out[e][i][j] = w_i'w_i
//   update   w_i <- w_i - V'c_i,  out[e][i] = w_i'w_i,  row <- factor[e] w as S (unless row is null; b = 1 then)
//   combine  X = C V for C (k, j): the sum in double, rounded once
//   probes   random vector first + i in row i, Philox-4x32-10; the definition stands in fastsharp/ops/krylov.py
//
// Scalars (ab, c, factor, out, C) are float64 behind pointers of the same device as the vectors: a step needs no
// synchronisation. Nothing is allocated: `work` holds the partial sums, workspace_size() doubles. Arguments are checked by the
// caller. Strides count elements; members and rows may lie in any order that keeps them apart.
#pragma once
#include "fastsharp/status.hpp"
#include "fastsharp/types.hpp"

namespace fastsharp {

template <class T> struct Vectors { // v[e] = data + e * member, each of n elements; a null pointer: not there
    T* data = nullptr;
    i64 member = 0;
};

template <class S, class T> struct Problem {
    i64 E, b, j, n;
    const S* V; // (E, j, n)
    i64 V_member, V_row;
    T* w; // (E, b, n)
    i64 w_member, w_row;
};

template <class T> struct Removed { // what dots takes off first; null ab: nothing
    const double* ab = nullptr;     // (E, 2)
    i64 ab_member = 0;
    Vectors<const T> last, before; // v_j and v_{j-1}
};

template <class T> struct Scalars { // (E, b, width) doubles, the last dimension contiguous
    T* data;
    i64 member, row;
};

template <class S> struct NextRow {
    S* data = nullptr; // (E, n)
    i64 member = 0;
    const double* factor = nullptr; // (E)
    i64 factor_member = 0;
};

enum class Kind : int { rademacher = 0, normal = 1 };

namespace cpu {

// Doubles that `work` must hold for any of the ops at this size; alpha and update are the case j = 0.
i64 workspace_size(i64 E, i64 b, i64 n, i64 j);

template <class T> Status alpha(i64 E, i64 n, Vectors<const T> v, Vectors<const T> w, Vectors<double> out, double* work, int threads);
template <class S, class T> Status dots(const Problem<S, T>& p, const Removed<T>& removed, Scalars<double> out, double* work, int threads);
template <class S, class T>
Status update(const Problem<S, T>& p, Scalars<const double> c, const NextRow<S>& row, Scalars<double> out, double* work, int threads);
template <class S, class T> Status combine(const double* C, i64 ldc, i64 k, const S* V, i64 ldv, i64 j, i64 n, T* X, i64 ldx, int threads);
template <class T> Status probes(Kind kind, std::uint64_t seed, i64 first, T* out, i64 ldo, i64 b, i64 n, int threads);

// out[0] = the sum of x: the plain read stream against which the bench measures the others.
template <class T> Status read_stream(const T* x, i64 n, double* out, double* work, int threads);

} // namespace cpu

namespace cuda {

// Threads and blocks of the first stage. The default is a function of n alone, so that results do not depend on the GPU.
struct LaunchConfig {
    int grid;
    int block;           // a multiple of 32
    int members = 65535; // of an ensemble in one launch: the limit of gridDim.y

    static LaunchConfig of(i64 n);
};

i64 workspace_size(LaunchConfig config, i64 E, i64 b, i64 j);

template <class T> Status alpha(i64 E, i64 n, Vectors<const T> v, Vectors<const T> w, Vectors<double> out, double* work,
                                LaunchConfig config, int device, void* stream);
template <class S, class T> Status dots(const Problem<S, T>& p, const Removed<T>& removed, Scalars<double> out, double* work,
                                        LaunchConfig config, int device, void* stream);
template <class S, class T> Status update(const Problem<S, T>& p, Scalars<const double> c, const NextRow<S>& row, Scalars<double> out,
                                          double* work, LaunchConfig config, int device, void* stream);
template <class S, class T> Status combine(const double* C, i64 ldc, i64 k, const S* V, i64 ldv, i64 j, i64 n, T* X, i64 ldx,
                                           LaunchConfig config, int device, void* stream);
template <class T>
Status probes(Kind kind, std::uint64_t seed, i64 first, T* out, i64 ldo, i64 b, i64 n, LaunchConfig config, int device, void* stream);

} // namespace cuda

} // namespace fastsharp
