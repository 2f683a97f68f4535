// C = X1 Y1 + X2 Y2 with scalars of X broadcast and rows of Y in registers: the one product behind all passes of an MLP. Included inside
// the namespace of the level, behind registers.inl.

inline constexpr int kRowsAtOnce = 6;                   // with kVectors: as many sums as there are registers for
inline constexpr int kVectors = FS_BYTES == 64 ? 4 : 2; // of C in a row
template <class T> inline constexpr i64 kLanes = kWidth<T>;

// M rows, N registers; `columns` of the N registers' lanes are stored.
template <int M, int N, class T>
FS_TARGET void gemm_block(const Term<T>& first, const Term<T>& second, const T* start, T* C, i64 ldc, i64 columns, bool add) {
    Vec<T> sum[M][N];
    for (int m = 0; m < M; ++m) {
        for (int v = 0; v < N; ++v)
            sum[m][v] = Vec<T>{} + (start != nullptr ? start[m] : T{0});
    }
    for (const Term<T>* term : {&first, &second}) {
        const T* x = term->X;
        const T* y = term->Y;
        for (i64 k = 0; k < term->depth; ++k, x += term->X_column, y += term->Y_row) {
            Vec<T> row[N];
            for (int v = 0; v < N; ++v)
                row[v] = load<Vec<T>>(y + v * kLanes<T>);
            for (int m = 0; m < M; ++m) {
                const T factor = x[m * term->X_row];
                for (int v = 0; v < N; ++v)
                    sum[m][v] += factor * row[v];
            }
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int v = 0; v < N; ++v) {
            T* to = C + m * ldc + v * kLanes<T>;
            const i64 left = columns - v * kLanes<T>;
            if (left >= kLanes<T>) {
                if (add)
                    sum[m][v] += load<Vec<T>>(to);
                __builtin_memcpy(to, &sum[m][v], sizeof sum[m][v]);
            } else {
                T lanes[kLanes<T>];
                __builtin_memcpy(lanes, &sum[m][v], sizeof lanes);
                for (i64 k = 0; k < left; ++k)
                    to[k] = add ? to[k] + lanes[k] : lanes[k];
            }
        }
    }
}

template <int N, class T>
FS_TARGET void gemm_columns(Term<T> first, Term<T> second, const T* start, T* C, i64 ldc, i64 rows, i64 columns, bool add) {
    for (; rows >= kRowsAtOnce; rows -= kRowsAtOnce) {
        gemm_block<kRowsAtOnce, N>(first, second, start, C, ldc, columns, add);
        first.X += kRowsAtOnce * first.X_row;
        second.X += kRowsAtOnce * second.X_row;
        start = start != nullptr ? start + kRowsAtOnce : nullptr;
        C += kRowsAtOnce * ldc;
    }
    if (rows == 5)
        gemm_block<5, N>(first, second, start, C, ldc, columns, add);
    else if (rows == 4)
        gemm_block<4, N>(first, second, start, C, ldc, columns, add);
    else if (rows == 3)
        gemm_block<3, N>(first, second, start, C, ldc, columns, add);
    else if (rows == 2)
        gemm_block<2, N>(first, second, start, C, ldc, columns, add);
    else if (rows == 1)
        gemm_block<1, N>(first, second, start, C, ldc, columns, add);
}

// C (rows, columns) = start (rows) 1' + X1 Y1 + X2 Y2, or C += ...; rows of Y may be read up to the next multiple of a register.
template <class T> FS_TARGET void gemm(Term<T> first, Term<T> second, const T* start, T* C, i64 ldc, i64 rows, i64 columns, bool add) {
    while (columns > 0) {
        const i64 vectors = ceil_div(columns, kLanes<T>);
        const i64 taken = (vectors < kVectors ? vectors : kVectors) * kLanes<T>;
        const i64 mine = columns < taken ? columns : taken;
        if (vectors >= kVectors)
            gemm_columns<kVectors>(first, second, start, C, ldc, rows, mine, add);
        else if (vectors == 3 && kVectors > 3)
            gemm_columns<kVectors - 1>(first, second, start, C, ldc, rows, mine, add);
        else if (vectors == 2 && kVectors > 2)
            gemm_columns<2>(first, second, start, C, ldc, rows, mine, add);
        else
            gemm_columns<1>(first, second, start, C, ldc, rows, mine, add);
        first.Y += taken;
        second.Y += taken;
        C += taken;
        columns -= mine;
    }
}
