// Softmax over the columns and the cross-entropy on top of it, for T in {float, double}.
//
//   gradient  p = softmax(z);  g = weight (p - (1 - smoothing) e_target - smoothing / columns)   (null p or g: left out)
//   product   out_k = weight (p u_k - p (p'u_k)), the Hessian of the weighted loss, or with a null weight the Jacobian of softmax
//
// One weight and one target a row. A row of weight zero gives zeros whatever z, u and its target are: its target is not read.
#pragma once
#include "fastsharp/dual_rows.hpp"

namespace fastsharp {

template <class T> struct CrossEntropy {
    const i64* target; // (rows)
    const T* weight;   // (rows), or null: one
    double smoothing;
};

namespace cpu {

template <class T> Status softmax_gradient(Extent e, Rows<const T> z, const CrossEntropy<T>& loss, Rows<T> p, Rows<T> g, int threads);
template <class T> Status softmax_product(Extent e, Rows<const T> p, const T* weight, Rows<const T> u, Rows<T> out, int threads);

} // namespace cpu

namespace cuda {

template <class T> Status softmax_gradient(Extent e, Rows<const T> z, const CrossEntropy<T>& loss, Rows<T> p, Rows<T> g, RowLaunch launch,
                                           int device, void* stream);
template <class T> Status softmax_product(Extent e, Rows<const T> p, const T* weight, Rows<const T> u, Rows<T> out, RowLaunch launch,
                                          int device, void* stream);

} // namespace cuda

} // namespace fastsharp
