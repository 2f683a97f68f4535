// How the arguments of the dual ops come from Python: an address with its strides, 0 for what is not there.
#pragma once
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

} // namespace fastsharp::bindings
