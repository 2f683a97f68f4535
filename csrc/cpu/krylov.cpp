// alpha, dots and update on the CPU.
//
// Note on numerical properties. alpha, w'w, what dots removes and the sum of update are computed in double throughout: for float input
// the products are exact, so the error is that of the final rounding (removal, update) or of n double additions. dots multiplies and
// adds in T over chunks of kChunk elements (per lane at most 64 additions) and adds chunk sums in double: its error is of order
// sqrt(n) eps |v||w| with the constant of a 64-term sum, whatever n. Half-precision rows are widened exactly before any product.
// The next row is factor w in double, rounded to float and then to its storage type, to nearest even.
// Nothing overflows at |w| = 1e30 or underflows at 1e-30 in float as long as the rows of V are of order one.
//
// Determinism: tiles.hpp. The results for one vector are the same bits whatever E and b are.
#include "fastsharp/krylov.hpp"

#include "tiles.hpp"

namespace fastsharp::cpu {

namespace {

constexpr i64 kChunk = 256; // elements summed in T

template <int N> struct Size {
    static constexpr int value = N;
};

template <class S, class T> struct Tile { // V (j, n), w (b, n)
    const S* V;
    i64 V_row;
    T* w;
    i64 w_row;
    i64 b, j, n;
};

template <class T> struct Terms { // what dots takes off: a1 v1 + a2 v2, null or zero: nothing
    const T* v1 = nullptr;
    double a1 = 0;
    const T* v2 = nullptr;
    double a2 = 0;
};

struct Coefficients {
    const double* data;
    i64 row;
};

template <class S> struct Next { // null: no row to write
    S* row = nullptr;
    double factor = 0;
};

template <class T> struct VectorKernels {
    double (*alpha)(const T*, const T*, i64);
    double (*read)(const T*, i64);
};

template <class S, class T> struct BasisKernels {
    void (*dots)(const Tile<S, T>&, const Terms<T>&, double*);
    void (*update)(const Tile<S, T>&, const Coefficients&, const Next<S>&, double*);
};

} // namespace

} // namespace fastsharp::cpu

#define FS_KERNELS "krylov_kernels.inl"
#include "levels.inl"
#undef FS_KERNELS

namespace fastsharp::cpu {

namespace {

template <class T> const VectorKernels<T>& vector_kernels() {
#if FASTSHARP_X86
    if (simd() == Simd::avx512)
        return avx512::kVector<T>;
    if (simd() == Simd::avx2)
        return avx2::kVector<T>;
#endif
    return scalar::kVector<T>;
}

template <class S, class T> const BasisKernels<S, T>& basis_kernels() {
#if FASTSHARP_X86
    if (simd() == Simd::avx512)
        return avx512::kBasis<S, T>;
    if (simd() == Simd::avx2)
        return avx2::kBasis<S, T>;
#endif
    return scalar::kBasis<S, T>;
}

template <class T> T* at(Vectors<T> v, i64 e, i64 i) { return v.data == nullptr ? nullptr : v.data + e * v.member + i; }

template <class S, class T> Tile<S, T> tile_of(const Problem<S, T>& p, i64 e, i64 i, i64 length) {
    return {p.V + e * p.V_member + i, p.V_row, p.w + e * p.w_member + i, p.w_row, p.b, p.j, length};
}

} // namespace

i64 workspace_size(i64 E, i64 b, i64 n, i64 j) { return E * slab_count(n) * b * (j + 1); }

template <class T> Status alpha(i64 E, i64 n, Vectors<const T> v, Vectors<const T> w, Vectors<double> out, double* work, int threads) {
    const auto kernel = vector_kernels<T>().alpha;
    reduce(E, 1, n, 1, kTile<T>, {out.data, out.member, 0}, work, threads,
           [=](i64 e, i64 i, i64 length, double* slots) noexcept { slots[0] += kernel(at(v, e, i), at(w, e, i), length); });
    return {"alpha"};
}

template <class S, class T> Status dots(const Problem<S, T>& p, const Removed<T>& removed, Scalars<double> out, double* work, int threads) {
    const auto kernel = basis_kernels<S, T>().dots;
    reduce(p.E, p.b, p.n, p.j + 1, kTile<S>, out, work, threads, [=](i64 e, i64 i, i64 length, double* slots) noexcept {
        Terms<T> terms;
        if (removed.ab != nullptr) {
            const double* ab = removed.ab + e * removed.ab_member;
            terms = {at(removed.last, e, i), ab[0], at(removed.before, e, i), ab[1]};
        }
        kernel(tile_of(p, e, i, length), terms, slots);
    });
    return {"dots"};
}

template <class S, class T>
Status update(const Problem<S, T>& p, Scalars<const double> c, const NextRow<S>& row, Scalars<double> out, double* work, int threads) {
    const auto kernel = basis_kernels<S, T>().update;
    reduce(p.E, p.b, p.n, 1, kTile<S>, out, work, threads, [=](i64 e, i64 i, i64 length, double* slots) noexcept {
        Next<S> next;
        if (row.data != nullptr)
            next = {row.data + e * row.member + i, row.factor[e * row.factor_member]};
        kernel(tile_of(p, e, i, length), Coefficients{c.data + e * c.member, c.row}, next, slots);
    });
    return {"update"};
}

template <class T> Status read_stream(const T* x, i64 n, double* out, double* work, int threads) {
    const auto kernel = vector_kernels<T>().read;
    reduce(1, 1, n, 1, kTile<T>, {out, 0, 0}, work, threads,
           [=](i64, i64 i, i64 length, double* slots) noexcept { slots[0] += kernel(x + i, length); });
    return {"read_stream"};
}

#define FS_INSTANTIATE_VECTOR(T)                                                                                                           \
    template Status alpha<T>(i64, i64, Vectors<const T>, Vectors<const T>, Vectors<double>, double*, int);                                 \
    template Status read_stream<T>(const T*, i64, double*, double*, int);
#define FS_INSTANTIATE(S, T)                                                                                                               \
    template Status dots<S, T>(const Problem<S, T>&, const Removed<T>&, Scalars<double>, double*, int);                                    \
    template Status update<S, T>(const Problem<S, T>&, Scalars<const double>, const NextRow<S>&, Scalars<double>, double*, int);
FS_INSTANTIATE_VECTOR(float)
FS_INSTANTIATE_VECTOR(double)
FS_INSTANTIATE(float, float)
FS_INSTANTIATE(double, double)
FS_INSTANTIATE(Half, float)
FS_INSTANTIATE(BFloat16, float)
#undef FS_INSTANTIATE_VECTOR
#undef FS_INSTANTIATE

} // namespace fastsharp::cpu
