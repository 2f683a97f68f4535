// Layer norm (center) and RMS norm over the columns, y = w h + beta with h = (x - m) r, for T in {float, double}.
//
// With P v = v - mean(v) - h mean(h v), s = (mean(x_t), mean(h x_t)), g = w y_g and g_t = w y_gt + w_t y_g, for b vectors:
//   prepare   stats = (m, r) of each row
//   tangent   h_t = r (x_t - s_0 - h s_1),  out = w h_t + w_t h + beta_t;  sums_k = s
//   adjoint   out = r P g_t - r^2 s_1 P g - r (h_t mean(h g) + h mean(h_t g));  sums_k = (mean(g_t), mean(h g_t))
//             weight_gt += sum over rows of y_gt h + y_g h_t,  bias_gt += sum over rows of y_gt
// Without center m and the first mean of every pair are zero. A null y_g leaves J' y_gt alone: that is the adjoint of the primal pass
// for y_gt = y_g, and its sums are the pair (mean(g), mean(h g)) that the full call reads as g_sums.
//
// Null tangents are zero, a null w is one, null outputs are left out. `work` holds the partial sums of the gradients,
// norm_workspace() doubles. Stats and sums are pairs of doubles, (rows, 2) and (b, rows, 2), without gaps.
#pragma once
#include "fastsharp/dual_rows.hpp"

namespace fastsharp {

template <class T> struct Norm { // what does not depend on the vector
    Rows<const T> x;
    const T* w;
    const double* stats;
    bool center;
};

template <class T> struct NormSecond { // what the second term of the adjoint's tangent needs; a null y_g: no second term
    Rows<const T> y_g;
    const double* g_sums;
    Rows<const T> x_t;
    const double* x_sums;
    Columns<const T> w_t;
};

template <class T> struct NormGradients {
    Columns<T> w, bias;
};

namespace cpu {

i64 norm_workspace(Extent e);
template <class T> Status norm_prepare(Extent e, Rows<const T> x, double eps, bool center, double* stats, int threads);
template <class T> Status norm_tangent(Extent e, const Norm<T>& f, Rows<const T> x_t, Columns<const T> w_t, Columns<const T> bias_t,
                                       Rows<T> out, double* sums, int threads);
template <class T> Status norm_adjoint(Extent e, const Norm<T>& f, Rows<const T> y_gt, const NormSecond<T>& second, Rows<T> out,
                                       double* sums, NormGradients<T> gradients, double* work, int threads);

} // namespace cpu

namespace cuda {

i64 norm_workspace(Extent e, RowLaunch launch);
template <class T>
Status norm_prepare(Extent e, Rows<const T> x, double eps, bool center, double* stats, RowLaunch launch, int device, void* stream);
template <class T> Status norm_tangent(Extent e, const Norm<T>& f, Rows<const T> x_t, Columns<const T> w_t, Columns<const T> bias_t,
                                       Rows<T> out, double* sums, RowLaunch launch, int device, void* stream);
template <class T> Status norm_adjoint(Extent e, const Norm<T>& f, Rows<const T> y_gt, const NormSecond<T>& second, Rows<T> out,
                                       double* sums, NormGradients<T> gradients, double* work, RowLaunch launch, int device, void* stream);

} // namespace cuda

} // namespace fastsharp
