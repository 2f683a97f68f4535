// C = X1 Y1 + X2 Y2 with scalars of X broadcast and rows of Y in registers: the one product behind all passes of an MLP. Included inside
// the namespace of the level, behind registers.inl.

inline constexpr int kRowsAtOnce = 6;                   // with kVectors: as many sums as there are registers for
inline constexpr int kVectors = FS_BYTES == 64 ? 4 : 2; // of C in a row
template <class T> inline constexpr i64 kLanes = kWidth<T>;

FS_INLINE i64 entry(const i64* table, i64 k) { return table != nullptr ? table[k] : k; }

// M rows from m0 on, N registers from column j0 on; `columns` of the N registers' lanes are stored.
template <int M, int N, class T>
FS_TARGET void gemm_block(const Sum<T>& s, const T* start, const Target<T>& to, i64 m0, i64 j0, i64 columns) {
    Vec<T> sum[M][N];
    for (int m = 0; m < M; ++m) {
        for (int v = 0; v < N; ++v)
            sum[m][v] = Vec<T>{} + (start != nullptr ? start[entry(s.rows, m0 + m)] : T{0});
    }
    for (int term = 0; term < 2; ++term) {
        const T* X = term == 0 ? s.X1 : s.X2;
        if (X == nullptr)
            break;
        const T* x[M];
        for (int m = 0; m < M; ++m)
            x[m] = X + entry(s.rows, m0 + m) * s.row;
        const T* y = (term == 0 ? s.Y1 : s.Y2) + j0;
        for (i64 k = 0; k < s.depth; ++k, y += s.Y_row) {
            const i64 at = s.columns[k] * s.column;
            Vec<T> row[N];
            for (int v = 0; v < N; ++v)
                row[v] = load<Vec<T>>(y + v * kLanes<T>);
            for (int m = 0; m < M; ++m) {
                const T factor = x[m][at];
                for (int v = 0; v < N; ++v)
                    sum[m][v] += factor * row[v];
            }
        }
    }
    for (int m = 0; m < M; ++m) {
        T* C = to.C + entry(to.rows, m0 + m) * to.row;
        for (int v = 0; v < N; ++v) {
            const i64 j = j0 + v * kLanes<T>, left = columns - v * kLanes<T>;
            if (left >= kLanes<T> && to.columns == nullptr) {
                if (to.add)
                    sum[m][v] += load<Vec<T>>(C + j);
                __builtin_memcpy(C + j, &sum[m][v], sizeof sum[m][v]);
                continue;
            }
            T lanes[kLanes<T>];
            __builtin_memcpy(lanes, &sum[m][v], sizeof lanes);
            for (i64 k = 0; k < kLanes<T> && k < left; ++k) {
                T& c = C[entry(to.columns, j + k)];
                c = to.add ? c + lanes[k] : lanes[k];
            }
        }
    }
}

template <int N, class T> FS_TARGET void gemm_columns(const Sum<T>& s, const T* start, const Target<T>& to, i64 rows, i64 j0, i64 columns) {
    i64 m = 0;
    for (; rows - m >= kRowsAtOnce; m += kRowsAtOnce)
        gemm_block<kRowsAtOnce, N>(s, start, to, m, j0, columns);
    if (rows - m == 5)
        gemm_block<5, N>(s, start, to, m, j0, columns);
    else if (rows - m == 4)
        gemm_block<4, N>(s, start, to, m, j0, columns);
    else if (rows - m == 3)
        gemm_block<3, N>(s, start, to, m, j0, columns);
    else if (rows - m == 2)
        gemm_block<2, N>(s, start, to, m, j0, columns);
    else if (rows - m == 1)
        gemm_block<1, N>(s, start, to, m, j0, columns);
}

// C (rows, columns) = start 1' + the sum, or C += ...; rows of Y may be read up to the next multiple of a register.
template <class T> FS_TARGET void gemm(const Sum<T>& s, const T* start, const Target<T>& to, i64 rows, i64 columns) {
    for (i64 j = 0; j < columns;) {
        const i64 left = columns - j, vectors = ceil_div(left, kLanes<T>);
        if (vectors >= kVectors)
            gemm_columns<kVectors>(s, start, to, rows, j, left);
        else if (vectors == 3 && kVectors > 3)
            gemm_columns<kVectors - 1>(s, start, to, rows, j, left);
        else if (vectors == 2 && kVectors > 2)
            gemm_columns<2>(s, start, to, rows, j, left);
        else
            gemm_columns<1>(s, start, to, rows, j, left);
        j += (vectors < kVectors ? vectors : kVectors) * kLanes<T>;
    }
}
