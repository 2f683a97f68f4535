// acc_k <- acc_k - sum_r c_kr V_r in double for several accumulators at once: the inner loop of update and of combine. Included inside
// the namespace of the level, behind registers.inl.

inline constexpr int kRows = 4; // rows of V per pass over the accumulators

template <class S> inline constexpr i64 kLine = 64 / static_cast<i64>(sizeof(S)); // elements of a cache line

// Columns that B accumulators take at a time: 16 KiB of them, half of the first-level cache.
template <int B, class S> inline constexpr i64 kPiece = kTile<S> < 2048 / B ? kTile<S> : 2048 / B;
inline constexpr i64 kGap = 24; // between them: stores to one must not look, modulo a page, like the next one's loads

// To the second-level cache. A hint never faults and may lie behind the end.
FS_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// The R rows that are read after row r of j: without a hint every row would begin with the latency of memory, since the hardware
// prefetcher stops at pages. Behind the last row come the first ones of the next columns, at `beyond`.
template <class S, int R> struct Ahead {
    const S* row[R];

    FS_INLINE Ahead(const S* V, i64 V_row, i64 j, i64 r, const S* beyond) {
        for (int k = 0; k < R; ++k) {
            const i64 next = r + R + k;
            row[k] = next < j ? V + next * V_row : beyond + (next - j) * V_row;
        }
    }
    FS_INLINE void fetch_line(i64 i) const {
        for (int k = 0; k < R; ++k)
            fetch(row[k] + i);
    }
};

// R rows, B accumulators.
template <int R, int B, class S>
FS_TARGET void accumulate_rows(const S* V, i64 V_row, const double* c, i64 c_row, double* acc, i64 acc_row, i64 n, Ahead<S, R> ahead) {
    constexpr i64 kStep = B == 1 ? kLine<S> : 2 * kWide;
    i64 i = 0;
    for (; i + kStep <= n; i += kStep) {
        Wide v[R][kStep / kWide];
        for (int r = 0; r < R; ++r)
            widen_all<kStep / kWide>(V + r * V_row + i, v[r]);
        if (i % kLine<S> == 0)
            ahead.fetch_line(i);
        for (int b = 0; b < B; ++b) {
            Wide x[kStep / kWide];
            __builtin_memcpy(x, acc + b * acc_row + i, sizeof x);
            for (int r = 0; r < R; ++r) {
                for (i64 k = 0; k < kStep / kWide; ++k)
                    x[k] -= c[b * c_row + r] * v[r][k];
            }
            __builtin_memcpy(acc + b * acc_row + i, x, sizeof x);
        }
    }
    for (; i < n; ++i) {
        for (int b = 0; b < B; ++b) {
            for (int r = 0; r < R; ++r)
                acc[b * acc_row + i] -= c[b * c_row + r] * one(V[r * V_row + i]);
        }
    }
}

// All j rows of n columns; `beyond` is where the next columns begin.
template <int B, class S>
FS_TARGET void accumulate(const S* V, i64 V_row, i64 j, const double* c, i64 c_row, double* acc, i64 acc_row, i64 n, const S* beyond) {
    i64 r = 0;
    for (; r + kRows <= j; r += kRows)
        accumulate_rows<kRows, B>(V + r * V_row, V_row, c + r, c_row, acc, acc_row, n, Ahead<S, kRows>(V, V_row, j, r, beyond));
    for (; r < j; ++r)
        accumulate_rows<1, B>(V + r * V_row, V_row, c + r, c_row, acc, acc_row, n, Ahead<S, 1>(V, V_row, j, r, beyond));
}
