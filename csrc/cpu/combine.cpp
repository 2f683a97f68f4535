// combine on the CPU: X = C V, all k rows of X in one pass over V.
//
// Note on numerical properties. The sum over the j rows is kept in double, in the order of the rows, and rounded once to T; products
// of float and half-precision rows are rounded to double as they are added. No reduction crosses columns: the bits depend neither
// on threads nor on the cut into tiles, nor on whether X is written past the caches.
#include "fastsharp/krylov.hpp"

#include "tiles.hpp"

namespace fastsharp::cpu {

namespace {

template <class S> struct Tile { // V (j, n)
    const S* V;
    i64 V_row, j, n;
};

template <class S, class T> using Combine = void (*)(const Tile<S>&, const double*, i64, i64, T*, i64, bool);

} // namespace

} // namespace fastsharp::cpu

#define FS_KERNELS "combine_kernels.inl"
#include "levels.inl"
#undef FS_KERNELS

namespace fastsharp::cpu {

namespace {

constexpr i64 kTask = 16; // tiles

template <class S, class T> Combine<S, T> kernel() {
#if FASTSHARP_X86
    if (simd() == Simd::avx512)
        return avx512::kCombine<S, T>;
    if (simd() == Simd::avx2)
        return avx2::kCombine<S, T>;
#endif
    return scalar::kCombine<S, T>;
}

} // namespace

template <class S, class T> Status combine(const double* C, i64 ldc, i64 k, const S* V, i64 ldv, i64 j, i64 n, T* X, i64 ldx, int threads) {
    const auto columns = kernel<S, T>();
    const i64 length = kTask * kTile<S>;
    const bool past = k * n * static_cast<i64>(sizeof(T)) >= kStreamed;
    parallel_for(ceil_div(n, length), threads, [=](i64 task) noexcept {
        const i64 i = task * length;
        columns(Tile<S>{V + i, ldv, j, n - i < length ? n - i : length}, C, ldc, k, X + i, ldx, past);
    });
    return {"combine"};
}

#define FS_INSTANTIATE(S, T) template Status combine<S, T>(const double*, i64, i64, const S*, i64, i64, i64, T*, i64, int);
FS_INSTANTIATE(float, float)
FS_INSTANTIATE(double, double)
FS_INSTANTIATE(Half, float)
FS_INSTANTIATE(BFloat16, float)
#undef FS_INSTANTIATE

} // namespace fastsharp::cpu
