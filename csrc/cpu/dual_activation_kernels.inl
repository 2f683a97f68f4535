// The passes of an activation over one row, for one instruction set; see levels.inl.

namespace fastsharp::cpu::FS_LEVEL {

namespace {

#include "registers.inl"

#include "elementary.inl"
#include "parts.inl"

struct Derivatives {
    Wide first, second;
};

FS_INLINE Derivatives derivatives(const Curve& f, Wide a) {
    const Wide zero{}, one_{1.0 - Wide{}};
    switch (f.kind) {
    case Activation::relu:
        return {choose(a > 0.0, one_, zero + f.p0) + (a - a), zero};
    case Activation::gelu: {
        const Wide density = exponential(-0.5 * (a * a)) * 0.39894228040143267794;
        return {gauss(a) + a * density, density * (2.0 - a * a)};
    }
    case Activation::gelu_tanh: {
        constexpr double s = 0.79788456080286535588, k = 0.044715; // sqrt(2 / pi)
        const Wide u1 = s * (1.0 + 3.0 * k * (a * a));
        const Wide v = 2.0 * s * (a + k * (a * a * a)), l = logistic(v), r = logistic(-v);
        const Wide t = l - r;
        const Wide t1 = 4.0 * (l * r) * u1;
        const Wide t2 = 4.0 * (l * r) * (6.0 * s * k * a - 2.0 * t * (u1 * u1));
        return {l + 0.5 * (a * t1), t1 + 0.5 * (a * t2)};
    }
    case Activation::silu: {
        const Wide s = logistic(a), s1 = s * logistic(-a);
        return {s + a * s1, s1 * (2.0 + a * (1.0 - 2.0 * s))};
    }
    case Activation::tanh: {
        const Wide l = logistic(2.0 * a), r = logistic(-2.0 * a);
        const Wide t1 = 4.0 * (l * r);
        return {t1, -2.0 * ((l - r) * t1)};
    }
    case Activation::sigmoid: {
        const Wide s = logistic(a), s1 = s * logistic(-a);
        return {s1, s1 * (1.0 - 2.0 * s)};
    }
    case Activation::softplus: {
        const Signed linear = f.p0 * a > f.p1;
        const Wide s = logistic(f.p0 * a);
        return {choose(linear, one_, s), choose(linear, zero, f.p0 * (s * logistic(-(f.p0 * a))))};
    }
    case Activation::elu: {
        const Wide e = f.p0 * f.p1 * f.p2 * exponential(choose(a > 0.0, zero, f.p2 * a));
        return {choose(a > 0.0, zero + f.p1, e), choose(a > 0.0, zero, f.p2 * e)};
    }
    }
    return {zero, zero};
}

template <class T> FS_TARGET void prepare_row(const Curve& f, const T* x, const T* bias, T* d1, T* d2, i64 n) {
    for (i64 i = 0; i < n; i += kWide) {
        const Derivatives d = derivatives(f, take(x, i, n) + take(bias, i, n));
        put(d1, i, n, d.first);
        if (d2 != nullptr)
            put(d2, i, n, d.second);
    }
}

template <class T> FS_TARGET void tangent_row(const T* d1, const T* x_t, const T* bias_t, T* out, i64 n) {
    i64 i = 0;
    for (; i + kWidth<T> <= n; i += kWidth<T>) {
        Vec<T> a = load<Vec<T>>(x_t + i);
        if (bias_t != nullptr)
            a += load<Vec<T>>(bias_t + i);
        const Vec<T> y = load<Vec<T>>(d1 + i) * a;
        __builtin_memcpy(out + i, &y, sizeof y);
    }
    for (; i < n; ++i)
        out[i] = d1[i] * (bias_t != nullptr ? x_t[i] + bias_t[i] : x_t[i]);
}

// Second: q and a_t are there. Sum: `sum` takes the row.
template <bool Second, bool Sum, class T>
FS_TARGET void adjoint_row(const T* d1, const T* y_gt, const T* q, const T* a_t, T* out, double* sum, i64 n) {
    i64 i = 0;
    for (; i + kWidth<T> <= n; i += kWidth<T>) {
        Vec<T> g = load<Vec<T>>(d1 + i) * load<Vec<T>>(y_gt + i);
        if constexpr (Second)
            g += load<Vec<T>>(q + i) * load<Vec<T>>(a_t + i);
        __builtin_memcpy(out + i, &g, sizeof g);
        if constexpr (Sum) {
            for (i64 k = 0; k < kWidth<T>; k += kWide) {
                const Wide s = load<Wide>(sum + i + k) + widen(out + i + k);
                __builtin_memcpy(sum + i + k, &s, sizeof s);
            }
        }
    }
    for (; i < n; ++i) {
        T g = d1[i] * y_gt[i];
        if constexpr (Second)
            g += q[i] * a_t[i];
        out[i] = g;
        if constexpr (Sum)
            sum[i] += one(g);
    }
}

} // namespace

template <class T> inline constexpr ActivationKernels<T> kActivation{
    prepare_row<T>,
    tangent_row<T>,
    {{adjoint_row<false, false, T>, adjoint_row<false, true, T>}, {adjoint_row<true, false, T>, adjoint_row<true, true, T>}}};

} // namespace fastsharp::cpu::FS_LEVEL
