// How a net and the rows of a product come from Python.
#pragma once
#include <tuple>

#include "check.hpp"
#include "fastsharp/mlp.hpp"

namespace fastsharp::bindings {

using NetOf = std::tuple<i64, Address, Address, Address, bool, int, i64, i64>; // the fields of MlpShape, tables by address
using MemberRows = std::tuple<i64, Address, Address, i64, Address, i64>;       // rows, member, V with its row stride, out with its own

inline MlpShape shape(NetOf s) {
    const auto [layers, widths, weights, biases, curved, loss, samples, n] = s;
    return {layers, at<const i64>(widths), at<const i64>(weights), at<const i64>(biases), curved, static_cast<MlpLoss>(loss), samples, n};
}

template <class T> MlpProduct<T> product(NetOf net, bool gauss, Address cache, Address theta, MemberRows r) {
    const auto [rows, member, V, V_row, out, out_row] = r;
    return {shape(net), gauss,  at<const T>(cache), at<const T>(theta), rows, at<const i64>(member), at<const T>(V), V_row,
            at<T>(out), out_row};
}

} // namespace fastsharp::bindings
