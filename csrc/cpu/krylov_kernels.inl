// Kernels of one tile, included by krylov.cpp once per instruction set with
//   FS_LEVEL   namespace        FS_TARGET   target attribute        FS_BYTES   bytes of a vector register
//   FS_TO_DOUBLE(x), FS_TO_FLOAT(x)         conversion of a whole register: compilers split __builtin_convertvector in two
// No include guard on purpose. Nothing here may call an inline function of the standard library: the linker could keep the
// copy compiled for the larger instruction set.

namespace fastsharp::cpu::FS_LEVEL {

#define FS_INLINE FS_TARGET inline __attribute__((always_inline))

// A register of T; HalfFloat has as many floats as a register has doubles. Spelled out per type: the attribute
// is ignored on a template parameter.
using Float = float __attribute__((vector_size(FS_BYTES)));
using HalfFloat = float __attribute__((vector_size(FS_BYTES / 2)));
using Wide = double __attribute__((vector_size(FS_BYTES)));

template <class T> struct Register;
template <> struct Register<float> {
    using Full = Float;
};
template <> struct Register<double> {
    using Full = Wide;
};
template <class T> using Vec = typename Register<T>::Full;

template <class T> inline constexpr i64 kWidth = FS_BYTES / static_cast<i64>(sizeof(T));
inline constexpr i64 kWide = kWidth<double>;

template <class V, class T> FS_INLINE V load(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

FS_INLINE Wide widen(const float* p) { return FS_TO_DOUBLE(load<HalfFloat>(p)); }
FS_INLINE Wide widen(const double* p) { return load<Wide>(p); }

// Rounds to T, stores, and gives back what was stored.
FS_INLINE Wide store(float* p, Wide x) {
    const HalfFloat rounded = FS_TO_FLOAT(x);
    __builtin_memcpy(p, &rounded, sizeof rounded);
    return FS_TO_DOUBLE(rounded);
}
FS_INLINE Wide store(double* p, Wide x) {
    __builtin_memcpy(p, &x, sizeof x);
    return x;
}

FS_INLINE double sum(Wide x) {
    double s = 0;
    for (i64 k = 0; k < kWide; ++k)
        s += x[k];
    return s;
}

template <class T> FS_TARGET double alpha_tile(const T* v, const T* w, i64 n) {
    Wide s0{}, s1{};
    i64 i = 0;
    for (; i + 2 * kWide <= n; i += 2 * kWide) {
        s0 += widen(v + i) * widen(w + i);
        s1 += widen(v + i + kWide) * widen(w + i + kWide);
    }
    double s = sum(s0 + s1);
    for (; i < n; ++i)
        s += static_cast<double>(v[i]) * static_cast<double>(w[i]);
    return s;
}

// w <- w - a v1 - b v2 with K of the two terms present; returns w'w of what was stored.
template <int K, class T> FS_TARGET double remove_tile(T* w, const T* v1, double a, const T* v2, double b, i64 n) {
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
        double x = static_cast<double>(w[i]);
        if constexpr (K >= 1)
            x -= a * static_cast<double>(v1[i]);
        if constexpr (K >= 2)
            x -= b * static_cast<double>(v2[i]);
        if constexpr (K >= 1)
            w[i] = static_cast<T>(x);
        const double stored = static_cast<double>(w[i]);
        total += stored * stored;
    }
    return total;
}

// out[r] += V[r]'w for R rows: one load of w serves all of them. Products in T over chunks, chunk sums in double.
template <int R, class T> FS_TARGET void dots_rows(const T* V, i64 ldv, const T* w, i64 n, double* out) {
    constexpr i64 W = kWidth<T>;
    Wide s[R] = {};
    double tail[R] = {};
    for (i64 i = 0; i < n;) {
        const i64 end = n - i < kChunk ? n : i + kChunk;
        Vec<T> acc[R] = {};
        for (; i + W <= end; i += W) {
            const auto x = load<Vec<T>>(w + i);
            for (int r = 0; r < R; ++r)
                acc[r] += load<Vec<T>>(V + r * ldv + i) * x;
        }
        for (int r = 0; r < R; ++r) {
            T lanes[W];
            __builtin_memcpy(lanes, &acc[r], sizeof lanes);
            for (i64 k = 0; k < W; k += kWide)
                s[r] += widen(lanes + k);
        }
        for (; i < end; ++i) {
            for (int r = 0; r < R; ++r)
                tail[r] += static_cast<double>(V[r * ldv + i]) * static_cast<double>(w[i]);
        }
    }
    for (int r = 0; r < R; ++r)
        out[r] += sum(s[r]) + tail[r];
}

template <class T> FS_TARGET void dots_tile(const T* V, i64 ldv, T* w, double a, double b, i64 j, i64 n, double* out) {
    const T* v1 = V + (j - 1) * ldv;
    const T* v2 = j >= 2 ? v1 - ldv : nullptr;
    if (v2 == nullptr)
        b = 0;
    if (a != 0 && b != 0)
        out[j] += remove_tile<2>(w, v1, a, v2, b, n);
    else if (a != 0)
        out[j] += remove_tile<1>(w, v1, a, v2, b, n);
    else if (b != 0)
        out[j] += remove_tile<1>(w, v2, b, v1, a, n);
    else
        out[j] += remove_tile<0>(w, v1, a, v2, b, n);
    i64 r = 0;
    for (; r + kRows <= j; r += kRows)
        dots_rows<kRows>(V + r * ldv, ldv, w, n, out + r);
    for (; r < j; ++r)
        dots_rows<1>(V + r * ldv, ldv, w, n, out + r);
}

// acc <- acc - sum of R rows. `next` is what will be read after them, R rows as well: without the hint every row would begin
// with the latency of memory, since the hardware prefetcher stops at pages. A hint never faults and may lie behind the end.
template <int R, class T> FS_TARGET void update_rows(const T* V, i64 ldv, const double* c, double* acc, i64 n, const T* next) {
    constexpr i64 kStep = 64 / static_cast<i64>(sizeof(T)); // a cache line of every row
    i64 i = 0;
    for (; i + kStep <= n; i += kStep) {
        Wide x[kStep / kWide];
        __builtin_memcpy(x, acc + i, sizeof x);
        for (int r = 0; r < R; ++r) {
            for (i64 k = 0; k < kStep / kWide; ++k)
                x[k] -= c[r] * widen(V + r * ldv + i + k * kWide);
            __builtin_prefetch(next + r * ldv + i, 0, 2);
        }
        __builtin_memcpy(acc + i, x, sizeof x);
    }
    for (; i < n; ++i) {
        for (int r = 0; r < R; ++r)
            acc[i] -= c[r] * static_cast<double>(V[r * ldv + i]);
    }
}

// n <= kTile. The sum of all j terms is kept in double and rounded once.
template <class T> FS_TARGET double update_tile(const T* V, i64 ldv, T* w, const double* c, i64 j, i64 n) {
    alignas(64) double acc[kTile];
    for (i64 k = 0; k < n; ++k)
        acc[k] = static_cast<double>(w[k]);
    i64 r = 0;
    for (; r + kRows <= j; r += kRows) {
        const T* next = r + 2 * kRows <= j ? V + (r + kRows) * ldv : V + kTile;
        update_rows<kRows>(V + r * ldv, ldv, c + r, acc, n, next);
    }
    for (; r < j; ++r)
        update_rows<1>(V + r * ldv, ldv, c + r, acc, n, V + (r + 1) * ldv);
    Wide s{};
    i64 i = 0;
    for (; i + kWide <= n; i += kWide) {
        const Wide x = store(w + i, widen(acc + i));
        s += x * x;
    }
    double total = sum(s);
    for (; i < n; ++i) {
        w[i] = static_cast<T>(acc[i]);
        total += static_cast<double>(w[i]) * static_cast<double>(w[i]);
    }
    return total;
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
    for (int k = 0; k < 4; ++k) {
        for (i64 l = 0; l < W; ++l)
            total += static_cast<double>(s[k][l]);
    }
    for (; i < n; ++i)
        total += static_cast<double>(x[i]);
    return total;
}

template <class T> inline constexpr Tiles<T> kTiles{alpha_tile<T>, dots_tile<T>, update_tile<T>, read_tile<T>};

#undef FS_INLINE

} // namespace fastsharp::cpu::FS_LEVEL
