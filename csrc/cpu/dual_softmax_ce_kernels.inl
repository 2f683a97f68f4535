// Softmax and cross-entropy over one row, for one instruction set; see levels.inl.

namespace fastsharp::cpu::FS_LEVEL {

namespace {

#include "registers.inl"

#include "elementary.inl"
#include "parts.inl"

constexpr i64 kBlock = 256; // elements between two looks at the maximum

FS_INLINE double largest(Wide x, double least) {
    for (i64 k = 0; k < kWide; ++k)
        least = x[k] > least ? x[k] : least;
    return least;
}

// p = e^(z - m) / S with m and S found in one sweep: where a block raises m, S is scaled down.
template <class T> FS_TARGET void gradient_row(const T* z, i64 n, i64 target, double weight, double smoothing, T* p, T* g) {
    const double low = -__builtin_huge_val();
    double m = low, S = 0;
    for (i64 start = 0; start < n; start += kBlock) {
        const i64 end = n - start < kBlock ? n : start + kBlock;
        Wide top = Wide{} + low;
        for (i64 i = start; i < end; i += kWide) {
            const Wide x = only(take(z, i, end), end - i, low);
            top = choose(x > top, x, top);
        }
        const double before = m;
        m = largest(top, m);
        if (m == low)
            continue;
        if (m > before)
            S *= exponential(Wide{} + (before - m))[0];
        Wide s{};
        for (i64 i = start; i < end; i += kWide)
            s += exponential(only(take(z, i, end), end - i, low) - m);
        S += sum(s);
    }
    const double share = smoothing / static_cast<double>(n);
    for (i64 i = 0; i < n; i += kWide) {
        const Wide x = exponential(take(z, i, n) - m) / S;
        if (p != nullptr)
            put(p, i, n, x);
        if (g != nullptr) {
            Wide d = x - share;
            if (target >= i && target < i + kWide)
                d[target - i] -= 1 - smoothing;
            put(g, i, n, d * weight);
        }
    }
}

template <class T> FS_TARGET void product_row(const T* p, const T* u, double weight, T* out, i64 n) {
    Wide s{};
    for (i64 i = 0; i < n; i += kWide)
        s += take(p, i, n) * take(u, i, n);
    const double along = sum(s);
    for (i64 i = 0; i < n; i += kWide)
        put(out, i, n, weight * take(p, i, n) * (take(u, i, n) - along));
}

} // namespace

template <class T> inline constexpr SoftmaxKernels<T> kSoftmax{gradient_row<T>, product_row<T>};

} // namespace fastsharp::cpu::FS_LEVEL
