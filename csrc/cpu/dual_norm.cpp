// Layer and RMS norm on the CPU: each row is swept twice while it lies in cache, so that memory is read once.
//
// Note on numerical properties. Everything is double between the loads and the stores, the mean and the reciprocal deviation included, and
// each result is rounded once to T. Gradients of weight and bias are summed in double over rows in order, within a task and then over
// tasks: the bits do not depend on threads.
#include "fastsharp/dual_norm.hpp"

#include "rows.hpp"

namespace fastsharp::cpu {

namespace {

template <class T> struct NormRow {
    const T* x;
    const T* w;
    i64 n;
    double mean, rstd;
    bool center;
};

template <class T> struct SecondRow {
    const T* y_g;
    const double* g_sums;
    const T* x_t;
    const double* x_sums;
    const T* w_t;
};

template <class T> struct NormKernels {
    void (*prepare)(const T*, i64, double, bool, double*);
    void (*tangent)(const NormRow<T>&, const T*, const T*, const T*, T*, double*);
    void (*adjoint[2])(const NormRow<T>&, const T*, const SecondRow<T>&, T*, double*, double*, double*);
};

} // namespace

} // namespace fastsharp::cpu

#define FS_KERNELS "dual_norm_kernels.inl"
#include "levels.inl"
#undef FS_KERNELS

namespace fastsharp::cpu {

namespace {

template <class T> const NormKernels<T>& norm_kernels() {
#if FASTSHARP_X86
    if (simd() == Simd::avx512)
        return avx512::kNorm<T>;
    if (simd() == Simd::avx2)
        return avx2::kNorm<T>;
#endif
    return scalar::kNorm<T>;
}

template <class T> NormRow<T> row_of(const Norm<T>& f, Extent e, i64 r) {
    return {at(f.x, 0, r), f.w, e.columns, f.stats[2 * r], f.stats[2 * r + 1], f.center};
}

} // namespace

i64 norm_workspace(Extent e) { return RowTasks(e).count * e.b * 2 * e.columns; }

template <class T> Status norm_prepare(Extent e, Rows<const T> x, double eps, bool center, double* stats, int threads) {
    const auto kernel = norm_kernels<T>().prepare;
    for_each_row(e, threads, [=](i64, i64 r) noexcept { kernel(at(x, 0, r), e.columns, eps, center, stats + 2 * r); });
    return {"norm_prepare"};
}

template <class T> Status norm_tangent(Extent e, const Norm<T>& f, Rows<const T> x_t, Columns<const T> w_t, Columns<const T> bias_t,
                                       Rows<T> out, double* sums, int threads) {
    const auto kernel = norm_kernels<T>().tangent;
    for_each_row(e, threads, [=](i64, i64 r) noexcept {
        const NormRow<T> row = row_of(f, e, r);
        for (i64 k = 0; k < e.b; ++k)
            kernel(row, at(x_t, k, r), at(w_t, k), at(bias_t, k), at(out, k, r), sums + 2 * (k * e.rows + r));
    });
    return {"norm_tangent"};
}

template <class T> Status norm_adjoint(Extent e, const Norm<T>& f, Rows<const T> y_gt, const NormSecond<T>& second, Rows<T> out,
                                       double* sums, NormGradients<T> gradients, double* work, int threads) {
    const auto kernel = norm_kernels<T>().adjoint[second.y_g.data != nullptr];
    const bool w_too = gradients.w.data != nullptr, bias_too = gradients.bias.data != nullptr;
    const i64 each = RowTasks(e).each;
    for_each_row(e, threads, [=](i64 task, i64 r) noexcept {
        const NormRow<T> row = row_of(f, e, r);
        for (i64 k = 0; k < e.b; ++k) {
            double* mine = w_too || bias_too ? work + (task * e.b + k) * 2 * e.columns : nullptr;
            if (mine != nullptr && r == task * each) {
                for (i64 c = 0; c < 2 * e.columns; ++c)
                    mine[c] = 0;
            }
            const i64 pair = 2 * (k * e.rows + r);
            SecondRow<T> s{};
            if (second.y_g.data != nullptr)
                s = {at(second.y_g, 0, r), second.g_sums + 2 * r, at(second.x_t, k, r), second.x_sums + pair, at(second.w_t, k)};
            kernel(row, at(y_gt, k, r), s, at(out, k, r), sums == nullptr ? nullptr : sums + pair, w_too ? mine : nullptr,
                   bias_too ? mine + e.columns : nullptr);
        }
    });
    add_partials(e, work, 2 * e.columns, 0, gradients.w, threads);
    add_partials(e, work, 2 * e.columns, e.columns, gradients.bias, threads);
    return {"norm_adjoint"};
}

#define FS_INSTANTIATE(T)                                                                                                                  \
    template Status norm_prepare<T>(Extent, Rows<const T>, double, bool, double*, int);                                                    \
    template Status norm_tangent<T>(Extent, const Norm<T>&, Rows<const T>, Columns<const T>, Columns<const T>, Rows<T>, double*, int);     \
    template Status norm_adjoint<T>(Extent, const Norm<T>&, Rows<const T>, const NormSecond<T>&, Rows<T>, double*, NormGradients<T>,       \
                                    double*, int);
FS_INSTANTIATE(float)
FS_INSTANTIATE(double)
#undef FS_INSTANTIATE

} // namespace fastsharp::cpu
