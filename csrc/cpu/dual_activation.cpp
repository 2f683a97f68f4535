// Activations on the CPU.
//
// Note on numerical properties. Derivatives are computed in double and rounded once to T; see elementary.inl. A tangent is one product, the
// tangent of an adjoint a product and a fused or rounded product on top of it, in T, as torch has them. The bias gradient is summed in
// double over rows in order, within a task and then over tasks, and rounded once: the bits do not depend on threads.
#include "fastsharp/dual_activation.hpp"

#include "rows.hpp"

namespace fastsharp::cpu {

namespace {

template <class T> struct ActivationKernels {
    void (*prepare)(const Curve&, const T*, const T*, T*, T*, i64);
    void (*tangent)(const T*, const T*, const T*, T*, i64);
    void (*adjoint[2][2])(const T*, const T*, const T*, const T*, T*, double*, i64);
};

} // namespace

} // namespace fastsharp::cpu

#define FS_KERNELS "dual_activation_kernels.inl"
#include "levels.inl"
#undef FS_KERNELS

namespace fastsharp::cpu {

namespace {

template <class T> const ActivationKernels<T>& activation_kernels() {
#if FASTSHARP_X86
    if (simd() == Simd::avx512)
        return avx512::kActivation<T>;
    if (simd() == Simd::avx2)
        return avx2::kActivation<T>;
#endif
    return scalar::kActivation<T>;
}

template <class T> T* from(T* p, i64 i) { return p == nullptr ? nullptr : p + i; }

// f(task, row, first column, columns) for pieces of rows, those of a task in order of the rows.
template <class F> void for_each_piece(Extent e, int threads, F f) {
    const RowTasks tasks(e);
    const i64 pieces = ceil_div(e.columns, kTask);
    parallel_for(tasks.count * pieces, threads_for(e, threads), [=](i64 job) noexcept {
        const i64 task = job / pieces;
        const i64 i = job % pieces * kTask;
        const i64 end = (task + 1) * tasks.each < e.rows ? (task + 1) * tasks.each : e.rows;
        for (i64 r = task * tasks.each; r < end; ++r)
            f(task, r, i, e.columns - i < kTask ? e.columns - i : kTask);
    });
}

} // namespace

i64 activation_workspace(Extent e) { return RowTasks(e).count * e.b * e.columns; }

template <class T> Status activation_prepare(Curve f, Extent extent, Rows<const T> x, const T* bias, Rows<T> d1, Rows<T> d2, int threads) {
    const Extent e = joined<const T>(extent, bias, x, read(d1), {}, {}, read(d2));
    const auto kernel = activation_kernels<T>().prepare;
    for_each_piece(e, threads, [=](i64, i64 r, i64 i, i64 n) noexcept {
        kernel(f, at(x, 0, r) + i, from(bias, i), at(d1, 0, r) + i, from(at(d2, 0, r), i), n);
    });
    return {"activation_prepare"};
}

template <class T>
Status activation_tangent(Extent extent, Rows<const T> d1, Rows<const T> x_t, Columns<const T> bias_t, Rows<T> out, int threads) {
    const Extent e = joined<const T>(extent, bias_t.data, d1, {}, x_t, {}, read(out));
    const auto kernel = activation_kernels<T>().tangent;
    for_each_piece(e, threads, [=](i64, i64 r, i64 i, i64 n) noexcept {
        for (i64 k = 0; k < e.b; ++k)
            kernel(at(d1, 0, r) + i, at(x_t, k, r) + i, from(at(bias_t, k), i), at(out, k, r) + i, n);
    });
    return {"activation_tangent"};
}

template <class T> Status activation_adjoint(Extent extent, Rows<const T> d1, Rows<const T> y_gt, Rows<const T> q, Rows<const T> a_t,
                                             Rows<T> out, Columns<T> bias_gt, double* work, int threads) {
    const Extent e = joined<const T>(extent, bias_gt.data, d1, q, y_gt, a_t, read(out));
    const bool sums = bias_gt.data != nullptr;
    const auto kernel = activation_kernels<T>().adjoint[q.data != nullptr][sums];
    const i64 each = RowTasks(e).each;
    for_each_piece(e, threads, [=](i64 task, i64 r, i64 i, i64 n) noexcept {
        for (i64 k = 0; k < e.b; ++k) {
            double* mine = sums ? work + (task * e.b + k) * e.columns + i : nullptr;
            if (sums && r == task * each) {
                for (i64 c = 0; c < n; ++c)
                    mine[c] = 0;
            }
            kernel(at(d1, 0, r) + i, at(y_gt, k, r) + i, from(at(q, 0, r), i), from(at(a_t, k, r), i), at(out, k, r) + i, mine, n);
        }
    });
    add_partials(e, work, e.columns, 0, bias_gt, threads);
    return {"activation_adjoint"};
}

#define FS_INSTANTIATE(T)                                                                                                                  \
    template Status activation_prepare<T>(Curve, Extent, Rows<const T>, const T*, Rows<T>, Rows<T>, int);                                  \
    template Status activation_tangent<T>(Extent, Rows<const T>, Rows<const T>, Columns<const T>, Rows<T>, int);                           \
    template Status activation_adjoint<T>(Extent, Rows<const T>, Rows<const T>, Rows<const T>, Rows<const T>, Rows<T>, Columns<T>,         \
                                          double*, int);
FS_INSTANTIATE(float)
FS_INSTANTIATE(double)
#undef FS_INSTANTIATE

} // namespace fastsharp::cpu
