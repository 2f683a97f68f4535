// How the arguments of the dual ops come from Python: an address with its strides, 0 for what is not there.
#pragma once
#include <string>
#include <tuple>

#include "check.hpp"
#include "fastsharp/dual_activation.hpp"
#include "fastsharp/dual_norm.hpp"
#include "fastsharp/dual_softmax_ce.hpp"

namespace fastsharp::bindings {

using Matrix = std::tuple<Address, i64>;     // address, row stride
using Stack = std::tuple<Address, i64, i64>; // address, vector stride, row stride
using Vectors = std::tuple<Address, i64>;    // address, vector stride

inline Extent extent(std::tuple<i64, i64, i64> e) { return {std::get<0>(e), std::get<1>(e), std::get<2>(e)}; }
template <class T> Rows<T> rows(Matrix m) { return {at<T>(std::get<0>(m)), 0, std::get<1>(m)}; }
template <class T> Rows<T> stack(Stack s) { return {at<T>(std::get<0>(s)), std::get<1>(s), std::get<2>(s)}; }
template <class T> Columns<T> columns(Vectors v) { return {at<T>(std::get<0>(v)), std::get<1>(v)}; }

using Sizes = std::tuple<i64, i64, i64>;                               // b, rows, columns
using CurveOf = std::tuple<int, double, double, double>;               // kind and parameters
using NormOf = std::tuple<Matrix, Address, Address, bool>;             // x, w, stats, center
using SecondOf = std::tuple<Matrix, Address, Stack, Address, Vectors>; // y_g, g_sums, x_t, x_sums, w_t

inline Curve curve(CurveOf f) { return {static_cast<Activation>(std::get<0>(f)), std::get<1>(f), std::get<2>(f), std::get<3>(f)}; }
template <class T> Norm<T> norm(NormOf f) {
    return {rows<const T>(std::get<0>(f)), at<const T>(std::get<1>(f)), at<const double>(std::get<2>(f)), std::get<3>(f)};
}
template <class T> NormSecond<T> second(SecondOf s) {
    return {rows<const T>(std::get<0>(s)), at<const double>(std::get<1>(s)), stack<const T>(std::get<2>(s)),
            at<const double>(std::get<3>(s)), columns<const T>(std::get<4>(s))};
}

// The ops of one module. Ops names its kernels for T and runs one on the arguments that all modules share; Place... is where it runs:
// threads, or device and stream.
template <class T, class Ops, class... Place> void duals(pybind11::module_& m, const std::string& t) {
    m.def(("activation_prepare_" + t).c_str(),
          [](CurveOf f, Sizes e, Matrix x, Address bias, Matrix d1, Matrix d2, Place... place) {
              check(Ops::run(extent(e), place..., Ops::activation_prepare, curve(f), extent(e), rows<const T>(x), at<const T>(bias),
                             rows<T>(d1), rows<T>(d2)));
          },
          Release());
    m.def(("activation_tangent_" + t).c_str(),
          [](Sizes e, Matrix d1, Stack x_t, Vectors bias_t, Stack out, Place... place) {
              check(Ops::run(extent(e), place..., Ops::activation_tangent, extent(e), rows<const T>(d1), stack<const T>(x_t),
                             columns<const T>(bias_t), stack<T>(out)));
          },
          Release());
    m.def(("activation_adjoint_" + t).c_str(),
          [](Sizes e, Matrix d1, Stack y_gt, Matrix q, Stack a_t, Stack out, Vectors bias_gt, Address work, Place... place) {
              check(Ops::run(extent(e), place..., Ops::activation_adjoint, extent(e), rows<const T>(d1), stack<const T>(y_gt),
                             rows<const T>(q), stack<const T>(a_t), stack<T>(out), columns<T>(bias_gt), at<double>(work)));
          },
          Release());
    m.def(("norm_prepare_" + t).c_str(),
          [](Sizes e, Matrix x, double eps, bool center, Address stats, Place... place) {
              check(Ops::run(extent(e), place..., Ops::norm_prepare, extent(e), rows<const T>(x), eps, center, at<double>(stats)));
          },
          Release());
    m.def(("norm_tangent_" + t).c_str(),
          [](Sizes e, NormOf f, Stack x_t, Vectors w_t, Vectors bias_t, Stack out, Address sums, Place... place) {
              check(Ops::run(extent(e), place..., Ops::norm_tangent, extent(e), norm<T>(f), stack<const T>(x_t), columns<const T>(w_t),
                             columns<const T>(bias_t), stack<T>(out), at<double>(sums)));
          },
          Release());
    m.def(("norm_adjoint_" + t).c_str(),
          [](Sizes e, NormOf f, Stack y_gt, SecondOf s, Stack out, Address sums, Vectors w_gt, Vectors bias_gt, Address work,
             Place... place) {
              check(Ops::run(extent(e), place..., Ops::norm_adjoint, extent(e), norm<T>(f), stack<const T>(y_gt), second<T>(s),
                             stack<T>(out), at<double>(sums), NormGradients<T>{columns<T>(w_gt), columns<T>(bias_gt)}, at<double>(work)));
          },
          Release());
    m.def(("softmax_gradient_" + t).c_str(),
          [](Sizes e, Matrix z, Address target, Address weight, double smoothing, Matrix p, Matrix g, Place... place) {
              check(Ops::run(extent(e), place..., Ops::softmax_gradient, extent(e), rows<const T>(z),
                             CrossEntropy<T>{at<const i64>(target), at<const T>(weight), smoothing}, rows<T>(p), rows<T>(g)));
          },
          Release());
    m.def(("softmax_product_" + t).c_str(),
          [](Sizes e, Matrix p, Address weight, Stack u, Stack out, Place... place) {
              check(Ops::run(extent(e), place..., Ops::softmax_product, extent(e), rows<const T>(p), at<const T>(weight), stack<const T>(u),
                             stack<T>(out)));
          },
          Release());
}

} // namespace fastsharp::bindings
