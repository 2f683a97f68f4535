// How a net and the rows of a product come from Python.
#pragma once
#include <tuple>

#include "check.hpp"
#include "fastsharp/mlp.hpp"

namespace fastsharp::bindings {

using NetOf = std::tuple<i64, Address, Address, Address, bool, int, i64, i64>; // the fields of MlpShape, tables by address
using Prepared = std::tuple<Address, Address, Address, Address>;               // cache, theta, units, counts
// rows, member, V with its row stride, out with its own, scale, divisor
using MemberRows = std::tuple<i64, Address, Address, i64, Address, i64, double, double>;

inline MlpShape shape(NetOf s) {
    const auto [layers, widths, weights, biases, curved, loss, samples, n] = s;
    return {layers, at<const i64>(widths), at<const i64>(weights), at<const i64>(biases), curved, static_cast<MlpLoss>(loss), samples, n};
}

template <class T> MlpProduct<T> product(NetOf net, bool gauss, Prepared p, MemberRows r) {
    const auto [cache, theta, units, counts] = p;
    const auto [rows, member, V, V_row, out, out_row, scale, divisor] = r;
    return {shape(net),
            gauss,
            at<const T>(cache),
            at<const T>(theta),
            at<const i64>(units),
            at<const i64>(counts),
            rows,
            at<const i64>(member),
            at<const T>(V),
            V_row,
            at<T>(out),
            out_row,
            static_cast<T>(scale),
            static_cast<T>(divisor)};
}

} // namespace fastsharp::bindings
