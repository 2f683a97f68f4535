// combine on the columns of a task, for one instruction set; see levels.inl.

namespace fastsharp::cpu::FS_LEVEL {

namespace {

#include "registers.inl"

#include "accumulate.inl"

#include "stream.inl"

// B rows of X in a piece of n columns.
template <int B, class S, class T> FS_TARGET void combine_rows(const Tile<S>& t, const double* C, i64 ldc, T* X, i64 ldx, bool past) {
    constexpr i64 kLength = kPiece<B, S>;
    constexpr i64 kApart = kLength + kGap;
    alignas(64) double acc[B * kApart];
    for (int b = 0; b < B; ++b) {
        for (i64 i = 0; i < t.n; ++i)
            acc[b * kApart + i] = 0;
    }
    accumulate<B>(t.V, t.V_row, t.j, C, ldc, acc, kApart, t.n, t.V + kLength);
    for (int b = 0; b < B; ++b) {
        alignas(64) T rounded[kLength];
        i64 i = 0;
        for (; i + kWide <= t.n; i += kWide)
            store(rounded + i, Wide{} - widen(acc + b * kApart + i));
        for (; i < t.n; ++i)
            store_one(rounded + i, 0 - acc[b * kApart + i]);
        put_row(X + b * ldx, rounded, t.n, past);
    }
}

// Piece by piece: the rows of one come from memory for the first eight combinations and from the second-level cache for the others.
template <int B, class S, class T>
FS_TARGET void combine_columns(const Tile<S>& t, const double* C, i64 ldc, i64 k, T* X, i64 ldx, bool past) {
    for (i64 i = 0; i < t.n; i += kPiece<B, S>) {
        const Tile<S> piece{t.V + i, t.V_row, t.j, t.n - i < kPiece<B, S> ? t.n - i : kPiece<B, S>};
        i64 b = 0;
        for (; b + B <= k; b += B)
            combine_rows<B>(piece, C + b * ldc, ldc, X + b * ldx + i, ldx, past);
        if constexpr (B > 4) {
            for (; b + 4 <= k; b += 4)
                combine_rows<4>(piece, C + b * ldc, ldc, X + b * ldx + i, ldx, past);
        }
        if constexpr (B > 2) {
            for (; b + 2 <= k; b += 2)
                combine_rows<2>(piece, C + b * ldc, ldc, X + b * ldx + i, ldx, past);
        }
        for (; b < k; ++b)
            combine_rows<1>(piece, C + b * ldc, ldc, X + b * ldx + i, ldx, past);
    }
    FS_STREAMED();
}

template <class S, class T> FS_TARGET void combine_tile(const Tile<S>& t, const double* C, i64 ldc, i64 k, T* X, i64 ldx, bool past) {
    if (k >= 8)
        combine_columns<8>(t, C, ldc, k, X, ldx, past);
    else if (k >= 4)
        combine_columns<4>(t, C, ldc, k, X, ldx, past);
    else if (k >= 2)
        combine_columns<2>(t, C, ldc, k, X, ldx, past);
    else
        combine_columns<1>(t, C, ldc, k, X, ldx, past);
}

} // namespace

template <class S, class T> inline constexpr Combine<S, T> kCombine = combine_tile<S, T>;

} // namespace fastsharp::cpu::FS_LEVEL
