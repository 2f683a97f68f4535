// Softmax and cross-entropy on the CPU: a row is swept twice while it lies in cache, whatever the number of classes.
//
// Note on numerical properties. Sums, exponentials and what is subtracted are double; each result is rounded once to T. The maximum is
// taken off before the exponential, so that no logit overflows; -inf is a probability of zero, +inf or NaN gives NaN. Rows are
// independent: the bits do not depend on threads.
#include "fastsharp/dual_softmax_ce.hpp"

#include "rows.hpp"

namespace fastsharp::cpu {

namespace {

template <class T> struct SoftmaxKernels {
    void (*gradient)(const T*, i64, i64, double, double, T*, T*);
    void (*product)(const T*, const T*, double, T*, i64);
};

} // namespace

} // namespace fastsharp::cpu

#define FS_KERNELS "dual_softmax_ce_kernels.inl"
#include "levels.inl"
#undef FS_KERNELS

namespace fastsharp::cpu {

namespace {

template <class T> const SoftmaxKernels<T>& softmax_kernels() {
#if FASTSHARP_X86
    if (simd() == Simd::avx512)
        return avx512::kSoftmax<T>;
    if (simd() == Simd::avx2)
        return avx2::kSoftmax<T>;
#endif
    return scalar::kSoftmax<T>;
}

template <class T> void clear(T* p, i64 n) {
    for (i64 i = 0; p != nullptr && i < n; ++i)
        p[i] = 0;
}

} // namespace

template <class T> Status softmax_gradient(Extent e, Rows<const T> z, const CrossEntropy<T>& loss, Rows<T> p, Rows<T> g, int threads) {
    const auto kernel = softmax_kernels<T>().gradient;
    for_each_row(e, threads, [=](i64, i64 r) noexcept {
        const double weight = loss.weight == nullptr ? 1 : static_cast<double>(loss.weight[r]);
        if (weight == 0) {
            clear(at(p, 0, r), e.columns);
            clear(at(g, 0, r), e.columns);
        } else {
            kernel(at(z, 0, r), e.columns, g.data == nullptr ? -1 : loss.target[r], weight, loss.smoothing, at(p, 0, r), at(g, 0, r));
        }
    });
    return {"softmax_gradient"};
}

template <class T> Status softmax_product(Extent e, Rows<const T> p, const T* weight, Rows<const T> u, Rows<T> out, int threads) {
    const auto kernel = softmax_kernels<T>().product;
    for_each_row(e, threads, [=](i64, i64 r) noexcept {
        const double w = weight == nullptr ? 1 : static_cast<double>(weight[r]);
        for (i64 k = 0; k < e.b; ++k) {
            if (w == 0)
                clear(at(out, k, r), e.columns);
            else
                kernel(at(p, 0, r), at(u, k, r), w, at(out, k, r), e.columns);
        }
    });
    return {"softmax_product"};
}

#define FS_INSTANTIATE(T)                                                                                                                  \
    template Status softmax_gradient<T>(Extent, Rows<const T>, const CrossEntropy<T>&, Rows<T>, Rows<T>, int);                             \
    template Status softmax_product<T>(Extent, Rows<const T>, const T*, Rows<const T>, Rows<T>, int);
FS_INSTANTIATE(float)
FS_INSTANTIATE(double)
#undef FS_INSTANTIATE

} // namespace fastsharp::cpu
