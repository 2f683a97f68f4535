// alpha, dots and update on the CPU.
//
// Note on numerical properties. alpha, w'w and the sum of update are computed in double throughout: for float input the
// products are exact, so the error is that of the final rounding (update) or of n double additions. dots multiplies and adds
// in T over chunks of kChunk elements (per lane at most 64 additions) and adds chunk sums in double: its error is of order
// sqrt(n) eps |v||w| with the constant of a 64-term sum, whatever n. Nothing overflows at |w| = 1e30 or underflows at 1e-30
// in float as long as the rows of V are of order one.
//
// Determinism. [0, n) is cut into tiles, and tiles into at most kSlabs slabs, by n alone. Each slab adds its tiles in order
// into its own slots; the slots are added in order. The thread count decides only who computes a slab.
#include "fastsharp/krylov.hpp"

#include "fastsharp/parallel.hpp"
#include "fastsharp/simd.hpp"
#if FASTSHARP_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // gcc 12 takes the undefined source of an unmasked intrinsic for ours
#endif
#include <immintrin.h>
#endif

namespace fastsharp::cpu {

namespace {

constexpr i64 kChunk = 256;  // elements summed in T
constexpr i64 kTile = 1024;  // elements of w kept in cache while the rows of V stream past
constexpr i64 kSlabs = 1024; // tasks at most
constexpr int kRows = 4;     // rows of V per load of w or of the accumulator

template <class T> struct Tiles {
    double (*alpha)(const T*, const T*, i64);
    void (*dots)(const T*, i64, T*, double, double, i64, i64, double*);
    double (*update)(const T*, i64, T*, const double*, i64, i64);
    double (*read)(const T*, i64);
};

} // namespace

} // namespace fastsharp::cpu

#define FS_LEVEL scalar
#define FS_TARGET
#define FS_BYTES 16
#define FS_TO_DOUBLE(x) __builtin_convertvector(x, Wide)
#define FS_TO_FLOAT(x) __builtin_convertvector(x, HalfFloat)
#include "krylov_kernels.inl"
#undef FS_LEVEL
#undef FS_TARGET
#undef FS_BYTES
#undef FS_TO_DOUBLE
#undef FS_TO_FLOAT

#if FASTSHARP_X86
#define FS_LEVEL avx2
#define FS_TARGET __attribute__((target("avx2,fma")))
#define FS_BYTES 32
#define FS_TO_DOUBLE(x) _mm256_cvtps_pd(x)
#define FS_TO_FLOAT(x) _mm256_cvtpd_ps(x)
#include "krylov_kernels.inl"
#undef FS_LEVEL
#undef FS_TARGET
#undef FS_BYTES
#undef FS_TO_DOUBLE
#undef FS_TO_FLOAT

#define FS_LEVEL avx512
#define FS_TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma")))
#define FS_BYTES 64
#define FS_TO_DOUBLE(x) _mm512_cvtps_pd(x)
#define FS_TO_FLOAT(x) _mm512_cvtpd_ps(x)
#include "krylov_kernels.inl"
#undef FS_LEVEL
#undef FS_TARGET
#undef FS_BYTES
#undef FS_TO_DOUBLE
#undef FS_TO_FLOAT
#endif

namespace fastsharp::cpu {

namespace {

template <class T> const Tiles<T>& tiles() {
#if FASTSHARP_X86
    if (simd() == Simd::avx512)
        return avx512::kTiles<T>;
    if (simd() == Simd::avx2)
        return avx2::kTiles<T>;
#endif
    return scalar::kTiles<T>;
}

i64 slab_length(i64 n) { return kTile * ceil_div(ceil_div(n, kTile), kSlabs); }
i64 slab_count(i64 n) { return ceil_div(n, slab_length(n)); }

// out[k] = sum over slabs of what f(start, length, slots) adds to slots[k], k < width, in an order fixed by n.
template <class F> void reduce(i64 n, i64 width, double* out, double* work, int threads, F f) {
    const i64 length = slab_length(n);
    const i64 count = slab_count(n);
    parallel_for(count, threads, [=](i64 slab) noexcept {
        double* slots = work + slab * width;
        for (i64 k = 0; k < width; ++k)
            slots[k] = 0;
        const i64 end = (slab + 1) * length < n ? (slab + 1) * length : n;
        for (i64 i = slab * length; i < end; i += kTile)
            f(i, end - i < kTile ? end - i : kTile, slots);
    });
    for (i64 k = 0; k < width; ++k) {
        double s = 0;
        for (i64 slab = 0; slab < count; ++slab)
            s += work[slab * width + k];
        out[k] = s;
    }
}

} // namespace

i64 workspace_size(i64 n, i64 j) { return slab_count(n) * (j + 1); }

template <class T> Status alpha(const T* v, const T* w, i64 n, double* out, double* work, int threads) {
    const auto tile = tiles<T>().alpha;
    reduce(n, 1, out, work, threads, [=](i64 i, i64 length, double* slots) noexcept { slots[0] += tile(v + i, w + i, length); });
    return {"alpha"};
}

template <class T> Status dots(const T* V, i64 ldv, T* w, const double* ab, i64 j, i64 n, double* out, double* work, int threads) {
    const auto tile = tiles<T>().dots;
    const double a = ab[0];
    const double b = ab[1];
    reduce(n, j + 1, out, work, threads,
           [=](i64 i, i64 length, double* slots) noexcept { tile(V + i, ldv, w + i, a, b, j, length, slots); });
    return {"dots"};
}

template <class T> Status update(const T* V, i64 ldv, T* w, const double* c, i64 j, i64 n, double* out, double* work, int threads) {
    const auto tile = tiles<T>().update;
    reduce(n, 1, out, work, threads, [=](i64 i, i64 length, double* slots) noexcept { slots[0] += tile(V + i, ldv, w + i, c, j, length); });
    return {"update"};
}

template <class T> Status read_stream(const T* x, i64 n, double* out, double* work, int threads) {
    const auto tile = tiles<T>().read;
    reduce(n, 1, out, work, threads, [=](i64 i, i64 length, double* slots) noexcept { slots[0] += tile(x + i, length); });
    return {"read_stream"};
}

#define FS_INSTANTIATE(T)                                                                                                                  \
    template Status alpha<T>(const T*, const T*, i64, double*, double*, int);                                                              \
    template Status dots<T>(const T*, i64, T*, const double*, i64, i64, double*, double*, int);                                            \
    template Status update<T>(const T*, i64, T*, const double*, i64, i64, double*, double*, int);                                          \
    template Status read_stream<T>(const T*, i64, double*, double*, int);
FS_INSTANTIATE(float)
FS_INSTANTIATE(double)
#undef FS_INSTANTIATE

} // namespace fastsharp::cpu
