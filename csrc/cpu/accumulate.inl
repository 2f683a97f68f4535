// acc_k <- acc_k - sum_r c_kr V_r in double for several accumulators at once: the inner loop of update and of combine. Included inside
// the namespace of the level, behind registers.inl.

inline constexpr int kRows = 4; // rows of V per pass over the accumulators

// R rows, B accumulators. `next` is what will be read after them, R rows as well: without the hint every row would begin with the
// latency of memory, since the hardware prefetcher stops at pages. A hint never faults and may lie behind the end.
template <int R, int B, class S>
FS_TARGET void accumulate_rows(const S* V, i64 V_row, const double* c, i64 c_row, double* acc, i64 acc_row, i64 n, const S* next) {
    constexpr i64 kLine = 64 / static_cast<i64>(sizeof(S));
    constexpr i64 kStep = B == 1 ? kLine : 2 * kWide;
    i64 i = 0;
    for (; i + kStep <= n; i += kStep) {
        Wide v[R][kStep / kWide];
        for (int r = 0; r < R; ++r) {
            widen_all<kStep / kWide>(V + r * V_row + i, v[r]);
            if (kStep >= kLine || i % kLine == 0)
                __builtin_prefetch(next + r * V_row + i, 0, 2);
        }
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

// All j rows of a tile; `beyond` is where the next tile begins.
template <int B, class S>
FS_TARGET void accumulate(const S* V, i64 V_row, i64 j, const double* c, i64 c_row, double* acc, i64 acc_row, i64 n, const S* beyond) {
    i64 r = 0;
    for (; r + kRows <= j; r += kRows) {
        const S* next = r + 2 * kRows <= j ? V + (r + kRows) * V_row : beyond;
        accumulate_rows<kRows, B>(V + r * V_row, V_row, c + r, c_row, acc, acc_row, n, next);
    }
    for (; r < j; ++r)
        accumulate_rows<1, B>(V + r * V_row, V_row, c + r, c_row, acc, acc_row, n, V + (r + 1) * V_row);
}
