// alpha, dots and update on one tile, for one instruction set; see levels.inl.

namespace fastsharp::cpu::FS_LEVEL {

namespace {

#include "registers.inl"

#include "accumulate.inl"

template <class T> FS_TARGET double alpha_tile(const T* v, const T* w, i64 n) {
    Wide s0{}, s1{};
    i64 i = 0;
    for (; i + 2 * kWide <= n; i += 2 * kWide) {
        s0 += widen(v + i) * widen(w + i);
        s1 += widen(v + i + kWide) * widen(w + i + kWide);
    }
    double s = sum(s0 + s1);
    for (; i < n; ++i)
        s += one(v[i]) * one(w[i]);
    return s;
}

// w <- w - a v1 - b v2 with K of the two terms present; returns w'w of what was stored.
template <int K, class T> FS_TARGET double remove_terms(T* w, const T* v1, double a, const T* v2, double b, i64 n) {
    for (i64 k = 0; k < n; k += kLine<T>) { // of the next tile
        fetch(w + n + k);
        if constexpr (K >= 1)
            fetch(v1 + n + k);
        if constexpr (K >= 2)
            fetch(v2 + n + k);
    }
    Wide s{};
    i64 i = 0;
    for (; i + kWide <= n; i += kWide) {
        Wide x = widen(w + i);
        if constexpr (K >= 1)
            x -= a * widen(v1 + i);
        if constexpr (K >= 2)
            x -= b * widen(v2 + i);
        if constexpr (K >= 1)
            x = store(w + i, x);
        s += x * x;
    }
    double total = sum(s);
    for (; i < n; ++i) {
        double x = one(w[i]);
        if constexpr (K >= 1)
            x -= a * one(v1[i]);
        if constexpr (K >= 2)
            x -= b * one(v2[i]);
        if constexpr (K >= 1)
            store_one(w + i, x);
        total += one(w[i]) * one(w[i]);
    }
    return total;
}

template <class T> FS_TARGET double remove_tile(T* w, const Terms<T>& t, i64 n) {
    const bool first = t.v1 != nullptr && t.a1 != 0;
    const bool second = t.v2 != nullptr && t.a2 != 0;
    if (first && second)
        return remove_terms<2>(w, t.v1, t.a1, t.v2, t.a2, n);
    if (first)
        return remove_terms<1>(w, t.v1, t.a1, t.v2, t.a2, n);
    if (second)
        return remove_terms<1>(w, t.v2, t.a2, t.v1, t.a1, n);
    return remove_terms<0>(w, t.v1, t.a1, t.v2, t.a2, n);
}

// sums[b R + r] = the products of R rows and B vectors over [i, end), whole registers, in T. Not inlined: beside the sums over all chunks
// compilers would put these into memory.
template <int R, int B, class S, class T> FS_TARGET __attribute__((noinline)) void
dots_chunk(const S* V, i64 V_row, const T* w, i64 w_row, i64 i, i64 end, const Ahead<S, R>& ahead, Vec<T>* sums) {
    Vec<T> acc[B][R];
    FASTSHARP_UNROLL for (int b = 0; b < B; ++b) { FASTSHARP_UNROLL for (int r = 0; r < R; ++r) acc[b][r] = Vec<T>{}; }
    for (; i < end; i += kWidth<T>) {
        Vec<T> v[R];
        FASTSHARP_UNROLL for (int r = 0; r < R; ++r) v[r] = as(V + r * V_row + i, T{});
        if (i % kLine<S> == 0)
            ahead.fetch_line(i);
        FASTSHARP_UNROLL for (int b = 0; b < B; ++b) {
            const auto x = load<Vec<T>>(w + b * w_row + i);
            FASTSHARP_UNROLL for (int r = 0; r < R; ++r) acc[b][r] += v[r] * x;
        }
    }
    FASTSHARP_UNROLL for (int b = 0; b < B; ++b) { FASTSHARP_UNROLL for (int r = 0; r < R; ++r) sums[b * R + r] = acc[b][r]; }
}

// out[b][r] += V[r]'w[b] for R rows from `row` on and B vectors from `vector` on, R B accumulators. Products in T over chunks, chunk sums
// in double; the order of the additions of one pair (r, b) depends neither on R nor on B.
template <int R, int B, class S, class T> FS_TARGET void dots_rows(const Tile<S, T>& t, i64 row, i64 vector, double* out) {
    constexpr i64 W = kWidth<T>;
    const S* V = t.V + row * t.V_row;
    const T* w = t.w + vector * t.w_row;
    const Ahead<S, R> ahead(t.V, t.V_row, t.j, row, t.V + kTile<S>);
    Wide s[B * R] = {};
    const i64 whole = t.n / W * W;
    for (i64 i = 0; i < whole; i += kChunk) {
        Vec<T> sums[B * R];
        dots_chunk<R, B>(V, t.V_row, w, t.w_row, i, whole - i < kChunk ? whole : i + kChunk, ahead, sums);
        for (int k = 0; k < B * R; ++k) {
            T lanes[W];
            __builtin_memcpy(lanes, sums + k, sizeof lanes);
            for (i64 l = 0; l < W; l += kWide)
                s[k] += widen(lanes + l);
        }
    }
    for (int b = 0; b < B; ++b) {
        for (int r = 0; r < R; ++r) {
            double tail = 0;
            for (i64 i = whole; i < t.n; ++i)
                tail += one(V[r * t.V_row + i]) * one(w[b * t.w_row + i]);
            out[(vector + b) * (t.j + 1) + row + r] += sum(s[b * R + r]) + tail;
        }
    }
}

inline constexpr int kAccumulators = FS_BYTES == 64 ? 16 : 8; // of 32 and 16 registers
constexpr int rows_beside(int vectors) { return kAccumulators / vectors < 4 ? kAccumulators / vectors : 4; }

// R rows against all b vectors, in groups of 8, 4, 2, 1: the rows are read from memory once and stay in the first-level cache.
template <int R, class S, class T> FS_TARGET void dots_block(const Tile<S, T>& t, i64 r, double* out) {
    i64 b = 0;
    const auto group = [&](auto size) __attribute__((always_inline)) {
        constexpr int B = decltype(size)::value;
        constexpr int kAtOnce = R < rows_beside(B) ? R : rows_beside(B);
        for (; b + B <= t.b; b += B) {
            for (int k = 0; k < R; k += kAtOnce)
                dots_rows<kAtOnce, B>(t, r + k, b, out);
        }
    };
    group(Size<8>{});
    group(Size<4>{});
    group(Size<2>{});
    group(Size<1>{});
}

template <class S, class T> FS_TARGET void dots_tile(const Tile<S, T>& t, const Terms<T>& terms, double* out) {
    out[t.j] += remove_tile(t.w, terms, t.n);
    for (i64 b = 1; b < t.b; ++b)
        out[b * (t.j + 1) + t.j] += remove_tile(t.w + b * t.w_row, Terms<T>{}, t.n);
    i64 r = 0;
    for (; r + kRows <= t.j; r += kRows)
        dots_block<kRows>(t, r, out);
    for (; r < t.j; ++r)
        dots_block<1>(t, r, out);
}

template <int B, class S, class T>
FS_TARGET void update_vectors(const Tile<S, T>& t, const Coefficients& c, const Next<S>& next, double* out) {
    constexpr i64 kLength = kPiece<B, S>;
    constexpr i64 kApart = kLength + kGap;
    alignas(64) double acc[B * kApart];
    Wide s[B] = {};
    for (i64 start = 0; start < t.n; start += kLength) {
        const i64 n = t.n - start < kLength ? t.n - start : kLength;
        for (int b = 0; b < B; ++b) {
            const T* w = t.w + b * t.w_row + start;
            for (i64 i = 0; i < n; ++i)
                acc[b * kApart + i] = one(w[i]);
        }
        const S* V = t.V + start;
        accumulate<B>(V, t.V_row, t.j, c.data, c.row, acc, kApart, n, V + kLength);
        for (int b = 0; b < B; ++b) {
            T* w = t.w + b * t.w_row + start;
            i64 i = 0;
            for (; i + kWide <= n; i += kWide) {
                const Wide x = store(w + i, widen(acc + b * kApart + i));
                s[b] += x * x;
                if (next.row != nullptr)
                    store(next.row + start + i, next.factor * x);
            }
            for (; i < n; ++i) {
                store_one(w + i, acc[b * kApart + i]);
                if (next.row != nullptr)
                    store_one(next.row + start + i, next.factor * one(w[i]));
            }
        }
    }
    for (int b = 0; b < B; ++b) {
        double total = sum(s[b]);
        for (i64 i = t.n / kWide * kWide; i < t.n; ++i)
            total += one(t.w[b * t.w_row + i]) * one(t.w[b * t.w_row + i]);
        out[b] += total;
    }
}

// The sum of all j terms is kept in double and rounded once. V comes from memory for the first eight vectors and from the
// second-level cache for further ones.
template <class S, class T> FS_TARGET void update_tile(const Tile<S, T>& t, const Coefficients& c, const Next<S>& next, double* out) {
    i64 b = 0;
    const auto group = [&](auto size) __attribute__((always_inline)) {
        constexpr int B = decltype(size)::value;
        for (; b + B <= t.b; b += B)
            update_vectors<B>(Tile<S, T>{t.V, t.V_row, t.w + b * t.w_row, t.w_row, B, t.j, t.n}, Coefficients{c.data + b * c.row, c.row},
                              next, out + b);
    };
    group(Size<8>{});
    group(Size<4>{});
    group(Size<2>{});
    group(Size<1>{});
}

template <class T> FS_TARGET double read_tile(const T* x, i64 n) {
    constexpr i64 W = kWidth<T>;
    Vec<T> s[4] = {};
    i64 i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        for (int k = 0; k < 4; ++k)
            s[k] += load<Vec<T>>(x + i + k * W);
    }
    double total = 0;
    const Vec<T> all = (s[0] + s[1]) + (s[2] + s[3]);
    for (i64 l = 0; l < W; ++l)
        total += static_cast<double>(all[l]);
    for (; i < n; ++i)
        total += static_cast<double>(x[i]);
    return total;
}

} // namespace

template <class T> inline constexpr VectorKernels<T> kVector{alpha_tile<T>, read_tile<T>};
template <class S, class T> inline constexpr BasisKernels<S, T> kBasis{dots_tile<S, T>, update_tile<S, T>};

} // namespace fastsharp::cpu::FS_LEVEL
