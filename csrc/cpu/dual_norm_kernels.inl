// Layer and RMS norm over one row, for one instruction set; see levels.inl.

namespace fastsharp::cpu::FS_LEVEL {

namespace {

#include "registers.inl"

#include "parts.inl"

template <class T> FS_TARGET void prepare_row(const T* x, i64 n, double eps, bool center, double* stats) {
    double mean = 0;
    if (center) {
        Wide s{};
        for (i64 i = 0; i < n; i += kWide)
            s += take(x, i, n);
        mean = sum(s) / static_cast<double>(n);
    }
    Wide s{};
    for (i64 i = 0; i < n; i += kWide) {
        const Wide d = only(take(x, i, n) - mean, n - i, 0);
        s += d * d;
    }
    stats[0] = mean;
    stats[1] = 1 / __builtin_sqrt(sum(s) / static_cast<double>(n) + eps);
}

template <class T> FS_TARGET void tangent_row(const NormRow<T>& f, const T* x_t, const T* w_t, const T* bias_t, T* out, double* sums) {
    const i64 n = f.n;
    Wide s0{}, s1{};
    for (i64 i = 0; i < n; i += kWide) {
        const Wide t = take(x_t, i, n); // zero beyond the row
        s0 += t;
        s1 += (take(f.x, i, n) - f.mean) * t;
    }
    sums[0] = f.center ? sum(s0) / static_cast<double>(n) : 0;
    sums[1] = sum(s1) * f.rstd / static_cast<double>(n);
    if (out == nullptr)
        return;
    for (i64 i = 0; i < n; i += kWide) {
        const Wide h = (take(f.x, i, n) - f.mean) * f.rstd;
        Wide y = (take(x_t, i, n) - sums[0] - h * sums[1]) * f.rstd;
        if (f.w != nullptr)
            y *= take(f.w, i, n);
        if (w_t != nullptr)
            y += take(w_t, i, n) * h;
        if (bias_t != nullptr)
            y += take(bias_t, i, n);
        put(out, i, n, y);
    }
}

template <class T> FS_INLINE Wide weighted(const NormRow<T>& f, i64 i, Wide y) { return f.w == nullptr ? y : y * take(f.w, i, f.n); }

FS_INLINE void add_to(double* sums, i64 i, i64 n, Wide x) { put(sums, i, n, take(sums, i, n) + x); }

// Second: the row of y_g is there.
template <bool Second, class T>
FS_TARGET void adjoint_row(const NormRow<T>& f, const T* y_gt, const SecondRow<T>& s, T* out, double* sums, double* w_sum, double* b_sum) {
    const i64 n = f.n;
    const double size = static_cast<double>(n);
    Wide c0{}, c1{}, c2{};
    for (i64 i = 0; i < n; i += kWide) {
        const Wide h = (take(f.x, i, n) - f.mean) * f.rstd;
        Wide g_t = weighted(f, i, take(y_gt, i, n));
        if constexpr (Second) {
            const Wide y_g = take(s.y_g, i, n);
            if (s.w_t != nullptr)
                g_t += take(s.w_t, i, n) * y_g;
            c2 += weighted(f, i, y_g) * (take(s.x_t, i, n) - s.x_sums[0] - h * s.x_sums[1]);
        }
        c0 += g_t;
        c1 += h * g_t;
    }
    const double mean = f.center ? sum(c0) / size : 0;
    const double along = sum(c1) / size;
    const double cross = sum(c2) * f.rstd / size; // mean(h_t g)
    if (sums != nullptr) {
        sums[0] = mean;
        sums[1] = along;
    }
    for (i64 i = 0; i < n; i += kWide) {
        const Wide h = (take(f.x, i, n) - f.mean) * f.rstd;
        const Wide y_t = take(y_gt, i, n);
        Wide g_t = weighted(f, i, y_t);
        Wide w_gt = y_t * h;
        Wide x_gt;
        if constexpr (Second) {
            const Wide y_g = take(s.y_g, i, n);
            const Wide h_t = (take(s.x_t, i, n) - s.x_sums[0] - h * s.x_sums[1]) * f.rstd;
            if (s.w_t != nullptr)
                g_t += take(s.w_t, i, n) * y_g;
            w_gt += y_g * h_t;
            const Wide projected = weighted(f, i, y_g) - s.g_sums[0] - h * s.g_sums[1];
            x_gt = (g_t - mean - h * (along + cross) - h_t * s.g_sums[1] - projected * (f.rstd * s.x_sums[1])) * f.rstd;
        } else {
            x_gt = (g_t - mean - h * along) * f.rstd;
        }
        if (out != nullptr)
            put(out, i, n, x_gt);
        if (w_sum != nullptr)
            add_to(w_sum, i, n, w_gt);
        if (b_sum != nullptr)
            add_to(b_sum, i, n, y_t);
    }
}

} // namespace

template <class T> inline constexpr NormKernels<T> kNorm{prepare_row<T>, tangent_row<T>, {adjoint_row<false, T>, adjoint_row<true, T>}};

} // namespace fastsharp::cpu::FS_LEVEL
