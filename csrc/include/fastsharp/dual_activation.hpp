// A pointwise activation y = f(a), a = x + bias, for T in {float, double}: its derivatives once, then its tangent and the tangent of its
// adjoint for b vectors, each in one pass.
//
//   prepare   d1 = f'(x + bias),  d2 = f''(x + bias)                         (a null d2 is left out)
//   tangent   out_k = d1 (x_tk + bias_tk)
//   adjoint   out_k = d1 y_gtk + q a_tk,  bias_gtk += sum over rows of out_k   (q = f'' y_g; a null q or bias_gt is left out)
//
// out may be one of the tangents read. Nothing is allocated: `work` holds the partial sums of bias_gt, activation_workspace() doubles.
#pragma once
#include "fastsharp/dual_rows.hpp"

namespace fastsharp {

// With parameters (p0, p1, p2): relu (slope of the negative half), softplus (beta, threshold), elu (alpha, scale, input scale).
enum class Activation : int { relu = 0, gelu = 1, gelu_tanh = 2, silu = 3, tanh = 4, sigmoid = 5, softplus = 6, elu = 7 };

struct Curve {
    Activation kind;
    double p0, p1, p2;
};

template <class T> bool dense(Extent e, Rows<T> m, bool stack) {
    return m.data == nullptr || ((e.rows == 1 || m.row == e.columns) && (!stack || e.b == 1 || m.vector == e.rows * e.columns));
}

// Without a bias the columns mean nothing: dense rows are one long row, free of short ends.
template <class T> Extent joined(Extent e, const void* bias, Rows<T> primal, Rows<T> second, Rows<T> t, Rows<T> t2, Rows<T> out) {
    const bool whole = bias == nullptr && dense(e, primal, false) && dense(e, second, false) && dense(e, t, true) && dense(e, t2, true) &&
                       dense(e, out, true);
    return whole ? Extent{e.b, 1, e.rows * e.columns} : e;
}

template <class T> Rows<const T> read(Rows<T> m) { return {m.data, m.vector, m.row}; }

namespace cpu {

i64 activation_workspace(Extent e);
template <class T> Status activation_prepare(Curve f, Extent e, Rows<const T> x, const T* bias, Rows<T> d1, Rows<T> d2, int threads);
template <class T>
Status activation_tangent(Extent e, Rows<const T> d1, Rows<const T> x_t, Columns<const T> bias_t, Rows<T> out, int threads);
template <class T> Status activation_adjoint(Extent e, Rows<const T> d1, Rows<const T> y_gt, Rows<const T> q, Rows<const T> a_t,
                                             Rows<T> out, Columns<T> bias_gt, double* work, int threads);

} // namespace cpu

namespace cuda {

i64 activation_workspace(Extent e, RowLaunch launch);
template <class T> Status activation_prepare(Curve f, Extent e, Rows<const T> x, const T* bias, Rows<T> d1, Rows<T> d2, RowLaunch launch,
                                             int device, void* stream);
template <class T> Status activation_tangent(Extent e, Rows<const T> d1, Rows<const T> x_t, Columns<const T> bias_t, Rows<T> out,
                                             RowLaunch launch, int device, void* stream);
template <class T> Status activation_adjoint(Extent e, Rows<const T> d1, Rows<const T> y_gt, Rows<const T> q, Rows<const T> a_t,
                                             Rows<T> out, Columns<T> bias_gt, double* work, RowLaunch launch, int device, void* stream);

} // namespace cuda

} // namespace fastsharp
