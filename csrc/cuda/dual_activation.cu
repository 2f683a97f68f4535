// Activations on a GPU: derivatives once, then tangent and tangent of the adjoint for b vectors. Limited by memory: 1 + 2b matrices
// forward, 2 + 3b back.
//
// v1  torch's kernels one by one: a product and an addcmul, 3 + 5b matrices back, and a pass more for the bias.
// v2  one pass: a warp to a strip of 256 columns of one row and vector, loads of 16 bytes; the vectors of a strip side by side, so that d1
//     and q come from L1. With a bias gradient a warp goes down its share of the rows and keeps the strip's sums.      <- this file
// Where nothing belongs to columns and rows are dense, the matrix is one long row.
//
// Note on numerical properties: derivatives are computed in double and rounded once to T; a tangent is one product, the tangent of an
// adjoint a product and a fused one on top of it, in T. The bias gradient is summed in double, from what was stored. No atomics: the bits
// depend on neither b, alignment nor the GPU.
#include "fastsharp/dual_activation.hpp"

#include "rows.cuh"

namespace fastsharp::cuda {

namespace {

struct Derivatives {
    double first, second;
};

__device__ inline double logistic(double x) { return 1 / (1 + exp(-x)); }

__device__ inline Derivatives derivatives(const Curve& f, double a) {
    switch (f.kind) {
    case Activation::relu:
        return {(a > 0 ? 1 : f.p0) + (a - a), 0};
    case Activation::gelu: {
        const double density = exp(-0.5 * (a * a)) * 0.39894228040143267794;
        return {0.5 * erfc(-a * 0.70710678118654752440) + a * density, density * (2 - a * a)};
    }
    case Activation::gelu_tanh: {
        constexpr double s = 0.79788456080286535588; // sqrt(2 / pi)
        constexpr double k = 0.044715;
        const double u1 = s * (1 + 3 * k * (a * a));
        const double v = 2 * s * (a + k * (a * a * a));
        const double l = logistic(v);
        const double r = logistic(-v);
        const double t1 = 4 * (l * r) * u1;
        const double t2 = 4 * (l * r) * (6 * s * k * a - 2 * (l - r) * (u1 * u1));
        return {l + 0.5 * (a * t1), t1 + 0.5 * (a * t2)};
    }
    case Activation::silu: {
        const double s = logistic(a);
        const double s1 = s * logistic(-a);
        return {s + a * s1, s1 * (2 + a * (1 - 2 * s))};
    }
    case Activation::tanh: {
        const double l = logistic(2 * a);
        const double r = logistic(-2 * a);
        const double t1 = 4 * (l * r);
        return {t1, -2 * ((l - r) * t1)};
    }
    case Activation::sigmoid: {
        const double s = logistic(a);
        const double s1 = s * logistic(-a);
        return {s1, s1 * (1 - 2 * s)};
    }
    case Activation::softplus: {
        const double v = f.p0 * a;
        if (v > f.p1)
            return {1, 0};
        const double s = logistic(v);
        return {s, f.p0 * (s * logistic(-v))};
    }
    case Activation::elu: {
        if (a > 0)
            return {f.p1, 0};
        const double e = f.p0 * f.p1 * f.p2 * exp(f.p2 * a);
        return {e, f.p2 * e};
    }
    }
    return {0, 0};
}

// Once for all products: without the variant for whole packs.
template <class T> __global__ void __launch_bounds__(kBlock, 1)
    prepare_kernel(Curve f, Extent e, Rows<const T> x, const T* bias, Rows<T> d1, Rows<T> d2) {
    for_each_strip<T, false>(e, e.rows, [&](i64, i64 r, i64 start, i64 left, auto part, int lane) {
        T a[kPerLane];
        T c[kPerLane];
        part.load(at(x, 0, r) + start, left, lane, a);
        load(part, bias, start, left, lane, T(0), c);
        double first[kPerLane];
        double second[kPerLane];
        for (int i = 0; i < kPerLane; ++i) {
            const Derivatives d = derivatives(f, static_cast<double>(a[i]) + static_cast<double>(c[i]));
            first[i] = d.first;
            second[i] = d.second;
        }
        part.store(at(d1, 0, r) + start, left, lane, first);
        if (d2.data != nullptr)
            part.store(at(d2, 0, r) + start, left, lane, second);
    });
}

template <class T, bool Packed> __global__ void __launch_bounds__(kBlock, 1)
    tangent_kernel(Extent e, Rows<const T> d1, Rows<const T> x_t, Columns<const T> bias_t, Rows<T> out) {
    for_each_strip<T, Packed>(e, e.rows, [&](i64 k, i64 r, i64 start, i64 left, auto part, int lane) {
        T d[kPerLane];
        T a[kPerLane];
        T c[kPerLane];
        part.load(at(d1, 0, r) + start, left, lane, d);
        part.load(at(x_t, k, r) + start, left, lane, a);
        load(part, at(bias_t, k), start, left, lane, T(0), c);
        for (int i = 0; i < kPerLane; ++i)
            a[i] = d[i] * (a[i] + c[i]);
        part.store(at(out, k, r) + start, left, lane, a);
    });
}

// Second: q and a_t are there. Sum: partial (shares, b, columns) takes the sums of out over the rows of a share.
template <class T, bool Packed, bool Second, bool Sum> __global__ void __launch_bounds__(kBlock, 1)
    adjoint_kernel(Extent e, Rows<const T> d1, Rows<const T> y_gt, Rows<const T> q, Rows<const T> a_t, Rows<T> out, i64 shares, i64 each,
                   double* partial) {
    for_each_strip<T, Packed>(e, shares, [&](i64 k, i64 share, i64 start, i64 left, auto part, int lane) {
        double sum[kPerLane] = {};
        const i64 end = (share + 1) * each < e.rows ? (share + 1) * each : e.rows;
        for (i64 r = share * each; r < end; ++r) {
            T d[kPerLane];
            T g[kPerLane];
            part.load(at(d1, 0, r) + start, left, lane, d);
            part.load(at(y_gt, k, r) + start, left, lane, g);
            for (int i = 0; i < kPerLane; ++i)
                g[i] *= d[i];
            if constexpr (Second) {
                T c[kPerLane];
                T a[kPerLane];
                part.load(at(q, 0, r) + start, left, lane, c);
                part.load(at(a_t, k, r) + start, left, lane, a);
                for (int i = 0; i < kPerLane; ++i)
                    g[i] += c[i] * a[i];
            }
            part.store(at(out, k, r) + start, left, lane, g);
            for (int i = 0; Sum && i < kPerLane; ++i)
                sum[i] += static_cast<double>(g[i]);
        }
        if constexpr (Sum)
            store(part, partial + (share * e.b + k) * e.columns, start, left, lane, sum);
    });
}

} // namespace

i64 activation_workspace(Extent e, RowLaunch launch) { return launch.shares * e.b * e.columns; }

template <class T> Status activation_prepare(Curve f, Extent extent, Rows<const T> x, const T* bias, Rows<T> d1, Rows<T> d2,
                                             RowLaunch launch, int device, void* stream) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess)
        return status_of("activation_prepare", guard.error());
    const Extent e = joined<const T>(extent, bias, x, read(d1), {}, {}, read(d2));
    FS_LAUNCH(prepare_kernel<T>, strip_blocks(e, e.rows, launch), 1, launch.strip_block, 0, stream, f, e, x, bias, d1, d2);
    return status_of("activation_prepare", cudaGetLastError());
}

template <class T> Status activation_tangent(Extent extent, Rows<const T> d1, Rows<const T> x_t, Columns<const T> bias_t, Rows<T> out,
                                             RowLaunch launch, int device, void* stream) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess)
        return status_of("activation_tangent", guard.error());
    const Extent e = joined<const T>(extent, bias_t.data, d1, {}, x_t, {}, read(out));
    with(aligned(e, d1) && aligned(e, x_t) && aligned(e, bias_t) && aligned(e, out), [&](auto packed) {
        auto kernel = tangent_kernel<T, decltype(packed)::value>;
        FS_LAUNCH(kernel, strip_blocks(e, e.rows, launch), 1, launch.strip_block, 0, stream, e, d1, x_t, bias_t, out);
    });
    return status_of("activation_tangent", cudaGetLastError());
}

template <class T> Status activation_adjoint(Extent extent, Rows<const T> d1, Rows<const T> y_gt, Rows<const T> q, Rows<const T> a_t,
                                             Rows<T> out, Columns<T> bias_gt, double* work, RowLaunch launch, int device, void* stream) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess)
        return status_of("activation_adjoint", guard.error());
    const Extent e = joined<const T>(extent, bias_gt.data, d1, q, y_gt, a_t, read(out));
    const bool sums = bias_gt.data != nullptr;
    const i64 shares = sums ? launch.shares : e.rows;
    const i64 each = sums ? launch.each(e.rows) : 1;
    with(aligned(e, d1) && aligned(e, y_gt) && aligned(e, q) && aligned(e, a_t) && aligned(e, out), [&](auto packed) {
        with(q.data != nullptr, [&](auto two) {
            with(sums, [&](auto sum) {
                auto kernel = adjoint_kernel<T, decltype(packed)::value, decltype(two)::value, decltype(sum)::value>;
                FS_LAUNCH(kernel, strip_blocks(e, shares, launch), 1, launch.strip_block, 0, stream, e, d1, y_gt, q, a_t, out, shares, each,
                          work);
            });
        });
    });
    add_partials(e, work, e.columns, 0, bias_gt, launch, stream);
    return status_of("activation_adjoint", cudaGetLastError());
}

#define FS_INSTANTIATE(T)                                                                                                                  \
    template Status activation_prepare<T>(Curve, Extent, Rows<const T>, const T*, Rows<T>, Rows<T>, RowLaunch, int, void*);                \
    template Status activation_tangent<T>(Extent, Rows<const T>, Rows<const T>, Columns<const T>, Rows<T>, RowLaunch, int, void*);         \
    template Status activation_adjoint<T>(Extent, Rows<const T>, Rows<const T>, Rows<const T>, Rows<const T>, Rows<T>, Columns<T>,         \
                                          double*, RowLaunch, int, void*);
FS_INSTANTIATE(float)
FS_INSTANTIATE(double)
#undef FS_INSTANTIATE

} // namespace fastsharp::cuda
