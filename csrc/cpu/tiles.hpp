// How the work is cut: [0, n) into slabs, slabs into tiles, by n alone. A task is a slab of a member; it adds its tiles in order into
// its own slots, and the slots are added in order, so the thread count decides only who computes a slab.
#pragma once
#include "fastsharp/krylov.hpp"
#include "fastsharp/parallel.hpp"
#include "fastsharp/simd.hpp"

namespace fastsharp::cpu {

constexpr i64 kUnit = 2048;  // slabs are whole multiples: every tile but the last of a vector is full
constexpr i64 kSlabs = 1024; // of one vector at most

// Elements that stay in cache while the rows of V stream past: a page of a row where that is possible, since the hardware
// prefetcher stops at pages.
template <class S> inline constexpr i64 kTile = sizeof(S) == 2 ? 2048 : 1024;

constexpr i64 kStreamed = i64{2} << 20; // bytes of a result from which on it is written past the caches

inline i64 slab_length(i64 n) { return kUnit * ceil_div(ceil_div(n, kUnit), kSlabs); }
inline i64 slab_count(i64 n) { return ceil_div(n, slab_length(n)); }

// out[e][b][k] = the sum over tiles of what f(e, start, length, slots) adds to slots[b width + k].
template <class F> void reduce(i64 E, i64 b, i64 n, i64 width, i64 tile, Scalars<double> out, double* work, int threads, F f) {
    const i64 length = slab_length(n);
    const i64 count = slab_count(n);
    const i64 slots = b * width;
    parallel_for(E * count, threads, [=](i64 task) noexcept {
        double* mine = work + task * slots;
        for (i64 k = 0; k < slots; ++k)
            mine[k] = 0;
        const i64 e = task / count;
        const i64 start = (task % count) * length;
        const i64 end = n - start < length ? n : start + length;
        for (i64 i = start; i < end; i += tile)
            f(e, i, end - i < tile ? end - i : tile, mine);
    });
    for (i64 e = 0; e < E; ++e) {
        for (i64 slab = 0; slab < count; ++slab) {
            const double* theirs = work + (e * count + slab) * slots;
            for (i64 i = 0; i < b; ++i) {
                double* sums = out.data + e * out.member + i * out.row;
                for (i64 k = 0; k < width; ++k)
                    sums[k] = slab == 0 ? theirs[i * width + k] : sums[k] + theirs[i * width + k];
            }
        }
    }
}

} // namespace fastsharp::cpu
