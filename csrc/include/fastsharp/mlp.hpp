// The Hessian-vector product of fully connected nets in one call: z_l = W_l a_{l-1} + b_l, a_l = phi(z_l), l = 1..L, loss(z_L).
//
// Only tangents are computed (a dot above), from what a primal pass has left in the cache:
//   forward    z'_l = V_l a_{l-1} + W_l a'_{l-1} + v_l,   a'_l = phi'(z_l) z'_l
//   loss       y'_L = w H_loss(z_L) z'_L                  cross-entropy: p (u - p.u), squared error: u, for u = z'_L
//   backward   row of W_l: y'_l a_{l-1}' + y_l a'_{l-1}', of b_l: y'_l, both summed over samples
//              y'_{l-1} = phi'(z_{l-1}) (W_l' y'_l + V_l' y_l) + c_{l-1} z'_{l-1},   c = phi''(z) W' y
// with y_l the adjoint of z_l. The Gauss-Newton product leaves out the terms with y and c.
//
// Sample weights w are part of y and of the loss Hessian. Row r of V and out belongs to the net number `member[r]` of E nets, each with
// its own weights and data; b vectors of one net are b rows of the same number.
//
// A unit of ReLU that is off for all samples of a tile has a_l = phi' = y_l = 0 there: it drops out of every sum of that tile, exactly.
// So a tile names the units that take part, `counts[l]` of them in layer l, and its arrays hold those alone, in the order of `units`.
// Which samples share a tile is the caller's choice; where samples with like patterns do, two thirds of the work may go.
//
// Cache of one net, tile after tile of kSamples<T> samples (the last one filled up with zeros), each tile in this order:
//   a_l (d_l, kSamples), then its transpose (kSamples, padded<T>(d_l)), for l = 0..L-1; zero behind the units that take part
//   phi'(z_l) (d_l, kSamples), l = 1..L-1
//   c_l (d_l, kSamples), l = 1..L-1, where `curved`
//   y_l (d_l, kSamples), l = 1..L
//   p (d_L, kSamples) for cross-entropy
//   w (kSamples)
// Products with samples along the lanes of registers need neither weights nor their tangents transposed. On a GPU the transposes of a_l
// are left out, since a tile passes through shared memory, which turns it; every unit takes part there, `units` and `counts` are not read.
#pragma once
#include "fastsharp/status.hpp"
#include "fastsharp/types.hpp"

namespace fastsharp {

constexpr int kMostLayers = 32;

template <class T> inline constexpr i64 kSamples = 256 / static_cast<i64>(sizeof(T)); // of a tile: four of the widest registers
template <class T> constexpr i64 padded(i64 width) {
    constexpr i64 line = 64 / static_cast<i64>(sizeof(T));
    return ceil_div(width, line) * line;
}

enum class MlpLoss : int { cross_entropy = 0, squared = 1 };

struct MlpShape {
    i64 layers;         // L
    const i64* widths;  // d_0 .. d_L
    const i64* weights; // where W_l (d_l, d_{l-1}) begins in a flat vector, l = 1..L
    const i64* biases;  // and b_l (d_l); -1: none
    bool curved;        // phi'' is not zero
    MlpLoss loss;
    i64 samples; // of each net
    i64 n;       // length of a flat vector
};

template <class T> struct MlpProduct {
    MlpShape shape;
    bool gauss;
    const T* cache;    // (E, tiles, tile size), 64-byte aligned
    const T* theta;    // (E, n)
    const i64* units;  // (E, tiles, d_0 + .. + d_L): those that take part, layer by layer, each layer padded to its width
    const i64* counts; // (E, tiles, L + 1)
    i64 rows;
    const i64* member; // (rows)
    const T* V;        // (rows, n)
    i64 V_row;
    T* out; // (rows, n)
    i64 out_row;
    T scale, divisor; // out = scale (the product) / divisor
};

namespace cpu {

template <class T> i64 mlp_tile_size(const MlpShape& shape);
template <class T> i64 mlp_workspace_size(const MlpShape& shape, i64 rows, int threads);

// A row of V with NaN or Inf gives a row of NaN. The bits depend neither on the thread count nor on the other rows. No allocation: `work`
// has mlp_workspace_size elements.
template <class T> Status mlp_product(const MlpProduct<T>& p, T* work, int threads);

} // namespace cpu

namespace cuda {

struct MlpLaunch {
    int block = 256;          // threads, a multiple of 32, at most 256; the bits do not depend on it
    i64 work = i64{32} << 20; // elements of workspace to be used by many rows: they share launches as far as it lasts
};

template <class T> i64 mlp_tile_size(const MlpShape& shape);
template <class T> i64 mlp_workspace_size(const MlpShape& shape, i64 rows, MlpLaunch config);

// `member`, vectors and cache are on the device; the tables of the shape are on the host. The bits depend neither on the other rows
// nor on `config`.
template <class T> Status mlp_product(const MlpProduct<T>& p, T* work, MlpLaunch config, int device, void* stream);

} // namespace cuda
} // namespace fastsharp
