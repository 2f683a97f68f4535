// combine on one tile, for one instruction set; see levels.inl.

namespace fastsharp::cpu::FS_LEVEL {

namespace {

#include "registers.inl"

#include "accumulate.inl"

template <int B, class S, class T> FS_TARGET void combine_rows(const Tile<S>& t, const double* C, i64 ldc, T* X, i64 ldx) {
    constexpr i64 kLength = kTile<S>;
    alignas(64) double acc[B * kLength];
    for (int b = 0; b < B; ++b) {
        for (i64 i = 0; i < t.n; ++i)
            acc[b * kLength + i] = 0;
    }
    accumulate<B>(t.V, t.V_row, t.j, C, ldc, acc, kLength, t.n, t.V + t.n);
    for (int b = 0; b < B; ++b) {
        i64 i = 0;
        for (; i + kWide <= t.n; i += kWide)
            store(X + b * ldx + i, Wide{} - widen(acc + b * kLength + i));
        for (; i < t.n; ++i)
            store_one(X + b * ldx + i, 0 - acc[b * kLength + i]);
    }
}

// V comes from memory for the first eight combinations and from the second-level cache for the others.
template <class S, class T> FS_TARGET void combine_tile(const Tile<S>& t, const double* C, i64 ldc, i64 k, T* X, i64 ldx) {
    i64 b = 0;
    for (; b + 8 <= k; b += 8)
        combine_rows<8>(t, C + b * ldc, ldc, X + b * ldx, ldx);
    for (; b + 4 <= k; b += 4)
        combine_rows<4>(t, C + b * ldc, ldc, X + b * ldx, ldx);
    for (; b + 2 <= k; b += 2)
        combine_rows<2>(t, C + b * ldc, ldc, X + b * ldx, ldx);
    for (; b < k; ++b)
        combine_rows<1>(t, C + b * ldc, ldc, X + b * ldx, ldx);
}

} // namespace

template <class S, class T> inline constexpr Combine<S, T> kCombine = combine_tile<S, T>;

} // namespace fastsharp::cpu::FS_LEVEL
